"""Tensors that the index does not name, or only a file left aside has: left aside, or refused if the model has them."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from reshard.errors import MOST_PROBLEMS, Problem, require_none
from reshard.formats.huggingface import INDEX, SINGLE
from reshard.recipe_types import Recipe
from reshard.sources.completeness import check_missing
from reshard.sources.match import Matched, find_members, match_names
from reshard.sources.recipe_choice import narrow_recipes
from reshard.types import Checkpoint, Tensor


def require_all_named(
    checkpoint: Checkpoint, recipes: Sequence[Recipe], *, keep_optional: bool, ignore_extra_files: bool
) -> None:
    """Raises Refused if the index lacks tensors that stand in the files and that the recipe knows; with
    `ignore_extra_files` only if the model is not complete without them.

    Otherwise an output head or a bias that may be missing would be lost in silence. Tensors that the recipe drops, and
    names that it does not know, are left aside, as the index says.
    """
    if not checkpoint.unnamed:
        return
    others = {name: Tensor(name, "", (), 0, 0, 0) for name in checkpoint.unnamed}
    whole = replace(checkpoint, tensors={**checkpoint.tensors, **others})
    nearest = min(
        narrow_recipes(checkpoint.config or {}, recipes) if len(recipes) > 1 else recipes,
        key=lambda recipe: len(match_names(whole, recipe)[1]),
    )
    needed = find_needed(checkpoint, nearest, keep_optional=keep_optional)
    known = needed if ignore_extra_files else find_known(whole, nearest, keep_optional=keep_optional)
    require_none(check_unnamed(whole, nearest, known, needed))


def find_needed(checkpoint: Checkpoint, recipe: Recipe, *, keep_optional: bool) -> set[str]:
    """Finds the unnamed tensors without which the model is not complete."""
    families, _ = match_names(checkpoint, recipe)
    matched = Matched(tuple(families), find_members(families, recipe))
    missing = check_missing(checkpoint.config, recipe, matched.members, matched.present, keep_optional=keep_optional)
    return {problem.subject for problem in islice(missing, MOST_PROBLEMS)}.intersection(checkpoint.unnamed)


def find_known(whole: Checkpoint, recipe: Recipe, *, keep_optional: bool) -> set[str]:
    """Finds the unnamed tensors that a rule keeps. `whole` has them among its tensors."""
    found: set[str] = set()
    for family in match_names(whole, recipe)[0]:
        rule = recipe.rules[family.rule]
        if rule.relation != "drop" and (keep_optional or not rule.optional):
            found.update(tensor.name for tensor in family.tensors)
    return found.intersection(whole.unnamed)


def check_unnamed(
    whole: Checkpoint, recipe: Recipe, known: Collection[str], needed: Collection[str]
) -> Iterator[Problem]:
    """Reports the known tensors of `unnamed`, in the order of their files."""
    read = {file.name for file in whole.files}
    for name, file in whole.unnamed.items():
        if name in known and file not in read:
            found, expected = f"only in {file}, which is left aside", f"in {SINGLE}: the recipe {recipe.name} knows it"
            remedy = f"rename {SINGLE}, to take all files together; or --ignore-extra-files leaves {file} out"
            yield Problem("left-aside", name, found, expected, remedy)
        elif name in known:
            remedy = f'add "{name}": "{file}" to the weight_map of the index'
            if name not in needed:
                remedy += "; or --ignore-extra-files leaves the tensor out, as the index says"
            expected = f"in both, for the recipe {recipe.name} knows it"
            yield Problem("not-in-index", name, f"in {file}, but not in {INDEX}", expected, remedy)
