"""The result of a run in numbers: threads, ways and bytes, the time of its stages, and what its threads did in it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

from reshard.storage.local import Ways

PREPARING, COPYING, SYNCING, FINISHING = range(4)
"""Stages of a run, as in `Stages`."""

READING, COMPUTING, ARRANGING, WRITING, WAITING = range(5)
"""What a thread does, as in `ThreadSeconds`."""


class Stages(NamedTuple):
    """How long the stages of a run took by the clock, in seconds. They follow each other, and leave nothing out."""

    preparing: float = 0.0
    """Opening files, looking at the journal, writing the files beside the tensors; making casts ready."""
    copying: float = 0.0
    """From the first thread's begin to the last one's end; into a store, until all parts are put."""
    syncing: float = 0.0
    """Waiting for what the disk had not taken until then. A store is not waited for: what is put is there."""
    finishing: float = 0.0
    """The manifest and the final names; in a store also the files beside the tensors."""


class ThreadSeconds(NamedTuple):
    """What the threads did while they copied, in seconds of all threads together. A moment counts once in a thread."""

    reading: float = 0.0
    """The source: from a disk, the page cache or a store."""
    computing: float = 0.0
    """Values: casts and constants."""
    arranging: float = 0.0
    """Bytes in memory: gathering and joining them, comparing replicas, checksums."""
    writing: float = 0.0
    """Into the page cache, onto a disk or into a store."""
    waiting: float = 0.0
    """For the next window, for a disk that is far behind, at the end for other threads."""


class ActivityClock:
    """Measures the seconds of each of some activities, which take turns: one is on at any moment. A turn takes less
    than a microsecond.
    """

    def __init__(self, activities: int, first: int) -> None:
        """Begins with the activity of the number `first`."""
        self._seconds = [0.0] * activities
        self._activity = first
        self._since = perf_counter()

    def begin(self, activity: int) -> int:
        """Begins an activity, which ends the one before; returns that."""
        before, now = self._activity, perf_counter()
        self._seconds[before] += now - self._since
        self._activity, self._since = activity, now
        return before

    def read(self) -> Sequence[float]:
        """The seconds of each activity, by its number, until now. A thread that has ended goes on with its last one."""
        self.begin(self._activity)
        return tuple(self._seconds)


def make_thread_clock() -> ActivityClock:
    """Makes the clock of a thread that copies. It waits at first."""
    return ActivityClock(len(ThreadSeconds._fields), WAITING)


def add_thread_seconds(threads: Iterable[Sequence[float]]) -> ThreadSeconds:
    """Adds up what several threads did."""
    return ThreadSeconds(*map(sum, zip(*threads, strict=True)))


NO_STAGES, NO_THREADS = Stages(), ThreadSeconds()
"""Of a run that had nothing to do."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """Resources that a run used, and its results in numbers."""

    jobs: int
    """Number of threads in the end."""
    ways: Ways
    """Those of most of the bytes."""
    resumed: int
    """In bytes: how much an earlier run had done already."""
    inexact: int
    """The number of values that casts of this run have rounded."""
    stages: Stages = NO_STAGES
    threads: ThreadSeconds = NO_THREADS
