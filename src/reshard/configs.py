"""The JSON files of a target: the run configuration beside rank files; config and index beside whole ones."""

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from reshard.formulas import UnknownKey, value_of
from reshard.keys import with_old_keys
from reshard.layout import WHOLE_NAME
from reshard.plan import Plan
from reshard.read import CONFIG, INDEX
from reshard.recipe import scale_letter
from reshard.types import RANKS, WHOLE, Recipe
from reshard.units import CAST_TO_FP8

RUN_CONFIG = "run_config.json"
"""Not `config.json`, which a tokenizer that is loaded from the folder would read."""
EXEMPT = "modules_to_not_convert"
"""How a config names the modules whose weights are not scaled though most are."""
DTYPES = ("torch_dtype", "dtype")
"""How a config names the dtype of its weights, by its age."""


def made_files(plan: Plan) -> dict[str, bytes]:
    """What a target needs beside its tensors and what is carried along, by name."""
    if plan.layout.to == WHOLE:
        return whole_files(plan)
    text = run_config(plan)
    return {**carried_config(plan), **({RUN_CONFIG: text.encode()} if text else {})}


def carried_config(plan: Plan) -> dict[str, bytes]:
    """The config, where rank files have it beside them and casts change it: else it goes along as it is.

    What padding raises stays as it was: a loader sees the rows in the files, and must know how many of them count.
    """
    config = plan.source.config
    if config is None or not any(fnmatchcase(CONFIG, pattern) for pattern in plan.recipe.carry):
        return {}
    changed = cast_config(plan, config) if plan.layout.cast or plan.layout.expert_dtype else config
    return {} if changed == config else {CONFIG: json_text(changed)}


def run_config(plan: Plan) -> str:
    """The configuration that the inference code of the ranks is started with; empty without a config to make it from,
    and for chosen tensors, which nothing can run.

    Keys in the order of the recipe, four spaces, lists in one line, no end of line: as the published ones are.
    """
    if plan.config is None or not plan.recipe.run or "only" in plan.source.subset or any(run_obstacles(plan)):
        return ""
    config = with_old_keys(cast_config(plan, plan.config))
    config["target"] = target_facts(plan)
    found = {}
    for key, rule in plan.recipe.run.items():
        formula, *usual = rule if isinstance(rule, list) else (rule, None)
        try:
            value = value_of(formula, config, plan.recipe.sizes)
        except UnknownKey:
            value = None
        # Without a value the key is left out, unless the recipe wants it to be said.
        if value not in (usual and [None, *usual]):
            found[key] = value
    lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def run_obstacles(plan: Plan) -> Iterator[str]:
    """Why the inference code cannot run what a config describes: what it has in itself, and the config wants otherwise.

    Then there is no run configuration beside the rank files: one would start another model.
    """
    needs = plan.recipe.run_needs if plan.recipe.run and plan.layout.to == RANKS else ()
    config = with_old_keys(plan.config or {})
    for formula, *allowed in needs:
        try:
            value = value_of(formula, config, plan.recipe.sizes)
        except UnknownKey:
            continue
        values = [needed_value(one, config, plan.recipe) for one in allowed]
        if value not in values:
            wanted = " or ".join("none" if one is None else json.dumps(one) for one in values)
            yield f"{formula} is {json.dumps(value)}; the inference code has {wanted}"


def needed_value(allowed: Any, config: Mapping[str, Any], recipe: Recipe) -> Any:
    """A value that a recipe allows; behind `=` it is that of a formula, None where the config does not tell it."""
    if not (isinstance(allowed, str) and allowed.startswith("=")):
        return allowed
    try:
        return value_of(allowed[1:], config, recipe.sizes)
    except UnknownKey:
        return None


def target_facts(plan: Plan) -> dict[str, Any]:
    """What the rank files hold: by letter how many of each numbered place; `dtype`, that of the weights; `packed`, the
    name of a packed dtype.
    """
    dtypes = {tensor.dtype for tensor in plan.pieces.tensors}
    weights = "fp8" if "F8_E4M3" in dtypes and plan.layout.cast != "bf16" else "bf16"
    return {**plan.counts, "dtype": weights, "packed": "fp4" if "F4" in dtypes else None}


def whole_files(plan: Plan) -> dict[str, bytes]:
    """The config, as the casts have left it, and the index, unless there is one file by the name of all. Chosen tensors
    have no config.
    """
    found = {}
    if plan.config is not None and "only" not in plan.source.subset:
        found[CONFIG] = cast_config(plan, plan.config)
    if [file.name for file in plan.files] != [WHOLE_NAME]:
        found[INDEX] = index(plan)
    return {name: json_text(value) for name, value in found.items()}


def json_text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def index(plan: Plan) -> dict[str, Any]:
    """Which tensor is in which file, sorted by name; the size is that of the data, in bytes."""
    names = {plan.pieces.names[piece]: file.name for file in plan.files for piece in file.pieces.tolist()}
    size = sum(file.size - len(file.header) for file in plan.files)
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}


def cast_config(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config once its weights are cast: how they are quantised, and their dtype."""
    changed = dict(config)
    if plan.layout.expert_dtype:
        changed.pop("expert_dtype", None)
        if isinstance(quantization := changed.get("quantization_config"), dict):
            changed["quantization_config"] = {key: quantization[key] for key in quantization if key != "expert_dtype"}
    if plan.layout.cast == "bf16":
        for key in ("quantization_config", "expert_dtype"):
            changed.pop(key, None)
        changed |= {key: "bfloat16" for key in DTYPES if key in changed} or {"torch_dtype": "bfloat16"}
    if plan.layout.cast in CAST_TO_FP8 and plan.casts:
        block = next(cast.block for cast in plan.casts)
        usual = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        power = {"scale_fmt": "ue8m0"} if plan.layout.cast == "fp8-ue8m0" else {}
        changed["quantization_config"] = {**usual, **power, "weight_block_size": list(block)}
    if isinstance(quantization := changed.get("quantization_config"), dict) and (modules := unscaled_modules(plan)):
        exempt = quantization.get(EXEMPT)
        known = exempt if isinstance(exempt, list) else []
        new = [module for module in modules if module not in known]
        changed["quantization_config"] = {**quantization, EXEMPT: [*known, *new]}
    return changed


def unscaled_modules(plan: Plan) -> list[str]:
    """The ends of the names of modules whose weights the recipe dequantises: they are not scaled, as all others are."""
    found: dict[str, None] = {}
    for rule in plan.recipe.rules:
        if rule.relation == "dequantize":
            letter = scale_letter(rule, plan.recipe)
            module = rule.left.removesuffix(f".{{{letter}}}").rpartition("}.")[2]
            scale = f"{module}.{plan.recipe.scales[letter].left}"
            if plan.layout.to == RANKS or not any(name.endswith(scale) for name in plan.pieces.names):
                found[module] = None
    return list(found)
