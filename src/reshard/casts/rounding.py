"""Numpy kernel that rounds F32 and F16 values to BF16: pure arithmetic on the bits of arrays, in constant memory."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.code_tables import HalfArray
from reshard.casts.kernels import TILE_ELEMENTS, split_rows_by_size

FLOAT_DTYPES = {"F32": np.float32, "F16": np.float16}
"""The dtypes that are rounded to BF16, as numpy has them."""

INFINITE_BITS = 0x7F800000
"""Infinity in float32, without its sign; larger patterns are NaN."""

BF16_NAN = 0x7FC0
"""The one BF16 NaN that is written, whatever NaN was read."""


def round_floats(values: NDArray[Any], out: HalfArray) -> None:
    """Rounds float32 or float16 values [rows, columns] into BF16 bit patterns [rows, columns], ties to even.

    Finite values beyond the range become infinite, as the rule of rounding has it; minus zero and infinities stay, and
    every NaN becomes 0x7FC0. A float16 is a float32 exactly, so it is rounded once.
    """
    for band in split_rows_by_size(values.shape, TILE_ELEMENTS):
        for start in range(0, values.shape[1], TILE_ELEMENTS):
            columns = slice(start, start + TILE_ELEMENTS)
            with np.errstate(invalid="ignore"):  # a signalling NaN of float16
                bits = values[band, columns].astype(np.float32, copy=False).view(np.uint32)
            odd = np.right_shift(bits, 16)
            odd &= 1
            odd += bits
            odd += 0x7FFF
            odd >>= 16
            out[band, columns] = odd
            is_nan = np.bitwise_and(bits, 0x7FFFFFFF) > INFINITE_BITS
            if is_nan.any():
                np.copyto(out[band, columns], np.uint16(BF16_NAN), where=is_nan)
