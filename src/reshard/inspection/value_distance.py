"""Measures how far the elements of two arrays differ: in bits, in absolute and in relative value. Opens no file.

Values are compared as float64, which is exact for every dtype except large 64-bit integers; their differences are
computed as integers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.casts.code_tables import decode_scales, make_fp8_values
from reshard.formats.safetensors import BITS
from reshard.inspection.value_sums import (
    LARGEST_FLOAT64,
    PieceSums,
    Unusual,
    ValueSums,
    add_sums,
    compute_value_sums,
    join_pieces,
)

ValueBytes = NDArray[np.uint8]

AnyArray = NDArray[Any]

Float64s = NDArray[np.float64]

MEASURED_ELEMENTS = 1 << 15
"""So many are compared at once: few enough for intermediate arrays of float64 to stay in the processor's cache, and so
many that numpy's calls themselves cost little.
"""

LARGEST_RELATIVE = 2
"""No relative difference is larger: that of a number and its negative."""

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

    @property
    def unusual(self) -> Unusual:
        """The NaNs and infinities."""
        return Unusual(self.nans, self.infinite)


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
    meter = RangeMeter(dtype)
    # Dtypes of few bits have few pairs of codes: pairs are counted, and each is measured once.
    pairs = np.zeros((1 << BITS[dtype], 1 << BITS[dtype]), np.int64) if BITS[dtype] in (4, 8) else None
    chunk = MEASURED_CODES if pairs is not None else MEASURED_ELEMENTS * max(BITS[dtype] // 8, 1)
    with np.errstate(all="ignore"):
        for begin in range(0, len(one), chunk):
            x, y = (view_codes(side[begin : begin + chunk], dtype) for side in (one, other))
            is_apart = meter.count_differing(x, y, start + count_elements(begin, dtype))
            if pairs is not None:
                pairs += count_code_pairs(x, y, len(pairs))
            elif BITS[dtype] != 6:
                meter.measure_values(x, y, None, is_apart=is_apart)
        if pairs is not None:
            x, y = (codes.astype(np.uint8) for codes in np.nonzero(pairs))
            meter.measure_values(x, y, pairs[x, y], is_apart=meter.different > 0)
    return meter.get_result()


class RangeMeter:
    """Adds up the measures of short pieces of a byte range. Its arrays are used again for each piece: new ones would
    have to be brought into the processor's cache each time, which takes longer than to compute with them.
    """

    def __init__(self, dtype: str) -> None:
        self.different = 0
        self._dtype = dtype
        self._first = 0
        self._last: tuple[AnyArray, int] | None = None
        self._nans = (0, 0)
        self._infinite = 0
        self._largest: float | None = None
        self._relative: float | None = None
        self._pieces: list[PieceSums] = []
        self._space = tuple(np.empty(MEASURED_ELEMENTS) for _ in range(3)) if BITS[dtype] >= 16 else ()
        self._narrow = np.empty(MEASURED_ELEMENTS if dtype == "BF16" else 0, np.float32)

    def get_result(self) -> RangeDistance:
        """The measures of all pieces so far."""
        sums = join_pieces(self._pieces) if self._pieces else ValueSums()
        if self._last is None:
            return RangeDistance(None, sums)
        wrong, start = self._last
        ends = self._first, start + len(wrong) - 1 - int(wrong[::-1].argmax())
        unusual = self._nans, self._infinite
        return RangeDistance(ValueDistance(self.different, *ends, *unusual, self._largest, self._relative), sums)

    def count_differing(self, x: AnyArray, y: AnyArray, start: int) -> bool:
        """Counts the elements whose bits differ, and finds the first. Returns whether there is one."""
        wrong = x != y
        count = int(np.count_nonzero(wrong))
        if count:
            self._first = self._first if self.different else start + int(wrong.argmax())
            self._last = wrong, start  # where the last one is, is found once, at the end
            self.different += count
        return count > 0

    def measure_values(self, x: AnyArray, y: AnyArray, times: AnyArray | None, *, is_apart: bool) -> None:
        """Measures the values of elements with the bits `x` and `y`; `times` is how often each pair occurs. `is_apart`
        says whether there are different ones.
        """
        space: list[Float64s | None] = [part[: len(x)] for part in self._space] or [None] * 3
        one = self._decode(x, space[0])
        other = self._decode(y, space[1]) if is_apart else one
        absolute = compute_differences(x, y, one, other, self._dtype, space[2])
        self._pieces.append(compute_value_sums(one, other, absolute, times, is_wide=self._dtype == "F64"))
        if not is_apart:
            return
        largest = float(absolute.max())
        if not np.isfinite(largest):
            self._count_unusual(x != y, absolute, one, other, times)
            return
        # Nearly always. The decoded values are overwritten.
        self._largest = max(self._largest or 0, largest)
        if (self._relative or 0) < LARGEST_RELATIVE:
            self._relative = self._find_largest_relative(x, y, absolute, one, other, space)

    def _decode(self, codes: AnyArray, space: Float64s | None) -> AnyArray:
        """The values of elements in float64, perhaps in the array `space`; in complex128 for C64."""
        if self._dtype == "BF16" and space is not None:
            narrow = self._narrow[: len(codes)]
            bits = narrow.view(np.uint32)
            np.copyto(bits, codes)
            np.left_shift(bits, 16, out=bits)
            np.copyto(space, narrow)
            return space
        return decode_values(codes, self._dtype, space)

    def _find_largest_relative(
        self,
        x: AnyArray,
        y: AnyArray,
        absolute: Float64s,
        one: AnyArray,
        other: AnyArray,
        space: Sequence[Float64s | None],
    ) -> float:
        """The largest relative difference of finite values, or the one known before. Above 1 only the signs can bring
        it: then all other elements are passed over, which is faster.
        """
        known = self._relative or 0
        if known >= 1 and self._dtype in SIGNED_FLOATS:
            turned = np.flatnonzero((x ^ y) >= 1 << (BITS[self._dtype] - 1))
            absolute, one, other = absolute[turned], one[turned], other[turned]
            space = [None, None]
        return max(known, find_largest(compute_relative(absolute, one, other, space)))

    def _count_unusual(
        self, wrong: AnyArray, absolute: Float64s, one: AnyArray, other: AnyArray, times: AnyArray | None
    ) -> None:
        """Counts NaNs and infinities among `wrong` elements; adds the largest differences of the others."""
        nans = np.isnan(one), np.isnan(other)
        finite = np.isfinite(one) & np.isfinite(other)
        counts = [count_chosen(nan & wrong, times) for nan in nans]
        self._nans = self._nans[0] + counts[0], self._nans[1] + counts[1]
        self._infinite += count_chosen(~(finite | nans[0] | nans[1]) & wrong, times)
        if not np.any(finite & wrong):
            return
        one, other, absolute = one[finite], other[finite], absolute[finite]
        self._largest = max(self._largest or 0, min(float(absolute.max()), LARGEST_FLOAT64))
        relative = compute_relative(absolute, one, other, [None, None])
        beyond = np.isinf(absolute)
        if beyond.any():
            one, other = one[beyond], other[beyond]
            larger = np.maximum(np.abs(one), np.abs(other))
            relative[beyond] = np.abs(one / larger - other / larger)
        self._relative = max(self._relative or 0, find_largest(relative))


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


def count_chosen(chosen: AnyArray, times: AnyArray | None) -> int:
    return int(np.count_nonzero(chosen) if times is None else times[chosen].sum())


def compute_differences(
    x: AnyArray, y: AnyArray, one: AnyArray, other: AnyArray, dtype: str, space: Float64s | None
) -> Float64s:
    """The absolute differences of values with the bits `x` and `y`, perhaps in the array `space`. Infinite where they
    overflow float64.
    """
    if dtype in ("I64", "U64"):
        is_more = x.view(NATIVE_DTYPES[dtype]) > y.view(NATIVE_DTYPES[dtype])
        return np.where(is_more, x - y, y - x).astype(np.float64)  # modulo 2^64: never overflows
    if dtype == "C64":
        return np.asarray(np.abs(one - other), np.float64)
    apart = np.subtract(one, other, out=space)
    return np.abs(apart, out=apart)


def compute_relative(absolute: Float64s, one: AnyArray, other: AnyArray, space: Sequence[Float64s | None]) -> Float64s:
    """Each difference divided by the larger magnitude, perhaps in an array of `space`; NaN where both values are 0."""
    larger = np.maximum(np.abs(one, out=space[0]), np.abs(other, out=space[1]), out=space[0])
    return np.divide(absolute, larger, out=space[1])


def find_largest(relative: Float64s) -> float:
    """The largest number; 0 if there is none, and NaNs are passed over."""
    return float(np.fmax.reduce(relative, initial=0))


def decode_values(codes: AnyArray, dtype: str, space: Float64s | None = None) -> AnyArray:
    """The values of elements in float64, perhaps in the array `space`; in complex128 for C64."""
    if dtype == "F64":
        return codes.view(np.float64)
    if dtype == "C64":
        return codes.view(np.complex64).astype(np.complex128)
    if dtype in NATIVE_DTYPES:
        numbers: AnyArray = codes.view(NATIVE_DTYPES[dtype])
        if space is None:
            return numbers.astype(np.float64)
        np.copyto(space, numbers)
        return space
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
