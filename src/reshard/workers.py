"""Workers: threads that move windows from the source to the targets, and the ledger of what they have moved."""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_128_digest

from reshard.disk import PAGE, Ways, aligned_buffer, drop_cached, read_window, write_all
from reshard.journal import RECORD, RECORD_TYPE, Journal, append_records
from reshard.types import Advance
from reshard.windows import WINDOW_SIZE, Group, Window

MEMORY_PER_JOB = 2 * WINDOW_SIZE + 2 * PAGE
"""In bytes: a buffer to read into and one to gather in."""
FLUSH_SECONDS = 5.0
"""So much work is lost at most when a job is killed."""
LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Files:
    """The open files of a job."""

    sources: Sequence[int]
    source_names: Sequence[str]
    targets: Sequence[int]
    ways: Ways


class Ledger:
    """What has been written, with its checksums: at first in memory only, then durable and in the journal."""

    def __init__(self, journal: Journal, targets: Sequence[int], ways: Ways) -> None:
        self._journal = journal
        self._targets = targets
        self._ways = ways
        self._lock = threading.Lock()
        self._pending = bytearray()
        self._durable = bytearray(journal.records)

    def add(self, records: bytes) -> None:
        """Groups that have been written."""
        with self._lock:
            self._pending += records

    def flush(self) -> None:
        """Makes what has been added so far durable, and then says so in the journal: in this order."""
        with self._lock:
            batch, self._pending = bytes(self._pending), bytearray()
        if not batch:
            return
        for file in np.unique(np.frombuffer(batch, RECORD_TYPE)["file"]).tolist():
            os.fdatasync(self._targets[file])
            drop_cached(self._targets[file], self._ways)
        append_records(self._journal, batch)
        self._durable += batch

    @property
    def records(self) -> bytes:
        """All that is durable."""
        return bytes(self._durable)


class Queue:
    """Hands the windows out to the workers, one each; ends early once it is stopped."""

    def __init__(self, work: Iterator[Window], advance: Advance) -> None:
        self._work = work
        self._advance = advance
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def next(self, done: int) -> Window | None:
        """The next window, for a worker that has written `done` bytes since the last; None when there is no more."""
        with self._lock:
            if done:
                self._advance(done)
            return None if self.stopped.is_set() else next(self._work, None)


def move_all(work: Iterator[Window], files: Files, ledger: Ledger, jobs: int, advance: Advance) -> None:
    """Moves every window, with so many threads. The first error of one ends all and is raised."""
    queue = Queue(work, advance)
    futures: list[Future[None]] = []
    with ThreadPoolExecutor(jobs + 1) as pool:
        # From the first thread on: the pool waits for all of them, and the flusher ends only when it is told to.
        try:
            futures.append(pool.submit(flush_regularly, queue, ledger))
            futures.extend(pool.submit(move_windows, queue, files, ledger) for _ in range(jobs))
            left = set(futures[1:])
            while left:
                # The kernel may give a signal to any thread, but Python acts on it only when this one comes to itself.
                ended, left = wait(left, LOOK_SECONDS, FIRST_EXCEPTION)
                for future in ended:
                    future.result()
        finally:
            queue.stopped.set()
            wait_for(futures)
        futures[0].result()


def wait_for(futures: Sequence[Future[None]]) -> None:
    """Until all have ended, whatever comes: their files may not be closed under them by an impatient second Ctrl-C."""
    while True:
        try:
            wait(futures)
        except KeyboardInterrupt:
            continue
        return


def flush_regularly(queue: Queue, ledger: Ledger) -> None:
    """Flushes the ledger until the work ends, in a thread of its own so that no worker waits for the disk."""
    try:
        while not queue.stopped.wait(FLUSH_SECONDS):
            ledger.flush()
    except BaseException:
        queue.stopped.set()
        raise


def move_windows(queue: Queue, files: Files, ledger: Ledger) -> None:
    """One worker: takes windows until there are no more."""
    buffer, stage = aligned_buffer(WINDOW_SIZE + 2 * PAGE), aligned_buffer(WINDOW_SIZE)
    done = 0
    try:
        while window := queue.next(done):
            done = move(window, files, ledger, buffer, stage)
    except BaseException:
        queue.stopped.set()
        raise


def move(window: Window, files: Files, ledger: Ledger, buffer: memoryview, stage: memoryview) -> int:
    """Reads a window once and writes each of its groups; returns how many bytes."""
    source, name = files.sources[window.source_file], files.source_names[window.source_file]
    data = read_window(source, window.offset, window.size, buffer, files.ways, name)
    records = bytearray()
    for group in window.groups:
        bytes_of_group = gather(group, data, stage)
        # Now, while the bytes are in the processor's cache: from memory it would cost twice as much.
        digest = xxh3_128_digest(bytes_of_group)
        write_all(files.targets[group.target_file], bytes_of_group, group.target_offset, files.ways)
        records += RECORD.pack(group.target_offset, group.target_file, group.size, digest)
    ledger.add(bytes(records))
    return sum(group.size for group in window.groups)


def gather(group: Group, window: memoryview, stage: memoryview) -> memoryview:
    """The bytes of a group: a part of the window if they lie there in one piece, else copied together in `stage`."""
    if len(group.pieces) == 1 and group.pieces[0].rows == 1:
        start = group.pieces[0].start
        return window[start : start + group.size]
    end = 0
    for start, pitch, run, rows in group.pieces:
        if rows == 1:
            stage[end : end + run] = window[start : start + run]
        else:
            # A run as one element: numpy moves it whole, three times faster than byte by byte at 128 bytes.
            runs = np.ndarray((rows,), f"V{run}", window, start, (pitch,))
            np.copyto(np.ndarray((rows,), f"V{run}", stage, end), runs)
        end += run * rows
    return stage[:end]
