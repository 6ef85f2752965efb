"""Packed weights, bit by bit, against torch computing as the library of each format does, and against the libraries."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from reshard.casts import packed_kernels as packed
from reshard.casts.code_tables import CodeArray, HalfArray
from reshard.casts.kernels import Recode, RowsColumns, compile_recode, recode
from reshard.casts.packed_kernels import Multiply, dequantize_experts, dequantize_integers, dequantize_nvfp4
from reshard.casts.packed_layouts import (
    spread_awq,
    spread_gptq,
    spread_zeros_awq,
    spread_zeros_gptq,
    spread_zeros_integers,
)
from reshard.casts.packed_loops import build_loop

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SMALL: dict[str, Any] = {"TILE_ELEMENTS": 96, "BAND_ELEMENTS": 300, "EXPERT_TILE": (8, 32)}
"""With these, small boxes are worked on in many pieces."""
FACTORS = [1.0, 0.0123, -1.5, 0.0, 3e38, 1e-40, 2.0**-149, 7e-39, float("inf"), float("nan")]
AWQ_PACKS = [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.fixture(params=["numpy", "compiled"], scope="module")
def run(request: pytest.FixtureRequest) -> Multiply:
    if request.param == "numpy":
        return packed.multiply_codes
    pytest.importorskip("numba", reason="compiled loops are not tested")
    return packed.multiply_compiled


@pytest.fixture(params=["numpy", "compiled"], scope="module")
def look_up(request: pytest.FixtureRequest) -> Recode:
    if request.param == "numpy":
        return recode
    compiled = compile_recode()
    if compiled is None:
        pytest.skip("numba is not installed: the compiled look-up is not tested")
    return compiled


@pytest.fixture(params=[False, True], ids=["as they are", "small"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items() if request.param else ():
        monkeypatch.setattr(packed, name, value)


def random_codes(seed: int, shape: tuple[int, ...], bits: int = 8) -> CodeArray:
    return np.random.default_rng(seed).integers(0, 1 << bits, shape, np.uint8)


def patterns_of(values: torch.Tensor) -> HalfArray:
    """In BF16, with one NaN."""
    whole = values.to(torch.bfloat16).contiguous()
    patterns = whole.view(torch.int16).numpy().view(np.uint16)
    return np.where(whole.isnan().numpy(), 0x7FC0, patterns).astype(np.uint16)


def scales_of_torch(scales: NDArray[Any], dtype: str) -> torch.Tensor:
    if dtype == "F32":
        return torch.from_numpy(scales)
    return torch.from_numpy(scales.view(np.int16)).view(TORCH_DTYPES[dtype])


def pack_bytes(codes: NDArray[Any], bits: int) -> CodeArray:
    """Codes [rows, columns] in bytes, the first column lowest."""
    if bits == 8:
        return codes.astype(np.uint8)
    wide = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2))).astype(np.uint8)
    return (wide[:, 0::2] | (wide[:, 1::2] << 4)).astype(np.uint8)


def torch_integers(
    codes: NDArray[Any], zeros: NDArray[Any] | None, scales: NDArray[Any], dtype: str, groups: NDArray[Any], bits: int
) -> HalfArray:
    """As compressed-tensors' `_dequantize`: int8 codes and zeros about 0, in the dtype of the scale."""
    middle, index = 1 << (bits - 1), torch.from_numpy(groups).long()
    factors = scales_of_torch(scales, dtype)
    values = (torch.from_numpy(codes.astype(np.int16)) - middle).to(torch.int8).to(factors.dtype)
    if zeros is not None:
        values = values - (torch.from_numpy(zeros.astype(np.int16)) - middle).to(torch.int8).to(factors.dtype)[:, index]
    return patterns_of(values * factors[:, index])


def integers(
    codes: NDArray[Any],
    zeros: NDArray[Any] | None,
    scales: NDArray[Any],
    dtype: str,
    groups: NDArray[Any],
    bits: int,
    run: Multiply,
) -> HalfArray:
    out = np.full(codes.shape, 0xABCD, np.uint16)
    dequantize_integers(pack_bytes(codes, bits), bits, scales, dtype, zeros, groups, out, run)
    return out


def require_torch(
    codes: NDArray[Any],
    zeros: NDArray[Any] | None,
    scales: NDArray[Any],
    dtype: str,
    groups: NDArray[Any],
    bits: int,
    run: Multiply,
) -> None:
    found = integers(codes, zeros, scales, dtype, groups.astype(np.int32), bits, run)
    np.testing.assert_array_equal(found, torch_integers(codes, zeros, scales, dtype, groups, bits))


def scales_of_every_kind(dtype: str, number: int) -> NDArray[Any]:
    """Random patterns of every exponent, and the ends of all ranges: [number, 1]."""
    if dtype != "F32":
        return np.random.default_rng(3).integers(0, 1 << 16, (number, 1), np.uint16)
    found = np.random.default_rng(4).integers(0, 1 << 32, (number, 1), np.uint32).view(np.float32)
    ends = [0.0, -0.0, 2.0**-149, -(2.0**-127), 2.0**-126, 3.4028235e38, 1 / 3, 1 + 2**-8, 1 + 3 * 2**-8]
    found[: len(ends), 0] = ends
    found[9:12, 0] = np.inf, -np.inf, np.nan
    return found


def sane_scales(dtype: str, shape: RowsColumns) -> NDArray[Any]:
    """As checkpoints have them: finite, and F16 without subnormal numbers."""
    values = np.random.default_rng(5).uniform(1e-3, 0.1, shape).astype(np.float32)
    values *= np.where(np.random.default_rng(6).random(shape) < 0.2, np.float32(-1), np.float32(1))
    if dtype == "F32":
        return values
    return values.astype(np.float16).view(np.uint16) if dtype == "F16" else (values.view(np.uint32) >> 16).astype("u2")


# --- integers ---


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("zero", [None, 0, 15])
def test_every_code_of_4_bits_times_every_scale_is_torchs_product(dtype: str, zero: int | None, run: Multiply) -> None:
    """All 65536 scales: subnormal, infinite, NaN, negative; F16 beyond BF16, so that products are rounded twice. Then
    the finite ones alone, for which there is another way.
    """
    every = np.arange(1 << 16, dtype=np.uint16)
    exponents = 0x7C00 if dtype == "F16" else 0x7F80
    for patterns in (every, every[(every & exponents) != exponents]):
        scales = patterns[:, None]
        codes = np.tile(np.arange(16), (len(scales), 1))
        zeros = None if zero is None else np.full(scales.shape, zero, np.uint8)
        require_torch(codes, zeros, scales, dtype, np.zeros(16), 4, run)


@pytest.mark.parametrize("odd", [0x0000, 0x0001, 0x83FF, 0x5C01, 0x7800, 0xFBFF])
@pytest.mark.parametrize("bits", [4, 8])
def test_f16_scales_at_the_ends_of_the_range_are_multiplied_as_torch_does(odd: int, bits: int, run: Multiply) -> None:
    """The products are subnormal numbers of F16, which are exact, or beyond it: infinite."""
    scales = np.array([[0x3C00], [odd], [0x1234]], np.uint16)
    codes = np.tile(np.arange(1 << bits), (3, 1))
    for zeros in (None, np.full((3, 1), (1 << bits) - 1, np.uint8), np.zeros((3, 1), np.uint8)):
        require_torch(codes, zeros, scales, "F16", np.zeros(codes.shape[1]), bits, run)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [None, 0, 1, 7, 255])
def test_every_code_times_scales_of_every_kind_is_torchs_product(
    dtype: str, bits: int, zero: int | None, run: Multiply
) -> None:
    scales = scales_of_every_kind(dtype, 3000)
    codes = np.tile(np.arange(1 << bits), (len(scales), 1))
    zeros = None if zero is None else np.full(scales.shape, min(zero, codes.shape[1] - 1), np.uint8)
    require_torch(codes, zeros, scales, dtype, np.zeros(codes.shape[1]), bits, run)


@pytest.mark.parametrize("bits", [4, 8])
def test_f16_scales_of_the_normal_range_are_rounded_twice(bits: int, run: Multiply) -> None:
    """All of them, without the others, for which there is another way."""
    patterns = np.arange(0x400, 0x5C01, dtype=np.uint16) if bits == 4 else np.arange(0x400, 0x5C01, 7, dtype=np.uint16)
    scales = np.concatenate([patterns, patterns | 0x8000])[:, None]
    codes = np.tile(np.arange(1 << bits), (len(scales), 1))
    zeros = np.tile(random_codes(1, (64, 1), bits), (len(scales) // 64 + 1, 1))[: len(scales)]
    require_torch(codes, zeros, scales, "F16", np.zeros(codes.shape[1]), bits, run)
    once = np.float32(codes - zeros.astype(np.float32)) * scales.view(np.float16).astype(np.float32)
    assert (
        patterns_of(torch.from_numpy(once)) != torch_integers(codes, zeros, scales, "F16", codes[0] * 0, bits)
    ).any()


def test_known_products_are_right(run: Multiply) -> None:
    """Written out by hand: codes 0, 8, 15, 9 and 12 less 8, times 1, -1 and 1 + 2^-7."""
    codes = np.array([[0, 8, 15, 9, 12]] * 3)
    scales = np.array([[0x3F80], [0xBF80], [0x3F81]], np.uint16)
    found = integers(codes, None, scales, "BF16", np.zeros(5, np.int32), 4, run)
    assert found[0].tolist() == [0xC100, 0x0000, 0x40E0, 0x3F80, 0x4080]
    assert found[1].tolist() == [0x4100, 0x8000, 0xC0E0, 0xBF80, 0xC080]
    assert found[2].tolist() == [0xC101, 0x0000, 0x40E2, 0x3F81, 0x4081]


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("group", [1, 5, 32, 33, 64, 128, 1000])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_columns_find_the_scale_of_their_group(
    bits: int, dtype: str, group: int, run: Multiply, *, has_zeros: bool
) -> None:
    """Boxes of one row and of many, of odd widths, from the middle of a group on."""
    for rows, columns, first in ((1, 1, 0), (1, 7, 3), (3, 33, 10), (5, 256, 0), (7, 261, 62), (2, 300, 96)):
        groups = (np.arange(columns) + first) // group
        groups -= groups[0]
        shape = (rows, int(groups[-1]) + 1)
        zeros = random_codes(2, shape, bits) if has_zeros else None
        require_torch(
            random_codes(1, (rows, columns), bits), zeros, sane_scales(dtype, shape), dtype, groups, bits, run
        )


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_groups_may_lie_in_any_order(bits: int, dtype: str, run: Multiply) -> None:
    """As after quantizing in the order of activations; some scales of a row may have no column."""
    for rows, columns, number in ((1, 5, 3), (4, 257, 9), (3, 128, 128), (2, 64, 1)):
        groups = np.random.default_rng(columns).integers(0, number, columns)
        scales, zeros = sane_scales(dtype, (rows, number)), random_codes(2, (rows, number), bits)
        require_torch(random_codes(1, (rows, columns), bits), zeros, scales, dtype, groups, bits, run)


def test_a_row_longer_than_a_tile_is_computed_in_stretches(run: Multiply) -> None:
    columns = 2 * packed.TILE_ELEMENTS + 78
    for group in (128, columns, packed.TILE_ELEMENTS + 2):
        groups = np.arange(columns) // group
        scales = sane_scales("BF16", (2, int(groups[-1]) + 1))
        require_torch(random_codes(1, (2, columns), 4), None, scales, "BF16", groups, 4, run)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [10, 11])
def test_what_is_written_may_lie_anywhere_and_what_is_read_may_not_be_written(
    bits: int, columns: int, run: Multiply
) -> None:
    codes, groups = random_codes(1, (6, columns), bits), (np.arange(columns) // 4).astype(np.int32)
    scales = np.ascontiguousarray(sane_scales("F16", (3, 6))).T
    expected = torch_integers(codes, None, np.ascontiguousarray(scales), "F16", groups, bits)
    data = pack_bytes(codes, bits)
    data.flags.writeable = scales.flags.writeable = groups.flags.writeable = False
    buffer = bytearray(b"\xcd" * 400)
    wide = np.frombuffer(buffer, np.uint16, 6 * 30, offset=1).reshape(6, 30)  # not aligned, and rows apart
    dequantize_integers(data, bits, scales, "F16", None, groups, wide[:, 7 : 7 + columns], run)
    np.testing.assert_array_equal(wide[:, 7 : 7 + columns], expected)
    assert set(wide[:, :7].ravel().tolist() + wide[:, 7 + columns :].ravel().tolist()) == {0xCDCD}
    close = np.frombuffer(buffer, np.uint16, 6 * columns, offset=3).reshape(6, columns)
    dequantize_integers(data, bits, scales, "F16", None, groups, close, run)
    np.testing.assert_array_equal(close, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_loops_are_right_without_numba_too(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        packed,
        "compile_loop",
        lambda bits, half, *, is_ordered: build_loop(bits, half, lambda part: part, is_ordered=is_ordered),
    )
    special = np.array([[0x0000], [0x8001], [0x03FF], [0x7BFF], [0x0400], [0x1234]], np.uint16)
    every = np.tile(np.arange(1 << bits), (6, 1))
    with np.errstate(over="ignore"):
        for dtype, scales in (("F16", special), ("F16", special[4:]), ("BF16", special)):
            require_torch(
                every[: len(scales)], None, scales, dtype, np.zeros(1 << bits), bits, packed.multiply_compiled
            )
            mixed, wide = np.arange(1 << bits) % 3, np.repeat(scales, 3, axis=1)
            require_torch(every[: len(scales)], None, wide, dtype, mixed, bits, packed.multiply_compiled)


def test_integers_that_do_not_fit_together_are_refused() -> None:
    codes, scales, out = np.zeros((4, 8), np.uint8), np.zeros((4, 2), np.uint16), np.zeros((4, 16), np.uint16)
    groups = (np.arange(16) // 8).astype(np.int32)
    dequantize_integers(codes, 4, scales, "BF16", None, groups, out)
    for wrong in (
        (codes[:, :7], 4, scales, "BF16", None, groups, out),
        (codes, 8, scales, "BF16", None, groups, out),
        (codes, 4, scales[:3], "BF16", None, groups, out),
        (codes, 4, scales[:, :1], "BF16", None, groups, out),
        (codes, 4, scales, "BF16", None, groups - 1, out),
        (codes, 4, scales, "BF16", None, groups[:15], out),
        (codes, 4, scales, "BF16", codes, groups, out),
    ):
        with pytest.raises(ValueError, match=r"do not fit|is needed"):
            dequantize_integers(*wrong)


def test_compressed_tensors_itself_unpacks_and_computes_the_same(run: Multiply) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="the library itself is not compared")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for bits, group, dtype, symmetric in (
        (4, 32, "BF16", True),
        (4, 64, "F16", False),
        (8, 128, "BF16", False),
        (8, None, "F16", True),
        (4, None, "BF16", False),
        (4, 128, "F32", False),
    ):
        rows, columns = 13, 256
        scales = sane_scales(dtype, (rows, columns // (group or columns)))
        args = quantization.QuantizationArgs(
            num_bits=bits,
            type="int",
            symmetric=symmetric,
            strategy="group" if group else "channel",
            group_size=group,
        )
        codes, zeros = random_codes(1, (rows, columns), bits), random_codes(2, scales.shape, bits)
        words = pack_words(codes, bits)
        state = {
            "weight_packed": torch.from_numpy(words),
            "weight_scale": scales_of_torch(scales, dtype),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric:
            state["weight_zero_point"] = torch.from_numpy(np.ascontiguousarray(pack_words(zeros.T, bits).T))
        scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
        expected = patterns_of(compressors.PackedQuantizationCompressor.decompress(state, scheme)["weight"])
        out = np.empty((rows, columns), np.uint16)
        spread = None if symmetric else spread_zeros_integers(state["weight_zero_point"].numpy(), bits)[:rows]
        groups = (np.arange(columns) // (group or columns)).astype(np.int32)
        dequantize_integers(words.view(np.uint8), bits, scales, dtype, spread, groups, out, run)
        np.testing.assert_array_equal(out, expected)


# --- words ---


def pack_words(codes: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """Codes [rows, columns] in words of 32 bits along the columns, the first lowest; filled with zeros."""
    per_word = 32 // bits
    wide = torch.from_numpy(np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word))).astype(np.int64))
    shifts = torch.arange(0, 32, bits)
    words = (wide.reshape(len(codes), -1, per_word) << shifts).sum(-1).to(torch.int32)
    return words.numpy().astype(np.int32, copy=False)


def pack_awq(codes: NDArray[Any]) -> NDArray[np.int32]:
    """As `WQLinear_GEMM.from_linear`: codes [columns, rows]."""
    values = torch.from_numpy(codes.astype(np.int32))
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int32)
    for column in range(words.shape[1]):
        for place in range(8):
            words[:, column] |= values[:, column * 8 + AWQ_PACKS[place]] << (place * 4)
    return words.numpy()


def torch_awq(words: NDArray[Any], zeros: NDArray[Any], scales: torch.Tensor, group: int) -> HalfArray:
    """As `dequantize_gemm`; transposed, as a linear layer has it."""
    shifts, order = torch.arange(0, 32, 4), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    unpacked = []
    for packed_words in (torch.from_numpy(words), torch.from_numpy(zeros)):
        codes = (packed_words[:, :, None] >> shifts).to(torch.int8)[:, :, order].flatten(1)
        unpacked.append(codes & 15)
    shifted = unpacked[0] - unpacked[1].repeat_interleave(group, 0)
    return patterns_of((shifted * scales.repeat_interleave(group, 0)).T)


def torch_gptq(
    words: NDArray[Any], zeros: NDArray[Any], scales: torch.Tensor, order: NDArray[Any], bits: int, *, is_v2: bool
) -> HalfArray:
    """As `convert_gptq_v1_to_v2_format_module` and `dequantize_weight`; transposed, as a linear layer has it."""
    shifts, integer = torch.arange(0, 32, bits, dtype=torch.int32), torch.int16 if bits == 8 else torch.int8
    stored, index = torch.from_numpy(zeros).clone(), torch.from_numpy(order).long()
    if not is_v2:
        stored += 0b00010001000100010001000100010001 if bits == 4 else 0b00000001000000010000000100000001
    shifted = (stored[:, :, None] >> shifts).to(integer) & ((1 << bits) - 1)
    codes = (torch.from_numpy(words)[:, None, :] >> shifts[:, None]).to(integer) & ((1 << bits) - 1)
    return patterns_of((scales[index] * (codes.flatten(0, 1) - shifted.flatten(1)[index])).T)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_words_of_autoawq_become_what_autoawq_computes(dtype: str, group: int, run: Multiply) -> None:
    columns, rows = 256, 2088
    codes, zeros = random_codes(1, (columns, rows), 4), random_codes(2, (columns // group, rows), 4)
    scales, words = sane_scales(dtype, zeros.shape), pack_awq(codes)
    rows_of_bytes, out = np.full((rows, columns // 2), 0xAB, np.uint8), np.empty((rows, columns), np.uint16)
    spread_awq(words, rows_of_bytes)
    np.testing.assert_array_equal(rows_of_bytes, pack_bytes(codes.T, 4))
    groups = (np.arange(columns) // group).astype(np.int32)
    dequantize_integers(rows_of_bytes, 4, scales.T, dtype, spread_zeros_awq(pack_awq(zeros)), groups, out, run)
    np.testing.assert_array_equal(out, torch_awq(words, pack_awq(zeros), scales_of_torch(scales, dtype), group))


@pytest.mark.parametrize(("columns", "rows"), [(1, 8), (2, 8), (7, 24), (300, 16), (1030, 8), (1, 3000)])
def test_words_of_autoawq_are_spread_at_any_size(columns: int, rows: int) -> None:
    codes = random_codes(1, (columns, rows), 4)
    wide = np.full((rows, columns + 9), 0xAB, np.uint8)
    words = np.pad(pack_awq(codes), ((0, 0), (1, 2)))[:, 1:-2]  # a strip of wider rows
    spread_awq(words, wide[:, 3 : 3 + -(-columns // 2)])
    np.testing.assert_array_equal(wide[:, 3 : 3 + -(-columns // 2)], pack_bytes(codes.T, 4))
    assert set(wide[:, :3].ravel().tolist()) == {0xAB}


@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_words_of_gptq_become_what_gptqmodel_computes(
    bits: int, dtype: str, run: Multiply, *, is_v2: bool, in_order: bool
) -> None:
    """With zero points of all codes: the highest, and one, is carried into the next."""
    columns, rows, group = 256, 160, 32
    codes, zeros = random_codes(1, (columns, rows), bits), random_codes(2, (columns // group, rows), bits)
    zeros[0], zeros[1] = (1 << bits) - 1, 0
    scales, order = sane_scales(dtype, zeros.shape), (np.arange(columns) // group).astype(np.int32)
    if not in_order:
        order = np.random.default_rng(3).permutation(order)
    words, words_of_zeros = np.ascontiguousarray(pack_words(codes.T, bits).T), pack_words(zeros, bits)
    rows_of_bytes, out = np.full((rows, columns * bits // 8), 0xAB, np.uint8), np.empty((rows, columns), np.uint16)
    spread_gptq(words, rows_of_bytes)
    np.testing.assert_array_equal(rows_of_bytes, pack_bytes(codes.T, bits))
    spread = spread_zeros_gptq(words_of_zeros, bits, is_v2=is_v2)
    dequantize_integers(rows_of_bytes, bits, scales.T, dtype, spread, order, out, run)
    expected = torch_gptq(words, words_of_zeros, scales_of_torch(scales, dtype), order, bits, is_v2=is_v2)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("words", "rows"), [(1, 1), (3, 5), (129, 130), (300, 1)])
def test_words_of_gptq_are_spread_at_any_size(words: int, rows: int) -> None:
    codes = random_codes(1, (words * 8, rows), 4)
    wide = np.full((rows, words * 4 + 6), 0xAB, np.uint8)
    strip = np.pad(pack_words(codes.T, 4).T, ((0, 0), (2, 1)))[:, 2:-1]
    spread_gptq(strip, wide[:, 3:-3])
    np.testing.assert_array_equal(wide[:, 3:-3], pack_bytes(codes.T, 4))
    assert set(wide[:, :3].ravel().tolist() + wide[:, -3:].ravel().tolist()) == {0xAB}


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_of_words_are_those_that_were_packed(bits: int) -> None:
    zeros = random_codes(1, (5, 24), bits)
    np.testing.assert_array_equal(spread_zeros_gptq(pack_words(zeros, bits), bits, is_v2=True), zeros.T)
    lower = np.minimum(zeros, (1 << bits) - 2)
    np.testing.assert_array_equal(spread_zeros_gptq(pack_words(lower, bits), bits, is_v2=False), lower.T + 1)
    np.testing.assert_array_equal(
        spread_zeros_awq(pack_awq(random_codes(1, (5, 24), 4))), random_codes(1, (5, 24), 4).T
    )
    along_rows = pack_words(zeros[:, :21], bits).T  # the last word is not full
    np.testing.assert_array_equal(spread_zeros_integers(along_rows, bits)[:21], zeros[:, :21].T)


def test_a_highest_zero_point_of_the_first_format_is_carried() -> None:
    found = spread_zeros_gptq(np.array([[0x000007F0], [-1]], np.int32), 4, is_v2=False)
    assert found.T.tolist() == [[1, 0, 9, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1]]


def test_words_that_do_not_fit_are_refused() -> None:
    words = np.zeros((4, 2), np.int32)
    for spread, shape in ((spread_awq, (16, 3)), (spread_awq, (8, 2)), (spread_gptq, (2, 12)), (spread_gptq, (3, 16))):
        with pytest.raises(ValueError, match="is needed"):
            spread(words, np.zeros(shape, np.uint8))


# --- floats of 4 bits ---


def torch_nvfp4(codes: CodeArray, scales: CodeArray, factor: float) -> HalfArray:
    """As ModelOpt's `NVFP4QTensor.dequantize`."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    unpacked = torch.empty(codes.shape[0], codes.shape[1] * 2, dtype=torch.bfloat16)
    unpacked[..., 1::2], unpacked[..., 0::2] = torch.from_numpy(codes >> 4), torch.from_numpy(codes & 15)
    values = table[unpacked.long()]
    blocks = torch.from_numpy(scales).view(torch.float8_e4m3fn).float() * torch.tensor(factor)
    return patterns_of((values.view(len(codes), -1, 16) * blocks.unsqueeze(-1)).flatten(1))


def torch_nvfp4_divided(codes: CodeArray, scales: CodeArray, factor: float) -> HalfArray:
    """As compressed-tensors' `unpack_fp4_from_uint8` and `_dequantize`."""
    combined = torch.stack((torch.from_numpy(codes & 15), torch.from_numpy(codes >> 4)), dim=-1).flatten(1)
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(combined & 7).long()]
    values = (sizes * torch.where(combined & 8 > 0, -1.0, 1.0)).bfloat16()
    blocks = torch.from_numpy(scales).view(torch.float8_e4m3fn).bfloat16() / torch.tensor([factor])
    return patterns_of((values.to(blocks.dtype).view(len(codes), -1, 16) * blocks.unsqueeze(-1)).flatten(1))


def nvfp4(
    codes: CodeArray, scales: CodeArray, factor: float, look_up: Recode, *, divides: bool, phase: RowsColumns = (0, 0)
) -> HalfArray:
    out = np.full((codes.shape[0], codes.shape[1] * 2), 0xABCD, np.uint16)
    dequantize_nvfp4(codes, scales, factor, phase, out, look_up, divides=divides)
    return out


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("divides", [False, True])
def test_every_pair_times_every_e4m3_scale_is_torchs_product(factor: float, look_up: Recode, *, divides: bool) -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 32, axis=1)
    oracle = torch_nvfp4_divided if divides else torch_nvfp4
    np.testing.assert_array_equal(nvfp4(codes, scales, factor, look_up, divides=divides), oracle(codes, scales, factor))


@pytest.mark.parametrize("divides", [False, True])
def test_many_factors_are_rounded_as_torch_rounds_them(look_up: Recode, *, divides: bool) -> None:
    """The scale and the factor become one float32, which is then multiplied by the value: with the first three, other
    orders of division, or a reciprocal, give other BF16 numbers.
    """
    codes = np.tile(np.arange(256, dtype=np.uint8), (126, 1))
    scales = np.repeat(np.arange(1, 127, dtype=np.uint8)[:, None], 32, axis=1)
    oracle = torch_nvfp4_divided if divides else torch_nvfp4
    telling = [0.0015998291783034801, 0.0001521915546618402, 0.0029231624212116003]
    for factor in telling + np.random.default_rng(7).lognormal(-7, 2, 20).astype(np.float32).tolist():
        np.testing.assert_array_equal(
            nvfp4(codes, scales, factor, look_up, divides=divides), oracle(codes, scales, factor)
        )


def test_known_values_of_nvfp4_are_right_and_the_even_column_is_in_the_low_half(look_up: Recode) -> None:
    codes, scales = np.array([[0x21, 0x8F, 0, 0, 0, 0, 0, 0x70]], np.uint8), np.array([[0x40]], np.uint8)  # 2
    found = nvfp4(codes, scales, 0.5, look_up, divides=False)
    assert found[0].tolist() == [0x3F00, 0x3F80, 0xC0C0, 0, *[0] * 11, 0x40C0]
    found = nvfp4(codes, scales, 0.5, look_up, divides=True)
    assert found[0].tolist() == [0x4000, 0x4080, 0xC1C0, 0x8000, *[0] * 11, 0x41C0]


def test_every_phase_of_a_box_of_nvfp4_finds_its_scales(look_up: Recode) -> None:
    codes, scales = random_codes(1, (3, 40)), random_codes(2, (3, 5), 6) + 30
    whole = torch_nvfp4(codes, scales, 0.01)
    for left, right in ((0, 2), (2, 80), (14, 18), (16, 48), (30, 78)):
        touched = scales[:, left // 16 : -(-right // 16)]
        part = nvfp4(codes[:, left // 2 : right // 2], touched, 0.01, look_up, divides=False, phase=(0, left % 16))
        np.testing.assert_array_equal(part, whole[:, left:right])


def test_compressed_tensors_itself_computes_the_same_nvfp4(look_up: Recode) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="the library itself is not compared")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    codes, scales = random_codes(1, (64, 256)), random_codes(2, (64, 32), 7)
    for factor in (3.7, 1234.5, 1e-3):
        state = {
            "weight_packed": torch.from_numpy(codes),
            "weight_scale": torch.from_numpy(scales).view(torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([factor]),
        }
        expected = patterns_of(compressors.NVFP4PackedCompressor.decompress(state, scheme)["weight"])
        np.testing.assert_array_equal(nvfp4(codes, scales, factor, look_up, divides=True), expected)


def torch_experts(codes: CodeArray, scales: CodeArray) -> HalfArray:
    """As transformers' `convert_moe_packed_tensors`, one expert; scales below 255."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.bfloat16)
    blocks = torch.from_numpy(codes).reshape(-1, 16)
    values = torch.empty(len(blocks), 32, dtype=torch.bfloat16)
    values[:, 0::2], values[:, 1::2] = table[(blocks & 15).int()], table[(blocks >> 4).int()]
    torch.ldexp(values, torch.from_numpy(scales).reshape(-1, 1).int() - 127, out=values)
    return patterns_of(values.view(len(codes), -1).T)


def experts(codes: CodeArray, scales: CodeArray, look_up: Recode) -> HalfArray:
    wide = np.full((codes.shape[1] * 2, len(codes) + 5), 0xABCD, np.uint16)
    dequantize_experts(codes, scales, wide[:, 3:-2], look_up)
    assert set(wide[:, :3].ravel().tolist() + wide[:, -2:].ravel().tolist()) == {0xABCD}
    return wide[:, 3:-2]


def test_every_pair_under_every_exponent_is_torchs_value_transposed(look_up: Recode) -> None:
    codes = np.tile(np.arange(256, dtype=np.uint8), (255, 1))
    scales = np.repeat(np.arange(255, dtype=np.uint8)[:, None], 16, axis=1)
    np.testing.assert_array_equal(experts(codes, scales, look_up), torch_experts(codes, scales))
    assert (experts(codes, np.full_like(scales, 255), look_up) == 0x7FC0).all()


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (3, 96), (130, 544), (515, 64), (2, 1088)])
def test_experts_of_any_size_are_transposed(rows: int, columns: int, look_up: Recode) -> None:
    codes, scales = random_codes(1, (rows, columns // 2)), random_codes(2, (rows, columns // 32), 4) + 120
    np.testing.assert_array_equal(experts(codes, scales, look_up), torch_experts(codes, scales))


def test_transformers_itself_computes_the_same_experts(look_up: Recode) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="the library itself is not compared")
    blocks, scales = random_codes(1, (2, 34, 3, 16)), random_codes(2, (2, 34, 3), 7)
    expected = mxfp4.convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    for expert in range(2):
        found = experts(blocks[expert].reshape(34, -1), scales[expert], look_up)
        np.testing.assert_array_equal(found, patterns_of(expected[expert]))


def test_experts_that_do_not_fit_together_are_refused() -> None:
    codes, scales, out = np.zeros((4, 32), np.uint8), np.zeros((4, 2), np.uint8), np.zeros((64, 4), np.uint16)
    dequantize_experts(codes, scales, out)
    for wrong in ((codes, scales[:, :1], out), (codes, scales, out[:63]), (codes[:3], scales, out)):
        with pytest.raises(ValueError, match="is needed"):
            dequantize_experts(*wrong)
    with pytest.raises(ValueError, match="a box"):
        dequantize_nvfp4(codes, scales, 1.0, (0, 0), np.zeros((4, 64), np.uint16), divides=False)


# --- of all ---


def test_a_large_box_needs_a_few_mib_beside_it() -> None:
    """16 Mi elements; their result would take 32 MiB."""
    rows, columns = 256, 65536
    codes, out = np.zeros((rows, columns // 2), np.uint8), np.zeros((rows, columns), np.uint16)
    scales, words = np.full((rows, columns // 128), 0x2000, np.uint16), np.zeros((columns, rows // 8), np.int32)
    groups = (np.arange(columns) // 128).astype(np.int32)
    shuffled = np.random.default_rng(1).permutation(groups)
    wide = np.zeros((rows, columns + 2), np.uint16)[:, 1:-1]
    fp8, e8m0 = np.zeros((rows, columns // 16), np.uint8), np.zeros((rows, columns // 32), np.uint8)
    calls: list[Callable[[], object]] = [
        lambda: dequantize_integers(codes, 4, scales, "F16", None, groups, out),
        lambda: dequantize_integers(codes[:16], 4, scales[:16] & 1, "F16", None, shuffled, wide[:16]),
        lambda: dequantize_nvfp4(codes, fp8, 1.0, (0, 0), out, divides=False),
        lambda: dequantize_experts(codes, e8m0, out.reshape(columns, rows)),
        lambda: spread_awq(words, codes),
        lambda: spread_gptq(words.reshape(-1, rows), codes),
    ]
    for call in calls:
        tracemalloc.start()
        call()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 8 << 20


def test_the_fastest_way_is_compiled_if_numba_is_there() -> None:
    expected = packed.multiply_codes if compile_recode() is None else packed.multiply_compiled
    assert packed.choose_multiply() is expected
