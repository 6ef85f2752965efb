"""Measures of two whole tensors: root mean square error, relative norm, cosine, unusual values. Opens no file.

They come from sums of products, which are taken in float64 over short pieces and added exactly over the pieces. So
they are the same whatever the order in which threads finish.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]

MOST_DOTTED = 1 << 13
"""So many products are added by one call of BLAS: few enough that it starts no threads of its own."""

SMALLEST_SQUARES = 1e-250
"""A smaller sum of squares in float64 may lack squares that are no float64."""

LARGEST_FLOAT64 = float(np.finfo(np.float64).max)

NOTHING = Fraction(0)


class ValueSums(NamedTuple):
    """Sums over the elements that are finite on both sides."""

    finite: int = 0
    """The number of these elements."""
    a: Fraction = NOTHING
    """Of the squares on side A."""
    b: Fraction = NOTHING
    product: Fraction = NOTHING
    """Of the products of A and B; of the real parts of complex products, one side conjugated."""
    difference: Fraction = NOTHING
    """Of the squares of the differences."""


Sum = float | Fraction

PieceSums = tuple[int, Sum, Sum, Sum, Sum]
"""As ValueSums, of one piece of a tensor."""


@dataclass(frozen=True, slots=True)
class OverallDistance:
    """How far two tensors, or groups of tensors, are apart as a whole, over the elements finite on both sides.

    All but `finite` are None if there is no such element, or if the values of the dtype are not known.
    """

    finite: int
    """The number of elements that are finite on both sides: only these count."""
    rmse: float | None
    """sqrt(sum((a - b)^2) / finite)"""
    relative_norm: float | None
    """sqrt(sum((a - b)^2)) / sqrt(sum(a^2)); None where A is all zeros and B is not."""
    cosine: float | None
    """sum(a * b) / (sqrt(sum(a^2)) * sqrt(sum(b^2))); None where a side is all zeros."""


class Unusual(NamedTuple):
    """The number of elements without a finite value, among those that differ."""

    nans: tuple[int, int] = (0, 0)
    """Of each side."""
    infinite: int = 0
    """Infinite on a side, and NaN on neither."""

    @property
    def is_any(self) -> bool:
        """Whether there is one at all."""
        return self != Unusual()


def add_unusual(every: Iterable[Unusual]) -> Unusual:
    """Adds the numbers of several tensors."""
    found = list(every)
    a, b = (sum(one.nans[side] for one in found) for side in (0, 1))
    return Unusual((a, b), sum(one.infinite for one in found))


def add_sums(every: Iterable[ValueSums]) -> ValueSums:
    """Adds the sums of several pieces or tensors, exactly."""
    total = ValueSums()
    for sums in every:
        total = ValueSums(
            total.finite + sums.finite,
            total.a + sums.a,
            total.b + sums.b,
            total.product + sums.product,
            total.difference + sums.difference,
        )
    return total


def join_pieces(pieces: Iterable[PieceSums]) -> ValueSums:
    """Adds the sums of pieces of one tensor, exactly or rounded once."""
    counts, *columns = zip(*pieces, strict=True)
    is_scaled = any(isinstance(number, Fraction) for column in columns for number in column)
    return ValueSums(
        sum(counts),
        *(sum(map(Fraction, column), NOTHING) if is_scaled else Fraction(math.fsum(column)) for column in columns),
    )


def compute_value_sums(
    one: Values, other: Values, absolute: Values, times: Values | None, *, is_wide: bool
) -> PieceSums:
    """Sums over two arrays of values and their absolute differences; `times` is how often each pair occurs.

    `is_wide` says that squares may be too large or small for float64: then each sum is scaled. Changes no array.
    """
    counts = None if times is None else times.astype(np.float64)
    sums = compute_product_sums(one, other, absolute, counts)
    squares = (sums[0], sums[1], sums[3])
    if all(map(math.isfinite, squares)) and not (is_wide and min(squares) < SMALLEST_SQUARES):
        return (len(one) if times is None else int(times.sum()), *sums)  # nearly always
    finite = np.isfinite(one) & np.isfinite(other)
    one, other, absolute = (np.where(finite, values, 0) for values in (one, other, absolute))
    count = int(np.count_nonzero(finite) if times is None else times[finite].sum())
    if is_wide:
        dot = compute_scaled_dot
        # The difference of two finite values may be no float64, but half of it is.
        part = 1 if np.isfinite(absolute).all() else 2
        absolute = np.abs(one / part - other / part)
        return count, dot(one, one), dot(other, other), dot(one, other), dot(absolute, absolute) * part**2
    return (count, *compute_product_sums(one, other, absolute, counts))


def compute_product_sums(
    one: Values, other: Values, absolute: Values, counts: Values | None
) -> tuple[float, float, float, float]:
    """The four sums of `ValueSums`, in float64."""
    if one.dtype == np.complex128:
        one, other = one.view(np.float64), (one if other is one else other).view(np.float64)
    left, right, apart = (one, other, absolute) if counts is None else (one * counts, other * counts, absolute * counts)
    return compute_dot(left, one), compute_dot(right, other), compute_dot(left, other), compute_dot(apart, absolute)


def compute_dot(x: Values, y: Values) -> float:
    """The sum of products, of so few at once that BLAS starts no threads of its own beside ours."""
    whole = len(x) // MOST_DOTTED * MOST_DOTTED
    rows = np.matmul(x[:whole].reshape(-1, 1, MOST_DOTTED), y[:whole].reshape(-1, MOST_DOTTED, 1))
    return float(rows.sum()) + float(np.dot(x[whole:], y[whole:]))


def compute_scaled_dot(x: Values, y: Values) -> Fraction:
    """The sum of products of values of any size: both sides are scaled by a power of two to at most 1."""
    powers = [int(np.frexp(np.abs(side).max(initial=0))[1]) for side in (x, y)]
    scaled = (np.ldexp(side, -power) for side, power in zip((x, y), powers, strict=True))
    return Fraction(compute_dot(*scaled)) * Fraction(2) ** sum(powers)


def measure_overall(sums: ValueSums) -> OverallDistance:
    """The measures of a tensor or group, from its sums."""
    if not sums.finite:
        return OverallDistance(0, None, None, None)
    relative = cosine = None
    if sums.a:
        relative = take_root(sums.difference / sums.a)
    elif not sums.difference:
        relative = 0.0
    if sums.a and sums.b:
        size = min(math.sqrt(sums.product**2 / (sums.a * sums.b)), 1.0)
        cosine = size if sums.product >= 0 else -size
    return OverallDistance(sums.finite, take_root(sums.difference / sums.finite), relative, cosine)


def compute_overall_rank(overall: OverallDistance) -> float:
    """A number by which to sort: larger is more different."""
    if overall.relative_norm is None:
        return math.inf if overall.rmse else 0
    return overall.relative_norm


def take_root(value: Fraction) -> float:
    """The square root, at most the largest float64; the value itself may be larger or smaller than any float64."""
    power = (value.numerator.bit_length() - value.denominator.bit_length()) // 2
    root = Fraction(math.sqrt(value / Fraction(4) ** power)) * Fraction(2) ** power
    return float(min(root, Fraction(LARGEST_FLOAT64)))
