"""The lists of Qwen3-Next, Qwen3.5, Qwen3.6 and MiniMax-M2: published counts and sizes, and transformers' own modules."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import Family
from hybrid_families import HYBRIDS, change_text, write_full_hybrid, write_small_hybrid
from jobs import make_plan
from small_models import MODELS, from_config, make_config

from reshard.recipes.recipe import list_packaged_recipes, load_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.recipe_choice import choose_recipe
from reshard.sources.stacked_experts import read_under_hub_names
from reshard.synthetic import TensorEntry, compute_data_size
from reshard.types import WHOLE, Layout

RECIPES = [recipe for recipe in list_packaged_recipes() if not recipe.engine and not recipe.by_name]
GIB = 1 << 30

PUBLISHED = {
    "qwen3-next": (75_944, 81_324_862_720, "151.48"),
    "qwen3-next-fp8": (151_479, 81_329_784_384, "76.40"),
    "qwen3.5-27b": (1_199, 27_781_427_952, "51.75"),
    "qwen3.5-4b": (738, 4_659_865_088, "8.68"),
    "qwen3.5-0.8b": (488, 873_438_784, "1.63"),
    "qwen3.5-35b-a3b": (1_811, 35_951_822_704, "66.97"),
    "qwen3.6-35b-a3b": (1_045, 35_951_822_704, "66.97"),
    "minimax-m2.7": (96_103, 228_703_644_928, "214.32"),
}
"""Tensors, elements with those of scales, and GiB of data."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_list_has_the_published_totals(name: str) -> None:
    tensors = HYBRIDS[name].tensors(HYBRIDS[name].full)
    count, elements, size = PUBLISHED[name]
    assert len({tensor[0] for tensor in tensors}) == len(tensors) == count
    assert sum(prod(shape) for _, _, shape in tensors) == elements
    assert f"{sum(map(compute_data_size, tensors)) / GIB:.2f}" == size


@pytest.mark.parametrize(
    ("family", "name", "dtype", "shape"),
    [
        ("qwen3-next-fp8", "model.layers.46.linear_attn.in_proj_qkvz.weight_scale_inv", "F32", (96, 16)),
        ("qwen3-next-fp8", "mtp.layers.0.self_attn.q_proj.weight", "F8_E4M3", (8192, 2048)),
        ("qwen3-next", "model.layers.47.self_attn.q_proj.weight", "BF16", (8192, 2048)),
        ("qwen3-next", "model.layers.0.linear_attn.A_log", "BF16", (32,)),
        ("qwen3.5-27b", "model.language_model.layers.62.linear_attn.A_log", "F32", (48,)),
        ("qwen3.5-27b", "model.language_model.layers.0.linear_attn.in_proj_qkv.weight", "BF16", (10240, 5120)),
        ("qwen3.5-27b-fp8", "model.language_model.layers.0.linear_attn.in_proj_qkv.weight_scale_inv", "BF16", (80, 40)),
        ("qwen3.5-27b", "mtp.fc.weight", "BF16", (5120, 10240)),
        ("qwen3.5-35b-a3b", "model.language_model.layers.39.mlp.experts.down_proj", "BF16", (256, 2048, 512)),
        ("qwen3.5-35b-a3b", "mtp.layers.0.mlp.experts.255.gate_proj.weight", "BF16", (512, 2048)),
        ("qwen3.6-35b-a3b", "mtp.layers.0.mlp.experts.gate_up_proj", "BF16", (256, 1024, 2048)),
        ("qwen3.6-35b-a3b", "model.language_model.layers.0.linear_attn.norm.weight", "BF16", (128,)),
        ("qwen3.5-4b", "model.visual.merger.linear_fc2.weight", "BF16", (2560, 4096)),
        ("qwen3.5-0.8b", "model.visual.patch_embed.proj.weight", "BF16", (768, 3, 2, 16, 16)),
        ("minimax-m2.7", "model.layers.61.block_sparse_moe.gate.weight", "F32", (256, 3072)),
        ("minimax-m2.7", "model.layers.0.self_attn.k_norm.weight", "BF16", (1024,)),
    ],
)
def test_a_tensor_has_the_published_shape(family: str, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    found = {key: (kind, lengths) for key, kind, lengths in HYBRIDS[family].tensors(HYBRIDS[family].full)}
    assert found[name] == (dtype, shape)


def test_a_tied_model_has_no_head_and_an_untied_one_has() -> None:
    heads = {name for name, family in HYBRIDS.items() if "lm_head.weight" in {key for key, _, _ in listed(family)}}
    assert HYBRIDS.keys() - heads == {"qwen3.5-4b", "qwen3.5-0.8b"}


def listed(family: Family) -> list[TensorEntry]:
    return family.tensors(family.full)


# --- transformers' own modules ---


@pytest.mark.parametrize("name", ["qwen3-next", "qwen3.5-27b", "qwen3.5-4b", "qwen3.5-35b-a3b", "minimax-m2.7"])
def test_a_list_is_that_of_the_modules_of_transformers(name: str) -> None:
    """With published widths and few layers and experts; but for the MTP layer, which transformers has not."""
    family = HYBRIDS[name]
    few = {"num_experts": 12, "num_local_experts": 12} if "moe_intermediate_size" in str(family.full) else {}
    few = {"num_local_experts": 12} if name == "minimax-m2.7" else {"num_experts": 12} if few else {}
    changes = {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"], **few}
    if name == "minimax-m2.7":
        changes = {**few, "num_hidden_layers": 4}
    config = change_text({key: value for key, value in family.full.items() if key != "quantization_config"}, changes)
    wanted = {key: shape for key, _, shape in family.tensors(config) if not key.startswith("mtp.")}
    known = {key: value for key, value in config.items() if key not in ("published", "architectures")}
    with torch.device("meta"):
        model = from_config(transformers.AutoConfig.for_model(**known), dtype=torch.bfloat16)
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        found.pop("lm_head.weight")
    assert fuse(wanted) == {key.replace(".mlp.gate.", ".gate.") if "minimax" in name else key: value
                            for key, value in found.items()}  # fmt: skip


def fuse(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Under the names that transformers has in memory: all experts of a layer in two tensors."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        before, dot, rest = name.partition(".experts.")
        before = before.replace("block_sparse_moe.gate", "gate").replace("block_sparse_moe", "mlp")
        if not dot or not rest[0].isdigit():
            found[before + dot + rest] = shape
            continue
        word = "down_proj" if rest.split(".")[1] in ("down_proj", "w2") else "gate_up_proj"
        count = 1 + found.get(f"{before}.experts.{word}", (0,))[0]
        rows = shape[0] if word == "down_proj" else 2 * shape[0]
        found[f"{before}.experts.{word}"] = (count, rows, shape[1])
    return {
        name: (shape[0] // 2, *shape[1:]) if name.endswith("experts.gate_up_proj") and "fused" not in name and is_split(shapes) else shape
        for name, shape in found.items()
    }


def is_split(shapes: dict[str, tuple[int, ...]]) -> bool:
    return any(".experts.0." in name for name in shapes)
