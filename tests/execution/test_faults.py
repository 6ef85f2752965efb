"""Real faults in the middle of a conversion: nothing is lost, and the same command goes on.

Disks are full, files are shortened and removed. Where a single system call must fail, or the process must die in it,
strace makes the kernel do so.
"""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest
from cached_pages import mount, mount_ext2
from denied_calls import make_denial
from jobs import NOTHING_CACHED, Job, convert_checkpoint
from torture import RANKS, contents, durable_bytes, wrong_names

import reshard
import reshard.execution.writer
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.execute import Settings
from reshard.formats.target_names import JOURNAL
from reshard.storage.local import SYNC_FILE_RANGE_WAIT
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.types import Advance

PROGRAM = (
    "import reshard.execution.writer; reshard.execution.writer.FLUSH_SECONDS = 0.002\n"
    "from reshard.cli.process import entry; entry()"
)
MANY = 120
"""In seconds: whoever takes so long hangs."""


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "source"
    write_checkpoint(folder, SMALL_V3, 4)
    return folder


@pytest.fixture(scope="module")
def wanted(origin: Path) -> dict[str, str]:
    target = origin.with_name("wanted")
    convert_checkpoint(Job(origin, RANKS), target)
    return contents(target)


@pytest.fixture
def source(origin: Path, tmp_path: Path) -> Path:
    """A source to be spoiled. Times are kept: by them a source is known again."""
    return Path(shutil.copytree(origin, tmp_path / "source"))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


@pytest.fixture(autouse=True)
def quick_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshard.execution.writer, "FLUSH_SECONDS", 0.002)


def spoiling(fault: Callable[[], None], target: Path, share: float) -> Callable[[int], AbstractContextManager[Advance]]:
    """A progress that brings about a fault, once, when that share of all is written and something of it is durable."""

    @contextmanager
    def progress(total: int) -> Iterator[Advance]:
        done, spoiled = 0, False

        def advance(size: int) -> None:
            nonlocal done, spoiled
            done += size
            if 2 * done + 1 >= total * share and not spoiled:  # what is written and not durable counts half
                spoiled = True
                until(lambda: durable_bytes(target / JOURNAL) > 0)
                fault()

        yield advance

    return progress


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + MANY
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def refused_kinds(job: Job, target: Path, settings: Settings, progress: object) -> set[str]:
    with pytest.raises(Refused) as error:
        convert_checkpoint(job, target, settings, progress)  # type: ignore[arg-type]
    return {problem.kind for problem in error.value.problems}


def require_gone_on(source: Path, target: Path, wanted: dict[str, str]) -> None:
    """Nothing has its final name and is wrong, and the same job does what is left, and no more."""
    assert wrong_names(target, wanted) == []
    durable = durable_bytes(target / JOURNAL)
    assert durable > 0
    result = convert_checkpoint(Job(source, RANKS), target)
    assert result.done is not None
    assert result.done.resumed == durable
    assert contents(target) == wanted


# --- full disks ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """60 MB that promise blocks."""
    yield mount(tmp_path / "disk", "-t", "tmpfs", "-o", "size=60m", "tmpfs")
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


@pytest.fixture
def old_disk(tmp_path: Path) -> Iterator[Path]:
    """60 MB that cannot promise blocks: ext2 has no fallocate."""
    with mount_ext2(tmp_path, 60 << 20) as disk:
        yield disk


def fill(thief: Path) -> None:
    """Takes all the room that there is."""
    with suppress(OSError), thief.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_disk_that_fills_up_behind_the_promised_blocks(
    share: float, source: Path, wanted: dict[str, str], small_disk: Path
) -> None:
    """What needs room still: the journal, the side files, the manifest."""
    target, thief = small_disk / "target", small_disk / "thief"
    progress = spoiling(lambda: fill(thief), target, share)
    assert refused_kinds(Job(source, RANKS), target, Settings(jobs=2), progress) == {"cannot-write"}
    thief.unlink()
    require_gone_on(source, target, wanted)


def test_a_disk_that_promises_nothing_fills_up_in_the_middle(
    source: Path, wanted: dict[str, str], old_disk: Path
) -> None:
    target, thief = old_disk / "target", old_disk / "thief"
    progress = spoiling(lambda: fill(thief), target, 0.5)
    with pytest.raises(Refused, match="No space left") as error:
        convert_checkpoint(Job(source, RANKS), target, Settings(jobs=2), progress)
    assert {problem.kind for problem in error.value.problems} == {"cannot-write"}
    thief.unlink()
    require_gone_on(source, target, wanted)


# --- sources that change ---


@pytest.mark.parametrize("cache", ["yes", "no"])
@pytest.mark.parametrize("rest", [0, 13, 512, 4096])
def test_a_source_file_that_is_shortened(
    cache: str, rest: int, source: Path, origin: Path, target: Path, wanted: dict[str, str]
) -> None:
    """To whole pages and to others: past the cache whole pages are read."""
    third = source / "model-00003-of-00004.safetensors"
    size = (third.stat().st_size // 2 & ~4095) + rest
    progress = spoiling(lambda: os.truncate(third, size), target, 0.2)
    with pytest.raises(Refused, match=f"{third.name}: source changed\n.*ends at byte {size:,}\n"):
        convert_checkpoint(Job(source, RANKS), target, Settings(jobs=1, cache=cache), progress)
    shutil.copy2(origin / third.name, third)
    require_gone_on(source, target, wanted)


def test_a_source_file_that_is_removed_is_missed_at_the_end(source: Path, target: Path, wanted: dict[str, str]) -> None:
    """Its bytes can be read to the last, for it is open. Put back, it is read no second time."""
    first, away = source / "model-00001-of-00004.safetensors", source.with_name("away")
    progress = spoiling(lambda: void(first.rename(away)), target, 0.2)
    assert refused_kinds(Job(source, RANKS), target, Settings(), progress) == {"source-changed"}
    assert not list(target.glob("*.safetensors"))
    away.rename(first)
    require_gone_on(source, target, wanted)


def test_a_source_file_that_is_replaced_by_one_of_the_same_size_and_time_is_seen(source: Path, target: Path) -> None:
    first, twin = source / "model-00001-of-00004.safetensors", source.with_name("twin")
    shutil.copy2(first, twin)
    progress = spoiling(lambda: void(twin.rename(first)), target, 0.2)
    assert refused_kinds(Job(source, RANKS), target, Settings(), progress) == {"source-changed"}
    assert not list(target.glob("*.safetensors"))


def void(_: object) -> None:
    """For a lambda that should return nothing."""


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that knows no way past the page cache."""
    folder = mount(tmp_path / "memory", "-t", "ramfs", "ramfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("number", [1, 3])
def test_a_shard_on_another_file_system_is_read_in_the_way_of_that(
    number: int, source: Path, target: Path, wanted: dict[str, str], memory_disk: Path
) -> None:
    """The first file of a source, whose way is the one of the job, or another."""
    shard = source / f"model-0000{number}-of-00004.safetensors"
    shutil.copy2(shard, memory_disk / shard.name)
    shard.unlink()
    shard.symlink_to(memory_disk / shard.name)
    result = convert_checkpoint(Job(source, RANKS), target, Settings(cache="no"))
    assert result.done is not None
    assert (result.done.ways.read == "dropped") == (number == 1)
    assert contents(target) == wanted
    report = reshard.verify(target, source)
    assert report.problems == ()


# --- single system calls ---


def traced(
    source: Path,
    target: Path,
    fault: str,
    *options: str,
    program: str = PROGRAM,
    log: str | Path = os.devnull,
    only: Path | None = None,
) -> "subprocess.Popen[str]":
    """A conversion under strace, as a child of our own, with a fault in the words of `strace --inject`; of calls on one
    path `only`. With `--cache no` it reads past the page cache.
    """
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    name, _, how = fault.partition(":")
    calls = ",".join(f"?{call}" for call in ([name, name + "2"] if name.startswith("p") else [name]))
    command = ["strace", "-D", "-f", "-o", str(log), "-e", f"trace={calls}", "-e", f"inject={calls}:{how}"]
    command += ["-P", str(only)] if only else []
    program = NOTHING_CACHED + program if "no" in options else program
    command += [sys.executable, "-c", program, "convert", str(source), str(target), "--mp", str(RANKS), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """The exit code, and what it said on standard error."""
    try:
        _, errors = process.communicate(timeout=MANY)
    finally:
        process.kill()
    if "ptrace" in errors:
        pytest.skip("strace may not trace here")
    return process.returncode, errors


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("preadv:error=EIO:when=9+", "cannot read", "Input/output error at byte"),
        ("pwritev:error=EIO:when=200+", "cannot write", "Input/output error"),
        ("pwritev:error=ENOSPC:when=200+", "cannot write", "No space left"),
        ("pwritev:error=EDQUOT:when=200+", "cannot write", "Disk quota exceeded"),
        ("fdatasync:error=EIO:when=6+", "cannot write", "Input/output error"),
        ("fsync:error=EIO:when=6", "cannot write", "Input/output error"),
        ("rename:error=EIO:when=1", "cannot write", "Input/output error"),
        ("rename:error=EIO:when=3", "cannot write", "Input/output error"),
    ],
)
def test_a_call_that_fails_ends_the_run_and_the_next_goes_on(
    fault: str, kind: str, words: str, origin: Path, target: Path, wanted: dict[str, str]
) -> None:
    code, errors = ended(traced(origin, target, fault, "--jobs", "1", "--cache", "no"))
    assert code == 2, errors
    assert f": {kind}\n" in errors
    assert words in errors
    assert "Traceback" not in errors
    require_gone_on(origin, target, wanted)


def test_a_write_back_that_cannot_be_begun_ends_the_run(origin: Path, target: Path, wanted: dict[str, str]) -> None:
    """A file system may tell its error there, and nowhere else."""
    fault = "sync_file_range:error=EIO:when=1"
    code, errors = ended(traced(origin, target, fault, "--jobs", "1", "--cache", "yes"))
    assert code == 2, errors
    assert ": cannot write\n" in errors
    assert main(["convert", str(origin), str(target), "--mp", str(RANKS)]) == 0
    assert contents(target) == wanted


@pytest.mark.parametrize(("code", "remedy"), [("EACCES", "may you read it"), ("EMFILE", "ulimit -n")])
@pytest.mark.parametrize("when", [3, 4, 5, 6])
def test_a_source_that_cannot_be_opened_again_is_not_told_as_a_target(
    code: str, remedy: str, when: int, origin: Path, target: Path
) -> None:
    """Having read its header, to find a way past the page cache, to look what of it is in there, and to copy, twice."""
    first = origin / "model-00001-of-00004.safetensors"
    fault = f"openat:error={code}:when={when}+"
    status, errors = ended(traced(origin, target, fault, "--cache", "no", only=first))
    assert status == 2, errors
    assert f"{first}: cannot read\n" in errors
    assert remedy in errors


def run_denied(denial: str, source: Path, target: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """A conversion in a process to which the kernel denies a call."""
    command = [
        sys.executable,
        "-c",
        denial + (NOTHING_CACHED if "no" in options else "") + PROGRAM,
        "convert",
        str(source),
        str(target),
        "--mp",
        str(RANKS),
        *options,
    ]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=MANY)


@pytest.mark.parametrize("code", ["EIO", "EINVAL", "EOPNOTSUPP", "EINTR"])
def test_a_write_that_failed_behind_our_back_is_not_recorded_as_durable(
    code: str, origin: Path, target: Path, wanted: dict[str, str]
) -> None:
    """To wait is to be told of it, by any number that a disk or a network gave, and the sync behind it says nothing."""
    denial = make_denial("sync_file_range", code, 3, SYNC_FILE_RANGE_WAIT)
    done = run_denied(denial, origin, target, "--cache", "yes")
    assert done.returncode == 2, done.stderr
    assert ": cannot write\n" in done.stderr
    assert os.strerror(getattr(errno, code)) in done.stderr
    assert durable_bytes(target / JOURNAL) == 0
    assert main(["convert", str(origin), str(target), "--mp", str(RANKS)]) == 0
    assert contents(target) == wanted


@pytest.mark.parametrize(
    ("name", "code", "cache"),
    [("sync_file_range", "EPERM", "yes"), ("fadvise64", "ENOSYS", "yes"), ("fadvise64", "ENOSYS", "no")],
)
def test_advice_that_may_not_be_given_is_done_without(
    name: str, code: str, cache: str, origin: Path, target: Path, wanted: dict[str, str]
) -> None:
    """As in a container with a strict filter."""
    done = run_denied(make_denial(name, code), origin, target, "--cache", cache)
    assert done.returncode == 0, done.stderr
    assert contents(target) == wanted


def test_a_file_system_without_a_sync_of_folders(origin: Path, target: Path, wanted: dict[str, str]) -> None:
    """Such as a folder of the host in a virtual machine."""
    target.mkdir()
    log = target.with_name("calls")
    code, errors = ended(traced(origin, target, "fsync:error=EINVAL", log=log, only=target))
    assert code == 0, errors
    assert "(INJECTED)" in log.read_text(encoding="utf-8")
    assert contents(target) == wanted


def test_calls_that_the_system_lacks_are_done_without(origin: Path, target: Path, wanted: dict[str, str]) -> None:
    log, fault = target.with_name("calls"), "sync_file_range:error=ENOSYS"
    program = "import reshard.storage.residency; reshard.storage.residency.CACHESTAT = 9999\n" + PROGRAM
    code, errors = ended(traced(origin, target, fault, "--jobs", "1", program=program, log=log))
    assert code == 0, errors
    assert "(INJECTED)" in log.read_text(encoding="utf-8")
    assert contents(target) == wanted


@pytest.mark.parametrize(
    ("name", "when"),
    [
        *(("mkdir", 1), ("flock", 1), ("fdatasync", 1), ("fallocate", 1), ("fallocate", 3)),
        *(("pwritev", number) for number in (1, 5, 60)),
        *(("fsync", number) for number in (1, 5, 8, 10, 11)),
        *(("rename", number) for number in (1, 2, 4, 7)),
        ("unlink", 1),
    ],
)
def test_a_kill_in_that_call_is_finished_by_the_next_run(
    name: str, when: int, origin: Path, target: Path, wanted: dict[str, str]
) -> None:
    """A rerun takes the other way through the cache, so that it must know by itself what the first has left."""
    code, errors = ended(traced(origin, target, f"{name}:signal=KILL:when={when}", "--jobs", "1", "--cache", "no"))
    assert code == -signal.SIGKILL, errors
    assert not target.exists() or wrong_names(target, wanted) == []
    assert main(["convert", str(origin), str(target), "--mp", str(RANKS), "--cache", "yes"]) == 0
    assert contents(target) == wanted


# --- interrupts ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_interrupt_ends_at_once_and_the_next_run_goes_on(
    number: signal.Signals, jobs: str, origin: Path, target: Path, wanted: dict[str, str]
) -> None:
    """From a disk that takes 0.3 s for every window. Behind the signal each thread begins one more read at most, or two
    if the signal comes while it is between them.
    """
    log = target.with_name("calls")
    with traced(origin, target, "preadv:delay_enter=300000", "--jobs", jobs, "--cache", "no", log=log) as process:
        until(lambda: durable_bytes(target / JOURNAL) > 0 or process.poll() is not None)
        process.send_signal(number)
        code, errors = ended(process)
    assert code == 130, errors
    _, signalled, behind = log.read_text(encoding="utf-8").partition(f"--- {number.name} ")
    assert signalled
    assert len(re.findall(r"^\d+ +preadv2?\(", behind, re.MULTILINE)) <= 2 * int(jobs)
    assert re.fullmatch(r"([\d-]+ .+\n)*reshard: interrupted; run the same command again to go on .+\n", errors)
    assert not list(target.glob("*.safetensors"))
    require_gone_on(origin, target, wanted)


def test_an_interrupt_that_another_thread_gets_is_heeded(origin: Path, target: Path, wanted: dict[str, str]) -> None:
    """The kernel may do so; the main thread is asleep then and not woken."""
    program = (
        "import signal, threading, reshard.execution.writer\n"
        "append = reshard.execution.writer.append_records\n"
        "def interrupted(*arguments):\n"
        "    append(*arguments)\n"
        "    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)\n"
        "reshard.execution.writer.append_records = interrupted\n" + PROGRAM
    )
    slow = "preadv:delay_enter=100000"
    code, errors = ended(traced(origin, target, slow, "--jobs", "1", "--cache", "no", program=program))
    assert code == 130, errors
    assert durable_bytes(target / JOURNAL) < sum(path.stat().st_size for path in target.glob("*.partial")) // 2
    require_gone_on(origin, target, wanted)


def test_an_interrupt_while_the_threads_are_started_leaves_none_of_them_behind(origin: Path, target: Path) -> None:
    program = (
        "import os, signal, concurrent.futures as futures\n"
        "submit = futures.ThreadPoolExecutor.submit\n"
        "def interrupted(*arguments):\n"
        "    future = submit(*arguments)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return future\n"
        "futures.ThreadPoolExecutor.submit = interrupted\n"
        "from reshard.cli.process import entry; entry()"
    )
    command = [sys.executable, "-c", program, "convert", str(origin), str(target), "--mp", str(RANKS)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=MANY)
    assert done.returncode == 130, done.stderr


# --- nobody listens ---


def test_a_log_on_a_full_disk_ends_no_conversion(origin: Path, target: Path, wanted: dict[str, str]) -> None:
    program = "import reshard.cli.terminal; reshard.cli.terminal.PLAIN_SECONDS = 0.0\n" + PROGRAM
    command = [sys.executable, "-c", program, "convert", str(origin), str(target), "--mp", str(RANKS)]
    with Path("/dev/full").open("wb") as log:
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=log)
    assert b"4 rank files" in done.stdout
    assert contents(target) == wanted


# --- a file system without locks ---


@pytest.mark.parametrize("lost", [None, "tokenizer.json"])
def test_a_target_that_cannot_be_locked_is_refused(
    lost: str | None, origin: Path, wanted: dict[str, str], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as NFS without its lock service. It may be a finished target that only lacks a side file."""
    if lost:
        convert_checkpoint(Job(origin, RANKS), target)
        (target / lost).unlink()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fail)
        with pytest.raises(Refused, match=r"without locks \(No locks available\)") as refused:
            convert_checkpoint(Job(origin, RANKS), target)
    assert [(problem.kind, problem.subject) for problem in refused.value.problems] == [("cannot-write", str(target))]
    convert_checkpoint(Job(origin, RANKS), target)
    assert contents(target) == wanted


def test_a_finished_target_that_cannot_be_mended_is_refused(origin: Path, target: Path) -> None:
    convert_checkpoint(Job(origin, RANKS), target)
    (target / "tokenizer.json").unlink()
    (target / JOURNAL).symlink_to("elsewhere")
    with pytest.raises(Refused, match="cannot write") as refused:
        convert_checkpoint(Job(origin, RANKS), target)
    assert [problem.kind for problem in refused.value.problems] == ["cannot-write"]
    assert not (target / "elsewhere").exists()
