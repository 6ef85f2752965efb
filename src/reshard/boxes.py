"""Which box of a source tensor a rank should hold, by arithmetic of its own: shares nothing with the planner's cuts."""

from math import prod
from typing import NamedTuple

from reshard.header import BITS
from reshard.types import Checkpoint, Recipe, Tensor


class Box(NamedTuple):
    """The part of a source tensor that a rank should hold, with the tensor seen as rows of bytes: those of its first
    dimension if columns are cut, else each byte as a row.
    """

    shape: tuple[int, ...]
    width: int
    """In bytes, of a row."""
    rows: range
    columns: range
    """In bytes."""


def box(tensor: Tensor, source: Checkpoint, split: str, recipe: Recipe, ranks: int, rank: int) -> Box | None:
    """What a rank should hold of a tensor of the source; None if it cannot be so cut."""
    dimension = {"rows": 0, "columns": 1}.get(split)
    if dimension is None:
        return Box(tensor.shape, 1, range(tensor.size), range(1))
    if len(tensor.shape) <= dimension:
        return None
    weight = source.tensors.get(weight_name(tensor.name, recipe))
    taken = part(tensor.shape[dimension], weight and weight.shape[dimension], recipe, ranks, rank)
    shape = (*tensor.shape[:dimension], len(taken), *tensor.shape[dimension + 1 :])
    # In bits, for an F4 is half a byte.
    step = prod(tensor.shape[dimension + 1 :]) * BITS[tensor.dtype]
    place = range(taken.start * step // 8, taken.stop * step // 8)
    if dimension == 0:
        return Box(shape, 1, place, range(1))
    return Box(shape, tensor.size // max(tensor.shape[0], 1), range(tensor.shape[0]), place)


def weight_name(name: str, recipe: Recipe) -> str:
    """The name of the weight that a block scale belongs to, or the empty string for what is no scale."""
    suffix = f".{recipe.scale.left}" if recipe.scale else ""
    return name.removesuffix(suffix) + ".weight" if suffix and name.endswith(suffix) else ""


def part(length: int, weight_length: int | None, recipe: Recipe, ranks: int, rank: int) -> range:
    """Which rows or columns of `length` a rank holds; of a block scale, those of the blocks its weight touches."""
    if weight_length is None or recipe.scale is None:
        return range(rank * length // ranks, (rank + 1) * length // ranks)
    block = recipe.scale.block
    return range(rank * weight_length // ranks // block, -(-((rank + 1) * weight_length // ranks) // block))
