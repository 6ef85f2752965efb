"""Finds faults in the TOML table of a recipe, each with its place and line."""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from reshard.formats.json_input import is_plain
from reshard.formats.safetensors import BITS
from reshard.recipe_types import Rule
from reshard.recipes.alternatives import is_choice_of_config
from reshard.recipes.code_dtypes import KEY as CODE_DTYPES
from reshard.recipes.code_dtypes import check_code_dtypes, check_listed_names
from reshard.recipes.file_checks import check_files
from reshard.recipes.flattening import FLATTEN, check_flatten
from reshard.recipes.formulas import MOST_STEPS, parse_formula, parse_shape, takes_too_long
from reshard.recipes.fusion_checks import check_constants, check_fusions, holds_fused
from reshard.recipes.fusions import FUSED, find_stacked
from reshard.recipes.patterns import PLACEHOLDER, REST
from reshard.recipes.placeholder_checks import (
    Fault,
    TablePath,
    check_alike_names,
    check_condition,
    check_formula,
    check_pattern,
    check_placeholder_table,
    check_scales,
)
from reshard.recipes.splits import check_split, make_rule

TEXT_KEYS = ("name", "about", "left", "right", "files")

LIST_KEYS = ("carry", "model_types", "architectures", "ranks_divide", "padded")

ALL_KEYS = (
    *TEXT_KEYS,
    *LIST_KEYS,
    "checked",
    "describes",
    "placeholders",
    "scales",
    "sizes",
    CODE_DTYPES,
    "run",
    "run_needs",
    "rules",
    "constants",
    "engine",
    "whole_only",
    "by_name",
)

RELATIONS = ("same", "dequantize", "drop", FLATTEN, *FUSED)

TARGET_KEYS = ("dtype", "packed")
"""Facts of the rank files that a run configuration may use, besides the counts of placeholders."""

STRING_OR_COMMENT = re.compile(
    r'"""(?:\\.|[^\\])*?""""{0,2}|\'\'\'.*?\'\'\'\'{0,2}|"(?:\\.|[^"\\])*"|\'[^\']*\'|#[^\n]*', re.DOTALL
)


def check_table(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Every fault of a recipe's table. The rules are looked at only once all else is right, for they depend on it; and
    how long formulas take, once they are formulas.
    """
    placeholders = table.get("placeholders", {})
    letters = placeholders if isinstance(placeholders, dict) else {}
    faults = [
        *check_keys(table),
        *check_placeholder_table(placeholders),
        *check_scales(table.get("scales", {}), letters),
        *check_code_dtypes(table.get(CODE_DTYPES, {})),
    ]
    faults += [*check_formulas(table), *check_run_needs(table.get("run_needs", []))]
    faults += [*check_constants(table.get("constants", []), letters, table.get("scales", {}))]
    faults = faults or list(check_rules(table))
    rights = [row[2] for row in table["rules"] if row[2]] if not faults else []
    yield from faults or [
        *check_formula_lengths(table),
        *check_rows_of(table),
        *check_target_keys(table),
        *check_listed_names(table.get(CODE_DTYPES, {}), rights),
    ]


def check_keys(table: Mapping[str, Any]) -> Iterator[Fault]:
    for key in table:
        if key not in ALL_KEYS:
            near = get_close_matches(key, ALL_KEYS, 1)
            yield (key,), f"the key {key!r}", near[0] if near else "one of " + ", ".join(ALL_KEYS)
    for key in TEXT_KEYS:
        if not isinstance(table.get(key), str) or not table[key]:
            yield (key,), repr(table.get(key)), f"{key}: a string"
    for key in LIST_KEYS:
        if not is_list_of_strings(table.get(key, [])):
            yield (key,), repr(table[key]), f"{key}: a list of strings"
    for key in ("describes", "by_name"):
        if type(table.get(key, False)) is not bool:
            yield (key,), repr(table[key]), f"{key}: true or false"
    for key in ("checked", "whole_only"):
        if not isinstance(table.get(key, ""), str):
            yield (key,), repr(table[key]), f"{key}: a string"
    if not isinstance(table.get("rules"), list) or not table["rules"]:
        yield ("rules",), repr(table.get("rules")), "rules: a list of rows"
    yield from check_files(table)
    if not re.fullmatch(r"[a-z][a-z0-9-]*|", str(table.get("engine", ""))):
        yield ("engine",), repr(table["engine"]), "engine: a word of small letters, digits and hyphens"

    divided = table.get("ranks_divide", [])
    for text in divided if is_list_of_strings(divided) else ():
        yield from ((("ranks_divide",), *fault) for fault in check_formula(text))
    carry = table.get("carry", [])
    if is_list_of_strings(carry) and not all(is_plain(pattern) and "**" not in pattern for pattern in carry):
        yield ("carry",), repr(carry), "carry: patterns of file names, without folders"


def is_list_of_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def check_formulas(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults in the sizes and in the run configuration."""
    for key in ("sizes", "run"):
        if not isinstance(table.get(key, {}), dict):
            yield (key,), repr(table[key]), f"{key}: a table"
            return
    for name, text in table.get("sizes", {}).items():
        yield from ((("sizes", name), found, expected) for found, expected in check_formula(text))
    for name, value in table.get("run", {}).items():
        text = value[0] if isinstance(value, list) and len(value) in (1, 2) else value
        yield from ((("run", name), found, expected) for found, expected in check_formula(text, is_run=True))


def check_run_needs(rows: Any) -> Iterator[Fault]:
    """Faults in what the inference code has in itself."""
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, list) or len(row) < 2 or any(isinstance(value, (list, dict)) for value in row):
            yield ("run_needs",), repr(row), "run_needs: rows of a formula and the values that it may come to"
            continue
        yield from ((("run_needs",), *fault) for text in list_needed_formulas(row) for fault in check_formula(text))


def list_needed_formulas(row: Sequence[Any]) -> list[Any]:
    """The first of a row, and the values that begin with `=`."""
    return [row[0], *(value[1:] for value in row[1:] if isinstance(value, str) and value.startswith("="))]


def check_formula_lengths(table: Mapping[str, Any]) -> Iterator[Fault]:
    sizes = table.get("sizes", {})
    for where, text in list_sized_formulas(table):
        if takes_too_long(text, sizes):
            found = f"{text!r}, with sizes that name each other so often"
            yield where, found, f"a formula of at most {MOST_STEPS} steps, those of its sizes counted at each mention"


def list_sized_formulas(table: Mapping[str, Any]) -> Iterator[tuple[TablePath, str]]:
    """The formulas of a faultless table that may speak of sizes."""
    for name, text in table.get("sizes", {}).items():
        yield ("sizes", name), text
    for name, value in table.get("run", {}).items():
        yield ("run", name), value[0] if isinstance(value, list) else value
    yield from ((("run_needs",), text) for row in table.get("run_needs", []) for text in list_needed_formulas(row))
    for number, row in enumerate(table["rules"]):
        formulas = parse_shape(row[4])[1] if row[4:] and row[4] else []
        yield from ((("rules", number), formula) for formula in formulas if formula != "?")


def check_rows_of(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Tensors that would say how many members a placeholder has, and that are under no row. Which placeholders a name
    has does not count: some layers are found by the name for all of them.
    """
    scales, rest = table.get("scales", {}), f"{{{REST}}}"
    lefts = [row[1] for row in table["rules"]]
    rests = tuple(left.removesuffix(rest) for left in lefts if left.endswith(rest))
    known = {remove_placeholders(left, scales) for left in lefts}
    for letter, fields in table.get("placeholders", {}).items():
        name = fields.get("rows_of", "")
        if name and remove_placeholders(name, scales) not in known and not name.startswith(rests):
            yield ("placeholders", letter), f"rows_of {name!r}", "the left name of a row"


def remove_placeholders(name: str, scales: Mapping[str, Any]) -> str:
    """A name with `#` for each number, whatever it counts, and `weight` for a weight with its scale."""
    return PLACEHOLDER.sub(
        lambda placeholder: "weight" if placeholder[1] in scales else "#", re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "#", name)
    )


def check_target_keys(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Finds facts that a run configuration asks of the target and that do not exist."""
    told = [*table.get("placeholders", {}), *TARGET_KEYS]
    for where, text in list_sized_formulas(table):
        for node in ast.walk(parse_formula(text, is_run=True)) if where[0] in ("run", "sizes") else ():
            match node:
                case ast.Attribute(value=ast.Name(id="target"), attr=name) if name not in told:
                    yield where, f"target.{name}", "target. and one of " + ", ".join(told)


def check_rules(table: Mapping[str, Any]) -> Iterator[Fault]:
    placeholders, scales = table.get("placeholders", {}), table.get("scales", {})
    named: dict[tuple[str, str], list[int]] = {}
    for number, row in enumerate(table["rules"]):
        where = ("rules", number)
        if not is_list_of_strings(row) or len(row) not in (4, 5, 6):
            yield where, repr(row), "a row of relation, left, right, split and perhaps shape and only: 4 to 6 strings"
            continue
        faults = list(check_row(make_rule(*row), placeholders, scales))
        yield from ((where, found, expected) for found, expected in faults)
        for side, pattern in (("left", row[1]), ("right", row[2])):
            named.setdefault((side, pattern), []).append(number)
    for (side, pattern), numbers in named.items():
        rows = [table["rules"][at] for at in numbers]
        if not pattern or len(rows) == 1 or is_choice_of_config([row[5] if row[5:] else "" for row in rows]):
            continue
        if side == "left" or not holds_fused(rows):
            for number in numbers:
                yield ("rules", number), f"{pattern!r} on the {side} {len(numbers)} times", "each name in one row"
    if all(is_list_of_strings(row) and len(row) in (4, 5, 6) for row in table["rules"]):
        yield from check_fusions(table["rules"], placeholders)
        yield from check_alike_names(table["rules"], placeholders, scales)
        yield from check_padded_keys(table)


def check_padded_keys(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Finds keys that padding may raise beside rows that are not padded."""
    if not table.get("padded"):
        return
    if any(row[0] in FUSED for row in table["rules"]):
        yield ("padded",), repr(table["padded"]), "no padded keys beside fused tensors: their parts are not padded"
    rules = [make_rule(*row) for row in table["rules"]]
    others = [rule for rule in rules if rule.relation == FLATTEN or rule.split.step or rule.split.is_first]
    if others:
        expected = f"no padded keys beside {others[0].relation!r}, {others[0].split.text!r}, which is not padded"
        yield ("padded",), repr(table["padded"]), expected


def check_row(rule: Rule, placeholders: Mapping[str, Any], scales: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    known = [*placeholders, *scales, *([REST] if rule.relation == "drop" else [])]
    if rule.relation not in RELATIONS:
        yield repr(rule.relation), "a relation: " + ", ".join(RELATIONS)
    yield from check_pattern(rule.left, known) if rule.left else [("no left name", "the name on the left")]
    yield from check_pattern(rule.right, known, scales) if rule.right else ()
    yield from check_condition(rule.only, rule.left, placeholders)
    if rule.shape:
        yield from check_rule_shape(rule.shape)
    if rule.relation == "drop":
        if rule.right or not rule.split.text:
            yield (
                repr([rule.right, rule.split.text]),
                'in a drop: "" on the right, and the reason in the place of the split',
            )
        return
    yield from check_sides(rule, scales)
    yield from check_assignment(rule, placeholders)
    letters = PLACEHOLDER.findall(rule.left)
    is_scaled = any(letter in scales for letter in letters)
    if rule.relation == FLATTEN:
        yield from check_flatten(rule, is_scaled=is_scaled)
    yield from check_split(
        rule,
        [letter for letter in letters if letter in placeholders],
        is_fused=rule.relation in FUSED,
        is_scaled=is_scaled,
    )


def check_assignment(rule: Rule, placeholders: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Members that are assigned to ranks must be numbered from 0 on, without a gap, so that every rank gets as many."""
    split = rule.split
    fields = placeholders.get(split.placeholder, {})
    if unfit := [key for key in ("within", "some_of", "after") if key in fields]:
        yield f"{split.text!r}, a placeholder with {unfit[0]!r}", "a placeholder that counts from 0 by itself"
    for letter, other in placeholders.items():
        if fields and split.placeholder in other.get("like", ""):
            yield f"{split.text!r}, which {{{letter}}} is like", "a placeholder that no other is like"


def check_sides(rule: Rule, scales: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The same placeholders on both sides; but what is dequantised has a scale on the left and none on the right."""
    left, right = sorted(PLACEHOLDER.findall(rule.left)), sorted(PLACEHOLDER.findall(rule.right))
    scaled = [letter for letter in left if letter in scales]
    if rule.relation == "dequantize":
        if len(scaled) != 1:
            yield repr(rule.left), "a weight with a block scale, for it to be dequantised"
        left = [letter for letter in left if letter not in scales]
    if rule.relation == "stack":
        left = [letter for letter in left if letter != find_stacked(rule.left, rule.right)]
    if left != right:
        yield f"{rule.left!r} and {rule.right!r}", "the same placeholders on the left and on the right"
    if len(scaled) > 1:
        yield repr(rule.left), "one placeholder for a weight and its block scale"
    for pattern in (rule.left, rule.right):
        if any(letter in scales for letter in PLACEHOLDER.findall(pattern.rpartition(".")[0])):
            yield repr(pattern), "a weight and its block scale at the end of a name"
    if rule.relation == "dequantize" and any(scales[letter].get("stays") for letter in scaled):
        yield repr(rule.left), "`same`: what stays as it is cannot be dequantised"


def check_rule_shape(text: str) -> Iterator[tuple[str, str]]:
    try:
        dtype = parse_shape(text)[0]
    except ValueError as error:
        yield str(error), "a shape such as [vocab_size, hidden_size]"
        return
    if dtype and dtype not in BITS:
        yield f"{dtype!r} in {text!r}", "a dtype: " + ", ".join(BITS)


def find_lines(text: str) -> dict[TablePath, int]:
    """Finds the line of each key, and the last line of each row of an array. tomllib gives no positions, but has found
    `text` to be TOML.

    What is inside one row or inside braces has no line of its own.
    """
    found: dict[TablePath, int] = {}
    table: TablePath = ()
    path: TablePath = ()
    depth = row = 0
    for number, line in enumerate(STRING_OR_COMMENT.sub(hide_text, text).split("\n"), 1):
        value = line
        if depth == 0 and line.strip():
            key, equals, value = line.partition("=")
            own = tuple(part.strip() for part in key.strip(" \t\r[]").split("."))
            path, row = (*table, *own) if equals else own, 0
            table = table if equals else own
            found.update({path[:length]: number for length in (1, 2) if path[:length] not in found})
        for char in value:
            depth -= char in "]}"
            if depth == 1 and char == ",":
                row += 1
            elif depth == 1 and not char.isspace():
                found[(*path, row)] = number
            depth += char in "[{"
    return found


def hide_text(found: re.Match[str]) -> str:
    """A word for a string that is one, as a key may be; of other strings and comments only the ends of lines."""
    is_word = re.fullmatch(r"""["'][\w-]+["']""", found[0])
    return found[0][1:-1] if is_word else "\n" * found[0].count("\n")
