"""Counts the bytes that all threads of a job have done, and tells a progress function of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

from reshard.types import Advance, Progress


class WorkState(NamedTuple):
    """How far a job is, in bytes."""

    done: int
    """A byte that is written counts half when it is copied, and half when it is on the disk."""
    total: int
    resumed: int = 0
    """Of `done`: what an earlier run had done."""
    unsynced: int | None = None
    """When all is copied: how much is not on the disk, or whole in the store, yet; None before."""
    is_stored: bool = False
    """Whether the target lies in a store."""


class ProgressView:
    """A Progress that is told more than two numbers."""

    def __call__(self, done: int, total: int) -> None:
        """Receives what every Progress does."""
        self.show(WorkState(done, total))

    def show(self, state: WorkState) -> None:
        """Receives how far the job is."""
        raise NotImplementedError


class ReceivedBytes:
    """Counts the bytes that have come from stores, of all that this process reads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.size = 0

    def add(self, size: int) -> None:
        """Counts bytes that have come, whether or not they had to be asked for again."""
        with self._lock:
            self.size += size


RECEIVED = ReceivedBytes()


class WorkCounter:
    """Adds up the bytes done by all threads, and tells them one thread at a time.

    A job that writes is not done when its bytes are copied: the kernel may hold gigabytes of them that the disk has yet
    to take. So a byte counts half when it is copied and half when it is on the disk, and nothing but `finish` reaches
    the whole.
    """

    def __init__(self, progress: Progress | None, total: int, *, writes: bool = False, is_stored: bool = False) -> None:
        self._progress = progress
        self._total = total
        self._writes = writes
        self._is_stored = is_stored
        self._lock = Lock()
        self._telling = Lock()
        self._resumed = self._moved = self._durable = 0
        self._has_begun = False

    def begin(self, resumed: int = 0) -> None:
        """Says that the work begins, and how many bytes of it an earlier run has made durable. Without this call it
        begins with the first bytes.
        """
        self._resumed = self._moved = self._durable = resumed
        with self._telling:
            self._tell_beginning()

    def advance(self, size: int) -> None:
        """Counts bytes that were copied or compared."""
        with self._lock:
            self._moved += size
        if self._progress:
            with self._telling:
                self._tell_all()

    def settle(self, size: int) -> None:
        """Counts bytes that have come to the disk. While others are still copied, these are told with them: whoever
        syncs meanwhile must not wait for a slow progress function.
        """
        with self._lock:
            self._durable += size
            is_copied = self._moved >= self._total
        if self._progress and is_copied:
            with self._telling:
                self._tell_all()

    def extend(self, size: int) -> None:
        """Adds bytes to the whole, for work that shows only on the way."""
        with self._lock:
            self._total += size

    def finish(self) -> None:
        """Says that the whole job is done."""
        with self._telling:
            self._tell_beginning()
            self._tell(self._total)

    def _tell_beginning(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._tell(self._resumed)

    def _tell_all(self) -> None:
        self._tell_beginning()
        with self._lock:
            done = (self._moved + (self._durable if self._writes else self._moved)) // 2
        self._tell(max(0, min(done, self._total - 1)))

    def _tell(self, done: int) -> None:
        if isinstance(self._progress, ProgressView):
            is_copied = self._writes and self._moved >= self._total > done
            unsynced = max(0, self._total - self._durable) if is_copied else None
            self._progress.show(WorkState(done, self._total, self._resumed, unsynced, self._is_stored))
        elif self._progress:
            self._progress(done, self._total)


@contextmanager
def count_progress(progress: Progress | None, total: int) -> Iterator[Advance]:
    """Yields a function that counts the bytes of a job that only reads. The whole is reached when the block ends;
    nothing is told of a job that is refused before its first byte.
    """
    counter = WorkCounter(progress, total)
    yield counter.advance
    counter.finish()


def spread_evenly(advance: Advance, part: int, whole: int) -> Advance:
    """Makes a function that counts `part` bytes as `whole`: each byte of a sample for those that are left out."""
    lock, done, told = Lock(), 0, 0

    def spread(size: int) -> None:
        nonlocal done, told
        with lock:
            done += size
            step = done * whole // part - told if part else 0
            told += step
        advance(step)

    return spread
