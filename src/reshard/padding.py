"""Padding: which config values to raise, so that each rank's part of every weight is whole blocks.

A model that is wider, with zeros in its additional rows and columns, computes the same. So padding is nothing but the
model of a larger config. Source of the rule: docs/decisions/2026-11-26-padding.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reshard.cut import dimension_of
from reshard.errors import refuse
from reshard.formulas import shape_of
from reshard.types import Layout, Recipe
from reshard.units import Kind

MOST = 64
"""No value is raised to more than so many times what it was."""


def padded_config(
    config: Mapping[str, Any] | None, kinds: Sequence[Kind], recipe: Recipe, layout: Layout
) -> Mapping[str, Any]:
    """The config, each key that the recipe allows raised to the least value that suits the ranks. Raises Refused."""
    if config is None:
        raise refuse("no-config", "--pad", "no config.json", "one: padding raises its values", "copy it to the source")
    raised = dict(config)
    for key in recipe.padded:
        value = config.get(key)
        if type(value) is not int or value < 1 or not list(lengths(kinds, recipe, raised, key)):
            continue
        wanted = next(
            (more for more in range(value, MOST * value + 1) if suits(kinds, recipe, layout, raised, key, more)), None
        )
        if wanted is None:
            expected = f"a value up to {MOST * value:,} whose blocks {layout.ranks} ranks can share"
            raise refuse("not-divisible", key, str(value), expected, "fewer ranks")
        raised[key] = wanted
    return raised


def suits(
    kinds: Sequence[Kind], recipe: Recipe, layout: Layout, config: Mapping[str, Any], key: str, value: int
) -> bool:
    """Whether, with that value of the key, each part of what depends on it is whole blocks."""
    found = lengths(kinds, recipe, {**config, key: value}, key)
    return all(length % (layout.ranks * block) == 0 for length, block in found)


def can_grow(kind: Kind, recipe: Recipe, layout: Layout, config: Mapping[str, Any]) -> bool:
    """Whether the length that is cut is raised to suit the ranks: then it says nothing of other numbers of them."""
    if kind.rule.split == "padded rows":
        return True
    return layout.pad and any(True for key in recipe.padded for _ in lengths([kind], recipe, config, key))


def lengths(kinds: Sequence[Kind], recipe: Recipe, config: Mapping[str, Any], key: str) -> Iterator[tuple[int, int]]:
    """The lengths that are cut and depend on a key of the config, each with its block."""
    for kind in kinds:
        dimension = dimension_of(kind.rule.split)
        if dimension is None or not kind.rule.shape:
            continue
        shape = shape_of(kind.rule.shape, config, recipe.sizes)
        without = shape_of(kind.rule.shape, {**config, key: None}, recipe.sizes)
        length = shape[dimension]
        if length is not None and without[dimension] is None:
            yield length, kind.scaling.block[dimension] if kind.scaling and kind.scales else 1
