"""Chooses how files are read and written: through the page cache, or past it so that a large job does not flush it."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import randrange

from reshard.storage.local import CACHED, PAGE, RWF_DONTCACHE, UNSUPPORTED, Ways, allocate_aligned, open_descriptor
from reshard.storage.residency import is_range_cached
from reshard.storage.resources import measure_available_memory

CACHE_PROBES = 64
"""Number of places of a source that are probed to tell whether it is in the page cache."""

MOST_READING_THREADS = 4


def probe_way_to_read(path: Path) -> str:
    """The best way past the page cache to read a file: `direct`, `uncached` or, where it allows neither, `dropped`."""
    buffer = allocate_aligned(PAGE)
    for way, open_flags, read_flags in (("direct", os.O_DIRECT, 0), ("uncached", 0, RWF_DONTCACHE)):
        with ExitStack() as stack:
            try:
                os.preadv(open_descriptor(stack, path, os.O_RDONLY | open_flags), [buffer], 0, read_flags)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
            else:
                return way
    return "dropped"


def probe_way_to_write(folder: Path) -> str:
    """The best way past the page cache to write into a folder: `uncached` or, where it is unsupported, `dropped`."""
    with ExitStack() as stack:
        try:
            # A file without a name: one with a name would stay behind when we are killed here.
            descriptor = open_descriptor(stack, folder, os.O_WRONLY | os.O_TMPFILE)
            os.pwritev(descriptor, [b"probe"], 0, RWF_DONTCACHE)
        except OSError as error:
            if error.errno not in (*UNSUPPORTED, errno.EISDIR):
                raise
            return "dropped"
    return "uncached"


def choose_ways_to_read(path: Path, size: int) -> Ways:
    """How to read a job of `size` bytes, `path` being one of its files: past the page cache if the job is larger than
    a third of the free memory.
    """
    return CACHED if size <= measure_available_memory() // 3 else Ways(probe_way_to_read(path), CACHED.write)


def is_mostly_cached(paths: Sequence[Path]) -> bool:
    """Whether most bytes of files are in the page cache, by a look at a few places of each file."""
    looks = [found for path in paths for found in probe_cache(path, -(-CACHE_PROBES // len(paths)))]
    return sum(looks) * 2 > len(looks)


def probe_cache(path: Path, count: int) -> Iterator[bool]:
    """For each of `count` places spread over a file: whether it is in the page cache. Not the same places each time: a
    look may bring a page into the cache.
    """
    with ExitStack() as stack:
        descriptor = open_descriptor(stack, path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        for place in range(count):
            chosen = (place * size + randrange(max(1, size))) // count  # noqa: S311
            yield is_range_cached(descriptor, chosen, min(1, size))


def choose_reading_threads(ways: Ways) -> int:
    """The number of reading threads: one a processor; more past the page cache, to keep a disk busy; at most 4."""
    return MOST_READING_THREADS if ways.read != "cached" else min(MOST_READING_THREADS, len(os.sched_getaffinity(0)))
