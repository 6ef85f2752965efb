"""Reference casts in plain numpy arithmetic, to compare a target with. Shares no code with `casts`."""

from functools import cache
from math import lcm
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.formats.safetensors import BITS
from reshard.verification.chunks import CastWeight

FP4_CODE_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each code. Code 8 is minus zero, of which DeepSeek's script makes plus zero."""

FP4_CODE_VALUES_F32 = np.array(FP4_CODE_VALUES, np.float32)

CAST_CHUNK = 128 << 10
"""In elements: so many are cast at once, so that numpy's intermediate arrays stay in the processor's cache."""

TileBytes = NDArray[np.uint8]


class CastTile(NamedTuple):
    """A tile after the cast, as rows of bytes."""

    weight: TileBytes
    scale: TileBytes
    """Empty if the weight has no scale after the cast."""
    inexact: int
    """The number of values that were rounded in a cast that is usually exact."""


def cast_tile(recast: CastWeight, weight: TileBytes, scale: TileBytes | None) -> CastTile:
    """Casts a tile, in chunks of columns. `weight` and `scale` are [rows, bytes] of the tile and its scales; the tile
    begins with a block.
    """
    bits = 4 if recast.weight.dtype == "I8" else BITS[recast.weight.dtype]
    least = lcm(recast.block[1], recast.new_block[1])
    step = max(1, CAST_CHUNK // weight.shape[0] // least) * least
    columns = weight.shape[1] * 8 // bits
    found = []
    for left in range(0, columns, step):
        part = weight[:, left * bits // 8 : (left + step) * bits // 8]
        scales = scale
        if scale is not None and recast.scale:
            size = BITS[recast.scale.dtype] // 8
            scales = scale[:, left // recast.block[1] * size : -(-(left + step) // recast.block[1]) * size]
        found.append(cast_tile_chunk(recast, part, scales))
    if len(found) == 1:
        return found[0]
    weights, scaling, inexact = zip(*found, strict=True)
    return CastTile(np.concatenate(weights, axis=1), np.concatenate(scaling, axis=1), sum(inexact))


def cast_tile_chunk(recast: CastWeight, weight: TileBytes, scale: TileBytes | None) -> CastTile:
    """Casts some whole blocks of columns of a tile."""
    if recast.conversion == "round":
        return round_chunk(recast, weight)
    if recast.conversion == "dequantize":
        return dequantize_chunk(recast, weight, scale)
    if recast.conversion == "fp4-to-fp8":
        return cast_fp4_chunk_to_fp8(recast, weight, scale)
    values = np.ascontiguousarray(weight).view(np.uint16)
    scales = compute_amax_scales(values, recast.new_block, is_power=recast.conversion == "quantize-ue8m0")
    with np.errstate(all="ignore"):
        quotients = widen_bf16(values) / repeat_blocks(scales, recast.new_block, values.shape)
    return CastTile(round_to_fp8(quotients), scales.view(np.uint8), 0)


def round_chunk(recast: CastWeight, weight: TileBytes) -> CastTile:
    """Rounds each F32 or F16 value to the nearest BF16. An F16 becomes float32 first, which is exact."""
    rows = np.ascontiguousarray(weight)
    if recast.weight.dtype == "F16":
        with np.errstate(invalid="ignore"):
            values = rows.view(np.float16).astype(np.float32)
    else:
        values = rows.view(np.float32)
    return CastTile(round_to_bf16(values).view(np.uint8), np.empty((0, 0), np.uint8), 0)


def dequantize_chunk(recast: CastWeight, weight: TileBytes, scale: TileBytes | None) -> CastTile:
    """Multiplies each value by its scale in float32 and rounds to the nearest BF16."""
    is_fp4 = recast.weight.dtype == "I8"
    values = np.take(FP4_CODE_VALUES_F32, unpack_fp4_codes(weight)) if is_fp4 else np.take(compute_fp8_values(), weight)
    scales = (
        decode_block_scales(np.ascontiguousarray(scale), recast.scale.dtype)
        if scale is not None and recast.scale
        else np.ones((1, 1))
    )
    with np.errstate(all="ignore"):
        products = values * repeat_blocks(scales, recast.block, values.shape)
    return CastTile(
        round_to_bf16(products.astype(np.float32, copy=False)).view(np.uint8), np.empty((0, 0), np.uint8), 0
    )


def cast_fp4_chunk_to_fp8(recast: CastWeight, weight: TileBytes, groups: TileBytes | None) -> CastTile:
    """The new scale of a block is 1/64 of the largest scale of its groups; values stay equal or are rounded."""
    if groups is None:
        raise ValueError(f"{recast.weight.name} has no scale")
    block = recast.new_block[0], recast.new_block[1] // FP4_GROUP_COLUMNS
    largest = compute_block_maxima(groups, block)
    scales = np.where(largest == E8M0_NAN, E8M0_NAN, np.maximum(largest, 6) - 6).astype(np.uint8)
    raised = groups.astype(np.intp) - repeat_blocks(scales, block, groups.shape) + 255
    pairs, misses = tabulate_fp4_pairs()
    in_byte = 1, FP4_GROUP_COLUMNS // 2
    places = repeat_blocks(raised * 256, in_byte, weight.shape) + weight
    made = np.take(pairs, places).view(np.uint8)
    is_nan = groups == E8M0_NAN
    if np.any(is_nan):
        made[repeat_blocks(is_nan, (1, FP4_GROUP_COLUMNS), made.shape)] = 127
    is_missed = np.any(misses, axis=1)[raised]
    inexact = int(np.take(misses, places).sum()) if np.any(is_missed) else 0
    return CastTile(made, scales, inexact)


Bf16Bits = NDArray[np.uint16]

Float32Rows = NDArray[np.float32]

E8M0_NAN = 255
"""In F8_E8M0."""

LARGEST_FP8_CODE = 126
"""The F8_E4M3 code of 448, the largest value; 127 is NaN."""

BF16_NAN = 0x7FC0
"""The BF16 bit pattern that is written for every NaN."""

SCALE_ONE_BYTES = {"F32": b"\x00\x00\x80\x3f", "BF16": b"\x80\x3f", "F8_E8M0": b"\x7f"}
"""The bytes of a scale of 1 by dtype: the padding of scales."""

FP4_GROUP_COLUMNS = 32
"""Columns of FP4 that share a scale, in elements."""


def repeat_blocks(values: NDArray[Any], block: tuple[int, int], shape: tuple[int, int]) -> NDArray[Any]:
    """Repeats the value of each block for each element of a matrix of `shape` that begins with a block."""
    rows = np.repeat(values, block[0], axis=0)[: shape[0]] if block[0] > 1 else values
    return np.repeat(rows, block[1], axis=1)[:, : shape[1]] if block[1] > 1 else rows


@cache
def compute_fp8_values() -> Float32Rows:
    """The values of the 256 codes of F8_E4M3: a sign, four bits of exponent, three of fraction."""
    values = []
    for code in range(256):
        exponent, fraction = code >> 3 & 15, code & 7
        size = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
        values.append((-1.0 if code & 128 else 1.0) * (size if code & 127 != 127 else float("nan")))
    return np.array(values, np.float32)


def unpack_fp4_codes(packed: TileBytes) -> TileBytes:
    """The codes [rows, columns] of [rows, columns / 2] bytes: the even column is in the low half."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)


def decode_block_scales(raw: TileBytes, dtype: str) -> Float32Rows:
    """Block scales as float32, from their bytes."""
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "BF16":
        return widen_bf16(raw.view(np.uint16))
    with np.errstate(over="ignore"):  # by code 255, which is NaN
        values = np.ldexp(np.float32(1), raw.astype(np.int32) - 127).astype(np.float32)
    values[raw == E8M0_NAN] = np.nan
    return values


def widen_bf16(values: Bf16Bits) -> Float32Rows:
    """Widens BF16 bit patterns to float32."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(values: Float32Rows) -> Bf16Bits:
    """Rounds to BF16 bit patterns, ties to even."""
    bits = values.view(np.uint32)
    upper = bits >> 16
    is_above = (bits & 0xFFFF) > 0x8000 - (upper & 1)
    words = upper.astype(np.uint16)
    words += is_above
    words[np.isnan(values)] = BF16_NAN
    return words


def round_to_fp8(values: Float32Rows) -> TileBytes:
    """Rounds to F8_E4M3 codes, ties to even; values beyond 448 become 448, NaN becomes code 127."""
    bits = values.view(np.uint32)
    # A value of exponent e lies between multiples of 2^(e - 3); below 2^-6 these get no finer, and 448 is below 2^9.
    exponents = np.clip((bits >> 23 & 0xFF).astype(np.int32) - 127, -6, 8)
    powers = ((127 + 3 - exponents) << 23).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.rint(np.abs(values) * powers) + ((exponents + 6) * 8).astype(np.float32)
        codes: TileBytes = np.minimum(steps, np.float32(LARGEST_FP8_CODE)).astype(np.uint8)
    codes |= (bits >> 24 & 0x80).astype(np.uint8)
    codes[np.isnan(values)] = 127
    return codes


@cache
def tabulate_fp4_as_fp8() -> tuple[TileBytes, NDArray[np.bool_]]:
    """The nearest F8_E4M3 code of each FP4 code times 2^(n - 255), [512, 16], and whether it is not exact."""
    exact = np.array(FP4_CODE_VALUES) * np.ldexp(1.0, np.minimum(np.arange(512) - 255, 100))[:, None]
    # A value too small for float32 is zero in FP8 too; `exact` still tells that it was no zero.
    codes = round_to_fp8(exact.astype(np.float32))
    return codes, compute_fp8_values()[codes] != exact


@cache
def tabulate_fp4_pairs() -> tuple[Bf16Bits, NDArray[np.intp]]:
    """The same for the two codes in a byte, [512, 256]: both codes as a word, and how many of them are not exact."""
    codes, misses = tabulate_fp4_as_fp8()
    low, high = np.arange(256) & 15, np.arange(256) >> 4
    pairs = np.stack([codes[:, low], codes[:, high]], axis=-1).view(np.uint16)[..., 0]
    return pairs, misses[:, low].astype(np.intp) + misses[:, high]


def compute_block_maxima(values: NDArray[Any], block: tuple[int, int]) -> NDArray[Any]:
    """The largest value of each block of a matrix that begins with a block."""
    rows, columns = (range(0, length, side) for length, side in zip(values.shape, block, strict=True))
    found = [[values[row : row + block[0], column : column + block[1]].max() for column in columns] for row in rows]
    return np.array(found, values.dtype)


def compute_amax_scales(values: Bf16Bits, block: tuple[int, int], *, is_power: bool) -> Float32Rows:
    """The scale of each block of BF16 values: the largest magnitude / 448 in float32; with `is_power`, rounded up to a
    power of two, at least 2^-127. 1 for a block of zeros.
    """
    largest = widen_bf16(compute_block_maxima(values & np.uint16(0x7FFF), block))
    scales = np.where(largest == 0, np.float32(1), largest / np.float32(448)).astype(np.float32)
    if is_power:
        fractions, exponents = np.frexp(scales)
        scales = np.ldexp(np.float32(1), np.maximum(exponents - (fractions == 0.5), -127)).astype(np.float32)
    return scales


def find_powers_of_two(values: Float32Rows) -> NDArray[np.bool_]:
    """Whether each of some positive numbers is a power of two."""
    return np.asarray(np.frexp(values)[0] == 0.5)
