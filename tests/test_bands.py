"""How a source tensor is cut to be compared: every byte once, in small pieces; and what a sample takes of it."""

from fractions import Fraction
from itertools import pairwise
from math import floor, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.bands import BAND_SIZE, SAMPLE_SIZE, Band, Part, Whole, bands_of, spread
from reshard.types import Tensor

WIDTHS = [1, 2, 3, 448, 7168, SAMPLE_SIZE - 1, SAMPLE_SIZE + 1, BAND_SIZE - 1, BAND_SIZE, BAND_SIZE + 1, 3 * BAND_SIZE]


def tensor(height: int, width: int) -> Tensor:
    return Tensor("name", "U8", (height, width), 0, 0, height * width)


def whole(height: int, width: int, parts: list[tuple[range, range]]) -> Whole:
    return Whole(
        tensor(height, width),
        width,
        [Part(rank, tensor(len(rows), len(columns)), rows, columns) for rank, (rows, columns) in enumerate(parts)],
    )


def span(band: Band) -> tuple[int, int]:
    """Where the bytes of a band begin and end in its tensor, which they do in one piece."""
    width = band.whole.width
    assert len(band.rows) == 1 or band.columns == range(width)
    start = band.rows.start * width + band.columns.start
    return start, start + len(band.rows) * len(band.columns)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("size", [1, BAND_SIZE - 1, BAND_SIZE, BAND_SIZE + 1, 7 * BAND_SIZE + 5])
def test_bands_hold_every_byte_once_and_are_small(width: int, size: int) -> None:
    height = -(-size // width)
    end = 0
    for band in bands_of(whole(height, width, []), None):
        first, after = span(band)
        assert first == end
        assert 0 < after - first <= BAND_SIZE
        end = after
    assert end == height * width


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_tensor_has_no_bands(shape: tuple[int, int]) -> None:
    for share in (None, Fraction(1, 2)):
        assert list(bands_of(whole(*shape, [(range(shape[0]), range(shape[1]))]), share)) == []


@st.composite
def cut_tensors(draw: st.DrawFn) -> Whole:
    """A tensor and a box of it, at most some MB."""
    width = draw(st.sampled_from(WIDTHS) | st.integers(1, 200_000))
    height = draw(st.integers(1, max(1, 4_000_000 // width)))
    ends = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in (height, width)]
    return whole(height, width, [(range(*ends[0]), range(*ends[1]))])


@settings(deadline=None)
@given(cut_tensors())
def test_the_smallest_sample_holds_both_ends_of_a_part(found: Whole) -> None:
    """Each as long as a band of the sample is, rows and columns counted as the part has them."""
    part = found.parts[0]
    bands = list(bands_of(found, Fraction(1, 10**9)))
    if not part.tensor.size:
        return
    if found.width <= SAMPLE_SIZE:
        step = SAMPLE_SIZE // found.width
        rows = {row for band in bands for row in band.rows}
        assert rows.issuperset([*part.rows[:step], *part.rows[-step:]])
    else:
        for row, columns in ((part.rows[0], part.columns[:SAMPLE_SIZE]), (part.rows[-1], part.columns[-SAMPLE_SIZE:])):
            held = {column for band in bands if row in band.rows for column in band.columns}
            assert held.issuperset(columns)


@settings(deadline=None)
@given(cut_tensors(), st.fractions(Fraction(1, 1000), 1))
def test_a_sample_takes_small_bands_in_order_and_each_once(found: Whole, share: Fraction) -> None:
    spans = [span(band) for band in bands_of(found, share)]
    assert all(after - first <= SAMPLE_SIZE for first, after in spans)
    assert all(after <= first for (_, after), (first, _) in pairwise(spans))


def test_a_sample_of_everything_is_everything() -> None:
    found = whole(1000, 7168, [(range(1000), range(7168))])
    assert sum(prod((len(band.rows), len(band.columns))) for band in bands_of(found, Fraction(1))) == found.tensor.size


@given(st.integers(0, 5000), st.fractions(Fraction(1, 2000), 1))
def test_spread_takes_one_number_of_each_stretch(count: int, share: Fraction) -> None:
    numbers = list(spread("name", count, share))
    for stretch, number in enumerate(numbers):
        assert floor(stretch / share) <= number < min(count, floor((stretch + 1) / share))
    assert abs(len(numbers) - count * share) <= 1


def test_spread_depends_on_the_name_and_on_nothing_else() -> None:
    """So that a sample is the same every time, and does not take the same rows of every expert."""
    names = [f"experts.{number}.w1" for number in range(50)]
    found = [list(spread(name, 1000, Fraction(1, 100))) for name in names]
    assert found == [list(spread(name, 1000, Fraction(1, 100))) for name in names]
    assert len({tuple(numbers) for numbers in found}) == len(names)
    assert len({numbers[0] for numbers in found}) > len(names) // 3


def test_spread_takes_names_that_are_not_text() -> None:
    assert len(list(spread("\ud800", 100, Fraction(1, 10)))) == 10
