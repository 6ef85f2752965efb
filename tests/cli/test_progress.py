"""Progress as the command shows it: log, JSON, silence, status on a signal; what follows an interrupt."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from jobs import Job, convert_checkpoint

import reshard
from reshard.cli.main import main
from reshard.cli.progress import JobWatch
from reshard.cli.progress_lines import ProgressEvent
from reshard.formats.target_names import JOURNAL
from reshard.storage.counting import WorkState
from reshard.synthetic import SMALL_V3, write_checkpoint

RANKS = 4
MANY = 120
"""In seconds: whoever takes so long hangs."""
CLOCK = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
SIZE = r"\d+\.\d\d MiB"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("progress") / "source"
    write_checkpoint(folder, SMALL_V3, 4)
    return folder


@pytest.fixture(scope="module")
def ranks(source: Path) -> Path:
    target = source.with_name("ranks")
    convert_checkpoint(Job(source, RANKS), target)
    return target


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def until(condition: object) -> None:
    end = time.monotonic() + MANY
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def test_a_job_is_reported_also_while_nothing_moves() -> None:
    """The third report comes by the clock alone."""
    told: list[ProgressEvent] = []
    watch = JobWatch("convert", told.append, 0.001)
    watch.start()
    until(lambda: [event.event for event in told[:3]] == ["progress"] * 3)
    watch.show(WorkState(1, 4, 1))
    until(lambda: told[-1].state == WorkState(1, 4, 1) and told[-1].event == "progress")
    assert "start" in [event.event for event in told]
    watch.show(WorkState(4, 4, 1))
    watch.end(is_done=True)
    assert (told[-1].event, told[-1].state) == ("done", WorkState(4, 4, 1))


def test_a_job_that_ends_by_an_error_is_not_done() -> None:
    told: list[ProgressEvent] = []
    watch = JobWatch("convert", told.append, None)
    watch.start()
    watch.show(WorkState(0, 4))
    watch.ask()
    until(lambda: told and told[-1].event == "asked")
    watch.end(is_done=False)
    assert [event.event for event in told] == ["start", "asked", "stopped"]


@pytest.mark.parametrize("command", ["convert", "verify", "diff", "deepseek"])
def test_a_log_has_a_first_and_a_last_line(
    command: str, source: Path, ranks: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "convert": ["convert", source, target, "--mp", RANKS],
        "verify": ["verify", ranks, "--source", source],
        "diff": ["diff", source, source],
        "deepseek": ["deepseek", "--hf-ckpt-path", source, "--save-path", target, "--model-parallel", RANKS],
    }[command]
    texts = [str(word) for word in words]
    assert main(texts) == 0
    title = "convert" if command == "deepseek" else command
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"{CLOCK} reshard {re.escape(reshard.__version__)}: {re.escape(' '.join(texts))}", first)
    assert re.fullmatch(rf"{CLOCK} {title}: done, {SIZE} in 0:\d\d:\d\d(, {SIZE}/s)?", last)


def test_progress_in_json_is_a_line_an_event(source: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(source), str(target), "--mp", str(RANKS), "--progress", "json"]
    assert main(words) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    total = sum(path.stat().st_size for path in target.iterdir() if path.name != "reshard.json")
    assert (events[0]["event"], events[0]["bytes"], events[0]["total"]) == ("start", 0, total)
    assert (events[0]["reshard"], events[0]["command"]) == (reshard.__version__, words)
    assert (events[-1]["event"], events[-1]["bytes"]) == ("done", total)
    assert {event["event"] for event in events[1:-1]} <= {"progress"}


def test_a_job_that_was_done_before_is_reported_as_done(
    source: Path, ranks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script that waits for the line `done` must not wait for ever."""
    words = ["convert", str(source), str(ranks), "--mp", str(RANKS)]
    assert main([*words, "--progress", "json"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in events if event["phase"] != "plan"] == ["start", "done"]
    assert (events[-1]["bytes"], events[-1]["total"]) == (0, 0)
    assert main(words) == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith("convert: done, 0 bytes in 0:00:00")


@pytest.mark.parametrize("how", [["--progress", "none"], ["--quiet"]])
def test_no_progress_is_none(how: list[str], source: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(target), "--mp", str(RANKS), *how]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert bool(out) == (how != ["--quiet"])


def test_quiet_commands_say_what_is_wrong_and_nothing_else(
    source: Path, ranks: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["verify", ranks], ["verify", ranks, "--source", source], ["diff", source, source]):
        assert main([*map(str, words), "--quiet"]) == 0
        assert capsys.readouterr() == ("", "")
    assert main(["diff", str(source), str(ranks), "--quiet"]) == 1
    assert capsys.readouterr().out.startswith("different: 124 of 619 tensors differ")
    assert main(["verify", str(target), "--quiet"]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["verify", str(ranks), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "proven"


# --- nobody who reads ---


def start_command(words: list[str], stderr: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "reshard", *words]
    return subprocess.Popen(command, stderr=stderr, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("seen", [0, 1])
def test_a_terminal_that_is_closed_does_not_end_a_job_of_another_session(seen: int, source: Path, target: Path) -> None:
    """As behind `setsid` or `disown`: no SIGHUP comes, and each write to the terminal fails."""
    reader, terminal = pty.openpty()
    process = start_command(["convert", str(source), str(target), "--mp", str(RANKS), "--progress", "bar"], terminal)
    os.close(terminal)
    assert len(os.read(reader, seen)) == seen  # of the bar
    os.close(reader)
    assert process.communicate(timeout=MANY)[0].startswith(str(target))
    assert process.returncode == 0


def test_a_job_does_not_wait_for_a_reader_that_sleeps(source: Path, target: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    process = start_command(["convert", str(source), str(target), "--mp", str(RANKS), "--progress", "json"], writer)
    try:
        assert process.communicate(timeout=MANY)[0].startswith(str(target))
        assert process.returncode == 0
    finally:
        process.kill()
        os.close(reader)
        os.close(writer)


# --- signals ---

HELD = """
import signal, sys, time
import reshard.execution.execute as execute
for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)
{before}
def wait(*_):
    print("held", flush=True)
    while True:  # not for ever at once: the kernel may give a signal to any thread, and this one must wake up
        time.sleep(0.01)
execute.{step} = wait
from reshard.cli.process import entry
entry()
"""
"""The command, held before a step. Its signals are as in a shell, whatever the tests run under."""


@contextmanager
def held(
    source: Path, target: Path, *words: str, step: str = "rename_to_final", before: str = ""
) -> Iterator["subprocess.Popen[str]"]:
    code = HELD.format(step=step, before=before)
    command = [sys.executable, "-c", code, "convert", str(source), str(target), "--mp", str(RANKS), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def end_by(number: signal.Signals, process: "subprocess.Popen[str]") -> str:
    process.send_signal(number)
    _, errors = process.communicate(timeout=MANY)
    assert process.returncode == 130
    return errors


@pytest.mark.parametrize("mode", ["log", "json", "none"])
def test_a_signal_asks_for_a_line(mode: str, source: Path, target: Path) -> None:
    with held(source, target, "--progress", mode) as process:
        assert process.stderr is not None
        process.send_signal(signal.SIGUSR1)
        line = process.stderr.readline()
        while "disk" not in line:
            line = process.stderr.readline()
        if mode == "json":
            assert json.loads(line)["phase"] == "disk"
        else:
            assert re.search(r"convert: 99\.\d%, writing to disk: \d+\.\d\d KiB left", line)
        errors = end_by(signal.SIGTERM, process)
    assert errors.endswith("reshard: interrupted; run the same command again to go on from there\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_to_end_ends_alike(number: signal.Signals, source: Path, target: Path) -> None:
    with held(source, target, "--progress", "none") as process:
        assert end_by(number, process) == "reshard: interrupted; run the same command again to go on from there\n"
    with held(source, target.with_name("other"), "--progress", "none", step="move_all") as process:
        assert end_by(number, process) == "reshard: interrupted; nothing was written; run the same command again\n"
    assert not target.with_name("other").exists()


def test_under_nohup_a_conversion_outlives_its_terminal(source: Path, target: Path) -> None:
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    with held(source, target, before=ignored) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
        assert process.stderr is not None
        while "disk" not in process.stderr.readline():
            assert process.poll() is None
        end_by(signal.SIGTERM, process)


def test_what_was_there_is_said_first_and_the_process_at_work_is_named(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert = ["convert", str(source), str(target), "--mp", str(RANKS)]
    with held(source, target) as process:
        assert main(convert) == 2
        assert re.search(
            rf"found: +process {process.pid} on \S+ since {CLOCK} is writing to it", capsys.readouterr().err
        )
        assert main(["inspect", str(target)]) == 0
        assert re.search(rf"\nat work: process {process.pid} on \S+ since {CLOCK}\n", capsys.readouterr().out)
        end_by(signal.SIGTERM, process)
    with held(source, target) as process:  # the one who resumes is named, not the one before
        assert main(convert) == 2
        assert f"process {process.pid} on" in capsys.readouterr().err
        end_by(signal.SIGTERM, process)
    assert main(["inspect", str(target)]) == 0
    shown = capsys.readouterr().out
    assert "at work" not in shown
    assert f"  reshard convert SOURCE {target} --mp {RANKS}\n" in shown
    assert (target / JOURNAL).exists()
    assert main([*convert, "--progress", "log"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"{CLOCK} convert: resumed: {SIZE} were written before; \d+\.\d\d KiB are left", lines[1])
    assert re.fullmatch(rf"{CLOCK} convert: done, \d+\.\d\d KiB in 0:00:\d\d(, .*)?", lines[-1])
