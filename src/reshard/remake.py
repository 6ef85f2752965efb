"""What a tile of a weight should have become: from the bytes of the source those of the target. Opens no file."""

from math import lcm
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
    fp4_codes,
    fp4_pairs,
    fp8_values,
    nearest_bf16,
    nearest_fp8,
    scale_values,
    spread,
    wide,
)
from reshard.header import BITS

FP4_VALUES = np.array(FP4, np.float32)
CHUNK = 128 << 10
"""Elements that are worked on at once: what numpy makes on the way stays in the processor's cache."""


class Made(NamedTuple):
    """What is made of a tile: rows of bytes."""

    weight: Bytes
    scale: Bytes
    """Empty if there is none any more."""
    inexact: int
    """How many values were rounded though they need not be, in a cast that is exact as a rule."""


def made_of(recast: Recast, weight: Bytes, scale: Bytes | None) -> Made:
    """`weight` and `scale` are the rows of bytes of a tile, which begins with a block, and of its scales."""
    bits = 4 if recast.weight.dtype == "I8" else BITS[recast.weight.dtype]
    least = lcm(recast.block[1], recast.new_block[1])
    step = max(1, CHUNK // weight.shape[0] // least) * least
    columns = weight.shape[1] * 8 // bits
    found = []
    for left in range(0, columns, step):
        part = weight[:, left * bits // 8 : (left + step) * bits // 8]
        scales = scale
        if scale is not None and recast.scale:
            size = BITS[recast.scale.dtype] // 8
            scales = scale[:, left // recast.block[1] * size : -(-(left + step) // recast.block[1]) * size]
        found.append(made_of_chunk(recast, part, scales))
    if len(found) == 1:
        return found[0]
    weights, scaling, inexact = zip(*found, strict=True)
    return Made(np.concatenate(weights, axis=1), np.concatenate(scaling, axis=1), sum(inexact))


def made_of_chunk(recast: Recast, weight: Bytes, scale: Bytes | None) -> Made:
    """The same for whole blocks of columns of a tile."""
    if recast.form == "dequantize":
        return dequantized(recast, weight, scale)
    if recast.form == "fp4-to-fp8":
        return fp8_of_fp4(recast, weight, scale)
    values = np.ascontiguousarray(weight).view(np.uint16)
    scales = amax_scales(values, recast.new_block, is_power=recast.form == "quantize-ue8m0")
    with np.errstate(all="ignore"):
        quotients = wide(values) / spread(scales, recast.new_block, values.shape)
    return Made(nearest_fp8(quotients), scales.view(np.uint8), 0)


def dequantized(recast: Recast, weight: Bytes, scale: Bytes | None) -> Made:
    """The float32 product of each code and its scale, as the nearest BF16."""
    is_fp4 = recast.weight.dtype == "I8"
    values = np.take(FP4_VALUES, fp4_codes(weight)) if is_fp4 else np.take(fp8_values(), weight)
    scales = (
        scale_values(np.ascontiguousarray(scale), recast.scale.dtype)
        if scale is not None and recast.scale
        else np.ones((1, 1))
    )
    with np.errstate(all="ignore"):
        products = values * spread(scales, recast.block, values.shape)
    return Made(nearest_bf16(products.astype(np.float32, copy=False)).view(np.uint8), np.empty((0, 0), np.uint8), 0)


def fp8_of_fp4(recast: Recast, weight: Bytes, groups: Bytes | None) -> Made:
    """The scale of a block is a 64th of the largest of its groups', and a code is worth what it was, or nearly so."""
    if groups is None:
        raise ValueError(f"{recast.weight.name} has no scale")
    block = recast.new_block[0], recast.new_block[1] // GROUP
    largest = block_maxima(groups, block)
    scales = np.where(largest == NAN, NAN, np.maximum(largest, 6) - 6).astype(np.uint8)
    raised = groups.astype(np.intp) - spread(scales, block, groups.shape) + 255
    pairs, misses = fp4_pairs()
    in_byte = 1, GROUP // 2
    places = spread(raised * 256, in_byte, weight.shape) + weight
    made = np.take(pairs, places).view(np.uint8)
    is_nan = groups == NAN
    if np.any(is_nan):
        made[spread(is_nan, (1, GROUP), made.shape)] = 127
    is_missed = np.any(misses, axis=1)[raised]
    inexact = int(np.take(misses, places).sum()) if np.any(is_missed) else 0
    return Made(made, scales, inexact)
