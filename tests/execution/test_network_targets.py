"""Targets on a network file system: whole commands under a lock file, by processes that stop, sleep, and are killed.

In these tests every disk counts as lying on a network; no machine has two networks.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, convert_checkpoint
from targets import CONFIG, RANKS, Crash, leave_unfinished, make_source_and_target, rank_file
from torture import contents, durable_bytes

import reshard
import reshard.execution.execute
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution import journal, lock_files
from reshard.execution.execute import Settings
from reshard.execution.finished_files import rename_to_final
from reshard.execution.holders import identify_machine
from reshard.execution.lock_files import Pace
from reshard.execution.staging import STAGING
from reshard.formats.target_names import JOURNAL, LOCK, LOCK_NAMES, PARTIAL
from reshard.storage import remote_store
from reshard.synthetic import write_checkpoint

MANY = 60.0
NETWORK = """
import os, signal
import reshard.execution.execute, reshard.execution.writer
from reshard.execution import journal, lock_files
from reshard.cli.process import entry
journal.is_on_network = lambda _: True
lock_files.PACE = lock_files.Pace(beat=0.05)
reshard.execution.writer.FLUSH_SECONDS = 0.002
def stopping(function):
    def stop(*arguments, **options):
        setattr({module}, {name!r}, function)
        os.kill(os.getpid(), signal.{signal})
        return function(*arguments, **options)
    return stop
{module}.{name} = stopping({module}.{name})
entry()
"""
"""The command, which sends itself a signal before it does a step for the first time."""
STEPS = [
    ("reshard.execution.execute", "open_targets"),
    ("reshard.execution.execute", "write_side_files"),
    ("reshard.execution.writer", "append_records"),
    ("reshard.execution.execute", "make_durable"),
    ("reshard.execution.execute", "rename_to_final"),
    ("reshard.execution.finished_files", "remove_files"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source_and_target(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def wanted(source: Path) -> dict[str, str]:
    return contents(source.with_name("whole"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(remote_store, "LISTENERS", [told.append])
    return told


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "is_on_network", lambda _: True)
    monkeypatch.setattr(lock_files, "PACE", Pace(beat=0.05, silence=0.3, look=0.01, settle=0))


def start(source: Path, target: Path, step: tuple[str, str], number: str) -> "subprocess.Popen[str]":
    """A conversion that sends itself a signal at a step."""
    program = NETWORK.format(module=step[0], name=step[1], signal=number)
    command = [sys.executable, "-c", program, "convert", str(source), str(target), "--mp", str(RANKS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def put_lock(folder: Path, **changed: object) -> None:
    """A lock of another machine, or of a process of this one that has ended."""
    entry = {"held_by": "process 4711 on n2 since 2026-11-30 07:00:00", "machine": "n2", "process": 4711, "started": 1}
    (folder / LOCK).write_text(json.dumps({**entry, **changed}), encoding="utf-8")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- one run ---


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 130), ("SIGKILL", -signal.SIGKILL)])
@pytest.mark.parametrize("step", STEPS)
def test_a_run_that_ends_early_keeps_nobody_out(
    step: tuple[str, str], number: str, code: int, source: Path, wanted: dict[str, str], target: Path, lines: list[str]
) -> None:
    """An interrupt removes the lock; what a kill leaves is taken over at once."""
    with start(source, target, step, number) as process:
        _, errors = process.communicate(timeout=MANY)
    assert process.returncode == code, errors
    assert (target / LOCK).exists() == (number == "SIGKILL")
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == wanted
    assert [line.rpartition(", ")[2] for line in lines] == ["which has ended"] * (number == "SIGKILL")


def test_a_refused_run_leaves_no_lock(source: Path, target: Path) -> None:
    leave_unfinished(Job(source, RANKS), target)
    assert LOCK not in names(target)
    with pytest.raises(Refused, match="another job"):
        convert_checkpoint(Job(source, 2), target)
    assert LOCK not in names(target)


def test_a_second_run_is_refused_and_the_first_ends(source: Path, wanted: dict[str, str], target: Path) -> None:
    found: list[str] = []

    def convert_again(done: int, _: int) -> None:
        if done and not found:
            with pytest.raises(Refused) as error:
                reshard.convert(source, target, RANKS)
            found.extend(problem.found for problem in error.value.problems if problem.kind == "target-in-use")

    reshard.convert(source, target, RANKS, progress=convert_again)
    assert found[0].startswith(f"process {os.getpid()} on ")
    assert contents(target) == wanted


# --- a run that sleeps ---


@pytest.mark.parametrize("step", STEPS)
def test_a_run_that_sleeps_through_a_takeover_is_refused_and_spoils_nothing(
    step: tuple[str, str], source: Path, wanted: dict[str, str], target: Path, lines: list[str]
) -> None:
    with start(source, target, step, "SIGSTOP") as sleeper:
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
        convert_checkpoint(Job(source, RANKS), target)
        assert lines[-1].endswith("silent for 0 s")
        before = {path: path.stat().st_ino for path in target.iterdir()}
        sleeper.send_signal(signal.SIGCONT)
        _, errors = sleeper.communicate(timeout=MANY)
    # Behind the last look there is nothing left to do but what the other has done too.
    assert sleeper.returncode == (0 if step[1] == "remove_files" else 2), errors
    assert step[1] == "remove_files" or "another run" in errors
    # Who falls asleep just before it makes a file makes it then: under a temporary name, which nobody reads.
    made = {path for path in target.iterdir() if path not in before and path.name.endswith(PARTIAL)}
    assert not made or step[1] in ("open_targets", "write_side_files")
    assert {path: path.stat().st_ino for path in target.iterdir() if path not in made} == before
    convert_checkpoint(Job(source, RANKS), target)
    assert {name: found for name, found in contents(target).items() if not name.endswith(PARTIAL)} == wanted


def test_who_wakes_up_while_it_writes_to_the_journal_writes_to_none(
    source: Path, wanted: dict[str, str], target: Path
) -> None:
    """Behind its look at the lock. The run that took over has ended early, so that its journal is needed."""
    with start(source, target, ("journal", "append_durably"), "SIGSTOP") as sleeper:
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
        leave_unfinished(Job(source, RANKS), target)
        content = (target / JOURNAL).read_bytes()
        assert durable_bytes(target / JOURNAL) > 0
        sleeper.send_signal(signal.SIGCONT)
        sleeper.communicate(timeout=MANY)
    assert sleeper.returncode == 2
    assert (target / JOURNAL).read_bytes() == content
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == wanted


def test_a_run_that_sleeps_while_another_job_begins_anew_spoils_nothing_of_it(source: Path, target: Path) -> None:
    with start(source, target, ("reshard.execution.writer", "append_records"), "SIGSTOP") as sleeper:
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
        convert_checkpoint(Job(source, 2), target, Settings(restart=True))
        before = contents(target)
        sleeper.send_signal(signal.SIGCONT)
        _, errors = sleeper.communicate(timeout=MANY)
    assert (sleeper.returncode, "another run" in errors) == (2, True), errors
    assert contents(target) == before
    assert len([name for name in before if name.endswith("-mp2.safetensors")]) == 2


@pytest.mark.parametrize("step", ["open_targets", "reserve_blocks", "write_side_files"])
def test_who_wakes_up_while_it_makes_files_writes_into_none_of_another_job(
    step: str, source: Path, target: Path, tmp_path: Path
) -> None:
    """The other job has files of the same names, and other headers and tokenizer; it is about to rename them."""
    other, said = tmp_path / "other", list[str]()
    write_checkpoint(other, {**CONFIG, "vocab_size": 256}, 2)
    (other / "tokenizer.json").write_text("{}", encoding="utf-8")
    convert_checkpoint(Job(other, RANKS), tmp_path / "at once")

    def wake_and_rename(*arguments: Any) -> None:
        sleeper.send_signal(signal.SIGCONT)
        said.extend(sleeper.communicate(timeout=MANY))
        rename_to_final(*arguments)

    with start(source, target, ("reshard.execution.execute", step), "SIGSTOP") as sleeper:
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reshard.execution.execute, "rename_to_final", wake_and_rename)
            convert_checkpoint(Job(other, RANKS), target, Settings(restart=True))
    assert sleeper.returncode == 2, said
    assert "another run" in said[1]
    assert contents(target) == contents(tmp_path / "at once")


# --- locks that lie there ---


@pytest.mark.parametrize("is_network", ["yes", "no"])
@pytest.mark.parametrize("restart", ["no", "yes"])
def test_a_lock_of_another_machine_is_waited_for_on_any_disk(
    restart: str,
    is_network: str,
    source: Path,
    wanted: dict[str, str],
    target: Path,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that is local here may be mounted over a network elsewhere."""
    leave_unfinished(Job(source, RANKS), target)
    for name in LOCK_NAMES:
        put_lock(target)
        (target / LOCK).rename(target / name)
    put_lock(target)
    monkeypatch.setattr(journal, "is_on_network", lambda _: is_network == "yes")
    convert_checkpoint(Job(source, RANKS), target, Settings(restart=restart == "yes"))
    assert "took over the lock of process 4711 on n2 since 2026-11-30 07:00:00, silent for 0 s" in lines[-1]
    assert contents(target) == wanted


def test_a_lock_alone_is_no_file_of_a_stranger(source: Path, wanted: dict[str, str], target: Path) -> None:
    target.mkdir()
    put_lock(target, machine=identify_machine(), process=(1 << 22) + 1)
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == wanted


def test_a_lock_that_a_crash_has_left_behind_the_last_step_is_removed(
    source: Path, wanted: dict[str, str], target: Path, lines: list[str]
) -> None:
    convert_checkpoint(Job(source, RANKS), target)
    put_lock(target)
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == wanted
    assert lines[-1].endswith("silent for 0 s")


def test_a_repair_takes_the_lock_and_those_of_an_earlier_one(
    source: Path, wanted: dict[str, str], target: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_checkpoint(Job(source, RANKS), target)
    rank_file(target, 1).write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setattr(reshard.execution.execute, "rename_to_final", raise_crash)
        with pytest.raises(Crash):
            main(["repair", str(target), "--source", str(source)])
    put_lock(target)
    put_lock(target / STAGING)
    lines.clear()
    monkeypatch.setattr("reshard.cli.run.tell_aside", lines.append)
    monkeypatch.setattr("reshard.cli.progress.JobWatch.tell", lambda _, line: lines.append(line))
    assert main(["repair", str(target), "--source", str(source)]) == 0
    assert len([line for line in lines if "took over" in line]) == 1
    assert contents(target) == wanted


def raise_crash(*_: object) -> None:
    raise Crash


def test_inspect_names_who_has_the_lock(source: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_unfinished(Job(source, RANKS), target)
    put_lock(target)
    capsys.readouterr()
    assert main(["inspect", str(target)]) == 0
    assert "\nat work: process 4711 on n2 since 2026-11-30 07:00:00" in capsys.readouterr().out
    with ExitStack() as stack:
        (target / LOCK).unlink()
        journal.lock_journal(stack, target / JOURNAL)
        found = reshard.inspect(target).unfinished
        assert found is not None
        assert found.holder.startswith(f"process {os.getpid()} on ")
    found = reshard.inspect(target).unfinished
    assert found is not None
    assert found.holder == ""
