"""What a tile of a weight should have become: from the bytes of the source those of the target. Opens no file."""

from typing import NamedTuple

import numpy as np

from reshard.bands import Recast
from reshard.decode import (
    FP4,
    GROUP,
    NAN,
    Bytes,
    amax_scales,
    block_maxima,
    fp4_as_fp8,
    fp4_codes,
    fp8_values,
    nearest_bf16,
    nearest_fp8,
    scale_values,
    spread,
    wide,
)


class Made(NamedTuple):
    """What is made of a tile: rows of bytes."""

    weight: Bytes
    scale: Bytes
    """Empty if there is none any more."""
    inexact: int
    """How many values were rounded though they need not be, in a cast that is exact as a rule."""


def made_of(recast: Recast, weight: Bytes, scale: Bytes | None) -> Made:
    """`weight` and `scale` are the rows of bytes of a tile, which begins with a block, and of its scales."""
    if recast.form == "dequantize":
        return dequantized(recast, weight, scale)
    if recast.form == "fp4-to-fp8":
        return fp8_of_fp4(recast, weight, scale)
    values = weight.view(np.uint16)
    scales = amax_scales(values, recast.new_block, is_power=recast.form == "quantize-ue8m0")
    with np.errstate(all="ignore"):
        quotients = wide(values) / spread(scales, recast.new_block, values.shape)
    return Made(nearest_fp8(quotients), scales.view(np.uint8), 0)


def dequantized(recast: Recast, weight: Bytes, scale: Bytes | None) -> Made:
    """The float32 product of each code and its scale, as the nearest BF16."""
    is_fp4 = recast.weight.dtype == "I8"
    values = np.array(FP4, np.float32)[fp4_codes(weight)] if is_fp4 else fp8_values()[weight]
    scales = scale_values(scale, recast.scale.dtype) if scale is not None and recast.scale else np.ones((1, 1))
    with np.errstate(all="ignore"):
        products = values * spread(scales, recast.block, values.shape)
    return Made(nearest_bf16(products.astype(np.float32, copy=False)).view(np.uint8), np.empty((0, 0), np.uint8), 0)


def fp8_of_fp4(recast: Recast, weight: Bytes, groups: Bytes | None) -> Made:
    """The scale of a block is a 64th of the largest of its groups', and a code is worth what it was, or nearly so."""
    codes, (rows, columns) = fp4_codes(weight), recast.new_block
    if groups is None:
        raise ValueError(f"{recast.weight.name} has no scale")
    largest = block_maxima(groups, (rows, columns // GROUP))
    scales = np.where(largest == NAN, NAN, np.maximum(largest, 6) - 6).astype(np.uint8)
    raised = groups.astype(np.int16) - spread(scales, (rows, columns // GROUP), groups.shape) + 255
    places = spread(raised, (1, GROUP), codes.shape) * 16 + codes
    nearest, misses = fp4_as_fp8()
    made = nearest.reshape(-1)[places]
    made[spread(groups == NAN, (1, GROUP), codes.shape)] = 127
    return Made(made, scales, int(misses.reshape(-1)[places].sum()))
