"""The comparing of stage 5: source tensors against what the rank files hold of them, in fixed memory, by a few threads.

A band of a source tensor is read once, and every part of a rank that meets it is compared with it. So is a tile of a
weight of which something else was made, and what should have been made of it is computed once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from threading import Lock

import numpy as np

from reshard.formats.safetensors import BITS
from reshard.storage.local import (
    PAGE,
    Ways,
    advise_random,
    aligned_buffer,
    is_equal,
    read_window,
)
from reshard.storage.page_cache import reading_threads
from reshard.storage.resources import in_threads
from reshard.storage.unchanged import open_unchanged
from reshard.types import Advance, File, Tensor
from reshard.verification.chunks import (
    BAND_SIZE,
    Band,
    Margin,
    Part,
    Recast,
    Tile,
    Whole,
    bands_of,
    meet,
    recast_margins,
    shifted,
    tiles_of,
    whole_margins,
)
from reshard.verification.expected import row_size
from reshard.verification.reference_casts import ONES, Bytes, made_of

Item = Band | Tile | Margin


@dataclass(slots=True)
class Difference:
    """How many bytes of a tensor of a rank file are wrong, and the first and last of them."""

    count: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Side:
    """The files of one side in a folder, by the number that tensors or parts know them by, and how to read them."""

    folder: Path
    files: Mapping[int, File]
    """As they were when their headers were read."""
    ways: Ways
    joined: Mapping[int, Sequence[Tensor]] = field(default_factory=dict)
    """By numbers that no file has: the stretches of files that, one behind the other, are read as a file."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The same, opened."""

    side: Side
    descriptors: Mapping[int, int]
    """In the order of its files."""

    def read(self, number: int, offset: int, size: int, buffer: memoryview) -> Bytes:
        """So many bytes of a file, in a part of the buffer. Raises Refused if it ends before."""
        if number in self.side.joined:
            return self.read_joined(self.side.joined[number], range(offset, offset + size), buffer)
        name = f"{self.side.folder}/{self.side.files[number].name}"
        return np.frombuffer(
            read_window(self.descriptors[number], offset, size, buffer, self.side.ways, name), np.uint8
        )

    def read_joined(self, stretches: Sequence[Tensor], wanted: range, buffer: memoryview) -> Bytes:
        """Bytes of what lies in stretches, in memory of their own. Raises Refused."""
        found, start = np.empty(len(wanted), np.uint8), 0
        for stretch in stretches:
            inner = meet(wanted, range(start, start + stretch.size))
            if inner:
                data = self.read(stretch.file, stretch.offset + inner.start - start, len(inner), buffer)
                found[shift(inner, wanted)] = data
            start += stretch.size
        return found

    def read_rows(self, number: int, offset: int, pitch: int, shape: tuple[int, int], buffer: memoryview) -> Bytes:
        """So many rows of so many bytes, each `pitch` bytes behind the one before. Raises Refused."""
        rows, size = shape
        whole = (rows - 1) * pitch + size
        if size == pitch or rows == 1:
            return self.read(number, offset, rows * size, buffer).reshape(shape)
        if whole <= len(buffer) - 2 * PAGE:
            data = self.read(number, offset, whole, buffer)
            return np.lib.stride_tricks.as_strided(data, shape, (pitch, 1))
        found = np.empty(shape, np.uint8)
        for row in range(rows):
            found[row] = self.read(number, offset + row * pitch, size, buffer)
        return found


@dataclass(slots=True)
class Comparison:
    """What has been compared so far, by all threads."""

    size: int = 0
    """In bytes of the rank files."""
    inexact: int = 0
    """How many values of FP4 have no FP8 under the scale of their block, and are the nearest there is."""
    differences: dict[tuple[int, str], Difference] = field(default_factory=dict)
    """By the rank and the name of the tensor in its file."""
    lock: Lock = field(default_factory=Lock)


def compare(
    things: Iterable[Whole | Recast],
    source: Side,
    target: Side,
    advance: Advance,
    share: Fraction | None = None,
) -> Comparison:
    """Compares every part of the source tensors; with a share, about so much of each and its two ends.

    Raises Refused where a file cannot be read, or is not what it was when its header was read.
    """
    in_order = sorted(things, key=place_of)
    comparison = Comparison()

    def items() -> Iterator[Item]:
        for thing in in_order:
            yield from items_of(thing, share)
            if share is not None:  # what the sample leaves out is done as well
                advance(sum(len(part.rows) * len(part.columns) for part in parts_of(thing)))

    largest = max((largest_read(thing) for thing in in_order if isinstance(thing, Recast)), default=0)
    with ExitStack() as stack:
        opened = [open_all(stack, side, is_random=share is not None) for side in (source, target)]

        def make_worker() -> Callable[[Item], None]:
            work = Work(opened[0], opened[1], Buffers(max(BAND_SIZE, largest)), comparison)

            def do(item: Item) -> None:
                size = work.compare(item)
                with comparison.lock:
                    comparison.size += size
                if share is None:
                    advance(size)

            return do

        in_threads(items(), make_worker, max(reading_threads(source.ways), reading_threads(target.ways)))
    return comparison


def place_of(thing: Whole | Recast) -> tuple[int, int]:
    tensor = thing.tensor if isinstance(thing, Whole) else thing.weight
    return tensor.file, tensor.offset


def parts_of(thing: Whole | Recast) -> Sequence[Part]:
    return thing.parts if isinstance(thing, Whole) else [*thing.parts[0], *thing.parts[1]]


def items_of(thing: Whole | Recast, share: Fraction | None) -> Iterator[Item]:
    if isinstance(thing, Whole):
        yield from bands_of(thing, share)
        yield from whole_margins(thing, share)
    else:
        yield from tiles_of(thing, share)
        yield from recast_margins(thing, ONES.get(thing.dtypes[1], bytes(1)), share)


def largest_read(recast: Recast) -> int:
    """In bytes, of a tile: more than usual where one block is. Of the source, and of what was made of it."""
    bits = max(16, *(BITS[dtype] for dtype in recast.dtypes if dtype))
    return max(
        (len(tile.rows) * len(tile.columns) * bits // 8 for tile in islice(tiles_of(recast, None), 1)), default=0
    )


def open_all(stack: ExitStack, side: Side, *, is_random: bool) -> Opened:
    opened = open_unchanged(side.folder, list(side.files.values()), side.ways, is_source=False)
    descriptors = stack.enter_context(opened)
    if is_random:
        advise_random(descriptors)
    return Opened(side, dict(zip(side.files, descriptors, strict=True)))


class Buffers:
    """What one thread needs, whatever the tensors."""

    def __init__(self, size: int) -> None:
        self.source = aligned_buffer(size + 2 * PAGE)
        self.target = aligned_buffer(size + 2 * PAGE)
        self.stage = np.empty(BAND_SIZE, np.uint8)


@dataclass(frozen=True, slots=True)
class Work:
    """What one thread compares with."""

    source: Opened
    target: Opened
    buffers: Buffers
    comparison: Comparison

    def compare(self, item: Item) -> int:
        """Compares an item with all that ranks hold of it; returns how many bytes of theirs."""
        if isinstance(item, Band):
            return self.compare_band(item)
        if isinstance(item, Tile):
            return self.compare_tile(item)
        size = len(item.rows) * len(item.columns)
        wanted = np.tile(np.frombuffer(item.fill, np.uint8), -(-size // len(item.fill)))[:size]
        return self.compare_part(item.part, item.rows, item.columns, wanted.reshape(len(item.rows), -1))

    def compare_band(self, band: Band) -> int:
        """Reads a band of the source once."""
        boxes = meeting(band.whole.parts, band.rows, band.columns)
        if not boxes:
            return 0
        tensor, shape = band.whole.tensor, (len(band.rows), len(band.columns))
        offset = tensor.offset + band.rows.start * band.whole.width + band.columns.start
        matrix = self.source.read(tensor.file, offset, shape[0] * shape[1], self.buffers.source).reshape(shape)
        compared = 0
        for part, rows, columns in boxes:
            wanted = box_of(matrix, shifted(rows, band.rows), shifted(columns, band.columns), self.buffers.stage)
            compared += self.compare_part(part, rows, columns, wanted.reshape(len(rows), -1))
        return compared

    def compare_tile(self, tile: Tile) -> int:
        """Reads a tile of the source once, with the scales that it has, and makes of it what should be there."""
        recast = tile.recast
        rows, columns = in_units(tile.rows, recast.new_block[0]), in_units(tile.columns, recast.new_block[1])
        places = (tile.rows, sized(tile.columns, recast.dtypes[0])), (rows, sized(columns, recast.dtypes[1]))
        boxes = [meeting(parts, *place) for parts, place in zip(recast.parts, places, strict=True)]
        if not any(boxes):
            return 0
        scale = None
        if recast.scale:
            blocks = in_units(tile.rows, recast.block[0]), in_units(tile.columns, recast.block[1])
            scale = self.source_rows(recast.scale, *blocks, 1).copy()  # the buffer is wanted for the weight
        weight = self.source_rows(recast.weight, tile.rows, tile.columns, 2 if recast.weight.dtype == "I8" else 1)
        made = made_of(recast, weight, scale)
        compared = 0
        for found, (top, left), matrix in zip(boxes, places, (made.weight, made.scale), strict=True):
            for part, inner, across in found:
                wanted = matrix[shift(inner, top), shift(across, left)]
                compared += self.compare_part(part, inner, across, np.ascontiguousarray(wanted))
        if boxes[0]:
            with self.comparison.lock:
                self.comparison.inexact += made.inexact
        return compared

    def source_rows(self, tensor: Tensor, rows: range, columns: range, packed: int) -> Bytes:
        """A box of a tensor of the source as rows of bytes; `packed` numbers are an element."""
        pitch, bits = row_size(tensor.shape, BITS[tensor.dtype]), BITS[tensor.dtype] // packed
        offset = tensor.offset + rows.start * pitch + columns.start * bits // 8
        shape = len(rows), len(columns) * bits // 8
        return self.source.read_rows(tensor.file, offset, pitch, shape, self.buffers.source)

    def compare_part(self, part: Part, rows: range, columns: range, wanted: Bytes) -> int:
        """Compares a box of a part with rows of bytes."""
        pitch = len(part.columns)
        place = (rows.start - part.rows.start) * pitch + columns.start - part.columns.start
        place += part.skip
        offset = part.tensor.offset + place
        found = self.target.read_rows(part.rank, offset, pitch, (len(rows), len(columns)), self.buffers.target)
        note_difference(self.comparison, part, place, np.ascontiguousarray(found), wanted)
        return wanted.size


def meeting(parts: Iterable[Part], rows: range, columns: range) -> list[tuple[Part, range, range]]:
    """The parts that a box meets, with what they have of it."""
    boxes = [(part, meet(part.rows, rows), meet(part.columns, columns)) for part in parts]
    return [(part, inner, across) for part, inner, across in boxes if inner and across]


def in_units(numbers: range, unit: int) -> range:
    """The units that numbers are in, the first of them being a unit's first."""
    return range(numbers.start // unit, -(-numbers.stop // unit))


def sized(columns: range, dtype: str) -> range:
    """Columns of elements in bytes."""
    size = BITS[dtype] // 8 if dtype else 0
    return range(columns.start * size, columns.stop * size)


def shift(numbers: range, start: range) -> slice:
    return slice(numbers.start - start.start, numbers.stop - start.start)


def box_of(source: Bytes, rows: range, columns: range, stage: Bytes) -> Bytes:
    """A box of a band, one row behind the other. `stage` takes bytes that do not lie there in one piece."""
    box = source[rows.start : rows.stop, columns.start : columns.stop]
    if box.flags.c_contiguous:
        return box.reshape(-1)
    # A row as one element: numpy moves it whole.
    row = f"V{len(columns)}"
    np.copyto(stage[: box.size].view(row), box.view(row)[:, 0])
    return stage[: box.size]


def note_difference(comparison: Comparison, part: Part, place: int, found: Bytes, wanted: Bytes) -> None:
    """Adds the bytes that differ, of rows of which the first begins at byte `place` of the part."""
    if is_equal(found, wanted):
        return
    wrong = (found != wanted).reshape(-1)
    ends = int(wrong.argmax()), len(wrong) - 1 - int(wrong[::-1].argmax())
    rows = [divmod(end, found.shape[1]) for end in ends]
    first, last = (place + row * len(part.columns) + column for row, column in rows)
    count = int(np.count_nonzero(wrong))
    with comparison.lock:
        known = comparison.differences.setdefault((part.rank, part.tensor.name), Difference(0, first, last))
        known.count += count
        known.first, known.last = min(known.first, first), max(known.last, last)
