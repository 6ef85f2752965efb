"""Tells whether bytes of a file are in the page cache, without reading them."""

import ctypes
import os
from mmap import PAGESIZE
from random import randrange

from reshard.storage.c_library import load_c_library

CACHESTAT = 451
"""The number of the system call; Linux has it from 6.5 on."""

TRIED = 3
"""So many places of a range are tried where the system does not count."""


class PageRange(ctypes.Structure):
    """A byte range, as `cachestat` takes it."""

    _fields_ = (("offset", ctypes.c_uint64), ("size", ctypes.c_uint64))


class PageCounts(ctypes.Structure):
    """Numbers of pages, as `cachestat` gives them."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


def is_range_cached(descriptor: int, offset: int, size: int) -> bool:
    """Whether `size` bytes of a file are in the page cache, all of them. `descriptor` is one without O_DIRECT."""
    if not size:
        return True
    wanted, counts = PageRange(offset, size), PageCounts()
    arguments = ctypes.c_uint(descriptor), ctypes.byref(wanted), ctypes.byref(counts), ctypes.c_uint(0)
    if load_c_library().syscall(ctypes.c_long(CACHESTAT), *arguments):
        # By chance: to try a place may bring its page into the cache, where the next look would find it.
        return all(is_byte_cached(descriptor, offset + randrange(size)) for _ in range(TRIED))  # noqa: S311
    return int(counts.cached) == (offset + size - 1) // PAGESIZE - offset // PAGESIZE + 1


def is_byte_cached(descriptor: int, offset: int) -> bool:
    """The same of one byte, for kernels that cannot count, or do so only for those who may write the file."""
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT))
    except OSError:  # not there, or the file system cannot tell
        return False
