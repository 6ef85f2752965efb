"""Headers of checkpoints of published sizes, without the files: names and shapes by the rows of a recipe."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from reshard.formats.safetensors import BITS
from reshard.recipe_types import Recipe
from reshard.recipes.alternatives import list_rules
from reshard.recipes.formulas import compute_shape, parse_shape
from reshard.types import Checkpoint, File
from reshard.types import Tensor as Stored


def make_headers(recipe: Recipe, config: Mapping[str, Any]) -> Checkpoint:
    """Makes the headers of a checkpoint with one layer, the names and shapes by the rows of the recipe."""
    is_fp8 = config.get("quantization_config", {}).get("quant_method") == "fp8"
    experts = config.get("num_experts") or config["num_local_experts"]
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for _, rule in list_rules(recipe, config):
        is_there = rule.only != "if quantization_config" or "quantization_config" in config
        is_there &= rule.only != "unless quantization_config" or "quantization_config" not in config
        if rule.relation == "drop" or "{d}" in rule.left or not is_there:
            continue
        if rule.only == "if attention_bias" and not config.get("attention_bias"):
            continue
        dtype, shape = parse_shape(rule.shape)[0] or "BF16", tuple(compute_shape(rule.shape, config, recipe.sizes))
        for expert in range(experts if "{e}" in rule.left else 1):
            name = rule.left.replace("{i}", "0").replace("{s}", "0").replace("{e}", str(expert))
            if "{p}" in name and is_fp8:
                blocks = tuple(-(-(size or 0) // 128) for size in shape)
                shapes[name.replace("{p}", "weight_scale_inv")] = "BF16", blocks
            kind = "F8_E4M3" if "{p}" in name and is_fp8 else dtype
            shapes[name.replace("{p}", "weight")] = kind, tuple(size or 0 for size in shape)
    tensors, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = prod(shape) * BITS[dtype] // 8
        tensors[name] = Stored(name, dtype, shape, 0, end, size)
        end += size
    return Checkpoint(Path("nowhere"), (File("model.safetensors", end, 0, "", 0),), tensors, config)
