"""Chooses how files are read and written: through the page cache, or past it so that a large job does not flush it."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import randrange

from reshard.paths import AnyPath, RemotePath
from reshard.storage.local import (
    CACHED,
    RWF_DONTCACHE,
    UNSUPPORTED,
    Ways,
    open_descriptor,
    probe_way_to_read,
    refuse_unreadable,
)
from reshard.storage.remote_store import THREADS_OF_STORE
from reshard.storage.residency import is_range_cached
from reshard.storage.resources import measure_available_memory

THROUGH_STORE = "remote"
"""How files of a store are read: the word in the place of a way."""

CACHE_PROBES = 64
"""About so many places of a source are probed to tell whether it is in the page cache."""

MEMORY_TO_READ_STORE = 256 << 20
"""In bytes, of all threads together that read a store: there are more of them than for a disk."""

THREADS_OF_DISK = 4
"""Threads that keep a disk busy, however few the processors."""


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


def find_ways_past_cache(path: AnyPath, write: str = CACHED.write) -> Ways:
    """How to read past the page cache, `path` being one of the files, and write in the way `write`. Raises OSError."""
    if isinstance(path, RemotePath):
        return Ways(THROUGH_STORE, write)
    return Ways(probe_way_to_read(path), write, path.stat().st_dev)


def choose_ways_to_read(path: AnyPath, size: int) -> Ways:
    """How to read a job of `size` bytes, `path` being one of its files: past the page cache if the job is larger than
    a third of the free memory. Raises Refused if the file cannot be read.
    """
    if isinstance(path, RemotePath):
        return Ways(THROUGH_STORE, CACHED.write)
    if size <= measure_available_memory() // 3:
        return CACHED
    with refuse_unreadable(path):
        return find_ways_past_cache(path)


def is_mostly_cached(paths: Sequence[AnyPath]) -> bool:
    """Whether most bytes of files are in the page cache, by a look at a few places of each file, more of larger ones.
    Raises Refused if a file cannot be read.
    """
    sizes, here = [], [path for path in paths if isinstance(path, Path)]
    for path in here:
        with refuse_unreadable(path):
            sizes.append(path.stat().st_size)
    total, cached = sum(sizes), 0.0
    for path, size in zip(here, sizes, strict=True):
        found = list(probe_cache(path, size, 1 + CACHE_PROBES * size // max(1, total)))
        cached += size * sum(found) / len(found)
    return cached * 2 > total


def probe_cache(path: Path, size: int, count: int) -> Iterator[bool]:
    """For each of `count` places spread over a file of `size` bytes: whether it is in the page cache. Not the same
    places each time: a look may bring a page into the cache. Raises Refused if the file cannot be read.
    """
    with refuse_unreadable(path), ExitStack() as stack:
        descriptor = open_descriptor(stack, path, os.O_RDONLY)
        for place in range(count):
            chosen = (place * size + randrange(max(1, size))) // count  # noqa: S311
            yield is_range_cached(descriptor, chosen, min(1, size))


def choose_reading_threads(ways: Ways, memory: int) -> int:
    """The number of reading threads, each of which takes `memory` bytes: one a processor, at most 4; as many past the
    page cache, to keep a disk busy; for a store as many as MEMORY_TO_READ_STORE allows.
    """
    if ways.read == THROUGH_STORE:
        return max(1, min(THREADS_OF_STORE, MEMORY_TO_READ_STORE // memory))
    return THREADS_OF_DISK if ways.read != CACHED.read else min(THREADS_OF_DISK, len(os.sched_getaffinity(0)))
