"""Which recipe a checkpoint wants."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from reshard.errors import Refused, listed, refuse
from reshard.match import OWN_RECIPE, match, match_names
from reshard.names import split_name
from reshard.types import Checkpoint, Recipe

FITS = "it fits, but the config names another model"


def choose_recipe(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> Recipe:
    """The recipe of a checkpoint: by its config's model type, else its architecture; of several, or where the config
    says neither, by the tensors' names.

    Raises Refused if none fits or, by the names, more than one; and for a model that no recipe speaks of, whatever its
    names: it may be another that has borrowed them.
    """
    config = checkpoint.config or {}
    asked = asked_recipes(config, recipes)
    if not asked and any(isinstance(name, str) for name in (config.get("model_type"), *architectures_of(config))):
        raise no_recipe(checkpoint, recipes, [])
    candidates = asked or recipes
    if len(candidates) == 1:
        return candidates[0]
    fitting = [recipe for recipe in candidates if fits(checkpoint, recipe)]
    if len(fitting) == 1:
        return fitting[0]
    raise no_recipe(checkpoint, candidates, fitting)


def wanted_recipes(config: Mapping[str, Any], recipes: Sequence[Recipe]) -> Sequence[Recipe]:
    """Those that a config asks for; all if it asks for none of them."""
    return asked_recipes(config, recipes) or recipes


def asked_recipes(config: Mapping[str, Any], recipes: Sequence[Recipe]) -> Sequence[Recipe]:
    """Those that a config asks for, by its model type or else its architecture."""
    known = architectures_of(config)
    by_type = [recipe for recipe in recipes if config.get("model_type") in recipe.model_types]
    return by_type or [recipe for recipe in recipes if any(found in known for found in recipe.architectures)]


def architectures_of(config: Mapping[str, Any]) -> list[Any]:
    found = config.get("architectures")
    return found if isinstance(found, list) else []


def fits(checkpoint: Checkpoint, recipe: Recipe) -> bool:
    if match_names(checkpoint, recipe)[1]:  # at once: match would first look for the nearest rule of every name
        return False
    try:
        match(checkpoint, recipe)
    except Refused:
        return False
    return True


def misfit(checkpoint: Checkpoint, recipes: Sequence[Recipe], name: str, unknown: Sequence[str]) -> str:
    """Why a recipe does not fit, in a few words; `#` is a number."""
    if unknown:
        return f"it does not know {listed(dict.fromkeys(split_name(name)[0] for name in unknown))}"
    try:
        match(checkpoint, next(recipe for recipe in recipes if recipe.name == name))
    except Refused as refused:
        return listed((f"{problem.subject}: {problem.found}" for problem in refused.problems), 3)
    return FITS


def no_recipe(checkpoint: Checkpoint, recipes: Sequence[Recipe], fitting: Sequence[Recipe]) -> Refused:
    """Names the recipe that knows most of the tensors, and what it does not know."""
    if fitting:
        names = listed(recipe.name for recipe in fitting)
        return refuse("no-recipe", str(checkpoint.folder), f"{names} all fit", "one recipe", "choose one with --recipe")
    unknown = {recipe.name: list(match_names(checkpoint, recipe)[1]) for recipe in recipes}
    nearest = min(unknown, key=lambda name: len(unknown[name]))
    model = (checkpoint.config or {}).get("model_type", "no model_type in a config.json")
    model = model if isinstance(model, str) else reprlib.repr(model)
    misfits = misfit(checkpoint, recipes, nearest, unknown[nearest])
    found = f"{model}; the nearest recipe is {nearest}: {misfits}"
    remedy = f"--recipe {nearest}, if it is that model under another name; or {OWN_RECIPE}"
    remedy = remedy if misfits == FITS else OWN_RECIPE
    return refuse("no-recipe", str(checkpoint.folder), found, f"one of {listed(unknown, 99)}", remedy)
