"""Members of a placeholder that the config picks, by a list or by counting; and what to say where names differ."""

from collections.abc import Iterator, Mapping
from typing import Any

from reshard.errors import Problem
from reshard.recipe_types import Placeholder, Recipe
from reshard.recipes.formulas import read_config_value
from reshard.text import format_list, format_numbers
from reshard.types import Note

OTHER_MODEL = "is a file missing, or the config another model's?"


def find_picked(place: Placeholder, whole: set[int], config: Mapping[str, Any] | None) -> set[int] | None:
    """Finds the members of a placeholder that the config picks among `whole`, or names; None if it does not tell."""
    values, listed = read_config_value(place.picked_by, config), read_config_value(place.listed, config)
    if isinstance(listed, list):
        return {number - place.listed_from for number in listed if type(number) is int}
    if isinstance(values, list) or (isinstance(values, str) and place.every):
        return {number for number, value in enumerate(values) if value in place.picked and number in whole}
    return find_every(place, whole, config)


def find_every(place: Placeholder, whole: set[int], config: Mapping[str, Any] | None) -> set[int] | None:
    """Finds the first members of `whole`, and every Nth behind them, as the config counts; None if it does not."""
    step, first = read_config_value(place.every, config), read_config_value(place.first or "0", config)
    if type(step) is not int or type(first) is not int:
        return None
    return {number for number in whole if number < first or (number - first + 1) % max(step, 1) == 0}


def find_picking_key(place: Placeholder, config: Mapping[str, Any] | None) -> str:
    """Finds the config key that picks the members of a placeholder; empty if the config has none of them."""
    keys = list_keys_of(place.listed, place.picked_by, place.every)
    return next((key for key in keys if read_config_value(key, config) is not None), "")


def find_step_key(place: Placeholder, config: Mapping[str, Any]) -> str:
    """Finds the config key by which every Nth member is picked; empty if the config has none."""
    return next((key for key in list_keys_of(place.every) if read_config_value(key, config) is not None), "")


def list_keys_of(*formulas: str) -> list[str]:
    """Lists the keys of formulas that are choices: of `freq or 1` the key `freq`."""
    choices = (choice for formula in formulas for choice in formula.split(" or "))
    return [choice for choice in choices if choice and not choice.isdigit()]


def add_picked(
    recipe: Recipe, members: Mapping[str, set[int]], config: Mapping[str, Any] | None
) -> dict[str, set[int]]:
    """Adds to the members by the names those that the config picks, where a placeholder may have others too."""
    picked = {
        place.name: find_picked(place, members[place.some_of], config) or set()
        for place in recipe.placeholders.values()
        if place.others
    }
    return {name: numbers | picked.get(name, set()) for name, numbers in members.items()}


def check_picked(
    place: Placeholder, recipe: Recipe, members: Mapping[str, set[int]], config: Mapping[str, Any] | None
) -> Iterator[Problem]:
    """Reports a placeholder whose members differ from those that the config picks or names."""
    whole = members.get(place.within or place.some_of, set())
    wanted = find_picked(place, whole, config)
    if place.others:
        yield from check_list(place, recipe, members, config)
    elif wanted is not None and wanted != members[place.name]:
        found = f"{format_numbers(members[place.name])} by the names of the tensors"
        expected = f"{format_numbers(wanted)}, as {find_picking_key(place, config)} of config.json says"
        expected += f", which counts from {place.listed_from}" if place.listed_from else ""
        yield Problem("contradiction", place.counts, found, expected, OTHER_MODEL)


def check_list(
    place: Placeholder, recipe: Recipe, members: Mapping[str, set[int]], config: Mapping[str, Any] | None
) -> Iterator[Problem]:
    """Reports a list that is too short, or no member at all, of a placeholder that may have others than the config
    picks. A picked one that lacks is reported elsewhere, tensor by tensor.
    """
    values, whole = read_config_value(place.picked_by, config), members[place.some_of]
    counts = recipe.placeholders[place.some_of].counts
    if isinstance(values, list | str) and len(values) < len(whole):
        subject, found = f"{find_picking_key(place, config)} of config.json", f"{len(values)} values"
        yield Problem("contradiction", subject, found, f"{len(whole)}, one for each of the {counts}", OTHER_MODEL)
    elif whole and not members[place.name] and config is None:
        # The names are all that tells one model from another then.
        expected = f"{place.counts} in some of the {counts}"
        yield Problem("gap", place.counts, "none by the names of the tensors", expected, "is it another model?")


def suggest_picking_key(place: Placeholder, config: Mapping[str, Any] | None) -> str:
    """Suggests what to look at where a member lacks tensors: the config key that picks it, or those that could."""
    if config is None:
        return ""
    if key := find_picking_key(place, config):
        return f"{OTHER_MODEL} {key} in config.json tells the {place.counts}"
    keys = list_keys_of(place.picked_by, place.every)
    return f"is a file missing? a model with fewer {place.counts} tells them in its config.json: {format_list(keys)}"


def note_others(recipe: Recipe, members: Mapping[str, set[int]], config: Mapping[str, Any] | None) -> Iterator[Note]:
    """Notes members that the config does not pick and that may be there; and without a config, that some may lack."""
    for place in recipe.placeholders.values():
        if not place.others:
            continue
        wholes, found = members[place.some_of], members[place.name]
        picked, counts = find_picked(place, wholes, config), recipe.placeholders[place.some_of].counts
        if picked is None and found != wholes:
            text = "by the names; without a config.json nothing tells whether one is missing"
            yield Note("not-picked", f"{place.counts} in {len(found)} of {len(wholes)} {counts} {text}")
        elif picked is not None and (others := found - picked):
            text = f"{counts} {format_numbers(others)}, where {find_picking_key(place, config)} of config.json has none"
            yield Note("not-picked", f"{place.counts} in {text}: kept; {place.others}")
