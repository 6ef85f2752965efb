"""Prunes the config of a model to the layers and experts that are kept. Works on JSON values only."""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from math import ceil
from typing import Any

from reshard.errors import Problem
from reshard.recipe_types import Placeholder, Recipe
from reshard.recipes.formulas import read_config_value
from reshard.sources.exemptions import EXEMPT_KEYS
from reshard.sources.picked_members import find_every, find_picked, find_step_key
from reshard.text import format_numbers

KEY = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
"""A formula that is one config key, nested or not: `n_layers`, `text_config.n_layers`."""

REFERENCE = re.compile(r"\w*layer_ids?")
"""A config key whose value is a layer number or a list of layer numbers."""

DENSE = "mlp_only_layers"
"""Config key of the list of layers without experts. Kept layers stay in it, with their new numbers."""

STEP = "decoder_sparse_step"
"""Config key of a step N: every Nth layer has experts."""

PER_LAYER = re.compile(r"\w*layer_types")
"""A config key whose value is a list with one value for each layer."""

MODULE = re.compile(r"(.*\blayers\.)([0-9]{1,9})(?!\w)(.*)", re.DOTALL)
"""A module name with a layer number."""

CHOSEN_EXPERTS = "num_experts_per_tok"
"""Config key of the number of experts that each token is routed to."""

CHOSEN_KEYS = (CHOSEN_EXPERTS, "num_experts_per_token")
"""The same, and how Kimi-K3 has it."""

LEAST_OF_GROUP = {"noaux_tc": 2}
"""`topk_method` -> the number of experts that the router looks at in each group to choose the groups."""

Members = Mapping[str, set[int]]
"""The numbers that fill each placeholder."""

Layers = Mapping[int, int]
"""The new number of each layer that is kept."""


def name_table(size: str) -> str:
    """Names the number of experts of a token, as shapes write it. `size` is the formula for the number of experts."""
    return name_beside(size, CHOSEN_EXPERTS)


def name_beside(key: str, other: str) -> str:
    """Names another key of the same object: `n_group` beside `text_config.n_routed_experts` is `text_config.n_group`.
    For `a or b`, the object of `a`.
    """
    return ".".join([*key.split(" or ", maxsplit=1)[0].split(".")[:-1], other])


def check_experts(config: Mapping[str, Any] | None, size: str, left: int) -> Iterator[Problem]:
    """Reports if tokens cannot be routed to as many experts and groups as the config says; `left` experts are kept."""
    groups, taken, method = (
        read_config_value(name_beside(size, key), config) for key in ("n_group", "topk_group", "topk_method")
    )
    told = {key: read_config_value(key, config) for key in (name_beside(size, key) for key in CHOSEN_KEYS)}
    key, chosen = next(((key, value) for key, value in told.items() if type(value) is int), ("", None))
    if type(chosen) is int and left < chosen:
        expected = f"at least {chosen}, as {key} of config.json says"
        yield Problem("too-few-experts", "--experts", f"{left} experts", expected)
    elif type(groups) is int and groups > 1:
        if left % groups:
            expected = f"a multiple of {groups}, as n_group of config.json says"
            yield Problem("not-divisible", "--experts", f"{left} experts", expected)
        elif type(chosen) is int and type(taken) is int and taken > 0:
            least = max(ceil(chosen / taken), LEAST_OF_GROUP.get(str(method), 1))
            if left // groups < least:
                expected = f"at least {least * groups}: {least} in each of {groups} groups, as config.json asks for"
                yield Problem("too-few-experts", "--experts", f"{left} experts", expected)


def prune_config(
    config: Mapping[str, Any] | None, recipe: Recipe, left: Members, layers: Layers | None, problems: list[Problem]
) -> Mapping[str, Any] | None:
    """Returns the config for the kept layers and experts: counts, lists and layer numbers. None without a config.

    `layers` is None if all are kept. Appends to `problems` each value that cannot be pruned.
    """
    if config is None:
        return None
    changed = deepcopy(dict(config))
    counting = next((place for place in recipe.placeholders.values() if place.counts == "layers"), None)
    if layers is not None and counting:
        count = read_config_value(counting.size, config)
        prune_lists(changed, recipe, counting, layers, count if type(count) is int else len(layers))
        prune_members(changed, recipe, counting, layers)
        problems.extend(prune_references(changed, counting, layers))
        problems.extend(check_steps(config, recipe, counting, layers))
        prune_modules(changed, list_other_modules(recipe, counting), layers, count if type(count) is int else 0)
    for place in recipe.placeholders.values():
        for key in place.size.split(" or "):
            is_absent = place.only and not left[place.name]  # the key says nothing then
            if KEY.fullmatch(key) and not is_absent and type(read_config_value(key, config)) is int:
                set_key(changed, key, len(left[place.name]))
    return changed


def set_key(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets an existing key, nested or not, in place."""
    *path, last = key.split(".")
    for name in path:
        config = config[name]
    config[last] = value


def find_table(counting: Placeholder, config: dict[str, Any]) -> dict[str, Any]:
    """Finds the object of the config with the size of a placeholder; empty if there is none."""
    table = read_config_value(counting.size.rpartition(".")[0], config) if "." in counting.size else config
    return table if isinstance(table, dict) else {}


def prune_lists(config: dict[str, Any], recipe: Recipe, counting: Placeholder, layers: Layers, count: int) -> None:
    """Prunes the lists with one value for each layer, in place. Values behind the last layer belong to MTP and stay."""
    keys = {key for place in recipe.placeholders.values() if place.picked_by for key in place.picked_by.split(" or ")}
    keys |= {name_beside(counting.size, key) for key in find_table(counting, config) if PER_LAYER.fullmatch(key)}
    for key in sorted(keys):
        values = read_config_value(key, config)
        if isinstance(values, list | str) and len(values) >= count and KEY.fullmatch(key):
            kept = [values[old] for old in layers if old < count]
            set_key(config, key, "".join(kept) + values[count:] if isinstance(values, str) else kept + values[count:])


def check_steps(config: Mapping[str, Any], recipe: Recipe, counting: Placeholder, layers: Layers) -> Iterator[Problem]:
    """Reports kept layers that a config would count otherwise by their new numbers: every Nth layer is picked. Where
    others may be there too, some loaders go by that although a list tells the same.
    """
    for place in recipe.placeholders.values():
        step = read_config_value(place.every, config)
        is_listed = isinstance(read_config_value(place.picked_by, config), list) and not place.others
        if counting.name in (place.some_of, place.within) and type(step) is int and step > 1 and not is_listed:
            picked = find_picked(place, set(layers), config) or set()
            told = find_every(place, set(layers.values()), config)
            if told != (kept := {new for old, new in layers.items() if old in picked}):
                found = f"{place.counts} {format_numbers(kept)} by the new numbers"
                key = find_step_key(place, config)
                expected = f"{format_numbers(told or set())}: {key} of config.json counts them"
                yield Problem("needs-layers", "--layers", found, expected, "choose layers from 0 on, or whole periods")


def prune_members(config: dict[str, Any], recipe: Recipe, counting: Placeholder, layers: Layers) -> None:
    """Prunes the lists that name all layers of a kind, in place. Kept layers stay in them, with their new numbers."""
    for place in recipe.placeholders.values():
        name, first = place.listed.rpartition(".")[2], place.listed_from
        if find_base(place, recipe) != counting.name or name == DENSE or REFERENCE.fullmatch(name):
            continue
        values = read_config_value(place.listed, config) if KEY.fullmatch(place.listed) else None
        if isinstance(values, list):
            kept = [value for value in values if type(value) is int and value - first in layers]
            set_key(config, place.listed, [layers[value - first] + first for value in kept])


def find_base(place: Placeholder, recipe: Recipe) -> str:
    """Finds the name of the outermost placeholder that contains the members of this one."""
    for _ in recipe.placeholders:  # an untrusted recipe may lead in a circle
        place = recipe.placeholders.get(place.within or place.some_of, place)
    return place.name


def prune_references(config: dict[str, Any], counting: Placeholder, layers: Layers) -> Iterator[Problem]:
    """Renumbers the layers in config keys, in place; reports layers that a key names and that are not kept."""
    table = find_table(counting, config)
    if isinstance(table.get(DENSE), list):
        table[DENSE] = [layers[value] for value in table[DENSE] if type(value) is int and value in layers]
    if table.get(STEP, 1) != 1 and any(old != new for old, new in layers.items()):
        yield Problem("needs-layers", "--layers", "layers with other numbers", f"their own: {STEP} counts them")
    for key in [key for key in table if REFERENCE.fullmatch(key)]:
        values = table[key] if isinstance(table[key], list) else [table[key]]
        known = [value for value in values if type(value) is int]
        if lost := set(known) - layers.keys():
            found = f"without layer {format_numbers(lost)}"
            yield Problem("needs-layers", "--layers", found, f"all that {key} of config.json names", "choose them too")
        elif known == values:
            new = [layers[value] for value in known]
            table[key] = new if isinstance(table[key], list) else new[0]


def list_other_modules(recipe: Recipe, counting: Placeholder) -> tuple[str, ...]:
    """Lists the beginnings of modules that are numbered apart from the layers, such as `mtp.layers.`."""
    heads = {rule.left.split("{", 1)[0]: rule.left.split("{", 1)[1][:1] for rule in recipe.rules if "{" in rule.left}
    own = {name for name, place in recipe.placeholders.items() if not (place.within or place.some_of or place.after)}
    return tuple(head for head, letter in heads.items() if letter in own and letter != counting.name)


def prune_modules(config: dict[str, Any], others: tuple[str, ...], layers: Layers, count: int) -> None:
    """Renumbers the layers in the names of modules that are not quantized, in place, but of modules that begin as
    `others`. MTP layers come last.
    """
    quantization = config.get("quantization_config")
    for key in EXEMPT_KEYS:
        names = quantization.get(key) if isinstance(quantization, dict) else None
        if isinstance(quantization, dict) and isinstance(names, list):
            quantization[key] = [*renumber_modules(names, others, layers, count)]


def renumber_modules(names: Sequence[Any], others: tuple[str, ...], layers: Layers, count: int) -> Iterator[Any]:
    """Yields module names with new layer numbers, without the names of removed layers."""
    for name in names:
        found = MODULE.fullmatch(name) if isinstance(name, str) else None
        if not found or name.startswith(others):
            yield name
            continue
        number = int(found[2])
        new = number - count + len(layers) if number >= count else layers.get(number)
        if new is not None:
            yield f"{found[1]}{new}{found[3]}"
