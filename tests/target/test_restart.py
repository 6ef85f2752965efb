"""`convert --restart` on a finished target says what it would remove; `--yes` remakes it. Nothing else is removed."""

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import Job, convert_checkpoint
from targets import RANKS, Crash, make_source_and_target, rank_file, stamps
from torture import contents

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.target.room import measure_allocated


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source_and_target(tmp_path_factory.mktemp("restart"))


@pytest.fixture(scope="module")
def good(source: Path) -> Path:
    return source.with_name("whole")


@pytest.fixture
def target(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "target")


@pytest.mark.parametrize("ranks", [RANKS, 2], ids=["the same", "another number of ranks"])
def test_what_would_be_removed_is_said_and_nothing_is_done(
    ranks: int, source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (target / "notes.txt").write_text("mine", encoding="utf-8")
    before = stamps(target)
    size = sum(path.stat().st_size for path in target.iterdir() if path.name != "notes.txt")
    assert main(["convert", str(source), str(target), "--mp", str(ranks), "--restart"]) == 2
    told = capsys.readouterr().err
    assert f"--restart would remove {len(before) - 1} files, {size:,} bytes" in told
    assert all((name in told) == (name != "notes.txt") for name in before)
    assert "--yes" in told
    assert "reshard repair" in told
    assert stamps(target) == before


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_target_is_asked_about_too(
    damage: str, source: Path, good: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if damage == "truncated":
        rank_file(target, 2).write_bytes(b"x")
    else:
        rank_file(target, 2).unlink()
    before = stamps(target)
    words = ["convert", str(source), str(target), "--mp", str(RANKS), "--restart"]
    assert main(words) == 2
    assert f"--restart would remove {len(before)} files" in capsys.readouterr().err
    assert stamps(target) == before
    assert main([*words, "--yes"]) == 0
    assert stamps(target)[rank_file(target, 0).name] != before[rank_file(target, 0).name]
    assert contents(target) == contents(good)


def test_with_yes_a_damaged_target_is_remade(source: Path, good: Path, target: Path) -> None:
    rank_file(target, 0).write_bytes(b"damaged")
    (target / "notes.txt").write_text("mine", encoding="utf-8")
    before = stamps(target)
    conversion = reshard.convert(source, target, mp=RANKS, restart=True, yes=True)
    assert len(conversion.plan.files) == RANKS
    after = stamps(target)
    assert {name for name in before if after[name] == before[name]} == {"notes.txt"}
    assert (target / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert contents(target) == {**contents(good), "notes.txt": contents(target)["notes.txt"]}


def test_with_yes_another_conversion_takes_its_place(source: Path, target: Path, tmp_path: Path) -> None:
    convert_checkpoint(Job(source, 2, cast="bf16"), tmp_path / "wanted")
    reshard.convert(source, target, mp=2, cast="bf16", restart=True, yes=True)
    assert contents(target) == contents(tmp_path / "wanted")


def test_with_yes_and_ranks_only_their_files_are_remade(source: Path, good: Path, target: Path) -> None:
    before = stamps(target)
    with pytest.raises(Refused, match="would remove 1 file"):
        reshard.convert(source, target, mp=RANKS, ranks=[2], restart=True)
    assert stamps(target) == before
    reshard.convert(source, target, mp=RANKS, ranks=[2], restart=True, yes=True)
    after = stamps(target)
    assert {
        rank for rank in range(RANKS) if after[f"model{rank}-mp4.safetensors"] != before[f"model{rank}-mp4.safetensors"]
    } == {2}
    assert contents(target) == contents(good)


def test_what_cannot_be_written_is_refused_before_anything_is_removed(
    source: Path, target: Path, tmp_path: Path
) -> None:
    before = stamps(target)
    for arguments in ({"mp": 7}, {"mp": RANKS, "cast": "fp8"}):
        with pytest.raises(Refused):
            reshard.convert(source, target, restart=True, yes=True, **arguments)
    (target / "mine.safetensors").write_bytes(b"mine")
    with pytest.raises(Refused, match=r"mine\.safetensors"):
        reshard.convert(source, target, mp=RANKS, restart=True, yes=True)
    (target / "mine.safetensors").unlink()
    linked = tmp_path / "linked"
    shutil.copytree(source, linked)
    (linked / "tokenizer.json").unlink()
    (linked / "tokenizer.json").symlink_to(target / "tokenizer.json")
    with pytest.raises(Refused, match="another target"):
        reshard.convert(linked, target, mp=RANKS, restart=True, yes=True)
    assert stamps(target) == before


def test_what_a_person_has_changed_is_named_apart(source: Path, target: Path) -> None:
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, mp=RANKS, restart=True)
    assert "of these, changed" not in str(refused.value)
    (target / "tokenizer.json").write_text("mine", encoding="utf-8")
    with pytest.raises(Refused, match=r"changed since they were written: tokenizer\.json"):
        reshard.convert(source, target, mp=RANKS, restart=True)


def test_files_of_a_third_conversion_stay(source: Path, good: Path, target: Path, tmp_path: Path) -> None:
    """Its manifest was put aside by hand: `reshard.json` is of another one."""
    convert_checkpoint(Job(source, 2), tmp_path / "two")
    for path in (tmp_path / "two").glob("model*"):
        shutil.copy(path, target)
    shutil.copy(tmp_path / "two" / "reshard.json", target / "reshard.json.bak")
    before = stamps(target)
    with pytest.raises(Refused, match=r"model0-mp2\.safetensors"):
        reshard.convert(source, target, mp=2, cast="bf16", restart=True, yes=True)
    assert stamps(target) == before
    assert {*contents(good).items()} <= {*contents(target).items()}


def test_a_link_to_another_disk_makes_no_room_on_this_one(good: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(rank_file(good, 0))
    shutil.copy(rank_file(good, 0), tmp_path / "file")
    assert measure_allocated(tmp_path / "link") <= 4096 < measure_allocated(tmp_path / "file")
    os.link(tmp_path / "file", tmp_path / "second name")
    assert measure_allocated(tmp_path / "file") == 0


def test_yes_alone_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="whose question it answers"):
        reshard.convert(source, tmp_path / "target", mp=2, yes=True)


@pytest.mark.parametrize("removed", range(9))
def test_after_a_crash_the_same_command_without_restart_ends_it(
    removed: int, source: Path, good: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the eight files are removed, then the program ends. What is left is named by a manifest until the end."""
    left = [removed]
    unlink = Path.unlink

    def crashing(self: Path, missing_ok: bool = False) -> None:  # noqa: FBT001, FBT002
        left[0] -= 1
        if left[0] < 0:
            os_exit()
        unlink(self, missing_ok)

    def os_exit() -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crashing)
        with pytest.raises(Crash):
            reshard.convert(source, target, mp=RANKS, restart=True, yes=True)
    reshard.convert(source, target, mp=RANKS)
    assert contents(target) == contents(good)


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_on_a_terminal_it_asks(answer: str, source: Path, good: Path, target: Path) -> None:
    before = stamps(target)
    leader, follower = pty.openpty()
    words = [sys.executable, "-m", "reshard", "convert", str(source), str(target), "--mp", str(RANKS), "--restart"]
    with subprocess.Popen(
        [*words, "--progress", "none"], stdin=follower, stdout=subprocess.PIPE, stderr=follower, text=True
    ) as process:
        os.write(leader, f"{answer}\n".encode())
        process.communicate(timeout=60)
    os.close(follower)
    told = os.read(leader, 100_000).decode()
    os.close(leader)
    assert "Remove these files and write the target anew? [y/N]" in told
    assert process.returncode == (0 if answer == "y" else 2)
    assert (stamps(target) == before) == (answer != "y")
    assert contents(target) == contents(good)
