"""Pairs each weight with its block scale, groups both by rule, dtype and shape, and checks them against the config."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import itemgetter
from typing import Any

from reshard.casts.shapes import count_blocks, unpack_shape
from reshard.errors import MOST_PROBLEMS, Problem
from reshard.recipe_types import BlockScale, Recipe, Rule
from reshard.recipes.flattening import FLATTEN
from reshard.recipes.formulas import compute_shape, parse_shape
from reshard.recipes.patterns import find_scale_placeholder
from reshard.sources.exemptions import read_exemptions
from reshard.sources.match import Family, Matched
from reshard.sources.problem_order import sort_problems
from reshard.sources.quantization_config import FLOATS, read_promise
from reshard.text import format_count
from reshard.types import WHOLE, Layout, Tensor

SCALES = ("F32", "BF16", "F8_E8M0")
"""Dtypes of block scales; the last is the only one for packed FP4."""

CAST_TO_FP8 = ("fp8", "fp8-ue8m0")
"""Values of `--cast` that quantize weights to FP8."""

LACKS_FILE = "is a file missing from the checkpoint?"


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """Weights of one rule, dtype and shape, with their block scales if any. The sequences have equal lengths."""

    rule: Rule
    number: int
    """Index of the rule in the recipe."""
    scaling: BlockScale | None
    """The block scale of weights of this rule; None if they are never scaled."""
    numbers: Sequence[tuple[str, ...]]
    """For each weight: the numbers that fill the placeholders of the rule's left name."""
    weights: Sequence[Tensor]
    """Of the source."""
    names: Sequence[str]
    """Names of the weights in the target."""
    scales: Sequence[Tensor]
    """One for each weight; empty if the weights have no block scales."""
    scale_names: Sequence[str]
    """Names of the scales in the target."""


def is_kept(rule: Rule, layout: Layout) -> bool:
    """Whether the tensors of a rule go into the target. A target in the layout of the source keeps everything."""
    return layout.to == WHOLE or (rule.relation != "drop" and (layout.keep_optional or not rule.optional))


def dequantizes(rule: Rule, layout: Layout) -> bool:
    """Whether weights of a rule have no block scales in the target, even if they have some in the source."""
    return layout.cast == "bf16" or (rule.relation == "dequantize" and layout.to != WHOLE)


def find_target_block(kind: WeightGroup, layout: Layout) -> tuple[int, int]:
    """Finds the block of the target's scales of a weight group, in elements; (1, 1) without scales."""
    if kind.scaling is None or dequantizes(kind.rule, layout) or not (kind.scales or layout.cast in CAST_TO_FP8):
        return 1, 1
    to_fp8 = kind.scales and kind.scaling.packed and layout.expert_dtype == "fp8"
    return kind.scaling.fp8_block if to_fp8 else kind.scaling.block


def group_weights(matched: Matched, recipe: Recipe, layout: Layout) -> list[WeightGroup]:
    """Groups the weights that go into the target, with their block scales, by rule, dtype and shape."""
    weights = {family.rule: family for family in matched.families if not family.is_scale}
    scales = {family.rule: family for family in matched.families if family.is_scale}
    kinds: list[WeightGroup] = []
    for number, family in weights.items():
        if is_kept(recipe.rules[number], layout):
            kinds.extend(group_weights_of_rule(recipe, layout, family, scales.get(number)))
    return kinds


def group_weights_of_rule(
    recipe: Recipe, layout: Layout, weights: Family, scales: Family | None
) -> Iterator[WeightGroup]:
    rule = recipe.rules[weights.rule]
    scaling = recipe.scales.get(find_scale_placeholder(rule, recipe))
    names = weights.names if layout.to != WHOLE else [tensor.name for tensor in weights.tensors]
    found = dict(zip(scales.numbers, zip(scales.tensors, scales.names, strict=True), strict=True)) if scales else {}
    if layout.to == WHOLE:
        found = {numbers: (tensor, tensor.name) for numbers, (tensor, _) in found.items()}
    paired = [found.get(numbers) for numbers in weights.numbers] if found else []
    groups: dict[Any, list[int]] = {}
    alike = [(tensor.dtype, tensor.shape) for tensor in weights.tensors]
    for place, key in enumerate(zip(alike, map(make_scale_key, paired), strict=True) if paired else alike):
        groups.setdefault(key, []).append(place)
    for places in groups.values():
        # With one place itemgetter returns the item itself, not a tuple.
        pick = itemgetter(*places) if len(places) > 1 else lambda column, place=places[0]: (column[place],)
        of_scales = pick(paired) if paired and paired[places[0]] else ()
        yield WeightGroup(
            rule,
            weights.rule,
            find_scaling(weights.tensors[places[0]], scaling),
            pick(weights.numbers),
            pick(weights.tensors),
            pick(names),
            [pair[0] for pair in of_scales],
            [pair[1] for pair in of_scales],
        )


def find_scaling(weight: Tensor, scaling: BlockScale | None) -> BlockScale | None:
    """Finds the block scale of a weight. Where the recipe expects packed FP4, an FP8 weight (V4 base models) has the
    block of FP8.
    """
    if scaling and scaling.packed and weight.dtype == "F8_E4M3":
        return replace(scaling, block=scaling.fp8_block, packed=False)
    return scaling


def make_scale_key(pair: tuple[Tensor, str] | None) -> tuple[str, tuple[int, ...]] | None:
    return (pair[0].dtype, pair[0].shape) if pair else None


def check_weights(
    matched: Matched, kinds: Sequence[WeightGroup], recipe: Recipe, layout: Layout, config: Mapping[str, Any] | None
) -> list[Problem]:
    """Checks weights, block scales and config against each other. Returns all problems, in the order of the layers."""
    found = chain(check_pairing(matched, kinds, recipe, layout), check_against_config(kinds, recipe, config))
    return sort_problems(islice(found, MOST_PROBLEMS))


def check_pairing(matched: Matched, kinds: Sequence[WeightGroup], recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Reports FP8 weights without a scale, scales without such a weight, and scales of a wrong shape or dtype."""
    paired = {kind.number: 0 for kind in kinds}
    for kind in kinds:
        paired[kind.number] += len(kind.scales)
    weights = {family.rule: set(family.numbers) for family in matched.families if not family.is_scale}
    for family in matched.families:
        is_whole = len(family.numbers) == paired.get(family.rule, 0)
        if family.is_scale and is_kept(recipe.rules[family.rule], layout) and not is_whole:
            for tensor, numbers in zip(family.tensors, family.numbers, strict=True):
                if numbers not in weights.get(family.rule, set()):
                    found = "a block scale without its weight"
                    yield Problem("scale-without-weight", tensor.name, found, "both", LACKS_FILE)
    for kind in kinds:
        if kind.scaling:
            yield from check_scaling(kind, kind.scaling)
    yield from check_quantizing(kinds, layout)


def check_quantizing(kinds: Sequence[WeightGroup], layout: Layout) -> Iterator[Problem]:
    """Reports weights that cannot be quantized to FP8: only BF16 matrices can. Weights that are FP8 already are
    reported once, together.
    """
    wanted = [kind for kind in kinds if quantizes(kind, layout)]
    if already := sum(len(kind.weights) for kind in wanted if kind.scales and kind.weights[0].dtype == "F8_E4M3"):
        found = f"{already:,} weights that are FP8 already, with block scales"
        remedy = "no --cast, which leaves them as they are; for scales of another kind, --cast bf16 first"
        yield Problem("wrong-option", f"--cast {layout.cast}", found, "weights of BF16", remedy)
    plain = [kind for kind in wanted if not kind.scales]
    if longer := [tensor for kind in plain for tensor in kind.weights if tensor.dtype in ("F32", "F16")]:
        found = f"{format_count(len(longer), 'weights')} of {longer[0].dtype}, such as {longer[0].name}"
        remedy = f"--to hf --cast bf16 first, then --cast {layout.cast} of the result"
        yield Problem("wrong-dtype", f"--cast {layout.cast}", found, "weights of BF16", remedy)
    for tensor in chain.from_iterable(kind.weights for kind in plain if kind.weights[0].dtype not in ("F32", "F16")):
        if tensor.dtype != "BF16" or len(tensor.shape) != 2:
            found, expected = f"{tensor.dtype} {list(tensor.shape)}", f"a matrix of BF16, for --cast {layout.cast}"
            yield Problem("wrong-dtype", tensor.name, found, expected, "another --cast, or none")


def quantizes(kind: WeightGroup, layout: Layout) -> bool:
    """Whether the layout quantizes a weight group to FP8."""
    is_free = kind.scaling is not None and not kind.scaling.stays
    return is_free and layout.cast in CAST_TO_FP8 and not dequantizes(kind.rule, layout)


def check_scaling(kind: WeightGroup, scaling: BlockScale) -> Iterator[Problem]:
    """Reports each weight or scale of a group whose scales do not fit. Dtypes and shapes are the same in a group: the
    first is checked for all.
    """
    weight, scaled = kind.weights[0], "I8" if scaling.packed else "F8_E4M3"
    if not kind.scales:
        if weight.dtype.startswith("F8_") or weight.dtype == scaled:
            for tensor in kind.weights:
                found = f"{tensor.dtype} without a block scale"
                yield Problem("weight-without-scale", tensor.name, found, "both", LACKS_FILE)
        return
    scale = kind.scales[0]
    wanted = count_blocks(find_logical_shape(weight, scaling), scaling.block)
    if weight.dtype not in (scaled, *FLOATS):
        for tensor in kind.weights:
            expected = f"{scaled}, for it has a block scale"
            remedy = f"if its bytes are {scaled} under another name: save it again with that dtype"
            yield Problem("wrong-dtype", tensor.name, tensor.dtype, expected, remedy)
        return
    if weight.dtype != scaled:
        for tensor in kind.scales:
            found, remedy = f"a block scale for a weight of {weight.dtype}", "is the checkpoint a mixture?"
            yield Problem("scale-without-weight", tensor.name, found, f"a weight of {scaled}", remedy)
        return
    known = SCALES[-1:] if scaling.packed else SCALES
    if scale.shape != wanted or scale.dtype not in known:
        for tensor, of in zip(kind.scales, kind.weights, strict=True):
            found = f"{tensor.dtype} {list(tensor.shape)}"
            expected = f"{' or '.join(known)} {list(wanted)} for a weight of {list(of.shape)}"
            yield Problem("wrong-scale", tensor.name, found, expected)
    elif len(weight.shape) != 2:
        for tensor in kind.weights:
            yield Problem("wrong-shape", tensor.name, f"shape {list(weight.shape)}", "a matrix, for its block scale")


def find_logical_shape(weight: Tensor, scaling: BlockScale | None) -> tuple[int, ...]:
    """Returns the shape of a weight in elements; packed FP4 has two elements in a byte."""
    return unpack_shape(weight, is_packed=scaling is not None and scaling.packed)


def check_against_config(
    kinds: Sequence[WeightGroup], recipe: Recipe, config: Mapping[str, Any] | None
) -> Iterator[Problem]:
    """Reports dtypes and shapes that differ from the recipe's, computed with the config."""
    yield from check_blocks(kinds, config or {})
    for kind in kinds:
        weight = kind.weights[0]
        if not kind.scales and kind.rule.relation != "drop":
            yield from check_dtypes(kind, config or {})
        if not kind.rule.shape or (config is None and kind.rule.relation != FLATTEN):
            continue
        shape = compute_shape(kind.rule.shape, config or {}, recipe.sizes)
        found = find_logical_shape(weight, kind.scaling)
        if len(shape) == len(found) and all(a in (None, b) for a, b in zip(shape, found, strict=True)):
            continue
        wanted = f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
        for tensor in kind.weights:
            expected = f"{wanted}, by {'the recipe' if config is None else 'config.json'}: {kind.rule.shape}"
            yield Problem(
                "wrong-shape", tensor.name, f"shape {list(found)}", expected, "is config.json another model's?"
            )


def check_blocks(kinds: Sequence[WeightGroup], config: Mapping[str, Any]) -> Iterator[Problem]:
    """Reports a `weight_block_size` in the config that differs from the blocks of the scales: a loader trusts it."""
    quantization = config.get("quantization_config")
    said = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    scaled = (kind.scaling for kind in kinds if kind.scales and kind.scaling and not kind.scaling.packed)
    blocks = {str([*scaling.block]): None for scaling in scaled if not scaling.stays}
    if isinstance(said, list) and blocks and str(said) not in blocks:
        found = f"weight_block_size of {said}"
        expected = f"{' or '.join(blocks)}, as the scales have it"
        yield Problem("contradiction", "quantization_config of config.json", found, expected, "correct the config")


def check_dtypes(kind: WeightGroup, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Reports weights without a block scale whose dtype is wrong, or whose config says that they are scaled."""
    dtype = parse_shape(kind.rule.shape)[0] if kind.rule.shape else ""
    expected = (dtype,) if dtype else FLOATS
    found = kind.weights[0].dtype
    if kind.scaling and (found.startswith("F8_") or (kind.scaling.packed and found == "I8")):
        return  # `check_scaling` reports the missing scale
    if kind.rule.shape and found not in expected:
        remedy = "a loader would cast it silently: is the checkpoint sound?"
        for tensor in kind.weights:
            yield Problem("wrong-dtype", tensor.name, found, " or ".join(expected), remedy)
    elif kind.scaling and kind.rule.relation != "dequantize" and (promise := read_promise(config)):
        exemptions = read_exemptions(promise.table)
        for tensor in kind.weights if exemptions.are_clear else ():
            if not exemptions.cover(tensor.name):
                said = f"a scaled weight, as {promise.place} says"
                remedy = "a loader would take it for scaled: is the checkpoint a mixture?"
                yield Problem("weight-without-scale", tensor.name, f"{found} without a block scale", said, remedy)
