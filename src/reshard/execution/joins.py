"""Reads any byte range of a join: of a tensor assembled from parts that lie in files, or are joins in their turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.tensor_boxes import Read
from reshard.errors import refuse
from reshard.sources.rank_files import PartRange, cut_part_ranges
from reshard.types import Cast, Join, Tensor

ByteRows = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PartReader:
    """Reads byte ranges of tensors: from files, or from joins of them. The next read overwrites what it returned."""

    read_file: Read
    """Reads a range of a tensor that lies in a file."""
    names: Sequence[str]
    """Of the files, for messages."""
    made: Sequence[Join | Cast]
    """The joins, which are numbered behind the files; and casts, which are not read."""
    most: int
    """In bytes: the largest read."""
    buffers: Sequence[memoryview] = ()
    """One of `most` bytes for each level of `count_join_levels`; one more if tensors that are joins are read."""

    def read(self, tensor: Tensor, offset: int, size: int) -> memoryview:
        """Reads `size` bytes of a tensor from byte `offset` of it on. Raises Refused."""
        if tensor.file < len(self.names):
            return self.read_file(tensor, offset, size)
        data = self.buffers[0][:size]
        inner = replace(self, buffers=self.buffers[1:])
        read_join(self.find_join(tensor), tensor.offset + offset, data, inner)
        return data

    def fill(self, tensor: Tensor, offset: int, out: ByteRows) -> None:
        """Fills contiguous memory with the bytes of a tensor from byte `offset` of it on; at most `most` of one that
        lies in a file. Raises Refused.
        """
        if tensor.file < len(self.names):
            out[:] = np.frombuffer(self.read_file(tensor, offset, len(out)), np.uint8)
        else:
            read_join(self.find_join(tensor), tensor.offset + offset, out.data, self)

    def find_join(self, tensor: Tensor) -> Join:
        """Finds the join that a tensor lies in."""
        join = self.made[tensor.file - len(self.names)]
        if not isinstance(join, Join):
            raise TypeError(f"{tensor.name} is cast twice")
        return join


def count_join_levels(joins: Sequence[Join], files: int) -> int:
    """Counts how many buffers it takes to read joins whose parts are joins: a part takes one if its rows lie apart in
    the whole, or if it has replicas.
    """
    levels: list[int] = []
    for join in joins:
        needed = [
            levels[copy.file - files] + (join.rows > 1 or len(part) > 1)
            for part in join.parts
            for copy in part
            if copy.file >= files
        ]
        levels.append(max(needed, default=0))
    return max(levels, default=0)


def read_join(join: Join, offset: int, out: memoryview, reader: PartReader) -> None:
    """Writes the bytes of a joined tensor from byte `offset` on into `out`. Raises Refused if replicas of a part
    differ.
    """
    data = np.frombuffer(out, np.uint8)
    if join.rows == 1:
        sizes = [part[0].size for part in join.parts]
        for run in cut_part_ranges(sizes, offset, len(data), reader.most):
            read_run(join, run, data[run.place : run.place + run.size], reader)
        return
    width, widths = join.result.size // join.rows, [part[0].size // join.rows for part in join.parts]
    most_rows = max(1, reader.most // max(widths))
    for row, begin, end, place in split_range_by_rows(offset, len(data), width):
        rows = data[place : place + end - begin].reshape(max((end - begin) // width, 1), -1)
        for first in range(0, len(rows), most_rows):
            some = rows[first : first + most_rows]
            for run in cut_part_ranges(widths, begin % width, some.shape[1], reader.most):
                read_run_of_rows(join, run, row + first, widths[run.part], some, reader)


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


def read_run(join: Join, run: PartRange, out: ByteRows, reader: PartReader) -> None:
    """Reads a contiguous run of a part into `out`, and compares its replicas."""
    copies = join.parts[run.part]
    reader.fill(copies[0], run.begin, out)
    for other in copies[1:]:
        found = np.frombuffer(reader.read(other, run.begin, run.size), np.uint8)
        require_equal_replicas(out, found, copies[0], other, reader)


def read_run_of_rows(join: Join, run: PartRange, row: int, width: int, out: ByteRows, reader: PartReader) -> None:
    """Reads a run of each of the rows of a part from `row` on into `out`, and compares its replicas.

    `width` is the size of a row of the part in bytes. Several rows are read whole, even if each ends with padding; of
    a single row only the run is read.
    """
    copies = join.parts[run.part]
    target = out[:, run.place : run.place + run.size]
    begin, size = (run.begin, run.size) if len(out) == 1 else (0, len(out) * width)
    for copy in copies:
        data = np.frombuffer(reader.read(copy, row * width + begin, size), np.uint8).reshape(len(out), -1)
        found = data[:, run.begin - begin : run.begin - begin + run.size]
        if copy is copies[0]:
            target[:] = found
        else:
            require_equal_replicas(target, found, copies[0], copy, reader)


def require_equal_replicas(
    one: NDArray[Any], other: NDArray[Any], first: Tensor, second: Tensor, reader: PartReader
) -> None:
    """Raises Refused if two replicas of a part have different bytes."""
    if not np.array_equal(one, other):
        names = [*reader.names, *("other files" for _ in reader.made)]
        found = f"other bytes in {names[second.file]} than in {names[first.file]}"
        remedy = "--replicas first takes the first; which is damaged reshard verify tells, if reshard wrote the files"
        raise refuse("replicas-differ", first.name, found, "the same in every file", remedy)
