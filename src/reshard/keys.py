"""Keys of a model's config that a recipe names, and those of them that a config does not have. Knows no tensor."""

import ast
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from reshard.errors import listed
from reshard.faults import UNITS
from reshard.formulas import parse, parse_shape, without
from reshard.types import Recipe


class Mention(NamedTuple):
    """A formula of a recipe."""

    place: str
    text: str
    sizes: Mapping[str, str]
    """The sizes that it may speak of, whose own keys are mentioned at their own place."""
    is_run: bool = False


def unknown_keys(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The keys that a config does not have, and where the recipe names each. One that is null it has."""
    run_config = {**with_old_keys(config), "target": None}
    found: dict[str, dict[str, None]] = {}
    for mention in mentions(recipe):
        tree, table = parse(mention.text, is_run=True), run_config if mention.is_run else config
        for key in lacking(tree, table, mention.sizes):
            found.setdefault(key, {})[mention.place] = None
    return {key: list(places) for key, places in found.items()}


def unknown_text(unknown: Mapping[str, list[str]]) -> str:
    return "not in config.json: " + listed((f"{key} ({listed(places, 3)})" for key, places in unknown.items()), 20)


def mentions(recipe: Recipe) -> Iterator[Mention]:
    """Every formula of a recipe, and every key that stands alone, but those of conditions and needs, which a config may
    lack.
    """
    yield from (Mention("ranks_divide", text, {}) for text in recipe.ranks_divide)
    for name, hole in recipe.holes.items():
        texts = (hole.size, hole.picked_by, hole.listed)
        yield from (Mention(f"holes: {name}", text, {}) for text in texts if text)
    for name, text in recipe.sizes.items():
        yield Mention(f"sizes: {name}", text, without(recipe.sizes, name))
    yield from (Mention("padded", key, {}) for key in recipe.padded)
    for name, value in recipe.run.items():
        text = value[0] if isinstance(value, list) else value
        yield Mention(f"run: {name}", text, recipe.sizes, is_run=True)
    for rule in recipe.rules:
        if heads := UNITS.fullmatch(rule.split):
            yield Mention(f"split of {rule.left}", heads[1], {})
        formulas = parse_shape(rule.shape)[1] if rule.shape else []
        yield from (Mention(f"shape of {rule.left}", text, recipe.sizes) for text in formulas if text != "?")


def lacking(tree: ast.expr, config: Mapping[str, Any], sizes: Mapping[str, str]) -> list[str]:
    """The keys that a formula names and a config does not have. Of choices one must be there."""
    match tree:
        case ast.Name() | ast.Attribute():
            key = ast.unparse(tree)
            return [] if key in sizes or has(config, key) else [key]
        case ast.BoolOp(values=choices):
            of_each = [lacking(choice, config, sizes) for choice in choices]
            return [key for keys in of_each for key in keys] if all(of_each) else []
        case ast.Call(args=[inner]):
            return lacking(inner, config, sizes)
        case ast.BinOp(left=left, right=right):
            return lacking(left, config, sizes) + lacking(right, config, sizes)
    return []


def has(config: Any, key: str) -> bool:
    """Whether a config has a key; of a table that is null it has every one, for it says nothing of them."""
    for part in key.split("."):
        if config is None:
            return True
        if not isinstance(config, Mapping) or part not in config:
            return False
        config = config[part]
    return True


def with_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what newer ones keep in `rope_parameters` also where older ones have it; so too in its text
    config.
    """
    inner = config.get("text_config")
    return with_rotary_keys({**config, "text_config": with_rotary_keys(inner)} if isinstance(inner, dict) else config)


def with_rotary_keys(table: Mapping[str, Any]) -> dict[str, Any]:
    """Of several rotary embeddings, by their names, the main one is meant."""
    rotary = table.get("rope_parameters")
    if not isinstance(rotary, dict):
        return dict(table)
    rotary = rotary["main"] if isinstance(rotary.get("main"), dict) else rotary
    said = {key: value for key, value in table.items() if value is not None}
    return {"rope_scaling": rotary, "rope_theta": rotary.get("rope_theta"), **said}
