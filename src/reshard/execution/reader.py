"""Reads a window: from a file, joined from shards of rank files, or computed by a cast."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.streaming import CastInputs, Read, compute_cast
from reshard.errors import refuse
from reshard.execution.windows import WINDOW_SIZE, Group, Window
from reshard.sources.rank_files import PartRange, cut_part_ranges
from reshard.storage.local import PAGE, ReadableFile, Ways, allocate_aligned, read_range
from reshard.types import Cast, Join, Tensor

ByteRows = NDArray[np.uint8]


def read_join(join: Join, offset: int, out: memoryview, read: Read, most: int) -> None:
    """Writes the bytes of a joined tensor from byte `offset` on into `out`; reads at most `most` bytes at a time.

    Raises Refused if replicas of a shard differ.
    """
    data = np.frombuffer(out, np.uint8)
    if join.rows == 1:
        sizes = [part[0].size for part in join.parts]
        for run in cut_part_ranges(sizes, offset, len(data), most):
            read_run(join, run, data[run.place : run.place + run.size], read)
        return
    width, widths = join.result.size // join.rows, [part[0].size // join.rows for part in join.parts]
    most_rows = max(1, most // max(widths))
    for row, begin, end, place in split_range_by_rows(offset, len(data), width):
        rows = data[place : place + end - begin].reshape(max((end - begin) // width, 1), -1)
        for first in range(0, len(rows), most_rows):
            some = rows[first : first + most_rows]
            for run in cut_part_ranges(widths, begin % width, some.shape[1], most):
                read_run_of_rows(join, run, row + first, widths[run.part], some, read)


def split_range_by_rows(offset: int, size: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Splits a byte range into the end of a row, whole rows, and the beginning of a row.

    Gives for each its first row, its begin and end in bytes of the tensor, and its begin in the range. `width` is the
    size of a row in bytes.
    """
    begin, end = offset, offset + size
    while begin < end:
        row, column = divmod(begin, width)
        stop = min(end, (row + 1) * width) if column or end - begin < width else end - (end - begin) % width
        yield row, begin, stop, begin - offset
        begin = stop


def read_run(join: Join, run: PartRange, out: ByteRows, read: Read) -> None:
    """Reads a contiguous run of a shard into `out`, and compares its replicas."""
    copies = join.parts[run.part]
    out[:] = np.frombuffer(read(copies[0], run.begin, run.size), np.uint8)
    for other in copies[1:]:
        require_equal_replicas(out, np.frombuffer(read(other, run.begin, run.size), np.uint8), copies[0], other)


def read_run_of_rows(join: Join, run: PartRange, row: int, width: int, out: ByteRows, read: Read) -> None:
    """Reads a run of each of the rows of a shard from `row` on into `out`, and compares its replicas.

    `width` is the size of a row of the shard in bytes. Several rows are read whole, even if each ends with padding; of
    a single row only the run is read.
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
            require_equal_replicas(target, found, copies[0], copy)


def require_equal_replicas(one: NDArray[Any], other: NDArray[Any], first: Tensor, second: Tensor) -> None:
    """Raises Refused if two replicas of a shard have different bytes."""
    if not np.array_equal(one, other):
        found = f"other bytes in rank {second.file} than in rank {first.file}"
        remedy = "reshard verify tells which rank is damaged; --replicas first takes the first rank that has it"
        raise refuse("replicas-differ", first.name, found, "the same in every rank", remedy)


MEMORY_PER_THREAD = 2 * WINDOW_SIZE + 2 * PAGE
"""In bytes: a buffer for a window and one to gather groups in."""

SCALES_SIZE = WINDOW_SIZE // 4
"""In bytes: at most so much of a block scale is read at once."""

MEMORY_TO_COMPUTE = 2 * (WINDOW_SIZE + SCALES_SIZE) + 2 * PAGE + 8 * 2**20
"""In bytes, in addition, for each job that joins or casts: a buffer for results, one for tensors joined before they are
cast, one for scales, and the memory of the kernels."""


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """The open files of a job, and its joins and casts."""

    sources: Sequence[ReadableFile]
    targets: Sequence[int]
    """Descriptors; empty where tensors are loaded into memory."""
    ways: Ways
    made: Sequence[Join | Cast]
    """The joins and casts that have the file numbers from `len(sources)` on."""
    allow_inexact: bool


class WorkerBuffers:
    """The memory of one worker: anonymous pages, or what `allocate` gives, such as pinned memory."""

    def __init__(self, *, makes: bool, allocate: Callable[[int], memoryview] = allocate_aligned) -> None:
        self.window = allocate(WINDOW_SIZE + 2 * PAGE)
        self.stage = allocate(WINDOW_SIZE)
        self.scales = allocate(SCALES_SIZE + 2 * PAGE) if makes else self.window
        self.joined = allocate(WINDOW_SIZE + SCALES_SIZE) if makes else self.stage
        self.result = allocate(WINDOW_SIZE) if makes else self.stage


def read_or_compute_window(window: Window, files: OpenFiles, buffers: WorkerBuffers) -> tuple[memoryview, int]:
    """Reads or computes the bytes of a window into one of the buffers; also returns how many values are not exact."""
    if window.source_file >= len(files.sources):
        return compute_window(window, files, buffers)
    return read_range(files.sources[window.source_file], window.offset, window.size, buffers.window), 0


def compute_window(window: Window, files: OpenFiles, buffers: WorkerBuffers) -> tuple[memoryview, int]:
    """Joins or casts the bytes of a window; also returns how many values are not exact.

    Raises Refused for values that are not exact, unless they are allowed.
    """
    made, data = files.made[window.source_file - len(files.sources)], buffers.result[: window.size]
    if isinstance(made, Join):
        read_join(made, window.offset, data, make_reader(files, buffers.window), WINDOW_SIZE)
        return data, 0
    weight = make_reader(files, buffers.window, buffers.joined[:WINDOW_SIZE])
    scale = make_reader(files, buffers.scales, buffers.joined[WINDOW_SIZE:])
    inexact = compute_cast(made, window.offset, data, CastInputs(weight, scale, WINDOW_SIZE, SCALES_SIZE))
    if inexact and not files.allow_inexact:
        found = f"{inexact:,} values of {made.result.dtype} that are not exact"
        expected = "only values that both dtypes have"
        remedy = "--allow-inexact rounds them to the nearest"
        raise refuse("inexact-cast", made.weight.name, found, expected, remedy)
    return data, inexact


def make_reader(files: OpenFiles, buffer: memoryview, joined: memoryview | None = None) -> Read:
    """A function that reads byte ranges of tensors into `buffer`. Tensors in shards are assembled in `joined`."""

    def read(tensor: Tensor, offset: int, size: int) -> memoryview:
        place = tensor.file - len(files.sources)
        if place < 0 or joined is None:
            return read_range(files.sources[tensor.file], tensor.offset + offset, size, buffer)
        join = files.made[place]
        if not isinstance(join, Join):
            raise TypeError(f"{tensor.name} is cast twice")
        read_join(join, offset, joined[:size], read_part, len(buffer) - 2 * PAGE)
        return joined[:size]

    def read_part(tensor: Tensor, offset: int, size: int) -> memoryview:
        return read_range(files.sources[tensor.file], tensor.offset + offset, size, buffer)

    return read


def gather_group(group: Group, window: memoryview, stage: memoryview) -> memoryview:
    """The bytes of a group: a part of the window where they are contiguous, else gathered in `stage`."""
    if len(group.pieces) == 1 and group.pieces[0].rows == 1:
        start = group.pieces[0].start
        return window[start : start + group.size]
    end = 0
    for start, pitch, run, rows in group.pieces:
        if rows == 1:
            stage[end : end + run] = window[start : start + run]
        else:
            # A run as one element: numpy copies it whole, at 128 bytes three times faster than byte by byte.
            runs = np.ndarray((rows,), f"V{run}", window, start, (pitch,))
            np.copyto(np.ndarray((rows,), f"V{run}", stage, end), runs)
        end += run * rows
    return stage[:end]
