"""Copies from source to target files: rectangles of bytes, stored as numpy columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

LARGEST_GAP = 128 << 10
"""In bytes. Gaps up to this size in a source file are read and discarded: cheaper than another read."""


@dataclass(frozen=True, slots=True)
class Copies:
    """A table of copies; the columns are int64 of shape [copies]. Each copy is a rectangle: `rows` runs of `run` bytes,
    `pitch` bytes apart in the source and contiguous in the target. A contiguous copy has one row. No copy is empty.
    """

    source_file: Integers
    """Index of the source file; joins and casts are numbered behind the files."""
    source_offset: Integers
    """Of the first run, in bytes from the start of the file."""
    pitch: Integers
    """Distance between the starts of two runs in the source, in bytes."""
    run: Integers
    """Size of one run, in bytes."""
    rows: Integers
    """Number of runs."""
    target_file: Integers
    """Index into the files of the plan."""
    target_offset: Integers
    """In bytes from the start of the file."""

    def __len__(self) -> int:
        return len(self.run)

    @property
    def sizes(self) -> Integers:
        """Size of each copy, in bytes."""
        return self.run * self.rows


class WrongPlan(Exception):
    """Raised for a plan that writes a target byte not exactly once, or misses a source byte. It is a bug of reshard,
    not a mistake of the user.
    """


def join_copies(parts: Sequence[Copies]) -> Copies:
    """Concatenates tables of copies."""
    return Copies(*(np.concatenate([getattr(part, name) for part in parts]) for name in Copies.__slots__))
