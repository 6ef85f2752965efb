"""Boxes of a matrix and the blocks that they touch: pieces of a box, and what the blocks have for each."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pair = tuple[int, int]
"""Rows and columns."""
Box = tuple[slice, slice]
"""Rows and columns of a piece."""


def require_fit(shape: Pair, scales: NDArray[Any], block: Pair, phase: Pair, out: NDArray[Any]) -> None:
    """A lookup clips what it is given: wrong shapes would give wrong values."""
    expected = touched(shape, block, phase)
    if scales.shape != expected or out.shape != shape or not (0 <= phase[0] < block[0] and 0 <= phase[1] < block[1]):
        raise ValueError(f"a box {shape} at {phase} of {block} touches {expected}: {scales.shape} for {out.shape}")


def touched(shape: Pair, block: Pair, phase: Pair) -> Pair:
    """How many blocks a box touches."""
    return -(-(shape[0] + phase[0]) // block[0]), -(-(shape[1] + phase[1]) // block[1])


def bands(shape: Pair, most: int) -> Iterator[slice]:
    """Rows by rows, at most so many elements, but one row at least."""
    height = max(1, most // max(1, shape[1]))
    for row in range(0, shape[0], height):
        yield slice(row, min(row + height, shape[0]))


def tiles(
    shape: Pair, of_groups: NDArray[Any], group: Pair, phase: Pair, most: int
) -> Iterator[tuple[Box, NDArray[Any]]]:
    """Pieces of a box of at most so many elements, each with what `of_groups` has for it, until the next is asked for.

    That is spread over the elements, but one row or column will do where all rows or columns have the same.
    """
    for columns in _chunks(shape[1], group[1], phase[1], most):
        left, right = (columns.start + phase[1]) // group[1], (columns.stop - 1 + phase[1]) // group[1]
        skip, width = columns.start + phase[1] - left * group[1], columns.stop - columns.start
        here, room = of_groups[:, left : right + 1], np.empty(0, of_groups.dtype)
        for rows in bands((shape[0], width), most):
            lines = (np.arange(rows.start, rows.stop) + phase[0]) // group[0]
            spread = here[lines[:1] if lines[0] == lines[-1] else lines]
            if right > left:
                if len(room) < len(spread):
                    room = np.empty((len(spread), right - left + 1, group[1]), of_groups.dtype)
                np.copyto(room[: len(spread)], spread[:, :, None])
                spread = room[: len(spread)].reshape(len(spread), -1)[:, skip : skip + width]
            yield (rows, columns), spread


def _chunks(columns: int, group: int, phase: int, most: int) -> Iterator[slice]:
    """Columns by columns, at most so many: within one group, if the groups are wide for that, else across them."""
    step = group if group * 2 > min(columns, most) else columns
    for start in range(-phase if step == group else 0, columns, step):
        for piece in bands((min(start + step, columns) - max(start, 0), 1), most):
            yield slice(max(start, 0) + piece.start, max(start, 0) + piece.stop)


def areas(shape: Pair, block: Pair, phase: Pair, most: int) -> Iterator[tuple[Box, Box, Pair]]:
    """Pieces of a box of at most so many blocks: its blocks, its elements, and its phase."""
    lines, width = touched(shape, block, phase)
    height = max(1, most // max(1, width))
    for line in range(0, lines, height):
        rows, top = _stretch(line, height, block[0], phase[0], shape[0])
        for place in range(0, width, most):
            columns, left = _stretch(place, most, block[1], phase[1], shape[1])
            yield (slice(line, line + height), slice(place, place + most)), (rows, columns), (top, left)


def _stretch(first: int, count: int, size: int, phase: int, end: int) -> tuple[slice, int]:
    """Where so many blocks lie along one dimension of a box, and how much of the first is before it."""
    start = first * size - phase
    return slice(max(0, start), min(end, start + count * size)), max(0, -start)
