"""Measures how far the elements of two arrays differ: in bits, in absolute and in relative value. Opens no file.

Values are compared as float64, which is exact for every dtype except large 64-bit integers; their differences are
computed as integers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.code_tables import fp8_values, scales_as_float32
from reshard.formats.safetensors import BITS

Bytes = NDArray[np.uint8]

Array = NDArray[Any]

Floats = NDArray[np.float64]

CHUNK = 1 << 16
"""In bytes: so many are compared at once, so that intermediate arrays stay in the processor's cache."""

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
"""The dtypes that numpy has."""

FLOATS_OF_8_BITS = {"F8_E5M2": (5, 15), "F8_E4M3FNUZ": (4, 8), "F8_E5M2FNUZ": (5, 16)}
"""The bits of the exponent, and its bias."""


@dataclass(frozen=True, slots=True)
class Apart:
    """How far elements differ. Elements with equal bits are equal, NaNs too; 0 and -0 differ, by 0."""

    different: int
    """The number of elements whose bits differ. All other fields are about these elements only."""
    first: int
    """The index of the first, in row-major order."""
    last: int
    nans: tuple[int, int] = (0, 0)
    """The number of NaNs on each side."""
    infinite: int = 0
    """The number that are infinite on a side, and NaN on neither."""
    max_absolute: float | None = None
    """The largest absolute difference of elements that are finite on both sides, at most the largest float64; None if
    there is none, or if the values of the dtype are not known."""
    max_relative: float | None = None
    """The largest difference divided by the larger magnitude of the two elements: from 0 to 2."""


def elements_in(size: int, dtype: str) -> int:
    """The number of elements in `size` bytes; dtypes of 6 bits are compared byte by byte."""
    return size if BITS[dtype] == 6 else size * 8 // BITS[dtype]


def measure(one: Bytes, other: Bytes, dtype: str, start: int) -> Apart | None:
    """Measures how far two arrays of bytes differ as elements of a dtype; the first element has the index `start`. None
    if they are equal.
    """
    found = None
    # Dtypes of few bits have few pairs of codes: pairs are counted, and each is measured once.
    pairs = np.zeros((1 << BITS[dtype], 1 << BITS[dtype]), np.int64) if BITS[dtype] in (4, 8) else None
    for begin in range(0, len(one), CHUNK):
        x, y = (codes_of(side[begin : begin + CHUNK], dtype) for side in (one, other))
        wrong = x != y
        count = int(np.count_nonzero(wrong))
        if not count:
            continue
        first = start + elements_in(begin, dtype)
        apart = Apart(count, first + int(wrong.argmax()), first + len(wrong) - 1 - int(wrong[::-1].argmax()))
        if pairs is not None:
            pairs += pairs_in(x, y, len(pairs))
        elif BITS[dtype] != 6:
            few = 2 * count <= len(wrong)
            apart = with_numbers(apart, x[wrong] if few else x, y[wrong] if few else y, None, dtype)
        found = merged(found, apart)
    return found if found is None or pairs is None else with_pairs(found, pairs, dtype)


def pairs_in(x: Array, y: Array, codes: int) -> Array:
    """Counts [codes, codes] how often each code of one side lies opposite each code of the other."""
    return np.bincount(x * np.intp(codes) + y, minlength=codes * codes).reshape(codes, codes)


def with_pairs(apart: Apart, pairs: Array, dtype: str) -> Apart:
    """Adds the measures of the values, from counted pairs of codes."""
    x, y = (codes.astype(np.uint8) for codes in np.nonzero(pairs))
    return with_numbers(apart, x, y, pairs[x, y], dtype)


def merged(one: Apart | None, other: Apart) -> Apart:
    """Merges the measures of two byte ranges."""
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


def with_numbers(apart: Apart, x: Array, y: Array, times: Array | None, dtype: str) -> Apart:
    """Adds the measures of the values of elements with the bits `x` and `y`; `times` is how often each occurs. Equal
    elements do not count.
    """
    with np.errstate(all="ignore"):
        one, other = numbers_of(x, dtype), numbers_of(y, dtype)
        absolute = distances(x, y, one, other, dtype)
        if np.isfinite(absolute.max()):  # nearly always; then there are no NaNs and infinities to leave out
            return replace(apart, max_absolute=float(absolute.max()), max_relative=largest(absolute, one, other))
        nans = np.isnan(one), np.isnan(other)
        finite = np.isfinite(one) & np.isfinite(other)
        apart = replace(
            apart,
            nans=(total(nans[0] & (x != y), times), total(nans[1] & (x != y), times)),
            infinite=total(~(finite | nans[0] | nans[1]) & (x != y), times),
        )
        if not np.any(finite & (x != y)):
            return apart
        one, other, absolute = one[finite], other[finite], absolute[finite]
        largest_of_all = min(float(absolute.max()), LARGEST)
        return replace(apart, max_absolute=largest_of_all, max_relative=largest(absolute, one, other))


def total(chosen: Array, times: Array | None) -> int:
    return int(np.count_nonzero(chosen) if times is None else times[chosen].sum())


def distances(x: Array, y: Array, one: Array, other: Array, dtype: str) -> Floats:
    """The absolute differences of values with the bits `x` and `y`. Infinite where float64 overflows."""
    if dtype in ("I64", "U64"):
        is_more = x.view(NATIVE[dtype]) > y.view(NATIVE[dtype])
        return np.where(is_more, x - y, y - x).astype(np.float64)  # modulo 2^64: never overflows
    return np.asarray(np.abs(one - other), np.float64)


def largest(absolute: Floats, one: Array, other: Array) -> float:
    """The largest difference divided by the larger magnitude; 0 where both values are 0."""
    larger = np.maximum(np.abs(one), np.abs(other))
    relative = absolute / larger
    beyond = np.isinf(absolute)
    if beyond.any():
        relative[beyond] = np.abs(one[beyond] / larger[beyond] - other[beyond] / larger[beyond])
    return float(np.fmax.reduce(relative, initial=0))  # passes over 0 / 0


def numbers_of(codes: Array, dtype: str) -> Array:
    """The values of elements in float64; in complex128 for C64."""
    if dtype in NATIVE:
        numbers: Array = codes.view(NATIVE[dtype]).astype(np.complex128 if dtype == "C64" else np.float64)
        return numbers
    if dtype == "BF16":
        return scales_as_float32(codes, dtype).astype(np.float64)
    return np.take(table_of(dtype), codes)


@cache
def table_of(dtype: str) -> Floats:
    """The values of all codes of a dtype of at most 8 bits."""
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
