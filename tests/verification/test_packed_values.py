"""The BF16 values of packed weights, as verify computes them: every packing against torch arithmetic, as the library of
the format has it, from files and through the tiles of a comparison.
"""

from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import packed_weights
import pytest
import torch
from numpy.typing import NDArray
from packed_weights import Stored, save_packed
from safetensors.torch import save_file

from reshard.errors import Refused
from reshard.sources.checkpoints import read_checkpoint
from reshard.storage.local import PAGE
from reshard.types import Checkpoint
from reshard.verification.compared_files import make_compared_files, open_compared_files
from reshard.verification.packed_inputs import measure_largest_tile, read_unpacked_tile
from reshard.verification.stored_packings import find_packed_weights
from reshard.verification.unpacked_weights import UnpackedWeight, split_into_unpacked_tiles

SMALL_TILES = Fraction(1)
"""A sample of all: in its small tiles."""
BF16_NAN = 0x7FC0


def tell(bits: int, group: int, **other: Any) -> dict[str, Any]:
    """The config of compressed-tensors, and of AWQ and GPTQ."""
    scheme = {"num_bits": bits, "group_size": group or None, "strategy": "group" if group else "channel", "type": "int"}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}}}
    return {"quantization_config": {**groups, "bits": bits, "group_size": group, **other}}


def read_unpacked(folder: Path, config: dict[str, Any], share: Fraction | None) -> NDArray[np.uint16]:
    """Reads the one packed weight of a folder as verify does, tile by tile."""
    stored: Checkpoint = replace(read_checkpoint(folder), config=config)
    (packed,) = find_packed_weights(stored)
    shape = packed.result.shape
    whole = UnpackedWeight(packed, len(shape) - 1, [])
    made = np.full((prod(shape[:-1]), shape[-1]), 0xDEAD, np.uint16)
    seen = np.zeros(made.shape, int)
    buffer = memoryview(bytearray(measure_largest_tile(whole) + 2 * PAGE))
    with ExitStack() as stack:
        files = open_compared_files(stack, make_compared_files(folder, {}, stored)[0], is_random=False)
        for tile in split_into_unpacked_tiles(whole, share):
            place = slice(tile.rows.start, tile.rows.stop), slice(tile.columns.start, tile.columns.stop)
            made[place] = read_unpacked_tile(files, tile, buffer).view(np.uint16)
            seen[place] += 1
    assert np.all(seen == 1)
    return made.reshape(shape)


def check(folder: Path, stored: Stored, config: dict[str, Any] | None = None) -> None:
    """Holds a weight against what torch made of it: numbers to the bit, and one pattern for all that are none."""
    name = "model.experts.gate_up_proj" if "_blocks" in stored.tensors else "model.layers.0.q_proj"
    save_packed(folder / "model.safetensors", {name: stored})
    wanted, is_none = stored.result.view(torch.int16).numpy().view(np.uint16), torch.isnan(stored.result).numpy()
    for share in (None, SMALL_TILES):
        made = read_unpacked(folder, config or {}, share)
        assert made.shape == wanted.shape
        np.testing.assert_array_equal(made, np.where(is_none, BF16_NAN, wanted))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_integers_are_worth_what_compressed_tensors_makes(
    bits: int, group: int, dtype: str, tmp_path: Path, *, has_zeros: bool
) -> None:
    stored = packed_weights.make_integers(203, 352, bits, dtype, group, has_zeros=has_zeros)
    check(tmp_path, stored, tell(bits, group))


@pytest.mark.parametrize("columns", [36, 12])
def test_a_word_may_hold_codes_behind_the_last_column(columns: int, tmp_path: Path) -> None:
    check(tmp_path, packed_weights.make_integers(19, columns, 4, "BF16", 12, has_zeros=True), tell(4, 12))


def test_integers_may_have_an_order(tmp_path: Path) -> None:
    stored = packed_weights.make_integers(67, 256, 4, "BF16", 32, has_zeros=True, has_order=True)
    assert stored.tensors["weight_g_idx"].tolist() != sorted(stored.tensors["weight_g_idx"].tolist())
    check(tmp_path, stored, tell(4, 32))


def test_an_order_of_integers_that_was_not_set_is_none(tmp_path: Path) -> None:
    stored = packed_weights.make_integers(67, 256, 4, "BF16", 32, has_zeros=True)
    unset = {**stored.tensors, "weight_g_idx": torch.full((256,), -1, dtype=torch.int32)}
    check(tmp_path, stored._replace(tensors=unset), tell(4, 32))


def test_one_scale_may_be_for_all(tmp_path: Path) -> None:
    stored = packed_weights.make_integers(16, 64, 8, "F32", has_zeros=False)
    codes = (stored.tensors["weight_packed"].numpy().view(np.uint8).astype(np.int16) - 128).reshape(16, 64)
    scale = torch.tensor([0.0371])
    result = (torch.from_numpy(codes).float() * scale).bfloat16()
    check(tmp_path, Stored({**stored.tensors, "weight_scale": scale}, result), tell(8, 0, strategy="tensor"))


@pytest.mark.parametrize("divides", [False, True])
def test_nvfp4_is_worth_what_its_library_makes(tmp_path: Path, *, divides: bool) -> None:
    stored = packed_weights.make_nvfp4(211, 352, divides=divides)
    negative = stored.result.view(torch.int16) == -0x8000
    assert bool(negative.any())
    check(tmp_path, stored)


def test_experts_in_mxfp4_are_transposed(tmp_path: Path) -> None:
    check(tmp_path, packed_weights.make_experts(3, 90, 736))


def test_rows_in_mxfp4_are_worth_what_compressed_tensors_makes(tmp_path: Path) -> None:
    check(tmp_path, packed_weights.make_mxfp4(211, 352))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("each_row", [False, True])
def test_fp8_is_worth_what_compressed_tensors_makes(dtype: str, tmp_path: Path, *, each_row: bool) -> None:
    check(tmp_path, packed_weights.make_fp8(211, 353, dtype, each_row=each_row))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_awq_is_worth_what_autoawq_makes(dtype: str, tmp_path: Path) -> None:
    check(tmp_path, packed_weights.make_awq(264, 672, dtype, 32), tell(4, 32, quant_method="awq"))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("has_order", [False, True])
def test_gptq_is_worth_what_gptqmodel_makes(
    bits: int, dtype: str, tmp_path: Path, *, is_v2: bool, has_order: bool
) -> None:
    stored = packed_weights.make_gptq(268, 672, bits, dtype, 64, is_v2=is_v2, has_order=has_order)
    check(tmp_path, stored, tell(bits, 64, quant_method="gptq", checkpoint_format="gptq_v2" if is_v2 else "gptq"))


def test_an_order_may_be_of_long_numbers(tmp_path: Path) -> None:
    stored = packed_weights.make_gptq(40, 96, 4, "F16", 32, is_v2=False)
    longer = {**stored.tensors, "g_idx": stored.tensors["g_idx"].long()}
    check(tmp_path, stored._replace(tensors=longer), tell(4, 32))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_group_that_there_is_not_is_refused(wrong: int, tmp_path: Path) -> None:
    stored = packed_weights.make_gptq(40, 96, 4, "F16", 32, is_v2=False)
    stored.tensors["g_idx"][7] = wrong
    with pytest.raises(Refused, match=r"(?s)q_proj\.g_idx.*there are 3 scales"):
        check(tmp_path, stored, tell(4, 32))


def test_a_long_row_of_words_is_read_in_parts(tmp_path: Path) -> None:
    """Tiles of full size, of which two lie side by side; its bytes between rows are not read, or with them."""
    rows, columns = 1032, 8200
    codes = packed_weights.draw_codes(4, columns, rows)
    scales = torch.ones(columns // 8200, rows, dtype=torch.float16)
    zeros = np.full((1, rows), 8)
    words = {
        "m.qweight": packed_weights.pack_words(codes, 4, 1, packed_weights.AWQ_ORDER),
        "m.qzeros": packed_weights.pack_words(zeros, 4, 1, packed_weights.AWQ_ORDER),
        "m.scales": scales,
    }
    save_file(words, tmp_path / "model.safetensors")
    wanted = torch.from_numpy(codes.T - 8).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(read_unpacked(tmp_path, {}, None), wanted)


@pytest.mark.parametrize("pitch", [40, 64, 300, 512])
@pytest.mark.parametrize("room", [40, 100, 1000, 100_000])
def test_rows_that_lie_apart_are_read_whatever_the_buffer_holds(pitch: int, room: int, tmp_path: Path) -> None:
    """One by one, some together, or all at once."""
    data = torch.from_numpy(packed_weights.RANDOM.integers(0, 256, (101, pitch), np.uint8))
    save_file({"matrix": data}, tmp_path / "model.safetensors")
    stored = read_checkpoint(tmp_path)
    tensor = stored.tensors["matrix"]
    buffer = memoryview(bytearray(room + 2 * PAGE))
    with ExitStack() as stack:
        files = open_compared_files(stack, make_compared_files(tmp_path, {}, stored)[0], is_random=False)
        found = files.read_rows(tensor.file, tensor.offset + 2 * pitch + 5, pitch, (97, 33), buffer)
        np.testing.assert_array_equal(found, data.numpy()[2:99, 5:38])
