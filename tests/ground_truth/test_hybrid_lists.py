"""The lists of Qwen3-Next, Qwen3.5 and MiniMax-M2: published counts and sizes, and transformers' own modules."""

import json
import re
from math import prod
from pathlib import Path

import pytest
import torch
import transformers
from families import Family
from hybrid_families import HYBRIDS, change_text, write_full_hybrid
from jobs import make_plan
from plain_shares import share
from small_models import from_config

from reshard.recipes.recipe import list_packaged_recipes, load_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.recipe_choice import choose_recipe
from reshard.sources.stacked_experts import read_under_hub_names
from reshard.synthetic import TensorEntry, compute_data_size
from reshard.types import Layout

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
    few = dict.fromkeys((key for key in ("num_experts", "num_local_experts") if f"'{key}'" in str(family.full)), 12)
    changes = {**few, "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    config = change_text({key: value for key, value in family.full.items() if key != "quantization_config"}, changes)
    wanted = {key: shape for key, _, shape in family.tensors(config) if not key.startswith("mtp.")}
    known = {key: value for key, value in config.items() if key not in ("published", "architectures")}
    with torch.device("meta"):
        model = from_config(transformers.AutoConfig.for_model(**known), dtype=torch.bfloat16)
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        found.pop("lm_head.weight")
    assert fuse(wanted) == found


def fuse(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Under the names that transformers has in memory: all experts of a layer in two tensors."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        parts = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name.replace("block_sparse_moe", "mlp"))
        if parts is None:
            found[name.replace("block_sparse_moe", "mlp")] = shape
        elif parts[3] in ("down_proj", "w2"):
            found[f"{parts[1]}.down_proj"] = (int(parts[2]) + 1, *shape)
        else:
            found[f"{parts[1]}.gate_up_proj"] = (int(parts[2]) + 1, 2 * shape[0], shape[1])
    return found


# --- at full size ---


@pytest.mark.parametrize(
    ("name", "recipe", "ranks"),
    [
        ("qwen3-next-fp8", "qwen3-next", 4),
        ("qwen3.5-27b", "qwen35", 8),
        ("qwen3.6-35b-a3b", "qwen35-moe", 16),
        ("minimax-m2.7", "minimax-m2", 8),
    ],
)
def test_a_full_checkpoint_is_planned_with_the_shares_of_a_plain_converter(
    name: str, recipe: str, ranks: int, tmp_path: Path
) -> None:
    write_full_hybrid(tmp_path / name, name)
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / name).iterdir()) < 60e6
    checkpoint = read_checkpoint(tmp_path / name)
    assert len(checkpoint.files) == HYBRIDS[name].files
    assert len(checkpoint.tensors) == PUBLISHED[name][0]
    whole = read_under_hub_names(checkpoint)
    plan = make_plan(whole, load_recipe(recipe), Layout(ranks))
    config = dict(HYBRIDS[name].full)
    kept = {key: one for key, one in whole.tensors.items() if not key.startswith("mtp.")}
    found = json.loads(plan.files[1].header[8:])
    del found["__metadata__"]
    shares = {key: share(key, torch.empty(one.shape, device="meta"), config, 1, ranks) for key, one in kept.items()}
    wanted = {key: list(part.shape) for key, part in shares.items() if part is not None}
    assert {key: value["shape"] for key, value in found.items()} == wanted
    assert choose_recipe(whole, RECIPES)[0].name == recipe


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_small_checkpoint_is_of_the_same_kinds_and_has_what_sorts_wrongly(name: str) -> None:
    kinds = [{(re.sub(r"\.\d+\.", ".#.", key), dtype) for key, dtype, _ in HYBRIDS[name].tensors(config)}
             for config in (HYBRIDS[name].full, HYBRIDS[name].small)]  # fmt: skip
    assert kinds[0] == kinds[1]
    names = [key for key, _, _ in HYBRIDS[name].tensors(HYBRIDS[name].small)]
    assert {2, 10} <= {int(found[1]) for key in names if (found := re.search(r"layers\.(\d+)\.", key))}
