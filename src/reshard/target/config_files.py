"""config.json and the index of a target: as casts change them, or exactly as they were."""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from reshard.formats.huggingface import CONFIG, INDEX
from reshard.planning.file_layout import WHOLE_NAME
from reshard.planning.plan import Plan
from reshard.recipes.patterns import find_scale_placeholder
from reshard.sources.block_scales import CAST_TO_FP8
from reshard.sources.exempt_names import rename_exempt_modules
from reshard.types import WHOLE

EXEMPT = "modules_to_not_convert"
"""Config key that lists the modules without block scales."""

MATRIX = 2
"""Dimensions of the weights that a quantizer would take."""

DTYPES = ("torch_dtype", "dtype")
"""Config keys of the dtype of the weights: older and newer configs."""

PARTS = ("text_config", "vision_config")
"""Config keys of objects for parts of a model, each with a dtype of its own."""


def make_whole_files(plan: Plan) -> dict[str, bytes]:
    """Makes the config after casts, and the index of whole files unless they are one `model.safetensors`: of slices,
    whose names stand in many files, there is none. Chosen tensors (`--only`) get no config.
    """
    found = {}
    if plan.config is not None and "only" not in plan.source.subset:
        found[CONFIG] = cast_config(plan, plan.config)
    if plan.layout.to == WHOLE and [file.name for file in plan.files] != [WHOLE_NAME]:
        found[INDEX] = make_index(plan)
    return {name: make_json_text(value) for name, value in found.items()}


def make_json_text(value: Mapping[str, Any]) -> bytes:
    """Writes an object as JSON text of a file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def make_index(plan: Plan) -> dict[str, Any]:
    """Makes the index: tensor name -> file name, sorted by name; `total_size` is the size of all data, in bytes."""
    names = {plan.pieces.names[piece]: file.name for file in plan.files for piece in file.pieces.tolist()}
    size = sum(file.size - len(file.header) for file in plan.files)
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}


def cast_config(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """Changes a config to match cast weights: `quantization_config` and dtype."""
    changed = dict(config)
    if plan.layout.expert_dtype:
        changed.pop("expert_dtype", None)
        if isinstance(quantization := changed.get("quantization_config"), dict):
            changed["quantization_config"] = {key: quantization[key] for key in quantization if key != "expert_dtype"}
    if plan.layout.cast == "bf16":
        for key in ("quantization_config", "expert_dtype") if plan.recipe.scales else ():  # else nothing is dequantized
            changed.pop(key, None)
        changed = {key: round_dtypes(value) if key in PARTS else value for key, value in changed.items()}
        changed |= {key: "bfloat16" for key in DTYPES if key in changed} or {"torch_dtype": "bfloat16"}
    blocks = [cast.block for cast in plan.casts if cast.operation.startswith("quantize")]
    if plan.layout.cast in CAST_TO_FP8 and blocks:
        facts = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        power = {"scale_fmt": "ue8m0"} if plan.layout.cast == "fp8-ue8m0" else {}
        changed["quantization_config"] = {**facts, **power, "weight_block_size": list(blocks[0])}
    modules = [*find_unscaled_modules(plan), *find_unquantized_modules(plan)]
    if isinstance(quantization := changed.get("quantization_config"), dict) and modules:
        exempt = quantization.get(EXEMPT)
        known = exempt if isinstance(exempt, list) else []
        new = [module for module in modules if module not in known]
        changed["quantization_config"] = {**quantization, EXEMPT: [*known, *new]}
    return changed


def round_dtypes(part: Any) -> Any:
    """The config of a part of a model with BF16 as its dtype, where it states one."""
    return {**part, **{key: "bfloat16" for key in DTYPES if key in part}} if isinstance(part, dict) else part


def find_unscaled_modules(plan: Plan) -> list[str]:
    """Finds the modules, by the end of their names, that have no scales because the recipe dequantizes them."""
    found: dict[str, None] = {}
    for rule in plan.recipe.rules:
        if rule.relation == "dequantize":
            name = find_scale_placeholder(rule, plan.recipe)
            module = rule.left.removesuffix(f".{{{name}}}").rpartition("}.")[2]
            scale = f"{module}.{plan.recipe.scales[name].left}"
            if not plan.keeps_names or not any(piece.endswith(scale) for piece in plan.pieces.names):
                found[module] = None
    return list(found)


def find_unquantized_modules(plan: Plan) -> list[str]:
    """Finds the modules whose matrices `--cast fp8` leaves as they are. A loader may make FP8 of what no list exempts:
    vLLM's Qwen3-MoE does so with the router.
    """
    if plan.layout.cast not in CAST_TO_FP8:
        return []
    done = {cast.weight.name for cast in plan.casts if cast.operation.startswith("quantize")}
    matrices = [name for name, tensor in plan.source.tensors.items() if len(tensor.shape) == MATRIX]
    return [name.removesuffix(".weight") for name in matrices if name.endswith(".weight") and name not in done]


def carry_config(plan: Plan) -> dict[str, bytes]:
    """Makes the config of rank files, if the recipe carries it and casts, a renaming or a choice of layers and experts
    change it; an unchanged one is copied.

    Values that padding raises stay as they were: a loader must know how many rows in the files are not padding.
    """
    config = plan.source.config
    if config is None or not any(fnmatchcase(CONFIG, pattern) for pattern in plan.recipe.carry):
        return {}
    changed = cast_config(plan, config) if plan.layout.cast or plan.layout.expert_dtype else config
    is_renamed = plan.origin.config is not None and not plan.origin.is_of_ranks
    # Than the one in the folder of the source.
    is_other = changed != config or is_renamed or bool(plan.source.subset or plan.source.packed)
    return {CONFIG: make_json_text(changed)} if is_other else {}


def restore_texts(plan: Plan, made: Mapping[str, bytes]) -> dict[str, bytes]:
    """Replaces each made JSON file by its exact original text, where both have the same values."""
    origin, texts = plan.origin, plan.origin.texts or {}
    found = {
        name: texts[name] if has_same_values(plan, name, texts.get(name), content) else content
        for name, content in made.items()
    }
    if INDEX not in texts and origin.forms and is_restored(plan):
        found.pop(INDEX, None)
    return found


def has_same_values(plan: Plan, name: str, text: bytes | None, made: bytes) -> bool:
    """Whether a config has the same keys and values, or an index the same tensors in the same files. In a checkpoint
    that gets its original names back, a config with the original names of exempt modules counts as the same.
    """
    if text is None or name not in (CONFIG, INDEX):
        return False
    try:
        one, other = json.loads(text), json.loads(made)
    except (ValueError, RecursionError):
        return False
    if name == INDEX:
        (places, size), (made_places, made_size) = get_index_facts(one), get_index_facts(other)
        return bool(places == made_places and (size in (None, made_size) or is_restored(plan)))
    if plan.origin.renaming and isinstance(one, dict) and is_restored(plan):
        names = [tensor for form in plan.origin.forms for tensor in form.tensors]
        one = rename_exempt_modules(one, names, plan.origin.renaming)
    return bool(one == other)


def get_index_facts(index: Any) -> tuple[Any, Any]:
    """Returns the `weight_map` of a parsed index, and the size in bytes that it states: wrong after a cast. None for
    what it lacks.
    """
    known = index if isinstance(index, dict) else {}
    metadata = known.get("metadata")
    return known.get("weight_map"), metadata.get("total_size") if isinstance(metadata, dict) else None


def is_restored(plan: Plan) -> bool:
    """Whether the target is exactly the original checkpoint of the rank files, by the headers of all files."""
    return plan.layout.to == WHOLE and [file.header for file in plan.files] == [
        form.header for form in plan.origin.forms
    ]
