"""Bands: a source tensor, as a matrix of bytes, in the pieces that are compared at a time. Pure: opens no file.

A band is some whole rows or, where a row is longer than a band, a part of one row: its bytes lie in one piece, in the
source and in every part that a rank holds.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from math import ceil
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from reshard.types import Tensor

BAND_SIZE = 2 << 20
"""In bytes. Small enough to stay in the processor's cache between the read and the comparison."""
SAMPLE_SIZE = 32 << 10
"""In bytes, of a band of a sample: of an expert's weight in DeepSeek-V3, the two ends are half a percent."""


class Part(NamedTuple):
    """A tensor of a rank file, and the box of the source tensor that it should be."""

    rank: int
    tensor: Tensor
    rows: range
    columns: range
    """In bytes of a source row."""


class Whole(NamedTuple):
    """A source tensor as a matrix of bytes, and the parts of it that ranks hold."""

    tensor: Tensor
    width: int
    """In bytes, of a row."""
    parts: list[Part]


class Band(NamedTuple):
    """A box of a source tensor whose bytes lie in one piece: whole rows, or a part of one."""

    whole: Whole
    rows: range
    columns: range


def bands_of(whole: Whole, share: Fraction | None) -> Iterator[Band]:
    """All bands of a tensor one after the other. With a share, small ones: about so many of them, and those that hold
    the two ends of a part.
    """
    size = BAND_SIZE if share is None else SAMPLE_SIZE
    if not whole.tensor.size:
        return
    height, per_row = whole.tensor.size // whole.width, ceil(whole.width / size)
    step = max(1, size // whole.width)
    count = ceil(height / step) * per_row
    numbers: Iterable[int] = range(count)
    if share is not None:
        ends = {number for part in whole.parts for number in end_bands(part, size, step, per_row)}
        numbers = sorted(ends.union(spread(whole.tensor.name, count, share)))
    for number in numbers:
        row, column = number // per_row * step, number % per_row * size
        rows = range(row, min(row + step, height))
        yield Band(whole, rows, range(column, min(column + size, whole.width)))


def end_bands(part: Part, size: int, step: int, per_row: int) -> Iterator[int]:
    """The bands that hold as much of the two ends of a part as a band can hold: for each end one, or two where the part
    begins or ends inside one.
    """
    (top, bottom), (left, right) = ((cut.start, cut.stop - 1) for cut in (part.rows, part.columns))
    if not part.rows or not part.columns:
        return
    if per_row == 1:
        yield from (row // step for row in (top, min(top + step - 1, bottom), max(bottom - step + 1, top), bottom))
    else:
        yield from (top * per_row + column // size for column in (left, min(left + size - 1, right)))
        yield from (bottom * per_row + column // size for column in (max(right - size + 1, left), right))


def spread(name: str, count: int, share: Fraction) -> Iterator[int]:
    """About `share` of the numbers below `count`: one in each stretch of 1 / share, a hash of `name` tells where.

    So it is spread evenly, follows no pattern, and is the same every time.
    """
    for stretch in range(ceil(count * share)):
        first, after = stretch / share // 1, (stretch + 1) / share // 1
        number = first + xxh3_64_intdigest(f"{name} {stretch}".encode(errors="surrogatepass")) % (after - first)
        if number < count:
            yield number


def meet(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def shifted(numbers: range, start: range) -> range:
    """The same numbers, counted from the start of another range."""
    return range(numbers.start - start.start, numbers.stop - start.start)
