"""Joining: any stretch of a tensor that rank files hold in parts. Opens no file itself."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.casting import Read
from reshard.errors import refuse
from reshard.types import Join, Tensor

Bytes = NDArray[np.uint8]


class Run(NamedTuple):
    """Bytes of a part: where they begin in it, where they go in a stretch, and how many."""

    part: int
    begin: int
    place: int
    size: int


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


def runs_of(sizes: Sequence[int], offset: int, size: int, most: int) -> Iterator[Run]:
    """The runs of parts, one behind the other, that a stretch of them takes."""
    start = 0
    for part, length in enumerate(sizes):
        begin, end = max(offset, start), min(offset + size, start + length)
        for first in range(begin, end, most):
            yield Run(part, first - start, first - offset, min(most, end - first))
        start += length


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
