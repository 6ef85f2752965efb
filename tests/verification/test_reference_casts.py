"""The arithmetic that verify holds casts against: every code and every rounding, against torch."""

import numpy as np
import torch

from reshard.verification.reference_casts import (
    FP4_CODE_VALUES,
    compute_amax_scales,
    compute_fp8_values,
    decode_block_scales,
    find_powers_of_two,
    repeat_blocks,
    round_to_bf16,
    round_to_fp8,
    tabulate_fp4_as_fp8,
    unpack_fp4_codes,
)

RANDOM = np.random.default_rng(1)
PATTERNS = RANDOM.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
"""Of every exponent and sign, among them what is no number."""


def all_words() -> torch.Tensor:
    """Every BF16."""
    return torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)


def test_every_fp8_code_is_worth_what_torch_says() -> None:
    wanted = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(compute_fp8_values(), wanted)
    assert np.signbit(compute_fp8_values()[128])


def test_the_nearest_bf16_is_that_of_torch() -> None:
    wanted = torch.from_numpy(PATTERNS).bfloat16().view(torch.int16).numpy().view(np.uint16)
    is_number = ~np.isnan(PATTERNS)
    np.testing.assert_array_equal(round_to_bf16(PATTERNS)[is_number], wanted[is_number])
    assert set(round_to_bf16(PATTERNS)[~is_number].tolist()) == {0x7FC0}


def test_the_nearest_fp8_is_that_of_torch_up_to_its_largest() -> None:
    """Beyond 448 torch stops there too, where it does not say that it is no number."""
    values = np.concatenate([PATTERNS, all_words().float().numpy(), RANDOM.normal(0, 100, 1 << 20).astype(np.float32)])
    values = np.concatenate([values, (compute_fp8_values()[:126] + compute_fp8_values()[1:127]) / 2])  # two are as near
    inside = values[np.abs(values) <= 448]
    wanted = torch.from_numpy(inside).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(round_to_fp8(inside), wanted)
    beyond = values[np.abs(values) > 448]
    np.testing.assert_array_equal(round_to_fp8(beyond), np.where(beyond > 0, 126, 254))
    assert set(round_to_fp8(values[np.isnan(values)]).tolist()) == {127}


def test_scales_are_worth_what_torch_says() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wanted = torch.from_numpy(codes.copy()).view(torch.float8_e8m0fnu).float().numpy()
    np.testing.assert_array_equal(decode_block_scales(codes, "F8_E8M0"), wanted)
    words = np.arange(1 << 16, dtype=np.uint16).reshape(16, -1)
    np.testing.assert_array_equal(
        decode_block_scales(words.view(np.uint8), "BF16").reshape(-1), all_words().float().numpy()
    )


def test_the_even_column_of_fp4_is_in_the_low_half() -> None:
    assert unpack_fp4_codes(np.array([[0x21, 0x43]], np.uint8)).tolist() == [[1, 2, 3, 4]]
    assert [FP4_CODE_VALUES[code] for code in (1, 7, 8, 9, 15)] == [0.5, 6, 0, -0.5, -6]


def test_fp4_becomes_the_nearest_fp8_and_it_is_told_whether_that_is_exact() -> None:
    codes, misses = tabulate_fp4_as_fp8()
    for power in range(-255, 7):
        exact = np.array(FP4_CODE_VALUES) * 2.0**power
        wanted = torch.from_numpy(exact).to(torch.float8_e4m3fn)
        assert codes[power + 255].tolist() == wanted.view(torch.uint8).tolist(), power
        assert misses[power + 255].tolist() == (wanted.double().numpy() != exact).tolist(), power


def test_scales_bring_the_largest_to_448() -> None:
    values = all_words()[: 0x7F80 // 128 * 128].clone().reshape(-1, 128)
    values[0] = 0
    words = values.view(torch.int16).numpy().view(np.uint16)
    wanted = values.float().abs().reshape(-1, 1, 128).amax(2) / 448
    wanted[wanted == 0] = 1
    found = compute_amax_scales(words, (1, 128), is_power=False)
    np.testing.assert_array_equal(found, wanted.numpy())
    powers = compute_amax_scales(words, (1, 128), is_power=True)
    assert find_powers_of_two(powers).all()
    assert ((powers >= found) & ((powers / 2 < found) | (powers == 2.0**-127))).all()


def test_what_there_is_of_a_block_is_spread_over_its_elements() -> None:
    found = repeat_blocks(np.array([[1, 2], [3, 4]]), (2, 3), (3, 5))
    assert found.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]
