"""The files of source and target that are compared, and how byte ranges of them are read."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from reshard.paths import AnyPath
from reshard.storage.local import CACHED, PAGE, Ways
from reshard.storage.opened import OpenFile, advise_scattered_reads, read_range
from reshard.storage.page_cache import choose_ways_to_read
from reshard.storage.unchanged import open_unchanged
from reshard.types import Checkpoint, File, Tensor
from reshard.verification.boxes import BoxedTensor, gather_range
from reshard.verification.chunks import intersect_ranges, make_relative_slice
from reshard.verification.reference_casts import TileBytes

MOST_UNUSED = 8
"""Rows that lie apart are read together if at least one of so many bytes is of them: one read is as good as many."""


@dataclass(frozen=True, slots=True)
class ComparedFiles:
    """The files of source or target, and how to read them."""

    folder: AnyPath
    files: Mapping[int, File]
    """By the number that tensors and parts refer to; as they were when their headers were read."""
    ways: Ways
    joined: Mapping[int, Sequence[Tensor]] = field(default_factory=dict)
    """Tensors assembled from shards: by a number that no file has, the shards, back to back."""
    boxed: Mapping[int, BoxedTensor] = field(default_factory=dict)
    """Tensors stored in boxes: by a number that no file has."""


def make_compared_files(
    target: AnyPath, files: Mapping[int, File], source: Checkpoint
) -> tuple[ComparedFiles, ComparedFiles]:
    """The files of the source and of the target, and how to read them. `files` are those of the target, by number."""
    size = sum(file.size for file in (*source.files, *files.values()))
    joins = dict(enumerate(source.joins, len(source.files)))
    # Never the joins of what is stored in boxes: their rows lie apart, and the boxes themselves prove more.
    boxed = {place: BoxedTensor(boxes, joins[place].result.size) for place, boxes in (source.boxes or {}).items()}
    joined = {
        place: [copies[0] for copies in join.parts]
        for place, join in joins.items()
        if place not in boxed and join.rows == 1
    }
    source_side = make_files_to_compare(source.folder, dict(enumerate(source.files)), size)
    return replace(source_side, joined=joined, boxed=boxed), make_files_to_compare(target, files, size)


def make_files_to_compare(folder: AnyPath, files: Mapping[int, File], size: int) -> ComparedFiles:
    paths = [folder / file.name for file in files.values()]
    return ComparedFiles(folder, files, choose_ways_to_read(paths[0], size) if paths else CACHED)


@dataclass(frozen=True, slots=True)
class OpenedFiles:
    """The files of one side, opened."""

    side: ComparedFiles
    readable: Mapping[int, OpenFile]
    """In the order of its files."""

    def read(self, number: int, offset: int, size: int, buffer: memoryview) -> TileBytes:
        """Reads `size` bytes of a file into the buffer. Raises Refused if the file ends before."""
        if number in self.side.joined:
            return self.read_joined(self.side.joined[number], range(offset, offset + size), buffer)
        if number in self.side.boxed:
            return gather_range(self.side.boxed[number], offset, size, partial(self.read_box, buffer))
        return np.frombuffer(read_range(self.readable[number], offset, size, buffer), np.uint8)

    def read_box(self, buffer: memoryview, part: Tensor, offset: int, size: int) -> TileBytes:
        """Reads bytes of a box into the buffer. Raises Refused."""
        return self.read(part.file, part.offset + offset, size, buffer)

    def read_joined(self, shards: Sequence[Tensor], wanted: range, buffer: memoryview) -> TileBytes:
        """Reads a byte range of a tensor assembled from shards, into new memory. Raises Refused."""
        result, start = np.empty(len(wanted), np.uint8), 0
        for shard in shards:
            inner = intersect_ranges(wanted, range(start, start + shard.size))
            if inner:
                data = self.read(shard.file, shard.offset + inner.start - start, len(inner), buffer)
                result[make_relative_slice(inner, wanted)] = data
            start += shard.size
        return result

    def read_rows(self, number: int, offset: int, pitch: int, shape: tuple[int, int], buffer: memoryview) -> TileBytes:
        """Reads a matrix of `shape` (rows, bytes); rows begin `pitch` bytes apart, and are read with what is between
        them if this is not much. Raises Refused.
        """
        rows, size = shape
        whole = (rows - 1) * pitch + size
        if size == pitch or rows == 1:
            return self.read(number, offset, rows * size, buffer).reshape(shape)
        if whole <= len(buffer) - 2 * PAGE:
            data = self.read(number, offset, whole, buffer)
            return np.lib.stride_tricks.as_strided(data, shape, (pitch, 1))
        found = np.empty(shape, np.uint8)
        fitting = 1 + (len(buffer) - 2 * PAGE - size) // pitch
        together = max(1, fitting) if pitch <= MOST_UNUSED * size else 1
        for row in range(0, rows, together):
            some = min(together, rows - row)
            data = self.read(number, offset + row * pitch, (some - 1) * pitch + size, buffer)
            found[row : row + some] = np.lib.stride_tricks.as_strided(data, (some, size), (pitch, 1))
        return found


def open_compared_files(stack: ExitStack, side: ComparedFiles, *, is_random: bool) -> OpenedFiles:
    opened = open_unchanged(side.folder, list(side.files.values()), side.ways, is_source=False)
    readable = stack.enter_context(opened)
    if is_random:
        advise_scattered_reads(readable)
    return OpenedFiles(side, dict(zip(side.files, readable, strict=True)))
