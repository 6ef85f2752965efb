"""How a tensor is cut into the parts that the ranks hold. Arithmetic on shapes only.

A tensor is cut along one dimension. Seen as bytes it is `rows` rows of `pitch` bytes, of which a rank gets a run of
`run` bytes each, from byte `rank // repeat * run` of the row on:

    rows, 4 ranks          columns, 4 ranks        replicate, 4 ranks     block scale of 2 rows, 4 ranks
    rows 1                 rows = length           rows 1                 rows 1
    |r0..|r1..|r2..|r3..|  |r0|r1|r2|r3|           |r0 r1 r2 r3......|    |r0 r1..|r2 r3..|
     run                   |r0|r1|r2|r3|            run = pitch            run      repeat 2
                            run      pitch          repeat 4
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from reshard.errors import Problem, listed
from reshard.header import BITS
from reshard.types import MOST_RANKS, Tensor

ROWS, COLUMNS = 0, 1
DIMENSIONS = {"rows": ROWS, "padded rows": ROWS, "packed rows": ROWS, "columns": COLUMNS}
HALVES = 2
"""What is packed: a gate and what it lets through."""


def dimension_of(split: str) -> int | None:
    """Along which dimension a split cuts; None if it cuts nothing."""
    return ROWS if split.startswith("rows of ") else DIMENSIONS.get(split)


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of a tensor that each rank holds, in bytes, and its shape in elements."""

    rows: int
    pitch: int
    run: int
    repeat: int
    shape: tuple[int, ...]


class Limit(NamedTuple):
    """What a number of ranks must suit: a length that it must divide, cut only where blocks and bytes allow it."""

    length: int
    block: int = 1
    """Of its scale, in elements; 1 without one."""
    bits: int = 0
    """Of one row that is cut: elements can be smaller than a byte, a part must be whole bytes."""
    units: int = 0
    """How many heads there are, where the length is that of heads."""
    is_half: bool = False
    """Whether it is one of two halves, of each of which a rank has a part: two parts inside one block of the rank's
    would have two scales."""

    def allows(self, ranks: int) -> bool:
        """A part must be whole blocks, or lie inside one block, or be the whole length; or whole heads."""
        parts = parts_for(ranks, self.units)
        if parts == 1:
            return True
        if not parts or self.length % (self.units or parts) or self.length % parts or self.bits % (8 * parts):
            return False
        part = self.length // parts
        return part % self.block == 0 or (not self.is_half and part > 0 and self.block % part == 0)


def parts_for(ranks: int, units: int) -> int:
    """Into how many parts so many ranks have a tensor cut: where there are fewer units (heads) than ranks, one for each
    unit, held by several ranks. 0 if neither number divides the other. Without units, one for each rank.
    """
    if not units or units % ranks == 0:
        return ranks
    return units if ranks % units == 0 else 0


def whole(tensor: Tensor, ranks: int) -> Cut:
    """Every rank that holds the tensor holds all of it."""
    return Cut(1, tensor.size, tensor.size, ranks, tensor.shape)


def along(tensor: Tensor, dimension: int, parts: int, repeat: int) -> Cut:
    """`parts` equal parts along a dimension, `repeat` ranks in a row on each. The length must be divisible."""
    shape = list(tensor.shape)
    shape[dimension] //= parts
    rows = prod(tensor.shape[:dimension])
    pitch = tensor.size // rows if rows else 0
    return Cut(rows, pitch, pitch // parts, repeat, tuple(shape))


def packed(tensor: Tensor, parts: int) -> Cut:
    """Of each half of the rows one part, one behind the other."""
    shape = (tensor.shape[0] // parts, *tensor.shape[1:])
    half = tensor.size // HALVES
    return Cut(HALVES, half, half // parts, 1, shape)


def cut_weight(tensor: Tensor, split: str, ranks: int, parts: int) -> Cut:
    """The cut of an ordinary tensor into parts; `weight_problems` must have found nothing."""
    dimension = dimension_of(split)
    if dimension is None or parts == 1:
        return whole(tensor, ranks)
    return packed(tensor, parts) if split == "packed rows" else along(tensor, dimension, parts, ranks // parts)


def limit_of(tensor: Tensor, split: str, block: tuple[int, int], units: int = 0) -> Limit | None:
    """What the cut of a tensor asks of the number of ranks. `block` is that of its scale, (1, 1) without one."""
    dimension = dimension_of(split)
    if dimension is None or len(tensor.shape) <= dimension:
        return None
    side = block[dimension] if dimension < len(block) else 1
    bits = prod(tensor.shape[dimension:]) * BITS[tensor.dtype]
    if split != "packed rows":
        return Limit(tensor.shape[dimension], side, bits, units)
    if tensor.shape[dimension] % HALVES:
        return Limit(1)
    return Limit(tensor.shape[dimension] // HALVES, side, bits // HALVES, is_half=True)


def cut_scale(tensor: Tensor, weight: Tensor, split: str, ranks: int, parts: int, block: int) -> Cut:
    """The cut of a block scale, from that of its weight into parts.

    A rank's part of the weight is either whole blocks, and the scale is cut alike, or lies inside one block, and the
    block's scale goes to each of the ranks that share it. Source: `inference/model.py` of DeepSeek-V3 allocates scales
    from the local shape and the kernels index them from the local origin, so nothing else can be expressed.
    """
    dimension = dimension_of(split)
    if dimension is None or parts == 1:
        return whole(tensor, ranks)
    part = weight.shape[dimension] // parts
    if part % block == 0:
        return packed(tensor, parts) if split == "packed rows" else along(tensor, dimension, parts, ranks // parts)
    return along(tensor, dimension, tensor.shape[dimension], block // part * (ranks // parts))


def weight_problems(
    tensor: Tensor, split: str, parts: int, block: tuple[int, int], units: int = 0
) -> Iterator[Problem]:
    """Why a tensor cannot be cut into so many parts. `block` is that of its scale, (1, 1) without one."""
    dimension = dimension_of(split)
    if dimension is None:
        return
    if len(tensor.shape) <= dimension:
        found = f"shape {list(tensor.shape)}"
        yield Problem("wrong-shape", tensor.name, found, f"at least {dimension + 1} dimensions, to be cut on {split}")
        return
    length, halves = tensor.shape[dimension], HALVES if split == "packed rows" else 1
    limit = limit_of(tensor, split, block)
    if parts > 1 and units and length % units:
        yield Problem("not-divisible", tensor.name, f"{length:,} {split}", f"a multiple of {units}")
    elif parts > 1 and length % (parts * halves):
        found = f"{length:,} {split} for {parts} ranks"
        yield Problem("not-divisible", tensor.name, found, f"a multiple of {parts * halves}")
    elif limit and not limit._replace(block=1).allows(parts):
        found = f"{tensor.dtype} {list(tensor.shape)}"
        yield Problem("not-divisible", tensor.name, found, f"rows that {parts} ranks can share in whole bytes")
    elif limit and not limit.allows(parts):
        found = f"{length // parts:,} {split} a rank"
        inside = " of each half" if halves > 1 else ", or a part that lies inside one"
        expected = f"whole blocks of {block[dimension]}{inside}: two block scales have no common value"
        yield Problem("straddles-blocks", tensor.name, found, expected)


def working_ranks(limits: Iterable[Limit]) -> str:
    """`1, 2, 4, 8, 16`: the numbers of ranks that suit every limit, as text; at least 1 does."""
    distinct = set(limits)
    most = min([MOST_RANKS, *(limit.length for limit in distinct if limit.length and not limit.units)])
    return listed((str(n) for n in range(1, most + 1) if all(limit.allows(n) for limit in distinct)), 30)
