"""Lookup tables for casts: the value of every FP8, FP4 and E8M0 code, and its code in another dtype."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

CodeArray = NDArray[np.uint8]

HalfArray = NDArray[np.uint16]

FloatArray = NDArray[np.float32]

LEAST_EXPONENT, MOST_EXPONENT = -13, 10
"""Exponents of the scale ratio, inclusive. Outside them every FP4 value becomes zero, or zero and the largest FP8."""

NAN_SCALE = 255
"""NaN in F8_E8M0."""


def decode_scales(raw: bytes | NDArray[Any], dtype: str) -> FloatArray:
    """Block scales as float32, exactly. `raw` is their bytes (the result is flat) or an array of their bit patterns.

    F8_E8M0 code e is 2^(e - 127), and 255 is NaN; code 0, 2^-127, is a subnormal of float32.
    """
    bits_of = {"F32": np.uint32, "BF16": np.uint16, "F8_E8M0": np.uint8}[dtype]
    bits = raw.view(bits_of) if isinstance(raw, np.ndarray) else np.frombuffer(raw, bits_of)
    if dtype == "F8_E8M0":
        patterns = np.arange(256, dtype=np.uint32) << 23
        patterns[[0, NAN_SCALE]] = 1 << 22, 0x7FC00000
        return np.take(patterns.view(np.float32), bits)
    return (bits.astype(np.uint32) << (16 if dtype == "BF16" else 0)).view(np.float32)


@cache
def make_fp8_values() -> FloatArray:
    """The values [256] of all F8_E4M3 codes."""
    codes = np.arange(128)
    exponents, fractions = codes >> 3, codes & 7
    values = np.ldexp(np.where(exponents, fractions + 8, fractions), np.maximum(exponents, 1) - 10).astype(np.float32)
    values[127] = np.nan
    return np.concatenate([values, -values])


@cache
def make_fp8_codes() -> CodeArray:
    """The F8_E4M3 code [65536] for the upper 16 bits of every float32.

    Rounds to nearest even, saturates at 448, and has one NaN: 0x7F.
    """
    values = decode_scales(np.arange(1 << 15, dtype=np.uint16), "BF16")
    finite = make_fp8_values()[:127]
    midpoints = (finite[1:] + finite[:-1]) / 2
    below, not_above = (np.searchsorted(midpoints, values, side) for side in ("left", "right"))
    codes = np.where(below % 2, not_above, below)  # they differ on a midpoint, where the even one is taken
    signed = np.concatenate([codes, codes | 0x80])
    signed[np.isnan(np.concatenate([values, values]))] = 0x7F
    return signed.astype(np.uint8)


@cache
def make_fp4_tables() -> tuple[HalfArray, CodeArray]:
    """For each scale ratio (page) and byte of FP4 [pages, 256]: two F8_E4M3 codes as one uint16, and how many of the
    two are not exact. The last page is for a scale that is NaN.
    """
    half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    powers = np.append(np.ldexp(np.float32(1), np.arange(LEAST_EXPONENT, MOST_EXPONENT + 1)), np.float32(np.nan))
    exact = np.concatenate([half, -half + 0]) * powers[:, None]
    codes = make_fp8_codes()[exact.view(np.uint32) >> 16]
    missed = (make_fp8_values()[codes] != exact).astype(np.uint8)
    low, high = np.arange(256) & 15, np.arange(256) >> 4
    pairs = np.stack([codes[:, low], codes[:, high]], axis=-1).view(np.uint16)[..., 0]
    return pairs, missed[:, low] + missed[:, high]


@cache
def make_products_of_powers() -> HalfArray:
    """The products [256, 256] of scales that are powers of two, by their exponents, with every F8_E4M3 code."""
    return multiply_fp8_values((np.arange(256, dtype=np.uint32) << 23).view(np.float32))


def multiply_fp8_values(scales: FloatArray) -> HalfArray:
    """Products of each float32 scale with every F8_E4M3 value: [scales, 256], as BF16 bit patterns."""
    with np.errstate(all="ignore"):
        products = scales[:, None] * make_fp8_values()
    bits = products.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(products), 0x7FC0, rounded).astype(np.uint16)


@cache
def make_fp4_products(*, keeps_minus_zero: bool) -> NDArray[np.uint32]:
    """For every F8_E8M0 scale [256] and pair of E2M1 codes [256]: both products in BF16, as one uint32 with the even
    column in its lower half.
    """
    minus_zero = -0.0 if keeps_minus_zero else 0.0
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, minus_zero, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    scales = decode_scales(np.arange(256, dtype=np.uint8), "F8_E8M0")
    with np.errstate(over="ignore", invalid="ignore"):
        bits = (scales[:, None] * values).view(np.uint32)
    halves = np.where(np.isnan(scales)[:, None], np.uint32(0x7FC0), bits >> 16).astype(np.uint32)
    pairs = np.arange(256)
    return np.asarray(halves[:, pairs & 15] | (halves[:, pairs >> 4] << 16), np.uint32)
