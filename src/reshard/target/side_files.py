"""The files beside the tensors: tokenizer, config.json, index, and run_config.json by the `run` keys of the recipe."""

import json
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from reshard.errors import Problem, refuse, require_none
from reshard.formats.huggingface import CONFIG, INDEX, SUFFIX
from reshard.formats.json_input import require_no_pointer
from reshard.formats.target_names import JOURNAL, MANIFEST, PARTIAL
from reshard.planning.file_layout import WHOLE_NAME
from reshard.planning.plan import Plan
from reshard.recipes.formulas import UnknownKey, add_old_keys, compute_formula
from reshard.recipes.patterns import find_scale_placeholder
from reshard.sources.block_scales import CAST_TO_FP8
from reshard.types import RANKS, WHOLE, Recipe


def restore_texts(plan: Plan, made: Mapping[str, bytes]) -> dict[str, bytes]:
    """Replaces each made JSON file by its exact original text, where both have the same values."""
    origin, texts = plan.origin, plan.origin.texts or {}
    found = {
        name: texts[name] if has_same_values(name, texts.get(name), content) else content
        for name, content in made.items()
    }
    if INDEX not in texts and origin.forms and is_restored(plan):
        found.pop(INDEX, None)
    return found


def has_same_values(name: str, text: bytes | None, made: bytes) -> bool:
    """Whether a config has the same keys and values, or an index the same tensors in the same files."""
    if text is None or name not in (CONFIG, INDEX):
        return False
    try:
        one, other = json.loads(text), json.loads(made)
    except (ValueError, RecursionError):
        return False
    return bool(one == other if name == CONFIG else get_weight_map(one) == get_weight_map(other))


def get_weight_map(index: Any) -> Any:
    """Returns the `weight_map` of a parsed index; None without one."""
    return index.get("weight_map") if isinstance(index, dict) else None


def is_restored(plan: Plan) -> bool:
    """Whether the target is exactly the original checkpoint of the rank files, by the headers of all files."""
    return plan.layout.to == WHOLE and [file.header for file in plan.files] == [
        form.header for form in plan.origin.forms
    ]


RUN_CONFIG = "run_config.json"
"""Not `config.json`: a tokenizer that is loaded from the folder would read it."""

EXEMPT = "modules_to_not_convert"
"""Config key that lists the modules without block scales."""

DTYPES = ("torch_dtype", "dtype")
"""Config keys of the dtype of the weights: older and newer configs."""


def make_files(plan: Plan) -> dict[str, bytes]:
    """Makes the files that a target needs besides tensors and copied files; returns name -> content."""
    if plan.layout.to == WHOLE:
        return make_whole_files(plan)
    text = make_run_config(plan)
    return {**carry_config(plan), **({RUN_CONFIG: text.encode()} if text else {})}


def carry_config(plan: Plan) -> dict[str, bytes]:
    """Makes the config of rank files, if the recipe carries it and casts change it; an unchanged one is copied.

    Values that padding raises stay as they were: a loader must know how many rows in the files are not padding.
    """
    config = plan.source.config
    if config is None or not any(fnmatchcase(CONFIG, pattern) for pattern in plan.recipe.carry):
        return {}
    changed = cast_config(plan, config) if plan.layout.cast or plan.layout.expert_dtype else config
    return {} if changed == config else {CONFIG: make_json_text(changed)}


def make_run_config(plan: Plan) -> str:
    """Makes the configuration that the inference code of the ranks is started with. Empty without a config, for chosen
    tensors (`--only`), and if the code cannot run the model.

    Formatted like the published ones: keys in the order of the recipe, four spaces, lists on one line, no last newline.
    """
    if plan.config is None or not plan.recipe.run or "only" in plan.source.subset or any(find_run_obstacles(plan)):
        return ""
    config = add_old_keys(cast_config(plan, plan.config))
    config["target"] = collect_target_facts(plan)
    found = {}
    for key, rule in plan.recipe.run.items():
        formula, *default = rule if isinstance(rule, list) else (rule, None)
        try:
            value = compute_formula(formula, config, plan.recipe.sizes)
        except UnknownKey:
            value = None
        # Without a value the key is left out, unless the recipe asks for null.
        if value not in (default and [None, *default]):
            found[key] = value
    lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def find_run_obstacles(plan: Plan) -> Iterator[str]:
    """Finds the reasons why the inference code cannot run the model: values that the code fixes and the config changes.

    Then no run configuration is written: with one, the code would run another model.
    """
    needs = plan.recipe.run_needs if plan.recipe.run and plan.layout.to == RANKS else ()
    config = add_old_keys(plan.config or {})
    for formula, *allowed in needs:
        try:
            value = compute_formula(formula, config, plan.recipe.sizes)
        except UnknownKey:
            continue
        values = [find_needed_value(one, config, plan.recipe) for one in allowed]
        if value not in values:
            wanted = " or ".join("none" if one is None else json.dumps(one) for one in values)
            yield f"{formula} is {json.dumps(value)}; the inference code has {wanted}"


def explain_no_run_config(plan: Plan) -> Iterator[str]:
    """Explains why there is no run configuration; no line if there is one."""
    yield from (f"no run_config.json: {reason}" for reason in find_run_obstacles(plan))


def find_needed_value(allowed: Any, config: Mapping[str, Any], recipe: Recipe) -> Any:
    """Finds a value that a recipe allows. After `=` it is the value of a formula; None if the config lacks its keys."""
    if not (isinstance(allowed, str) and allowed.startswith("=")):
        return allowed
    try:
        return compute_formula(allowed[1:], config, recipe.sizes)
    except UnknownKey:
        return None


def collect_target_facts(plan: Plan) -> dict[str, Any]:
    """Collects facts of the rank files for formulas: the number of members of each placeholder, by its name; `dtype`,
    the dtype of the weights; `packed`, the name of a packed dtype or None.
    """
    dtypes = {tensor.dtype for tensor in plan.pieces.tensors}
    weights = "fp8" if "F8_E4M3" in dtypes and plan.layout.cast != "bf16" else "bf16"
    return {**plan.counts, "dtype": weights, "packed": "fp4" if "F4" in dtypes else None}


def make_whole_files(plan: Plan) -> dict[str, bytes]:
    """Makes the config after casts, and the index unless the target is one `model.safetensors`. Chosen tensors
    (`--only`) get no config.
    """
    found = {}
    if plan.config is not None and "only" not in plan.source.subset:
        found[CONFIG] = cast_config(plan, plan.config)
    if [file.name for file in plan.files] != [WHOLE_NAME]:
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
        changed |= {key: "bfloat16" for key in DTYPES if key in changed} or {"torch_dtype": "bfloat16"}
    if plan.layout.cast in CAST_TO_FP8 and plan.casts:
        block = next(cast.block for cast in plan.casts)
        facts = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        power = {"scale_fmt": "ue8m0"} if plan.layout.cast == "fp8-ue8m0" else {}
        changed["quantization_config"] = {**facts, **power, "weight_block_size": list(block)}
    if isinstance(quantization := changed.get("quantization_config"), dict) and (
        modules := find_unscaled_modules(plan)
    ):
        exempt = quantization.get(EXEMPT)
        known = exempt if isinstance(exempt, list) else []
        new = [module for module in modules if module not in known]
        changed["quantization_config"] = {**quantization, EXEMPT: [*known, *new]}
    return changed


def find_unscaled_modules(plan: Plan) -> list[str]:
    """Finds the modules, by the end of their names, that have no scales because the recipe dequantizes them."""
    found: dict[str, None] = {}
    for rule in plan.recipe.rules:
        if rule.relation == "dequantize":
            name = find_scale_placeholder(rule, plan.recipe)
            module = rule.left.removesuffix(f".{{{name}}}").rpartition("}.")[2]
            scale = f"{module}.{plan.recipe.scales[name].left}"
            if plan.layout.to == RANKS or not any(piece.endswith(scale) for piece in plan.pieces.names):
                found[module] = None
    return list(found)


LARGEST_SIDE_FILE = 256 << 20
"""In bytes. Side files, such as tokenizers, are read whole."""


def read_side_files(plan: Plan) -> dict[str, bytes]:
    """Reads the side files to copy, and adds the made ones; returns name -> content, sorted by name. Raises Refused if
    a file cannot be read or is larger than LARGEST_SIDE_FILE.

    Made files replace copied ones of the same name. In the original layout all side files of the source are copied; for
    chosen tensors (`--only`) none.
    """
    if "only" in plan.source.subset:
        return make_files(plan)
    patterns, made = plan.recipe.carry, make_files(plan)
    if plan.layout.to == WHOLE:
        patterns, made = ("*",), restore_texts(plan, made)
    ours = {RUN_CONFIG} if plan.origin.is_of_ranks else set()  # belongs to the rank files, not to the model
    found = find_side_files(plan.source.folder, patterns)
    sides = {**{name: read_small(path) for name, path in found.items() if name not in {*made, *ours}}, **made}
    return dict(sorted(sides.items()))


def read_small(path: Path) -> bytes:
    """Reads a side file. Raises Refused if it is too large, cannot be read, or is a Git LFS pointer."""
    try:
        size = path.stat().st_size
        if size > LARGEST_SIDE_FILE:
            found, expected = f"{size:,} bytes", f"at most {LARGEST_SIDE_FILE:,} for a file that goes along"
            raise refuse(
                "too-large", str(path), found, expected, "move it away, or correct `carry` in a recipe of yours"
            )
        content = path.read_bytes()
    except OSError as error:
        raise refuse("cannot-read", str(path), error.strerror or str(error), "a readable file") from None
    require_no_pointer(path, content)
    return content


def is_side_file(path: Path) -> bool:
    """Whether a path is a side file: not a folder, not hidden, not a tensor file or an index, not the manifest or
    journal. A broken link counts as a file.
    """
    is_ours = path.name in (MANIFEST, JOURNAL) or path.name.endswith(PARTIAL)
    is_checkpoint = path.name.endswith((SUFFIX, SUFFIX + ".index.json"))
    return (path.is_file() or is_broken_link(path)) and not (path.name.startswith(".") or is_ours or is_checkpoint)


def is_broken_link(path: Path) -> bool:
    """Whether a path is a broken link."""
    return path.is_symlink() and not path.exists()


def list_names(folder: Path) -> list[str]:
    """Lists the names in a folder, sorted; empty if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def find_side_files(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Finds the side files of a folder that match a pattern; name -> path. Raises Refused if one is a broken link."""
    fitting = [name for name in list_names(folder) if any(fnmatchcase(name, pattern) for pattern in patterns)]
    found = {name: folder / name for name in fitting if is_side_file(folder / name)}
    lost = [str(path) for path in found.values() if is_broken_link(path)]
    expected, remedy = "a file that goes along", "download it again, or remove the link"
    require_none(Problem("missing-file", path, "a link to nothing", expected, remedy) for path in lost)
    return found
