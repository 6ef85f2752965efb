"""Boxes of tensors, and how a cast reads what is in them."""

from collections.abc import Callable
from typing import NamedTuple

from reshard.casts.strips import StripStore
from reshard.types import Tensor

Read = Callable[[Tensor, int, int], memoryview]
"""Reads bytes of a tensor: `(tensor, offset, size)`, in bytes. The next call overwrites the returned buffer."""


class ElementBox(NamedTuple):
    """A rectangle of a matrix, in elements; `bottom` and `right` are exclusive."""

    top: int
    left: int
    bottom: int
    right: int


class CastInputs(NamedTuple):
    """How a cast reads its weight and scale."""

    weight: Read
    scale: Read
    most: int
    """In bytes: the largest read of a weight."""
    most_scales: int
    """In bytes: the largest read of a scale."""
    strips: StripStore
    """Of weights whose codes lie in columns, for all threads of a job."""
    powers: dict[int, int]
    """Of NVFP4, for all threads of a job: by the number of the first weight that shares a factor, its exponent."""
