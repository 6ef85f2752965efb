"""Reads checkpoints whose experts are stacked, as transformers 5 has them in memory, under the names of the hub.

A recipe without ranks relates both sides. A stacked tensor is taken apart without a copy: each expert becomes a tensor
of its own, with its dtype, shape and byte range of the same file.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from reshard.errors import Problem, Refused, require_none
from reshard.recipes.formulas import read_config_value
from reshard.recipes.fusions import FUSED
from reshard.recipes.patterns import fill_pattern, find_later_members, make_patterns, split_names
from reshard.recipes.recipe import has_ranks, list_packaged_recipes
from reshard.sources.fitted_names import UNSTACKED, find_renaming, rename_checkpoint
from reshard.sources.fused_shards import FusedPattern, RowShares, list_fused_patterns
from reshard.sources.held_shards import RankPatterns, collect_rank_patterns, reverse_recipe
from reshard.sources.prefixes import KnownNames, list_names_by_kind
from reshard.sources.quantization_config import CODES
from reshard.sources.recipe_choice import find_asked_recipes, has_model_name, measure_nearness
from reshard.text import format_count, format_list
from reshard.types import Checkpoint, Note, Recipe, Tensor

MOST_EXPERTS = 1 << 16
"""In one tensor. A hostile header could name a billion of them."""


OTHERS = " and others"


class Unstacked(NamedTuple):
    """A checkpoint with stacked experts, under both names."""

    stored: Checkpoint
    """As it lies in the files; without a prefix that only its names have."""
    recipe: Recipe
    """Relates the two: its right side has the stored names."""
    checkpoint: Checkpoint
    """Under the names of the hub, an expert a tensor."""


class Stacking(NamedTuple):
    """What may relate the stacked experts of a checkpoint to the names of the hub."""

    stored: Checkpoint
    """As it lies in the files; without a prefix that only its names have."""
    recipes: Sequence[Recipe]
    """Those with such names on their right side; empty if it has no stacked experts."""
    is_told: bool
    """Whether the config names their model."""


def unstack_checkpoint(checkpoint: Checkpoint, recipes: Sequence[Recipe] = ()) -> Unstacked | None:
    """Takes the stacked experts of a checkpoint apart; None if it has none that a recipe knows. `recipes` are tried
    beside the packaged ones.

    Raises Refused if they cannot be taken apart without doubt: they are quantized, other experts lie apart already, or
    there are more or fewer than the config says.
    """
    stored, fitting, is_told = find_stacking(checkpoint, recipes)
    if is_told:
        return Unstacked(stored, fitting[0], split_stacks(stored, fitting[0])) if fitting else None
    # Without a config, models of other forms have such names too: all must fit.
    for recipe in fitting:
        with suppress(Refused):
            found = split_stacks(stored, recipe)
            if measure_nearness(found, recipe)[:2] == (0, 0):
                return Unstacked(stored, recipe, found)
    return None


def holds_stacks(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has names of stacked experts that a packaged recipe may know."""
    return bool(find_stacking(checkpoint, ()).recipes)


def find_stacking(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> Stacking:
    """Finds the recipes whose fused names a checkpoint has: those for the model of its config, else all."""
    candidates = list_stacking_recipes(recipes)
    ends = {one.name.rpartition(".")[2] for recipe in candidates for one in list_fused_patterns(recipe)}
    if not any(name.rpartition(".")[2] in ends for name in checkpoint.tensors):  # a quick look: mostly there are none
        return Stacking(checkpoint, (), is_told=False)
    config = checkpoint.config or {}
    asked = find_asked_recipes(config, candidates)
    if not asked and has_model_name(config):
        return Stacking(checkpoint, (), is_told=True)  # of another model
    return Stacking(*find_stored_names(checkpoint, asked or candidates), is_told=bool(asked))


def read_under_hub_names(checkpoint: Checkpoint, recipes: Sequence[Recipe] = ()) -> Checkpoint:
    """A checkpoint with its stacked experts taken apart, if it has any. Raises Refused as `unstack_checkpoint`."""
    found = unstack_checkpoint(checkpoint, recipes)
    return found.checkpoint if found else checkpoint


def list_stacking_recipes(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Lists the recipes without ranks: of some recipes, and of the packaged ones."""
    known = {recipe.origin: recipe for recipe in (*recipes, *list_packaged_recipes()) if not has_ranks(recipe)}
    return list(known.values())


def find_stored_names(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> tuple[Checkpoint, list[Recipe]]:
    """Finds the recipes whose fused names a checkpoint has; with a prefix changed, if it has none as they are."""
    fitting, names = list_fitting_stacks(checkpoint, recipes), list_names_by_kind(checkpoint.tensors)
    if fitting or not names.is_searched:
        return checkpoint, fitting
    known = [KnownNames(repeat_right_names(recipe)) for recipe in recipes]
    renamed = rename_checkpoint(checkpoint, found) if (found := find_renaming(checkpoint, names, known)) else checkpoint
    fitting = list_fitting_stacks(renamed, recipes)
    return (renamed, fitting) if fitting else (checkpoint, [])


def list_fitting_stacks(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> list[Recipe]:
    """Lists the recipes of which a checkpoint has a fused name."""
    keys = {key for key, _ in split_names(checkpoint.tensors)}
    return [recipe for recipe in recipes if keys & {one.pattern.key for one in list_fused_patterns(recipe)}]


def repeat_right_names(recipe: Recipe) -> Recipe:
    """A recipe with the right names on both sides, each in one row, to match them."""
    rules = {rule.right: rule for rule in recipe.rules if rule.relation != "drop"}
    same = tuple(replace(rule, relation="same", left=name) for name, rule in rules.items())
    return replace(reverse_recipe(recipe), rules=same)


def split_stacks(stored: Checkpoint, recipe: Recipe) -> Checkpoint:
    """Takes all fused tensors of a right side apart, and gives all tensors their names on the left. A tensor that the
    recipe does not know keeps its name. Raises Refused.
    """
    config = stored.config or {}
    patterns = collect_rank_patterns(recipe, reverse_recipe(recipe), config)
    names = split_names(stored.tensors)
    marked = find_later_members(names, reverse_recipe(recipe))
    places = name_places(stored)
    shares = RowShares(recipe, config, places, 1)
    require_none(check_mixture(stored, recipe, names, patterns))
    tensors: dict[str, Tensor] = {}
    count, problems = 0, list[Problem]()
    for tensor, (key, numbers) in zip(stored.tensors.values(), names, strict=True):
        fitting = [one for one in patterns.by_key.get(key, ()) if one.fits(key, numbers)]
        fitting = [one for one in fitting if one.accepts(numbers, *marked)]
        if len(fitting) != 1:
            tensors[tensor.name] = tensor
        elif fused := patterns.fused.get(fitting[0]):
            count += 1
            try:
                require_none(check_stack(tensor, fused, recipe, config, f"{places[tensor.file]}: {tensor.name}"))
                for _, name, part in shares.split(tensor, fused, numbers):
                    tensors[name] = part._replace(name=name)
            except Refused as refused:
                problems.extend(refused.problems)
        else:
            (name,) = fitting[0].renamed([numbers])
            tensors[name] = tensor._replace(name=name)
    require_none(dict.fromkeys(problems) or check_stacks_beside(stored, recipe, names, patterns))
    made = len(tensors) - (len(stored.tensors) - count)
    text = f"{format_count(count, 'stacked tensors')} of {recipe.engine or recipe.right} are read as {made:,}"
    note = Note(UNSTACKED, f"{text} under the hub's names")
    return replace(stored, tensors=tensors, notes=(*stored.notes, note))


def check_mixture(
    stored: Checkpoint, recipe: Recipe, names: Sequence[tuple[str, Sequence[str]]], patterns: RankPatterns
) -> Iterator[Problem]:
    """Reports names of the left side that the right side does not have: experts apart beside stacked ones; and what
    belongs to quantized stacks.
    """
    lefts = {
        pattern.key
        for number, rule in enumerate(recipe.rules)
        if rule.relation in FUSED or (rule.relation == "same" and rule.left != rule.right)
        for pattern in make_patterns(number, rule, recipe)
    }
    stacks = {one.key for one in patterns.fused}
    pairs = list(zip(stored.tensors, names, strict=True))
    first = next(name for name, (key, _) in pairs if key in stacks)
    if apart := [name for name, (key, _) in pairs if key in lefts and key not in patterns.by_key]:
        found, folder = f"names of the hub, though experts are stacked, as in {first}", shlex.quote(str(stored.folder))
        remedy = (
            f"do two checkpoints lie in one folder? reshard inspect {folder} --tensors '*.experts.*' names the files"
        )
        yield Problem("fused-experts", format_list(apart, 3), found, "one of the two ways in all layers", remedy)
    others = [name for name, (key, _) in pairs if key not in stacks and key.startswith(tuple(stacks))]
    scales = [name for name in others if "scale" in name.rpartition(".")[2]]
    codes = [name for name, (key, _) in pairs if key in stacks and stored.tensors[name].dtype in CODES]
    if scales or codes:
        such = f"such as {(scales or codes)[0]}"
        found = f"quantized experts, stacked: {format_count(len({*scales, *codes}), 'tensors')} {such}"
        expected = "stacked experts of BF16, F16 or F32"
        remedy = "convert the checkpoint that was loaded: under the hub's names, FP8 with block scales is read"
        yield Problem("quantized", str(stored.folder), found, expected, remedy)


def check_stacks_beside(
    stored: Checkpoint, recipe: Recipe, names: Sequence[tuple[str, tuple[str, ...]]], patterns: RankPatterns
) -> Iterator[Problem]:
    """Reports each stacked tensor that lacks where another of its layer is there: by its own name, not by a hundred."""
    stacks = [one for one in patterns.fused.values() if one.fusion.stacked]
    needed = [one for one in stacks if not recipe.rules[one.fusion.rules[0]].only]
    for key, numbers in dict.fromkeys(names):
        for here in (one for one in stacks if one.pattern.fits(key, numbers)):
            filling = {slot: int(number) for slot, number in zip(here.pattern.slots, numbers, strict=True)}
            for other in (one for one in needed if one.pattern.slots == here.pattern.slots):
                name, expected = fill_pattern(other.name, filling), f"beside {fill_pattern(here.name, filling)}"
                if name not in stored.tensors:
                    yield Problem("missing-tensor", name, "not in the checkpoint", expected, "is a file missing?")


def name_places(stored: Checkpoint) -> list[str]:
    """Names the file of each number that tensors have: of joins, the file of their first part."""
    names = [file.name for file in stored.files]
    for join in stored.joins:
        names.append(f"{names[join.parts[0][0].file].removesuffix(OTHERS)}{OTHERS}")
    return names


def check_stack(
    tensor: Tensor, fused: FusedPattern, recipe: Recipe, config: Mapping[str, Any], name: str
) -> Iterator[Problem]:
    """Reports a stack of more or fewer members than the config tells."""
    place = recipe.placeholders.get(fused.fusion.stacked)
    if place is None or not tensor.shape:
        return
    told, count = read_config_value(place.size, config) if place.size else None, tensor.shape[0]
    if isinstance(told, int) and told != count:
        found, expected = f"{count:,} {place.counts}, of shape {list(tensor.shape)}", f"{told:,}, by config.json"
        remedy = f"is config.json another model's? it says {place.size}"
        yield Problem("wrong-shape", name, found, expected, remedy)
    elif count > MOST_EXPERTS:
        yield Problem("wrong-shape", name, f"{count:,} {place.counts}", f"at most {MOST_EXPERTS:,}")
