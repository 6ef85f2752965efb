"""Finds faults in the placeholders and scales of a recipe, and in the names that they stand in."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from reshard.recipes.formulas import parse_formula
from reshard.recipes.patterns import PLACEHOLDER
from reshard.text import format_list

PLACEHOLDER_TEXTS = (
    "counts", "size", "within", "some_of", "picked_by", "listed", "every", "first", "others", "after", "marker", "like",
    "optional", "rows_of", "only",
)  # fmt: skip

PLACEHOLDER_NUMBERS = ("picked", "listed_from")

PLACEHOLDER_KEYS = (*PLACEHOLDER_TEXTS, *PLACEHOLDER_NUMBERS)

SCALE_KEYS = ("left", "right", "block", "packed", "fp8_block", "stays")

CONDITION = re.compile(r"if [\w.]+")

CONDITION_OF_ROW = re.compile(r"(if|unless) [\w.]+|if \{[a-z]\}|maybe( if [\w.]+)?")

COMPONENT = re.compile(r"[^{}]+|\{[a-z]\}|\{\*\}")

BEGINS_WITH_NUMBER = re.compile(r"(0|[1-9][0-9]{0,8})(\.|$)")
"""A number stands behind a dot: the first component of a tensor's name is never one."""

TablePath = tuple[str | int, ...]

Fault = tuple[TablePath, str, str]
"""Where in the table, what was found, what was expected."""


def check_scales(scales: Any, placeholders: Mapping[str, Any]) -> Iterator[Fault]:
    if not isinstance(scales, dict):
        yield ("scales",), repr(scales), "scales: a table"
        return
    for letter, fields in scales.items():
        where = ("scales", letter)
        if not re.fullmatch(r"[a-z]", letter) or letter in placeholders:
            yield where, f"the placeholder {letter!r}", "a single lower-case letter that numbers nothing"
        elif not isinstance(fields, dict) or not {"left", "right", "block"} <= set(fields) <= set(SCALE_KEYS):
            yield where, repr(fields), "a table of left, right and block, and perhaps packed or stays"
        elif not (isinstance(fields["left"], str) and isinstance(fields["right"], str)):
            yield where, repr(fields), "left and right: strings"
        elif not is_block(fields["block"]):
            yield where, repr(fields["block"]), "block: a whole number of elements, or two: rows and columns"
        elif type(fields.get("packed", False)) is not bool or fields.get("packed", False) != ("fp8_block" in fields):
            yield where, repr(fields), "packed: true or false; and with it fp8_block"
        elif not is_block(fields.get("fp8_block", 1)):
            yield where, repr(fields["fp8_block"]), "fp8_block: as block"
        elif type(fields.get("stays", False)) is not bool:
            yield where, repr(fields["stays"]), "stays: true or false"


def is_block(block: Any) -> bool:
    sides = block if isinstance(block, list) and len(block) == 2 else [block]
    return all(type(side) is int and side >= 1 for side in sides)


def check_placeholder_table(placeholders: Any) -> Iterator[Fault]:
    if not isinstance(placeholders, dict):
        yield ("placeholders",), repr(placeholders), "placeholders: a table"
        return
    for name, fields in placeholders.items():
        where = ("placeholders", name)
        if not re.fullmatch(r"[a-z]", name):
            yield where, f"the placeholder {name!r}", "a single lower-case letter"
        elif not isinstance(fields, dict) or not all(
            isinstance(value, str) for key, value in fields.items() if key not in PLACEHOLDER_NUMBERS
        ):
            yield where, repr(fields), "a table of strings"
        elif unknown := set(fields) - set(PLACEHOLDER_KEYS):
            yield where, format_list(sorted(unknown)), "only " + ", ".join(PLACEHOLDER_KEYS)
        elif not fields.get("counts"):
            yield where, "no counts", "what the placeholder counts, such as counts = 'layers'"
        elif ("after" in fields) != ("marker" in fields):
            yield where, repr(fields), "after and marker together"
        elif expected := find_picking_fault(fields):
            yield where, repr(fields), expected
        elif "only" in fields and not CONDITION.fullmatch(fields["only"]):
            yield where, repr(fields["only"]), "only: 'if KEY', with a key of config.json"
        elif "only" in fields and {"within", "some_of", "after"} & set(fields):
            yield where, repr(fields), "only, of a placeholder that counts from 0 by itself"
        else:
            texts = [fields[key] for key in ("size", "picked_by", "listed", "every", "first") if fields.get(key)]
            yield from ((where, *fault) for text in texts for fault in check_formula(text))
            yield from ((where, *fault) for fault in check_links(name, fields, placeholders))


def find_picking_fault(fields: Mapping[str, Any]) -> str:
    """Finds what was expected of how a placeholder picks its members; empty if there is no fault."""
    if ("picked" in fields) != ("picked_by" in fields) or not is_list_of_values(fields.get("picked", [])):
        return "picked_by and picked together: a config key, and a list of whole numbers or texts"
    if "every" in fields and not {"within", "some_of"} & set(fields):
        return "every with within or some_of: each Nth member of another placeholder"
    if "first" in fields and "every" not in fields:
        return "first with every: so many members before each Nth one counts"
    if "others" in fields and not {"picked_by", "some_of"} <= set(fields):
        return "others with picked_by and some_of: members that the config does not pick"
    if "listed" in fields and "some_of" not in fields:
        return "listed with some_of: some members of another placeholder"
    if "listed_from" in fields and not ("listed" in fields and type(fields["listed_from"]) is int):
        return "listed_from with listed: the whole number that the list has for member 0"
    return ""


def is_list_of_values(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) in (int, str) for item in value)


def check_links(name: str, fields: Mapping[str, str], placeholders: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Faults in what a placeholder says of other placeholders and of tensors."""
    if {"optional", "size"} <= set(fields):
        yield format_list(sorted(fields)), "optional without size: rank files from which they are left out have none"
    if "like" in fields and "after" not in fields:
        yield "like without after", "like of a placeholder that follows another"
    if ("within" in fields and "some_of" in fields) or (
        "picked_by" in fields and not {"within", "some_of"} & set(fields)
    ):
        yield format_list(sorted(fields)), "within or some_of: one of them, and for picked_by just one"
    others = [fields[key] for key in ("within", "some_of", "after") if key in fields]
    for other in [*others, *fields.get("like", "")]:
        if other not in placeholders or other == name:
            yield f"the placeholder {other!r}", "another placeholder of this recipe"
    for key in ("marker", "rows_of"):
        yield from check_pattern(fields[key], placeholders) if fields.get(key) else ()
    if "marker" in fields and PLACEHOLDER.findall(fields["marker"]) != [name]:
        yield repr(fields["marker"]), f"marker: a name with the placeholder {{{name}}}"
    if unknown := set(PLACEHOLDER.findall(fields.get("rows_of", ""))) - (set(placeholders) - {name}):
        yield (
            f"the placeholder {format_list(sorted(unknown))} in rows_of",
            "rows_of: a name with placeholders of this recipe",
        )


def check_pattern(pattern: str, known: Iterable[str], endings: Iterable[str] = ()) -> Iterator[tuple[str, str]]:
    """Faults in a name pattern. `endings` are the placeholders that may stand behind text at its end."""
    *inner, last = pattern.split(".")
    ending = next((f"{{{letter}}}" for letter in endings if last.endswith(f"{{{letter}}}")), "")
    last = last.removesuffix(ending) or last  # `w13_{p}`: `w13_weight`, and its scale
    if pattern.startswith("{") or BEGINS_WITH_NUMBER.match(pattern):
        yield f"{pattern!r}", "a name that begins with text"  # by that we know it again in rank files
    # One of a kind is named: of a name with a million dots there would be a million, each with the whole name.
    if (wrong := next((part for part in (*inner, last) if not COMPONENT.fullmatch(part)), None)) is not None:
        yield f"{wrong!r} in {pattern!r}", "text, or a placeholder such as {i}, between two dots"
    if "{*}" in inner:
        yield f"{{*}} in {pattern!r}", "{*} at the end only"
    names = PLACEHOLDER.findall(pattern)
    if unknown := sorted(set(names) - set(known)):
        yield (
            f"the placeholder {format_list('{' + name + '}' for name in unknown)} in {pattern!r}",
            f"one of {format_list(known, 99)}",
        )
    if len(set(names)) != len(names):
        yield f"a placeholder twice in {pattern!r}", "each placeholder once"


def check_alike_names(
    rows: Sequence[Sequence[str]], placeholders: Mapping[str, Any], scales: Mapping[str, Any]
) -> Iterator[Fault]:
    """Finds right names that differ only in what their numbers count: rank files do not tell whose they are. Members
    that come after others are known by their marker.
    """
    named: dict[str, dict[str, int]] = {}
    for number, row in enumerate(rows):
        if not any("after" in placeholders.get(letter, {}) for letter in PLACEHOLDER.findall(row[2])):
            alike = PLACEHOLDER.sub(lambda found: "weight" if found[1] in scales else "#", row[2])
            named.setdefault(alike, {}).setdefault(row[2], number)
    for numbers in named.values():
        first, *others = numbers
        for other in others:
            expected = "names that differ in more than a placeholder: rank files do not tell whose they are"
            yield ("rules", numbers[other]), f"{first!r} and {other!r} on the right", expected


def check_condition(only: str, left: str, placeholders: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Faults in the condition of a row; `left` is its name on the left."""
    if only and not CONDITION_OF_ROW.fullmatch(only):
        expected = "'if KEY' or 'unless KEY', with a key of config.json; 'maybe', or 'maybe if KEY'; 'if {m}'"
        yield repr(only), expected
    for letter in PLACEHOLDER.findall(only):
        if letter not in placeholders or letter in PLACEHOLDER.findall(left):
            yield repr(only), "'if' and a placeholder of this recipe that the name does not have"


def check_formula(text: Any, *, is_run: bool = False) -> Iterator[tuple[str, str]]:
    if not isinstance(text, str):
        yield repr(text), "a formula over config keys"
        return
    try:
        parse_formula(text, is_run=is_run)
    except ValueError as error:
        yield str(error), "a formula over config keys"
