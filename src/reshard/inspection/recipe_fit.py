"""Checks whether a recipe fits a checkpoint, without planning a conversion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reshard.errors import Refused, require_none
from reshard.recipe_types import Recipe
from reshard.recipes.formulas import find_unknown_keys
from reshard.sources.block_scales import check_weights, group_weights
from reshard.sources.match import match
from reshard.sources.packed_weights import unpack_checkpoint
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
    packed: int = 0
    """Number of packed weights that were taken as BF16: the recipe fits with `--cast bf16` only."""


def check_fit(checkpoint: Checkpoint, recipe: Recipe) -> RecipeFit:
    """Checks that every tensor is under one rule and as the config says, and that none is missing. Packed weights that
    the recipe does not know as they are stored count as BF16. Raises Refused with every problem.
    """
    try:
        return measure_fit(checkpoint, recipe)
    except Refused as refused:
        is_quantized = any(problem.kind == "quantized" for problem in refused.problems)
        unpacked = unpack_checkpoint(checkpoint, "bf16") if is_quantized else None
        if unpacked is None:
            raise
    return measure_fit(unpacked.checkpoint, recipe)


def measure_fit(checkpoint: Checkpoint, recipe: Recipe) -> RecipeFit:
    """Counts what is under the rules of a recipe. Raises Refused with every problem."""
    matched, layout = match(checkpoint, recipe), Layout(1)
    kinds = group_weights(matched, recipe, layout)
    require_none(check_weights(matched, kinds, recipe, layout, checkpoint.config))
    counts = {recipe.placeholders[letter].counts: count for letter, count in matched.counts.items() if count}
    unknown = find_unknown_keys(recipe, checkpoint.config) if checkpoint.config is not None else {}
    return RecipeFit(len(checkpoint.tensors), counts, unknown, len(checkpoint.packed))
