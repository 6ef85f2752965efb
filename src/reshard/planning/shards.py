"""Cuts tensors into the shards of the ranks. Arithmetic on shapes only.

A tensor is cut along one dimension. In bytes, it has `rows` rows of `pitch` bytes. Of each row, a rank gets a run of
`run` bytes that begins at byte `rank // repeat * run` of the row:

    rows, 4 ranks          columns, 4 ranks        replicate, 4 ranks     block scale of 2 rows, 4 ranks
    rows 1                 rows = length           rows 1                 rows 1
    |r0..|r1..|r2..|r3..|  |r0|r1|r2|r3|           |r0 r1 r2 r3......|    |r0 r1..|r2 r3..|
     run                   |r0|r1|r2|r3|            run = pitch            run      repeat 2
                            run      pitch          repeat 4
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np

from reshard.formats.safetensors import BITS
from reshard.planning.copies import Integers
from reshard.planning.transforms import Outcome, Terms
from reshard.recipe_types import Rule, Split
from reshard.recipes.flattening import FLATTEN, flatten_shape
from reshard.recipes.fusions import FUSED
from reshard.recipes.patterns import list_slots
from reshard.recipes.splits import HALVES, count_parts, measure_largest_part
from reshard.sources.block_scales import WeightGroup
from reshard.types import Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a tensor that each rank gets, as drawn above."""

    rows: int
    """Number of rows."""
    pitch: int
    """Size of a row of the whole tensor, in bytes."""
    run: int
    """Bytes of each row that one rank gets."""
    repeat: int
    """Number of consecutive ranks that get the same part."""
    shape: tuple[int, ...]
    """Shape of one part, in elements; of uneven parts that of the first."""
    uneven: tuple[int, int] | None = None
    """Of parts that may differ: the dimension that is cut, and its length in elements. The last parts are shorter, or
    empty. None if all parts are alike."""

    def compute_part_shape(self, rank: int) -> tuple[int, ...]:
        """The shape of the part of a rank, in elements."""
        if self.uneven is None:
            return self.shape
        (dimension, length), most = self.uneven, self.shape[self.uneven[0]]
        left = length - rank // self.repeat * most
        return (*self.shape[:dimension], max(0, min(most, left)), *self.shape[dimension + 1 :])

    def count_ranks(self) -> int:
        """The number of ranks that have a part: the first ones; MOST_FILES if all have one."""
        if self.uneven is None:
            return MOST_FILES
        dimension, length = self.uneven
        return -(-length // self.shape[dimension]) if length else 1


class Limit(NamedTuple):
    """A condition on the number of ranks: it must divide a length so that no block, byte or head is cut."""

    length: int
    """Of the cut dimension, in elements; or a number of members or heads."""
    block: int = 1
    """Elements of the length that share one block scale; 1 without scales."""
    bits: int = 0
    """Size of one row that is cut, in bits: an element can be smaller than a byte, a part must be whole bytes. Of
    uneven parts that of one element of the length."""
    units: int = 0
    """Number of heads in the length; 0 if it does not count heads."""
    whole_blocks: bool = False
    """Whether a part inside one block will not do: in the target another part lies behind it, of the other packed half
    or of a fused tensor, and one block would need two scales."""
    step: int = 0
    """Of uneven parts: the length, in elements, that goes to a rank together, and each needs one; 0 for equal parts."""

    def allows(self, ranks: int) -> bool:
        """Whether each rank's part is whole blocks, lies inside one block, or is the whole length; heads stay whole. Of
        uneven parts, whether the last rank gets something.
        """
        parts = count_parts(ranks, self.units)
        if parts == 1:
            return True
        if self.step:
            most = measure_largest_part(self.length, self.step, ranks)
            return (ranks - 1) * most < self.length and self.bits % 8 == 0
        if not parts or self.length % (self.units or parts) or self.length % parts or self.bits % (8 * parts):
            return False
        part = self.length // parts
        return part % self.block == 0 or (not self.whole_blocks and part > 0 and self.block % part == 0)


def cut_nothing(tensor: Tensor, ranks: int) -> Cut:
    """Cuts nothing: every rank gets the whole tensor."""
    return Cut(1, tensor.size, tensor.size, ranks, tensor.shape)


def cut_along(tensor: Tensor, dimension: int, parts: int, repeat: int) -> Cut:
    """Cuts a tensor into `parts` equal parts along a dimension; `repeat` consecutive ranks get the same part. The
    length must be divisible by `parts`.
    """
    shape = list(tensor.shape)
    shape[dimension] //= parts
    rows = prod(tensor.shape[:dimension])
    pitch = tensor.size // rows if rows else 0
    return Cut(rows, pitch, pitch // parts, repeat, tuple(shape))


def cut_unevenly(tensor: Tensor, dimension: int, most: int) -> Cut:
    """Cuts a tensor into parts of `most` elements along a dimension, a rank each; the last are shorter or empty."""
    length = tensor.shape[dimension]
    rows = prod(tensor.shape[:dimension])
    pitch = tensor.size // rows if rows else 0
    shape = (*tensor.shape[:dimension], min(most, length), *tensor.shape[dimension + 1 :])
    return Cut(rows, pitch, pitch // length * shape[dimension] if length else 0, 1, shape, (dimension, length))


def cut_packed(tensor: Tensor, parts: int) -> Cut:
    """Cuts each half of the rows into `parts` parts; a rank gets one part of each half, stacked."""
    shape = (tensor.shape[0] // parts, *tensor.shape[1:])
    half = tensor.size // HALVES
    return Cut(HALVES, half, half // parts, 1, shape)


def cut_weight(tensor: Tensor, split: Split, ranks: int, parts: int) -> Cut:
    """Cuts a tensor that is no block scale. It must have been checked before that the split suits its shape."""
    dimension = split.dimension
    if split.step and dimension is not None and parts > 1:
        return cut_unevenly(tensor, dimension, measure_largest_part(tensor.shape[dimension], split.step, ranks))
    if dimension is None or parts == 1:
        return cut_nothing(tensor, ranks)
    return cut_packed(tensor, parts) if split.is_packed else cut_along(tensor, dimension, parts, ranks // parts)


def flatten_cut(cut: Cut) -> Cut:
    """Makes one dimension of the last two of all parts. The last one is not cut."""
    shape, dimension = cut.shape, len(cut.shape) - 2
    if cut.uneven is None or cut.uneven[0] != dimension:
        return replace(cut, shape=flatten_shape(shape))
    return replace(cut, shape=flatten_shape(shape), uneven=(dimension, cut.uneven[1] * shape[-1]))


def find_limit(tensor: Tensor, rule: Rule, block: tuple[int, int], units: int = 0) -> Limit | None:
    """Finds the condition that the cut of a tensor sets for the number of ranks; None if it is not cut.

    `block` is the block of its scale, in elements; (1, 1) without a scale.
    """
    split, dimension = rule.split, rule.split.dimension
    if dimension is None or len(tensor.shape) <= dimension:
        return None
    side = block[dimension] if dimension < len(block) else 1
    bits = prod(tensor.shape[dimension:]) * BITS[tensor.dtype]
    if split.step:
        each = prod(tensor.shape[dimension + 1 :]) * BITS[tensor.dtype]
        return Limit(tensor.shape[dimension], bits=each, step=split.step)
    if not split.is_packed:
        return Limit(tensor.shape[dimension], side, bits, units, whole_blocks=rule.relation in FUSED)
    if tensor.shape[dimension] % HALVES:
        return Limit(1)
    return Limit(tensor.shape[dimension] // HALVES, side, bits // HALVES, whole_blocks=True)


def cut_scale(tensor: Tensor, weight: Tensor, split: Split, ranks: int, parts: int, block: int) -> Cut:
    """Cuts a block scale to match its weight, which is cut into `parts` parts. `block` is in elements.

    If a rank's part of the weight is whole blocks, the scale is cut in the same way. If the part lies inside one block,
    each rank that shares the block gets its scale. Source: `inference/model.py` of DeepSeek-V3 allocates scales from
    the local shape and the kernels index them from the local origin, so no other cut is possible.
    """
    dimension = split.dimension
    if dimension is None or parts == 1:
        return cut_nothing(tensor, ranks)
    part = weight.shape[dimension] // parts
    if part % block == 0:
        return cut_packed(tensor, parts) if split.is_packed else cut_along(tensor, dimension, parts, ranks // parts)
    return cut_along(tensor, dimension, tensor.shape[dimension], block // part * (ranks // parts))


MOST_FILES = 1 << 32
"""The `repeat` of whole tensors in the original layout: more than any number of files."""


@dataclass(frozen=True, slots=True)
class Series:
    """Target tensors of one rule, dtype and shape that are cut in the same way. The columns have equal lengths."""

    number: int
    """Index of their rule."""
    names: Sequence[str]
    """Names in the target."""
    tensors: Sequence[Tensor]
    """The inputs: source tensors, or results of joins and casts."""
    cut: Cut
    ranks: Integers | None
    """The rank that each tensor is assigned to, int64 of shape [tensors]; None if every rank gets its part of each."""
    least: int
    """Number of ranks that use the least used part of a tensor."""
    most: int
    """Number of ranks that use the most used part of a tensor."""
    parts: Integers | None = None
    """Place of each among the parts of its fused tensor, int64 of shape [tensors]; None if they are not fused."""
    of_member: int = 0
    """Number of parts that each member of their stack has; 0 if they are parts of none."""


def cut_for_ranks(outcome: Outcome, terms: Terms, counts: Mapping[str, int]) -> Iterator[Series]:
    """Cuts the weights of a group, and their block scales, for the ranks. It must have been checked before that the
    number of ranks suits them.
    """
    kind, layout = outcome.kind, terms.layout
    split, number = kind.rule.split, kind.number
    weight, ranks = outcome.weights[0], None
    if split.placeholder:
        ranks = assign_to_ranks(kind, terms, counts)
    parts = count_parts(layout.ranks, outcome.heads or 0)
    times = layout.ranks if split.is_replicated else layout.ranks // parts
    cut = cut_weight(weight, split, layout.ranks, parts)
    cut = flatten_cut(cut) if kind.rule.relation == FLATTEN else cut
    yield Series(number, kind.names, outcome.weights, cut, ranks, times, times)
    if not outcome.scales:
        return
    dimension = split.dimension
    if dimension is None or len(outcome.scales[0].shape) <= dimension:
        cut, least, most = cut_nothing(outcome.scales[0], layout.ranks), times, times
    else:
        cut = cut_scale(outcome.scales[0], weight, split, layout.ranks, parts, outcome.block[dimension])
        most = min(cut.repeat, layout.ranks)
        least = layout.ranks - most * (-(-layout.ranks // most) - 1)
    yield Series(number, outcome.scale_names, outcome.scales, cut, ranks, least, most)


def assign_to_ranks(kind: WeightGroup, terms: Terms, counts: Mapping[str, int]) -> Integers:
    """Assigns each weight to one rank, by the number of its expert: experts 0-15 to rank 0, 16-31 to rank 1. Returns
    int64 of shape [weights].
    """
    name = kind.rule.split.placeholder
    place = list_slots(kind.rule, terms.recipe).index(name)
    members = counts[name] // terms.layout.ranks
    return np.array([int(numbers[place]) for numbers in kind.numbers], np.int64) // members


def keep_whole(outcome: Outcome) -> Iterator[Series]:
    """Keeps the weights, scales and factors of a group whole, for a target in the original layout."""
    kind = outcome.kind
    for names, tensors in (
        (kind.names, outcome.weights),
        (outcome.scale_names, outcome.scales),
        (outcome.factor_names, outcome.factors),
    ):
        if tensors:
            yield Series(kind.number, names, tensors, cut_nothing(tensors[0], MOST_FILES), None, 1, 1)
