"""Checks the index and the config of a target of whole files."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from reshard.errors import Problem, Refused
from reshard.formats.huggingface import (
    CONFIG,
    INDEX,
)
from reshard.formats.json_input import read_object
from reshard.formats.manifest import read_valid_manifest
from reshard.paths import AnyPath
from reshard.recipe_types import Recipe
from reshard.recipes.formulas import compute_shape, parse_shape
from reshard.recipes.recipe import has_ranks
from reshard.text import format_list
from reshard.verification.expected import DEQUANTIZE, FP4_TO_FP8, QUANTIZE, ROUND
from reshard.verification.target_folder import CONVERT_AGAIN_HINT, TargetHeader

CONFIG_DTYPE_KEYS = ("torch_dtype", "dtype")
"""The config keys for the dtype of the weights: the old one and the new one."""

CONFIGS_OF_PARTS = ("text_config", "vision_config")
"""The config keys of objects that state a dtype of their own."""


def check_index_and_config(
    target: AnyPath,
    files: Sequence[TargetHeader],
    config: Mapping[str, Any] | None,
    conversions: Collection[str],
    recipe: Recipe,
    *,
    is_power: bool,
) -> Iterator[Problem]:
    """Wrong entries in the index and the config of a target of whole files; `config` is the config of the source."""
    for check in (
        check_target_index(target, files),
        check_target_config(target, files, config, conversions, recipe, is_power=is_power),
    ):
        try:
            yield from check
        except Refused as refused:
            yield from refused.problems


def check_target_index(
    target: AnyPath, files: Sequence[TargetHeader], own: Collection[str] | None = None
) -> Iterator[Problem]:
    """Tensors that the index does not have in the right file. A single file needs no index. Of a share, `own` has the
    names of its files: the index names others too.
    """
    index = read_object(target / INDEX)
    if index is None:
        if len(files) > 1:
            yield Problem("missing-file", INDEX, "no such file", f"one, for {len(files)} files", CONVERT_AGAIN_HINT)
        return
    named = index.get("weight_map")
    named = named if isinstance(named, dict) else {}
    file_names = {tensor.name: file.file.name for file in files for tensor in file.tensors}
    if own is not None:
        named = {name: file for name, file in named.items() if file in own or name in file_names}
    for name in sorted(file_names.keys() | named.keys()):
        if named.get(name) != file_names.get(name):
            found = f"in {named[name]}" if name in named else "not named"
            expected = f"in {file_names[name]}" if name in file_names else "not named: it is in no file"
            yield Problem("wrong-index", f"{INDEX}: {name}", found, expected, CONVERT_AGAIN_HINT)
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(tensor.size for file in files for tensor in file.tensors)
    if own is None and total is not None and total != size:
        yield Problem("wrong-index", f"{INDEX}: total_size", json.dumps(total), f"{size}", CONVERT_AGAIN_HINT)


def check_target_config(
    target: AnyPath,
    files: Sequence[TargetHeader],
    config: Mapping[str, Any] | None,
    conversions: Collection[str],
    recipe: Recipe,
    *,
    is_power: bool,
) -> Iterator[Problem]:
    """Config keys that differ from the source, or that do not match the conversions of the weights."""
    if config is None:
        return
    found = read_object(target / CONFIG)
    if found is None:
        yield Problem("missing-file", CONFIG, "no such file", "that of the source", CONVERT_AGAIN_HINT)
        return
    if not has_ranks(recipe) and not read_valid_manifest(target):
        yield from check_told_sizes(config, found, recipe)
        return
    # Keys about the dtype of weights are checked below, if the weights were converted.
    done, quantization = set(conversions), ("quantization_config", "expert_dtype")
    is_bf16 = DEQUANTIZE in done or (ROUND in done and bool(recipe.scales))
    changed = set(CONFIG_DTYPE_KEYS) if done & {DEQUANTIZE, QUANTIZE, ROUND} else set()
    changed |= set(quantization) if is_bf16 or done & {QUANTIZE, FP4_TO_FP8} else set()
    for key in sorted((config.keys() | found.keys()) - changed):
        if key in CONFIG_DTYPE_KEYS and found.get(key) == "bfloat16":
            continue
        wanted = find_wanted_value(config, key, is_rounded=bool(done & {DEQUANTIZE, ROUND}))
        if found.get(key) != wanted:
            yield make_config_problem(key, found, json.dumps(wanted) if key in config else "nothing")
    for key in quantization if is_bf16 else ():
        if key in found:
            yield make_config_problem(key, found, "nothing: the weights are BF16")
    said = [found[key] for key in CONFIG_DTYPE_KEYS if key in found]
    if done & {DEQUANTIZE, ROUND} and (not said or any(value != "bfloat16" for value in said)):
        yield make_config_problem("torch_dtype", found, '"bfloat16"')
    if FP4_TO_FP8 in done:
        yield from check_expert_dtype(config, found)
    if QUANTIZE in done:
        yield from check_quantization_config(files, found, recipe, is_power=is_power)


def find_wanted_value(config: Mapping[str, Any], key: str, *, is_rounded: bool) -> Any:
    """Finds the value that a config must have: that of the source, but for the dtype of a part that became BF16."""
    value = config.get(key)
    if is_rounded and key in CONFIGS_OF_PARTS and isinstance(value, dict):
        return {name: "bfloat16" if name in CONFIG_DTYPE_KEYS else one for name, one in value.items()}
    return value


def check_told_sizes(config: Mapping[str, Any], found: Mapping[str, Any], recipe: Recipe) -> Iterator[Problem]:
    """A config that another program than reshard wrote, with other sizes than the source's: it has keys of its own."""
    sizes = [place.size for place in recipe.placeholders.values() if place.size]
    formulas = [formula for rule in recipe.rules if rule.shape for formula in parse_shape(rule.shape)[1]]
    for formula in dict.fromkeys((*sizes, *formulas)):
        wanted, told = (compute_shape(f"[{formula}]", one, recipe.sizes)[0] for one in (config, found))
        if None not in (wanted, told) and wanted != told:
            expected = f"{wanted}, as that of the source says"
            yield Problem("wrong-config", f"{CONFIG}: {formula}", f"{told}", expected, CONVERT_AGAIN_HINT)


def check_expert_dtype(config: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Problem]:
    """A config that still says that the experts are FP4, or that differs in more than this."""
    if "expert_dtype" in found:
        yield make_config_problem("expert_dtype", found, "nothing: the experts are FP8")
    if drop_expert_dtype(config) != found.get("quantization_config"):
        yield make_config_problem("quantization_config", found, json.dumps(drop_expert_dtype(config)))


def drop_expert_dtype(config: Mapping[str, Any]) -> Any:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return quantization
    return {key: value for key, value in quantization.items() if key != "expert_dtype"}


def check_quantization_config(
    files: Sequence[TargetHeader], found: Mapping[str, Any], recipe: Recipe, *, is_power: bool
) -> Iterator[Problem]:
    """A `quantization_config` that does not describe the new FP8 weights, or does not exempt the other matrices."""
    said = found.get("quantization_config")
    said = said if isinstance(said, dict) else {}
    block = list(next(iter(recipe.scales.values())).block)
    expected = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}
    expected |= {"scale_fmt": "ue8m0"} if is_power else {}
    if any(said.get(key) != value for key, value in expected.items()) or ("scale_fmt" in said) != is_power:
        yield make_config_problem("quantization_config", found, f"{json.dumps(expected)} at least")
    exempt = said.get("modules_to_not_convert")
    tensors = [tensor for file in files for tensor in file.tensors if tensor.name.endswith(".weight")]
    plain = [one.name.removesuffix(".weight") for one in tensors if len(one.shape) == 2 and one.dtype in PLAIN_DTYPES]
    if lacking := set(plain).difference(exempt if isinstance(exempt, list) else ()):
        expected_names = f"in modules_to_not_convert: {format_list(sorted(lacking))}"
        yield make_config_problem("quantization_config", found, expected_names)


PLAIN_DTYPES = ("BF16", "F16", "F32")
"""Of matrices that are not quantized."""


def make_config_problem(key: str, found: Mapping[str, Any], expected: str) -> Problem:
    return Problem("wrong-config", f"{CONFIG}: {key}", format_config_value(found, key), expected, CONVERT_AGAIN_HINT)


def format_config_value(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key]) if key in config else "nothing"
