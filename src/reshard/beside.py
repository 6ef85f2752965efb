"""What stands beside whole files, and whether it is true of them: their index, and the model's config."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reshard.errors import Problem, Refused
from reshard.forms import DEQUANTIZE, FP4_TO_FP8, QUANTIZE
from reshard.found import AGAIN, Found
from reshard.read import CONFIG, INDEX, read_object
from reshard.types import Recipe

DTYPES = ("torch_dtype", "dtype")
"""How a config names the dtype of its weights."""


def beside_problems(
    target: Path,
    files: Sequence[Found],
    config: Mapping[str, Any] | None,
    forms: Collection[str],
    recipe: Recipe,
    *,
    is_power: bool,
) -> Iterator[Problem]:
    """What the index and the config of a target say wrongly; `config` is that of the source."""
    for check in (index_problems(target, files), config_problems(target, config, forms, recipe, is_power=is_power)):
        try:
            yield from check
        except Refused as refused:
            yield from refused.problems


def index_problems(target: Path, files: Sequence[Found]) -> Iterator[Problem]:
    """Where the index does not name the file that a tensor is in. A single file needs none."""
    index = read_object(target / INDEX)
    if index is None:
        if len(files) > 1:
            yield Problem("missing-file", INDEX, "no such file", f"one, for {len(files)} files", AGAIN)
        return
    named = index.get("weight_map")
    named = named if isinstance(named, dict) else {}
    held = {tensor.name: file.file.name for file in files for tensor in file.tensors}
    for name in sorted(held.keys() | named.keys()):
        if named.get(name) != held.get(name):
            found = f"in {named[name]}" if name in named else "not named"
            expected = f"in {held[name]}" if name in held else "not named: it is in no file"
            yield Problem("wrong-index", f"{INDEX}: {name}", found, expected, AGAIN)
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(tensor.size for file in files for tensor in file.tensors)
    if total is not None and total != size:
        yield Problem("wrong-index", f"{INDEX}: total_size", json.dumps(total), f"{size}", AGAIN)


def config_problems(
    target: Path, config: Mapping[str, Any] | None, forms: Collection[str], recipe: Recipe, *, is_power: bool
) -> Iterator[Problem]:
    """Where the config is not that of the source, or does not say what the weights are now."""
    if config is None:
        return
    found = read_object(target / CONFIG)
    if found is None:
        yield Problem("missing-file", CONFIG, "no such file", "that of the source", AGAIN)
        return
    # How weights are held is looked at below, if that has changed.
    changed = {"quantization_config", "expert_dtype", *DTYPES} if set(forms) & {DEQUANTIZE, QUANTIZE} else set()
    changed |= {"quantization_config", "expert_dtype"} if FP4_TO_FP8 in forms else set()
    for key in sorted((config.keys() | found.keys()) - changed):
        if key in DTYPES and found.get(key) == "bfloat16":
            continue
        if found.get(key) != config.get(key):
            yield wrong(key, found, text_of(config, key))
    if DEQUANTIZE in forms:
        for key in ("quantization_config", "expert_dtype"):
            if key in found:
                yield wrong(key, found, "nothing: the weights are BF16")
        if {found.get(key, "bfloat16") for key in DTYPES} != {"bfloat16"} or not any(key in found for key in DTYPES):
            yield wrong("torch_dtype", found, '"bfloat16"')
    if FP4_TO_FP8 in forms:
        yield from expert_problems(config, found)
    if QUANTIZE in forms:
        yield from quantization_problems(found, recipe, is_power=is_power)


def expert_problems(config: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Problem]:
    """A config that still says that the experts are FP4, or that says more than that they are not."""
    if "expert_dtype" in found:
        yield wrong("expert_dtype", found, "nothing: the experts are FP8")
    if without_experts(config) != found.get("quantization_config"):
        yield wrong("quantization_config", found, json.dumps(without_experts(config)))


def without_experts(config: Mapping[str, Any]) -> Any:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return quantization
    return {key: value for key, value in quantization.items() if key != "expert_dtype"}


def quantization_problems(found: Mapping[str, Any], recipe: Recipe, *, is_power: bool) -> Iterator[Problem]:
    said = found.get("quantization_config")
    said = said if isinstance(said, dict) else {}
    block = list(next(iter(recipe.scales.values())).block)
    expected = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block}
    expected |= {"scale_fmt": "ue8m0"} if is_power else {}
    if any(said.get(key) != value for key, value in expected.items()) or ("scale_fmt" in said) != is_power:
        yield wrong("quantization_config", found, f"{json.dumps(expected)} at least")


def wrong(key: str, found: Mapping[str, Any], expected: str) -> Problem:
    return Problem("wrong-config", f"{CONFIG}: {key}", text_of(found, key), expected, AGAIN)


def text_of(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key]) if key in config else "nothing"
