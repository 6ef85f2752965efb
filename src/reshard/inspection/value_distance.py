"""Measures how far the elements of two arrays differ: in bits, in absolute and in relative value. Opens no file.

Values are compared as float64, which is exact for every dtype except large 64-bit integers; their differences are
computed as integers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.casts.code_tables import decode_scales, make_fp8_values
from reshard.formats.safetensors import BITS
from reshard.inspection.value_sums import (
    LARGEST_FLOAT64,
    PieceSums,
    ValueSums,
    add_sums,
    compute_value_sums,
    join_pieces,
)

ValueBytes = NDArray[np.uint8]

AnyArray = NDArray[Any]

Float64s = NDArray[np.float64]

MEASURED_ELEMENTS = 1 << 14
"""So many are compared at once, so that intermediate arrays of float64 stay in the processor's cache."""

MEASURED_CODES = 1 << 17
"""In bytes: so many codes of 4 or 8 bits are counted at once."""

NATIVE_DTYPES: Mapping[str, Any] = {
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

SIGNED_FLOATS = ("BF16", "F16", "F32", "F64")
"""The dtypes of more than 8 bits whose first bit is the sign of a number."""


@dataclass(frozen=True, slots=True)
class ValueDistance:
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


def count_elements(size: int, dtype: str) -> int:
    """The number of elements in `size` bytes; dtypes of 6 bits are compared byte by byte."""
    return size if BITS[dtype] == 6 else size * 8 // BITS[dtype]


class RangeDistance(NamedTuple):
    """The measures of a byte range of two tensors."""

    apart: ValueDistance | None
    """None if both are equal."""
    sums: ValueSums


def measure_range(one: ValueBytes, other: ValueBytes, dtype: str, start: int) -> RangeDistance:
    """Measures how far two arrays of bytes differ as elements of a dtype; the first element has the index `start`."""
    found, pieces = None, []
    # Dtypes of few bits have few pairs of codes: pairs are counted, and each is measured once.
    pairs = np.zeros((1 << BITS[dtype], 1 << BITS[dtype]), np.int64) if BITS[dtype] in (4, 8) else None
    chunk = MEASURED_CODES if pairs is not None else MEASURED_ELEMENTS * max(BITS[dtype] // 8, 1)
    for begin in range(0, len(one), chunk):
        x, y = (view_codes(side[begin : begin + chunk], dtype) for side in (one, other))
        apart = find_differing_elements(x, y, start + count_elements(begin, dtype), found)
        if pairs is not None:
            pairs += count_code_pairs(x, y, len(pairs))
        elif BITS[dtype] != 6:
            apart, sums = measure_values(apart, x, y, None, dtype)
            pieces.append(sums)
        found = merge_distances(found, apart)
    if pairs is not None:
        x, y = (codes.astype(np.uint8) for codes in np.nonzero(pairs))
        found, sums = measure_values(found, x, y, pairs[x, y], dtype)
        pieces.append(sums)
    return RangeDistance(found, join_pieces(pieces) if pieces else ValueSums())


def find_differing_elements(x: AnyArray, y: AnyArray, start: int, before: ValueDistance | None) -> ValueDistance | None:
    """Counts the elements whose bits differ, and finds the first and the last; None if there is none. Takes over the
    largest relative difference that was found `before`.
    """
    wrong = x != y
    count = int(np.count_nonzero(wrong))
    if not count:
        return None
    first, last = int(wrong.argmax()), len(wrong) - 1 - int(wrong[::-1].argmax())
    return ValueDistance(count, start + first, start + last, max_relative=before.max_relative if before else None)


def count_code_pairs(x: AnyArray, y: AnyArray, codes: int) -> AnyArray:
    """Counts [codes, codes] how often each code of one side lies opposite each code of the other."""
    both = x.astype(np.uint16)
    both *= np.uint16(codes)
    both += y
    return np.bincount(both, minlength=codes * codes).reshape(codes, codes)


def merge_distances(one: ValueDistance | None, other: ValueDistance | None) -> ValueDistance | None:
    """Merges the measures of two byte ranges."""
    if one is None or other is None:
        return one or other
    return ValueDistance(
        one.different + other.different,
        min(one.first, other.first),
        max(one.last, other.last),
        (one.nans[0] + other.nans[0], one.nans[1] + other.nans[1]),
        one.infinite + other.infinite,
        choose_larger(one.max_absolute, other.max_absolute),
        choose_larger(one.max_relative, other.max_relative),
    )


def merge_ranges(one: RangeDistance, other: RangeDistance) -> RangeDistance:
    """Merges all measures of two byte ranges."""
    return RangeDistance(merge_distances(one.apart, other.apart), add_sums((one.sums, other.sums)))


def choose_larger(one: float | None, other: float | None) -> float | None:
    return max((value for value in (one, other) if value is not None), default=None)


def view_codes(data: ValueBytes, dtype: str) -> AnyArray:
    """The bits of each element as an unsigned integer."""
    if dtype == "F4":
        return np.stack([data & 15, data >> 4], axis=-1).reshape(-1)
    return data if BITS[dtype] < 16 else data.view(f"u{BITS[dtype] // 8}")


def measure_values(
    apart: ValueDistance | None, x: AnyArray, y: AnyArray, times: AnyArray | None, dtype: str
) -> tuple[ValueDistance | None, PieceSums]:
    """Measures the values of elements with the bits `x` and `y`; `times` is how often each pair occurs. `apart` is what
    is known of those whose bits differ: None if there are none.
    """
    with np.errstate(all="ignore"):
        one = decode_values(x, dtype)
        other = one if apart is None else decode_values(y, dtype)
        absolute = compute_differences(x, y, one, other, dtype)
        sums = compute_value_sums(one, other, absolute, times, is_wide=dtype == "F64")
        if apart is None:
            return None, sums
        largest = float(absolute.max())
        if np.isfinite(largest):  # nearly always; then there are no NaNs and infinities to leave out
            relative = find_largest_relative(apart, (x, y), absolute, one, other, dtype)
            return replace(apart, max_absolute=largest, max_relative=relative), sums
        return count_unusual(apart, x != y, absolute, one, other, times), sums


def find_largest_relative(
    apart: ValueDistance,
    codes: tuple[AnyArray, AnyArray],
    absolute: Float64s,
    one: AnyArray,
    other: AnyArray,
    dtype: str,
) -> float:
    """The largest relative difference of finite values, or the one known before. Above 1 only the signs can bring it:
    then all other elements are passed over, which is faster.
    """
    known = apart.max_relative or 0
    if known >= 1 and dtype in SIGNED_FLOATS:
        turned = np.flatnonzero((codes[0] ^ codes[1]) >> (BITS[dtype] - 1))
        absolute, one, other = absolute[turned], one[turned], other[turned]
    return max(known, compute_largest_relative(absolute, one, other))


def count_unusual(
    apart: ValueDistance, wrong: AnyArray, absolute: Float64s, one: AnyArray, other: AnyArray, times: AnyArray | None
) -> ValueDistance:
    """Adds the numbers of NaNs and infinities among `wrong` elements, and the largest differences of the others."""
    nans = np.isnan(one), np.isnan(other)
    finite = np.isfinite(one) & np.isfinite(other)
    apart = replace(
        apart,
        nans=(count_chosen(nans[0] & wrong, times), count_chosen(nans[1] & wrong, times)),
        infinite=count_chosen(~(finite | nans[0] | nans[1]) & wrong, times),
    )
    if not np.any(finite & wrong):
        return apart
    one, other, absolute = one[finite], other[finite], absolute[finite]
    largest = min(float(absolute.max()), LARGEST_FLOAT64)
    relative = max(apart.max_relative or 0, compute_largest_relative(absolute, one, other))
    return replace(apart, max_absolute=largest, max_relative=relative)


def count_chosen(chosen: AnyArray, times: AnyArray | None) -> int:
    return int(np.count_nonzero(chosen) if times is None else times[chosen].sum())


def compute_differences(x: AnyArray, y: AnyArray, one: AnyArray, other: AnyArray, dtype: str) -> Float64s:
    """The absolute differences of values with the bits `x` and `y`. Infinite where float64 overflows."""
    if dtype in ("I64", "U64"):
        is_more = x.view(NATIVE_DTYPES[dtype]) > y.view(NATIVE_DTYPES[dtype])
        return np.where(is_more, x - y, y - x).astype(np.float64)  # modulo 2^64: never overflows
    return np.asarray(np.abs(one - other), np.float64)


def compute_largest_relative(absolute: Float64s, one: AnyArray, other: AnyArray) -> float:
    """The largest difference divided by the larger magnitude; 0 where both values are 0."""
    larger = np.maximum(np.abs(one), np.abs(other))
    relative = absolute / larger
    if np.isinf(absolute.max(initial=0)):
        beyond = np.isinf(absolute)
        relative[beyond] = np.abs(one[beyond] / larger[beyond] - other[beyond] / larger[beyond])
    return float(np.fmax.reduce(relative, initial=0))  # passes over 0 / 0


def decode_values(codes: AnyArray, dtype: str) -> AnyArray:
    """The values of elements in float64; in complex128 for C64."""
    if dtype in NATIVE_DTYPES:
        numbers: AnyArray = codes.view(NATIVE_DTYPES[dtype]).astype(np.complex128 if dtype == "C64" else np.float64)
        return numbers
    if dtype == "BF16":
        return decode_scales(codes, dtype).astype(np.float64)
    return np.take(tabulate_values(dtype), codes)


@cache
def tabulate_values(dtype: str) -> Float64s:
    """The values of all codes of a dtype of at most 8 bits."""
    if dtype == "F4":
        half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        return np.concatenate([half, -half])
    if dtype == "F8_E8M0":
        return decode_scales(np.arange(256, dtype=np.uint8), dtype).astype(np.float64)
    if dtype == "F8_E4M3":
        return make_fp8_values().astype(np.float64)
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
