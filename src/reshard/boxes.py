"""Which box of a source tensor a rank should hold, by arithmetic of its own: shares nothing with the planner's cuts."""

from math import prod
from typing import NamedTuple

DIMENSIONS = {"rows": 0, "padded rows": 0, "packed rows": 0, "columns": 1}


def dimension_of(split: str) -> int | None:
    """The dimension that is cut by a split of a recipe; None if none is."""
    return 0 if split.startswith("rows of ") else DIMENSIONS.get(split)


def part_of(ranks: int, rank: int, heads: int) -> tuple[int, int]:
    """How many parts there are of a tensor, and which of them a rank holds: of heads that are fewer than the ranks,
    several hold the same one. `heads` is 0 where the split is not by heads.
    """
    parts = min(heads, ranks) if heads else ranks
    return parts, rank * parts // ranks


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


def shares(split: str, length: int, parts: int, index: int) -> list[range]:
    """The stretches that one of so many parts is, of a dimension of that length: one, or one of each half."""
    halves = 2 if split == "packed rows" and parts > 1 else 1  # of one part it does not matter where they meet
    half = length // halves
    part = range(index * half // parts, (index + 1) * half // parts)
    return [range(part.start + number * half, part.stop + number * half) for number in range(halves)]


def touched(part: range, block: int) -> range:
    """The blocks that a stretch of a weight touches."""
    return range(part.start // block, -(-part.stop // block))


def in_blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """How many blocks there are along each dimension, the last being perhaps smaller."""
    return tuple(-(-length // side) for length, side in zip(shape, block, strict=False))
