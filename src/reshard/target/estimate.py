"""Estimates roughly how long a plan takes, by reading some of its source and writing a file that nobody else sees."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from time import monotonic

from reshard.errors import refuse
from reshard.paths import RemotePath
from reshard.planning.plan import Plan
from reshard.planning.reads import measure_reads
from reshard.storage.local import PAGE, allocate_aligned
from reshard.storage.opened import open_file, read_range
from reshard.storage.page_cache import find_ways_past_cache
from reshard.storage.remote_store import THREADS_OF_STORE
from reshard.storage.resources import map_in_threads
from reshard.target.room import find_nearest_folder
from reshard.target.side_files import measure_lacking_sides
from reshard.text import format_size
from reshard.types import File

SECONDS = 1.0
"""So long each of the two is measured."""

BLOCK = 16 << 20
"""In bytes: so much is read, or written and synced, at once."""

STORE_BLOCK = 2 << 20
"""In bytes: so much is asked of a store at once."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The room in a target and the rates of its disks, measured now."""

    folder: Path
    """The target, or the nearest folder above it that exists."""
    free: int
    """Of its file system, in bytes."""
    needed: int
    """By all files that are to be written but the manifest, in bytes."""
    read_rate: float
    """In bytes a second; 0 if nothing is left to be read."""
    write_rate: float
    """In bytes a second; 0 if nothing is left to be written."""
    measured: float
    """So long the rates were measured, in seconds."""
    seconds: float
    """Of the whole job."""


def estimate_job(plan: Plan, target: Path) -> Estimate:
    """Measures the room in a target, and for two seconds the rates of reading and writing. Leaves nothing behind.

    Raises Refused if the source cannot be read, or if no file can be made in the target.
    """
    folder = find_nearest_folder(target)
    free = shutil.disk_usage(folder).free
    if not plan.size:
        return Estimate(folder, free, 0, 0, 0, 0, 0)
    beside = measure_lacking_sides(plan, target)
    needed = plan.size + beside
    started = monotonic()
    read_rate = measure_read_rate(plan)
    write_rate = measure_write_rate(folder, min(needed, free // 4))
    measured = monotonic() - started
    reads = measure_reads(plan.source, plan.casts, plan.copies).size + beside
    times = reads / read_rate, needed / write_rate
    # A disk that is read and written at the same time does one after the other.
    source = plan.source.folder
    is_same_disk = isinstance(source, Path) and source.stat().st_dev == folder.stat().st_dev
    seconds = sum(times) if is_same_disk else max(times)
    return Estimate(folder, free, needed, read_rate, write_rate, measured, seconds)


def measure_read_rate(plan: Plan) -> float:
    """Measures how fast the source is read, in bytes a second: from the page cache what is in it. Raises Refused."""
    files = [file for file in plan.source.files if file.size > file.header_size] or list(plan.source.files)
    if isinstance(plan.source.folder, RemotePath):
        return measure_store_rate(plan.source.folder, files)
    buffer, done, started = allocate_aligned(BLOCK + 2 * PAGE), 0, monotonic()
    with ExitStack() as stack:
        try:
            ways = find_ways_past_cache(plan.source.folder / files[0].name)
            opened = [open_file(stack, plan.source.folder / file.name, ways) for file in files[:SPREAD]]
        except OSError as error:
            raise refuse("cannot-read", str(error.filename), str(error.strerror), "to read the source") from None
        for place, offset, size in list_blocks([file.size for file in files[:SPREAD]]):
            read_range(opened[place], offset, size, buffer)
            done += size
            if monotonic() - started > SECONDS:
                break
    return done / max(monotonic() - started, 1e-6)


def measure_store_rate(folder: RemotePath, files: Sequence[File]) -> float:
    """Measures how fast a store is read, in bytes a second, by as many reads at a time as a job begins with. Raises
    Refused.
    """
    blocks = [*islice(list_blocks([file.size for file in files], STORE_BLOCK), THREADS_OF_STORE)]
    started = monotonic()

    def read(block: tuple[int, int, int]) -> int:
        place, offset, size = block
        path = folder / files[place].name
        path.store.read_into(path.entry, offset, memoryview(bytearray(size)))
        return size

    return sum(map_in_threads(read, blocks, THREADS_OF_STORE)) / max(monotonic() - started, 1e-6)


SPREAD = 16
"""Blocks of at most so many source files are read in turn."""


def list_blocks(sizes: list[int], most: int = BLOCK) -> Iterator[tuple[int, int, int]]:
    """Lists blocks of files in turn: the index of the file, offset and size in bytes, which is at most `most`."""
    for offset in range(0, max(sizes), most):
        yield from ((place, offset, min(most, size - offset)) for place, size in enumerate(sizes) if offset < size)


def measure_write_rate(folder: Path, most: int) -> float:
    """Measures how fast a file of at most `most` bytes reaches the disk of a folder, in bytes a second. The file has no
    name where the file system allows that, and is gone at the end. Raises Refused.
    """
    data = memoryview(os.urandom(min(max(most, 1), BLOCK)))
    done, started = 0, monotonic()
    try:
        with TemporaryFile(dir=folder, prefix=".reshard-", buffering=0) as file:
            while done < max(most, 1) and monotonic() - started < SECONDS:
                done += file.write(data) or 0
                os.fdatasync(file.fileno())
    except OSError as error:
        found = error.strerror or str(error)
        raise refuse("cannot-write", str(folder), found, "to write there for a moment", "another target") from None
    return done / max(monotonic() - started, 1e-6)


def describe_estimate(estimate: Estimate, *, is_cast: bool) -> Iterator[str]:
    """Describes an estimate for people."""
    yield f"{estimate.folder}: {format_size(estimate.free)} free, {format_size(estimate.needed)} needed"
    if estimate.needed:
        rates = f"reads {format_size(int(estimate.read_rate))}/s, writes {format_size(int(estimate.write_rate))}/s"
        rates += f", measured in {estimate.measured:.1f} s" + ("; casts take longer" if is_cast else "")
        yield f"about {format_rough_time(estimate.seconds)} (rough: {rates})"


def format_rough_time(seconds: float) -> str:
    """Formats a time with no more precision than a rough estimate has: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 1:
        return "a second"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
