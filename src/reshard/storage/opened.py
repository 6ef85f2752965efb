"""Files that are open for reading, on this machine or in a store: looked at from their beginning, or read by ranges."""

import io
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from reshard.paths import AnyPath, Entry, RemotePath
from reshard.storage.local import (
    PAGE,
    ReadableFile,
    Ways,
    advise_random_reads,
    open_local_file,
    open_to_read,
    read_local_range,
)
from reshard.storage.remote_store import HEAD_SIZE, THREADS_OF_STORE
from reshard.storage.resources import map_in_threads

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a store that is read by ranges. Every read is of the version that was listed."""

    name: str
    """In messages."""
    path: RemotePath
    entry: Entry

    def is_read_from_cache(self, _offset: int, _size: int) -> bool:
        """Whether bytes come from the page cache: never. So a window is asked for at once."""
        return False


OpenFile = ReadableFile | RemoteFile
"""A file that is open for reading."""


class RemoteStream(io.RawIOBase):
    """A file of a store as a stream: reads exactly what it is asked for, but for the beginning, which is read once."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__()
        self.path = path
        self.entry = path.entry
        self._place = 0

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def seekable(self) -> bool:
        """Whether it can be read from any offset: always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Moves to a byte offset, and returns it."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.entry.size}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        """The byte offset of the next read."""
        return self._place

    def readinto(self, buffer: Any, /) -> int:
        """Fills a buffer, unless the file ends before. Returns the number of bytes. Raises Refused."""
        data = memoryview(buffer).cast("B")
        data = data[: max(0, self.entry.size - self._place)]
        store, head = self.path.store, self.path.store.get_head(self.entry)
        if not self._place and len(head) < len(data):
            head = store.read_head(self.entry, max(len(data), HEAD_SIZE))
        known = head[self._place : self._place + len(data)]
        data[: len(known)] = known
        if len(known) < len(data):
            store.read_into(self.entry, self._place + len(known), data[len(known) :])
        self._place += len(data)
        return len(data)


def open_regular_file(path: AnyPath) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError for anything else: a pipe or a device may never end, or never
    begin.
    """
    # Without a buffer to speak of: what is read of a store is what was asked for.
    return io.BufferedReader(RemoteStream(path), 1) if isinstance(path, RemotePath) else open_local_file(path)


def measure_open_file(file: BinaryIO) -> tuple[int, int | str]:
    """The size of an open file in bytes, and its version: of a local one the time when it was written to."""
    stream = getattr(file, "raw", None)
    if isinstance(stream, RemoteStream):
        return stream.entry.size, stream.entry.version
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def measure_path(path: AnyPath) -> int:
    """The size of a file in bytes. Raises OSError."""
    return path.entry.size if isinstance(path, RemotePath) else path.stat().st_size


def map_paths(function: Callable[[Item], Result], folder: AnyPath, items: Sequence[Item]) -> list[Result]:
    """The results of a function for what lies in a folder, in order: for one in a store, many at a time. Raises its
    first error.
    """
    if isinstance(folder, RemotePath) and items:
        return map_in_threads(function, items, THREADS_OF_STORE)
    return list(map(function, items))


def open_file(stack: ExitStack, path: AnyPath, ways: Ways, name: str = "") -> OpenFile:
    """Opens a file to read ranges of it; the stack closes it. `name` is its name in messages, if not that of the path.
    Raises OSError.
    """
    if isinstance(path, RemotePath):
        return RemoteFile(name or path.name, path, path.entry)
    return open_to_read(stack, path, ways, name)


def read_range(file: OpenFile, offset: int, size: int, buffer: memoryview) -> memoryview:
    """Reads `size` bytes at a byte offset of a file and returns them as a part of `buffer`, which must be two pages
    larger. Raises Refused if the file ends before, or cannot be read, or has changed.
    """
    if isinstance(file, ReadableFile):
        return read_local_range(file, offset, size, buffer)
    file.path.store.read_into(file.entry, offset, buffer[:size])
    return buffer[:size]


def read_straight(file: OpenFile, offset: int, out: memoryview, buffer: memoryview) -> None:
    """Fills `out` with the bytes of a file from byte `offset` on: without a copy, unless it is read by whole pages.
    `buffer` serves as in `read_range`, of any size. Raises Refused.
    """
    if not (isinstance(file, ReadableFile) and file.direct is not None):
        read_range(file, offset, len(out), out)
        return
    most = len(buffer) - 2 * PAGE
    for begin in range(0, len(out), most):
        size = min(most, len(out) - begin)
        out[begin : begin + size] = read_range(file, offset + begin, size, buffer)


def advise_scattered_reads(files: Iterable[OpenFile]) -> None:
    """Tells the kernel that local files are read at scattered offsets, so that it does not read ahead."""
    advise_random_reads(file for file in files if isinstance(file, ReadableFile))
