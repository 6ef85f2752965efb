"""Reads a window: from a file, joined from the parts that ranks hold, or computed by a cast."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.streaming import Inputs, produce
from reshard.errors import refuse
from reshard.execution.windows import WINDOW_SIZE, Group, Window
from reshard.sources.rank_files import Run, runs_of
from reshard.storage.local import PAGE, Ways, aligned_buffer, read_window
from reshard.types import Cast, Join, Read, Tensor

Bytes = NDArray[np.uint8]


def produce_join(join: Join, offset: int, out: memoryview, read: Read, most: int) -> None:
    """Writes the bytes of a joined tensor from `offset` on into `out`; at most `most` bytes are read at a time.

    Raises Refused if two ranks hold different bytes of one part.
    """
    data = np.frombuffer(out, np.uint8)
    if join.rows == 1:
        sizes = [part[0].size for part in join.parts]
        for run in runs_of(sizes, offset, len(data), most):
            fetch(join, run, data[run.place : run.place + run.size], read)
        return
    width, widths = join.result.size // join.rows, [part[0].size // join.rows for part in join.parts]
    most_rows = max(1, most // max(widths))
    for row, begin, end, place in lines(offset, len(data), width):
        rows = data[place : place + end - begin].reshape(max((end - begin) // width, 1), -1)
        for first in range(0, len(rows), most_rows):
            some = rows[first : first + most_rows]
            for run in runs_of(widths, begin % width, some.shape[1], most):
                fetch_rows(join, run, row + first, widths[run.part], some, read)


def lines(offset: int, size: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """A stretch as the end of a row, whole rows together, and the beginning of a row: the first row, the bytes from and
    to, and the place of these in the stretch.
    """
    begin, end = offset, offset + size
    while begin < end:
        row, column = divmod(begin, width)
        stop = min(end, (row + 1) * width) if column or end - begin < width else end - (end - begin) % width
        yield row, begin, stop, begin - offset
        begin = stop


def fetch(join: Join, run: Run, out: Bytes, read: Read) -> None:
    """Bytes of a part that lie in one piece."""
    copies = join.parts[run.part]
    out[:] = np.frombuffer(read(copies[0], run.begin, run.size), np.uint8)
    for other in copies[1:]:
        require_equal(out, np.frombuffer(read(other, run.begin, run.size), np.uint8), copies[0], other)


def fetch_rows(join: Join, run: Run, row: int, width: int, out: Bytes, read: Read) -> None:
    """A part's bytes of some rows from `row` on, which it holds one behind the other, `width` bytes each.

    Several rows are read whole, though the end of each be padding; of a single row only the run.
    """
    copies = join.parts[run.part]
    target = out[:, run.place : run.place + run.size]
    begin, size = (run.begin, run.size) if len(out) == 1 else (0, len(out) * width)
    for copy in copies:
        data = np.frombuffer(read(copy, row * width + begin, size), np.uint8).reshape(len(out), -1)
        found = data[:, run.begin - begin : run.begin - begin + run.size]
        if copy is copies[0]:
            target[:] = found
        else:
            require_equal(target, found, copies[0], copy)


def require_equal(one: NDArray[Any], other: NDArray[Any], first: Tensor, second: Tensor) -> None:
    """What several ranks hold is the same in all."""
    if not np.array_equal(one, other):
        found = f"other bytes in rank {second.file} than in rank {first.file}"
        remedy = "--replicas first takes those of the first rank that has it"
        raise refuse("replicas-differ", first.name, found, "the same in every rank", remedy)


MEMORY_PER_JOB = 2 * WINDOW_SIZE + 2 * PAGE
"""In bytes: a buffer to read into and one to gather in."""

SCALES_SIZE = WINDOW_SIZE // 4
"""In bytes: more scales are not read at once for a window of weights."""

MEMORY_OF_MAKING = 2 * (WINDOW_SIZE + SCALES_SIZE) + 2 * PAGE + 8 * 2**20
"""In bytes, for each job that joins or casts: a buffer for what comes out, one for what is joined before it is cast,
one for scales, and what computing takes."""


@dataclass(frozen=True, slots=True)
class Files:
    """The open files of a job."""

    sources: Sequence[int]
    source_names: Sequence[str]
    targets: Sequence[int]
    """None where what is moved goes into memory."""
    ways: Ways
    made: Sequence[Join | Cast]
    """What is numbered from `len(sources)` on is joined or cast."""
    allow_inexact: bool


class Buffers:
    """The memory of one worker."""

    def __init__(self, *, makes: bool, allocate: Callable[[int], memoryview] = aligned_buffer) -> None:
        self.window = allocate(WINDOW_SIZE + 2 * PAGE)
        self.stage = allocate(WINDOW_SIZE)
        self.scales = allocate(SCALES_SIZE + 2 * PAGE) if makes else self.window
        self.joined = allocate(WINDOW_SIZE + SCALES_SIZE) if makes else self.stage
        self.result = allocate(WINDOW_SIZE) if makes else self.stage


def read_or_make(window: Window, files: Files, buffers: Buffers) -> tuple[memoryview, int]:
    """The bytes of a window, in one of the buffers, and how many of its values are not exact."""
    if window.source_file >= len(files.sources):
        return make_window(window, files, buffers)
    source, name = files.sources[window.source_file], files.source_names[window.source_file]
    return read_window(source, window.offset, window.size, buffers.window, files.ways, name), 0


def make_window(window: Window, files: Files, buffers: Buffers) -> tuple[memoryview, int]:
    """The bytes of a window of what is joined or cast, and how many of its values are not exact."""
    made, data = files.made[window.source_file - len(files.sources)], buffers.result[: window.size]
    if isinstance(made, Join):
        produce_join(made, window.offset, data, reader(files, buffers.window), WINDOW_SIZE)
        return data, 0
    weight = reader(files, buffers.window, buffers.joined[:WINDOW_SIZE])
    scale = reader(files, buffers.scales, buffers.joined[WINDOW_SIZE:])
    inexact = produce(made, window.offset, data, Inputs(weight, scale, WINDOW_SIZE, SCALES_SIZE))
    if inexact and not files.allow_inexact:
        found = f"{inexact:,} values of {made.result.dtype} that are not exact"
        expected = "only values that both dtypes have"
        remedy = "--allow-inexact rounds them to the nearest"
        raise refuse("inexact-cast", made.weight.name, found, expected, remedy)
    return data, inexact


def reader(files: Files, buffer: memoryview, joined: memoryview | None = None) -> Read:
    """How to read a part of a tensor into a buffer; one in parts is put together in another, piece by piece."""

    def read(tensor: Tensor, offset: int, size: int) -> memoryview:
        place = tensor.file - len(files.sources)
        if place < 0 or joined is None:
            source, name = files.sources[tensor.file], files.source_names[tensor.file]
            return read_window(source, tensor.offset + offset, size, buffer, files.ways, name)
        join = files.made[place]
        if not isinstance(join, Join):
            raise TypeError(f"{tensor.name} is cast twice")
        produce_join(join, offset, joined[:size], read_part, len(buffer) - 2 * PAGE)
        return joined[:size]

    def read_part(tensor: Tensor, offset: int, size: int) -> memoryview:
        source, name = files.sources[tensor.file], files.source_names[tensor.file]
        return read_window(source, tensor.offset + offset, size, buffer, files.ways, name)

    return read


def gather(group: Group, window: memoryview, stage: memoryview) -> memoryview:
    """The bytes of a group: a part of the window if they lie there in one piece, else copied together in `stage`."""
    if len(group.pieces) == 1 and group.pieces[0].rows == 1:
        start = group.pieces[0].start
        return window[start : start + group.size]
    end = 0
    for start, pitch, run, rows in group.pieces:
        if rows == 1:
            stage[end : end + run] = window[start : start + run]
        else:
            # A run as one element: numpy moves it whole, three times faster than byte by byte at 128 bytes.
            runs = np.ndarray((rows,), f"V{run}", window, start, (pitch,))
            np.copyto(np.ndarray((rows,), f"V{run}", stage, end), runs)
        end += run * rows
    return stage[:end]
