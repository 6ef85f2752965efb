"""Which box of a source tensor a rank should hold, by arithmetic of its own: shares nothing with the planner's cuts."""

from math import prod
from typing import NamedTuple

from reshard.header import BITS
from reshard.types import BlockScale, Checkpoint, Recipe, Tensor


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
    length = tensor.shape[dimension]
    weight, scale = weight_of(tensor, source, recipe)
    taken = range(rank * length // ranks, (rank + 1) * length // ranks)
    if weight and scale:
        taken = blocks(weight.shape[dimension], scale.block[dimension], ranks, rank)
    shape = (*tensor.shape[:dimension], len(taken), *tensor.shape[dimension + 1 :])
    # In bits, for an F4 is half a byte.
    step = prod(tensor.shape[dimension + 1 :]) * BITS[tensor.dtype]
    place = range(taken.start * step // 8, taken.stop * step // 8)
    if dimension == 0:
        return Box(shape, 1, place, range(1))
    return Box(shape, tensor.size // max(tensor.shape[0], 1), range(tensor.shape[0]), place)


def weight_of(tensor: Tensor, source: Checkpoint, recipe: Recipe) -> tuple[Tensor, BlockScale] | tuple[None, None]:
    """The weight that a block scale belongs to, and how it is scaled; nothing for what is no scale."""
    for scale in recipe.scales.values():
        prefix = tensor.name.removesuffix(f".{scale.left}")
        weight = source.tensors.get(f"{prefix}.weight")
        if prefix != tensor.name and weight:
            return weight, scale
    return None, None


def blocks(length: int, block: int, ranks: int, rank: int) -> range:
    """The blocks that a rank's part of a weight touches, along a dimension of that length."""
    return range(rank * length // ranks // block, -(-((rank + 1) * length // ranks) // block))
