"""Padding: which config values to raise, so that each rank's part of every weight is whole blocks.

A model that is wider, with zeros in its additional rows and columns, computes the same. So padding is nothing but the
model of a larger config. Source of the rule: docs/decisions/2026-11-26-padding.md.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reshard.cut import dimension_of
from reshard.errors import refuse
from reshard.formulas import parse_shape, shape_of
from reshard.types import Layout, Recipe
from reshard.units import Kind, target_block

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
        lengths = cut_lengths(kinds, recipe, layout, raised, key)
        if type(value) is not int or value < 1 or not lengths:
            continue
        wanted = next(
            (more for more in range(value, MOST * value + 1) if suits(lengths, recipe, layout, {**raised, key: more})),
            None,
        )
        if wanted is None:
            expected = f"a value up to {MOST * value:,} whose blocks {layout.ranks} ranks can share"
            raise refuse("not-divisible", key, str(value), expected, "fewer ranks")
        raised[key] = wanted
    return raised


def suits(lengths: Iterable[tuple[str, int]], recipe: Recipe, layout: Layout, config: Mapping[str, Any]) -> bool:
    """Whether, by a config, each rank's part of each of the lengths is whole blocks."""
    sizes = [(shape_of(f"[{length}]", config, recipe.sizes)[0], block) for length, block in lengths]
    return all(size is not None and size % (layout.ranks * block) == 0 for size, block in sizes)


def cut_lengths(
    kinds: Sequence[Kind], recipe: Recipe, layout: Layout, config: Mapping[str, Any], key: str
) -> set[tuple[str, int]]:
    """The formulas of the lengths that are cut and depend on a key of the config, each with its block."""
    found = set()
    for kind in kinds:
        dimension = dimension_of(kind.rule.split)
        formulas = parse_shape(kind.rule.shape)[1] if kind.rule.shape else []
        if dimension is None or len(formulas) <= dimension:
            continue
        length = shape_of(kind.rule.shape, config, recipe.sizes)[dimension]
        without = shape_of(kind.rule.shape, {**config, key: None}, recipe.sizes)[dimension]
        if length is not None and without is None:
            found.add((formulas[dimension], target_block(kind, layout)[dimension]))
    return found


def is_paddable(kind: Kind, recipe: Recipe, layout: Layout, config: Mapping[str, Any]) -> bool:
    """Whether what a kind is cut along can be raised."""
    return any(cut_lengths([kind], recipe, layout, config, key) for key in recipe.padded)
