"""The lists of packed checkpoints against published figures; the small ones against what their bytes say."""

import json
from collections import Counter
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_models import (
    PACKED_FAMILIES,
    PARTS,
    PackedModel,
    make_packed_model,
    write_full_packed,
    write_packed_model,
)
from safetensors import safe_open
from torch import Tensor

from reshard.numbered_names import split_name
from reshard.synthetic import TensorEntry, compute_data_size

E8M0_BIAS = 127


@pytest.fixture(scope="module", params=PACKED_FAMILIES)
def model(request: pytest.FixtureRequest) -> PackedModel:
    return make_packed_model(request.param)


@cache
def full(name: str) -> list[TensorEntry]:
    family = PACKED_FAMILIES[name]
    return family.list_stored(family.full)


def test_k25_has_the_published_totals() -> None:
    """K2.6 and K2.7-Code have the same."""
    tensors = full("kimi-k2.5")
    assert len({name for name, _, _ in tensors}) == len(tensors) == 208_550
    assert sum(prod(shape) for _, _, shape in tensors) == 170_738_182_128
    assert round(sum(map(compute_data_size, tensors)) / 2**30, 2) == 554.27


def test_k2_thinking_has_as_many_bytes_as_its_page_says() -> None:
    """594 GB in 62 files. The number of its tensors is not published: it is K2.5's without the vision tower."""
    tensors = full("kimi-k2-thinking")
    assert len({name for name, _, _ in tensors}) == len(tensors) == 208_550 - 335
    assert round(sum(map(compute_data_size, tensors)) / 1e9) == 594


def test_k3_has_the_published_totals() -> None:
    tensors = full("kimi-k3")
    assert len({name for name, _, _ in tensors}) == len(tensors) == 497_220
    assert Counter(dtype for _, dtype, _ in tensors) == {"U8": 494_592, "BF16": 2_122, "F32": 506}
    assert sum(map(compute_data_size, tensors)) == 1_560_860_324_864
    family = PACKED_FAMILIES["kimi-k3"]
    assert len(family.entries(family.full)) == 249_924
    layers = {split_name(name)[1][0] for name, _, _ in tensors if name.endswith(".q_a_proj.weight")}
    assert layers == {*map(str, range(3, 92, 4)), "92"}


@pytest.mark.parametrize(
    ("family", "name", "dtype", "shape"),
    [
        ("kimi-k2.5", "layers.60.mlp.experts.383.down_proj.weight_packed", "I32", (7168, 256)),
        ("kimi-k2.5", "layers.1.mlp.experts.0.gate_proj.weight_scale", "BF16", (2048, 224)),
        ("kimi-k2.5", "layers.1.mlp.experts.0.gate_proj.weight_shape", "I32", (2,)),
        ("kimi-k2.5", "layers.0.self_attn.kv_b_proj.weight", "BF16", (16384, 512)),
        ("kimi-k2.5", "layers.1.mlp.gate.e_score_correction_bias", "F32", (384,)),
        ("kimi-k2.5", "vision_tower.encoder.blocks.26.wqkv.bias", "BF16", (3456,)),
        ("kimi-k2.5", "vision_tower.patch_embed.pos_emb.weight", "BF16", (64, 64, 1152)),
        ("kimi-k2.5", "mm_projector.proj.2.weight", "BF16", (7168, 4608)),
        ("kimi-k3", "layers.92.block_sparse_moe.experts.895.w2.weight_packed", "U8", (3584, 1536)),
        ("kimi-k3", "layers.1.block_sparse_moe.experts.0.w1.weight_scale", "U8", (3072, 112)),
        ("kimi-k3", "layers.1.block_sparse_moe.routed_expert_down_proj.weight", "BF16", (3584, 7168)),
        ("kimi-k3", "layers.1.block_sparse_moe.shared_experts.down_proj.weight", "BF16", (7168, 6144)),
        ("kimi-k3", "layers.0.self_attn.A_log", "F32", (128,)),
        ("kimi-k3", "layers.0.self_attn.q_conv1d.weight", "F32", (12288, 1, 4)),
        ("kimi-k3", "layers.92.self_attn.q_b_proj.weight", "BF16", (18432, 1536)),
        ("kimi-k3", "vision_tower.encoder.blocks.0.wo.weight", "BF16", (1024, 1536)),
        ("kimi-k3", "mm_projector.proj.2.weight", "BF16", (7168, 4096)),
    ],
)
def test_a_tensor_has_the_published_shape(family: str, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    name = name if name.startswith(("vision_tower", "mm_projector")) else f"language_model.model.{name}"
    assert [entry for entry in full(family) if entry[0] == name] == [(name, dtype, shape)]


@pytest.mark.parametrize("name", PACKED_FAMILIES)
def test_a_small_checkpoint_has_every_kind_of_tensor_that_the_full_one_has(name: str) -> None:
    family = PACKED_FAMILIES[name]
    small = [split_name(entry[0]) for entry in family.list_stored(family.small)]
    assert {kind for kind, _ in small} == {split_name(entry[0])[0] for entry in full(name)}
    for kind in ("input_layernorm", "experts.#", "blocks.#"):
        numbers = {found[-1] for key, found in small if kind in key}
        assert {"2", "10"} <= numbers or not numbers, kind


def test_a_full_checkpoint_is_written_as_holes_with_the_shapes_of_packed_weights(tmp_path: Path) -> None:
    write_full_packed(tmp_path, "kimi-k2.5")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 64
    assert sum(path.stat().st_blocks * 512 for path in files) < 400e6
    name = "language_model.model.layers.60.mlp.experts.383.down_proj.weight_shape"
    place = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][name]
    with safe_open(tmp_path / place, "pt") as file:
        assert file.get_tensor(name).tolist() == [7168, 2048]
    assert 595_148_192_736 < sum(path.stat().st_size for path in files) < 595_148_192_736 + 100e6


def test_the_plain_weights_are_what_the_stored_bytes_say(model: PackedModel) -> None:
    """Decoded once more from the bytes, one value after the other."""
    packed = [name.removesuffix("_packed") for name in model.stored if name.endswith("weight_packed")]
    assert {2, 10} <= {int(split_name(name)[1][1]) for name in packed}
    decode = decode_integers if f"{packed[0]}_shape" in model.stored else decode_mxfp4
    for name in packed[:: len(packed) // 5]:
        codes, scales = model.stored[f"{name}_packed"], model.stored[f"{name}_scale"]
        rows, columns = model.plain[name].shape
        for row, column in ((0, 0), (0, columns - 1), (rows - 1, 7), (rows // 2, 33 % columns)):
            expected = decode(codes[row].numpy().tobytes(), scales[row], column)
            assert model.plain[name][row, column].float().item() == expected, (name, row, column)


def decode_integers(codes: bytes, scales: Tensor, column: int) -> float:
    code = codes[column // 2] >> 4 * (column % 2) & 15
    # The product of a BF16 by a small whole number is exact in F32; so this rounds once, as torch does in BF16.
    product = np.float32(code - 8) * np.float32(scales[column // 32].float())
    return torch.tensor(product).to(torch.bfloat16).float().item()


def decode_mxfp4(codes: bytes, scales: Tensor, column: int) -> float:
    code = codes[column // 2] >> 4 * (column % 2) & 15
    exponent, mantissa = code >> 1 & 3, code & 1
    value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return (-value if code & 8 else value) * 2.0 ** (int(scales[column // 32]) - E8M0_BIAS)


def test_the_values_are_of_every_kind(model: PackedModel) -> None:
    for name, tensor in model.stored.items():
        if name.endswith("weight_packed"):
            found = torch.from_numpy(np.frombuffer(tensor.numpy().tobytes(), np.uint8).copy())
            assert len({*(found & 15).tolist(), *(found >> 4).tolist()}) == 16, name
    assert all(torch.isfinite(tensor).all() for tensor in model.plain.values())


def test_parts_of_a_weight_lie_in_several_files(model: PackedModel, tmp_path: Path) -> None:
    write_packed_model(tmp_path, model)
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name in (name.removesuffix("_packed") for name in places if name.endswith("weight_packed")):
        parts = [places[key] for part in PARTS if (key := f"{name.removesuffix('weight')}{part}") in places]
        assert len(set(parts)) == len(parts) > 1
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                assert torch.equal(file.get_tensor(name), model.stored[name])
