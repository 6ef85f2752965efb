"""Which box of a source tensor a rank should hold, by arithmetic of its own: shares nothing with the planner's cuts."""

from math import prod
from typing import NamedTuple

DIMENSION = {"rows": 0, "padded rows": 0, "columns": 1}


class Box(NamedTuple):
    """The part of a tensor that a rank should hold, with the tensor seen as rows of bytes: those of its first
    dimension; or, where it is `flat`, each byte as a row.
    """

    shape: tuple[int, ...]
    rows: range
    columns: range
    """In bytes."""


def box(shape: tuple[int, ...], bits: int, dimension: int | None, taken: range, *, flat: bool) -> Box:
    """The elements `taken` along a dimension of a tensor, or all if there is none. It can be flat unless that is 1."""
    # In bits, for an F4 is half a byte.
    if dimension is None:
        place, part = range(prod(shape) * bits // 8), shape
    else:
        step = prod(shape[dimension + 1 :]) * bits
        place = range(taken.start * step // 8, taken.stop * step // 8)
        part = (*shape[:dimension], len(taken), *shape[dimension + 1 :])
    if flat:
        return Box(part, place, range(1))
    if dimension == 1:
        return Box(part, range(shape[0]), place)
    return Box(part, taken if dimension == 0 else range(shape[0]), range(row_size(shape, bits)))


def row_size(shape: tuple[int, ...], bits: int) -> int:
    """In bytes, of a row of a tensor that is not flat."""
    return prod(shape[1:]) * bits // 8


def shares(length: int, ranks: int, rank: int) -> range:
    """A rank's part of a dimension of that length."""
    return range(rank * length // ranks, (rank + 1) * length // ranks)


def blocks(length: int, block: int, ranks: int, rank: int) -> range:
    """The blocks that a rank's part of a weight touches, along a dimension of that length."""
    part = shares(length, ranks, rank)
    return range(part.start // block, -(-part.stop // block))


def in_blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """How many blocks there are along each dimension, the last being perhaps smaller."""
    return tuple(-(-length // side) for length, side in zip(shape, block, strict=False))
