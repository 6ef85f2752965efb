"""What happens when something happens: kills, crashes between two steps, a full disk, a changed source, two runs.

Faults are real: processes are killed, disks are full. Where a crash must fall between two system calls, the program is
ended there by an exception that nothing catches.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import Job, convert_checkpoint
from torture import MODES, RANKS, Mode, Tally, contents, moments, torment, undisturbed

import reshard.execution.execute
import reshard.execution.finished_files
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.execute import Settings
from reshard.formats.target_names import JOURNAL
from reshard.storage.local import make_durable
from reshard.synthetic import SMALL_V3, write_checkpoint


class Crash(BaseException):
    """The end of the program, without a word."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "source"
    write_checkpoint(folder, SMALL_V3, 4)
    return folder


@pytest.fixture(scope="module")
def twin(source: Path) -> Path:
    """Another model with the same headers."""
    folder = source.with_name("twin")
    write_checkpoint(folder, SMALL_V3, 4, seed=1)
    return folder


@pytest.fixture(scope="module")
def wanted(source: Path) -> dict[str, str]:
    target = source.with_name("wanted")
    convert_checkpoint(Job(source, RANKS), target)
    return contents(target)


def kinds(error: pytest.ExceptionInfo[Refused]) -> set[str]:
    return {problem.kind for problem in error.value.problems}


# --- kills ---


@pytest.fixture(scope="module")
def steps(source: Path) -> int:
    """In how many a conversion is done; with several threads too."""
    return undisturbed(source, source.with_name("undisturbed"), Mode(1, "yes"))


@pytest.mark.parametrize("number", range(0, len(MODES), 2), ids=lambda number: str(MODES[number]))
def test_a_killed_run_is_finished_by_the_next(
    number: int, source: Path, wanted: dict[str, str], steps: int, tmp_path: Path
) -> None:
    """Killed at random moments, up to three times. `make torture` does it by the hundreds."""
    # The earliest first: a run may end before a late kill, and then nothing is left to be killed.
    tally, killed_at = Tally(), sorted(moments(random.Random(number), steps, 3))
    torment(source, tmp_path / "target", wanted, MODES[number], killed_at, tally)
    assert tally.kills > 0
    assert tally.wrong == []


# --- crashes between two steps ---


@pytest.fixture
def half_renamed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target of which two rank files have their final names."""
    target, rename, done = tmp_path / "target", Path.rename, []

    def crashing(self: Path, to: Path) -> Path:
        done.append(to)
        if len(done) > 2:
            raise Crash
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crashing)
        with pytest.raises(Crash):
            convert_checkpoint(Job(source, RANKS), target)
    assert sorted(path.name for path in target.glob("*.safetensors")) == [done[0].name, done[1].name]
    return target


def test_a_crash_between_two_renames_is_finished(half_renamed: Path, source: Path, wanted: dict[str, str]) -> None:
    finished = half_renamed / "model0-mp4.safetensors"
    before = finished.stat()
    convert_checkpoint(Job(source, RANKS), half_renamed)
    assert contents(half_renamed) == wanted
    assert (finished.stat().st_ino, finished.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_after_it_another_job_is_refused_and_a_restart_leaves_no_mixture(half_renamed: Path, twin: Path) -> None:
    with pytest.raises(Refused) as error:
        convert_checkpoint(Job(twin, RANKS), half_renamed)
    assert kinds(error) == {"another-job"}
    convert_checkpoint(Job(twin, RANKS), half_renamed, Settings(restart=True))
    assert main(["verify", str(half_renamed), "--source", str(twin)]) == 0
    assert not list(half_renamed.glob("*.partial"))


def test_a_journal_left_behind_the_last_rename_is_cleared(
    source: Path, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(reshard.execution.finished_files, "remove_files", crash)
        with pytest.raises(Crash):
            convert_checkpoint(Job(source, RANKS), target)
    assert (target / JOURNAL).exists()
    assert convert_checkpoint(Job(source, RANKS), target).done is None
    assert contents(target) == wanted


def test_a_finished_run_leaves_the_unfinished_one_of_other_ranks_alone(
    source: Path, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    convert_checkpoint(Job(source, RANKS, ranks=(0,)), target)

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(reshard.execution.execute, "rename_to_final", crash)
        with pytest.raises(Crash):
            convert_checkpoint(Job(source, RANKS, ranks=(1,)), target)
    journal = (target / JOURNAL).read_bytes()
    assert main(["convert", str(source), str(target), "--mp", str(RANKS), "--ranks", "0", "--dry-run"]) == 0
    assert convert_checkpoint(Job(source, RANKS, ranks=(0,)), target).done is None
    assert (target / JOURNAL).read_bytes() == journal
    (target / "tokenizer.json").unlink()
    with pytest.raises(Refused) as error:
        convert_checkpoint(Job(source, RANKS, ranks=(0,)), target)
    assert kinds(error) == {"another-job"}
    result = convert_checkpoint(Job(source, RANKS, ranks=(1,)), target)
    assert result.done is not None
    assert result.done.resumed > 0
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == wanted


# --- another job ---


def test_a_model_with_the_same_headers_is_another_job(source: Path, twin: Path, tmp_path: Path) -> None:
    convert_checkpoint(Job(source, RANKS, ranks=[0, 1]), tmp_path / "target")
    before = contents(tmp_path / "target")
    for only in (None, [2, 3], [0, 1]):
        with pytest.raises(Refused) as error:
            convert_checkpoint(Job(twin, RANKS, ranks=only), tmp_path / "target")
        assert kinds(error) == {"target-not-empty"}
    assert contents(tmp_path / "target") == before


def test_ranks_written_one_run_after_another_give_the_whole(
    source: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    for only in ([2], [0, 1], None):
        convert_checkpoint(Job(source, RANKS, ranks=only), tmp_path / "target")
    assert contents(tmp_path / "target") == wanted


def test_a_lost_rank_file_is_written_again(source: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    convert_checkpoint(Job(source, RANKS), tmp_path / "target")
    (tmp_path / "target" / "model2-mp4.safetensors").unlink()
    convert_checkpoint(Job(source, RANKS), tmp_path / "target")
    assert contents(tmp_path / "target") == wanted


def test_two_runs_at_once_are_one_too_many(source: Path, tmp_path: Path) -> None:
    """The journal is held by a process that is still there; when it is killed, the lock goes with it."""
    target = tmp_path / "target"
    target.mkdir()
    hold = (
        "import contextlib, pathlib, sys; from reshard.execution.journal import lock_journal\n"
        "with contextlib.ExitStack() as stack:\n"
        "    lock_journal(stack, pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(target / JOURNAL)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Refused) as error:
            convert_checkpoint(Job(source, RANKS), target)
        assert kinds(error) == {"target-in-use"}
        holder.kill()
    convert_checkpoint(Job(source, RANKS), target)


def test_a_damaged_journal_is_refused_and_restarted(source: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "target"
    interrupted(source, target)
    journal = target / JOURNAL
    content = bytearray(journal.read_bytes())
    content[content.index(b"\n") + 10] ^= 1
    journal.write_bytes(content + bytes([1]))
    with pytest.raises(Refused) as error:
        convert_checkpoint(Job(source, RANKS), target)
    assert kinds(error) == {"damaged-journal"}
    convert_checkpoint(Job(source, RANKS), target, Settings(restart=True))
    assert contents(target) == wanted


def test_a_torn_end_of_the_journal_is_as_if_never_written(source: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "target"
    interrupted(source, target)
    journal = target / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-5])
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == wanted


def interrupted(source: Path, target: Path) -> None:
    """A run that ended when everything was durable and nothing had its final name."""
    with pytest.MonkeyPatch.context() as patch:

        def crash(*_: object) -> None:
            raise Crash

        patch.setattr(reshard.execution.execute, "rename_to_final", crash)
        with pytest.raises(Crash):
            convert_checkpoint(Job(source, RANKS), target)


# --- the disk and the source ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_loses_nothing(source: Path, wanted: dict[str, str], small_disk: Path) -> None:
    """The room is taken by somebody else between the look at it and the writing."""
    target, thief = small_disk / "target", small_disk / "thief"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 40}))
        thief.write_bytes(bytes(40 << 20))
        with pytest.raises(Refused) as error:
            convert_checkpoint(Job(source, RANKS), target)
    assert kinds(error) == {"cannot-write"}
    assert "No space left" in str(error.value)
    assert not list(target.glob("*"))
    thief.unlink()
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == wanted


def test_a_limit_on_file_sizes_is_told(source: Path, tmp_path: Path) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    command = [sys.executable, "-m", "reshard", "convert", str(source), str(tmp_path / "target"), "--mp", str(RANKS)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert not list((tmp_path / "target").glob("*.safetensors"))


def test_a_source_that_changes_is_seen(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to when its bytes have been read, so that only its time could tell."""
    copy, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(source, copy)

    def change_too(*arguments: object) -> None:
        make_durable(*arguments)  # type: ignore[arg-type]
        with next(copy.glob("*.safetensors")).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")

    with monkeypatch.context() as patch:
        patch.setattr(reshard.execution.execute, "make_durable", change_too)
        with pytest.raises(Refused) as error:
            convert_checkpoint(Job(copy, RANKS), target)
    assert kinds(error) == {"source-changed"}
    assert not list(target.glob("*.safetensors"))


# --- verification of a part ---


def test_verify_of_some_ranks_misses_what_they_lack(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    convert_checkpoint(Job(source, RANKS, ranks=[0]), target)
    path = target / "model0-mp4.safetensors"
    header = b'{"norm.weight":{"dtype":"BF16","shape":[256],"data_offsets":[0,512]}}'
    header += b" " * (-len(header) % 8)
    entry = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])["norm.weight"]
    begin, end = entry["data_offsets"]
    data = path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") :][begin:end]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert main(["verify", str(target), "--source", str(source), "--ranks", "0"]) == 1
    assert main(["verify", str(target), "--source", str(source), "--ranks", "9"]) == 2
