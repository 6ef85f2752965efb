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
    if join.rows == 1 or len(join.parts) == 1:
        sizes = [part[0].size for part in join.parts]
        for run in runs_of(sizes, offset, len(data), most):
            fetch(join, run, data[run.place : run.place + run.size].reshape(1, -1), read)
        return
    width, widths = join.result.size // join.rows, [part[0].size // join.rows for part in join.parts]
    for row, begin, end, place in lines(offset, len(data), width):
        count = (end - begin) // width or 1
        for step in range(0, count, max(1, most // max(widths))):
            rows = range(step, min(count, step + max(1, most // max(widths))))
            for run in runs_of(widths, begin % width, min(end - begin, width), most):
                columns = data[place : place + end - begin].reshape(count, -1)[rows.start : rows.stop]
                fetch_rows(join, run, row + rows.start, widths, columns, read)


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
    out[:] = np.frombuffer(read(copies[0], run.begin, run.size), np.uint8).reshape(out.shape)
    for other in copies[1:]:
        require_equal(out, np.frombuffer(read(other, run.begin, run.size), np.uint8), copies[0], other)


def fetch_rows(join: Join, run: Run, row: int, widths: Sequence[int], out: Bytes, read: Read) -> None:
    """A part's bytes of some rows, which it holds one behind the other; of one row perhaps only some."""
    copies, width = join.parts[run.part], widths[run.part]
    target = out[:, run.place : run.place + run.size]
    for copy in copies:
        size = len(out) * width if run.size == width else run.size
        found = np.frombuffer(read(copy, row * width + run.begin, size), np.uint8).reshape(target.shape)
        if copy is copies[0]:
            target[:] = found
        else:
            require_equal(target, found, copies[0], copy)


def require_equal(one: NDArray[Any], other: NDArray[Any], first: Tensor, second: Tensor) -> None:
    """What several ranks hold is the same in all."""
    if not np.array_equal(one.reshape(-1), other.reshape(-1)):
        found = f"other bytes in rank {second.file} than in rank {first.file}"
        remedy = "--replicas first takes those of the first rank that has it"
        raise refuse("replicas-differ", first.name, found, "the same in every rank", remedy)
