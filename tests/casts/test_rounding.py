"""Rounding to BF16 against torch and against bit arithmetic of its own: ties, infinities, NaN, any box."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from reshard.casts.kernels import TILE_ELEMENTS
from reshard.casts.rounding import round_floats

SPECIAL = np.array(
    [
        *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x00007FFF, 0x00008000, 0x00008001, 0x00018000),
        *(0x007FFFFF, 0x00800000, 0x3F7FFFFF, 0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000),
        *(0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000),
    ],
    np.uint32,
)
"""Zeros, subnormals, ties to both sides, the largest numbers, infinities."""
NANS = np.array([0x7F800001, 0xFF800001, 0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F807FFF], np.uint32)


def rounded(values: NDArray[np.generic]) -> NDArray[np.uint16]:
    out = np.full(values.shape, 0xDEAD, np.uint16)
    round_floats(values, out)
    return out


def by_torch(values: NDArray[np.generic]) -> NDArray[np.uint16]:
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.uint16).numpy()


def test_special_values_are_rounded_as_torch_does() -> None:
    values = SPECIAL.view(np.float32)[None]
    assert np.array_equal(rounded(values), by_torch(values))
    assert rounded(values)[0, -4:].tolist() == [0x7F80, 0xFF80, 0x7F80, 0xFF80]


def test_ties_go_to_the_even_neighbour() -> None:
    """Every pattern of BF16, and half a step above it: bit arithmetic without a rounding constant."""
    upper = np.arange(0x7F80, dtype=np.uint32)
    ties = ((upper << 16) | 0x8000).view(np.float32)[None]
    assert np.array_equal(rounded(ties)[0], upper + upper % 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_nan_is_the_one(dtype: type) -> None:
    halves = np.array([0x7C01, 0xFC01, 0x7E00, 0xFFFF], np.uint16).view(np.float16)
    values = NANS.view(np.float32) if dtype is np.float32 else halves
    assert set(rounded(values[None])[0].tolist()) == {0x7FC0}


def test_every_number_of_f16_is_rounded_once() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    numbers = halves[~np.isnan(halves)][None]
    assert np.array_equal(rounded(numbers), by_torch(numbers))


@pytest.mark.parametrize("shape", [(1, 3 * TILE_ELEMENTS + 5), (3, TILE_ELEMENTS + 1), (40_000, 7), (0, 4), (4, 0)])
def test_random_bits_of_any_shape(shape: tuple[int, int]) -> None:
    bits = np.random.default_rng(shape[0]).integers(0, 1 << 32, shape, np.uint32)
    bits[np.isnan(bits.view(np.float32))] = 0x3F808000
    assert np.array_equal(rounded(bits.view(np.float32)), by_torch(bits.view(np.float32)))


def test_a_part_of_every_row_that_begins_at_any_byte() -> None:
    """As a reader gives it: a view of bytes, which need not be aligned."""
    bits = np.random.default_rng(1).integers(0, 0x7F800000, (50, 33), np.uint32)
    data = np.frombuffer(b"x" + bits.tobytes(), np.uint8)[1:].reshape(50, -1)
    out = np.zeros((50, 40), np.uint16)
    round_floats(data[:, 4 * 5 : 4 * 26].view(np.float32), out[:, 9:30])
    assert np.array_equal(out[:, 9:30], by_torch(bits[:, 5:26].view(np.float32)))
    assert not out[:, :9].any()
    assert not out[:, 30:].any()
