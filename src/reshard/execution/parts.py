"""Cuts target files into parts, in which a store takes them, and says what is read for each part.

Pure: opens no file. A part is consecutive groups of one target file, and the first part begins with the header. The
groups are those of `make_windows`, so that the records, and with them the manifest, are the same as those of a local
target. A part is put together in memory:

    part of a target file   | header | w w w w w w w w | n | s |
                                       |                 |   |
    reads                     straight into its place;   both by one read, and copied
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from math import ceil
from typing import NamedTuple

import numpy as np

from reshard.errors import Problem
from reshard.execution.windows import WINDOW_SIZE, make_batches
from reshard.planning.copies import Copies, Integers
from reshard.planning.file_layout import TargetFile
from reshard.planning.plan import Plan
from reshard.storage.target_store import UploadLimits

PART_SIZE = 16 << 20
"""In bytes: the least size of a part, if memory and the store allow it."""

JOINED_GAP = 1 << 20
"""In bytes. Gaps up to this size in a source file are read and discarded: cheaper than another request."""

JOINED_READ = 8 << 20
"""In bytes: the largest read that is not straight into its place."""


class PlacedPiece(NamedTuple):
    """`rows` runs of `run` bytes of a source file, `pitch` bytes apart; back to back from byte `place` of a part on."""

    source_file: int
    start: int
    """In bytes from the start of the file."""
    pitch: int
    run: int
    rows: int
    place: int

    @property
    def end(self) -> int:
        """Behind its last byte in the file."""
        return self.start + (self.rows - 1) * self.pitch + self.run


class PartRead(NamedTuple):
    """A byte range of a source file, or of a join or cast, and where its bytes go in a part."""

    source_file: int
    offset: int
    size: int
    pieces: list[PlacedPiece]

    @property
    def is_straight(self) -> bool:
        """Whether its bytes can be read right into their place."""
        return len(self.pieces) == 1 and self.pieces[0].rows == 1


class Part(NamedTuple):
    """A part of a target file."""

    file: int
    """Index of the target file."""
    number: int
    """From 1 on, in its file."""
    offset: int
    """In the file, in bytes."""
    size: int
    """In bytes."""
    is_last: bool
    """Whether it is the last of its file."""
    groups: list[tuple[int, int]]
    """Offset in the file and size of each byte range that has a checksum of its own: all but the header."""
    reads: list[PartRead]


def make_parts(
    copies: Copies, index: int, header: int, part_size: int, files: int, bands: Mapping[int, int]
) -> Iterator[Part]:
    """The parts of one target file, in their order, each of `part_size` bytes or more, but for the last. `header` is
    the size of its header; `files` the number of source files, behind which joins and casts are numbered.
    """
    pieces, edges, firsts = lay_out_groups(copies, index, header, bands)
    begin = 0
    for number in range(1, len(edges)):
        end = min(bisect_left(edges, edges[begin] + part_size), len(edges) - 1)
        offset, size, is_last = edges[begin], edges[end] - edges[begin], end == len(edges) - 1
        first = max(begin, 1)  # behind the header
        groups = [(start, stop - start) for start, stop in pairwise(edges[first : end + 1])]
        reads = plan_reads(pieces, firsts[first - 1 : end], offset, files)
        yield Part(index, number, offset, size, is_last, groups, reads)
        if is_last:
            return
        begin = end


def lay_out_groups(
    copies: Copies, index: int, header: int, bands: Mapping[int, int]
) -> tuple[Integers, list[int], list[int]]:
    """The pieces of one target file in their order there: their columns are those of PlacedPiece, `place` in the file.
    Also the bytes at which the file, its groups and their end begin; and the first piece of each group, and their end.
    """
    chosen = np.flatnonzero(copies.target_file == index)
    mine = Copies(*(getattr(copies, name)[chosen] for name in Copies.__slots__))
    tables, keys = [np.empty((6, 0), np.int64)], [np.empty((3, 0), np.int64)]
    for number, (table, bases, files) in enumerate(make_batches(mine, WINDOW_SIZE, bands)):
        source_file = files[np.searchsorted(bases, table.base)]
        start = table.source_offset - table.base
        tables.append(np.stack([source_file, start, table.pitch, table.run, table.rows, table.target_offset]))
        keys.append(np.stack([np.full(len(start), number), table.window, table.cell]))
    pieces, key = np.concatenate(tables, axis=1), np.concatenate(keys, axis=1)
    order = np.argsort(pieces[5])
    pieces, key = pieces[:, order], key[:, order]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = np.any(np.diff(key, axis=1) != 0, axis=0)
    firsts = np.flatnonzero(is_first)
    end = [int(pieces[5, -1] + pieces[3, -1] * pieces[4, -1])] if len(order) else [header]
    return pieces, [0, *pieces[5, firsts].tolist(), *end], [*firsts.tolist(), len(order)]


def plan_reads(pieces: Integers, bounds: Sequence[int], offset: int, files: int) -> list[PartRead]:
    """The reads of a part that begins at byte `offset` of its file. `bounds` are the first pieces of its groups, and
    the piece behind the last.
    """
    copied: list[PlacedPiece] = []
    reads = []
    for begin, end in pairwise(bounds):
        group = [
            PlacedPiece(file, start, pitch, run, rows, place - offset)
            for file, start, pitch, run, rows, place in zip(
                *(column.tolist() for column in pieces[:, begin:end]), strict=True
            )
        ]
        if group[0].source_file >= files:
            start, stop = min(piece.start for piece in group), max(piece.end for piece in group)
            reads.append(PartRead(group[0].source_file, start, stop - start, group))
        else:
            copied += group
    return [*join_reads(merge_pieces(copied)), *reads]


def merge_pieces(pieces: Sequence[PlacedPiece]) -> list[PlacedPiece]:
    """Merges runs that follow each other in the source and in the target."""
    merged: list[PlacedPiece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (
            last
            and last.rows == piece.rows == 1
            and (last.source_file, last.end, last.place + last.run) == (piece.source_file, piece.start, piece.place)
        ):
            merged[-1] = last._replace(run=last.run + piece.run)
        else:
            merged.append(piece)
    return merged


def join_reads(pieces: Sequence[PlacedPiece]) -> Iterator[PartRead]:
    """Joins pieces of files to reads, over gaps up to JOINED_GAP, each of at most JOINED_READ if it has several."""
    read: PartRead | None = None
    for piece in sorted(pieces):
        if read and read.source_file == piece.source_file and piece.start <= read.offset + read.size + JOINED_GAP:
            size = max(read.size, piece.end - read.offset)
            if size <= JOINED_READ:
                read.pieces.append(piece)
                read = read._replace(size=size)
                continue
        if read:
            yield read
        read = PartRead(piece.source_file, piece.start, piece.end - piece.start, [piece])
    if read:
        yield read


def find_least_part(files: Sequence[TargetFile], limits: UploadLimits) -> int:
    """The size that a part has at least, in bytes, so that no file has too many."""
    return max(limits.least_part, *(ceil(file.size / limits.most_parts) for file in files), 1)


def measure_part_capacity(files: Sequence[TargetFile], part_size: int) -> int:
    """The size that no part exceeds, in bytes: it may have one group more than it needs."""
    return max(part_size + WINDOW_SIZE, *(len(file.header) for file in files), 0)


def check_upload_limits(plan: Plan, limits: UploadLimits) -> Iterator[Problem]:
    """Reports files that are larger than a store takes them."""
    most = min(limits.largest, limits.most_parts * (limits.most_part - WINDOW_SIZE))
    for file in plan.files:
        if file.size > most or len(file.header) > limits.most_part:
            remedy = "more ranks, or of whole files smaller ones (--max-file-size)"
            yield Problem(
                "too-large", file.name, f"{file.size:,} bytes", f"at most {most:,}, as the store says", remedy
            )
