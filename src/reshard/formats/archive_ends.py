"""Both ends of many archives in files of a store, read many at a time before they are needed one by one."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from reshard.formats.torch_archives import HEAD, READ_AHEAD, TAIL
from reshard.paths import AnyPath, RemotePath
from reshard.storage.opened import map_paths

SMALL_GAP = 16 << 10
"""In bytes: two reads with so little between them are one, for a request takes longer than these bytes."""

LARGEST_READ = 1 << 20
"""In bytes: reads are joined up to this size."""

ARCHIVES_AT_ONCE = 4096
"""The files of about so many archives are read ahead: their ends have at most 70 MB."""

ArchivePlace = tuple[int, int]
"""Byte offset and size of an archive in its file."""


class EndRange(NamedTuple):
    """A byte range of a file with ends of archives."""

    path: RemotePath
    begin: int
    end: int


class FetchedEnds:
    """What was read of a file in a store; what was not, it reads when it is asked for."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        self._starts: list[int] = []
        self._pieces: list[bytes] = []

    def add(self, start: int, piece: bytes) -> None:
        """Adds what was read at an offset, behind all that was added before."""
        self._starts.append(start)
        self._pieces.append(piece)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at an offset; fewer at the end of the file. Raises Refused."""
        place = bisect_right(self._starts, offset) - 1
        if place >= 0:
            at, piece = offset - self._starts[place], self._pieces[place]
            if at + size <= len(piece):
                return piece[at : at + size]
        end = min(offset + max(size, READ_AHEAD), self._path.entry.size)
        return fetch_piece(EndRange(self._path, offset, max(offset, end)))[:size]


def fetch_piece(wanted: EndRange) -> bytes:
    """Reads a byte range of a file of a store. Raises Refused."""
    piece = bytearray(wanted.end - wanted.begin)
    wanted.path.store.read_into(wanted.path.entry, wanted.begin, memoryview(piece))
    return bytes(piece)


def fetch_ends(
    folder: AnyPath, archives: Mapping[str, Sequence[ArchivePlace]]
) -> Iterator[tuple[str, FetchedEnds | None]]:
    """The names of files, in their order, each with the ends of its archives; None for a file that is read itself: one
    of this machine, or one that is not there. The archives of a file are in their order in it. Raises Refused.
    """
    for names in split_by_count(archives):
        paths = [path for name in names if isinstance(path := folder / name, RemotePath) and path.is_file()]
        fetched = {str(path): FetchedEnds(path) for path in paths}
        wanted = list(chain.from_iterable(list_end_ranges(path, archives[path.relative_to(folder)]) for path in paths))
        for one, piece in zip(wanted, map_paths(fetch_piece, folder, wanted), strict=True):
            fetched[str(one.path)].add(one.begin, piece)
        yield from ((name, fetched.get(str(folder / name))) for name in names)


def split_by_count(archives: Mapping[str, Sequence[ArchivePlace]]) -> Iterator[list[str]]:
    """Splits names of files so that each list has about as many archives as are read ahead."""
    names, count = list[str](), 0
    for name, places in archives.items():
        names.append(name)
        count += len(places)
        if count >= ARCHIVES_AT_ONCE:
            yield names
            names, count = [], 0
    yield names


def list_end_ranges(path: RemotePath, places: Iterable[ArchivePlace]) -> Iterator[EndRange]:
    """The byte ranges with the ends of the archives of a file, as far as it goes; those that lie close are joined."""
    size, last = path.entry.size, None
    for begin, length in places:
        stop = min(begin + length, size)
        for start, end in ((begin, min(begin + HEAD, stop)), (max(begin, stop - TAIL), stop)):
            if start >= end:
                continue
            if last and last.begin <= start <= last.end + SMALL_GAP and end - last.begin <= LARGEST_READ:
                last = last._replace(end=max(last.end, end))
                continue
            if last:
                yield last
            last = EndRange(path, start, end)
    if last:
        yield last
