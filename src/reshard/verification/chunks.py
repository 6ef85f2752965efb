"""Splits tensors into the pieces that are compared at once: bands, tiles and margins. Opens no file.

A band is a piece of a source tensor whose bytes are kept, seen as a matrix of bytes: some whole rows or, if a row is
longer than a band, a part of one row. A tile is a piece of a weight that is cast: whole blocks of elements. A margin is
padding: a piece of a part that lies beyond its tensor.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from math import ceil, lcm
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from reshard.formats.safetensors import BITS
from reshard.types import Tensor
from reshard.verification.expected import NVFP4, count_scale_blocks

BAND_SIZE = 2 << 20
"""In bytes. Small enough to stay in the processor's cache between reading and comparing."""

SAMPLE_BAND_SIZE = 32 << 10
"""In bytes, of a band of a sample: the bands at both ends are half a percent of an expert's weight in DeepSeek-V3."""

TILE_SIZE = 2 << 20
"""In elements. Large enough that in almost every model a tile has whole rows, which are read at once."""


class TargetPart(NamedTuple):
    """A target tensor, and the box of the source tensor, or of its cast, that it should hold. With padding the box
    reaches beyond the tensor.
    """

    rank: int
    """With whole files, the running number of the file."""
    tensor: Tensor
    rows: range
    columns: range
    """In bytes of a row."""
    skip: int = 0
    """In bytes: the offset of the box in the target tensor."""
    origin: str = ""
    """Of a fused tensor: the source tensor that the box is of, or whose cast it is of."""


class KeptTensor(NamedTuple):
    """A source tensor whose bytes are kept, as a matrix of bytes, and the parts of it that ranks hold."""

    tensor: Tensor
    width: int
    """Bytes of a row."""
    parts: list[TargetPart]
    fill: bytes = bytes(1)
    """The bytes that padding repeats."""

    @property
    def height(self) -> int:
        """The number of rows."""
        return self.tensor.size // self.width if self.width else 0


class CastWeight(NamedTuple):
    """A source weight that is cast, and the parts of the cast that ranks hold."""

    conversion: str
    """`round`, `dequantize`, `fp4-to-fp8`, `quantize`, `quantize-ue8m0` or `nvfp4`."""
    weight: Tensor
    scale: Tensor | None
    shape: tuple[int, int]
    """In elements: a packed FP4 weight has twice the columns of its I8 tensor."""
    block: tuple[int, int]
    """The block of the scale in elements; if the source has no scale, of the new scale."""
    new_block: tuple[int, int]
    dtypes: tuple[str, str]
    """Of the new weight and of its new scale; the second is empty if there is none."""
    parts: tuple[list[TargetPart], list[TargetPart]]
    """Of the new weight, and of its new scale; columns in bytes. `nvfp4` has the factor in the place of the weight."""


class Tile(NamedTuple):
    """Whole blocks of a weight that is cast."""

    recast: CastWeight
    rows: range
    columns: range
    """In elements."""


class Margin(NamedTuple):
    """Padding: a box of a part that lies beyond its tensor."""

    part: TargetPart
    rows: range
    columns: range
    """Both in the coordinates of the part."""
    fill: bytes


class Band(NamedTuple):
    """A box of a source tensor whose bytes lie in one piece: whole rows, or a part of one."""

    whole: KeptTensor
    rows: range
    columns: range


def split_into_bands(whole: KeptTensor, share: Fraction | None) -> Iterator[Band]:
    """Splits a tensor into bands, in order. With a share, a fraction: small bands, about this share of them, and those
    at both ends of each part.
    """
    size = BAND_SIZE if share is None else SAMPLE_BAND_SIZE
    if not whole.tensor.size:
        return
    height, per_row = whole.height, ceil(whole.width / size)
    step = max(1, size // whole.width)
    count = ceil(height / step) * per_row
    numbers: Iterable[int] = range(count)
    if share is not None:
        ends = {number for part in whole.parts for number in find_end_bands(part, size, step, per_row)}
        numbers = sorted(ends.union(sample_evenly(whole.tensor.name, count, share)))
    for number in numbers:
        row, column = number // per_row * step, number % per_row * size
        rows = range(row, min(row + step, height))
        yield Band(whole, rows, range(column, min(column + size, whole.width)))


def find_end_bands(part: TargetPart, size: int, step: int, per_row: int) -> Iterator[int]:
    """The numbers of the bands at both ends of a part: one at each end, or two if the part begins or ends inside a
    band.
    """
    (top, bottom), (left, right) = ((cut.start, cut.stop - 1) for cut in (part.rows, part.columns))
    if not part.rows or not part.columns:
        return
    if per_row == 1:
        yield from (row // step for row in (top, min(top + step - 1, bottom), max(bottom - step + 1, top), bottom))
    else:
        yield from (top * per_row + column // size for column in (left, min(left + size - 1, right)))
        yield from (bottom * per_row + column // size for column in (max(right - size + 1, left), right))


def split_into_cast_tiles(recast: CastWeight, share: Fraction | None) -> Iterator[Tile]:
    """Splits a weight into tiles, in order. With a share, a fraction: small tiles, about this share of them, and those
    at both ends of each part. A tile is at least a block.
    """
    size = TILE_SIZE if share is None else SAMPLE_BAND_SIZE
    if 0 in recast.shape:
        return
    rows, columns = recast.shape
    least = lcm(recast.block[0], recast.new_block[0]), lcm(recast.block[1], recast.new_block[1])
    wide = max(1, size // min(least[0], rows) // least[1]) * least[1]
    step = max(1, size // min(wide, columns) // least[0]) * least[0], wide
    per_row = ceil(columns / step[1])
    count = ceil(rows / step[0]) * per_row
    numbers: Iterable[int] = range(count)
    if share is not None:
        width = BITS[recast.dtypes[0]] // 8
        ends = {
            row // step[0] * per_row + column // width // step[1]
            for part in recast.parts[0]
            for row, column in ((part.rows.start, part.columns.start), (part.rows.stop - 1, part.columns.stop - 1))
            if row < rows and column // width < columns
        }
        ends |= {count - 1} if recast.conversion == NVFP4 else set()
        numbers = sorted(ends.union(sample_evenly(recast.weight.name, count, share)))
    for number in numbers:
        row, column = number // per_row * step[0], number % per_row * step[1]
        yield Tile(recast, range(row, min(row + step[0], rows)), range(column, min(column + step[1], columns)))


def split_kept_padding(whole: KeptTensor, share: Fraction | None) -> Iterator[Margin]:
    for part in whole.parts:
        yield from split_padding(part, whole.height, whole.width, whole.fill, share)


def split_cast_padding(recast: CastWeight, ones: bytes, share: Fraction | None) -> Iterator[Margin]:
    """Splits the padding of a cast weight and of its scale: zeros beyond the weight, ones beyond the scale."""
    shapes = recast.shape, count_scale_blocks(recast.shape, recast.new_block)
    for parts, shape, dtype, fill in zip(recast.parts, shapes, recast.dtypes, (bytes(1), ones), strict=True):
        for part in parts:
            yield from split_padding(part, shape[0], shape[1] * BITS[dtype] // 8, fill, share)


def split_padding(part: TargetPart, height: int, width: int, fill: bytes, share: Fraction | None) -> Iterator[Margin]:
    """Splits what a part holds right of a matrix of bytes, and below it, into margins. With a share: some of them."""
    size = BAND_SIZE if share is None else SAMPLE_BAND_SIZE
    rows, columns = part.rows, part.columns
    right = intersect_ranges(rows, range(height)), range(max(columns.start, width), columns.stop)
    below = range(max(rows.start, height), rows.stop), columns
    pieces = [
        Margin(part, range(row, min(row + step, box[0].stop)), range(column, min(column + size, box[1].stop)), fill)
        for box in (right, below)
        if box[0] and box[1]
        for step in [max(1, size // len(box[1]) // len(fill) * len(fill))]
        for row in range(box[0].start, box[0].stop, step)
        for column in range(box[1].start, box[1].stop, size)
    ]
    if share is not None and pieces:
        chosen = {0, len(pieces) - 1, *sample_evenly(f"{part.tensor.name} margin", len(pieces), share)}
        pieces = [pieces[number] for number in sorted(chosen)]
    yield from pieces


def sample_evenly(name: str, count: int, share: Fraction) -> Iterator[int]:
    """About `share` of the numbers below `count`: one of each 1 / share numbers, chosen by a hash of `name`.

    So the sample is even, follows no pattern, and is the same every time.
    """
    for index in range(ceil(count * share)):
        first, after = index / share // 1, (index + 1) / share // 1
        number = first + xxh3_64_intdigest(f"{name} {index}".encode(errors="surrogatepass")) % (after - first)
        if number < count:
            yield number


def intersect_ranges(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def shift_range(numbers: range, start: range) -> range:
    """The numbers, counted from the start of another range."""
    return range(numbers.start - start.start, numbers.stop - start.start)


def make_relative_slice(numbers: range, start: range) -> slice:
    """Makes the slice of a range, counted from the start of another."""
    return slice(numbers.start - start.start, numbers.stop - start.start)
