"""Stage 4: Plan -> files. The only writer.

Everything is written under temporary names, made durable, and renamed last: a file under its final name is whole. What
is durable stands in a journal, so that the same command goes on where a crash, a full disk or Ctrl-C has ended it.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reshard import __version__
from reshard.errors import refuse
from reshard.execution.journal import RESTART, Journal, Records, as_records, has_records, open_journal
from reshard.execution.reader import MEMORY_OF_MAKING, MEMORY_PER_JOB, Files
from reshard.execution.windows import WINDOW_SIZE, Window, bands_of, windows
from reshard.execution.writer import Ledger, move_all
from reshard.formats.target_names import JOURNAL, PARTIAL
from reshard.planning.plan import Plan, describe_layout
from reshard.storage.local import (
    CACHED,
    Ways,
    make_durable,
    open_file,
    remove,
    reserve,
    sync_folder,
    write_all,
    write_whole,
)
from reshard.storage.page_cache import is_cached, way_to_read, ways_past_cache
from reshard.storage.resources import available_memory
from reshard.storage.unchanged import open_unchanged
from reshard.types import Advance, Cast, Join

JOBS_PAST_CACHE = 4
"""Threads that keep a disk busy, however few the processors."""


@dataclass(frozen=True, slots=True)
class Others:
    """The files beside the rank files."""

    names: Sequence[str]
    """The last of them gets its final name last of all."""
    contents: Callable[[Records], Mapping[str, bytes]]
    """Given the checksums of all that was written: what is in each, by name."""
    require_same: Callable[[], None]
    """Raises Refused if the target is no longer as it was looked at, before it was locked."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to work. The files that come out do not depend on it."""

    jobs: int | None = None
    """Threads; by default as many as the processors and the disk can use."""
    max_memory: int = 256 << 20
    """In bytes, of all buffers together."""
    cache: str = "auto"
    """`yes`: through the page cache; `no`: past it; `auto`: past it if the job is larger than a third of the memory."""
    restart: bool = False
    """Throw away what an interrupted job has left."""
    allow_inexact: bool = False
    """Round what a cast cannot express to the nearest value, instead of refusing it."""


USUAL = Settings()


@dataclass(frozen=True, slots=True)
class Done:
    """How a job was done."""

    jobs: int
    ways: Ways
    resumed: int
    """In bytes: what an earlier run had done already."""
    inexact: int
    """How many values this run has rounded."""
    copy_seconds: float
    sync_seconds: float


def execute_plan(plan: Plan, target: Path, others: Others, advance: Advance, settings: Settings) -> Done:
    """Writes the files of a plan into the folder `target`, which is made if need be, or goes on where it was ended.

    Raises Refused if the source changes or the file system refuses; then the same call goes on from there. If nothing
    was durable yet, what was written is removed.
    """
    names = [*(file.name for file in plan.files), *others.names]
    require_memory(settings, memory_per_job(plan))
    try:
        target.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            journal = open_journal(stack, target, job_of(plan, others.names, settings), restart=settings.restart)
            try:
                others.require_same()
                done, records = write_ranks(plan, target, journal, advance, settings)
                for name, content in others.contents(records).items():
                    write_whole(target / (name + PARTIAL), content)
            except Exception:
                if not has_records(journal):
                    remove(target, [*(name + PARTIAL for name in names), JOURNAL])
                raise
            finish(target, names)
    except OSError as error:
        subject, found = str(error.filename or target), error.strerror or str(error)
        remedy = "mend it and run the same command again"
        raise refuse("cannot-write", subject, found, "to write the target", remedy) from None
    return done


def job_of(plan: Plan, others: Sequence[str], settings: Settings) -> dict[str, Any]:
    """What makes a job another one: the journal of one is of no use to another."""
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
        "source": [[file.name, file.size, file.header_hash, file.modified] for file in plan.source.files],
        "replicas": "compared" if any(len(part) > 1 for join in plan.source.joins for part in join.parts) else "first",
    }


def write_ranks(
    plan: Plan, target: Path, journal: Journal, advance: Advance, settings: Settings
) -> tuple[Done, Records]:
    """Writes what the journal has not of every rank file, under its temporary name, and makes it durable."""
    ways = choose_ways(plan, target, settings)
    jobs = choose_jobs(ways, settings, memory_per_job(plan))
    found = as_records(journal.records)
    written = {(offset, file) for offset, file, _, _ in found.tolist()}
    started = time.monotonic()
    opened = open_unchanged(plan.source.folder, plan.source.files, ways, again=RESTART)
    with opened as sources, ExitStack() as stack:
        complete = missing_file(plan, found) is None
        targets = open_targets(stack, plan, target, {file for _, file in written}, complete=complete)
        sync_folder(target)
        ledger = Ledger(journal, targets, ways)
        resumed = int(found["size"].sum())
        advance(resumed + sum(len(file.header) for file in plan.files))
        made: list[Join | Cast] = [*plan.source.joins, *plan.casts]
        work = without(windows(plan.copies, bands=bands_of(made, len(sources), WINDOW_SIZE)), written)
        names = [file.name for file in plan.source.files]
        files = Files(sources, names, targets, ways, made, settings.allow_inexact)
        move_all(work, files, ledger, jobs, advance)
        copied = time.monotonic()
        make_durable(targets, ways)
        ledger.flush()
        records = as_records(ledger.records)
        if lacking := missing_file(plan, records):
            raise refuse(
                "damaged-journal", str(journal.path), f"not all of {lacking}", "every byte of it once", RESTART
            )
    return Done(jobs, ways, resumed, ledger.inexact, copied - started, time.monotonic() - copied), records


def choose_ways(plan: Plan, target: Path, settings: Settings) -> Ways:
    """Through the page cache or past it. A job that fits the cache is read past it all the same if the source is not in
    there yet: reading would be held up by making room for bytes that are wanted once.
    """
    moved = plan.size + int(plan.copies.sizes.sum())
    paths = [plan.source.folder / file.name for file in plan.source.files]
    if settings.cache == "no" or (settings.cache == "auto" and moved > available_memory() // 3):
        return ways_past_cache(paths[0], target)
    if settings.cache == "yes" or is_cached(paths):
        return CACHED
    return Ways(way_to_read(paths[0]), CACHED.write)


def memory_per_job(plan: Plan) -> int:
    """In bytes."""
    return MEMORY_PER_JOB + (MEMORY_OF_MAKING if plan.casts or plan.source.joins else 0)


def choose_jobs(ways: Ways, settings: Settings, memory: int) -> int:
    """As many as asked for, else what the processors give or keep a disk busy; never more than fit the memory."""
    usual = min(4, len(os.sched_getaffinity(0))) if ways == CACHED else JOBS_PAST_CACHE
    return min(settings.max_memory // memory, settings.jobs or usual)


def require_memory(settings: Settings, memory: int) -> None:
    """There is enough for one job."""
    if settings.max_memory < memory:
        found, expected = f"{settings.max_memory:,} bytes", f"at least {memory:,} bytes, for one job"
        raise refuse("too-little-memory", "--max-memory", found, expected)


def open_targets(stack: ExitStack, plan: Plan, target: Path, begun: set[int], *, complete: bool) -> list[int]:
    """Every rank file under its temporary name, at its full size and with its header. `begun` are the indices of those
    of which the journal says that something is in them; `complete`, that everything is in all of them.
    """
    targets = []
    for index, file in enumerate(plan.files):
        path = target / (file.name + PARTIAL)
        if complete and not path.exists():
            # A crash between two renames: everything was durable before the first of them. Not to be written to again.
            targets.append(open_file(stack, target / file.name, os.O_RDONLY))
            continue
        size = path.stat().st_size if path.exists() else 0
        if index in begun and size != file.size:
            found, expected = f"{size:,} bytes", f"{file.size:,} bytes, as the journal says"
            raise refuse("damaged-journal", str(path), found, expected, RESTART)
        descriptor = open_file(stack, path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW)
        reserve(descriptor, file.size)
        write_all(descriptor, memoryview(file.header), 0, CACHED)
        targets.append(descriptor)
    return targets


def without(work: Iterable[Window], written: set[tuple[int, int]]) -> Iterator[Window]:
    """The windows, less the groups that were written before."""
    for window in work:
        left = [group for group in window.groups if (group.target_offset, group.target_file) not in written]
        if left:
            yield window._replace(groups=left)


def missing_file(plan: Plan, records: Records) -> str | None:
    """A file of which the records do not speak of every byte behind its header exactly once; None if there is none."""
    for index, file in enumerate(plan.files):
        mine = records[records["file"] == index]
        bounds = [len(file.header), *(mine["offset"] + mine["size"]).tolist()]
        if bounds[:-1] != mine["offset"].tolist() or bounds[-1] != file.size:
            return file.name
    return None


def finish(target: Path, names: Sequence[str]) -> None:
    """Gives every file its final name, then removes the journal. A crash in between leaves all that is needed."""
    for name in names:
        partial = target / (name + PARTIAL)
        if name == names[-1]:  # the manifest: it says that the others have their final names
            sync_folder(target)
        if partial.exists():
            partial.rename(target / name)
    sync_folder(target)
    with suppress(PermissionError):  # we may enter the folder above, but not read it
        sync_folder(target.parent)
    remove(target, [JOURNAL])
    sync_folder(target)
