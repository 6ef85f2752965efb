"""Sizes as recipes write them: formulas over the keys of a model's config. Knows no recipe and no tensor.

A formula is whole numbers and keys, joined by `+`, `-`, `*`, `//` and parentheses, `ceil(a / b)` and `len(key)`. A key
within another is written with a dot: `rope_scaling.factor`. `a or b` is b where the config does not tell a; where
words are wanted, the last choice may be one in quotes.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

from reshard.recipe_types import Recipe, Rule
from reshard.text import format_list

LONGEST_FORMULA = 200
"""Characters of a formula: it is taken apart by functions that call themselves."""

LARGEST_NUMBER = 1 << 63
"""A number from here on is no size; Python would go on with it for ever."""

MOST_STEPS = 300
"""Of a formula with all sizes that it names: each is taken apart at each mention, so that a dozen of them could name
each other a billion times. It bounds the depth of the calls as well.
"""

WORD = re.compile(r"[\w-]+")

SHAPE = re.compile(r"(?:(\w+) )?\[([^\[\]]*)\]")

OPERATORS = {
    ast.Add: int.__add__,
    ast.Sub: int.__sub__,
    ast.Mult: int.__mul__,
}


class UnknownKey(Exception):
    """A key that the config does not have, or has no value for."""


@cache
def parse_formula(text: str, *, is_run: bool = False) -> ast.expr:
    """The formula as a tree; one of a run configuration may end in `or 'word'`. Raises ValueError, saying what is wrong
    with it.
    """
    if len(text) > LONGEST_FORMULA:
        raise ValueError(f"{text[:40] + '...'!r} has more than {LONGEST_FORMULA} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is not a formula") from None
    require_formula(remove_word(tree) if is_run else tree, text)
    return tree


def remove_word(tree: ast.expr) -> ast.expr:
    """A formula without the word that its last choice is, if it is one."""
    match tree:
        case ast.BoolOp(op=ast.Or(), values=[*choices, ast.Constant(value=str(word))]) if WORD.fullmatch(word):
            return ast.BoolOp(ast.Or(), choices)
    return tree


def require_formula(tree: ast.expr, text: str) -> None:
    """Nothing but numbers, keys and the operators: a recipe holds no code."""
    match tree:
        case ast.Name():
            return
        case ast.Constant(value=value) if type(value) is int:
            return
        case ast.Attribute(value=value):
            require_formula(value, text)
        case ast.Call(func=ast.Name(id="ceil"), args=[ast.BinOp(left=left, op=ast.Div(), right=right)], keywords=[]):
            require_formula(left, text)
            require_formula(right, text)
        case ast.Call(func=ast.Name(id="len"), args=[ast.Name() | ast.Attribute() as listed], keywords=[]):
            require_formula(listed, text)
        case ast.BoolOp(op=ast.Or(), values=values):
            for value in values:
                require_formula(value, text)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.FloorDiv(), right=right):
            require_formula(left, text)
            require_formula(right, text)
        case _:
            raise ValueError(
                f"{ast.unparse(tree)!r} in {text!r} is no number, key, + - * //, ceil(a / b), len(key) or a or b"
            )


def compute_formula(text: str, config: Mapping[str, Any], sizes: Mapping[str, str]) -> Any:
    """Evaluates a formula; a key alone may stand for anything. `sizes` are names for other formulas.

    Raises UnknownKey.
    """
    return evaluate(parse_formula(text, is_run=True), config, sizes)


def evaluate(tree: ast.expr, config: Mapping[str, Any], sizes: Mapping[str, str]) -> Any:
    match tree:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in sizes:
            return compute_formula(sizes[name], config, leave_out_size(sizes, name))
        case ast.Name(id=name):
            return get_known(config, name)
        case ast.Attribute(value=value, attr=name):
            return get_known(evaluate(value, config, sizes), name)
        case ast.Call(func=ast.Name(id="len"), args=[listed]):
            value = evaluate(listed, config, sizes)
            if isinstance(value, list):
                return len(value)
        case ast.BoolOp(values=[*choices, last]):
            for choice in choices:
                with suppress(UnknownKey):
                    return evaluate(choice, config, sizes)
            return evaluate(last, config, sizes)
        case ast.Call(args=[ast.BinOp(left=left, right=right)]):
            return -(-evaluate_number(left, config, sizes) // evaluate_divisor(right, config, sizes))
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            return evaluate_number(left, config, sizes) // evaluate_divisor(right, config, sizes)
        case ast.BinOp(left=left, op=operator, right=right):
            return OPERATORS[type(operator)](
                evaluate_number(left, config, sizes), evaluate_number(right, config, sizes)
            )
    raise UnknownKey(ast.unparse(tree))


def takes_too_long(text: str, sizes: Mapping[str, str]) -> bool:
    """Whether a formula takes more than MOST_STEPS, with every size that it names counted at each mention."""
    steps, waiting = 0, [(text, sizes)]
    while waiting:
        formula, within = waiting.pop()
        for node in ast.walk(parse_formula(formula, is_run=True)):
            steps += isinstance(node, ast.expr)
            if steps > MOST_STEPS:
                return True
            if isinstance(node, ast.Name) and node.id in within:
                waiting.append((within[node.id], leave_out_size(within, node.id)))
    return False


def leave_out_size(sizes: Mapping[str, str], name: str) -> dict[str, str]:
    """The sizes that the one of that name may speak of: a size that is its own key means the key."""
    return {key: text for key, text in sizes.items() if key != name}


def get_known(table: Any, name: str) -> Any:
    value = table.get(name) if isinstance(table, Mapping) else None
    if value is None:
        raise UnknownKey(name)
    return value


def evaluate_number(tree: ast.expr, config: Mapping[str, Any], sizes: Mapping[str, str]) -> int:
    value = evaluate(tree, config, sizes)
    if type(value) is not int or abs(value) >= LARGEST_NUMBER:
        raise UnknownKey(ast.unparse(tree))
    return value


def evaluate_divisor(tree: ast.expr, config: Mapping[str, Any], sizes: Mapping[str, str]) -> int:
    value = evaluate_number(tree, config, sizes)
    if not value:
        raise UnknownKey(ast.unparse(tree))
    return value


def parse_shape(text: str) -> tuple[str, list[str]]:
    """`I64 [vocab_size, 6]` -> (`I64`, [`vocab_size`, `6`]); the dtype may be left out. Raises ValueError.

    `?` stands for any size.
    """
    found = SHAPE.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not like [rows, columns] or I64 [rows]")
    formulas = [part.strip() for part in found[2].split(",")] if found[2].strip() else []
    for formula in formulas:
        if formula != "?":
            parse_formula(formula)
    return found[1] or "", formulas


def compute_shape(text: str, config: Mapping[str, Any], sizes: Mapping[str, str]) -> list[int | None]:
    """The sizes of a shape in elements; None where the config does not tell."""
    found: list[int | None] = []
    for formula in parse_shape(text)[1]:
        try:
            value = compute_formula(formula, config, sizes) if formula != "?" else None
        except UnknownKey:
            value = None
        found.append(value if type(value) is int and abs(value) < LARGEST_NUMBER else None)
    return found


class Mention(NamedTuple):
    """A formula of a recipe."""

    place: str
    text: str
    sizes: Mapping[str, str]
    """The sizes that it may speak of, whose own keys are mentioned at their own place."""
    is_run: bool = False


def find_unknown_keys(recipe: Recipe, config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The keys that a config does not have, and where the recipe names each. One that is null it has."""
    run_config = {**add_old_keys(config), "target": None}
    found: dict[str, dict[str, None]] = {}
    for mention in list_mentions(recipe):
        tree, table = parse_formula(mention.text, is_run=True), run_config if mention.is_run else config
        for key in find_lacking(tree, table, mention.sizes):
            found.setdefault(key, {})[mention.place] = None
    return {key: list(places) for key, places in found.items()}


def describe_unknown_keys(unknown: Mapping[str, Sequence[str]]) -> str:
    return "not in config.json: " + format_list(
        (f"{key} ({format_list(places, 3)})" for key, places in unknown.items()), 20
    )


def list_mentions(recipe: Recipe) -> Iterator[Mention]:
    """Every formula of a recipe, and every key that stands alone, but those of conditions and needs, which a config may
    lack.
    """
    yield from (Mention("ranks_divide", text, {}) for text in recipe.ranks_divide)
    for name, placeholder in recipe.placeholders.items():
        picking = " or ".join(filter(None, (placeholder.picked_by, placeholder.every)))  # either is enough
        texts = (placeholder.size, picking, placeholder.listed)
        yield from (Mention(f"placeholders: {name}", text, {}) for text in texts if text)
    for name, text in recipe.sizes.items():
        yield Mention(f"sizes: {name}", text, leave_out_size(recipe.sizes, name))
    yield from (Mention("padded", key, {}) for key in recipe.padded)
    for name, value in recipe.run.items():
        text = value[0] if isinstance(value, list) else value
        yield Mention(f"run: {name}", text, recipe.sizes, is_run=True)
    for rule in recipe.rules:
        if heads := rule.split.heads_key:
            yield Mention(f"split of {rule.left}", heads, {})
        formulas = parse_shape(rule.shape)[1] if rule.shape else []
        yield from (Mention(f"shape of {rule.left}", text, recipe.sizes) for text in formulas if text != "?")


def find_lacking(tree: ast.expr, config: Mapping[str, Any], sizes: Mapping[str, str]) -> list[str]:
    """The keys that a formula names and a config does not have. Of choices one must be there."""
    match tree:
        case ast.Name() | ast.Attribute():
            key = ast.unparse(tree)
            return [] if key in sizes or has_key(config, key) else [key]
        case ast.BoolOp(values=choices):
            of_each = [find_lacking(choice, config, sizes) for choice in choices]
            return [key for keys in of_each for key in keys] if all(of_each) else []
        case ast.Call(args=[inner]):
            return find_lacking(inner, config, sizes)
        case ast.BinOp(left=left, right=right):
            return find_lacking(left, config, sizes) + find_lacking(right, config, sizes)
    return []


def has_key(config: Any, key: str) -> bool:
    """Whether a config has a key; of a table that is null it has every one, for it says nothing of them."""
    for part in key.split("."):
        if config is None:
            return True
        if not isinstance(config, Mapping) or part not in config:
            return False
        config = config[part]
    return True


def add_old_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what newer ones keep in `rope_parameters` also where older ones have it; so too in its text
    config.
    """
    inner = config.get("text_config")
    return add_rotary_keys({**config, "text_config": add_rotary_keys(inner)} if isinstance(inner, dict) else config)


def add_rotary_keys(table: Mapping[str, Any]) -> dict[str, Any]:
    """Of several rotary embeddings, by their names, the main one is meant."""
    rotary = table.get("rope_parameters")
    if not isinstance(rotary, dict):
        return dict(table)
    rotary = rotary["main"] if isinstance(rotary.get("main"), dict) else rotary
    said = {key: value for key, value in table.items() if value is not None}
    return {"rope_scaling": rotary, "rope_theta": rotary.get("rope_theta"), **said}


def read_config_value(formula: str, config: Mapping[str, Any] | None) -> Any:
    """Evaluates a formula over the config; None if there is no formula, no config or no such key."""
    try:
        return compute_formula(formula, config, {}) if formula and config is not None else None
    except UnknownKey:
        return None


def describe_values(formula: str, config: Mapping[str, Any]) -> str:
    """The value of each key of a formula: `len(ratios) is 44, layers is 43`; empty for a formula that is one key."""
    keys = [] if is_key(formula) else [ast.unparse(tree) for tree in list_keys(parse_formula(formula))]
    values = {key: read_config_value(key, config) for key in keys}
    return format_list(f"{key} is {value}" for key, value in values.items() if type(value) is int)


def list_keys(tree: ast.AST) -> Iterator[ast.AST]:
    """The keys of a formula, from left to right. The length of a list counts as one of them."""
    match tree:
        case ast.Name() | ast.Attribute() | ast.Call(func=ast.Name(id="len")):
            yield tree
        case ast.Call(args=inner):
            yield from (key for part in inner for key in list_keys(part))
        case _:
            yield from (key for part in ast.iter_child_nodes(tree) for key in list_keys(part))


def is_key(formula: str) -> bool:
    """Whether a formula is one key."""
    return isinstance(parse_formula(formula), ast.Name | ast.Attribute)


def suggest_count(formula: str, config: Mapping[str, Any], count: int) -> str:
    """What to change in a config so that a formula gives another count; empty if it is neither one key nor the rest of
    a list.
    """
    match parse_formula(formula):
        case ast.Name() | ast.Attribute():
            return f"set {formula} to {count}"
        case ast.BinOp(left=ast.Call(func=ast.Name(id="len"), args=[listed]), op=ast.Sub(), right=right):
            before = read_config_value(ast.unparse(right), config)
            if type(before) is int:
                return f"shorten {ast.unparse(listed)} to its first {before + count} values"
    return ""


def count_heads(rule: Rule, config: Mapping[str, Any]) -> int | None:
    """The number of heads that a rule's split counts: 0 if it counts none, None if the config does not tell."""
    key = rule.split.heads_key
    value = read_config_value(key, config) if key else 0
    return value if type(value) is int and (value > 0 or not key) else None
