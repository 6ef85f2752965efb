"""A config of MXFP4 changed to one of NVFP4: as compressed-tensors 0.20 describes its preset NVFP4A16."""

from collections.abc import Mapping
from typing import Any

from reshard.errors import refuse
from reshard.sources.quantization_config import CONFIG_KEYS

MXFP4_FORMAT, NVFP4_FORMAT = "mxfp4-pack-quantized", "nvfp4-pack-quantized"

NVFP4_WEIGHTS = {"dynamic": False, "group_size": 16, "strategy": "tensor_group", "symmetric": True}
"""What vLLM tells weight-only NVFP4 by, beside 4 bits of floats, and no activations."""

DTYPES = {"torch.uint8": "torch.float8_e4m3fn"}
"""Of scales and zero points, where a config tells them."""


def describe_as_nvfp4(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Changes what a config tells of MXFP4 weights to NVFP4; all else stays. Raises Refused if it tells of none."""
    if config is None:
        return None
    changed, inner = describe_tables(config), config.get("text_config")
    if isinstance(inner, Mapping):
        changed["text_config"] = describe_tables(inner)
    if changed == config:
        expected = "weights of MXFP4 in the config_groups of compressed-tensors, which the target tells of NVFP4"
        raise refuse("contradiction", "quantization_config of config.json", "no such group", expected)
    return changed


def describe_tables(config: Mapping[str, Any]) -> dict[str, Any]:
    """Changes the tables of quantizations in a config."""
    return {
        key: describe_table(value) if key in CONFIG_KEYS and isinstance(value, Mapping) else value
        for key, value in config.items()
    }


def describe_table(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Changes the groups of a table that are of MXFP4."""
    groups = table.get("config_groups")
    if table.get("quant_method") != "compressed-tensors" or not isinstance(groups, Mapping):
        return table
    made = {name: describe_group(group) for name, group in groups.items()}
    if made == groups:
        return table
    changed = {**table, "config_groups": made}
    if table.get("format") == MXFP4_FORMAT:
        changed["format"] = NVFP4_FORMAT
    # The scales of a cache are left aside with those of activations.
    return changed | ({"kv_cache_scheme": None} if "kv_cache_scheme" in table else {})


def describe_group(group: Any) -> Any:
    """Changes a group of a config, if its weights are of MXFP4. Activations are not quantized then."""
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        return group
    if (weights.get("type"), weights.get("num_bits"), weights.get("group_size")) != ("float", 4, 32):
        return group
    dtypes = {key: DTYPES[value] for key, value in weights.items() if isinstance(value, str) and value in DTYPES}
    changed = {**group, "weights": {**weights, **NVFP4_WEIGHTS, **dtypes}, "input_activations": None}
    return changed | ({"format": NVFP4_FORMAT} if group.get("format") == MXFP4_FORMAT else {})
