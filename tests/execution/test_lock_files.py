"""Locks by files, for network file systems: made, beating, left behind, taken over; by real processes.

A lock of another machine is one whose machine is another word; all else is real.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from reshard.errors import Problem, Refused
from reshard.execution import lock_files
from reshard.execution.holders import identify_machine, name_host, read_start_time
from reshard.execution.lock_files import LockFile, Pace, find_lock_holder, take_lock_file
from reshard.formats.target_names import LOCK, PARTIAL
from reshard.storage import remote_store
from reshard.storage.file_systems import is_on_network

MANY = 60.0
"""In seconds: whoever takes so long hangs."""
ENDLESS = Pace(beat=MANY, silence=MANY, look=0.01, settle=0)
"""Whoever waits for silence by this pace fails by its time."""
SHORT = Pace(beat=MANY, silence=0.2, look=0.01, settle=0)
"""A holder of this pace is silent, and who watches gives up soon."""
HOLD = """
import sys
from contextlib import ExitStack
from pathlib import Path
from reshard.errors import Refused
from reshard.execution import lock_files
lock_files.PACE = lock_files.Pace(beat=float(sys.argv[2]), settle=0)
with ExitStack() as stack:
    lock = lock_files.take_lock_file(stack, Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.readline()
    try:
        lock.require_held()
        print("mine", flush=True)
    except Refused as refused:
        print(refused.problems[0].kind, refused.problems[0].found, flush=True)
print("ended", flush=True)
"""
RACE = """
import os, sys
from contextlib import ExitStack
from pathlib import Path
from reshard.errors import Refused
from reshard.execution import lock_files
lock_files.PACE = lock_files.Pace(beat=0.02, silence=float(sys.argv[2]), look=0.01, settle=0.3)
begin, told, end = os.pipe(), os.pipe(), os.pipe()
for number in range(20):
    if not os.fork():
        os.close(begin[1]); os.close(end[1])
        os.read(begin[0], 1)
        try:
            with ExitStack() as stack:
                lock_files.take_lock_file(stack, Path(sys.argv[1]))
                os.write(told[1], b"w")
                os.read(end[0], 1)
        except Refused as refused:
            os.write(told[1], b"r" if refused.problems[0].kind == "target-in-use" else b"?")
        except BaseException:
            os.write(told[1], b"!")
            raise
        os._exit(0)
os.close(begin[1])
said = b""
while len(said) < 20:
    said += os.read(told[0], 20)
os.close(end[1])
for number in range(20):
    os.wait()
print("".join(sorted(said.decode())))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / LOCK


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a person is told."""
    told: list[str] = []
    monkeypatch.setattr(remote_store, "LISTENERS", [told.append])
    return told


def write_lock(path: Path, **changed: object) -> bytes:
    """A lock of a process of this machine that has ended, or what is `changed`."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    held_by = f"process {gone.pid} on {name_host()} since 2026-11-30 07:00:00"
    entry = {"run": "0" * 16, "held_by": held_by, "machine": identify_machine(), "process": gone.pid, "started": 1}
    path.write_text(json.dumps({**entry, "beat": "000000000007", **changed}), encoding="utf-8")
    return path.read_bytes()


def write_lock_of_another_machine(path: Path) -> bytes:
    return write_lock(path, machine="n2 0-1-2 pid:[3]", held_by="process 4711 on n2 since 2026-11-30 07:00:00")


def take(path: Path, pace: Pace = ENDLESS) -> LockFile:
    """A lock that is held until its `release`."""
    lock = LockFile(path, pace)
    lock.acquire()
    return lock


def refusal(path: Path, pace: Pace = ENDLESS) -> Problem:
    with pytest.raises(Refused) as error:
        take(path, pace)
    (problem,) = error.value.problems
    return problem


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + MANY
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


@contextmanager
def holding(path: Path, beat: float = MANY) -> Iterator["subprocess.Popen[str]"]:
    """A process that has the lock until it is sent a line."""
    command = [sys.executable, "-c", HOLD, str(path), str(beat)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


# --- one holder ---


def test_a_lock_names_its_holder_and_goes_with_it(path: Path, lines: list[str]) -> None:
    lock = take(path)
    entry = json.loads(path.read_bytes())
    assert entry["held_by"].startswith(f"process {os.getpid()} on {name_host()} since 20")
    assert (entry["process"], entry["machine"]) == (os.getpid(), identify_machine())
    assert entry["started"] == read_start_time(os.getpid()) > 0
    assert lock.is_held()
    lock.require_held()
    lock.release()
    assert list(path.parent.iterdir()) == []
    assert (lock.was_taken, lines) == (False, [])


def test_a_holder_beats_in_its_place(path: Path) -> None:
    lock = take(path, Pace(beat=0.005))
    first, number = path.read_bytes(), path.stat().st_ino
    until(lambda: path.read_bytes() != first)
    assert (path.stat().st_size, path.stat().st_ino) == (len(first), number)
    lock.release()
    assert not path.exists()


def test_a_lock_that_beats_is_refused_with_its_holder(path: Path, lines: list[str]) -> None:
    with holding(path, beat=0.05) as process:
        held_by = json.loads(path.read_bytes())["held_by"]
        problem = refusal(path)
        assert held_by.startswith(f"process {process.pid} on ")
        assert (problem.kind, problem.found) == ("target-in-use", f"{held_by} is writing to it")
        assert lines == [f"{path.parent}: locked by {held_by}; waits up to 60 s to see whether it is still at work"]
        process.communicate("\n")
    assert not path.exists()


# --- holders that have ended ---


def test_the_lock_of_a_killed_process_is_taken_over_at_once(path: Path, lines: list[str]) -> None:
    with holding(path) as process:
        held_by = json.loads(path.read_bytes())["held_by"]
        process.kill()
        process.wait()
    lock = take(path)
    assert lines == [f"{path.parent}: took over the lock of {held_by}, which has ended"]
    assert lock.was_taken
    lock.release()
    assert list(path.parent.iterdir()) == []


def test_a_holder_that_is_killed_while_we_wait_is_noticed(path: Path, lines: list[str]) -> None:
    with holding(path) as process:
        pids = iter([process])

        def kill(line: str) -> None:
            lines.append(line)
            for one in pids:
                one.kill()
                one.wait()

        remote_store.LISTENERS[:] = [kill]
        take(path).release()
    assert [line.partition(": ")[2].split()[0] for line in lines] == ["locked", "took"]


def test_a_number_that_is_another_process_by_now_is_no_holder(path: Path, lines: list[str]) -> None:
    write_lock(path, process=os.getpid(), started=read_start_time(os.getpid()) - 1)
    take(path).release()
    assert lines[0].endswith(", which has ended")


@pytest.mark.parametrize(
    "changed",
    [
        {"machine": f"{identify_machine()}4"},
        {"machine": ""},
        {"process": os.getpid(), "started": read_start_time(os.getpid())},
        {"process": os.getpid(), "started": 0},
        {"process": 0},
        {"process": -1},
        {"process": 1 << 40},
    ],
)
def test_a_holder_that_may_be_there_is_taken_over_by_its_silence_only(
    changed: dict[str, object], path: Path, lines: list[str]
) -> None:
    """Processes of other containers too: they have the same host and boot, and other numbers."""
    write_lock(path, **changed)
    began = time.monotonic()
    lock = take(path, SHORT)
    assert time.monotonic() - began >= SHORT.silence
    assert [line.partition(": ")[2].split()[0] for line in lines] == ["locked", "took"]
    assert lines[1].endswith(", silent for 0 s")
    lock.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]\n", b"\xff" * 9000, b'{"held_by": "x\\u001b[31m", "process": 1}'])
def test_an_empty_or_damaged_lock_is_taken_over_by_its_silence(content: bytes, path: Path, lines: list[str]) -> None:
    """As a crash between making and writing it leaves it."""
    path.write_bytes(content)
    take(path, SHORT).release()
    assert "locked by another process; waits" in lines[0]
    assert "took over the lock of another process, silent" in lines[1]
    assert list(path.parent.iterdir()) == []


def test_a_lock_that_is_being_made_is_in_use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.touch()
    monkeypatch.setattr(remote_store, "LISTENERS", [lambda _: write_lock_of_another_machine(path)])
    assert refusal(path).found == "process 4711 on n2 since 2026-11-30 07:00:00 is writing to it"


def test_a_lock_that_is_removed_while_we_wait_is_free(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lock_of_another_machine(path)
    monkeypatch.setattr(remote_store, "LISTENERS", [lambda _: path.unlink()])
    lock = take(path)
    assert not lock.was_taken
    lock.release()


def test_while_the_server_is_away_no_silence_is_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers again after longer than the silence; the holder, which could not beat either, gets its time."""
    write_lock_of_another_machine(path)
    reads, read = 0, lock_files.read_lock

    def hang(name: Path) -> bytes | None:
        nonlocal reads
        reads += name == path
        if reads == 3:
            time.sleep(2 * SHORT.silence)
        return read(name)

    monkeypatch.setattr(lock_files, "read_lock", hang)
    take(path, SHORT).release()
    assert reads > 3 + SHORT.silence / (2 * SHORT.look)


# --- two who take over ---


@pytest.mark.parametrize("silence", ["60", "0.3"])
def test_of_twenty_that_race_for_a_lock_that_was_left_one_wins(silence: str, path: Path) -> None:
    """Those of a process that is gone are all there at the same moment; so are those that wait for silence."""
    for _ in range(3):
        if silence == "60":
            write_lock(path)
        else:
            write_lock_of_another_machine(path)
        command = [sys.executable, "-c", RACE, str(path), silence]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=MANY)
        assert done.stdout == "r" * 19 + "w\n", done.stderr
        assert list(path.parent.iterdir()) == []


def test_who_comes_late_to_a_takeover_leaves_the_winner_alone(path: Path) -> None:
    """It has found the same lock silent, and was asleep while another took it over and began to work."""
    left = write_lock_of_another_machine(path)
    winner, late = take(path, SHORT), LockFile(path, SHORT)
    assert not late._take_over(left)
    late.release()
    winner.require_held()
    assert [file.name for file in path.parent.iterdir()] == [LOCK]
    winner.release()


@pytest.mark.parametrize("make", [write_lock, write_lock_of_another_machine, Path.touch])
def test_a_claim_that_a_crash_has_left_stops_nobody(make: Callable[[Path], object], path: Path) -> None:
    write_lock(path)
    make(path.with_name(LOCK + PARTIAL))
    lock = take(path, SHORT)
    assert lock.was_taken
    lock.release()
    assert list(path.parent.iterdir()) == []


# --- a holder that slept ---


def test_a_holder_that_slept_through_a_takeover_ends_and_touches_nothing(path: Path) -> None:
    with holding(path, beat=0.05) as sleeper:
        sleeper.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED)
        lock = take(path, SHORT)
        assert lock.was_taken
        content, status = path.read_bytes(), path.stat()
        sleeper.send_signal(signal.SIGCONT)
        said, _ = sleeper.communicate("\n")
        held_by = json.loads(content)["held_by"]
        assert said.startswith(f"another-run {held_by} has taken over the lock of this run")
        assert said.endswith("\nended\n")
        assert (path.read_bytes(), path.stat().st_ino) == (content, status.st_ino)
        lock.require_held()
        lock.release()


def test_a_beat_after_a_takeover_is_written_to_no_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder falls asleep between its look at the lock and its write."""
    sleeper, lock = LockFile(path, ENDLESS), LockFile(path, SHORT)
    sleeper.acquire()
    write = os.pwrite

    def sleep_and_write(descriptor: int, data: bytes, offset: int) -> int:
        monkeypatch.setattr(os, "pwrite", write)
        lock.acquire()
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", sleep_and_write)
    sleeper._beat(1)
    sleeper._beat(2)
    lock.require_held()
    with pytest.raises(Refused, match="has taken over the lock of this run"):
        sleeper.require_held()
    sleeper.release()
    lock.require_held()
    lock.release()


def test_a_lock_that_somebody_removed_is_lost(path: Path) -> None:
    lock = take(path)
    path.unlink()
    with pytest.raises(Refused, match="the lock of this run has been removed"):
        lock.require_held()
    lock.release()


# --- what may go wrong ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "x", str(folder)], check=False).returncode
    ):
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_gets_no_half_lock(small_disk: Path) -> None:
    (small_disk / "fill").write_bytes(bytes(64 << 10))
    with pytest.raises(OSError, match="No space left"):
        take(small_disk / LOCK)
    assert [path.name for path in small_disk.iterdir()] == ["fill"]


@pytest.mark.parametrize("make", [write_lock, Path.exists])
def test_a_read_only_disk_is_an_error_of_the_system(make: Callable[[Path], object], small_disk: Path) -> None:
    make(small_disk / LOCK)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system"):
        take(small_disk / LOCK)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("elsewhere"), os.mkfifo])
def test_what_is_no_file_is_never_followed_nor_waited_for(make: Callable[[Path], None], path: Path) -> None:
    make(path)
    with pytest.raises(OSError):  # noqa: PT011 - each has its own error
        take(path, SHORT)
    assert [file.name for file in path.parent.iterdir()] == [LOCK]


def test_who_is_interrupted_while_it_waits_ends_at_once(path: Path) -> None:
    left = write_lock_of_another_machine(path)
    tell = "from reshard.storage.remote_store import LISTENERS; LISTENERS.append(lambda _: print('waits', flush=True))"
    command = [sys.executable, "-c", f"{tell}\n{HOLD}", str(path), "60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=MANY / 2)
    assert errors.endswith("KeyboardInterrupt\n")
    assert path.read_bytes() == left
    assert [file.name for file in path.parent.iterdir()] == [LOCK]


# --- who asks ---


def test_who_only_looks_is_told_of_a_holder_that_may_be_there(path: Path) -> None:
    assert find_lock_holder(path) == ""
    write_lock(path)
    assert find_lock_holder(path) == ""
    write_lock_of_another_machine(path)
    assert find_lock_holder(path) == "process 4711 on n2 since 2026-11-30 07:00:00"
    path.unlink()
    path.mkdir()
    assert find_lock_holder(path) == ""


def test_the_stack_holds_the_lock_until_it_closes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_files, "PACE", SHORT)
    with ExitStack() as stack:
        take_lock_file(stack, path)
        assert path.exists()
    assert not path.exists()


def test_only_a_disk_of_this_machine_is_trusted_with_its_locks(tmp_path: Path) -> None:
    assert not is_on_network(tmp_path)
    assert not is_on_network(Path("/dev/shm"))  # noqa: S108 - a tmpfs
    assert is_on_network(Path("/proc"))  # of a kind that nobody has listed
    assert is_on_network(tmp_path / "missing")
