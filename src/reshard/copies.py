"""Copies: rectangles of bytes held in columns, and the proof that they tile the target and cover the source.

The proof looks at nothing but offsets and sizes: it does not know how the plan came about, so it can find it wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reshard.types import Tensor

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Copies:
    """Rectangles of bytes, one an element of each column: `rows` runs of `run` bytes, `pitch` bytes apart in the source
    and back to back in the target. A contiguous copy has one row. None is empty.
    """

    source_file: Integers
    source_offset: Integers
    """In bytes from the start of the file."""
    pitch: Integers
    run: Integers
    rows: Integers
    target_file: Integers
    target_offset: Integers

    def __len__(self) -> int:
        return len(self.run)

    @property
    def sizes(self) -> Integers:
        """The bytes that each moves."""
        return self.run * self.rows


@dataclass(frozen=True, slots=True)
class Usage:
    """How often each tensor of the source is used, in the order of the tensors that were asked about."""

    least: Integers
    """By the part that is used least often."""
    most: Integers


class WrongPlan(Exception):
    """A plan that does not tile or cover. Never the user's fault: it is ours, and the plan is not executed."""


def joined(parts: Sequence[Copies]) -> Copies:
    """One table of several."""
    return Copies(*(np.concatenate([getattr(part, name) for part in parts]) for name in Copies.__slots__))


def require_tiling(copies: Copies, begins: Sequence[int], ends: Sequence[int]) -> None:
    """Every byte of each target file from its `begins` to its `ends` is written by exactly one copy."""
    order = np.lexsort((copies.target_offset, copies.target_file))
    file, start = copies.target_file[order], copies.target_offset[order]
    end = start + copies.sizes[order]
    is_first = np.diff(file, prepend=-1) != 0
    is_last = np.diff(file, append=-1) != 0
    expected = np.where(is_first, np.asarray(begins, np.int64)[file], np.concatenate([[0], end[:-1]]))
    filled = {number for number, (begin, stop) in enumerate(zip(begins, ends, strict=True)) if stop > begin}
    if set(file[is_first].tolist()) != filled:
        raise WrongPlan("some target files have no copy at all, or copies that they should not have")
    if wrong := np.flatnonzero(start != expected).tolist():
        raise WrongPlan(f"target file {file[wrong[0]]}: gap or overlap at byte {start[wrong[0]]}")
    if wrong := np.flatnonzero(is_last & (end != np.asarray(ends, np.int64)[file])).tolist():
        raise WrongPlan(f"target file {file[wrong[0]]}: the last copy ends at byte {end[wrong[0]]}")


def require_coverage(copies: Copies, used: Sequence[Tensor], sizes: Sequence[int]) -> Usage:
    """Every byte of each `used` tensor is read, and no byte of another; `sizes` are those of the source files.

    Returns how often. Empty tensors count as used no times.
    """
    bases = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
    begins = bases[[tensor.file for tensor in used]] + np.array([tensor.offset for tensor in used], np.int64)
    lengths = np.array([tensor.size for tensor in used], np.int64)
    starts = bases[copies.source_file] + copies.source_offset
    order = np.lexsort((copies.rows, copies.run, starts))
    columns = np.stack([starts[order], copies.run[order], copies.rows[order], copies.pitch[order]])
    is_new = np.concatenate([[True], np.any(np.diff(columns, axis=1) != 0, axis=0)])[: columns.shape[1]]
    places = np.flatnonzero(is_new)
    times = np.diff(places, append=columns.shape[1])
    start, run, rows, pitch = columns[:, places]

    full = np.flatnonzero(lengths > 0)
    full = full[np.argsort(begins[full])]
    owner = full[np.searchsorted(begins[full], start, side="right") - 1] if len(full) else np.empty(0, np.int64)
    alike = (np.diff(rows) == 0) & ((rows[1:] == 1) | (np.diff(pitch) == 0))
    if np.any(~alike & (np.diff(owner) == 0)):
        raise WrongPlan("a source tensor is read in rows of different lengths")
    require_rows_tiled(owner, start, run, np.where(rows > 1, pitch, lengths[owner]), begins)
    if np.any(np.where(rows > 1, pitch * rows, lengths[owner]) != lengths[owner]):
        raise WrongPlan("a copy of rows that are not the tensor's")
    read = np.count_nonzero(np.diff(owner, prepend=-1))
    if read != len(full):
        raise WrongPlan(f"{len(full) - read} source tensors are not read")
    least, most = np.full(len(used), 2**62), np.zeros(len(used), np.int64)
    np.minimum.at(least, owner, times)
    np.maximum.at(most, owner, times)
    return Usage(np.where(lengths > 0, least, 0), most)


def require_rows_tiled(owner: Integers, start: Integers, run: Integers, row: Integers, begins: Integers) -> None:
    """The runs of each tensor, in the order of their start, fill its row: its pitch, or all of it if contiguous."""
    is_first = np.diff(owner, prepend=-1) != 0
    is_last = np.diff(owner, append=-1) != 0
    expected = np.where(is_first, begins[owner], np.concatenate([[0], (start + run)[:-1]]))
    if wrong := np.flatnonzero(start != expected).tolist():
        raise WrongPlan(f"source tensor {owner[wrong[0]]}: a part is read twice or not at all")
    if np.any(is_last & (start + run != begins[owner] + row)):
        raise WrongPlan("the last part of a source tensor is not read")
