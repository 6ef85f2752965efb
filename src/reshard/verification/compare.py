"""Compares source tensors and their casts with the parts that target files hold, in fixed memory, by a few threads.

A band of a source tensor is read once and compared with every part that overlaps it. A tile of a weight is read and
cast, or unpacked, once and compared in the same way.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from threading import Lock
from typing import Any

import numpy as np

from reshard.formats.safetensors import BITS
from reshard.storage.local import (
    PAGE,
    allocate_aligned,
    has_equal_bytes,
)
from reshard.storage.page_cache import choose_reading_threads
from reshard.storage.resources import run_in_threads
from reshard.types import Advance, Tensor
from reshard.verification.chunks import (
    BAND_SIZE,
    Band,
    CastWeight,
    KeptTensor,
    Margin,
    TargetPart,
    Tile,
    intersect_ranges,
    make_relative_slice,
    shift_range,
    split_cast_padding,
    split_into_bands,
    split_into_cast_tiles,
    split_kept_padding,
)
from reshard.verification.compared_files import ComparedFiles, OpenedFiles, open_compared_files
from reshard.verification.expected import NVFP4
from reshard.verification.nvfp4_scales import compute_nvfp4_tile
from reshard.verification.packed_inputs import measure_largest_tile, read_unpacked_tile
from reshard.verification.reference_casts import SCALE_ONE_BYTES, TileBytes, cast_tile
from reshard.verification.unpacked_weights import (
    UnpackedTile,
    UnpackedWeight,
    find_tile_box,
    split_into_unpacked_tiles,
    split_unpacked_padding,
)

Compared = KeptTensor | CastWeight | UnpackedWeight
"""What is compared as one thing."""

CompareItem = Band | Tile | UnpackedTile | Margin

PartKey = tuple[int, str, str]
"""Rank (or file number) and name of a target tensor; if it is fused, also the source tensor of a part of it."""


def make_part_key(part: TargetPart) -> PartKey:
    """Makes the key under which the differences of a part are counted."""
    return part.rank, part.tensor.name, part.origin


def is_padding(whole: KeptTensor, key: PartKey, place: int) -> bool:
    """Whether a byte of a target tensor lies behind the last row of the source tensor."""
    parts = [part for part in whole.parts if make_part_key(part) == key]
    return any(part.rows.start + (place - part.skip) // len(part.columns) >= whole.height for part in parts)


@dataclass(slots=True)
class ByteDifference:
    """The number of wrong bytes of a target tensor, and the offsets of the first and the last in the tensor."""

    count: int
    first: int
    last: int


@dataclass(slots=True)
class Comparison:
    """The results of all threads so far."""

    size: int = 0
    """Compared bytes of the target."""
    inexact: int = 0
    """The number of FP4 values that were rounded, because FP8 has no equal value under the scale of their block."""
    differences: dict[PartKey, ByteDifference] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """How it is sent to another process: without the lock."""
        return Comparison, (self.size, self.inexact, self.differences)


def compare_parts(
    things: Iterable[Compared],
    source: ComparedFiles,
    target: ComparedFiles,
    advance: Advance,
    share: Fraction | None = None,
) -> Comparison:
    """Compares every part of the source tensors and casts; with a share, about this share of each, and both ends.

    Raises Refused if a file cannot be read, or has changed since its header was read.
    """
    in_order = sorted(things, key=get_source_position)
    comparison = Comparison()

    def items() -> Iterator[CompareItem]:
        for thing in in_order:
            yield from split_into_items(thing, share)
            if share is not None:  # bytes that the sample leaves out count as done
                advance(sum(len(part.rows) * len(part.columns) for part in list_parts(thing)))

    largest = max(map(find_largest_tile, in_order), default=0)
    with ExitStack() as stack:
        opened = [open_compared_files(stack, side, is_random=share is not None) for side in (source, target)]

        def make_worker() -> Callable[[CompareItem], None]:
            work = CompareWorker(opened[0], opened[1], CompareBuffers(max(BAND_SIZE, largest)), comparison)

            def do(item: CompareItem) -> None:
                size = work.compare(item)
                with comparison.lock:
                    comparison.size += size
                if share is None:
                    advance(size)

            return do

        # Of each thread: its three buffers; and of a cast its chunks, the same in one piece, and copies of both sides.
        memory = 2 * max(BAND_SIZE, largest) + BAND_SIZE + 4 * largest
        threads = max(choose_reading_threads(side.ways, memory) for side in (source, target))
        run_in_threads(items(), make_worker, threads)
    return comparison


def get_source_position(thing: Compared) -> tuple[int, int]:
    """The file and the offset of what is read first."""
    tensor = list_source_tensors(thing)[0]
    return tensor.file, tensor.offset


def list_source_tensors(thing: Compared) -> Sequence[Tensor]:
    """Lists the stored tensors that a thing is made of."""
    if isinstance(thing, KeptTensor):
        return [thing.tensor]
    if isinstance(thing, UnpackedWeight):
        return thing.packed.list_inputs()
    return [thing.weight, thing.scale] if thing.scale else [thing.weight]


def list_parts(thing: Compared) -> Sequence[TargetPart]:
    """Lists the parts of a thing, and of its new block scale."""
    return [*thing.parts[0], *thing.parts[1]] if isinstance(thing, CastWeight) else thing.parts


def split_into_items(thing: Compared, share: Fraction | None) -> Iterator[CompareItem]:
    if isinstance(thing, KeptTensor):
        yield from split_into_bands(thing, share)
        yield from split_kept_padding(thing, share)
    elif isinstance(thing, UnpackedWeight):
        yield from split_into_unpacked_tiles(thing, share)
        yield from split_unpacked_padding(thing, share)
    else:
        yield from split_into_cast_tiles(thing, share)
        yield from split_cast_padding(thing, SCALE_ONE_BYTES.get(thing.dtypes[1], bytes(1)), share)


def find_largest_tile(recast: Compared) -> int:
    """The bytes of the largest tile, before or after the cast: more than TILE_SIZE if a single block is. 0 of a tensor
    that is kept.
    """
    if not isinstance(recast, CastWeight):
        return measure_largest_tile(recast) if isinstance(recast, UnpackedWeight) else 0
    bits = max(16, *(BITS[dtype] for dtype in (recast.weight.dtype, *recast.dtypes) if dtype))
    return max(
        (len(tile.rows) * len(tile.columns) * bits // 8 for tile in islice(split_into_cast_tiles(recast, None), 1)),
        default=0,
    )


class CompareBuffers:
    """The buffers of one thread, the same size for all tensors."""

    def __init__(self, size: int) -> None:
        self.source = allocate_aligned(size + 2 * PAGE)
        self.target = allocate_aligned(size + 2 * PAGE)
        self.stage = np.empty(BAND_SIZE, np.uint8)


@dataclass(frozen=True, slots=True)
class CompareWorker:
    """Compares items; one for each thread."""

    source: OpenedFiles
    target: OpenedFiles
    buffers: CompareBuffers
    comparison: Comparison

    def compare(self, item: CompareItem) -> int:
        """Compares an item with every part that overlaps it; returns the number of target bytes compared."""
        if isinstance(item, Band):
            return self.compare_band(item)
        if isinstance(item, Tile):
            return self.compare_tile(item)
        if isinstance(item, UnpackedTile):
            return self.compare_unpacked_tile(item)
        size = len(item.rows) * len(item.columns)
        wanted = np.tile(np.frombuffer(item.fill, np.uint8), -(-size // len(item.fill)))[:size]
        return self.compare_part(item.part, item.rows, item.columns, wanted.reshape(len(item.rows), -1))

    def compare_band(self, band: Band) -> int:
        """Reads a band of the source once and compares every part that overlaps it."""
        boxes = find_overlaps(band.whole.parts, band.rows, band.columns)
        if not boxes:
            return 0
        tensor, shape = band.whole.tensor, (len(band.rows), len(band.columns))
        offset = tensor.offset + band.rows.start * band.whole.width + band.columns.start
        matrix = self.source.read(tensor.file, offset, shape[0] * shape[1], self.buffers.source).reshape(shape)
        compared = 0
        for part, rows, columns in boxes:
            wanted = cut_box(
                matrix, shift_range(rows, band.rows), shift_range(columns, band.columns), self.buffers.stage
            )
            compared += self.compare_part(part, rows, columns, wanted.reshape(len(rows), -1))
        return compared

    def compare_tile(self, tile: Tile) -> int:
        """Reads a tile of the source and its scales once, casts it and compares every part that overlaps it."""
        recast = tile.recast
        rows, columns = (
            find_covered_units(tile.rows, recast.new_block[0]),
            find_covered_units(tile.columns, recast.new_block[1]),
        )
        places = (
            (tile.rows, convert_columns_to_bytes(tile.columns, recast.dtypes[0])),
            (rows, convert_columns_to_bytes(columns, recast.dtypes[1])),
        )
        boxes = [find_overlaps(parts, *place) for parts, place in zip(recast.parts, places, strict=True)]
        if not any(boxes):
            return 0
        scale = None
        if recast.scale:
            blocks = find_covered_units(tile.rows, recast.block[0]), find_covered_units(tile.columns, recast.block[1])
            # Copied: the buffer is needed for the weight.
            scale = self.source_rows(recast.scale, recast.scale.shape[0], *blocks, 1).copy()
        packed = 2 if recast.weight.dtype == "I8" else 1
        weight = self.source_rows(recast.weight, recast.shape[0], tile.rows, tile.columns, packed)
        is_nvfp4 = recast.conversion == NVFP4
        made = (
            compute_nvfp4_tile(weight, scale, self.read_factor(recast))
            if is_nvfp4
            else cast_tile(recast, weight, scale)
        )
        for part in recast.parts[0] if is_nvfp4 and not boxes[0] else ():
            self.compare_part(part, part.rows, part.columns, made.weight)  # counted with the first tile
        compared = 0
        for found, (top, left), matrix in zip(boxes, places, (made.weight, made.scale), strict=True):
            for part, inner, across in found:
                wanted = matrix[make_relative_slice(inner, top), make_relative_slice(across, left)]
                compared += self.compare_part(part, inner, across, np.ascontiguousarray(wanted))
        if boxes[0]:
            with self.comparison.lock:
                self.comparison.inexact += made.inexact
        return compared

    def read_factor(self, recast: CastWeight) -> TileBytes:
        """Reads the factor that the target has of a weight in NVFP4, as bytes [1, 4]. Raises Refused."""
        part = recast.parts[0][0]
        size = part.tensor.size
        return self.target.read_rows(part.rank, part.tensor.offset, size, (1, size), self.buffers.target).copy()

    def compare_unpacked_tile(self, tile: UnpackedTile) -> int:
        """Reads and computes a tile of a packed weight once, and compares every part that overlaps it."""
        place = find_tile_box(tile)
        boxes = find_overlaps(tile.whole.parts, *place)
        if not boxes:
            return 0
        made = read_unpacked_tile(self.source, tile, self.buffers.source).reshape(len(place[0]), -1)
        compared = 0
        for part, inner, across in boxes:
            wanted = made[make_relative_slice(inner, place[0]), make_relative_slice(across, place[1])]
            compared += self.compare_part(part, inner, across, np.ascontiguousarray(wanted))
        return compared

    def source_rows(self, tensor: Tensor, height: int, rows: range, columns: range, packed: int) -> TileBytes:
        """Reads a box of a source tensor of `height` rows as rows of bytes; an element packs `packed` numbers."""
        pitch, bits = tensor.size // height, BITS[tensor.dtype] // packed
        offset = tensor.offset + rows.start * pitch + columns.start * bits // 8
        shape = len(rows), len(columns) * bits // 8
        return self.source.read_rows(tensor.file, offset, pitch, shape, self.buffers.source)

    def compare_part(self, part: TargetPart, rows: range, columns: range, wanted: TileBytes) -> int:
        """Compares a box of a part with the rows of bytes that it should hold."""
        pitch = len(part.columns)
        place = (rows.start - part.rows.start) * pitch + columns.start - part.columns.start
        place += part.skip
        offset = part.tensor.offset + place
        found = self.target.read_rows(part.rank, offset, pitch, (len(rows), len(columns)), self.buffers.target)
        note_difference(self.comparison, part, place, np.ascontiguousarray(found), wanted)
        return wanted.size


def find_overlaps(parts: Iterable[TargetPart], rows: range, columns: range) -> list[tuple[TargetPart, range, range]]:
    """The parts that overlap a box, each with the rows and columns of the overlap."""
    boxes = [(part, intersect_ranges(part.rows, rows), intersect_ranges(part.columns, columns)) for part in parts]
    return [(part, inner, across) for part, inner, across in boxes if inner and across]


def find_covered_units(numbers: range, unit: int) -> range:
    """The units (blocks) that a range covers; the range begins with a unit."""
    return range(numbers.start // unit, -(-numbers.stop // unit))


def convert_columns_to_bytes(columns: range, dtype: str) -> range:
    """Converts a range of columns from elements to bytes."""
    size = BITS[dtype] // 8 if dtype else 0
    return range(columns.start * size, columns.stop * size)


def cut_box(source: TileBytes, rows: range, columns: range, stage: TileBytes) -> TileBytes:
    """A box of a band as contiguous bytes; copied into `stage` if it is not contiguous in the band."""
    box = source[rows.start : rows.stop, columns.start : columns.stop]
    if box.flags.c_contiguous:
        return box.reshape(-1)
    # A row as one element: numpy moves it whole.
    row = f"V{len(columns)}"
    np.copyto(stage[: box.size].view(row), box.view(row)[:, 0])
    return stage[: box.size]


def note_difference(comparison: Comparison, part: TargetPart, place: int, found: TileBytes, wanted: TileBytes) -> None:
    """Adds the bytes that differ to the comparison; the first row begins at byte `place` of the target tensor."""
    if has_equal_bytes(found, wanted):
        return
    wrong = (found != wanted).reshape(-1)
    ends = int(wrong.argmax()), len(wrong) - 1 - int(wrong[::-1].argmax())
    rows = [divmod(end, found.shape[1]) for end in ends]
    first, last = (place + row * len(part.columns) + column for row, column in rows)
    count = int(np.count_nonzero(wrong))
    with comparison.lock:
        known = comparison.differences.setdefault(make_part_key(part), ByteDifference(0, first, last))
        known.count += count
        known.first, known.last = min(known.first, first), max(known.last, last)
