"""The choice of a recipe: by the config's model, else by the tensor names. If none fits, the nearest tells why."""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any, NamedTuple

from reshard.errors import MOST_PROBLEMS, Problem, Refused, refuse
from reshard.numbered_names import split_name
from reshard.recipe_types import Recipe
from reshard.recipes.formulas import find_unknown_keys
from reshard.sources.completeness import check_missing, check_placeholders
from reshard.sources.match import OWN_RECIPE, Matched, find_members, match, match_names
from reshard.sources.packed_weights import collect_modules
from reshard.sources.quantized import explain_unknown
from reshard.text import format_list
from reshard.types import Checkpoint

FITS = "it fits, but the config names another model"

NEARLY_ALL = 0.99
"""Part of the names that a recipe must know to be the model's, if no config names the model."""


class Nearness(NamedTuple):
    """How far a recipe is from fitting a checkpoint. The first that is smallest is the nearest."""

    unknown: int
    """Number of tensors without exactly one rule."""
    faults: int
    """Number of missing tensors, gaps, and contradictions with the config."""
    unknown_keys: int
    """Number of config keys that the recipe names and the config lacks."""


FEW_KINDS = 3
"""Fewer kinds of unknown names are told one by one: they may be extra in the model that the config names."""

GIVE_CONFIG = "put the model's config.json beside the files, or name its folder with --config: it names the model"


def choose_recipe(
    checkpoint: Checkpoint, recipes: Sequence[Recipe], *, keep_optional: bool = False
) -> tuple[Recipe, Matched]:
    """Chooses the recipe of a checkpoint and matches its tensors: by the config's model type, else its architecture. If
    several recipes are left, or the config has neither, the tensor names decide.

    Raises Refused if no recipe or more than one fits: with the problems of the nearest recipe, if the config or nearly
    all names are of its model. Also if the config names a model that no recipe lists, even if the tensor names fit:
    another model may use the same names.
    """
    config = checkpoint.config or {}
    asked = find_asked_recipes(config, recipes)
    if not asked and has_model_name(config):
        raise refuse_without_recipe(checkpoint, recipes)
    candidates = asked or recipes
    if len(candidates) == 1:
        try:
            return candidates[0], match(checkpoint, candidates[0], keep_optional=keep_optional)
        except Refused as refused:
            raise explain_other_model(checkpoint, candidates[0], recipes, refused) from None
    fitting = [(recipe, matched) for recipe in candidates if (matched := match_or_none(checkpoint, recipe))]
    # A model without experts fits a recipe of dense and expert layers, too, but is hardly that model.
    fitting = [pair for pair in fitting if not lacks_experts(*pair)] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = format_list(recipe.name for recipe, _ in fitting)
        remedy = "choose one with --recipe"
        if checkpoint.config is None:
            remedy = f"{GIVE_CONFIG}; or {remedy}"
        raise refuse("no-recipe", str(checkpoint.folder), f"{names} all fit", "one recipe", remedy)
    raise refuse_by_nearest(checkpoint, candidates, is_asked=bool(asked))


def explain_other_model(checkpoint: Checkpoint, asked: Recipe, recipes: Sequence[Recipe], refused: Refused) -> Refused:
    """Explains names that the recipe for the config does not know: if another recipe knows them all, the config is most
    likely that of another model, which is one problem.
    """
    unknown = [problem for problem in refused.problems if problem.kind == "no-rule"]
    kinds = dict.fromkeys(split_name(problem.subject)[0] for problem in unknown)
    if len(kinds) < FEW_KINDS:
        return refused
    others = [recipe.name for recipe in recipes if not match_names(checkpoint, recipe)[1]]
    if not others:
        return refused
    found = f"all names are of {format_list(others, 3)}; {asked.name} does not know {len(unknown):,} of them"
    expected = f"names of {asked.name}, the model of the config; unknown are {format_list(kinds, 3)}"
    remedy = "is config.json another model's?" + (f" else {unknown[0].remedy}" if unknown[0].remedy else "")
    return refuse("contradiction", str(checkpoint.folder), found, expected, remedy)


def lacks_experts(recipe: Recipe, matched: Matched) -> bool:
    """Whether a recipe has experts, and a checkpoint has none."""
    counts = [matched.counts[name] for name, place in recipe.placeholders.items() if place.counts == "experts"]
    return bool(counts) and not any(counts)


def narrow_recipes(config: Mapping[str, Any], recipes: Sequence[Recipe]) -> Sequence[Recipe]:
    """Narrows the recipes to those that list the config's model; returns all if none does."""
    return find_asked_recipes(config, recipes) or recipes


def find_asked_recipes(config: Mapping[str, Any], recipes: Sequence[Recipe]) -> Sequence[Recipe]:
    """Finds the recipes that list the config's model type or, if none does, its architecture."""
    known = list_architectures(config)
    by_type = [recipe for recipe in recipes if config.get("model_type") in recipe.model_types]
    return by_type or [recipe for recipe in recipes if any(found in known for found in recipe.architectures)]


def list_architectures(config: Mapping[str, Any]) -> list[Any]:
    """Lists the `architectures` of a config; empty if they are no list."""
    found = config.get("architectures")
    return found if isinstance(found, list) else []


def match_or_none(checkpoint: Checkpoint, recipe: Recipe) -> Matched | None:
    """Matches a checkpoint; returns None if the recipe does not fit."""
    if match_names(checkpoint, recipe)[1]:  # a quick check: `match` would first search the nearest rule of every name
        return None
    try:
        return match(checkpoint, recipe)
    except Refused:
        return None


def has_model_name(config: Mapping[str, Any]) -> bool:
    """Whether a config names a model, known or not."""
    return any(isinstance(name, str) for name in (config.get("model_type"), *list_architectures(config)))


def refuse_by_nearest(checkpoint: Checkpoint, recipes: Sequence[Recipe], *, is_asked: bool) -> Refused:
    """Makes the refusal if none of several recipes fits. It has the problems of the nearest one, unless no config names
    the model and no recipe knows nearly all names.
    """
    measured = [measure_nearness(checkpoint, recipe) for recipe in recipes]
    least = min(measured)
    nearest = recipes[measured.index(least)]
    count = len(checkpoint.tensors)
    is_known = least.unknown <= count * (1 - NEARLY_ALL) and least.faults < count
    if not is_asked and not is_known:
        unknown = [checkpoint.tensors[name] for name in match_names(checkpoint, nearest)[1]]
        quantized = explain_unknown(checkpoint, None, unknown)
        if quantized and quantized.remedy:
            return Refused([quantized])
        return refuse_without_recipe(checkpoint, recipes)
    alike = [recipe.name for recipe, nearness in zip(recipes, measured, strict=True) if nearness == least]
    by = f"by the recipe {nearest.name}" if len(alike) == 1 else f"by each of the recipes {format_list(alike)}"
    if is_asked and len(alike) < len(recipes):
        others = [recipe.name for recipe in recipes if recipe.name not in alike]
        by += f"; {format_list(others)} {'fits' if len(others) == 1 else 'fit'} worse"
    try:
        match(checkpoint, nearest)
    except Refused as refused:
        return Refused(add_recipe(refused.problems, by))
    raise AssertionError(f"{nearest.name} fits")


def measure_nearness(checkpoint: Checkpoint, recipe: Recipe) -> Nearness:
    """Measures how far a recipe is from fitting. Counts the faults of all checks: `match` ends with the first that
    fails, so that of two recipes the worse one might show fewer.
    """
    families, unmatched = match_names(checkpoint, recipe)
    matched = Matched(tuple(families), find_members(families, recipe))
    faults = chain(
        check_placeholders(checkpoint, recipe, matched.members),
        check_missing(checkpoint.config, recipe, matched.members, matched.present, keep_optional=False),
    )
    keys = find_unknown_keys(recipe, checkpoint.config) if checkpoint.config is not None else {}
    return Nearness(len(unmatched), sum(1 for _ in islice(faults, MOST_PROBLEMS)), len(keys))


def add_recipe(problems: Sequence[Problem], by: str) -> Iterator[Problem]:
    """Adds to each problem the recipe that found it: the user has not chosen it. A quantized format needs no recipe."""
    for problem in problems:
        is_told = problem.kind == "quantized"
        yield problem if is_told else replace(problem, expected=f"{problem.expected} ({by})")


def explain_misfit(checkpoint: Checkpoint, recipe: Recipe, unknown: Sequence[str]) -> str:
    """Explains in a few words why a recipe does not fit; `#` stands for a number."""
    if unknown:
        return f"it does not know {format_list(dict.fromkeys(split_name(name)[0] for name in unknown))}"
    try:
        match(checkpoint, recipe)
    except Refused as refused:
        return format_list((f"{problem.subject}: {problem.found}" for problem in refused.problems), 3)
    return FITS


def refuse_without_recipe(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> Refused:
    """Makes the refusal if no recipe fits. It names the nearest recipe and the tensors that it lacks; and the quantized
    format of the tensors, if they have one.
    """
    unknown = {recipe.name: list(match_names(checkpoint, recipe)[1]) for recipe in recipes}
    name = min(unknown, key=lambda name: len(unknown[name]))
    nearest = next(recipe for recipe in recipes if recipe.name == name)
    model = (checkpoint.config or {}).get("model_type", "no model_type in a config.json")
    model = model if isinstance(model, str) else reprlib.repr(model)
    misfits = explain_misfit(checkpoint, nearest, unknown[name])
    found = f"{model}; the nearest recipe is {name}: {misfits}"
    remedy = f"--recipe {name}, if it is that model under another name; or {OWN_RECIPE}"
    remedy = remedy if misfits == FITS else OWN_RECIPE
    if checkpoint.config is None:
        remedy = f"{GIVE_CONFIG}; or {OWN_RECIPE}"
    if quantized := explain_unknown(checkpoint, None, [checkpoint.tensors[tensor] for tensor in unknown[name]]):
        found = f"{found}; quantized: {quantized.found}"
        remedy = f"first {quantized.remedy}; then {OWN_RECIPE}" if quantized.remedy else remedy
        if collect_modules(checkpoint.tensors):
            remedy = f"{OWN_RECIPE} and --cast bf16; its rows have the names of BF16 weights"
    expected = f"one of {format_list(unknown, 3)}: reshard recipes lists them"
    return refuse("no-recipe", str(checkpoint.folder), found, expected, remedy)
