"""Writes windows to the target files, with several threads and a ledger of the checksums of everything written."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from threading import Condition, Event
from time import monotonic
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_128, xxh3_128_digest

from reshard.casts.kernels import choose_recode
from reshard.execution.journal import RECORD, Journal, append_records
from reshard.execution.reader import OpenFiles, WorkerBuffers, gather_group, read_or_compute_window
from reshard.execution.records import Records, parse_records
from reshard.execution.times import (
    ARRANGING,
    COPYING,
    READING,
    SYNCING,
    WAITING,
    WRITING,
    ActivityClock,
    ThreadSeconds,
    add_thread_seconds,
)
from reshard.execution.windows import Window
from reshard.storage.counting import WorkCounter
from reshard.storage.local import (
    ReadableFile,
    Ways,
    drop_from_cache,
    is_written_by_sync,
    prefetch_range,
    start_writeback,
    wait_for_range,
    write_range,
)
from reshard.storage.opened import read_range
from reshard.storage.resources import Growth, run_in_threads
from reshard.types import Advance, Cast

STEP_SIZE = 1 << 20
"""In bytes. A copy in steps of this size stays in the second-level cache between the read and the write."""

SHORTEST_RUN = STEP_SIZE // 4
"""In bytes. A window with a shorter run is read as a whole: one read a run would cost more than it saves."""

FLUSH_SECONDS = 5.0
"""At most the work of so many seconds is lost when a job is killed."""

FLUSH_SIZE = 2 << 30
"""In bytes. Written bytes are synced earlier if there are so many: a large memory could hold 100 GB that wait."""

LATE_FLUSH_SIZE = 256 << 20
"""In bytes. The same on a file system that begins to write only when it is synced: else its disk would idle."""

MOST_UNSYNCED = 2 * FLUSH_SIZE
"""In bytes. If so many are written and not synced, the workers wait for the disk."""

LOOK_SECONDS = 0.05
"""How often it is looked whether there is something to sync."""

SYNC_STEP = 64 << 20
"""In bytes: after so many that have come to the disk, they are counted."""


class Jobs(NamedTuple):
    """Numbers of threads."""

    first: int
    """At the beginning."""
    most: int
    """As long as more of them write more."""


class Ledger:
    """Records of the written groups, with checksums: first in memory; after a flush durable, in the journal."""

    def __init__(self, journal: Journal, targets: Sequence[int], ways: Ways, counter: WorkCounter) -> None:
        self._journal = journal
        self._counter = counter
        self._targets = targets
        self._ways = ways
        self._room = Condition()
        self._is_late = False
        self._is_bounded = False
        self._pending = bytearray()
        self._durable = journal.records
        self.added = 0
        """In bytes: written in this run."""
        self.unsynced = 0
        """In bytes: written, and not known to be durable."""
        self.inexact = 0

    def add(self, records: bytes, inexact: int = 0) -> None:
        """Adds the records of groups that have been written, and the number of values in them that a cast rounded.
        Waits for the disk if it is too far behind.
        """
        size = add_sizes(parse_records(records))
        with self._room:
            while self._is_bounded and self.unsynced >= MOST_UNSYNCED:
                self._room.wait()
            self._pending += records
            self.added += size
            self.unsynced += size
            self.inexact += inexact

    @contextmanager
    def bound(self) -> Iterator[None]:
        """A context in which somebody flushes, so that others may wait for it."""
        self._is_bounded = True
        try:
            yield
        finally:
            with self._room:
                self._is_bounded = False
                self._room.notify_all()

    @property
    def flush_size(self) -> int:
        """In bytes: if so many are unsynced, it is time for a flush."""
        return LATE_FLUSH_SIZE if self._is_late else FLUSH_SIZE

    def flush(self) -> None:
        """Makes the groups added so far durable, and only then writes their records to the journal."""
        with self._room:
            batch, self._pending = bytes(self._pending), bytearray()
        if not batch:
            return
        records = parse_records(batch)
        parts = {file: records[records["file"] == file] for file in np.unique(records["file"]).tolist()}
        # All are begun before the first is waited for.
        begun = [start_writeback(self._targets[file], 0, 0) for file in parts]
        self._is_late = not all(begun) or any(is_written_by_sync(self._targets[file]) for file in parts)
        if not self._is_late:
            self._wait_for_disk(parts)
        for file, part in parts.items():
            os.fdatasync(self._targets[file])
            drop_from_cache(self._targets[file], self._ways)
            if self._is_late:
                self._counter.settle(add_sizes(part))
        append_records(self._journal, batch)
        self._durable += batch
        with self._room:
            self.unsynced -= add_sizes(records)
            self._room.notify_all()

    def _wait_for_disk(self, parts: Mapping[int, Records]) -> None:
        """Waits until groups are written to the disk, and counts them step by step: a sync may take a minute a file."""
        for file, part in parts.items():
            for start, end, size in find_sync_steps(part):
                wait_for_range(self._targets[file], start, end - start)
                self._counter.settle(size)

    def read_records(self) -> Records:
        """Reads the records of everything that is durable, those of earlier runs included."""
        return parse_records(self._durable)


def add_sizes(records: Records) -> int:
    """The size of groups together, in bytes."""
    return int(records["size"].sum(dtype=np.int64))


def find_sync_steps(records: Records) -> Iterator[tuple[int, int, int]]:
    """Steps of about SYNC_STEP bytes through the groups of a file: start, end, and the bytes of groups in between."""
    step = np.cumsum(records["size"], dtype=np.int64) // SYNC_STEP
    for group in np.split(records, np.flatnonzero(np.diff(step)) + 1):
        yield int(group["offset"][0]), int(group["offset"][-1]) + int(group["size"][-1]), add_sizes(group)


def move_all(
    work: Iterable[Window], files: OpenFiles, ledger: Ledger, jobs: Jobs, advance: Advance, stages: ActivityClock
) -> tuple[int, ThreadSeconds]:
    """Moves every window, with several threads, and flushes the ledger every few seconds. Raises their first error.
    Returns the number of threads in the end, and what they did. The stage of the run is `COPYING` meanwhile, then
    `SYNCING`.
    """
    clocks: list[ActivityClock] = []
    if any(isinstance(made, Cast) and made.operation != "fill" for made in files.made):
        choose_recode()  # here, for it may import numba, and that from one thread only

    def make_worker() -> Callable[[Window], None]:
        buffers = WorkerBuffers(makes=bool(files.made), levels=files.levels)
        clocks.append(buffers.clock)
        return lambda window: advance(move_window(window, files, ledger, buffers))

    # The ledger has a thread of its own, so that no worker waits for the disk.
    growth = Growth(jobs.most, lambda: ledger.added)
    stages.begin(COPYING)
    threads = run_in_threads(work, make_worker, jobs.first, partial(flush_regularly, ledger), growth)
    stages.begin(SYNCING)
    return threads, add_thread_seconds(clock.read() for clock in clocks)


def flush_regularly(ledger: Ledger, stopped: Event) -> None:
    """Flushes the ledger every few seconds, or when much is written, until the work ends."""
    flushed = monotonic()
    with ledger.bound():
        while not stopped.wait(min(LOOK_SECONDS, FLUSH_SECONDS)):
            if ledger.unsynced >= ledger.flush_size or monotonic() - flushed >= FLUSH_SECONDS:
                ledger.flush()
                flushed = monotonic()


def move_window(window: Window, files: OpenFiles, ledger: Ledger, buffers: WorkerBuffers) -> int:
    """Reads or computes a window once and writes each of its groups; returns the number of bytes written."""
    buffers.clock.begin(READING)  # it is looked first what of it is in the page cache
    if has_only_long_runs(window, files):
        move_in_steps(window, files, ledger, buffers)
    else:
        move_whole(window, files, ledger, buffers)
    return sum(group.size for group in window.groups)


def has_only_long_runs(window: Window, files: OpenFiles) -> bool:
    """Whether a window can be copied in steps: it is not computed, its runs are long, no byte goes to two files, and it
    is read through the page cache. Past the page cache a window is read at once, which keeps the disk busy.
    """
    pieces = sorted(piece for group in window.groups for piece in group.pieces)
    if window.source_file >= len(files.sources) or any(piece.rows > 1 or piece.run < SHORTEST_RUN for piece in pieces):
        return False
    if any(one.start + one.run > other.start for one, other in pairwise(pieces)):
        return False
    return files.sources[window.source_file].is_read_from_cache(window.offset, window.size)


def move_in_steps(window: Window, files: OpenFiles, ledger: Ledger, buffers: WorkerBuffers) -> None:
    """Copies a window of long runs, STEP_SIZE bytes at a time."""
    source, clock = files.sources[window.source_file], buffers.clock
    if isinstance(source, ReadableFile):
        prefetch_range(source, window.offset, window.size)
    records = bytearray()
    for group in window.groups:
        checksum, end = xxh3_128(), group.target_offset
        for start, _, run, _ in group.pieces:
            for step in range(0, run, STEP_SIZE):
                offset, size = window.offset + start + step, min(STEP_SIZE, run - step)
                clock.begin(READING)
                data = read_range(source, offset, size, buffers.window)
                clock.begin(ARRANGING)
                checksum.update(data)
                clock.begin(WRITING)
                write_range(files.targets[group.target_file], data, end, files.ways)
                end += size
        records += RECORD.pack(group.target_offset, group.target_file, group.size, checksum.digest())
    clock.begin(WAITING)
    ledger.add(bytes(records))


def move_whole(window: Window, files: OpenFiles, ledger: Ledger, buffers: WorkerBuffers) -> None:
    """Reads or computes a window as a whole, then gathers and writes each of its groups."""
    data, inexact = read_or_compute_window(window, files, buffers)
    records = bytearray()
    for group in window.groups:
        buffers.clock.begin(ARRANGING)
        bytes_of_group = gather_group(group, data, buffers.stage)
        # Now, while the bytes are in the processor's cache: from memory it would cost twice as much.
        digest = xxh3_128_digest(bytes_of_group)
        buffers.clock.begin(WRITING)
        write_range(files.targets[group.target_file], bytes_of_group, group.target_offset, files.ways)
        records += RECORD.pack(group.target_offset, group.target_file, group.size, digest)
    buffers.clock.begin(WAITING)
    ledger.add(bytes(records), inexact)
