"""Checks that no tensor is missing: no gap in the layers and experts, and every tensor that a rule expects."""

import reprlib
from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from typing import Any

from reshard.errors import Problem
from reshard.recipe_types import Placeholder, Recipe, Rule
from reshard.recipes.alternatives import get_answer
from reshard.recipes.formulas import describe_values, is_key, read_config_value, suggest_count
from reshard.recipes.patterns import PLACEHOLDER, fill_pattern, list_slots
from reshard.sources.picked_members import OTHER_MODEL, add_picked, check_picked, suggest_picking_key
from reshard.text import format_numbers
from reshard.types import Checkpoint, Note

MAYBE = "maybe"
"""The condition of a rule whose tensors may be missing."""

TIED = "tie_word_embeddings"
"""Config key that is true if the output head is the embedding."""

DRAFTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
"""Config keys of the number of MTP layers."""

Members = Mapping[str, set[int]]
"""The numbers that fill each placeholder."""

Present = Mapping[int, set[tuple[str, ...]]]
"""For each rule, by its index: the numbers of every tensor in the checkpoint, block scales excluded."""


def collect_members(recipe: Recipe, present: Present) -> dict[str, set[int]]:
    """Collects the numbers that fill each placeholder. Members of a placeholder within another count for both."""
    members: dict[str, set[int]] = {name: set() for name in recipe.placeholders}
    for number, tuples in present.items():
        for place, slot in enumerate(list_slots(recipe.rules[number], recipe)):
            if slot in members:
                members[slot] |= {int(text) for text in {numbers[place] for numbers in tuples}}
    for placeholder in recipe.placeholders.values():
        if whole := placeholder.within or placeholder.some_of:
            members[whole] |= members[placeholder.name]
    return members


def check_placeholders(checkpoint: Checkpoint, recipe: Recipe, members: Members) -> Iterator[Problem]:
    """Reports gaps in the numbers, and counts on which names, config and shapes disagree."""
    for place in recipe.placeholders.values():
        if place.within:
            yield from check_overlaps(place, recipe, members)
        elif not place.some_of:
            yield from check_gaps(place, members[place.name], len(members[place.after]) if place.after else 0)
        yield from check_counts(place, members[place.name], checkpoint.config)
        yield from check_picked(place, recipe, members, checkpoint.config)
        yield from check_rows(place, checkpoint, recipe, members)
    for name in sorted({place.within for place in recipe.placeholders.values() if place.within}):
        parts = [place for place in recipe.placeholders.values() if place.within == name]
        if without := members[name].difference(*(members[part.name] for part in parts)):
            found = f"{format_numbers(without)} are neither"
            expected = "each among the " + " or the ".join(part.counts for part in parts)
            remedy = "is a file missing from the checkpoint?"
            yield Problem("gap", recipe.placeholders[name].counts, found, expected, remedy)


def check_gaps(place: Placeholder, numbers: set[int], first: int) -> Iterator[Problem]:
    """Reports numbers that are not `first` to the last without a gap."""
    last = max(numbers, default=-1)
    # A single stray number can be a billion: name the gap's ends, never its members.
    if numbers and (len(numbers) != last - first + 1 or min(numbers) != first):
        found = f"{place.counts} {format_numbers(numbers)}"
        expected = f"{first} to {last} without a gap"
        yield Problem("gap", place.counts, found, expected, "is a file missing from the checkpoint?")


def check_overlaps(place: Placeholder, recipe: Recipe, members: Members) -> Iterator[Problem]:
    """Reports numbers that are members of two placeholders within the same one."""
    for other in recipe.placeholders.values():
        both = members[place.name] & members[other.name]
        if other.within == place.within and other.name > place.name and both:
            found = f"{format_numbers(both)} among the {other.counts} too"
            yield Problem("contradiction", place.counts, found, "one or the other", "is the checkpoint a mixture?")


def check_counts(place: Placeholder, numbers: set[int], config: Mapping[str, Any] | None) -> Iterator[Problem]:
    """Reports a number of members that differs from the config's."""
    key = place.only.removeprefix("if ")
    told = get_answer(key, config or {}) if key else True
    # Without the key the tensors decide: there may be no members at all.
    wanted = 0 if told is False else read_config_value(place.size, config) if told or numbers else None
    if wanted is not None and wanted != len(numbers):
        found = f"{len(numbers)} by the names of the tensors ({format_numbers(numbers)})"
        values = describe_values(place.size, config or {}) if told is not False else ""
        expected = f"{reprlib.repr(wanted)}, as {place.size if told is not False else key} of config.json says"
        remedy = suggest_key(place, numbers, told=told) if key else suggest_remedy(place, numbers, config or {})
        yield Problem("contradiction", place.counts, found, expected + (f": {values}" if values else ""), remedy)


def suggest_key(place: Placeholder, numbers: set[int], *, told: bool | None) -> str:
    """Suggests what to look at where a number of members differs: the config key of its condition, if that decides."""
    key = place.only.removeprefix("if ")
    if key and not numbers:
        return f"is a file missing? if the model has no {place.counts}, set {key} in config.json to 0"
    if told is False:
        return f"is config.json another model's, or was it edited? give {key} back its value"
    return OTHER_MODEL


def suggest_remedy(place: Placeholder, numbers: set[int], config: Mapping[str, Any]) -> str:
    """Suggests a remedy for another number of members than the config's. The config is to be changed only if there are
    more, or no MTP layers at all: where others are missing, it would hide the loss of a file.
    """
    wanted = read_config_value(place.size, config)
    if type(wanted) is int and wanted < len(numbers) and is_key(place.size):
        change = suggest_count(place.size, config, len(numbers))
        return f"is the config another model's? If not: {change}, in config.json (keep a copy)"
    change = suggest_count(place.size, config, 0) if "MTP" in place.counts and not numbers else ""
    if not change:
        return OTHER_MODEL
    changes = " and ".join([change, *(f"set {key} to 0" for key in find_draft_keys(config) if key not in change)])
    return f"is a file missing? If the model was made without {place.counts}: {changes}, in config.json (keep a copy)"


def find_draft_keys(config: Mapping[str, Any]) -> list[str]:
    """Finds the keys with the number of MTP layers, which loaders read even where a recipe does not count by them."""
    tables = (("", config), ("text_config.", config.get("text_config")))
    found = [(prefix, table) for prefix, table in tables if isinstance(table, Mapping)]
    return [prefix + key for prefix, table in found for key in DRAFTS if table.get(key)]


def note_no_drafts(
    recipe: Recipe, members: Members, config: Mapping[str, Any] | None, *, is_stacked: bool
) -> Iterator[Note]:
    """Notes that the config promises MTP layers and none is here, where the recipe can do without: transformers saves
    none, but a file may be lost too. With stacked experts (`is_stacked`) it was transformers for sure.
    """
    reason = "transformers' models have none"
    reason = reason if is_stacked else f"is a file missing? or did transformers save it: {reason}"
    for place in recipe.placeholders.values():
        promised = find_draft_keys(config or {})
        if place.optional and not place.size and not members[place.name] and promised:
            yield Note("no-mtp", f"no {place.counts} here, though config.json has {promised[0]}: {reason}")


def check_rows(place: Placeholder, checkpoint: Checkpoint, recipe: Recipe, members: Members) -> Iterator[Problem]:
    """Reports a tensor with one row for each member whose number of rows differs from the number of members."""
    names = [name for name in PLACEHOLDER.findall(place.rows_of) if name in recipe.placeholders]
    for numbers in product(*(sorted(members[name]) for name in names)) if place.rows_of else ():
        tensor = checkpoint.tensors.get(fill_pattern(place.rows_of, dict(zip(names, numbers, strict=True))))
        if tensor and tensor.shape[:1] != (len(members[place.name]),):
            expected = f"{len(members[place.name])} rows, for {place.counts} {format_numbers(members[place.name])}"
            remedy = "is a file missing from the checkpoint?"
            yield Problem("contradiction", tensor.name, f"shape {list(tensor.shape)}", expected, remedy)


def check_missing(
    config: Mapping[str, Any] | None, recipe: Recipe, members: Members, present: Present, *, keep_optional: bool
) -> Iterator[Problem]:
    """Reports every tensor that a rule expects and the checkpoint lacks, and every rule that has tensors although its
    condition on the config excludes them.
    """
    members = add_picked(recipe, members, config)
    for number, rule in enumerate(recipe.rules):
        tuples, wanted = present.get(number, set()), is_expected(rule, config or {}, recipe, present)
        if not wanted and tuples:
            found = f"{len(tuples)} tensors"
            expected = f"none, for the rule is {rule.only!r}"
            remedy = (
                "is config.json another model's? if it is right, drop them in a recipe of your own (docs/recipes.md)"
            )
            yield Problem("contradiction", rule.left, found, expected, remedy)
        is_demanded = rule.relation != "drop" and (keep_optional or not rule.optional)
        if is_demanded and wanted and not may_lack(rule, config or {}):
            remedy = OTHER_MODEL if config else "is a file missing? without a config.json, is it another model?"
            remedy = suggest_for_others(rule, recipe, config) or remedy
            yield from check_missing_of_rule(rule, recipe, members, tuples, remedy)


def suggest_for_others(rule: Rule, recipe: Recipe, config: Mapping[str, Any] | None) -> str:
    """Suggests what to look at where tensors lack that only some members need; empty for any other rule."""
    places = [recipe.placeholders[slot] for slot in list_slots(rule, recipe) if slot in recipe.placeholders]
    return next((suggest_picking_key(place, config) for place in places if place.others), "")


def is_expected(rule: Rule, config: Mapping[str, Any], recipe: Recipe, present: Present) -> bool:
    """Whether the model has the tensors of a rule. If the config lacks the key, tensors of an `if` rule decide. Where
    the key is a placeholder, its members decide.
    """
    if not rule.only or rule.only.startswith(MAYBE):
        return True
    if letters := PLACEHOLDER.findall(rule.only):
        return any(letters[0] in list_slots(recipe.rules[number], recipe) for number in present)
    condition, key = rule.only.split()
    ifs = (number for number, other in enumerate(recipe.rules) if other.only == f"if {key}")
    told = get_answer(key, config)
    return (any(number in present for number in ifs) if told is None else told) == (condition == "if")


def may_lack(rule: Rule, config: Mapping[str, Any]) -> bool:
    """Whether the tensors of a rule may be missing: always, or if the config key is true or absent."""
    word, _, key = rule.only.partition(" if ")
    return word == MAYBE and (not key or get_answer(key, config) is not False)


def check_missing_of_rule(
    rule: Rule, recipe: Recipe, members: Members, tuples: set[tuple[str, ...]], remedy: str
) -> Iterator[Problem]:
    """Reports each combination of numbers that a rule expects and `tuples` lacks."""
    slots = list_slots(rule, recipe)
    choices = [sorted(members[slot]) if slot in recipe.placeholders else [int(slot)] for slot in slots]
    if prod(map(len, choices)) == len(tuples):
        return
    for numbers in product(*choices):
        if tuple(map(str, numbers)) not in tuples:
            name = fill_pattern(rule.left, dict(zip(slots, numbers, strict=True)))
            hint = suggest_condition(rule) or remedy
            yield Problem("missing-tensor", name, "not in the checkpoint", f"the rule {rule.left!r}", hint)


def suggest_condition(rule: Rule) -> str:
    """Suggests the value of a config key with which a model does not have the tensors of a rule; empty without one."""
    condition, _, key = rule.only.rpartition(" ")
    if not condition or PLACEHOLDER.fullmatch(key):
        return ""
    without = f"is a file missing? a model without it has {key}"
    if condition == "if":
        return f"{without} 0 in its config.json"
    if condition == "unless":
        return f"{without} in its config.json, with a value other than 0 or null"
    why = "only if that is so"
    if key == TIED:
        why = "only if the head is the embedding, or if nothing needs a head: is it an embedding model?"
    return f"{without} true in its config.json: set it so (keep a copy of the file) {why}"
