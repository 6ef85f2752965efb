"""Copies: rectangles of bytes, held in columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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


class WrongPlan(Exception):
    """A plan that does not tile or cover. Never the user's fault: it is ours, and the plan is not executed."""


def joined(parts: Sequence[Copies]) -> Copies:
    """One table of several."""
    return Copies(*(np.concatenate([getattr(part, name) for part in parts]) for name in Copies.__slots__))
