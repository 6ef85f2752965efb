"""Opens, reads, writes and syncs files on local disks, through the page cache or past it."""

import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from ctypes import c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from reshard.errors import refuse
from reshard.paths import AnyPath
from reshard.storage.c_library import load_c_library
from reshard.storage.file_systems import OVERLAYFS, ZFS, find_kind
from reshard.storage.residency import is_range_cached

RWF_DONTCACHE = 0x80
"""From linux/fs.h; Python has no name for it before 3.15."""

SYNC_FILE_RANGE_WRITE = 2

SYNC_FILE_RANGE_WAIT = 1 | SYNC_FILE_RANGE_WRITE | 4
"""Writes a range and waits for it: before, write, after."""

PAGE = mmap.PAGESIZE
"""In bytes. O_DIRECT reads whole pages; a disk that wants larger blocks is found out by a probe."""

SMALLEST_UNCACHED = 1 << 20
"""In bytes. A smaller write past the cache would read the pages at its ends back from the disk."""

SMALLEST_WRITEBACK = 64 << 10
"""In bytes. The disk gets a smaller write together with others, when the file is synced."""

SMALLEST_PREFETCH = 2 << 20
"""In bytes. Reading ahead does for a smaller read."""

PREFETCH_STEP = 128 << 10
"""In bytes. Of a larger request the kernel may leave the rest undone: it brings no more than one reading ahead, or one
command to the disk, would; 128 KiB are the usual least of these."""

WRITTEN_BY_SYNC = (OVERLAYFS, ZFS)
"""Those whose files have no pages of their own to begin to write, or to wait for: only a sync writes."""

UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class Ways:
    """How a job reads and writes its files."""

    read: str
    """`cached`: through the page cache; `direct` (O_DIRECT) or `uncached` (RWF_DONTCACHE): past it; `dropped`: through
    it, and dropped from it right afterwards. What is in the page cache already is read from there, in all ways."""
    write: str
    """The same, without `direct`."""
    device: int | None = None
    """The file system that allows this way to read; a file of another one is read in its own. None: all do."""


CACHED = Ways("cached", "cached")


def open_descriptor(stack: ExitStack, path: Path, flags: int) -> int:
    """Opens a file and returns its descriptor, which is closed with the stack. A new file has the mode of the umask."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    stack.callback(os.close, descriptor)
    return descriptor


def allocate_aligned(size: int) -> memoryview:
    """Allocates `size` bytes of zeros that begin on a page boundary, as O_DIRECT needs."""
    return memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


@dataclass(frozen=True, slots=True)
class ReadableFile:
    """A file open for reading, and how to read it."""

    name: str
    """In messages."""
    way: str
    """As in `Ways`."""
    descriptor: int
    direct: int | None = None
    """A descriptor with O_DIRECT, for the way `direct`."""

    def is_read_from_cache(self, offset: int, size: int) -> bool:
        """Whether `size` bytes at a byte offset are read through the page cache: all if the way says so, else those
        that are in it.
        """
        return self.way == CACHED.read or is_range_cached(self.descriptor, offset, size)


@contextmanager
def refuse_unreadable(path: AnyPath) -> Iterator[None]:
    """A context in which a file is opened or looked at. Raises Refused where the system does not let us."""
    try:
        yield
    except OSError as error:
        is_full = error.errno == errno.EMFILE
        remedy = "allow more open files, as `ulimit -n 4096` does" if is_full else "may you read it? is its disk sound?"
        raise refuse("cannot-read", str(error.filename or path), str(error.strerror), "to read it", remedy) from None


def probe_way_to_read(path: Path) -> str:
    """The best way past the page cache to read a file: `direct`, `uncached` or, where it allows neither, `dropped`.
    Raises OSError.
    """
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


def open_to_read(stack: ExitStack, path: Path, ways: Ways, name: str = "") -> ReadableFile:
    """Opens a file for reading; the stack closes it. `name` is its name in messages, if not that of the path.

    The way is the one of the job. A file that does not allow it, such as a link to another disk, is read in its own.
    """
    descriptor = open_descriptor(stack, path, os.O_RDONLY)
    way, direct = ways.read, None
    if ways.device is not None and ways.device != os.fstat(descriptor).st_dev:
        way = probe_way_to_read(path)
    if way == "direct":
        try:
            direct = open_descriptor(stack, path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            way = "dropped"
    return ReadableFile(name or path.name, way, descriptor, direct)


def advise_random_reads(files: Iterable[ReadableFile]) -> None:
    """Tells the kernel that files are read at scattered offsets, so that it does not read ahead."""
    for file in files:
        advise(file.descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def advise(descriptor: int, offset: int, size: int, advice: int) -> None:
    """Advises the kernel on a byte range of a file. A system that takes no advice does the same work without it."""
    with suppress(OSError):
        os.posix_fadvise(descriptor, offset, size, advice)


def prefetch_range(file: ReadableFile, offset: int, size: int) -> None:
    """Asks the kernel to bring `size` bytes at a byte offset into the page cache, if they are to be read through it and
    are not there. All of it before the first byte is read, which keeps a disk busy: reading ahead often asks for 128
    KiB, and then waits until these are read.
    """
    if file.way in ("cached", "dropped") and not is_range_cached(file.descriptor, offset, size):
        for start in range(offset, offset + size, PREFETCH_STEP):
            advise(file.descriptor, start, min(PREFETCH_STEP, offset + size - start), os.POSIX_FADV_WILLNEED)


def read_local_range(file: ReadableFile, offset: int, size: int, buffer: memoryview) -> memoryview:
    """Reads `size` bytes at a byte offset of a file and returns them as a part of `buffer`, which must be two pages
    larger. Raises Refused if the file ends before, or cannot be read.
    """
    is_cached = file.is_read_from_cache(offset, size)
    if size >= SMALLEST_PREFETCH:
        prefetch_range(file, offset, size)
    # O_DIRECT reads whole pages only: it also reads the rest of the first page and of the last.
    direct = None if is_cached else file.direct
    is_direct, descriptor = direct is not None, file.descriptor if direct is None else direct
    first = offset - offset % PAGE if is_direct else offset
    skip = offset - first
    length = -(-(skip + size) // PAGE) * PAGE if is_direct else size
    flags = RWF_DONTCACHE if file.way == "uncached" else 0
    done = 0
    while done < skip + size:
        try:
            count = os.preadv(descriptor, [buffer[done:length]], first + done, flags)
        except OSError as error:
            found = f"{error.strerror} at byte {first + done:,}"
            raise refuse("cannot-read", file.name, found, "to read it", "is its disk sound?") from None
        # O_DIRECT goes on at a page boundary only: a page that was read in part is read again.
        again = count % PAGE if is_direct and done + count < skip + size else 0
        if count == again:
            found = f"it ends at byte {first + done + count:,}"
            raise refuse("source-changed", file.name, found, f"byte {offset + size:,}, as when it was planned")
        done += count - again
    if file.way == "dropped" and not is_cached:
        advise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
    return buffer[skip : skip + size]


def write_range(descriptor: int, data: memoryview, offset: int, ways: Ways) -> None:
    """Writes all of `data` at a byte offset of a file, in as many system calls as needed."""
    flags = RWF_DONTCACHE if ways.write == "uncached" and len(data) >= SMALLEST_UNCACHED else 0
    done = 0
    while done < len(data):
        done += os.pwritev(descriptor, [data[done:]], offset + done, flags)
    if not flags and len(data) >= SMALLEST_WRITEBACK:
        # Now, and not when the kernel has gathered a tenth of the memory: the disk would idle until then. The last page
        # is left out where it is not full: the next write goes on in it, and could have to wait for the disk.
        begin, end = offset - offset % PAGE, (offset + len(data)) // PAGE * PAGE
        start_writeback(descriptor, begin, end - begin)


def start_writeback(descriptor: int, offset: int, size: int) -> bool:
    """Asks the kernel to begin to write a byte range to the disk, and waits only where the disk's queue is full.

    Returns whether the system does so: some lack the call, or forbid it in a container. Then a sync has to do all, and
    that also finds whatever went wrong here. Raises OSError for another error.
    """
    code = sync_range(descriptor, offset, size, SYNC_FILE_RANGE_WRITE)
    if code and code not in (*UNSUPPORTED, errno.EPERM, errno.EINTR, errno.ESPIPE):
        raise OSError(code, os.strerror(code))
    return not code


def is_written_by_sync(descriptor: int) -> bool:
    """Whether a file lies where only a sync writes, though `start_writeback` says nothing."""
    return find_kind(descriptor) in WRITTEN_BY_SYNC


def wait_for_range(descriptor: int, offset: int, size: int) -> None:
    """Waits until a byte range has been written to the disk. It is durable only after a sync, which is then short.
    Only for a file of which `start_writeback` said that the system can do so.

    Raises OSError for a write that failed, with any number that the disk or a file system on a network gave it: the
    kernel reports it to one call only, so that a sync would no more see it.
    """
    if code := sync_range(descriptor, offset, size, SYNC_FILE_RANGE_WAIT):
        raise OSError(code, os.strerror(code))


def sync_range(descriptor: int, offset: int, size: int, what: int) -> int:
    """Calls `sync_file_range`; returns the number of its error, or 0."""
    arguments = (ctypes.c_int64(offset), ctypes.c_int64(size), ctypes.c_uint(what))
    failed = load_c_library().sync_file_range(ctypes.c_int(descriptor), *arguments)
    return ctypes.get_errno() if failed else 0


def reserve_blocks(descriptor: int, size: int) -> None:
    """Sets the size of a file in bytes and reserves its disk blocks: else a full disk would show only after hours.

    Does without the blocks where the file system cannot reserve them. Not by `os.posix_fallocate`: glibc would then
    write into every block, which takes hours, and fails where the file exists already.
    """
    arguments = (ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size))
    while load_c_library().fallocate(*arguments):
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            break
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, size)


def make_durable(descriptors: Sequence[int], ways: Ways) -> None:
    """Waits until files are on the disk. A job that writes past the page cache also drops them from it."""
    for descriptor in descriptors:
        os.fsync(descriptor)
        drop_from_cache(descriptor, ways)


def drop_from_cache(descriptor: int, ways: Ways) -> None:
    """For a job that writes past the page cache: drops from it the pages of a file that are on the disk already."""
    if ways.write != "cached":
        advise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class ByteArray(Protocol):
    """A contiguous array of bytes, such as one of numpy's: by a type of our own, so that numpy need not be loaded."""

    @property
    def nbytes(self) -> int:
        """The size in bytes."""

    @property
    def ctypes(self) -> Any:
        """Has the address as `data`."""


def has_equal_bytes(one: ByteArray, other: ByteArray) -> bool:
    """Whether two arrays of the same size have the same bytes.

    By memcmp: twice as fast as numpy here, needs no array of booleans, and runs without the interpreter's lock.
    """
    return not load_c_library().memcmp(c_void_p(one.ctypes.data), c_void_p(other.ctypes.data), c_size_t(one.nbytes))


def write_durable(path: Path, content: bytes) -> None:
    """Writes a small file and waits until it is on the disk."""
    with ExitStack() as stack:
        descriptor = open_descriptor(stack, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
        write_range(descriptor, memoryview(content), 0, CACHED)
        os.fsync(descriptor)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Removes files of a folder, if they exist."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Waits until the file names in a folder are on the disk; where a file system knows no sync of a folder, it does
    without.
    """
    with ExitStack() as stack:
        try:
            os.fsync(open_descriptor(stack, folder, os.O_RDONLY | os.O_DIRECTORY))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise


def open_local_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError for anything else: a pipe or a device may never end, or never
    begin.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.ESPIPE
        raise OSError(number, "Is a directory" if number == errno.EISDIR else "Is no regular file", str(path))
    return os.fdopen(descriptor, "rb")
