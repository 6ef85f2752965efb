"""Forms: what was done to a weight and its block scale, as their dtypes and shapes in the target tell it."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from reshard.backwards import Place
from reshard.boxes import dimension_of
from reshard.faults import UNITS
from reshard.formulas import UnknownKey, parse_shape, shape_of, value_of
from reshard.types import BlockScale, Recipe, Rule, Tensor

SAME, DEQUANTIZE, FP4_TO_FP8, QUANTIZE = "same", "dequantize", "fp4-to-fp8", "quantize"
WORDS = {
    SAME: "as it is in the source",
    DEQUANTIZE: "dequantised to BF16",
    FP4_TO_FP8: "cast from FP4 to FP8",
    QUANTIZE: "quantised to FP8",
}


class Seen(NamedTuple):
    """A tensor of a target file."""

    number: int
    """Of the file, or its rank."""
    tensor: Tensor


class Unit(NamedTuple):
    """A tensor of the source and what one rank, or a target of whole files, has of it: with its block scale, if any."""

    place: Place
    rank: int
    """0 with whole files."""
    weight: Seen | None
    scale: Seen | None


def scaling_of(scaling: BlockScale | None, weight: Tensor) -> BlockScale | None:
    """How a weight is scaled, or will be: where weights come packed as a rule, one that is not has blocks of FP8."""
    if scaling and scaling.packed and weight.dtype != "I8":
        return replace(scaling, block=scaling.fp8_block, packed=False)
    return scaling


def form_of(unit: Unit, weight: Tensor, scale: Tensor | None, *, is_whole: bool) -> str:
    """What was done to a weight of the source, by the dtype of what the target has. Where that fits nothing: what is
    done if nothing else is asked for.
    """
    found, scaling, rule = unit.weight.tensor if unit.weight else weight, unit.place.scaling, unit.place.rule
    if scaling is None or scaling.stays or len(weight.shape) != 2:
        return SAME
    if scale and rule and rule.relation == DEQUANTIZE and not is_whole:
        return DEQUANTIZE
    if scale and found.dtype == "BF16" and weight.dtype in ("F8_E4M3", "I8"):
        return DEQUANTIZE
    if scale and is_packed(weight, scaling) and found.dtype == "F8_E4M3":
        return FP4_TO_FP8
    if not scale and weight.dtype == "BF16" and found.dtype == "F8_E4M3":
        return QUANTIZE
    return SAME


def dtype_kept(weight: Tensor, scaling: BlockScale | None, *, is_whole: bool) -> str:
    """The dtype of a weight whose bytes are kept: packed F4 is called so in a rank file."""
    return "F4" if is_packed(weight, scaling) and not is_whole else weight.dtype


def is_packed(weight: Tensor, scaling: BlockScale | None) -> bool:
    return scaling is not None and scaling.packed and weight.dtype == "I8" and bool(weight.shape)


def numbers_shape(weight: Tensor, scaling: BlockScale | None) -> tuple[int, ...]:
    """The shape of a weight of the source as numbers: two of F4 lie in an I8."""
    return (*weight.shape[:-1], 2 * weight.shape[-1]) if is_packed(weight, scaling) else weight.shape


def dtypes_of(form: str, unit: Unit, weight: Tensor, scale: Tensor | None, *, is_whole: bool) -> tuple[str, str]:
    """Of a weight and of its block scale in the target; the second is empty if there should be none."""
    if form == SAME:
        return dtype_kept(weight, unit.place.scaling, is_whole=is_whole), scale.dtype if scale else ""
    return {DEQUANTIZE: ("BF16", ""), FP4_TO_FP8: ("F8_E4M3", "F8_E8M0"), QUANTIZE: ("F8_E4M3", "F32")}[form]


@cache
def formulas_of(shape: str) -> tuple[str, ...]:
    return tuple(parse_shape(shape)[1]) if shape else ()


def heads_of(rule: Rule | None, config: Mapping[str, Any]) -> int:
    """How many heads there are, where the rows of a rule are those of heads; else 0."""
    found = UNITS.fullmatch(rule.split) if rule else None
    try:
        heads = value_of(found[1], config, {}) if found else 0
    except UnknownKey:
        return 0
    return heads if type(heads) is int and heads > 0 else 0


class Widening(NamedTuple):
    """Which dimensions padding may widen, by the recipe and the config of the source."""

    recipe: Recipe
    config: Mapping[str, Any]
    known: dict[str, tuple[int, ...]]
    """By the shape that a rule gives."""

    def dimensions(self, rule: Rule | None) -> tuple[int, ...]:
        """Those whose length depends on a key that the recipe allows to raise."""
        if rule is None or not rule.shape or not self.recipe.padded or rule.split == "packed rows":
            return ()
        if rule.shape not in self.known:
            without = {key: value for key, value in self.config.items() if key not in self.recipe.padded}
            lengths = shape_of(rule.shape, self.config, self.recipe.sizes)
            fixed = shape_of(rule.shape, without, self.recipe.sizes)
            pairs = enumerate(zip(lengths, fixed, strict=True))
            self.known[rule.shape] = tuple(place for place, (a, b) in pairs if a is not None and b is None)
        return self.known[rule.shape]

    def full_shape(
        self, rule: Rule | None, shape: tuple[int, ...], found: tuple[int, ...], parts: int, *, is_whole: bool
    ) -> tuple[int, ...]:
        """The shape of a tensor with its padding, `shape` being that of the source, `found` that of a rank's part."""
        if rule is None or is_whole or not shape:
            return shape
        if rule.split == "padded rows":
            return (-(-shape[0] // parts) * parts, *shape[1:])
        full = list(shape)
        for place in self.dimensions(rule) if len(found) == len(shape) else ():
            length = found[place] * (parts if dimension_of(rule.split) == place else 1)
            full[place] = max(length, full[place])
        return tuple(full)
