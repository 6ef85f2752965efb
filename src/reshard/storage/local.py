"""Files of this machine: read and written through the page cache or past it, made durable, seen to change."""

import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ctypes import c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.errors import Refused, refuse
from reshard.storage.resources import available_memory
from reshard.types import File

RWF_DONTCACHE = 0x80
"""From linux/fs.h; Python has no name for it before 3.15."""

SYNC_FILE_RANGE_WRITE = 2

PAGE = 4096

SMALLEST_UNCACHED = 1 << 20
"""In bytes. A smaller write past the cache would read the pages at its ends back from the disk."""

CACHE_LOOKS = 64
"""So many places of a source tell whether it is in the page cache."""

UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class Ways:
    """How a job reads and writes: `cached`; or past the cache `direct` or `uncached`; or, failing that, `dropped`."""

    read: str
    write: str


CACHED = Ways("cached", "cached")


def open_file(stack: ExitStack, path: Path, flags: int) -> int:
    """A descriptor that is closed with the stack. New files get their mode from the umask."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    stack.callback(os.close, descriptor)
    return descriptor


def aligned_buffer(size: int) -> memoryview:
    """Anonymous memory that begins on a page, as O_DIRECT needs it."""
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def ways_past_cache(source: Path, target: Path) -> Ways:
    """The best ways past the cache that the file of the source and the folder of the target allow, by trying them."""
    return Ways(way_to_read(source), way_to_write(target))


def way_to_read(path: Path) -> str:
    buffer = aligned_buffer(PAGE)
    for way, open_flags, read_flags in (("direct", os.O_DIRECT, 0), ("uncached", 0, RWF_DONTCACHE)):
        with ExitStack() as stack:
            try:
                os.preadv(open_file(stack, path, os.O_RDONLY | open_flags), [buffer], 0, read_flags)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
            else:
                return way
    return "dropped"


def way_to_write(folder: Path) -> str:
    with ExitStack() as stack:
        try:
            # A file without a name: one with a name would stay behind when we are killed here.
            descriptor = open_file(stack, folder, os.O_WRONLY | os.O_TMPFILE)
            os.pwritev(descriptor, [b"probe"], 0, RWF_DONTCACHE)
        except OSError as error:
            if error.errno not in (*UNSUPPORTED, errno.EISDIR):
                raise
            return "dropped"
    return "uncached"


def ways_to_read(path: Path, size: int) -> Ways:
    """How to read a job of so many bytes, `path` being one of its files: past the page cache, if that is more than a
    third of the memory.
    """
    return CACHED if size <= available_memory() // 3 else Ways(way_to_read(path), CACHED.write)


def advise_random(descriptors: Iterable[int]) -> None:
    """Tells the kernel not to read ahead."""
    for descriptor in descriptors:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def open_source(stack: ExitStack, path: Path, ways: Ways) -> int:
    return open_file(stack, path, os.O_RDONLY | (os.O_DIRECT if ways.read == "direct" else 0))


def read_window(descriptor: int, offset: int, size: int, buffer: memoryview, ways: Ways, name: str) -> memoryview:
    """The `size` bytes at an offset, in a part of `buffer`, which is two pages larger than any window.

    Raises Refused if the file, `name` in messages, ends before.
    """
    # O_DIRECT reads whole pages only: those before and behind come along.
    first = offset - offset % PAGE if ways.read == "direct" else offset
    skip = offset - first
    length = -(-(skip + size) // PAGE) * PAGE if ways.read == "direct" else size
    flags = RWF_DONTCACHE if ways.read == "uncached" else 0
    done = 0
    while done < skip + size:
        try:
            count = os.preadv(descriptor, [buffer[done:length]], first + done, flags)
        except OSError as error:
            found = f"{error.strerror} at byte {first + done:,}"
            raise refuse("cannot-read", name, found, "to read it", "is its disk sound?") from None
        # O_DIRECT goes on at a page only; what of it was read is read again.
        again = count % PAGE if ways.read == "direct" and done + count < skip + size else 0
        if count == again:
            found = f"it ends at byte {first + done + count:,}"
            raise refuse("source-changed", name, found, f"byte {offset + size:,}, as when it was planned")
        done += count - again
    if ways.read == "dropped":
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
    return buffer[skip : skip + size]


def write_all(descriptor: int, data: memoryview, offset: int, ways: Ways) -> None:
    """Writes the data at an offset of the file, however many calls it takes."""
    flags = RWF_DONTCACHE if ways.write == "uncached" and len(data) >= SMALLEST_UNCACHED else 0
    done = 0
    while done < len(data):
        done += os.pwritev(descriptor, [data[done:]], offset + done, flags)
    if ways.write == "dropped":
        start_writing(descriptor, offset, len(data))


@cache
def c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def start_writing(descriptor: int, offset: int, size: int) -> None:
    """Asks the kernel to begin with the writing of a range, and does not wait for it."""
    arguments = (ctypes.c_int64(offset), ctypes.c_int64(size), ctypes.c_uint(SYNC_FILE_RANGE_WRITE))
    c_library().sync_file_range(ctypes.c_int(descriptor), *arguments)


def reserve(descriptor: int, size: int) -> None:
    """Gives a file its size, and blocks for all of it: else a full disk would show only after hours.

    Where the file system cannot promise blocks, that cannot be helped. What glibc then does in `os.posix_fallocate`,
    writing into every block, takes hours too, and fails where the file is there already.
    """
    arguments = (ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size))
    while c_library().fallocate(*arguments):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            break
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, size)


def make_durable(descriptors: Sequence[int], ways: Ways) -> None:
    """Waits until the files are on the disk; past the cache, also drops what of them is still in it."""
    for descriptor in descriptors:
        os.fsync(descriptor)
        drop_cached(descriptor, ways)


def drop_cached(descriptor: int, ways: Ways) -> None:
    """Past the cache: gives back what of a file is in it and on the disk already."""
    if ways.write != "cached":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def is_cached(paths: Sequence[Path]) -> bool:
    """Whether most of some files is in the page cache, by a look at a few places of each."""
    looks = [found for path in paths for found in looks_at(path, -(-CACHE_LOOKS // len(paths)))]
    return sum(looks) * 2 > len(looks)


def looks_at(path: Path, count: int) -> Iterator[bool]:
    """Whether each of so many places, spread over a file, is in the page cache; True where the system does not tell."""
    buffer = bytearray(1)
    with ExitStack() as stack:
        descriptor = open_file(stack, path, os.O_RDONLY)
        size = os.fstat(descriptor).st_size
        for place in range(count):
            try:
                os.preadv(descriptor, [buffer], size * (2 * place + 1) // (2 * count), os.RWF_NOWAIT)
            except BlockingIOError:
                yield False
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                yield True
            else:
                yield True


AGAIN = "begin again with the files as they are now"


class Watched(NamedTuple):
    """Open files of a folder."""

    folder: Path
    files: Sequence[File]
    """As they were when their headers were read."""
    descriptors: Sequence[int]


@contextmanager
def unchanged(sides: Iterable[Watched]) -> Iterator[None]:
    """A context to compare files in. Raises Refused if they have changed before it begins or by the time it ends."""
    watched = list(sides)
    require_all_unchanged(watched)
    try:
        yield
    except Refused:
        require_all_unchanged(watched)  # of a file that ends too early, this tells more
        raise
    require_all_unchanged(watched)


def require_all_unchanged(sides: Iterable[Watched]) -> None:
    for side in sides:
        require_unchanged(*side, is_source=False)


def require_unchanged(
    folder: Path, files: Sequence[File], descriptors: Sequence[int], *, is_source: bool = True, again: str = AGAIN
) -> None:
    """Nothing was written to the files of a folder, and each still has its name: what was made of their headers holds
    for what is there. `again` is what can be done if not. Raises Refused.
    """
    for file, descriptor in zip(files, descriptors, strict=True):
        path = folder / file.name
        require_unwritten(path, file, descriptor, is_source=is_source, again=again)
        if not is_named(descriptor, path):
            remedy = f"put it back and run the same command again; or {again}"
            raise changed(path, "removed or replaced", "the file whose header was read", remedy, is_source=is_source)


def require_unwritten(path: Path, file: File, descriptor: int, *, is_source: bool = True, again: str = AGAIN) -> None:
    """Nothing was written to an open file, whatever name it has by now. Raises Refused."""
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
        found, expected = f"{status.st_size:,} bytes, written since its header was read", f"{file.size:,} bytes"
        raise changed(path, found, f"{expected}, unchanged", f"let nobody write to it; {again}", is_source=is_source)


def changed(path: Path, found: str, expected: str, remedy: str, *, is_source: bool) -> Refused:
    kind = "source-changed" if is_source else "file-changed"
    return refuse(kind, str(path), found, expected, remedy)


def is_named(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one that has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_equal(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """By memcmp, twice as fast as numpy here, without its array of truths, and without the interpreter's lock."""
    return not c_library().memcmp(c_void_p(one.ctypes.data), c_void_p(other.ctypes.data), c_size_t(one.size))


def write_whole(path: Path, content: bytes) -> None:
    """A small file, durable."""
    with ExitStack() as stack:
        descriptor = open_file(stack, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
        write_all(descriptor, memoryview(content), 0, CACHED)
        os.fsync(descriptor)


def remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    with ExitStack() as stack:
        os.fsync(open_file(stack, folder, os.O_RDONLY | os.O_DIRECTORY))


MOST_THREADS = 4


def reading_threads(ways: Ways) -> int:
    """How many threads read at a time: as many as processors; past the page cache a disk is kept busy by more."""
    return MOST_THREADS if ways.read != "cached" else min(MOST_THREADS, len(os.sched_getaffinity(0)))


def open_regular(path: Path) -> BinaryIO:
    """A file, to be read. Raises OSError if it is none: a pipe or a device may never end, or never begin."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ESPIPE
        raise OSError(number, "Is a directory" if number == errno.EISDIR else "Is no regular file", str(path))
    return os.fdopen(descriptor, "rb")
