"""The comparing of stage 5: source tensors against what the rank files hold of them, in fixed memory, by a few threads.

A band of a source tensor is read once, and every part of a rank that meets it is compared with it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from ctypes import c_size_t, c_void_p
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from reshard.bands import BAND_SIZE, Band, Part, Whole, bands_of, meet, shifted
from reshard.disk import PAGE, Ways, advise_random, aligned_buffer, c_library, open_source, read_window
from reshard.parallel import in_threads, reading_threads
from reshard.types import Advance

Bytes = NDArray[np.uint8]


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

    Raises Refused where a file cannot be read or has become
    shorter.
    """
    in_order = sorted(wholes, key=lambda whole: (whole.tensor.file, whole.tensor.offset))
    comparison = Comparison()

    def bands() -> Iterator[Band]:
        for whole in in_order:
            yield from bands_of(whole, share)
            if share is not None:  # what the sample leaves out is done as well
                advance(sum(part.tensor.size for part in whole.parts))

    with ExitStack() as stack:
        opened = [open_all(stack, side, is_random=share is not None) for side in (source, target)]

        def make_worker() -> Callable[[Band], None]:
            buffers = Buffers()

            def work(band: Band) -> None:
                size = compare_band(band, opened[0], opened[1], buffers, comparison)
                if share is None:
                    advance(size)

            return work

        in_threads(bands(), make_worker, max(reading_threads(source.ways), reading_threads(target.ways)))
    return comparison


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
        place = place_in(part, rows, columns)
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


def place_in(part: Part, rows: range, columns: range) -> int:
    """Where a rank holds a box of the source that a band meets, in bytes from the start of its part. There it lies in
    one piece: it is whole rows of the part, or there is one row only.
    """
    return (rows.start - part.rows.start) * len(part.columns) + columns.start - part.columns.start


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
