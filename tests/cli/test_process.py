"""The process of the command: standard streams that are closed, full or broken, signals on top of signals, its end.

All in processes of their own, with output that is buffered as for everybody: PYTHONUNBUFFERED would hide much of it.
"""

import errno
import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, convert_checkpoint
from torture import RANKS, contents

from reshard.formats.target_names import JOURNAL
from reshard.storage.local import PAGE
from reshard.synthetic import SMALL_V3, write_checkpoint

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
MODULE = [sys.executable, "-m", "reshard"]
MANY = 120
"""In seconds: whoever takes so long hangs."""
NOWHERE = ["plan", "/nonexistent", "--mp", "2", "--json"]
"""A refusal."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("process") / "source"
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


def run(*words: object, command: list[str] = MODULE, **streams: Any) -> "subprocess.CompletedProcess[str]":
    """Runs a command line; what is not said of its streams is read."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    command = [*command, *map(str, words)]
    return subprocess.run(command, check=False, text=True, timeout=MANY, env=ENVIRONMENT, **streams)


def run_closed(closed: str, *words: object) -> "subprocess.CompletedProcess[str]":
    """With standard streams closed, in the words of a shell."""
    return run(*words, command=["sh", "-c", f'exec "$@" {closed}', "sh", *MODULE])


def program(*lines: str) -> list[str]:
    """The command, with something done before."""
    return [sys.executable, "-c", "\n".join([*lines, "from reshard.cli.process import entry; entry()"])]


@contextmanager
def broken_pipe() -> Iterator[int]:
    """The end to write to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@contextmanager
def full_disk() -> Iterator[int]:
    """As far as whoever writes to it can tell."""
    with Path("/dev/full").open("wb") as file:
        yield file.fileno()


# Standard error.


@pytest.mark.parametrize("stream", [broken_pipe, full_disk])
def test_a_refusal_that_nobody_hears_is_one_all_the_same(stream: Any) -> None:
    with stream() as listener:
        done = run(*NOWHERE, stderr=listener)
        assert json.loads(done.stdout)["status"] == "refused"
        assert done.returncode == 2
        assert run("inspect", "/nonexistent", stderr=listener).returncode == 2
        assert run("convert", "--wrong", stderr=listener).returncode == 2


def test_without_standard_error_a_proof_is_one(source: Path, ranks: Path) -> None:
    done = run_closed("2>&-", "verify", ranks, "--source", source)
    assert "all equal" in done.stdout
    assert done.returncode == 0


def test_without_standard_error_a_conversion_is_whole(source: Path, ranks: Path, target: Path) -> None:
    done = run_closed("2>&-", "convert", source, target, "--mp", RANKS)
    assert "4 rank files" in done.stdout
    assert done.returncode == 0
    assert contents(target) == contents(ranks)


def test_without_standard_error_nothing_but_the_json_is_printed() -> None:
    done = run_closed("2>&-", *NOWHERE)
    assert json.loads(done.stdout)["status"] == "refused"
    assert done.returncode == 2


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_place_of_a_closed_stream(closed: str, source: Path, target: Path) -> None:
    """Looked at in the middle of the copying, when all files are open."""
    look = program(
        "import os, reshard.execution.execute as execute",
        "move = execute.move_all",
        "def looking(*arguments):",
        "    with open(os.environ['SEEN'], 'w') as file:",
        "        file.write(' '.join(os.readlink(f'/proc/self/fd/{number}') for number in range(3)))",
        "    return move(*arguments)",
        "execute.move_all = looking",
    )
    seen = target.with_name("seen")
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", *look, "convert", str(source), str(target), "--mp", str(RANKS)]
    with Path(os.devnull).open("rb") as nothing:
        pipe, environment = subprocess.PIPE, {**ENVIRONMENT, "SEEN": str(seen)}
        done = subprocess.run(
            words, check=False, stdin=nothing, stdout=pipe, stderr=pipe, timeout=MANY, env=environment
        )
    assert done.returncode == 0, done.stderr
    found = seen.read_text(encoding="utf-8").split()
    assert all(path == os.devnull or path.startswith("pipe:") for path in found)
    assert found.count(os.devnull) >= closed.count("-")


# Standard output.


def test_without_standard_output_a_conversion_is_whole(source: Path, ranks: Path, target: Path) -> None:
    done = run_closed(">&-", "convert", source, target, "--mp", RANKS, "--progress", "none")
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(target) == contents(ranks)


@pytest.mark.parametrize("options", [[], ["-u"]])
@pytest.mark.parametrize("words", [["inspect", "SOURCE"], ["plan", "SOURCE", "--mp", "4", "--json"], ["--help"]])
def test_a_full_disk_under_the_output_is_told_in_a_line(words: list[str], options: list[str], source: Path) -> None:
    """Little that is printed meets the disk at the end only, much of it at once."""
    if words == ["--help"] and options:
        pytest.skip("argparse says nothing of what it cannot print")
    words = [str(source) if word == "SOURCE" else word for word in words]
    with full_disk() as output:
        done = run(*words, command=[sys.executable, *options, "-m", "reshard"], stdout=output)
    assert done.stderr == f"reshard: cannot write standard output: {os.strerror(errno.ENOSPC)}\n"
    assert done.returncode == 2


def test_a_conversion_whose_output_finds_the_disk_full_is_whole(source: Path, ranks: Path, target: Path) -> None:
    with full_disk() as output:
        done = run("convert", source, target, "--mp", RANKS, "--progress", "none", stdout=output)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert contents(target) == contents(ranks)


def test_as_many_files_are_opened_as_the_hard_limit_allows(tmp_path: Path) -> None:
    """A shell allows 1,024, which a source of 500 files needs, each opened twice. Here it allows too few."""
    write_checkpoint(tmp_path / "source", SMALL_V3, 40)
    command = ["sh", "-c", 'ulimit -Sn 60; exec "$@"', "sh", *MODULE]
    done = run("convert", tmp_path / "source", tmp_path / "target", "--mp", RANKS, "--cache", "no", command=command)
    assert done.returncode == 0, done.stderr


def test_a_hard_limit_on_open_files_is_told_with_what_to_do(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", SMALL_V3, 40)
    command = ["sh", "-c", 'ulimit -n 60; exec "$@"', "sh", *MODULE]
    done = run("convert", tmp_path / "source", tmp_path / "target", "--mp", RANKS, "--cache", "no", command=command)
    assert done.returncode == 2
    assert os.strerror(errno.EMFILE) in done.stderr
    assert "ulimit -n" in done.stderr


def test_a_file_that_cannot_be_written_is_not_taken_for_the_output(tmp_path: Path) -> None:
    done = run("demo", tmp_path / "demo", command=["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *MODULE])
    assert done.stderr.startswith("reshard: refused\n")
    assert done.stderr.endswith(f"{os.strerror(errno.EFBIG)}\n")
    assert done.returncode == 2


def test_an_error_of_the_system_is_a_refusal_in_json_too(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("demo", tmp_path / "file" / "demo", "--json")
    assert done.returncode == 2
    value = json.loads(done.stdout)
    assert (value["status"], value["problems"][0]["kind"]) == ("refused", "system-error")
    assert value["problems"][0]["found"] == os.strerror(errno.ENOTDIR)


@pytest.mark.parametrize("words", [["inspect", "SOURCE"], ["plan", "SOURCE", "--mp", "4", "--json"], ["--help"]])
def test_a_reader_that_goes_away_ends_the_command_in_silence(words: list[str], source: Path) -> None:
    words = [str(source) if word == "SOURCE" else word for word in words]
    with broken_pipe() as output:
        done = run(*words, stdout=output)
    assert (done.returncode, done.stderr) == (141, "")


def test_whoever_hears_and_reads_nothing_changes_nothing(source: Path, ranks: Path, target: Path) -> None:
    with broken_pipe() as output, broken_pipe() as listener:
        done = run("convert", source, target, "--mp", RANKS, stdout=output, stderr=listener)
    assert done.returncode == 141
    assert contents(target) == contents(ranks)


# Signals on top of signals.

KILL = "os.kill(os.getpid(), signal.{})"


def test_a_second_signal_while_the_first_is_told_changes_nothing(source: Path, target: Path) -> None:
    """The first comes when the threads are started, others with whatever is said."""
    noisy = program(
        "import os, signal, sys, concurrent.futures as futures",
        "submit, write = futures.ThreadPoolExecutor.submit, sys.stderr.write",
        "def submitting(*arguments):",
        "    future = submit(*arguments)",
        f"    {KILL.format('SIGTERM')}",
        "    return future",
        "def writing(text):",
        f"    {KILL.format('SIGTERM')}",
        f"    {KILL.format('SIGINT')}",
        "    return write(text)",
        "futures.ThreadPoolExecutor.submit, sys.stderr.write = submitting, writing",
    )
    done = run("convert", source, target, "--mp", RANKS, "--progress", "none", command=noisy)
    assert done.stderr == "reshard: interrupted; nothing was written; run the same command again\n"
    assert done.returncode == 130


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_while_a_refusal_is_told_is_an_interrupt(number: str) -> None:
    noisy = program(
        "import os, signal, sys",
        "write = sys.stderr.write",
        "def writing(text):",
        f"    {KILL.format(number)}",
        "    return write(text)",
        "sys.stderr.write = writing",
    )
    done = run(*NOWHERE, command=noisy)
    assert done.stderr == "reshard: interrupted\n"
    assert done.returncode == 130


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_that_an_import_makes_an_error_of_is_an_interrupt(number: str) -> None:
    """As numpy does: interrupted while it is imported, it says that its installation is broken."""
    broken = program(
        "import os, signal, sys",
        "class Finder:",
        "    def find_spec(self, name, *_):",
        "        if name != 'numpy': return",
        "        try:",
        f"            {KILL.format(number)}",
        "        except KeyboardInterrupt:",
        "            raise ImportError('the C-extensions failed') from None",
        "sys.meta_path.insert(0, Finder())",
    )
    done = run("demo", command=broken)
    assert (done.returncode, done.stderr) == (130, "reshard: interrupted\n")


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_behind_the_command_changes_nothing(number: str) -> None:
    """In the very call that ends the process."""
    late = program(
        "import os, signal",
        "end = os._exit",
        "def ending(code):",
        f"    {KILL.format(number)}",
        "    end(code)",
        "os._exit = ending",
    )
    done = run("recipes", command=late)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("recipe", ["llama", "deepseek-v4"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_waiting_for_a_reader(number: signal.Signals, recipe: str) -> None:
    """Of the one recipe all is still in the buffer when the command has ended, of the other one the half is not."""
    reading, writing = os.pipe()
    size = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PAGE)
    command = [*MODULE, "recipes", "show", recipe]
    with subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        os.close(writing)
        end = time.monotonic() + MANY
        while struct.unpack("i", fcntl.ioctl(reading, termios.FIONREAD, bytes(4))) != (size,):
            assert time.monotonic() < end
            time.sleep(0.001)
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=MANY)
        finally:
            process.kill()
            os.close(reading)
    assert (process.returncode, errors) == (130, "reshard: interrupted\n")


@pytest.mark.parametrize("attempt", range(3))
def test_a_storm_of_signals_is_one_interrupt(attempt: int, source: Path, target: Path) -> None:
    """From where the copying begins to the end of the process, some thousand of them.

    Without one of them the conversion would not end, so that it cannot be through before the first comes.
    """
    waiting = program(
        "import time, reshard.execution.execute as execute",
        f"execute.rename_to_final = lambda *_: time.sleep({MANY})",
    )
    command = [*waiting, "convert", str(source), str(target), "--mp", str(RANKS), "--jobs", "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT) as process:
        end = time.monotonic() + MANY
        while not (target / JOURNAL).exists() and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.001)
        time.sleep(attempt * 0.01)
        while process.poll() is None and time.monotonic() < end:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            time.sleep(0.0001)
        process.kill()
        _, errors = process.communicate()
    ways_on = "nothing was written; run the same command again|run the same command again to go on from there"
    assert re.fullmatch(rf"([\d-]+ .+\n)*reshard: interrupted; ({ways_on})\n", errors)
    assert process.returncode == 130


def test_a_background_job_of_a_script_does_not_heed_ctrl_c(source: Path, target: Path) -> None:
    """Its shell has it ignored."""
    interrupted = program(
        "import os, signal, reshard.execution.execute as execute",
        "finish = execute.rename_to_final",
        "def interrupting(*arguments):",
        f"    {KILL.format('SIGINT')}",
        "    finish(*arguments)",
        "execute.rename_to_final = interrupting",
    )
    words = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *interrupted]
    assert run("convert", source, target, "--mp", RANKS, command=words).returncode == 0


LIBRARY = """
import os, signal, sys, reshard, reshard.storage.resources
signal.signal(signal.SIGINT, signal.default_int_handler)
wait, left = reshard.storage.resources.wait, [None] * {signals}

def interrupted(futures, *options):
    if not options and left:
        left.pop()
        os.kill(os.getpid(), signal.SIGINT)
    return wait(futures, *options)

reshard.storage.resources.wait = interrupted
try:
    reshard.convert(sys.argv[1], sys.argv[2], mp={ranks})
except KeyboardInterrupt:
    assert not left
    print("interrupted")
"""
"""A conversion by a program that is not ours, with Ctrl-C when all windows are moved and the threads are waited for."""


@pytest.mark.parametrize("signals", [1, 3])
def test_an_interrupt_while_the_threads_end_is_not_lost(signals: int, source: Path, target: Path) -> None:
    code = LIBRARY.format(signals=signals, ranks=RANKS)
    done = run(source, target, command=[sys.executable, "-c", code])
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
    assert not list(target.glob("*.safetensors"))


# Faults of ours.


@pytest.mark.parametrize("stream", [None, broken_pipe])
def test_an_internal_error_is_no_difference_found(stream: Any, source: Path, ranks: Path) -> None:
    """It shows where it happened, to whoever listens."""
    faulty = program(
        "import reshard.verification.verify as verify",
        "def faulty(*_, **__):",
        "    raise ZeroDivisionError('a fault of ours')",
        "verify.trace_target.__code__ = faulty.__code__",
    )
    words = ["verify", ranks, "--source", source, "--progress", "none"]
    if stream:
        with stream() as listener:
            assert run(*words, command=faulty, stderr=listener).returncode == 70
        return
    done = run(*words, command=faulty)
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.endswith("ZeroDivisionError: a fault of ours\n")
    assert done.returncode == 70
