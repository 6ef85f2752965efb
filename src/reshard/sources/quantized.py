"""Checkpoints that are quantized in a way no recipe takes.

Told by the names and dtypes of the tensors, and by the `quantization_config` of the config. Opens no file.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reshard.errors import Problem
from reshard.numbered_names import split_name
from reshard.recipe_types import Recipe
from reshard.recipes.patterns import make_pattern
from reshard.recipes.recipe import has_ranks
from reshard.sources.packed_weights import collect_modules
from reshard.sources.problem_order import sort_by_layer
from reshard.sources.quantization_config import CODES, FLOATS, Promise, check_promise, find_stale, read_promise
from reshard.text import format_count
from reshard.types import Checkpoint, Tensor

FP8_BLOCKS, SCALES_OF_ROWS = "FP8 with block scales", "FP8 or INT8 with a scale for each tensor or row"

DESCRIBED = (FP8_BLOCKS, SCALES_OF_ROWS, "MXFP4")
"""Formats that a recipe can describe."""

FORMATS: Sequence[tuple[str, tuple[str, ...]]] = (
    ("NVFP4 of ModelOpt", (".weight_scale_2",)),
    ("NVFP4 of compressed-tensors", (".weight_packed", ".weight_global_scale")),
    ("packed integers of compressed-tensors", (".weight_packed",)),
    ("GPTQ", (".qweight", ".g_idx")),
    ("AWQ or GPTQ", (".qweight",)),
    ("bitsandbytes with 4 bits", (".absmax", ".quant_map")),
    ("bitsandbytes with 8 bits", (".SCB",)),
    ("HQQ", (".W_q",)),
    ("AQLM", (".codes", ".codebooks")),
    ("QuIP#", (".Qidxs",)),
    ("EXL3", (".trellis",)),
    ("EXL2", (".q_weight", ".q_scale")),
    ("EETQ", (".weight_scales",)),
    ("Quanto", (".weight._data", ".weight._scale")),
    ("torchao", ("._weight_qdata",)),
    ("MLX", (".scales", ".biases")),
    ("MXFP4", ("_blocks", "_scales")),
    (FP8_BLOCKS, ("_scale_inv",)),
    (SCALES_OF_ROWS, (".weight_scale",)),
    ("FP8 with a scale for each tensor", (".scale_weight",)),
)
"""Quantized formats, each with the ends of names that its tensors have. The first with all its ends counts."""

COMPANIONS: tuple[str, ...] = (
    *(".qzeros", ".scales", ".input_scale", ".weight_shape", ".weight_zero_point", ".nested_absmax"),
    *(".nested_quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"),
)
"""More ends of names in quantized checkpoints, which alone tell no format."""

ENDS = (*dict.fromkeys(end for _, ends in FORMATS for end in ends), *COMPANIONS)

BLOCKS = "_blocks"
"""The end of names of MXFP4 weights, two values in a byte. Without it, it is the name of the same in floating point."""

SERVED = ("FP8", "MXFP4", "compressed-tensors")
"""Methods that some recipe takes. With such a recipe, an unknown name is more than the method can explain."""

FUSED = ("gate_up_proj", "down_proj", "gate_proj", "up_proj", "w1", "w2", "w3", "w13_weight", "w2_weight")
"""Last words of the names of fused experts, in transformers and vLLM."""


def check_codes(checkpoint: Checkpoint, recipe: Recipe, unscaled: Sequence[Tensor]) -> Iterator[Problem]:
    """Reports weights that are quantized although every name is known: without scales, as FP8 is sometimes stored.

    `unscaled` are the matrices for which the recipe expects neither a scale nor a dtype. A few of another dtype are
    reported one by one.
    """
    codes = [tensor.name for tensor in unscaled if tensor.dtype in CODES]
    if takes_codes(recipe) or len(codes) * 2 < len(unscaled) or not codes:
        return
    promise = read_promise(checkpoint.config)
    dtype = f"{checkpoint.tensors[codes[0]].dtype} without scales"
    found = describe_format(promise, dtype, codes)
    yield Problem(
        "quantized", str(checkpoint.folder), found, describe_accepted(recipe), suggest_source(checkpoint.config or {})
    )


def explain_unknown(checkpoint: Checkpoint, recipe: Recipe | None, unknown: Sequence[Tensor]) -> Problem | None:
    """Explains all unknown tensors by one problem, if they are of a quantized format or fused experts; else None.

    `recipe` is None if no recipe is known for the model; then the remedy is empty if one could take this format.
    """
    promise = read_promise(checkpoint.config)
    own = list_own_ends(recipe) if recipe else ()
    marked = [tensor.name for tensor in unknown if tensor.name.endswith(ENDS) and not tensor.name.endswith(own)]
    by_names = find_format(marked)
    experts = find_fused_experts(recipe, unknown) or find_plain_experts(checkpoint, recipe, unknown) if recipe else None
    if experts and not by_names:
        return experts
    codes = [tensor.name for tensor in unknown if tensor.dtype in CODES]
    is_served = promise is not None and promise.method in SERVED and (recipe is None or takes_codes(recipe))
    if not by_names and not (promise and codes and (recipe is None or not is_served)):
        return None
    described = describe_format(promise, by_names, marked or codes)
    remedy = suggest_source(checkpoint.config or {})
    if recipe and not checkpoint.packed and collect_modules(checkpoint.tensors):
        remedy = "add --cast bf16, which computes its weights in BF16; or " + remedy.partition("; or ")[0]
    elif recipe is None and (by_names in DESCRIBED or (is_served and not by_names)):
        remedy = ""
    elif recipe and by_names == FP8_BLOCKS and not has_ranks(recipe):
        folder = shlex.quote(str(checkpoint.folder))
        remedy = f"reshard convert {folder} OTHER --to hf --cast bf16"
        remedy = f"first write it in BF16, in a run of its own: {remedy}; then convert OTHER"
    elif recipe and by_names == FP8_BLOCKS:
        remedy += f"; or is it another model than those of {recipe.name}? then another --recipe"
    return Problem("quantized", str(checkpoint.folder), described, describe_accepted(recipe), remedy)


def list_own_ends(recipe: Recipe) -> tuple[str, ...]:
    """Lists the ends of names that a recipe has itself: there, such a tensor is unknown for another reason."""
    lefts = [rule.left for rule in recipe.rules]
    scales = [f".{scale.left}" for scale in recipe.scales.values()]
    return (*scales, *(end for end in ENDS if any(left.endswith(end) for left in lefts)))


def find_format(names: Sequence[str]) -> str:
    """Finds the quantized format of tensors with such names; empty if they tell none."""
    present = {end for end in ENDS if any(name.endswith(end) for name in names)}
    return next((words for words, ends in FORMATS if present.issuperset(ends)), "")


def describe_format(promise: Promise | None, by_names: str, names: Sequence[str]) -> str:
    """Describes a quantized format, and by what it is known."""
    first = names[sort_by_layer(names)[0]]
    such = f"{format_count(len(names), 'tensors')} such as {first}"
    if promise is None:
        return f"{by_names}, by the names of {such}"
    also = by_names if promise.method not in by_names else ""
    return f"{promise.words}, by {promise.place}; {such}" + (f" ({also})" if also else "")


def describe_accepted(recipe: Recipe | None) -> str:
    """Describes the weights that a recipe takes."""
    if recipe is None:
        return "weights of BF16, F16 or F32, or as a recipe takes them"
    parts = ["BF16, F16 or F32"]
    scales = recipe.scales.values()
    parts += [f"{'packed FP4' if scale.packed else 'FP8'} with block scales named {scale.left}" for scale in scales]
    if any(rule.left.endswith(BLOCKS) for rule in recipe.rules):
        parts.append("MXFP4 as blocks and scales")
    if any(rule.shape.startswith("F8_") for rule in recipe.rules):
        parts.append("FP8 with a weight_scale for each row")
    return f"weights that the recipe {recipe.name} takes: {', or '.join(dict.fromkeys(parts))}"


def takes_codes(recipe: Recipe) -> bool:
    """Whether a recipe takes quantized weights of some kind."""
    return bool(recipe.scales) or any(rule.shape.startswith(("F8_", "U8 ")) for rule in recipe.rules)


def suggest_source(config: Mapping[str, Any]) -> str:
    """Suggests what to convert instead of a quantized checkpoint. The config may name what it was made from."""
    said = config.get("_name_or_path")
    origin = f" ({said}, by _name_or_path of config.json)" if isinstance(said, str) and said else ""
    return (
        f"convert the checkpoint that it was quantized from{origin}; or dequantize it first, with the tool that made it"
    )


def find_fused_experts(recipe: Recipe, unknown: Sequence[Tensor]) -> Problem | None:
    """Finds experts that are one tensor for all, under a recipe with a tensor for each."""
    known = next((rule.left for rule in recipe.rules if ".experts.{" in rule.left), "")
    names = [tensor.name for tensor in unknown if len(tensor.shape) == 3 and is_fused(tensor.name)]
    if not known or not names:
        return None
    first = names[sort_by_layer(names)[0]]
    others = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    found = "fused experts: one tensor for all experts of a layer, as transformers 5 holds them in memory"
    # Without the second step, transformers keeps what it has loaded fused, whatever the option says.
    remedy = "write them apart with transformers: model = AutoModelForCausalLM.from_pretrained(FOLDER); "
    remedy += "model._weight_conversions = None; model.save_pretrained(OTHER_FOLDER, save_original_format=True); "
    remedy += "convert OTHER_FOLDER"
    return Problem("fused-experts", f"{first}{others}", found, f"a tensor for each expert: {known}", remedy)


def find_plain_experts(checkpoint: Checkpoint, recipe: Recipe, unknown: Sequence[Tensor]) -> Problem | None:
    """Finds experts in floating point, under a recipe that has them in MXFP4 only. A config that promises MXFP4 is the
    first thing to mend: no loader would take them.
    """
    lefts = [rule.left for rule in recipe.rules if rule.left.endswith(BLOCKS)]
    keys = {make_pattern(0, left.removesuffix(BLOCKS), "", is_scale=False).key: left for left in lefts}
    floats = [tensor for tensor in unknown if tensor.dtype in FLOATS]
    plain = {tensor.name: tensor for tensor in floats if split_name(tensor.name)[0] in keys}
    if not plain:
        return None
    if stale := next(check_promise(find_stale(checkpoint, recipe, (), has_scales=False)), None):
        return stale
    names = list(plain)
    first = plain[names[sort_by_layer(names)[0]]]
    others = f" and {len(plain) - 1:,} more" if len(plain) > 1 else ""
    expected = f"MXFP4, as blocks and scales: {keys[split_name(first.name)[0]]}"
    remedy = f"give {recipe.engine or 'the engine'} the checkpoint itself, which its own loader reads"
    return Problem("wrong-dtype", f"{first.name}{others}", f"experts in {first.dtype}", expected, remedy)


def is_fused(name: str) -> bool:
    """Whether a name is that of fused experts: `mlp.experts.gate_up_proj`."""
    parts = name.removesuffix(".weight").split(".")
    return parts[-1] in FUSED and parts[-2:-1] in (["experts"], ["routed_experts"])
