"""The comparing of stage 5: source tensors against what the rank files hold of them, in fixed memory, by a few threads.

A source tensor is looked at as a matrix of bytes and cut into bands, of whole rows or, where a row is longer than a
band, of a part of one row. A band is read once, and every part of a rank that meets it is compared with it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from ctypes import c_size_t, c_void_p
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from reshard.disk import PAGE, Ways, advise_random, aligned_buffer, c_library, open_source, read_window
from reshard.parallel import in_threads, reading_threads
from reshard.types import Advance, Tensor

BAND_SIZE = 2 << 20
"""In bytes. Small enough to stay in the processor's cache between the read and the comparison."""
SAMPLE_SIZE = 32 << 10
"""In bytes, of a band of a sample. Of the smallest of DeepSeek-V3's large weights both ends are then half a percent."""
Bytes = NDArray[np.uint8]


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


@dataclass(slots=True)
class Difference:
    """How many bytes of a tensor of a rank file are wrong, and the first and last of them."""

    count: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Side:
    """The files of one side, by the number that tensors or parts know them by, and how to read them."""

    paths: Mapping[int, Path]
    ways: Ways


@dataclass(frozen=True, slots=True)
class Opened:
    """The same, opened."""

    side: Side
    descriptors: Mapping[int, int]

    def read(self, number: int, offset: int, size: int, buffer: memoryview) -> Bytes:
        """So many bytes of a file, in a part of the buffer. Raises Refused if it ends before."""
        name = str(self.side.paths[number])
        return np.frombuffer(
            read_window(self.descriptors[number], offset, size, buffer, self.side.ways, name), np.uint8
        )


@dataclass(slots=True)
class Comparison:
    """What has been compared so far, by all threads."""

    size: int = 0
    """In bytes of the rank files."""
    differences: dict[tuple[int, str], Difference] = field(default_factory=dict)
    """By the rank and the name of the tensor in its file."""
    lock: Lock = field(default_factory=Lock)


def compare(
    wholes: Iterable[Whole], source: Side, target: Side, advance: Advance, share: Fraction | None = None
) -> Comparison:
    """Compares every part of the source tensors; with a share, about so much of each and its two ends.

    A part that has not the size of its box is left out. Raises Refused where a file cannot be read or has become
    shorter.
    """
    in_order = sorted(map(of_right_size, wholes), key=lambda whole: (whole.tensor.file, whole.tensor.offset))
    bands = (band for whole in in_order for band in bands_of(whole, share, advance))
    comparison = Comparison()
    with ExitStack() as stack:
        opened = [open_all(stack, side, is_random=share is not None) for side in (source, target)]

        def make_worker() -> Callable[[Band], None]:
            buffers = Buffers()

            def work(band: Band) -> None:
                size = compare_band(band, opened[0], opened[1], buffers, comparison)
                if share is None:
                    advance(size)

            return work

        in_threads(bands, make_worker, max(reading_threads(source.ways), reading_threads(target.ways)))
    return comparison


def of_right_size(whole: Whole) -> Whole:
    """Without the parts that have not the size of their box."""
    fitting = [part for part in whole.parts if part.tensor.size == len(part.rows) * len(part.columns)]
    return whole._replace(parts=fitting)


def open_all(stack: ExitStack, side: Side, *, is_random: bool) -> Opened:
    descriptors = {number: open_source(stack, path, side.ways) for number, path in side.paths.items()}
    if is_random:
        advise_random(descriptors.values())
    return Opened(side, descriptors)


class Buffers:
    """What one thread needs, whatever the tensors."""

    def __init__(self) -> None:
        self.source = aligned_buffer(BAND_SIZE + 2 * PAGE)
        self.target = aligned_buffer(BAND_SIZE + 2 * PAGE)
        self.stage = np.empty(BAND_SIZE, np.uint8)


def compare_band(band: Band, source: Opened, target: Opened, buffers: Buffers, comparison: Comparison) -> int:
    """Reads a band once and compares all that ranks hold of it; returns how many bytes of theirs."""
    boxes = [(part, meet(part.rows, band.rows), meet(part.columns, band.columns)) for part in band.whole.parts]
    boxes = [(part, rows, columns) for part, rows, columns in boxes if rows and columns]
    if not boxes:
        return 0
    tensor, shape = band.whole.tensor, (len(band.rows), len(band.columns))
    offset = tensor.offset + band.rows.start * band.whole.width + band.columns.start
    matrix = source.read(tensor.file, offset, shape[0] * shape[1], buffers.source).reshape(shape)
    compared = 0
    for part, rows, columns in boxes:
        wanted = expected_bytes(matrix, shifted(rows, band.rows), shifted(columns, band.columns), buffers.stage)
        # They lie in one piece: these are whole rows of the part, or there is one row only.
        place = (rows.start - part.rows.start) * len(part.columns) + columns.start - part.columns.start
        found = target.read(part.rank, part.tensor.offset + place, len(wanted), buffers.target)
        note_difference(comparison, part, place, found, wanted)
        compared += len(wanted)
    with comparison.lock:
        comparison.size += compared
    return compared


def expected_bytes(source: Bytes, rows: range, columns: range, stage: Bytes) -> Bytes:
    """What a rank should hold of a box of the source: today the bytes themselves, one row behind the other.

    `source` is a band as a matrix of bytes; `stage` takes bytes that do not lie there in one piece. Whatever a rank
    file could hold instead of the source's bytes is to be made here.
    """
    box = source[rows.start : rows.stop, columns.start : columns.stop]
    if box.flags.c_contiguous:
        return box.reshape(-1)
    # A row as one element: numpy moves it whole.
    row = f"V{len(columns)}"
    np.copyto(stage[: box.size].view(row), box.view(row)[:, 0])
    return stage[: box.size]


def note_difference(comparison: Comparison, part: Part, place: int, found: Bytes, wanted: Bytes) -> None:
    """Adds the bytes that differ, from byte `place` of the part on."""
    if is_equal(found, wanted):
        return
    wrong = found != wanted
    count, first = int(np.count_nonzero(wrong)), place + int(wrong.argmax())
    last = place + len(wrong) - 1 - int(wrong[::-1].argmax())
    with comparison.lock:
        known = comparison.differences.setdefault((part.rank, part.tensor.name), Difference(0, first, last))
        known.count += count
        known.first, known.last = min(known.first, first), max(known.last, last)


def is_equal(one: Bytes, other: Bytes) -> bool:
    """By memcmp, twice as fast as numpy here, without its array of truths, and without the interpreter's lock."""
    return not c_library().memcmp(c_void_p(one.ctypes.data), c_void_p(other.ctypes.data), c_size_t(len(one)))


def meet(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def shifted(numbers: range, start: range) -> range:
    """The same numbers, counted from the start of another range."""
    return range(numbers.start - start.start, numbers.stop - start.start)


def bands_of(whole: Whole, share: Fraction | None, advance: Advance) -> Iterator[Band]:
    """All bands of a tensor one after the other; or the bands of a sample, small ones."""
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
        advance(sum(part.tensor.size for part in whole.parts))
    for number in numbers:
        row, column = number // per_row * step, number % per_row * size
        rows = range(row, min(row + step, height))
        yield Band(whole, rows, range(column, min(column + size, whole.width)))


def end_bands(part: Part, size: int, step: int, per_row: int) -> Iterator[int]:
    """The bands that hold the beginning and the end of a part, as much of each as a band holds: where bands do not begin
    with the part, that is two of them.
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
        number = first + xxh3_64_intdigest(f"{name} {stretch}") % (after - first)
        if number < count:
            yield number
