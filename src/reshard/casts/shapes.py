"""Shapes of weights and block scales in elements, and as matrices of rows and columns."""

from collections.abc import Sequence
from math import prod

from reshard.types import Cast, Packed, Tensor

TRANSPOSED = ("awq", "gptq", "gptq-v2", "mxfp4-experts")
"""Packings whose codes lie column by column of the weight: a few rows of it are a little of everything."""

BLOCKED = ("fp8", "mxfp4")
"""Packings that a block of scales describes, as those of casts of other weights."""

ROWS_TOGETHER = 32
"""Rows of a weight of TRANSPOSED that are taken out of the codes together: as many share bytes or a scale."""

STRIP_SIZE = 32 << 20
"""In bytes, of the codes of a strip: most weights are one."""


def takes_strips(cast: Cast) -> bool:
    """Whether a cast takes strips of rows out of codes that lie column by column."""
    return cast.packed is not None and cast.packed.packing in TRANSPOSED


def is_in_blocks(cast: Cast) -> bool:
    """Whether blocks of scales describe the weight of a cast."""
    return cast.packed is None or cast.packed.packing in BLOCKED


def unpack_shape(tensor: Tensor, *, is_packed: bool = True) -> tuple[int, ...]:
    """The shape of a weight in elements. Where FP4 is packed, as I8, each byte has two elements of a row."""
    is_doubled = is_packed and tensor.dtype == "I8" and tensor.shape
    return (*tensor.shape[:-1], 2 * tensor.shape[-1]) if is_doubled else tensor.shape


def count_blocks(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the block scales of a weight [rows, columns]: one a block; the last of a row or column may be
    smaller.
    """
    return tuple(-(-length // side) for length, side in zip(shape, block, strict=False))


def flatten_to_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A shape as rows and columns: a vector is one row; leading dimensions are rows."""
    return prod(shape[:-1]), shape[-1] if shape else 1


def unpack_weight_shape(cast: Cast) -> tuple[int, ...]:
    """The shape of the weight of a cast, in elements. What is only padded is never packed."""
    if cast.packed:
        return cast.packed.result.shape
    return unpack_shape(cast.weight, is_packed=cast.operation != "pad")


def compute_unpadded_shape(cast: Cast) -> tuple[int, int]:
    """Rows and columns of the result of a cast without its padding."""
    rows, columns = flatten_to_matrix(unpack_weight_shape(cast))
    if not cast.is_scale or cast.operation == "pad":
        return rows, columns
    height, width = count_blocks((rows, columns), cast.new_block)
    return height, width


def count_strip_rows(packed: Packed) -> int:
    """The number of rows in a strip of a weight, or of each of several experts."""
    rows, columns = packed.result.shape[-2:]
    most = STRIP_SIZE * 8 // (columns * packed.bits) // ROWS_TOGETHER * ROWS_TOGETHER
    return max(ROWS_TOGETHER, min(most, rows))
