"""What codes are worth and which code is nearest, for verify: plain arithmetic, nothing of what casts are made with."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
Floats = NDArray[np.float32]

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""By code. Of code 8, which is minus zero, DeepSeek's script makes plus zero."""
NAN = 255
"""In F8_E8M0."""
LARGEST = 126
"""The F8_E4M3 code of 448, the largest; 127 is no number."""
QUIET = 0x7FC0
"""The one BF16 that we write for what is no number."""
ONES = {"F32": b"\x00\x00\x80\x3f", "BF16": b"\x80\x3f", "F8_E8M0": b"\x7f"}
"""A scale of 1, of which the padding of scales consists."""
GROUP = 32
"""Columns of FP4 that share a scale."""


def spread(values: NDArray[Any], block: tuple[int, int], shape: tuple[int, int]) -> NDArray[Any]:
    """What there is for each block, for each element of a matrix that begins with a block."""
    rows = np.repeat(values, block[0], axis=0)[: shape[0]] if block[0] > 1 else values
    return np.repeat(rows, block[1], axis=1)[:, : shape[1]] if block[1] > 1 else rows


@cache
def fp8_values() -> Floats:
    """Of the 256 codes of F8_E4M3: a sign, four bits of exponent, three of fraction."""
    values = []
    for code in range(256):
        exponent, fraction = code >> 3 & 15, code & 7
        size = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
        values.append((-1.0 if code & 128 else 1.0) * (size if code & 127 != 127 else float("nan")))
    return np.array(values, np.float32)


def fp4_codes(packed: Bytes) -> Bytes:
    """The codes [rows, columns] of [rows, columns / 2] bytes: the even column is in the low half."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)


def scale_values(raw: Bytes, dtype: str) -> Floats:
    """Block scales in float32, from the bytes of rows of them."""
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "BF16":
        return wide(raw.view(np.uint16))
    with np.errstate(over="ignore"):  # of 255, which is no number
        values = np.ldexp(np.float32(1), raw.astype(np.int32) - 127).astype(np.float32)
    values[raw == NAN] = np.nan
    return values


def wide(values: Words) -> Floats:
    """BF16 bit patterns as float32."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def nearest_bf16(values: Floats) -> Words:
    """The bit patterns of the nearest BF16, of two as near the even one."""
    bits = values.view(np.uint32)
    upper = bits >> 16
    is_above = (bits & 0xFFFF) > 0x8000 - (upper & 1)
    words = upper.astype(np.uint16)
    words += is_above
    words[np.isnan(values)] = QUIET
    return words


def nearest_fp8(values: Floats) -> Bytes:
    """The nearest F8_E4M3 codes, of two as near the even one, 448 beyond it, and 127 for what is no number."""
    bits = values.view(np.uint32)
    # A value of exponent e lies between multiples of 2^(e - 3); below 2^-6 these get no finer, and 448 is below 2^9.
    exponents = np.clip((bits >> 23 & 0xFF).astype(np.int32) - 127, -6, 8)
    powers = ((127 + 3 - exponents) << 23).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.rint(np.abs(values) * powers) + ((exponents + 6) * 8).astype(np.float32)
        codes: Bytes = np.minimum(steps, np.float32(LARGEST)).astype(np.uint8)
    codes |= (bits >> 24 & 0x80).astype(np.uint8)
    codes[np.isnan(values)] = 127
    return codes


@cache
def fp4_as_fp8() -> tuple[Bytes, NDArray[np.bool_]]:
    """The nearest F8_E4M3 code of each FP4 code times 2^(n - 255), [512, 16], and whether it is not exact."""
    exact = np.array(FP4) * np.ldexp(1.0, np.minimum(np.arange(512) - 255, 100))[:, None]
    # What float32 would round to zero is still no zero here, and rounds to the same code.
    codes = nearest_fp8(exact.astype(np.float32))
    return codes, fp8_values()[codes] != exact


@cache
def fp4_pairs() -> tuple[Words, NDArray[np.intp]]:
    """The same for both codes in a byte, [512, 256]: the two codes as a word, and how many of them are not exact."""
    codes, misses = fp4_as_fp8()
    low, high = np.arange(256) & 15, np.arange(256) >> 4
    pairs = np.stack([codes[:, low], codes[:, high]], axis=-1).view(np.uint16)[..., 0]
    return pairs, misses[:, low].astype(np.intp) + misses[:, high]


def block_maxima(values: NDArray[Any], block: tuple[int, int]) -> NDArray[Any]:
    """The largest value of each block of a matrix that begins with one."""
    rows, columns = (range(0, length, side) for length, side in zip(values.shape, block, strict=True))
    found = [[values[row : row + block[0], column : column + block[1]].max() for column in columns] for row in rows]
    return np.array(found, values.dtype)


def amax_scales(values: Words, block: tuple[int, int], *, is_power: bool) -> Floats:
    """The scale of each block of BF16: its largest magnitude over 448 in float32; or the least power of two that is not
    below that, nor below 2^-127. 1 where all is zero.
    """
    largest = wide(block_maxima(values & np.uint16(0x7FFF), block))
    scales = np.where(largest == 0, np.float32(1), largest / np.float32(448)).astype(np.float32)
    if is_power:
        fractions, exponents = np.frexp(scales)
        scales = np.ldexp(np.float32(1), np.maximum(exponents - (fractions == 0.5), -127)).astype(np.float32)
    return scales


def powers_of_two(values: Floats) -> NDArray[np.bool_]:
    """Of positive numbers, which are powers of two."""
    return np.asarray(np.frexp(values)[0] == 0.5)
