"""Computes for a target tensor what it should be: its name in the source, its conversion, its padded shape."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from reshard.numbered_names import split_name
from reshard.recipe_types import BlockScale, Recipe, Rule
from reshard.recipes.alternatives import list_rules
from reshard.recipes.formulas import UnknownKey, compute_formula, compute_shape, parse_shape
from reshard.recipes.fusions import FUSED, list_fusions
from reshard.recipes.patterns import WEIGHT, Pattern, find_later_members, find_scale_placeholder, make_patterns
from reshard.types import Checkpoint, Tensor
from reshard.verification.expected_boxes import find_padded_step, find_split_dimension


class SourcePlace(NamedTuple):
    """A target tensor traced back by its name: its rule, and the names in the source."""

    rule: Rule | None
    """None for a tensor of a whole file that no rule matches: it is kept."""
    scaling: BlockScale | None
    """How weights of this rule are block-scaled; None if they are not."""
    weight: str
    """The name in the source of the tensor; for a block scale, of its weight."""
    scale: str
    """The name that the block scale has, or would have, in the source; empty if the rule has no scales."""
    is_scale: bool


class InvertedRecipe(NamedTuple):
    """A recipe read from right to left: finds the source names of target tensors."""

    patterns: Mapping[str, Sequence[tuple[Pattern, Pattern, Pattern | None]]]
    """By the key of a target name: the patterns of the target name, of the weight and of its scale, if it can have one.
    """
    rules: Sequence[Rule]
    scalings: Mapping[int, BlockScale]
    """By the index of the rule."""
    marked: Mapping[str, set[str]]
    before: Mapping[str, str]
    is_whole: bool

    def locate(self, name: str) -> SourcePlace | None:
        """Finds the place of a target tensor; None if no rule, or more than one, matches its name."""
        key, numbers = split_name(name)
        fitting = [found for found in self.patterns.get(key, ()) if found[0].fits(key, numbers)]
        fitting = [found for found in fitting if found[0].accepts(numbers, self.marked, self.before)]
        if len(fitting) != 1:
            return SourcePlace(None, None, name, "", is_scale=False) if self.is_whole else None
        pattern, weight, scale = fitting[0]
        numbered = [numbers]
        return SourcePlace(
            self.rules[pattern.rule],
            self.scalings.get(pattern.rule),
            weight.renamed(numbered)[0],
            scale.renamed(numbered)[0] if scale else "",
            is_scale=pattern.is_scale,
        )


def invert_recipe(recipe: Recipe, source: Checkpoint, *, is_whole: bool) -> InvertedRecipe:
    """Inverts a recipe: for rank files from right to left names, of fused tensors to that of the first part; for whole
    files from left names to themselves.
    """
    scalings = {
        number: recipe.scales[letter]
        for number, rule in enumerate(recipe.rules)
        if (letter := find_scale_placeholder(rule, recipe))
    }
    patterns: dict[str, list[tuple[Pattern, Pattern, Pattern | None]]] = {}
    stacked = {} if is_whole else {fusion.rules[0]: f"{{{fusion.stacked}}}" for fusion in list_fusions(recipe)}
    one_way = ("drop",) if is_whole else ("drop", *FUSED)
    for number, rule in list_rules(recipe, source.config):
        if rule.relation in one_way and number not in stacked:
            continue
        first = replace(rule, left=rule.left.replace(stacked[number], "0")) if number in stacked else rule
        for triple in invert_rule(number, first, recipe, is_whole=is_whole):
            patterns.setdefault(triple[0].key, []).append(triple)
    members = find_later_members(map(split_name, source.tensors), recipe)
    return InvertedRecipe(patterns, recipe.rules, scalings, *members, is_whole)


def invert_rule(
    number: int, rule: Rule, recipe: Recipe, *, is_whole: bool
) -> Iterator[tuple[Pattern, Pattern, Pattern | None]]:
    letter = find_scale_placeholder(rule, recipe)
    right = rule.left if is_whole else rule.right
    is_kept = f"{{{letter}}}" in right
    # A dequantized weight has no scale on the right, but one on the left.
    left = right if is_kept or not letter else f"{right.removesuffix(WEIGHT)}{{{letter}}}"
    turned = replace(rule, left=left, right=rule.left)
    scales = {
        name: replace(scale, left=scale.left if is_whole else scale.right, right=scale.left)
        for name, scale in recipe.scales.items()
    }
    found = list(make_patterns(number, turned, replace(recipe, scales=scales)))
    scale = found[1] if len(found) > 1 else None
    for pattern in found if is_kept else found[:1]:
        yield pattern, found[0], scale


SAME, DEQUANTIZE, FP4_TO_FP8, QUANTIZE, ROUND = "same", "dequantize", "fp4-to-fp8", "quantize", "round"

FLATTENED = "flatten"
"""The relation of tensors whose last two dimensions are one on the right."""

NVFP4 = "nvfp4"
"""The conversion of MXFP4 whose codes stay: of scales, and of a factor in the place of the weight."""

FILL = "fill"
"""Makes the constants of a recipe."""

CONVERSION_TEXTS = {
    SAME: "as it is in the source",
    DEQUANTIZE: "dequantized to BF16",
    FP4_TO_FP8: "cast from FP4 to FP8",
    QUANTIZE: "quantized to FP8",
    ROUND: "rounded to BF16",
    NVFP4: "cast from MXFP4 to NVFP4, beside the same codes",
    FILL: "constants",
}


class TargetTensor(NamedTuple):
    """A tensor in a file of the target."""

    number: int
    """The rank of the file; with whole files, its running number."""
    tensor: Tensor


class WeightUnit(NamedTuple):
    """A tensor and its block scale, if any, as one rank (or the set of whole files) has them."""

    place: SourcePlace
    rank: int
    """0 with whole files."""
    weight: TargetTensor | None
    scale: TargetTensor | None


def choose_block_scaling(scaling: BlockScale | None, weight: Tensor) -> BlockScale | None:
    """The block scaling of one weight: where the rule has packed FP4, a weight that is not I8 has the FP8 blocks."""
    if scaling and scaling.packed and weight.dtype != "I8":
        return replace(scaling, block=scaling.fp8_block, packed=False)
    return scaling


def may_be_rounded(rule: Rule | None, scaling: BlockScale | None, weight: Tensor, scale: Tensor | None) -> bool:
    """Whether a cast to BF16 rounds a source tensor: no scale, and no parameter of another dtype in the code."""
    is_float = weight.dtype in ("F32", "F16") and scale is None and not (scaling and scaling.stays)
    return is_float and rule is not None and rule.code_dtype in ("", "BF16")


def infer_conversion(unit: WeightUnit, weight: Tensor, scale: Tensor | None, *, is_whole: bool) -> str:
    """Infers from dtype and shape how a weight was converted: kept, dequantized, FP4 to FP8, quantized, rounded.

    A dtype that no conversion gives is taken for the default conversion; comparing then reports it.
    """
    found, scaling, rule = unit.weight.tensor if unit.weight else weight, unit.place.scaling, unit.place.rule
    if found.dtype == "BF16" and may_be_rounded(rule, scaling, weight, scale):
        return ROUND
    if scaling is None or scaling.stays or len(weight.shape) != 2:
        return SAME
    if scale and rule and rule.relation == DEQUANTIZE and not is_whole:
        return DEQUANTIZE
    if scale and found.dtype == "BF16" and weight.dtype in ("F8_E4M3", "I8"):
        return DEQUANTIZE
    if scale and is_packed_fp4(weight, scaling) and found.dtype == "F8_E4M3":
        return FP4_TO_FP8
    if not scale and weight.dtype == "BF16" and found.dtype == "F8_E4M3":
        return QUANTIZE
    return SAME


def get_kept_dtype(weight: Tensor, scaling: BlockScale | None, *, is_whole: bool) -> str:
    """The dtype in the target of a weight whose bytes are kept: packed F4 is I8 in whole files, F4 in rank files."""
    return "F4" if is_packed_fp4(weight, scaling) and not is_whole else weight.dtype


def is_packed_fp4(weight: Tensor, scaling: BlockScale | None) -> bool:
    return scaling is not None and scaling.packed and weight.dtype == "I8" and bool(weight.shape)


def get_shape_in_elements(weight: Tensor, scaling: BlockScale | None) -> tuple[int, ...]:
    """The shape of a source weight in elements: an I8 packs two F4 along the last dimension."""
    return (*weight.shape[:-1], 2 * weight.shape[-1]) if is_packed_fp4(weight, scaling) else weight.shape


def get_expected_dtypes(
    conversion: str, unit: WeightUnit, weight: Tensor, scale: Tensor | None, *, is_whole: bool
) -> tuple[str, str]:
    """The dtypes of a weight and of its block scale in the target; the second is empty if there should be no scale."""
    if conversion == SAME:
        return get_kept_dtype(weight, unit.place.scaling, is_whole=is_whole), scale.dtype if scale else ""
    return {FP4_TO_FP8: ("F8_E4M3", "F8_E8M0"), QUANTIZE: ("F8_E4M3", "F32")}.get(conversion, ("BF16", ""))


@cache
def parse_dimension_formulas(shape: str) -> tuple[str, ...]:
    return tuple(parse_shape(shape)[1]) if shape else ()


def count_split_heads(rule: Rule | None, config: Mapping[str, Any]) -> int:
    """The number of heads, if the rule splits rows by heads; else 0."""
    key = rule.split.heads_key if rule else ""
    try:
        heads = compute_formula(key, config, {}) if key else 0
    except UnknownKey:
        return 0
    return heads if type(heads) is int and heads > 0 else 0


class PaddedDimensions(NamedTuple):
    """Finds the dimensions that padding may lengthen, by the recipe and the config of the source."""

    recipe: Recipe
    config: Mapping[str, Any]
    known: dict[str, tuple[int, ...]]
    """Results by the shape text of a rule."""

    def dimensions(self, rule: Rule | None) -> tuple[int, ...]:
        """The dimensions whose length depends on a config key that the recipe allows to raise."""
        if rule is None or not rule.shape or not self.recipe.padded or rule.split.is_packed:
            return ()
        if rule.shape not in self.known:
            without = {key: value for key, value in self.config.items() if key not in self.recipe.padded}
            lengths = compute_shape(rule.shape, self.config, self.recipe.sizes)
            fixed = compute_shape(rule.shape, without, self.recipe.sizes)
            pairs = enumerate(zip(lengths, fixed, strict=True))
            self.known[rule.shape] = tuple(place for place, (a, b) in pairs if a is not None and b is None)
        return self.known[rule.shape]

    def full_shape(
        self, rule: Rule | None, shape: tuple[int, ...], found: tuple[int, ...], parts: int, *, is_whole: bool
    ) -> tuple[int, ...]:
        """The padded shape of a tensor of shape `shape` in the source, of which a rank's part has the shape `found`."""
        if rule is None or is_whole or not shape:
            return shape
        if rule.split.is_padded:
            step = find_padded_step(rule.split, shape[0], parts)
            return (-(-shape[0] // step) * step, *shape[1:])
        full = list(shape)
        for place in self.dimensions(rule) if len(found) == len(shape) else ():
            length = found[place] * (parts if find_split_dimension(rule.split) == place else 1)
            full[place] = max(length, full[place])
        return tuple(full)


def count_scale_blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The number of blocks along each dimension; the last block may be partial."""
    return tuple(-(-length // side) for length, side in zip(shape, block, strict=False))
