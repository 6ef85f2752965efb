"""Values: how far elements are apart, by their bits and as the numbers that they stand for. Pure; opens nothing.

Numbers are compared as float64, which has every value of every dtype but the larger integers of 64 bits; the
differences of those are taken exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.header import BITS
from reshard.tables import fp8_values, scales_as_float32

Bytes = NDArray[np.uint8]
Array = NDArray[Any]
Floats = NDArray[np.float64]

CHUNK = 1 << 17
"""In bytes: so much is looked at at once, so that what is made of it fits the processor's cache."""
LARGEST = float(np.finfo(np.float64).max)
NATIVE: Mapping[str, Any] = {
    "BOOL": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "C64": np.complex64,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}
"""What numpy has itself."""
FLOATS_OF_8_BITS = {"F8_E5M2": (5, 15), "F8_E4M3FNUZ": (4, 8), "F8_E5M2FNUZ": (5, 16)}
"""Bits of the exponent, and its bias."""


@dataclass(frozen=True, slots=True)
class Apart:
    """How far elements are apart. Those of the same bits are the same, NaNs too; 0 and -0 differ, by 0."""

    different: int
    """How many have other bits. All that follows is of these alone."""
    first: int
    """The place of the first, row by row."""
    last: int
    nans: tuple[int, int] = (0, 0)
    """How many are NaN on either side."""
    infinite: int = 0
    """How many are infinite on a side, and NaN on none."""
    max_absolute: float | None = None
    """Of those that are finite on both sides; None if there is none, or if no numbers are known for the dtype. Never
    more than the largest float64."""
    max_relative: float | None = None
    """The same, divided by the larger magnitude of the two: from 0 to 2."""


def elements_in(size: int, dtype: str) -> int:
    """How many elements so many bytes are; of the dtypes of 6 bits, the bytes themselves are looked at."""
    return size if BITS[dtype] == 6 else size * 8 // BITS[dtype]


def measure(one: Bytes, other: Bytes, dtype: str, start: int) -> Apart | None:
    """How far as many elements as two arrays of bytes hold are apart, the first being at the place `start`; None if
    they are the same.
    """
    found = None
    for begin in range(0, len(one), CHUNK):
        x, y = (codes_of(side[begin : begin + CHUNK], dtype) for side in (one, other))
        places = np.flatnonzero(x != y)
        if len(places):
            first = start + elements_in(begin, dtype)
            found = merged(found, measure_codes(x[places], y[places], dtype, first + places))
    return found


def merged(one: Apart | None, other: Apart) -> Apart:
    """Both together."""
    if one is None:
        return other
    return Apart(
        one.different + other.different,
        min(one.first, other.first),
        max(one.last, other.last),
        (one.nans[0] + other.nans[0], one.nans[1] + other.nans[1]),
        one.infinite + other.infinite,
        larger_of(one.max_absolute, other.max_absolute),
        larger_of(one.max_relative, other.max_relative),
    )


def larger_of(one: float | None, other: float | None) -> float | None:
    return max((value for value in (one, other) if value is not None), default=None)


def codes_of(data: Bytes, dtype: str) -> Array:
    """The bits of each element as an unsigned integer."""
    if dtype == "F4":
        return np.stack([data & 15, data >> 4], axis=-1).reshape(-1)
    return data if BITS[dtype] < 16 else data.view(f"u{BITS[dtype] // 8}")


def measure_codes(x: Array, y: Array, dtype: str, places: Array) -> Apart:
    """The same for elements that are known to have other bits, at their places."""
    ends = int(places[0]), int(places[-1])
    if BITS[dtype] == 6:
        return Apart(len(x), *ends)
    with np.errstate(all="ignore"):
        one, other = numbers_of(x, dtype), numbers_of(y, dtype)
        nans = np.isnan(one), np.isnan(other)
        finite = np.isfinite(one) & np.isfinite(other)
        infinite = np.count_nonzero(~(finite | nans[0] | nans[1]))
        absolute = distances(x[finite], y[finite], one[finite], other[finite], dtype)
        relative = relative_to(absolute, one[finite], other[finite])
    counts = int(np.count_nonzero(nans[0])), int(np.count_nonzero(nans[1]))
    if not len(absolute):
        return Apart(len(x), *ends, counts, int(infinite))
    return Apart(
        len(x), *ends, counts, int(infinite), min(float(absolute.max()), LARGEST), float(relative.max(initial=0))
    )


def distances(x: Array, y: Array, one: Array, other: Array, dtype: str) -> Floats:
    """The absolute differences of numbers, of which `x` and `y` are the bits. Infinite where float64 has none."""
    if dtype in ("I64", "U64"):
        signed = x.view(NATIVE[dtype]) > y.view(NATIVE[dtype])
        return np.where(signed, x - y, y - x).astype(np.float64)  # modulo 2^64, where every difference has its place
    return np.asarray(np.abs(one - other), np.float64)


def relative_to(absolute: Floats, one: Array, other: Array) -> Floats:
    """Differences divided by the larger of the magnitudes; 0 where both are 0."""
    larger = np.maximum(np.abs(one), np.abs(other))
    larger[larger == 0] = 1
    return np.where(np.isinf(absolute), np.abs(one / larger - other / larger), absolute / larger)


def numbers_of(codes: Array, dtype: str) -> Array:
    """What elements stand for, in float64; in complex128 for C64."""
    if dtype in NATIVE:
        return codes.view(NATIVE[dtype]).astype(np.complex128 if dtype == "C64" else np.float64)
    if dtype == "BF16":
        return scales_as_float32(codes, dtype).astype(np.float64)
    return np.take(table_of(dtype), codes)


@cache
def table_of(dtype: str) -> Floats:
    """The numbers of all codes of a dtype of at most 8 bits."""
    if dtype == "F4":
        half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        return np.concatenate([half, -half])
    if dtype == "F8_E8M0":
        return scales_as_float32(np.arange(256, dtype=np.uint8), dtype).astype(np.float64)
    if dtype == "F8_E4M3":
        return fp8_values().astype(np.float64)
    exponent, bias = FLOATS_OF_8_BITS[dtype]
    fraction = 7 - exponent
    codes = np.arange(128)
    powers, fractions = codes >> fraction, codes & ((1 << fraction) - 1)
    half = np.ldexp(np.where(powers, fractions + (1 << fraction), fractions), np.maximum(powers, 1) - bias - fraction)
    if dtype.endswith("FNUZ"):  # no infinities, and the code of -0 is the one NaN
        return np.concatenate([half, [np.nan], -half[1:]])
    half[powers == (1 << exponent) - 1] = np.nan
    half[codes == ((1 << exponent) - 1) << fraction] = np.inf
    return np.concatenate([half, -half])
