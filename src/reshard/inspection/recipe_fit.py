"""Checks whether a recipe fits a checkpoint, without planning a conversion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reshard.errors import require_none
from reshard.recipe_types import Recipe
from reshard.recipes.formulas import find_unknown_keys
from reshard.sources.block_scales import check_weights, group_weights
from reshard.sources.match import match
from reshard.types import Checkpoint, Layout


@dataclass(frozen=True, slots=True)
class RecipeFit:
    """Facts about a checkpoint that a recipe fits."""

    tensors: int
    """Number of tensors, each under exactly one rule."""
    counts: Mapping[str, int]
    """Number of members by the word of the placeholder: `{"layers": 61}`. Without those that have none."""
    unknown_keys: Mapping[str, Sequence[str]]
    """Config keys that the recipe names and `config.json` lacks, with the places that name them. Empty without a
    config."""


def check_fit(checkpoint: Checkpoint, recipe: Recipe) -> RecipeFit:
    """Checks that every tensor is under one rule and as the config says, and that none is missing. Raises Refused with
    every problem.
    """
    matched, layout = match(checkpoint, recipe), Layout(1)
    kinds = group_weights(matched, recipe, layout)
    require_none(check_weights(matched, kinds, recipe, layout, checkpoint.config))
    counts = {recipe.placeholders[letter].counts: count for letter, count in matched.counts.items() if count}
    unknown = find_unknown_keys(recipe, checkpoint.config) if checkpoint.config is not None else {}
    return RecipeFit(len(checkpoint.tensors), counts, unknown)
