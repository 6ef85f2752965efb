"""The config that NVFP4 made of MXFP4 should have. Written apart from what writes it."""

import json
from collections.abc import Mapping
from typing import Any

OF_WEIGHTS = {"strategy": "tensor_group", "group_size": 16, "dynamic": False, "symmetric": True}

RENAMED = {"mxfp4-pack-quantized": "nvfp4-pack-quantized", "torch.uint8": "torch.float8_e4m3fn"}
"""A format, and a dtype of scales."""


def make_nvfp4_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the groups of compressed-tensors that are of MXFP4 weights groups of NVFP4, without activations."""
    expected: dict[str, Any] = json.loads(json.dumps(config))
    for owner in (expected, expected.get("text_config")):
        for key in ("quantization_config", "compression_config", "quantization"):
            table = owner.get(key) if isinstance(owner, dict) else None
            if isinstance(table, dict) and table.get("quant_method") == "compressed-tensors":
                write_nvfp4_table(table)
    return expected


def write_nvfp4_table(table: dict[str, Any]) -> None:
    """Makes of a table what it should be."""
    groups = table.get("config_groups")
    found = [group for group in groups.values() if is_mxfp4(group)] if isinstance(groups, dict) else []
    for group in found:
        weights = group["weights"]
        weights.update(OF_WEIGHTS)
        for place, key in ((group, "format"), (weights, "scale_dtype"), (weights, "zp_dtype")):
            if key in place and isinstance(place[key], str):
                place[key] = RENAMED.get(place[key], place[key])
        group["input_activations"] = None
    if found and isinstance(table.get("format"), str):
        table["format"] = RENAMED.get(table["format"], table["format"])
    if found and "kv_cache_scheme" in table:
        table["kv_cache_scheme"] = None


def is_mxfp4(group: Any) -> bool:
    """Whether a group is of weights of 4-bit floats in groups of 32."""
    weights = group.get("weights") if isinstance(group, dict) else None
    wanted = {"num_bits": 4, "type": "float", "group_size": 32}
    return isinstance(weights, dict) and all(weights.get(key) == value for key, value in wanted.items())
