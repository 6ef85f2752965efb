"""Executes a plan into a store: puts the parts of the files that are not durable there yet, and the manifest last.

Nothing can be renamed in a store. Where it keeps parts, the objects of tensors appear when all parts of all of them are
there; where it does not, each appears when it is whole. A target with a manifest is finished. See `store_journal`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from math import ceil
from threading import Event, Lock
from typing import Any

from reshard.casts.kernels import choose_recode
from reshard.casts.strips import StripStore
from reshard.errors import Refused, refuse, require_none
from reshard.execution.execute import OtherFiles, Settings, identify_job
from reshard.execution.joins import count_join_levels
from reshard.execution.journal import RESTART
from reshard.execution.part_writer import PartBuffers, fill_part, measure_part_buffers
from reshard.execution.parts import (
    PART_SIZE,
    Part,
    check_upload_limits,
    find_least_part,
    make_parts,
    measure_part_capacity,
)
from reshard.execution.reader import OpenFiles, measure_memory_to_compute
from reshard.execution.store_journal import (
    DonePart,
    DurableNote,
    StoreJournal,
    open_store_journal,
    refuse_lost_upload,
    remove_job,
)
from reshard.execution.store_ledger import StoreLedger
from reshard.execution.store_levels import LEVEL, PARTS, STREAM
from reshard.execution.store_objects import complete_file, finish_target, remove_finished_objects
from reshard.execution.times import (
    COPYING,
    FINISHING,
    PREPARING,
    WAITING,
    WRITING,
    ActivityClock,
    RunResult,
    Stages,
    add_thread_seconds,
)
from reshard.execution.windows import WINDOW_SIZE, choose_bands
from reshard.execution.writer import FLUSH_SECONDS, LOOK_SECONDS, Jobs
from reshard.formats.target_names import MANIFEST
from reshard.paths import RemotePath
from reshard.planning.plan import Plan
from reshard.storage.counting import WorkCounter
from reshard.storage.local import CACHED, Ways, refuse_unreadable
from reshard.storage.page_cache import THROUGH_STORE, choose_ways_to_read, find_ways_past_cache
from reshard.storage.remote_store import THREADS_OF_STORE
from reshard.storage.resources import STOP, Growth, Stopped, run_in_threads
from reshard.storage.target_store import NoSuchUploadError, TargetStore
from reshard.storage.unchanged import open_unchanged
from reshard.types import Cast, Join

HELD_BY_STREAM = 2.5
"""So many parts are held back by a stream at most: 2.2 were measured."""

FEWEST_JOBS = 4
"""Parts are smaller, if the store allows it, where memory is not enough for so many jobs."""

NOTES = 500
"""The longer a run, the longer it waits between two notes: this part of its time, or FLUSH_SECONDS."""


def execute_plan_to_store(
    plan: Plan, store: TargetStore, others: OtherFiles, counter: WorkCounter, settings: Settings
) -> RunResult:
    """Writes the files of a plan into a folder in a store; resumes if it was interrupted.

    The whole is counted when the target is finished. Raises Refused if the source changes, the store fails, or another
    run is in the way; the same call then resumes the job. If nothing was durable yet, nothing of it is left.
    """
    require_none(check_upload_limits(plan, store.limits))
    stages = ActivityClock(len(Stages._fields), PREPARING)
    part_size = choose_part_size(plan, store, settings)
    if settings.restart:
        others.require_same()  # before anything is thrown away
    job = identify_store_job(plan, store, others, settings)
    kept = others.kept.union(others.removed)
    journal = open_store_journal(store, job, part_size, kept, restart=settings.restart)
    ledger = StoreLedger(journal, plan.files)
    try:
        others.require_same()
        remove_finished_objects(store, others.removed)
        if not store.keeps_parts:
            journal.part_size = part_size  # of parts that are not kept, no run needs the same
        require_part_memory(settings, measure_memory_of_job(plan, store, journal.part_size))
        done = put_files(plan, journal, ledger, counter, settings, stages)
        stages.begin(FINISHING)
        finish_target(plan, journal, ledger, others, counter)
    except BaseException as error:
        discard_failed_run(plan, journal, ledger, is_refused=isinstance(error, Refused))
        raise
    return replace(done, stages=Stages(*stages.read()))


def identify_store_job(plan: Plan, store: TargetStore, others: OtherFiles, settings: Settings) -> dict[str, Any]:
    """The identity of a job in a store. It goes on on any machine: source files on a disk are told by samples of their
    bytes, for a copy has another time of change.
    """
    files = plan.source.files
    is_remote = isinstance(plan.source.folder, RemotePath)
    marks = [file.version for file in files] if is_remote else others.samples
    source = [[file.name, file.size, file.header_hash, mark] for file, mark in zip(files, marks, strict=True)]
    job = identify_job(plan, [*others.sides, MANIFEST], settings)
    return {**job, "source": source, LEVEL: PARTS if store.keeps_parts else STREAM}


def choose_part_size(plan: Plan, store: TargetStore, settings: Settings) -> int:
    """Chooses the least size of parts: as much as is fast, or what fits in memory. Raises Refused if nothing does."""
    least = find_least_part(plan.files, store.limits)
    size = max(least, PART_SIZE)
    jobs = min(settings.jobs or FEWEST_JOBS, FEWEST_JOBS)
    while size > least and settings.max_memory < jobs * measure_memory_of_job(plan, store, size):
        size = max(least, size // 2)
    require_part_memory(settings, measure_memory_of_job(plan, store, size))
    return size


def measure_memory_of_job(plan: Plan, store: TargetStore, part_size: int) -> int:
    """The memory that one job takes, in bytes. What a stream holds back is counted too."""
    levels = count_join_levels(plan.source.joins, len(plan.source.files))
    largest = measure_part_capacity(plan.files, part_size)
    computing = measure_memory_to_compute(plan.source.joins, plan.casts)
    held = 0 if store.keeps_parts else int(HELD_BY_STREAM * part_size)
    return measure_part_buffers(largest, computing=computing, levels=levels) + held


def require_part_memory(settings: Settings, memory: int) -> None:
    """Raises Refused if the memory that is allowed is not enough for one job."""
    if settings.max_memory < memory:
        found, expected = f"{settings.max_memory:,} bytes", f"at least {memory:,} bytes, for one job"
        raise refuse("too-little-memory", "--max-memory", found, expected, f"--max-memory {ceil(memory / 2**20)}MiB")


def discard_failed_run(plan: Plan, journal: StoreJournal, ledger: StoreLedger, *, is_refused: bool) -> None:
    """Throws away what a failed run cannot leave: streams; all of it, if it began the job, nothing is durable, and no
    other run goes on with it; and what only it has, if the job is another's or none by now. Else notes what is durable.
    An interrupt ends soon: then only streams are thrown away.
    """
    store = journal.store
    with suppress(Refused, Stopped):
        if is_refused and not journal.is_current():
            abort_open_uploads(plan, store, ledger)
            journal.remove_own_notes()
        elif is_refused and journal.is_new and not ledger.is_noted and not journal.has_other_runs():
            abort_open_uploads(plan, store, ledger)
            if not store.keeps_parts:
                # What a stream has become whole, if the answer to that was lost: a stranger's file to the next run.
                store.remove([plan.files[index].name for index in ledger.uploads])
            remove_job(store)
        elif not store.keeps_parts:
            abort_open_uploads(plan, store, ledger)
            if is_refused:
                ledger.flush()
        elif is_refused:
            ledger.flush()


def abort_open_uploads(plan: Plan, store: TargetStore, ledger: StoreLedger) -> None:
    """Throws away the uploads of this run that are not completed."""
    for index in {*ledger.uploads} - {*ledger.done}:
        store.abort_upload(plan.files[index].name, ledger.uploads[index])


def put_files(
    plan: Plan,
    journal: StoreJournal,
    ledger: StoreLedger,
    counter: WorkCounter,
    settings: Settings,
    stages: ActivityClock,
) -> RunResult:
    """Puts all parts that are not durable, and notes them."""
    store = journal.store
    resumed = 0
    if not journal.is_new:
        resumed = ledger.resume()
        journal.add_note(DurableNote((), ()))  # that we are here: the run that began the job must not throw it away
    if not plan.files:
        return RunResult(0, Ways(CACHED.read, THROUGH_STORE), 0, 0)
    ways = choose_ways_of_source(plan, settings)
    made: list[Join | Cast] = [*plan.source.joins, *plan.casts]
    levels = count_join_levels(plan.source.joins, len(plan.source.files))
    limit = settings.max_memory // measure_memory_of_job(plan, store, journal.part_size)
    jobs = Jobs(min(settings.jobs or THREADS_OF_STORE, limit), min(settings.jobs or THREADS_OF_STORE * 4, limit))
    if any(cast.operation != "fill" for cast in plan.casts):
        choose_recode()  # here, for it may import numba, and that from one thread only
    with open_unchanged(plan.source.folder, plan.source.files, ways, again=RESTART) as sources:
        counter.begin(resumed)
        files = OpenFiles(sources, (), ways, made, settings.allow_inexact, levels, StripStore(jobs.most))
        putter = PartPutter(plan, store, ledger, counter)
        largest, clocks = measure_part_capacity(plan.files, journal.part_size), list[ActivityClock]()

        def make_worker() -> Callable[[Part], None]:
            buffers = PartBuffers(largest, makes=bool(made), levels=levels)
            clocks.append(buffers.clock)
            return lambda part: putter.put(part, files, buffers)

        work = list_parts_to_put(plan, ledger, journal.part_size, 1 if store.keeps_parts else jobs.first)
        growth = Growth(jobs.most, lambda: ledger.added)
        stages.begin(COPYING)
        used = run_in_threads(work, make_worker, jobs.first, partial(note_regularly, ledger), growth)
        threads = add_thread_seconds(clock.read() for clock in clocks)
    ledger.flush()
    return RunResult(used, ways, resumed, ledger.inexact, threads=threads)


def choose_ways_of_source(plan: Plan, settings: Settings) -> Ways:
    """Chooses how the source is read, as for a local target. Raises Refused if it cannot be read."""
    folder = plan.source.folder
    if isinstance(folder, RemotePath):
        return Ways(THROUGH_STORE, THROUGH_STORE)
    first = folder / plan.source.files[0].name
    ways = CACHED
    if settings.cache == "no":
        with refuse_unreadable(first):
            ways = find_ways_past_cache(first)
    elif settings.cache == "auto":
        ways = choose_ways_to_read(first, int(plan.copies.sizes.sum()))
    return replace(ways, write=THROUGH_STORE)


def list_parts_to_put(plan: Plan, ledger: StoreLedger, part_size: int, together: int) -> Iterator[Part]:
    """Lists the parts that are not durable, file by file, or in turn those of so many files `together`."""
    made: list[Join | Cast] = [*plan.source.joins, *plan.casts]
    files = len(plan.source.files)
    bands = choose_bands(made, files, WINDOW_SIZE)
    waiting = (
        make_parts(plan.copies, index, len(file.header), part_size, files, bands)
        for index, file in enumerate(plan.files)
        if not ledger.is_whole(index)
    )
    turns = deque(islice(waiting, together))
    while turns:
        parts = turns.popleft()
        part = next((part for part in parts if not ledger.has_part(part.file, part.number)), None)
        if part:
            yield part
            turns.append(parts)
        else:
            turns.extend(islice(waiting, 1))


class PartPutter:
    """Puts parts, from several threads: begins an upload at the first part of a file, and completes a stream when its
    last part is put.
    """

    def __init__(self, plan: Plan, store: TargetStore, ledger: StoreLedger, counter: WorkCounter) -> None:
        self._plan = plan
        self._store = store
        self._ledger = ledger
        self._counter = counter
        self._beginning = [Lock() for _ in plan.files]

    def put(self, part: Part, files: OpenFiles, buffers: PartBuffers) -> None:
        """Fills a part and puts it. Raises Refused."""
        file, store = self._plan.files[part.file], self._store
        filled = fill_part(part, file.header, files, buffers)
        buffers.clock.begin(WRITING)
        upload = self._find_upload(part.file)
        try:
            etag = store.put_part(file.name, upload, part.number, filled.data)
        except NoSuchUploadError:
            raise refuse_lost_upload(store, file.name) from None
        done = DonePart(part.file, upload, part.number, etag, part.size, filled.records)
        is_whole = self._ledger.add_part(done, filled.inexact)
        self._counter.advance(part.size)
        if store.keeps_parts:
            self._counter.settle(part.size)
        elif is_whole:
            complete_file(self._plan, store, self._ledger, part.file)
            self._counter.settle(file.size)
        buffers.clock.begin(WAITING)

    def _find_upload(self, index: int) -> str:
        """The upload of a file, which is begun if need be."""
        with self._beginning[index]:
            if index not in self._ledger.uploads:
                name = self._plan.files[index].name
                upload = self._store.begin_upload(name)
                try:
                    self._ledger.add_upload(index, upload)
                except BaseException:
                    with suppress(Refused, Stopped):
                        self._store.abort_upload(name, upload)
                    raise
            return self._ledger.uploads[index]


def note_regularly(ledger: StoreLedger, stopped: Event) -> None:
    """Notes every few seconds what is durable, until the work ends."""
    STOP.event = stopped
    begun = noted = time.monotonic()
    with suppress(Stopped):
        while not stopped.wait(LOOK_SECONDS):
            now = time.monotonic()
            if now - noted >= max(FLUSH_SECONDS, (now - begun) / NOTES):
                ledger.flush()
                noted = time.monotonic()
