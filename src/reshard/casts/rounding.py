"""Numpy kernel that rounds F32 and F16 values to BF16; a pure function on arrays, in constant memory."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.code_tables import FloatArray, HalfArray
from reshard.casts.kernels import TILE_ELEMENTS, split_rows_by_size

FLOAT_DTYPES = {"F32": np.float32, "F16": np.float16}
"""The dtypes that are rounded to BF16, as numpy has them."""

BF16_NAN = 0x7FC0
"""The one BF16 NaN that is written, whatever NaN was read."""


def round_floats(values: NDArray[Any], out: HalfArray) -> None:
    """Rounds float32 or float16 values [rows, columns] into BF16 bit patterns [rows, columns], ties to even.

    Finite values beyond the range become infinite, as the rule of rounding has it; minus zero and infinities stay, and
    every NaN becomes 0x7FC0. A float16 is a float32 exactly, so it is rounded once.
    """
    for rows in split_rows_by_size(values.shape, TILE_ELEMENTS):
        for start in range(0, values.shape[1], TILE_ELEMENTS):
            box = rows, slice(start, start + TILE_ELEMENTS)
            if values.dtype == np.float16:
                out[box] = np.take(round_every_f16(), values[box].view(np.uint16), mode="clip")
            else:
                round_tile(values[box], out[box])


def round_tile(values: FloatArray, out: HalfArray) -> None:
    """Rounds float32 values that fit the processor's cache, as `round_floats` does."""
    round_finite(values, np.empty(values.size, np.uint32), out)
    if values.size and np.isnan(values.max()):  # the largest is NaN if one of them is
        np.copyto(out, np.uint16(BF16_NAN), where=np.isnan(values))


def round_finite(values: FloatArray, room: NDArray[np.uint32], out: HalfArray) -> None:
    """Rounds float32 values [rows, columns], none of them NaN, to BF16; `room` has as many elements."""
    bits, raised = values.view(np.uint32), room.reshape(values.shape)
    np.right_shift(bits, 16, out=raised)
    raised &= 1
    raised += 0x7FFF
    raised += bits
    out[:] = raised.view(np.uint16)[:, 1::2]  # the upper half of each


def round_constant(value: float, dtype: str) -> bytes:
    """The bytes of a value in F32, F16 or BF16."""
    with np.errstate(over="ignore"):  # beyond the range it is infinite, as in a cast
        if dtype in FLOAT_DTYPES:
            return np.array(value, FLOAT_DTYPES[dtype]).tobytes()
        out = np.empty((1, 1), np.uint16)
        round_floats(np.full((1, 1), value, np.float32), out)
    return out.tobytes()


@cache
def round_every_f16() -> HalfArray:
    """The BF16 bit pattern [65536] for every float16: a look-up is faster than numpy's arithmetic on them."""
    out = np.empty((1, 1 << 16), np.uint16)
    with np.errstate(invalid="ignore"):  # by a signalling NaN
        round_tile(np.arange(1 << 16, dtype=np.uint16).view(np.float16)[None].astype(np.float32), out)
    return out.reshape(-1)
