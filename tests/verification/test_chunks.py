"""How a source tensor is cut to be compared: every byte once, in small pieces; and what a sample takes of it."""

from fractions import Fraction
from itertools import pairwise
from math import floor, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.types import Tensor
from reshard.verification.chunks import (
    BAND_SIZE,
    SAMPLE_BAND_SIZE,
    TILE_SIZE,
    Band,
    CastWeight,
    KeptTensor,
    Margin,
    TargetPart,
    sample_evenly,
    split_cast_padding,
    split_into_bands,
    split_into_cast_tiles,
    split_kept_padding,
)

WIDTHS = [
    1,
    2,
    3,
    448,
    7168,
    SAMPLE_BAND_SIZE - 1,
    SAMPLE_BAND_SIZE + 1,
    BAND_SIZE - 1,
    BAND_SIZE,
    BAND_SIZE + 1,
    3 * BAND_SIZE,
]


def tensor(height: int, width: int) -> Tensor:
    return Tensor("name", "U8", (height, width), 0, 0, height * width)


def whole(height: int, width: int, parts: list[tuple[range, range]]) -> KeptTensor:
    return KeptTensor(
        tensor(height, width),
        width,
        [
            TargetPart(rank, tensor(len(rows), len(columns)), rows, columns)
            for rank, (rows, columns) in enumerate(parts)
        ],
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
    for band in split_into_bands(whole(height, width, []), None):
        first, after = span(band)
        assert first == end
        assert 0 < after - first <= BAND_SIZE
        end = after
    assert end == height * width


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_tensor_has_no_bands(shape: tuple[int, int]) -> None:
    for share in (None, Fraction(1, 2)):
        assert list(split_into_bands(whole(*shape, [(range(shape[0]), range(shape[1]))]), share)) == []


@st.composite
def cut_tensors(draw: st.DrawFn) -> KeptTensor:
    """A tensor and a box of it, at most some MB."""
    width = draw(st.sampled_from(WIDTHS) | st.integers(1, 200_000))
    height = draw(st.integers(1, max(1, 4_000_000 // width)))
    ends = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in (height, width)]
    return whole(height, width, [(range(*ends[0]), range(*ends[1]))])


@given(cut_tensors())
def test_the_smallest_sample_holds_both_ends_of_a_part(found: KeptTensor) -> None:
    """Each as long as a band of the sample is, rows and columns counted as the part has them."""
    part = found.parts[0]
    bands = list(split_into_bands(found, Fraction(1, 10**9)))
    if not part.tensor.size:
        return
    if found.width <= SAMPLE_BAND_SIZE:
        step = SAMPLE_BAND_SIZE // found.width
        rows = {row for band in bands for row in band.rows}
        assert rows.issuperset([*part.rows[:step], *part.rows[-step:]])
    else:
        for row, columns in (
            (part.rows[0], part.columns[:SAMPLE_BAND_SIZE]),
            (part.rows[-1], part.columns[-SAMPLE_BAND_SIZE:]),
        ):
            held = {column for band in bands if row in band.rows for column in band.columns}
            assert held.issuperset(columns)


@given(cut_tensors(), st.fractions(Fraction(1, 1000), 1))
def test_a_sample_takes_small_bands_in_order_and_each_once(found: KeptTensor, share: Fraction) -> None:
    spans = [span(band) for band in split_into_bands(found, share)]
    assert all(after - first <= SAMPLE_BAND_SIZE for first, after in spans)
    assert all(after <= first for (_, after), (first, _) in pairwise(spans))


def test_a_sample_of_everything_is_everything() -> None:
    found = whole(1000, 7168, [(range(1000), range(7168))])
    assert (
        sum(prod((len(band.rows), len(band.columns))) for band in split_into_bands(found, Fraction(1)))
        == found.tensor.size
    )


@given(st.integers(0, 5000), st.fractions(Fraction(1, 2000), 1))
def test_spread_takes_one_number_of_each_stretch(count: int, share: Fraction) -> None:
    numbers = list(sample_evenly("name", count, share))
    for stretch, number in enumerate(numbers):
        assert floor(stretch / share) <= number < min(count, floor((stretch + 1) / share))
    assert abs(len(numbers) - count * share) <= 1


def test_spread_depends_on_the_name_and_on_nothing_else() -> None:
    """So that a sample is the same every time, and does not take the same rows of every expert."""
    names = [f"experts.{number}.w1" for number in range(50)]
    found = [list(sample_evenly(name, 1000, Fraction(1, 100))) for name in names]
    assert found == [list(sample_evenly(name, 1000, Fraction(1, 100))) for name in names]
    assert len({tuple(numbers) for numbers in found}) == len(names)
    assert len({numbers[0] for numbers in found}) > len(names) // 3


def test_spread_takes_names_that_are_not_text() -> None:
    assert len(list(sample_evenly("\ud800", 100, Fraction(1, 10)))) == 10


# --- tiles: what is made of a weight ---

SHAPES = [(1, 1), (128, 128), (129, 1), (1, 7168), (130, 100_000), (40_000, 130), (2048, 7168), (7168, 18_432)]
BLOCKS = [((128, 128), (1, 1)), ((1, 32), (128, 128)), ((1, 32), (32, 32)), ((128, 128), (128, 128)), ((1, 32), (1, 1))]


def recast(
    shape: tuple[int, int], block: tuple[int, int], new_block: tuple[int, int], parts: list[TargetPart] | None = None
) -> CastWeight:
    weight = Tensor("name", "F8_E4M3", shape, 0, 0, prod(shape))
    return CastWeight("form", weight, None, shape, block, new_block, ("BF16", "F32"), (parts or [], []))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("block", "new_block"), BLOCKS)
@pytest.mark.parametrize("share", [None, Fraction(1)])
def test_tiles_hold_every_element_once_and_whole_blocks(
    shape: tuple[int, int], block: tuple[int, int], new_block: tuple[int, int], share: Fraction | None
) -> None:
    held = np.zeros(shape, np.uint8)
    for tile in split_into_cast_tiles(recast(shape, block, new_block), share):
        held[tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop] += 1
        for numbers, length, sides in zip(
            (tile.rows, tile.columns), shape, zip(block, new_block, strict=True), strict=True
        ):
            assert all(numbers.start % side == 0 for side in sides)
            assert numbers.stop == length or all(numbers.stop % side == 0 for side in sides)
        assert len(tile.rows) * len(tile.columns) <= (TILE_SIZE if share is None else SAMPLE_BAND_SIZE)
    assert (held == 1).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_an_empty_weight_has_no_tiles(shape: tuple[int, int]) -> None:
    assert list(split_into_cast_tiles(recast(shape, (128, 128), (1, 1)), None)) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_has_the_tiles_at_both_ends_of_a_part(shape: tuple[int, int]) -> None:
    rows, columns = range(shape[0] // 2, shape[0]), range(shape[1] // 2, shape[1])
    held = Tensor("held", "BF16", (len(rows), len(columns)), 0, 0, 2 * len(rows) * len(columns))
    part = TargetPart(0, held, rows, range(2 * columns.start, 2 * columns.stop))
    tiles = list(split_into_cast_tiles(recast(shape, (128, 128), (1, 1), [part]), Fraction(1, 10**9)))
    for row, column in ((rows[0], columns[0]), (rows[-1], columns[-1])):
        assert any(row in tile.rows and column in tile.columns for tile in tiles)
    assert len(tiles) <= 3


# --- margins: padding ---


def covered(margins: list[Margin], rows: range, columns: range) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """How often each byte of a part is in a margin."""
    held = np.zeros((len(rows), len(columns)), np.uint8)
    for margin in margins:
        assert len(margin.rows) * len(margin.columns) <= BAND_SIZE
        top, left = margin.rows.start - rows.start, margin.columns.start - columns.start
        held[top : top + len(margin.rows), left : left + len(margin.columns)] += 1
    return held


@pytest.mark.parametrize("rows", [range(10), range(5, 15), range(10, 20), range(20, 3000)])
@pytest.mark.parametrize("columns", [range(8), range(4, 16), range(12, 16), range(3_000_000)])
def test_margins_hold_what_is_beyond_a_tensor_once(rows: range, columns: range) -> None:
    if len(rows) * len(columns) > 10**8:
        rows = rows[:20]
    part = TargetPart(0, tensor(len(rows), len(columns)), rows, columns)
    known = KeptTensor(tensor(10, 12), 12, [part], b"abcd")
    held = covered(list(split_kept_padding(known, None)), rows, columns)
    beyond = (np.array(rows)[:, None] >= 10) | (np.array(columns)[None] >= 12)
    assert (held == beyond).all()
    sample = list(split_kept_padding(known, Fraction(1, 10**9)))
    assert (not sample) == (not beyond.any())
    assert len(sample) <= 3


def test_margins_of_a_cast_are_zeros_and_ones() -> None:
    weight, scale = tensor(384, 256), tensor(3, 4)
    parts = [TargetPart(0, weight, range(384), range(256))], [TargetPart(0, scale, range(3), range(4))]
    known = recast((200, 128), (128, 128), (128, 128))._replace(parts=parts)
    found = [
        (margin.part.tensor.shape, margin.rows, margin.fill) for margin in split_cast_padding(known, b"one!", None)
    ]
    assert found == [((384, 256), range(200, 384), bytes(1)), ((3, 4), range(2, 3), b"one!")]
