"""Computes the part of a tensor that a rank should hold, as a box of bytes. Shares no arithmetic with planning."""

from collections.abc import Collection
from math import prod
from typing import NamedTuple

from reshard.recipe_types import Split

PADDED_TO, DIMENSION, IN_BLOCKS, FIRST_RANK = "rows padded to ", "dimension ", " in blocks of ", "first rank"

SPLIT_DIMENSIONS = {"rows": 0, "padded rows": 0, "packed rows": 0, FIRST_RANK: 0, "columns": 1}


def find_split_dimension(split: Split) -> int | None:
    """The dimension that a split of a recipe cuts; None if it cuts none. Not taken from the split itself, by which the
    planner cuts.
    """
    if split.text.startswith(DIMENSION):
        return int(split.text.removeprefix(DIMENSION).partition(IN_BLOCKS)[0])
    return 0 if split.heads_key or split.text.startswith(PADDED_TO) else SPLIT_DIMENSIONS.get(split.text)


def find_padded_step(split: Split, rows: int, parts: int) -> int:
    """The number that padded rows become a multiple of, in elements: the one that the split names, or the parts; all
    that the parts would have if each had all `rows`, where only the first has them.
    """
    if split.text == FIRST_RANK:
        return max(rows, 1) * parts
    return int(split.text.removeprefix(PADDED_TO)) if split.text.startswith(PADDED_TO) else parts


def find_part_of_rank(ranks: int, rank: int, heads: int) -> tuple[int, int]:
    """The number of parts of a tensor, and the index of the part that a rank holds. With fewer heads than ranks,
    several ranks hold the same head. `heads` is 0 if the split is not by heads.
    """
    parts = min(heads, ranks) if heads else ranks
    return parts, rank * parts // ranks


class ExpectedBox(NamedTuple):
    """The part of a tensor that a rank should hold. The tensor is a matrix of bytes whose rows are its first `leading`
    dimensions together; or, if there are none, each byte is a row.
    """

    #   shape [4, 6] of BF16, columns 2..4, leading 1          ->  rows 0..4, columns 4..8, part of shape [4, 2]
    #   shape [4, 6] of BF16, rows 1..3, leading 0             ->  rows 12..36, columns 0..1, part of shape [2, 6]
    #   shape [2, 3, 6] of BF16, dimension 2: 2..4, leading 2  ->  rows 0..6, columns 4..8, part of shape [2, 3, 2]

    shape: tuple[int, ...]
    rows: range
    columns: range
    """In bytes."""


def find_leading_dimensions(dimension: int | None, padded: Collection[int], dimensions: int, *, is_kept: bool) -> int:
    """The number of leading dimensions that make the rows of the matrix, so that what is cut along `dimension` is whole
    rows or whole columns, and what padding adds lies below or right of the tensor. 0: each byte is a row, which only a
    tensor can have whose bytes are kept.
    """
    if dimension:
        return dimension
    last = dimensions - 1
    if last > 0 and last in padded:
        return last
    return 0 if is_kept else 1


def make_expected_box(
    shape: tuple[int, ...], bits: int, dimension: int | None, taken: range, leading: int
) -> ExpectedBox:
    """The box of the elements `taken` along a dimension; of all elements if it is None."""
    # In bits: an F4 is half a byte.
    if dimension is None:
        place, part = range(prod(shape) * bits // 8), shape
    else:
        step = prod(shape[dimension + 1 :]) * bits
        place = range(taken.start * step // 8, taken.stop * step // 8)
        part = (*shape[:dimension], len(taken), *shape[dimension + 1 :])
    if not leading:
        return ExpectedBox(part, place, range(1))
    if dimension:
        return ExpectedBox(part, range(prod(shape[:leading])), place)
    each = prod(shape[1:leading])
    rows = range(prod(shape[:leading])) if dimension is None else range(taken.start * each, taken.stop * each)
    return ExpectedBox(part, rows, range(compute_row_size(shape, bits, leading)))


def flatten_box(box: ExpectedBox) -> ExpectedBox:
    """The same bytes as a part whose last two dimensions are one."""
    return box._replace(shape=(*box.shape[:-2], prod(box.shape[-2:])))


def compute_row_size(shape: tuple[int, ...], bits: int, leading: int) -> int:
    """The bytes of a row of a tensor whose first `leading` dimensions make the rows; 1 if each byte is a row."""
    return prod(shape[leading:]) * bits // 8 if leading else 1


def split_dimension(split: Split, length: int, parts: int, index: int) -> list[range]:
    """The ranges of part `index` of `parts` of a dimension, in elements: one; with packed rows, one in each half. In
    blocks, each part is as many whole ones, up to the end of the dimension.
    """
    if IN_BLOCKS in split.text:
        block = int(split.text.partition(IN_BLOCKS)[2])
        most = -(-length // (block * parts)) * block
        return [range(min(index * most, length), min((index + 1) * most, length))]
    halves = 2 if split.is_packed and parts > 1 else 1  # a single part has both halves, back to back
    half = length // halves
    part = range(index * half // parts, (index + 1) * half // parts)
    return [range(part.start + number * half, part.stop + number * half) for number in range(halves)]


def cover_with_blocks(part: range, block: int) -> range:
    """The blocks that a range of a weight touches."""
    return range(part.start // block, -(-part.stop // block))
