"""Executes a plan: skips what the journal says is durable, writes the rest. The only writer of tensors.

Everything is written under temporary names, made durable, and renamed last: a file with its final name is complete. A
journal records what is durable, so that the same command resumes after a crash, a full disk or Ctrl-C.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

from reshard import __version__
from reshard.casts.strips import StripStore
from reshard.errors import Problem, Refused, refuse
from reshard.execution.finished_files import (
    lock_shares,
    move_finished_files,
    remove_empty_shares,
    remove_finished_files,
    rename_to_final,
)
from reshard.execution.joins import count_join_levels
from reshard.execution.journal import RESTART, Journal, TargetLock, has_records, open_journal
from reshard.execution.reader import MEMORY_PER_THREAD, OpenFiles, measure_memory_to_compute
from reshard.execution.records import Records, WrittenGroups, parse_records
from reshard.execution.side_writer import SideFile, write_side_files
from reshard.execution.times import FINISHING, PREPARING, ActivityClock, RunResult, Stages
from reshard.execution.windows import WINDOW_SIZE, Window, choose_bands, list_in_order, make_windows
from reshard.execution.writer import Jobs, Ledger, add_sizes, move_all
from reshard.formats.target_names import JOURNAL, MANIFEST, PARTIAL
from reshard.paths import RemotePath
from reshard.planning.options import require_whole_number
from reshard.planning.plan import Plan, describe_layout
from reshard.storage.counting import WorkCounter
from reshard.storage.local import (
    CACHED,
    Ways,
    make_durable,
    open_descriptor,
    refuse_unreadable,
    remove_files,
    reserve_blocks,
    sync_folder,
    write_durable,
    write_range,
)
from reshard.storage.page_cache import (
    THREADS_OF_DISK,
    THROUGH_STORE,
    find_ways_past_cache,
    is_mostly_cached,
    probe_way_to_write,
)
from reshard.storage.remote_store import THREADS_OF_STORE
from reshard.storage.resources import measure_available_memory
from reshard.storage.unchanged import open_unchanged
from reshard.types import Cast, Join


@dataclass(frozen=True, slots=True)
class OtherFiles:
    """Side files and manifest of the target."""

    sides: Mapping[str, SideFile]
    """By name."""
    write_manifest: Callable[[Records, Mapping[str, str]], bytes]
    """Writes the content of the manifest from the checksums of everything that was written: of the tensors, and of each
    side file by its name.
    """
    require_same: Callable[[], None]
    """Raises Refused if another run has changed the target after it was read and before it was locked."""
    part: str = ""
    """The name under which the manifest is written once more, where it does not name all ranks."""
    kept: frozenset[str] = frozenset()
    """Names of finished files, which no restart removes."""
    superseded: tuple[str, ...] = ()
    """Names of manifests that are of no use once this one has its final name: it names all that they name."""
    removed: tuple[str, ...] = ()
    """Names of finished files that are removed before anything is written, in this order: the manifests last."""
    moved: Sequence[tuple[str, str]] = ()
    """Finished files of shares, which get their names in the target before anything is written."""
    stored: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Sizes and ETags of finished files of shares in a store, as it told them."""
    samples: Sequence[str] = ()
    """For each source file: a checksum of samples of its data."""


DEFAULT_MEMORY = 256 << 20
"""In bytes, of all buffers together."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Resources and policy of a run."""

    jobs: int | None = None
    """Number of threads; by default as many as the processors and the disk can use."""
    max_memory: int = DEFAULT_MEMORY
    """Of all buffers together, in bytes."""
    cache: str = "auto"
    """`yes`: through the page cache; `no`: past it; `auto`: past it if the job is larger than a third of the memory.
    What is in the cache already is read from there in all cases but `yes`, where all is."""
    restart: bool = False
    """Discard what an interrupted job has left, and begin again."""
    yes: bool = False
    """With `restart`: discard finished files too."""
    allow_inexact: bool = False
    """Round values that a cast cannot express to the nearest, instead of refusing them."""


def check_settings(settings: Settings) -> Iterator[Problem]:
    """Settings that are none."""
    for option, value in (("--jobs", settings.jobs), ("--max-memory", settings.max_memory)):
        if value is not None and require_whole_number(option, value) < 1:
            yield Problem("wrong-option", option, str(value), "1 or more")
    if settings.yes and not settings.restart:
        yield Problem("wrong-option", "--yes", "given", "with --restart, whose question it answers", "leave it out")
    if settings.cache not in ("auto", "yes", "no"):
        yield Problem("wrong-option", "--cache", repr(settings.cache), "auto, yes or no")


def execute_plan(plan: Plan, target: Path, others: OtherFiles, counter: WorkCounter, settings: Settings) -> RunResult:
    """Writes the files of a plan into the folder `target`, which is made if need be; resumes if it was interrupted.

    The whole is counted when every file has its final name. Raises Refused if the source changes or the file system
    fails; the same call then resumes the job. If nothing was durable yet, the files written so far are removed.
    """
    manifests = [name for name in (MANIFEST, others.part) if name]
    names = [*(file.name for file in plan.files), *others.sides, *manifests]
    stages = ActivityClock(len(Stages._fields), PREPARING)
    require_buffer_memory(settings, measure_memory_per_thread(plan))
    try:
        with make_folder(target), ExitStack() as stack:
            job = identify_job(plan, [*others.sides, MANIFEST], settings)
            journal = open_journal(stack, target, job, others.kept, restart=settings.restart)
            shares = stack.enter_context(ExitStack())
            lock_shares(shares, target, others.superseded)
            try:
                others.require_same()
                remove_finished_files(target, others.removed)
                move_finished_files(target, others.moved, journal.lock)
                done, records, checksums = write_partial_files(
                    plan, target, journal, others.sides, counter, settings, stages
                )
                stages.begin(FINISHING)
                manifest = others.write_manifest(records, checksums)
                journal.lock.require_held()
                for name in manifests:
                    write_durable(target / (name + PARTIAL), manifest)
            except (Exception, KeyboardInterrupt) as error:
                if isinstance(error, OSError):  # of a file that another run may have given its final name
                    journal.lock.require_held()
                if not has_records(journal) and journal.lock.is_held():
                    remove_files(target, [*(name + PARTIAL for name in names), JOURNAL])
                raise
            rename_to_final(target, names, journal.lock, others.superseded)
            shares.close()
            remove_empty_shares(target)
        counter.finish()
    except OSError as error:
        raise refuse_unwritable(target, error) from None
    return replace(done, stages=Stages(*stages.read()))


@contextmanager
def make_folder(target: Path) -> Iterator[None]:
    """Makes a folder if need be, and removes it again if the job in it fails and leaves nothing there."""
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # not empty: the next run goes on with what is there
                target.rmdir()
        raise


def refuse_unwritable(target: Path, error: OSError) -> Refused:
    """Makes the refusal of a target that the system does not let us write."""
    subject, found = str(error.filename or target), error.strerror or str(error)
    remedy = "allow more of them, as `ulimit -n 4096` does" if error.errno == errno.EMFILE else "mend it"
    return refuse("cannot-write", subject, found, "to write the target", f"{remedy}, and run the same command again")


def identify_job(plan: Plan, others: Sequence[str], settings: Settings) -> dict[str, Any]:
    """The identity of a job, for its journal: a job with any other value is another job, and cannot resume this one."""
    return {
        "allow_inexact": settings.allow_inexact,
        "reshard": __version__,
        "recipe": plan.recipe.name,
        "recipe_sha256": plan.recipe.text_hash,
        "layout": describe_layout(plan.layout),
        **({"subset": plan.source.subset} if plan.source.subset else {}),
        "sizes": [file.size for file in plan.files],
        "files": [file.name for file in plan.files],
        "others": list(others),
        "window_size": WINDOW_SIZE,
        "source": [[file.name, file.size, file.header_hash, file.version] for file in plan.source.files],
        "replicas": "compared" if any(len(part) > 1 for join in plan.source.joins for part in join.parts) else "first",
    }


def write_partial_files(
    plan: Plan,
    target: Path,
    journal: Journal,
    sides: Mapping[str, SideFile],
    counter: WorkCounter,
    settings: Settings,
    stages: ActivityClock,
) -> tuple[RunResult, Records, dict[str, str]]:
    """Writes side files, and all groups that are not in the journal, into files with temporary names, and makes them
    durable. Returns also the records of all groups, and the checksums of the side files.
    """
    ways = choose_ways(plan, target, settings)
    is_cached = is_mostly_cached([plan.source.folder / file.name for file in plan.source.files])
    mostly = Ways(CACHED.read, ways.write) if is_cached else ways
    levels, memory = count_join_levels(plan.source.joins, len(plan.source.files)), measure_memory_per_thread(plan)
    jobs = choose_threads(settings, memory, ways, keeps_disk_busy=not is_cached or ways != CACHED)
    found = parse_records(journal.records)
    written, resumed = WrittenGroups(found), add_sizes(found)
    complete = find_incomplete_file(plan, found) is None
    del found
    opened = open_unchanged(plan.source.folder, plan.source.files, ways, again=RESTART)
    with opened as sources, ExitStack() as stack:
        targets = open_targets(stack, plan, target, journal.lock, written.files, complete=complete)
        counter.begin(resumed)
        sync_folder(target)
        # First: a fault of one shows before hours of copying.
        checksums = write_side_files(target, sides, counter, journal.lock)
        ledger = Ledger(journal, targets, ways, counter)
        counter.advance(sum(len(file.header) for file in plan.files))
        made: list[Join | Cast] = [*plan.source.joins, *plan.casts]
        bands, in_order = choose_bands(made, len(sources), WINDOW_SIZE), list_in_order(made, len(sources))
        work = skip_written(make_windows(plan.copies, bands=bands, in_order=in_order), written)
        files = OpenFiles(sources, targets, ways, made, settings.allow_inexact, levels, StripStore(jobs.most))
        used, threads = move_all(work, files, ledger, jobs, counter.advance, stages)
        ledger.flush()  # first, for it counts what comes to the disk
        make_durable(targets, ways)
        records = ledger.read_records()
        if lacking := find_incomplete_file(plan, records):
            raise refuse(
                "damaged-journal", str(journal.path), f"not all of {lacking}", "every byte of it once", RESTART
            )
    return RunResult(used, mostly, resumed, ledger.inexact, threads=threads), records, checksums


def choose_ways(plan: Plan, target: Path, settings: Settings) -> Ways:
    """Chooses to read and write through the page cache or past it, by settings and size of the job.

    A job that fits is read through the cache from a cold disk too: the kernel brings a window faster than O_DIRECT does
    (docs/decisions/2026-11-29-page-cache.md).
    """
    is_remote = isinstance(plan.source.folder, RemotePath)
    moved = plan.size + (0 if is_remote else int(plan.copies.sizes.sum()))
    if settings.cache == "yes" or (settings.cache == "auto" and moved <= measure_available_memory() // 3):
        return Ways(THROUGH_STORE, CACHED.write) if is_remote else CACHED
    write, first = probe_way_to_write(target), plan.source.folder / plan.source.files[0].name
    with refuse_unreadable(first):
        return find_ways_past_cache(first, write)


def measure_memory_per_thread(plan: Plan) -> int:
    """The memory of the buffers of a thread, in bytes."""
    levels = count_join_levels(plan.source.joins, len(plan.source.files))
    return MEMORY_PER_THREAD + levels * WINDOW_SIZE + measure_memory_to_compute(plan.source.joins, plan.casts)


def choose_threads(settings: Settings, memory: int, ways: Ways, *, keeps_disk_busy: bool) -> Jobs:
    """The numbers of threads: as asked for; else first as many as processors, at most four, or as keep a disk busy, and
    more on more processors; of a store as many as wait for answers at a time, and more. Limited by memory.
    """
    processors, limit = len(os.sched_getaffinity(0)), settings.max_memory // memory
    first = settings.jobs or (THREADS_OF_DISK if keeps_disk_busy else min(THREADS_OF_DISK, processors))
    most = settings.jobs or max(first, processors)
    if ways.read == THROUGH_STORE and not settings.jobs:
        first, most = THREADS_OF_STORE, max(4 * THREADS_OF_STORE, processors)
    return Jobs(min(first, limit), min(most, limit))


def require_buffer_memory(settings: Settings, memory: int) -> None:
    """Raises Refused if the memory that is allowed is not enough for the buffers of one thread."""
    if settings.max_memory < memory:
        found, expected = f"{settings.max_memory:,} bytes", f"at least {memory:,} bytes, for one job"
        raise refuse("too-little-memory", "--max-memory", found, expected, f"--max-memory {ceil(memory / 2**20)}MiB")


def open_targets(
    stack: ExitStack, plan: Plan, target: Path, lock: TargetLock, begun: set[int], *, complete: bool
) -> list[int]:
    """Opens every target file under its temporary name, sets its full size and writes its header.

    `begun` has the indices of the files with bytes in the journal; `complete` says that the journal has all bytes of
    all files. Raises Refused if a file that was begun has another size than the journal says, or if the lock is no more
    ours when all are open: before a byte is written, for one may be that of another run by now.
    """
    targets, new = list[int](), []
    for index, file in enumerate(plan.files):
        path = target / (file.name + PARTIAL)
        if complete and not path.exists():
            # A crash between two renames: everything was durable before the first of them. Not to be written again.
            targets.append(open_descriptor(stack, target / file.name, os.O_RDONLY))
            continue
        if index in begun and (size := path.stat().st_size if path.exists() else 0) != file.size:
            found, expected = f"{size:,} bytes", f"{file.size:,} bytes, as the journal says"
            raise refuse("damaged-journal", str(path), found, expected, RESTART)
        targets.append(open_descriptor(stack, path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW))
        new.append((targets[-1], file))
    lock.require_held()
    for descriptor, file in new:
        reserve_blocks(descriptor, file.size)
        write_range(descriptor, memoryview(file.header), 0, CACHED)
    return targets


def skip_written(work: Iterable[Window], written: WrittenGroups) -> Iterator[Window]:
    """Leaves out the groups that were written before, and windows without any other groups."""
    for window in work:
        left = [group for group in window.groups if (group.target_file, group.target_offset) not in written]
        if left:
            yield window._replace(groups=left)


def find_incomplete_file(plan: Plan, records: Records) -> str | None:
    """The name of a file whose bytes behind the header are not each recorded exactly once; None if there is none."""
    for index, file in enumerate(plan.files):
        mine = records[records["file"] == index]
        bounds = [len(file.header), *(mine["offset"] + mine["size"]).tolist()]
        if bounds[:-1] != mine["offset"].tolist() or bounds[-1] != file.size:
            return file.name
    return None
