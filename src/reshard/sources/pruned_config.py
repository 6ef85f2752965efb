"""Pruning: the config of a model of which only some layers and experts are left. Arithmetic on JSON values only."""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from math import ceil
from typing import Any

from reshard.errors import Problem
from reshard.recipes.formulas import config_value
from reshard.sources.block_scales import EXEMPT_KEYS
from reshard.text import numbers_text
from reshard.types import Placeholder, Recipe

KEY = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
"""A formula that is a config key alone, perhaps one within another."""

REFERENCE = re.compile(r"\w*layer_ids?")
"""A config key whose value is the number of a layer, or a list of such."""

DENSE = "mlp_only_layers"
"""A config key whose value lists layers without experts: those of them that are left stay there."""

STEP = "decoder_sparse_step"
"""A config key that says that each so many-th layer has experts."""

PER_LAYER = re.compile(r"\w*layer_types")
"""A config key whose value is a list with something for each layer."""

MODULE = re.compile(r"(.*\blayers\.)([0-9]{1,9})(?!\w)(.*)", re.DOTALL)

CHOSEN_EXPERTS = "num_experts_per_tok"

LEAST_OF_GROUP = {"noaux_tc": 2}
"""So many experts of a group are looked at, by the `topk_method`, to choose the groups."""

Members = Mapping[str, set[int]]

Layers = Mapping[int, int]
"""The new number of each layer that is kept."""


def table_of(size: str) -> str:
    """How a shape speaks of the experts that a token has, `size` being the formula of how many experts there are."""
    return beside(size, CHOSEN_EXPERTS)


def beside(key: str, other: str) -> str:
    """A key in the same object: `text_config.n_group` beside `text_config.n_routed_experts`; of `a or b`, beside a."""
    return ".".join([*key.split(" or ", maxsplit=1)[0].split(".")[:-1], other])


def expert_problems(config: Mapping[str, Any] | None, size: str, left: int) -> Iterator[Problem]:
    """Whether a token can still be given the experts that the config says, `left` being how many there are."""
    chosen, groups, taken, method = (
        config_value(beside(size, key), config) for key in (CHOSEN_EXPERTS, "n_group", "topk_group", "topk_method")
    )
    if type(chosen) is int and left < chosen:
        expected = f"at least {chosen}, as {table_of(size)} of config.json says"
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


def pruned_config(
    config: Mapping[str, Any] | None, recipe: Recipe, left: Members, layers: Layers | None, problems: list[Problem]
) -> Mapping[str, Any] | None:
    """The config with the counts and lists of what is left; None without one. Appends what stands against it.

    `layers` are None if all are kept.
    """
    if config is None:
        return None
    changed = deepcopy(dict(config))
    counting = next((place for place in recipe.placeholders.values() if place.counts == "layers"), None)
    if layers is not None and counting:
        count = config_value(counting.size, config)
        prune_lists(changed, recipe, counting, layers, count if type(count) is int else len(layers))
        problems.extend(prune_references(changed, counting, layers))
        prune_modules(changed, layers, count if type(count) is int else 0)
    for place in recipe.placeholders.values():
        for key in place.size.split(" or "):
            if KEY.fullmatch(key) and type(config_value(key, config)) is int:
                put(changed, key, len(left[place.name]))
    return changed


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets a key that is there, perhaps one within another."""
    *path, last = key.split(".")
    for name in path:
        config = config[name]
    config[last] = value


def table_with(counting: Placeholder, config: dict[str, Any]) -> dict[str, Any]:
    """The object of the config that says how many members a placeholder has; empty without one."""
    table = config_value(counting.size.rpartition(".")[0], config) if "." in counting.size else config
    return table if isinstance(table, dict) else {}


def prune_lists(config: dict[str, Any], recipe: Recipe, counting: Placeholder, layers: Layers, count: int) -> None:
    """Lists with a value for each layer keep those of the layers that are left, and what follows for MTP."""
    keys = {place.picked_by for place in recipe.placeholders.values() if place.picked_by}
    keys |= {beside(counting.size, key) for key in table_with(counting, config) if PER_LAYER.fullmatch(key)}
    for key in sorted(keys):
        values = config_value(key, config)
        if isinstance(values, list) and len(values) >= count and KEY.fullmatch(key):
            put(config, key, [values[old] for old in layers if old < count] + values[count:])


def prune_references(config: dict[str, Any], counting: Placeholder, layers: Layers) -> Iterator[Problem]:
    """Keys that speak of layers by number: these must all be kept, and get their new numbers."""
    table = table_with(counting, config)
    if isinstance(table.get(DENSE), list):
        table[DENSE] = [layers[value] for value in table[DENSE] if type(value) is int and value in layers]
    if table.get(STEP, 1) != 1 and any(old != new for old, new in layers.items()):
        yield Problem("needs-layers", "--layers", "layers with other numbers", f"their own: {STEP} counts them")
    for key in [key for key in table if REFERENCE.fullmatch(key)]:
        values = table[key] if isinstance(table[key], list) else [table[key]]
        known = [value for value in values if type(value) is int]
        if lost := set(known) - layers.keys():
            found = f"without layer {numbers_text(lost)}"
            yield Problem("needs-layers", "--layers", found, f"all that {key} of config.json names", "choose them too")
        elif known == values:
            new = [layers[value] for value in known]
            table[key] = new if isinstance(table[key], list) else new[0]


def prune_modules(config: dict[str, Any], layers: Layers, count: int) -> None:
    """Names of modules that are not quantised, with the new numbers of their layers. Those of MTP layers follow on."""
    quantization = config.get("quantization_config")
    for key in EXEMPT_KEYS:
        names = quantization.get(key) if isinstance(quantization, dict) else None
        if isinstance(quantization, dict) and isinstance(names, list):
            quantization[key] = [*renumbered_modules(names, layers, count)]


def renumbered_modules(names: Sequence[Any], layers: Layers, count: int) -> Iterator[Any]:
    for name in names:
        found = MODULE.fullmatch(name) if isinstance(name, str) else None
        if not found:
            yield name
            continue
        number = int(found[2])
        new = number - count + len(layers) if number >= count else layers.get(number)
        if new is not None:
            yield f"{found[1]}{new}{found[3]}"
