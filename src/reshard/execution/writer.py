"""Threads that write windows to the target, and the ledger of what is written."""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

import numpy as np
from xxhash import xxh3_128, xxh3_128_digest

from reshard.casts.kernels import fastest_recode
from reshard.execution.journal import RECORD, RECORD_TYPE, Journal, append_records
from reshard.execution.reader import Buffers, Files, gather, read_or_make
from reshard.execution.windows import Window
from reshard.storage.local import Ways, drop_cached, read_window, write_all
from reshard.types import Advance, Cast

STEP_SIZE = 1 << 20
"""In bytes. What is copied in such steps stays in the second cache of a processor between the read and the write."""

SHORTEST_RUN = STEP_SIZE // 4
"""In bytes. A window with a shorter run is read as a whole: a read of its own would cost more than it saves."""

FLUSH_SECONDS = 5.0
"""So much work is lost at most when a job is killed."""

LOOK_SECONDS = 0.2


class Ledger:
    """What has been written, with its checksums: at first in memory only, then durable and in the journal."""

    def __init__(self, journal: Journal, targets: Sequence[int], ways: Ways) -> None:
        self._journal = journal
        self._targets = targets
        self._ways = ways
        self._lock = threading.Lock()
        self._pending = bytearray()
        self._durable = bytearray(journal.records)
        self.inexact = 0

    def add(self, records: bytes, inexact: int = 0) -> None:
        """Groups that have been written, and how many values of them are not exact."""
        with self._lock:
            self._pending += records
            self.inexact += inexact

    def flush(self) -> None:
        """Makes what has been added so far durable, and then says so in the journal: in this order."""
        with self._lock:
            batch, self._pending = bytes(self._pending), bytearray()
        if not batch:
            return
        for file in sorted({*np.frombuffer(batch, RECORD_TYPE)["file"].tolist()}):
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
    if any(isinstance(made, Cast) for made in files.made):
        fastest_recode()  # here, for it may import numba, and that from one thread only
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
            end(queue, futures)
        futures[0].result()


def end(queue: Queue, futures: Sequence[Future[None]]) -> None:
    """Tells all to end and waits until they have, whatever comes: their files may not be closed under them by an
    impatient second Ctrl-C. It is raised behind that, for it may have been the first.
    """
    interrupted = None
    while True:
        try:
            queue.stopped.set()
            wait(futures)
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted:
        raise interrupted


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
    buffers = Buffers(makes=bool(files.made))
    done = 0
    try:
        while window := queue.next(done):
            done = move(window, files, ledger, buffers)
    except BaseException:
        queue.stopped.set()
        raise


def move(window: Window, files: Files, ledger: Ledger, buffers: Buffers) -> int:
    """Moves a window: reads or computes it once and writes each of its groups; returns how many bytes."""
    if has_only_long_runs(window, files):
        move_in_steps(window, files, ledger, buffers.window)
    else:
        move_whole(window, files, ledger, buffers)
    return sum(group.size for group in window.groups)


def has_only_long_runs(window: Window, files: Files) -> bool:
    """Whether a window need not lie in memory as a whole: nothing of it is computed or gathered. Past the page cache
    it is read at once all the same, for that keeps a disk busy.
    """
    is_read = files.ways.read == "cached" and window.source_file < len(files.sources)
    pieces = (piece for group in window.groups for piece in group.pieces)
    return is_read and all(piece.rows == 1 and piece.run >= SHORTEST_RUN for piece in pieces)


def move_in_steps(window: Window, files: Files, ledger: Ledger, buffer: memoryview) -> None:
    """Copies a window of long runs, a step at a time."""
    source, name = files.sources[window.source_file], files.source_names[window.source_file]
    records = bytearray()
    for group in window.groups:
        checksum, end = xxh3_128(), group.target_offset
        for start, _, run, _ in group.pieces:
            for step in range(0, run, STEP_SIZE):
                offset, size = window.offset + start + step, min(STEP_SIZE, run - step)
                data = read_window(source, offset, size, buffer, files.ways, name)
                checksum.update(data)
                write_all(files.targets[group.target_file], data, end, files.ways)
                end += size
        records += RECORD.pack(group.target_offset, group.target_file, group.size, checksum.digest())
    ledger.add(bytes(records))


def move_whole(window: Window, files: Files, ledger: Ledger, buffers: Buffers) -> None:
    """Reads or computes a window as a whole, then gathers and writes its groups."""
    data, inexact = read_or_make(window, files, buffers)
    records = bytearray()
    for group in window.groups:
        bytes_of_group = gather(group, data, buffers.stage)
        # Now, while the bytes are in the processor's cache: from memory it would cost twice as much.
        digest = xxh3_128_digest(bytes_of_group)
        write_all(files.targets[group.target_file], bytes_of_group, group.target_offset, files.ways)
        records += RECORD.pack(group.target_offset, group.target_file, group.size, digest)
    ledger.add(bytes(records), inexact)
