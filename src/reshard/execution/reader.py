"""Reads a window: from a file, joined from parts in several files, or computed by a cast."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from reshard.casts.shapes import takes_strips
from reshard.casts.streaming import compute_cast
from reshard.casts.strips import StripStore
from reshard.casts.tensor_boxes import CastInputs
from reshard.casts.unpacking import STRIP_MEMORY
from reshard.errors import refuse
from reshard.execution.joins import PartReader, read_join
from reshard.execution.times import ARRANGING, COMPUTING, READING, ActivityClock, make_thread_clock
from reshard.execution.windows import WINDOW_SIZE, Group, Piece, Window
from reshard.storage.local import PAGE, Ways, allocate_aligned
from reshard.storage.opened import OpenFile, read_range
from reshard.types import Cast, Join, Tensor

MEMORY_PER_THREAD = 2 * WINDOW_SIZE + 2 * PAGE
"""In bytes: a buffer for a window and one to gather groups in."""

SCALES_SIZE = WINDOW_SIZE // 4
"""In bytes: at most so much of a block scale is read at once."""

MEMORY_TO_COMPUTE = 2 * (WINDOW_SIZE + SCALES_SIZE) + 2 * PAGE + 8 * 2**20
"""In bytes, in addition, for each job that joins or casts: a buffer for results, one for tensors joined before they are
cast, one for scales, and the memory of the kernels."""


def measure_memory_to_compute(joins: Sequence[Join], casts: Sequence[Cast]) -> int:
    """Measures the memory of a job for joins and casts, in bytes; 0 without any."""
    return (MEMORY_TO_COMPUTE if joins or casts else 0) + any(map(takes_strips, casts)) * STRIP_MEMORY


@dataclass(frozen=True, slots=True)
class OpenFiles:
    """The open files of a job, and its joins and casts."""

    sources: Sequence[OpenFile]
    targets: Sequence[int]
    """Descriptors; empty where tensors are loaded into memory."""
    ways: Ways
    made: Sequence[Join | Cast]
    """The joins and casts that have the file numbers from `len(sources)` on."""
    allow_inexact: bool
    levels: int
    """The buffers for joins of joins that a worker needs: see `count_join_levels`."""
    strips: StripStore = field(default_factory=StripStore)
    powers: dict[int, int] = field(default_factory=dict)
    """The factors of NVFP4: see `CastInputs`."""


class WorkerBuffers:
    """The memory of one worker: anonymous pages, or what `allocate` gives, such as pinned memory."""

    def __init__(self, *, makes: bool, levels: int, allocate: Callable[[int], memoryview] = allocate_aligned) -> None:
        self.window = allocate(WINDOW_SIZE + 2 * PAGE)
        self.stage = allocate(WINDOW_SIZE)
        self.scales = allocate(SCALES_SIZE + 2 * PAGE) if makes else self.window
        self.joined = allocate(WINDOW_SIZE + SCALES_SIZE) if makes else self.stage
        self.result = allocate(WINDOW_SIZE) if makes else self.stage
        self.levels = [allocate(WINDOW_SIZE) for _ in range(levels)]
        self.clock = make_thread_clock()


def read_or_compute_window(window: Window, files: OpenFiles, buffers: WorkerBuffers) -> tuple[memoryview, int]:
    """Reads or computes the bytes of a window into one of the buffers; also returns how many values are not exact."""
    if window.source_file >= len(files.sources):
        return compute_window(window, files, buffers)
    buffers.clock.begin(READING)
    return read_range(files.sources[window.source_file], window.offset, window.size, buffers.window), 0


def compute_window(window: Window, files: OpenFiles, buffers: WorkerBuffers) -> tuple[memoryview, int]:
    """Joins or casts the bytes of a window; also returns how many values are not exact. Raises Refused."""
    data = buffers.result[: window.size]
    return data, compute_range(window.source_file, window.offset, data, files, buffers)


def compute_range(number: int, offset: int, out: memoryview, files: OpenFiles, buffers: WorkerBuffers) -> int:
    """Joins or casts bytes from byte `offset` on into `out`; `number` is that of the join or cast. Returns how many
    values are not exact.

    Raises Refused for values that are not exact, unless they are allowed.
    """
    made = files.made[number - len(files.sources)]
    buffers.clock.begin(ARRANGING if isinstance(made, Join) else COMPUTING)
    if isinstance(made, Join):
        read_join(made, offset, out, make_reader(files, buffers.window, buffers.levels, buffers.clock))
        return 0
    inexact = compute_cast(made, offset, out, make_cast_inputs(files, buffers))
    if inexact and not files.allow_inexact:
        found = f"{inexact:,} values of {made.result.dtype} that are not exact"
        expected = "only values that both dtypes have"
        remedy = "--allow-inexact rounds them to the nearest"
        raise refuse("inexact-cast", made.weight.name, found, expected, remedy)
    return inexact


def make_cast_inputs(files: OpenFiles, buffers: WorkerBuffers) -> CastInputs:
    """How a worker reads weights and scales. Each has buffers of its own: both are needed at the same time."""
    weight = make_reader(files, buffers.window, [buffers.joined[:WINDOW_SIZE], *buffers.levels], buffers.clock)
    scale = make_reader(files, buffers.scales, [buffers.joined[WINDOW_SIZE:], *buffers.levels], buffers.clock)
    return CastInputs(weight.read, scale.read, WINDOW_SIZE, SCALES_SIZE, files.strips, files.powers)


def make_reader(files: OpenFiles, buffer: memoryview, joined: Sequence[memoryview], clock: ActivityClock) -> PartReader:
    """Makes a reader of tensors, through `buffer`; those in joins are assembled in the first of `joined`."""

    def read(tensor: Tensor, offset: int, size: int) -> memoryview:
        before = clock.begin(READING)
        data = read_range(files.sources[tensor.file], tensor.offset + offset, size, buffer)
        clock.begin(before)
        return data

    return PartReader(read, [file.name for file in files.sources], files.made, len(buffer) - 2 * PAGE, joined)


def gather_group(group: Group, window: memoryview, stage: memoryview) -> memoryview:
    """The bytes of a group: a part of the window where they are contiguous, else gathered in `stage`."""
    if len(group.pieces) == 1 and group.pieces[0].rows == 1:
        start = group.pieces[0].start
        return window[start : start + group.size]
    end = 0
    for piece in group.pieces:
        gather_piece(piece, window, stage, end)
        end += piece.run * piece.rows
    return stage[:end]


def gather_piece(piece: Piece, window: memoryview, out: memoryview, place: int) -> None:
    """Copies the runs of a piece out of a window, back to back from byte `place` of `out` on."""
    start, pitch, run, rows = piece
    if rows == 1:
        out[place : place + run] = window[start : start + run]
    else:
        # A run as one element: numpy copies it whole, at 128 bytes three times faster than byte by byte.
        runs = np.ndarray((rows,), f"V{run}", window, start, (pitch,))
        np.copyto(np.ndarray((rows,), f"V{run}", out, place), runs)
