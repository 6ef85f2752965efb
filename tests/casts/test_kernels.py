"""The kernels of casts, bit by bit, against torch on whole matrices."""

import math
import tracemalloc
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from reshard.casts import kernels as casts
from reshard.casts.code_tables import CodeArray, FloatArray, HalfArray, decode_scales
from reshard.casts.kernels import BoxSlices, Recode, RowsColumns, compile_recode, recode_each

FP8 = torch.float8_e4m3fn
BLOCKS = [(128, 128), (32, 32), (1, 32), (3, 5), (1, 200), (200, 1)]
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
SMALL = {"TILE_ELEMENTS": 48, "BAND_ELEMENTS": 96, "SCALES_AT_ONCE": 6, "MOST_PAGES": 4}
"""With these, small boxes are worked on in many pieces."""


@pytest.fixture(params=["numpy", "loop", "compiled"], scope="module")
def run(request: pytest.FixtureRequest) -> Recode:
    if request.param == "compiled":
        compiled = compile_recode()
        if compiled is None:
            pytest.skip("numba is not installed: the compiled look-up is not tested")
        return compiled
    return casts.recode if request.param == "numpy" else recode_each


@pytest.fixture(params=[False, True], ids=["as they are", "small"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items() if request.param else ():
        monkeypatch.setattr(casts, name, value)


def bits(seed: int, shape: tuple[int, ...], dtype: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def touched(shape: RowsColumns, block: RowsColumns, phase: RowsColumns = (0, 0)) -> RowsColumns:
    return math.ceil((shape[0] + phase[0]) / block[0]), math.ceil((shape[1] + phase[1]) / block[1])


def of_elements(scales: torch.Tensor, block: RowsColumns, phase: RowsColumns, shape: RowsColumns) -> torch.Tensor:
    wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[phase[0] :, phase[1] :][: shape[0], : shape[1]]


def words_of(values: torch.Tensor) -> HalfArray:
    return values.view(torch.int16).numpy().view(np.uint16)


def bfloat16(patterns: HalfArray) -> torch.Tensor:
    return torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16)


def e8m0(codes: CodeArray) -> torch.Tensor:
    """In float64, where no power of two of these is subnormal."""
    return torch.tensor([math.nan if code == 255 else 2.0 ** (int(code) - 127) for code in codes.ravel()]).reshape(
        codes.shape
    )


def torch_dequantize(
    codes: CodeArray, scales: FloatArray, block: RowsColumns, phase: RowsColumns = (0, 0)
) -> HalfArray:
    whole = of_elements(torch.from_numpy(scales), block, phase, codes.shape)
    result = (torch.from_numpy(codes).view(FP8).float() * whole).to(torch.bfloat16)
    return np.where(result.isnan().numpy(), 0x7FC0, words_of(result)).astype(np.uint16)


def torch_fp4_to_fp8(
    packed: CodeArray, group_scales: CodeArray, scales: CodeArray, block: RowsColumns, phase: RowsColumns = (0, 0)
) -> tuple[CodeArray, int]:
    shape = (packed.shape[0], packed.shape[1] * 2)
    nibbles = torch.from_numpy(np.stack([packed & 15, packed >> 4], axis=-1).reshape(shape)).long()
    values = torch.tensor(FP4, dtype=torch.float32)[nibbles]
    group = of_elements(e8m0(group_scales), (1, 32), (0, phase[1] % 32), shape)
    new = of_elements(e8m0(scales), block, phase, shape)
    codes = (values * (group.float() / new.float())).clamp(-448, 448).to(FP8)  # some versions clamp anyway
    missed = codes.double() * new.double() != values.double() * group.double()
    patterns = np.where(codes.float().isnan().numpy(), 0x7F, codes.view(torch.uint8).numpy())
    return patterns.astype(np.uint8), int(missed.sum())


def torch_quantize(
    values: HalfArray, scales: FloatArray, block: RowsColumns, phase: RowsColumns = (0, 0)
) -> tuple[CodeArray, int]:
    quotients = bfloat16(values).float() / of_elements(torch.from_numpy(scales), block, phase, values.shape)
    codes = quotients.clamp(-448, 448).to(FP8).view(torch.uint8).numpy()
    return np.where(quotients.isnan().numpy(), 0x7F, codes).astype(np.uint8), int((~quotients.isfinite()).sum())


def dequantize(
    codes: CodeArray, scales: FloatArray, block: RowsColumns, run: Recode, phase: RowsColumns = (0, 0)
) -> HalfArray:
    out = np.full(codes.shape, 0xABCD, np.uint16)
    casts.dequantize(codes, scales, block, phase, out, run)
    return out


def fp4_to_fp8(
    packed: CodeArray,
    group_scales: CodeArray,
    scales: CodeArray,
    block: RowsColumns,
    run: Recode,
    phase: RowsColumns = (0, 0),
) -> tuple[CodeArray, int]:
    out = np.full((packed.shape[0], packed.shape[1] * 2), 0xAB, np.uint8)
    return out, casts.cast_fp4_to_fp8(packed, group_scales, scales, block, phase, out, run)


def quantize(
    values: HalfArray, scales: FloatArray, block: RowsColumns, phase: RowsColumns = (0, 0)
) -> tuple[CodeArray, int]:
    out = np.full(values.shape, 0xAB, np.uint8)
    return out, casts.quantize(values, scales, block, phase, out)


def require_same(found: tuple[NDArray[Any], int], expected: tuple[NDArray[Any], int]) -> None:
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]


def all_floats(count: int) -> FloatArray:
    """Random patterns of every exponent, and the ends of all ranges."""
    ends = [0.0, -0.0, 1.0, -1.0, 2.0**-149, 2.0**-127, 2.0**-126, 3.4028235e38, math.inf, -math.inf, math.nan, 1 / 3]
    return np.concatenate([np.array(ends, np.float32), bits(5, (count,), np.uint32).view(np.float32)])


def test_every_code_times_scales_of_every_kind_is_torchs_product(run: Recode) -> None:
    scales = all_floats(500)[:, None]
    codes = np.tile(np.arange(256, dtype=np.uint8), (len(scales), 1))
    np.testing.assert_array_equal(dequantize(codes, scales, (1, 256), run), torch_dequantize(codes, scales, (1, 256)))


def test_every_code_times_every_power_of_two_is_torchs_product(run: Recode) -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    powers = decode_scales(np.arange(256, dtype=np.uint8)[:, None], "F8_E8M0")
    for scales in (powers, powers[1:255], -powers[1:255]):  # with those that are no normal numbers, and without
        found = dequantize(codes[: len(scales)], scales, (1, 256), run)
        np.testing.assert_array_equal(found, torch_dequantize(codes[: len(scales)], scales, (1, 256)))


def test_known_products_are_right(run: Recode) -> None:
    """Written out by hand: 448 x 1, -0, least x 1, a tie to even down and one up, NaN by code."""
    codes = np.array([[0x7E, 0x80, 0x01, 0x38, 0x38, 0xFF]], np.uint8)
    scales = np.array([[1, 1, 1, 1 + 2**-8, 1 + 3 * 2**-8, 1]], np.float32)
    assert dequantize(codes, scales, (1, 1), run).tolist() == [[0x43E0, 0x8000, 0x3B00, 0x3F80, 0x3F82, 0x7FC0]]


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", ["any", "powers of two"])
def test_blocks_of_every_form_are_dequantized_as_torch_does(block: RowsColumns, kind: str, run: Recode) -> None:
    codes = bits(1, (131, 97), np.uint8)
    scales: FloatArray = bits(2, touched(codes.shape, block), np.uint32).view(np.float32)
    if kind == "powers of two":
        scales = decode_scales(bits(2, scales.shape, np.uint8) // 4 + 90, "F8_E8M0")
    np.testing.assert_array_equal(dequantize(codes, scales, block, run), torch_dequantize(codes, scales, block))


@pytest.mark.usefixtures("pieces")
def test_every_phase_of_a_box_finds_its_scales(run: Recode) -> None:
    block = (3, 5)
    for phase in np.ndindex(block):
        for shape in ((1, 1), (2, 9), (7, 11)):
            codes = bits(3, shape, np.uint8)
            scales = bits(4, touched(shape, block, phase), np.uint32).view(np.float32)
            found = dequantize(codes, scales, block, run, phase)
            np.testing.assert_array_equal(found, torch_dequantize(codes, scales, block, phase))


def test_a_row_longer_than_a_tile_is_dequantized_in_stretches(run: Recode) -> None:
    codes = bits(1, (2, casts.TILE_ELEMENTS + 77), np.uint8)
    scales = bits(2, touched(codes.shape, (2, 128), (1, 5)), np.uint32).view(np.float32)
    found = dequantize(codes, scales, (2, 128), run, (1, 5))
    np.testing.assert_array_equal(found, torch_dequantize(codes, scales, (2, 128), (1, 5)))


def test_what_is_written_may_lie_anywhere_and_what_is_read_may_not_be_written(run: Recode) -> None:
    codes, scales = bits(1, (6, 10), np.uint8), bits(2, (2, 2), np.uint32).view(np.float32)
    expected = torch_dequantize(codes, scales, (4, 8))
    codes.flags.writeable = scales.flags.writeable = False
    buffer = bytearray(b"\xcd" * 400)
    wide = np.frombuffer(buffer, np.uint16, 6 * 30, offset=1).reshape(6, 30)  # not aligned, and rows apart
    casts.dequantize(codes, scales, (4, 8), (0, 0), wide[:, 7:17], run)
    np.testing.assert_array_equal(wide[:, 7:17], expected)
    assert set(wide[:, :7].ravel().tolist() + wide[:, 17:].ravel().tolist()) == {0xCDCD}


def test_scales_of_every_dtype_become_float32() -> None:
    floats = all_floats(100)
    assert decode_scales(floats.tobytes(), "F32").tobytes() == floats.tobytes()
    assert decode_scales(floats[:, None], "F32").shape == (len(floats), 1)
    words = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    expected = bfloat16(words).float().view(torch.int32).numpy()
    found = decode_scales(words, "BF16")
    numbers = ~np.isnan(found)
    np.testing.assert_array_equal(found.view(np.int32)[numbers], expected[numbers])
    np.testing.assert_array_equal(numbers, ~bfloat16(words).isnan().numpy())
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(decode_scales(codes.tobytes(), "F8_E8M0"), e8m0(codes).float().numpy())
    as_torch = torch.from_numpy(codes).view(torch.float8_e8m0fnu).float()
    np.testing.assert_array_equal(decode_scales(codes, "F8_E8M0"), as_torch.numpy())


def test_every_pair_of_fp4_under_every_exponent_becomes_torchs_code(run: Recode) -> None:
    """One row for each group scale, 16 groups for all bytes; new scales above, below and far from it."""
    packed = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    group_scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)
    for new in (0, 1, 100, 121, 127, 180, 248, 254, 255):
        scales = np.full((8, 16), new, np.uint8)
        rows = slice(0, min(256, new + 120) // 32 * 32)  # beyond, torch's quotient of the scales is infinite
        whole = (packed[rows], group_scales[rows], scales[: rows.stop // 32], (32, 32))
        require_same(fp4_to_fp8(*whole, run), torch_fp4_to_fp8(*whole))


@pytest.mark.parametrize(("keeps", "wanted"), [(0, 0), (1, 0x8000)])
def test_minus_zero_of_fp4_is_kept_only_where_it_is_asked_for(run: Recode, keeps: int, wanted: int) -> None:
    packed, out = np.full((1, 16), 0x80, np.uint8), np.empty((1, 32), np.uint16)
    casts.dequantize_fp4(packed, np.full((1, 1), 127, np.uint8), (0, 0), out, run, keeps_minus_zero=bool(keeps))
    assert out.reshape(-1, 2).tolist() == [[0, wanted]] * 16


def test_zero_stays_zero_and_minus_zero_becomes_zero_whatever_the_scales(run: Recode) -> None:
    packed = np.full((1, 16), 0x80, np.uint8)
    for group, new in ((0, 0), (254, 0), (0, 254), (127, 127)):
        found, inexact = fp4_to_fp8(
            packed, np.full((1, 1), group, np.uint8), np.full((1, 1), new, np.uint8), (1, 32), run
        )
        assert not found.any()
        assert inexact == 0


def test_known_fp4_values_are_right_and_the_even_column_is_in_the_low_nibble(run: Recode) -> None:
    packed = np.zeros((1, 16), np.uint8)
    packed[0, :3] = 0x21, 0x97, 0xF8  # 0.5, 1; 6, -0.5; -0, -6
    found, inexact = fp4_to_fp8(packed, np.full((1, 1), 127, np.uint8), np.full((1, 1), 127, np.uint8), (1, 32), run)
    assert found[0, :6].tolist() == [0x30, 0x38, 0x4C, 0xB0, 0x00, 0xCC]
    assert inexact == 0


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("block", [(128, 128), (32, 32), (1, 32), (3, 64)])
@pytest.mark.parametrize(
    ("least", "most"), [(113, 124), (114, 124), (110, 124), (100, 124), (0, 5), (0, 12), (240, 254), (250, 255)]
)
def test_fp4_with_new_scales_is_what_torch_makes_of_it(block: RowsColumns, least: int, most: int, run: Recode) -> None:
    """Exact as long as the scales of a block are within 2^14 of each other, at the lower end of their range too."""
    packed = bits(1, (35, 96), np.uint8)
    group_scales = np.random.default_rng(least).integers(least, most, (35, 6), np.uint8, endpoint=True)
    scales = casts.compute_fp8_scales(group_scales, block)
    found = fp4_to_fp8(packed, group_scales, scales, block, run)
    require_same(found, torch_fp4_to_fp8(packed, group_scales, scales, block))
    if block[0] > 1:
        assert (found[1] == 0) == (most < 255 and most - least <= 14)


@pytest.mark.usefixtures("pieces")
def test_every_phase_of_a_box_of_fp4_finds_its_scales(run: Recode) -> None:
    block = (3, 64)
    for row, column in np.ndindex(3, 32):
        phase, shape = (row, column * 2), (4, 70)
        packed = bits(column, (4, 35), np.uint8)
        group_scales = bits(1, (4, touched(shape, (1, 32), (0, phase[1] % 32))[1]), np.uint8) % 40 + 100
        scales = bits(2, touched(shape, block, phase), np.uint8) % 40 + 100
        whole = (packed, group_scales, scales, block)
        require_same(fp4_to_fp8(*whole, run, phase), torch_fp4_to_fp8(*whole, phase))


@pytest.mark.parametrize("block", [(128, 128), (32, 32), (2, 96)])
def test_new_scales_are_the_largest_of_a_block_over_64(block: RowsColumns) -> None:
    for least, most in ((0, 255), (100, 254), (0, 11), (0, 2)):
        group_scales = np.random.default_rng(1).integers(least, most, (150, 9), np.uint8, endpoint=True)
        group_scales[:, 4:] %= 130
        groups = e8m0(group_scales)
        found = casts.compute_fp8_scales(group_scales, block)
        assert found.shape == touched((150, 288), block)
        for line, place in np.ndindex(found.shape):
            of_block = groups[line * block[0] :, place * block[1] // 32 :][: block[0], : block[1] // 32]
            expected = max(float(of_block.max()) / 64, 2.0**-127) if not of_block.isnan().any() else math.nan
            np.testing.assert_equal(float(e8m0(found[line : line + 1, place : place + 1])), expected)


def test_every_bfloat16_over_scales_of_every_kind_is_torchs_code() -> None:
    values = np.arange(1 << 16, dtype=np.uint16).reshape(1, -1).repeat(40, axis=0)
    scales = np.concatenate(
        [all_floats(20)[:, None], np.array([[1], [2**-7], [0.37], [3e-5], [448], [1e-39]], np.float32)]
    )
    values = values[: len(scales)]
    require_same(quantize(values, scales, (1, 1 << 16)), torch_quantize(values, scales, (1, 1 << 16)))


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_every_form_are_quantized_as_torch_does(block: RowsColumns) -> None:
    values = words_of((torch.randn(131, 97, generator=torch.Generator().manual_seed(1)) * 0.02).to(torch.bfloat16))
    largest = np.zeros(touched(values.shape, block), np.uint16)
    casts.raise_to_magnitudes(values, block, (0, 0), largest)
    for scales in (casts.compute_scales(largest), bits(2, largest.shape, np.uint32).view(np.float32)):
        require_same(quantize(values, scales, block), torch_quantize(values, scales, block))
    codes, not_finite = quantize(values, casts.compute_scales(largest), block)
    assert (int((codes & 0x7F).max()), not_finite) == (0x7E, 0)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("block", BLOCKS)
def test_scales_by_magnitude_are_torchs(block: RowsColumns) -> None:
    values: HalfArray = bits(1, (140, 70), np.uint16) & np.uint16(0xBFFF)  # no infinities
    values[:128, :32] = 0x8000
    values[3, 40] = 0x7F7F  # the largest
    largest = np.zeros(touched(values.shape, block), np.uint16)
    casts.raise_to_magnitudes(values, block, (0, 0), largest)
    found = casts.compute_scales(largest)
    for line, place in np.ndindex(found.shape):
        of_block = bfloat16(values)[line * block[0] :, place * block[1] :][: block[0], : block[1]].float()
        amax = of_block.abs().max()
        assert found[line, place] == (float(amax / 448) if amax else 1.0)


def test_scales_rounded_up_are_the_least_powers_of_two_not_below() -> None:
    every = np.arange(0x7F80, dtype=np.uint16)
    scales = casts.compute_scales(every)
    found = e8m0(casts.round_up_scales(scales)).tolist()
    for magnitude, scale, power in zip(bfloat16(every).tolist(), scales.tolist(), found, strict=True):
        exact = magnitude / 448 if magnitude else 1.0  # in float64, where nothing is lost that decides
        assert power >= exact
        assert power / 2 < exact or power == 2.0**-127
        assert scale == np.float32(exact)
    powers = 2.0 ** np.arange(-127, 127, dtype=np.float64)
    assert e8m0(casts.round_up_scales(powers.astype(np.float32))).tolist() == powers.tolist()


def test_a_block_with_an_infinity_or_nan_is_told() -> None:
    values = np.full((4, 4), 0x3F80, np.uint16)
    values[0, 0], values[1, 3], values[2, 2] = 0xFF80, 0x7FC0, 0x0000
    largest = np.zeros((2, 2), np.uint16)
    casts.raise_to_magnitudes(values, (2, 2), (0, 0), largest)
    assert (largest >= 0x7F80).tolist() == [[True, True], [False, False]]
    assert np.isnan(casts.compute_scales(largest)).tolist() == [[True, True], [False, False]]
    assert casts.round_up_scales(casts.compute_scales(largest)).tolist() == [[255, 255], [119, 119]]
    codes, not_finite = quantize(values, np.ones((1, 1), np.float32), (4, 4))
    assert (codes[0, 0], codes[1, 3], not_finite) == (0xFE, 0x7F, 2)
    assert quantize(values, casts.compute_scales(largest), (2, 2))[1] == 8


@st.composite
def cut_boxes(draw: st.DrawFn, step: int) -> tuple[RowsColumns, RowsColumns, list[BoxSlices]]:
    """A shape, a block of columns that `step` divides, and a cut of the shape into boxes at even columns."""
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 60)) * 2)
    block = (draw(st.integers(1, 7)), draw(st.integers(1, 3)) * step)
    rows = sorted(draw(st.sets(st.integers(1, shape[0]), max_size=3)) | {0, shape[0]})
    columns = sorted(2 * half for half in draw(st.sets(st.integers(1, shape[1] // 2), max_size=3)) | {0, shape[1] // 2})
    boxes = [
        (slice(top, bottom), slice(left, right)) for top, bottom in pairwise(rows) for left, right in pairwise(columns)
    ]
    return shape, block, draw(st.permutations(boxes))


def of_box(scales: NDArray[Any], block: RowsColumns, box: BoxSlices) -> tuple[NDArray[Any], RowsColumns]:
    """The scales that a box touches, and its phase."""
    places = [slice(at.start // size, -(-at.stop // size)) for at, size in zip(box, block, strict=True)]
    return scales[places[0], places[1]], (box[0].start % block[0], box[1].start % block[1])


any_box = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.usefixtures("pieces")
@any_box
@given(cut=cut_boxes(7), seed=st.integers(0, 1 << 30), kind=st.sampled_from(["any", "powers of two"]))
def test_dequantizing_the_pieces_is_dequantizing_the_whole(
    cut: tuple[RowsColumns, RowsColumns, list[BoxSlices]], seed: int, kind: str, run: Recode
) -> None:
    shape, block, boxes = cut
    codes = bits(seed, shape, np.uint8)
    scales: FloatArray = bits(seed, touched(shape, block), np.uint32).view(np.float32)
    if kind == "powers of two":
        scales = decode_scales(bits(seed, scales.shape, np.uint8), "F8_E8M0")
    out = np.zeros(shape, np.uint16)
    for box in boxes:
        some, phase = of_box(scales, block, box)
        casts.dequantize(codes[box], some, block, phase, out[box], run)
    np.testing.assert_array_equal(out, dequantize(codes, scales, block, run))


@pytest.mark.usefixtures("pieces")
@any_box
@given(cut=cut_boxes(32), seed=st.integers(0, 1 << 30))
def test_casting_the_pieces_of_fp4_is_casting_the_whole(
    cut: tuple[RowsColumns, RowsColumns, list[BoxSlices]], seed: int, run: Recode
) -> None:
    shape, block, boxes = cut
    packed = bits(seed, (shape[0], shape[1] // 2), np.uint8)
    group_scales = bits(seed, touched(shape, (1, 32)), np.uint8) % 20 + 100
    scales = casts.compute_fp8_scales(group_scales, block)
    out, inexact = np.zeros(shape, np.uint8), 0
    for rows, columns in boxes:
        some, phase = of_box(scales, block, (rows, columns))
        groups, _ = of_box(group_scales, (1, 32), (rows, columns))
        halves = packed[rows, columns.start // 2 : columns.stop // 2]
        inexact += casts.cast_fp4_to_fp8(halves, groups, some, block, phase, out[rows, columns], run)
    require_same((out, inexact), fp4_to_fp8(packed, group_scales, scales, block, run))


@pytest.mark.usefixtures("pieces")
@any_box
@given(cut=cut_boxes(9), seed=st.integers(0, 1 << 30))
def test_quantizing_the_pieces_is_quantizing_the_whole(
    cut: tuple[RowsColumns, RowsColumns, list[BoxSlices]], seed: int
) -> None:
    shape, block, boxes = cut
    values = bits(seed, shape, np.uint16)
    whole, largest = (np.zeros(touched(shape, block), np.uint16) for _ in range(2))
    casts.raise_to_magnitudes(values, block, (0, 0), whole)
    for box in boxes:
        some, phase = of_box(largest, block, box)
        casts.raise_to_magnitudes(values[box], block, phase, some)
    np.testing.assert_array_equal(largest, whole)
    scales = casts.compute_scales(whole)
    out, not_finite = np.zeros(shape, np.uint8), 0
    for box in boxes:
        some, phase = of_box(scales, block, box)
        not_finite += casts.quantize(values[box], some, block, phase, out[box])
    require_same((out, not_finite), quantize(values, scales, block))


@pytest.mark.parametrize("block", [(128, 128), (1, 32)])
def test_a_large_box_needs_a_few_mib_beside_it(block: RowsColumns) -> None:
    """16 Mi elements, four times as wide as a tile; compiled, nothing but the tables is needed."""
    shape = (64, 4 * casts.TILE_ELEMENTS)
    codes, words = np.zeros(shape, np.uint8), np.zeros(shape, np.uint16)
    floats = np.full(touched(shape, block), 1.1, np.float32)
    groups = np.full((shape[0], shape[1] // 32), 120, np.uint8)
    scales = np.full(floats.shape, 100, np.uint8)
    magnitudes = np.zeros(floats.shape, np.uint16)
    calls: list[Callable[[], object]] = [
        lambda: casts.dequantize(codes[:8], floats[: touched((8, 1), block)[0]], block, (0, 0), words[:8]),
        lambda: casts.dequantize(codes, np.ones_like(floats), block, (0, 0), words),
        lambda: casts.cast_fp4_to_fp8(codes[:, ::2], groups, scales, block, (0, 0), codes),
        lambda: casts.quantize(words, floats, block, (0, 0), codes),
        lambda: casts.raise_to_magnitudes(words, block, (0, 0), magnitudes),
    ]
    for call in calls:
        tracemalloc.start()
        call()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 6 << 20


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    codes, out, scales = np.zeros((4, 64), np.uint8), np.zeros((4, 64), np.uint16), np.ones((2, 2), np.float32)
    casts.dequantize(codes, scales, (2, 32), (0, 0), out)
    for wrong_scales, phase, wrong_out in (
        (scales[:1], (0, 0), out),
        (scales, (1, 0), out),
        (scales, (2, 0), out),
        (scales, (0, 0), out[:3]),
    ):
        with pytest.raises(ValueError, match="a box"):
            casts.dequantize(codes, wrong_scales, (2, 32), phase, wrong_out)
    groups = np.zeros((4, 3), np.uint8)
    with pytest.raises(ValueError, match="even column"):
        casts.cast_fp4_to_fp8(codes[:, :32], groups, groups[:2, :2], (2, 64), (0, 1), codes)
    with pytest.raises(ValueError, match="a box"):
        casts.cast_fp4_to_fp8(codes[:, :32], groups[:, :1], groups[:2, :1], (2, 64), (0, 0), codes)


def test_the_fastest_look_up_is_compiled_if_numba_is_there() -> None:
    expected = casts.recode if find_spec("numba") is None else compile_recode()
    assert casts.choose_recode() is expected
