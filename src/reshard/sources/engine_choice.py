"""The recipes that are used only where a name, `--for` or the rank files themselves ask for them.

A family may have a recipe for its own code and others: for engines, and those with `by_name`, which share tensors in
another way. Without a word for them they do not take part in any choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from reshard.errors import refuse
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import has_ranks, list_packaged_recipes, list_recipes_to_try
from reshard.sources.match import OWN_RECIPE
from reshard.sources.recipe_choice import find_asked_recipes, list_architectures
from reshard.text import format_list
from reshard.types import RANKS, SLICED, WHOLE, Layout


def choose_for_engine(recipes: Sequence[Recipe], engine: str, *, is_named: bool) -> Sequence[Recipe]:
    """Chooses the recipes for an engine, or without one those for none, but none with `by_name`. One that was named
    (`is_named`) stays. Raises Refused if there is none for the engine.
    """
    if is_named and not engine:
        return recipes
    if fitting := [recipe for recipe in recipes if recipe.engine == engine and (is_named or not recipe.by_name)]:
        return fitting
    known = list(dict.fromkeys(filter(None, (recipe.engine for recipe in list_packaged_recipes()))))
    if is_named:
        (named,) = recipes
        found = f"{engine}, with the recipe {named.name} for {named.engine or 'no engine'}"
        raise refuse("wrong-option", "--for", found, "one of them: the recipe says it already", "leave out --for")
    near = get_close_matches(engine.lower(), known, 1)
    remedy = f"did you mean {near[0]}?" if near else "leave it out, or name a recipe of your own with --recipe"
    expected = f"one of {format_list(known)}" if known else "nothing: no packaged recipe is for an engine"
    raise refuse("wrong-option", "--for", f"{engine!r}: no such engine", expected, remedy)


def takes_ranks(recipe: str | None, engine: str | None) -> bool:
    """Whether a conversion by a recipe, or for an engine, is for a number of ranks. Raises Refused for unknown ones."""
    return any(map(has_ranks, choose_for_engine(list_recipes_to_try(recipe), engine or "", is_named=bool(recipe))))


def keeps_everything(layout: Layout, recipe: str | None, engine: str | None) -> bool:
    """Whether a target has all tensors of the source, under their names, and not the right side of a recipe. Raises
    Refused for an unknown recipe or engine.
    """
    return layout.to == WHOLE or (layout.to == SLICED and takes_ranks(recipe, engine))


def choose_uncut_layout(recipe: Recipe, layout: Layout) -> Layout:
    """Chooses the layout whose tensors are sliced: the original one, or the right side of a recipe without ranks. Any
    other layout than SLICED is returned as it is.
    """
    if layout.to != SLICED:
        return layout
    return replace(layout, to=WHOLE if has_ranks(recipe) else RANKS, ranks=1)


def require_engine_recipe(
    config: Mapping[str, Any] | None, recipes: Sequence[Recipe], engine: str, subject: str, remedy: str = ""
) -> None:
    """Raises Refused, about `subject`, if the config names a model that none of the recipes of an engine lists."""
    names = [(config or {}).get("model_type"), *list_architectures(config or {})]
    model = next((name for name in names if isinstance(name, str)), "")
    if not engine or not model or find_asked_recipes(config or {}, recipes):
        return
    there = (f"{recipe.name} ({format_list(recipe.model_types or recipe.architectures)})" for recipe in recipes)
    remedy = remedy or f"give {engine} the checkpoint itself; or without --for: the model's own layout; or {OWN_RECIPE}"
    found, expected = f"for {engine}, a model of {model}", f"one of {format_list(there, 99)}"
    raise refuse("no-recipe", subject, found, expected, remedy)


def require_engine_of_ranks(recipe: Recipe, engine: str, path: str) -> None:
    """Raises Refused if rank files are not of the engine that they shall be converted for."""
    if engine and recipe.engine != engine:
        found, expected = f"rank files of the recipe {recipe.name}", f"a whole checkpoint, or rank files for {engine}"
        remedy = f"first --to hf into another folder, then convert that with --for {engine}"
        raise refuse("wrong-option", f"--for {engine}", f"{path}: {found}", expected, remedy)


def list_recipe_words(name: str) -> list[str]:
    """Lists the words without which a command would not choose a recipe of that name: `--recipe NAME` if it is a
    packaged one that must be named, else none.
    """
    return ["--recipe", name] if is_chosen_by_name(name) else []


def is_chosen_by_name(name: str) -> bool:
    """Whether a recipe is a packaged one that no model chooses by itself: for an engine, or with `by_name`."""
    return any(recipe.name == name and (recipe.engine or recipe.by_name) for recipe in list_packaged_recipes())
