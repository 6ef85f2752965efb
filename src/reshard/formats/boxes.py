"""Tensors that are stored in boxes: parts at offsets, as torch's distributed checkpoints (DCP) have them.

weight [4, 6] of two files:   | box [4, 3] at [0, 0] | box [4, 3] at [0, 3] |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from reshard.paths import AnyPath
from reshard.types import File, Note, Tensor


class Box(NamedTuple):
    """A part of a tensor, as it lies in a file."""

    part: Tensor
    """Name of the whole tensor, dtype, shape of the box in elements, and its bytes: row by row, without a gap."""
    offsets: tuple[int, ...]
    """Place of its first element in the tensor, one number a dimension, in elements."""


@dataclass(frozen=True, slots=True)
class BoxedCheckpoint:
    """A checkpoint whose tensors lie in boxes, known from headers and metadata alone. Nothing is proven of them yet."""

    folder: AnyPath
    files: tuple[File, ...]
    boxes: Mapping[str, Sequence[Box]]
    """Name of a tensor -> its boxes, in the order of the files."""
    shapes: Mapping[str, tuple[int, ...]]
    """Name of a tensor -> its shape in elements, where the metadata give it; else it follows from the boxes."""
    config: Mapping[str, Any] | None
    """The parsed `config.json`; None without one."""
    notes: tuple[Note, ...] = ()
    """What was left aside, such as the state of an optimizer."""
