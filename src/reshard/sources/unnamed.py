"""Tensors that stand in files of a checkpoint but not in its index: left aside, or refused if the model has them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from reshard.errors import Problem, require_none
from reshard.formats.huggingface import INDEX
from reshard.sources.match import match_names, narrow_recipes
from reshard.types import Checkpoint, Recipe, Tensor


def require_all_named(checkpoint: Checkpoint, recipes: Sequence[Recipe], *, keep_optional: bool) -> None:
    """Raises Refused if the index lacks tensors that stand in the files and that the recipe knows.

    Without this an output head or a bias that may be missing would be lost in silence. Tensors that the recipe drops,
    and names that it does not know, are left aside, as the index says.
    """
    if not checkpoint.unnamed:
        return
    others = {name: Tensor(name, "", (), 0, 0, 0) for name in checkpoint.unnamed}
    whole = replace(checkpoint, tensors={**checkpoint.tensors, **others})
    nearest = min(
        narrow_recipes(checkpoint.config or {}, recipes) if len(recipes) > 1 else recipes,
        key=lambda recipe: len(match_names(whole, recipe)[1]),
    )
    require_none(check_unnamed(whole, nearest, keep_optional=keep_optional))


def check_unnamed(whole: Checkpoint, recipe: Recipe, *, keep_optional: bool) -> Iterator[Problem]:
    """Reports the tensors of `unnamed` that a rule keeps. `whole` has them among its tensors."""
    for family in match_names(whole, recipe)[0]:
        rule = recipe.rules[family.rule]
        if rule.relation == "drop" or (rule.optional and not keep_optional):
            continue
        for tensor in family.tensors:
            if tensor.name in whole.unnamed:
                found = f"in {whole.unnamed[tensor.name]}, but not in {INDEX}"
                remedy = "add the name to the index; or --ignore-extra-files leaves the tensor out, as the index says"
                yield Problem("not-in-index", tensor.name, found, f"in both: {recipe.name} knows it", remedy)
