"""Locks a target by a file beside its journal, where the kernel's locks are not to be trusted: on a network.

The lock is made by exclusive creation, and names its holder, who writes a counter in it anew every few seconds: it
beats. Who finds a lock whose process is gone for sure, or that has not beaten for a long while, takes it over in two
steps: exclusive creation of the claim, a second file; then a rename of the claim over the lock, if that is still what
was found. Whoever the lock names in the end has it. So there is one winner, and never a moment without a lock.

A holder may have slept meanwhile. So it looks whether the lock is still its own before each step that only one run may
do. It never writes to the lock of another: the file that it has opened by name and read is its own or a removed one.
No clocks of two machines are compared.
"""

import errno
import json
import os
import secrets
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep

import msgspec

from reshard.errors import refuse
from reshard.execution.holders import (
    HOLDER_TEXT,
    describe_holder,
    identify_machine,
    is_gone,
    read_start_time,
    refuse_in_use,
)
from reshard.formats.target_names import PARTIAL
from reshard.storage.remote_store import tell, tell_always

LARGEST_LOCK = 4096
"""In bytes."""

SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""How a file is opened that anyone may have put there: a link is not followed, and a pipe not waited for."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a lock is looked after, in seconds."""

    beat: float = 5.0
    silence: float = 60.0
    """A lock that has not beaten for so long has lost its holder: twelve beats, longer than a busy server lets a small
    write wait, and short enough for a person."""
    look: float = 1.0
    """Between two looks at a lock of another."""
    settle: float = 1.0
    """From the last step of a takeover to the look at who has won."""


PACE = Pace()


class LockEntry(msgspec.Struct):
    """What a lock says of its holder."""

    held_by: str
    machine: str
    process: int
    started: int


class LockFile:
    """A lock file, to be held by this process."""

    def __init__(self, path: Path, pace: Pace) -> None:
        self.path = path
        self.was_taken = False
        """Whether another run had it, which ended without removing it."""
        self._claim = path.with_name(path.name + PARTIAL)
        self._pace = pace
        process = os.getpid()
        entry = LockEntry(describe_holder().rstrip(), identify_machine(), process, read_start_time(process))
        ours = {"run": secrets.token_hex(8), **msgspec.to_builtins(entry), "beat": ""}
        self._head = json.dumps(ours).encode().removesuffix(b'"}')
        self._ended = Event()
        self._thread = Thread(target=self._beat_regularly, daemon=True)

    def acquire(self) -> None:
        """Makes the lock, or takes it over. Raises Refused if another run has it, and OSError."""
        self._thread.start()  # it writes to nothing but a lock of ours
        while not make_whole(self.path, self._make_content(0)):
            left = wait_for_silence(self.path, self._pace)
            if left is not None and self._take_over(left):
                self.was_taken = True
                why = "which has ended" if is_left(left) else f"silent for {self._pace.silence:.0f} s"
                tell_always(f"{self.path.parent}: took over the lock of {name_holder(left)}, {why}")
                break

    def release(self) -> None:
        """Removes the lock and the claim, if they are still ours."""
        self._ended.set()
        try:
            if self._thread.ident is not None:
                self._thread.join()
        finally:
            for path in (self._claim, self.path):
                with suppress(OSError):  # what stays is silent from now on
                    self._remove(path)

    def is_held(self) -> bool:
        """Whether the lock is still ours. Raises OSError if that cannot be seen."""
        return self._is_ours(read_lock(self.path))

    def require_held(self) -> None:
        """Raises Refused if another run has taken the lock over, and OSError."""
        content = read_lock(self.path)
        if self._is_ours(content):
            return
        found = "the lock of this run has been removed"
        if content is not None:
            found = f"{name_holder(content)} has taken over the lock of this run, which was silent for too long"
        remedy = "run the same command again: it goes on with what is there, or says who is at work or that all is done"
        raise refuse("another-run", str(self.path.parent), found, "a lock that stays ours until the end", remedy)

    def _take_over(self, left: bytes) -> bool:
        """Takes over a lock that was left with this content. Returns whether it is ours."""
        if not make_whole(self._claim, self._make_content(0)):
            # Another one is at it, or has ended in between.
            if wait_for_silence(self._claim, self._pace) is not None:
                self._claim.unlink(missing_ok=True)
            return False
        if read_lock(self.path) == left:
            with suppress(FileNotFoundError):  # we have slept, and another one has removed our claim
                self._claim.rename(self.path)
        self._remove(self._claim)
        if not self.is_held():
            return False
        # One who thought our claim to be that of a process which is gone, and removed it, has made another by now. It
        # is through with that before we look again, or stops when it looks itself.
        sleep(self._pace.settle)
        return self.is_held()

    def _beat_regularly(self) -> None:
        beat = 0
        while not self._ended.wait(self._pace.beat):
            beat += 1
            with suppress(OSError):  # the server may be away; the next beat may come through
                self._beat(beat)

    def _beat(self, number: int) -> None:
        descriptor = os.open(self.path, os.O_RDWR | SAFE)
        try:
            if self._is_ours(os.read(descriptor, LARGEST_LOCK)):
                os.pwrite(descriptor, self._make_content(number), 0)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _make_content(self, beat: int) -> bytes:
        """Always as long, so that a beat neither tears nor needs room."""
        return self._head + f'{beat:012}"}}\n'.encode()

    def _is_ours(self, content: bytes | None) -> bool:
        return content is not None and content.startswith(self._head)

    def _remove(self, path: Path) -> None:
        if self._is_ours(read_lock(path)):
            path.unlink(missing_ok=True)


def take_lock_file(stack: ExitStack, path: Path) -> LockFile:
    """Makes a lock file, or takes over one that was left, and holds it until the stack closes. Raises Refused if
    another run has it, and OSError.
    """
    lock = LockFile(path, PACE)
    stack.callback(lock.release)
    lock.acquire()
    return lock


def make_whole(path: Path, content: bytes) -> bool:
    """Makes a small file with its content; False if there is one. Raises OSError, and then leaves none."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | SAFE, 0o666)
    except FileExistsError:
        return False
    try:
        try:
            os.write(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def read_lock(path: Path) -> bytes | None:
    """Reads a lock as it is on the server now; None if there is none. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | SAFE)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # some mounts keep pages over an open
            return os.read(descriptor, LARGEST_LOCK)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # the latter: another machine has just removed it
            return None
        raise


def wait_for_silence(path: Path, pace: Pace) -> bytes | None:
    """Watches the lock of another run. Returns its content once the run has ended, as the process of this machine that
    is gone, or by its silence; None if the lock is gone. Raises Refused if it beats, and OSError.
    """
    seen = read_lock(path)
    if seen is None or is_left(seen):
        return seen
    limit, holder = f"{pace.silence:.0f} s", name_holder(seen)
    tell(f"{path.parent}: locked by {holder}; waits up to {limit} to see whether it is still at work")
    silent, looked = 0.0, monotonic()
    while silent < pace.silence and not is_left(seen):
        sleep(pace.look)
        content = read_lock(path)
        if content != seen:
            if content is None:
                return None
            raise refuse_in_use(path.parent, name_holder(content))
        passed, looked = monotonic() - looked, monotonic()
        # While the server or this machine was away, the holder could not beat either; it may need a while to come back.
        silent = 0.0 if passed > pace.silence / 4 else silent + min(passed, 2 * pace.look)
    return seen


def is_left(content: bytes) -> bool:
    """Whether the process that a lock names has ended, for sure."""
    entry = parse_lock(content)
    return entry is not None and is_gone(entry.machine, entry.process, entry.started)


def name_holder(content: bytes) -> str:
    """Names the process that has a lock, for a person: what a lock says is a stranger's text."""
    entry = parse_lock(content)
    return entry.held_by if entry and HOLDER_TEXT.fullmatch(entry.held_by) else "another process"


def parse_lock(content: bytes) -> LockEntry | None:
    """Reads what a lock says; None if it is empty or damaged, as a crash may leave it."""
    try:
        return msgspec.json.decode(content, type=LockEntry)
    except ValueError:  # msgspec's own errors are ValueErrors
        return None


def find_lock_holder(path: Path) -> str:
    """Finds the process that a lock file names; empty if there is none, or if that process has ended for sure."""
    try:
        content = read_lock(path)
    except OSError:
        return ""
    if content is None or is_left(content):
        return ""
    return name_holder(content)
