"""What is wrong with a recipe: the table that its TOML file holds -> faults, each with its place and line."""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from reshard.errors import listed
from reshard.formulas import parse, parse_shape
from reshard.header import BITS
from reshard.types import Rule

TEXT_KEYS = ("name", "about", "left", "right", "files")
LIST_KEYS = ("carry", "model_types", "architectures", "ranks_divide", "padded")
ALL_KEYS = (*TEXT_KEYS, *LIST_KEYS, "checked", "describes", "holes", "scales", "sizes", "run", "run_needs", "rules")
HOLE_TEXTS = (
    "counts", "size", "within", "some_of", "picked_by", "listed", "after", "marker", "like", "optional", "rows_of",
)  # fmt: skip
HOLE_KEYS = (*HOLE_TEXTS, "picked")
SCALE_KEYS = ("left", "right", "block", "packed", "fp8_block", "stays")
RELATIONS = ("same", "dequantize", "drop")
SPLITS = ("replicate", "rows", "columns", "padded rows", "packed rows")
UNITS = re.compile(r"rows of ([\w.]+)")
"""The split of heads: they are whole, and those of few are held by several ranks."""
HOLE = re.compile(r"\{([^{}]*)\}")
COMPONENT = re.compile(r"[^{}]+|\{[a-z]\}|\{\*\}")
CONDITION = re.compile(r"(if|unless) [\w.]+|maybe( if [\w.]+)?")
REST = "*"
"""The hole at the end of a drop rule that stands for the rest of the name: it drops what no other rule knows."""
MOST_READ = 2 << 20
"""In characters: so much is read again to find the lines of faults. A recipe of 150 rows needs no more."""

Where = tuple[str | int, ...]
Fault = tuple[Where, str, str]
"""Where in the table, what was found, what was expected."""


def table_faults(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Every fault of a recipe's table. The rules are looked at only once all else is right, for they depend on it."""
    holes = table.get("holes", {})
    letters = holes if isinstance(holes, dict) else {}
    faults = [*key_faults(table), *hole_faults(holes), *scale_faults(table.get("scales", {}), letters)]
    faults += [*formula_faults(table), *needs_faults(table.get("run_needs", []))]
    yield from faults
    if not faults:
        yield from rules_faults(table)


def key_faults(table: Mapping[str, Any]) -> Iterator[Fault]:
    for key in table:
        if key not in ALL_KEYS:
            near = get_close_matches(key, ALL_KEYS, 1)
            yield (key,), f"the key {key!r}", near[0] if near else "one of " + ", ".join(ALL_KEYS)
    for key in TEXT_KEYS:
        if not isinstance(table.get(key), str) or not table[key]:
            yield (key,), repr(table.get(key)), f"{key}: a string"
    for key in LIST_KEYS:
        if not is_texts(table.get(key, [])):
            yield (key,), repr(table[key]), f"{key}: a list of strings"
    if type(table.get("describes", False)) is not bool:
        yield ("describes",), repr(table["describes"]), "describes: true or false"
    if not isinstance(table.get("checked", ""), str):
        yield ("checked",), repr(table["checked"]), "checked: a string"
    if not isinstance(table.get("rules"), list) or not table["rules"]:
        yield ("rules",), repr(table.get("rules")), "rules: a list of rows"
    files = table.get("files")
    if isinstance(files, str) and not is_files_pattern(files):
        yield ("files",), repr(files), "a file name with {rank} and {ranks} that ends in .safetensors"

    divided = table.get("ranks_divide", [])
    for text in divided if is_texts(divided) else ():
        yield from ((("ranks_divide",), *fault) for fault in text_faults(text))
    carry = table.get("carry", [])
    if is_texts(carry) and not all(is_plain(pattern) and "**" not in pattern for pattern in carry):
        yield ("carry",), repr(carry), "carry: patterns of file names, without folders"


def is_files_pattern(text: str) -> bool:
    """Whether a text makes a file name for each rank, which no side file can have, and nothing but that."""
    rest = text.replace("{rank}", "", 1).replace("{ranks}", "", 1)
    return (
        set(HOLE.findall(text)) == {"rank", "ranks"}
        and not set(rest) & set("{}")
        and is_plain(rest)
        and rest.endswith(".safetensors")
    )


def is_plain(name: str) -> bool:
    """Whether a file name stays in its folder."""
    return bool(name) and not set(name) & set("/\\\0") and name not in {".", ".."}


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def scale_faults(scales: Any, holes: Mapping[str, Any]) -> Iterator[Fault]:
    if not isinstance(scales, dict):
        yield ("scales",), repr(scales), "scales: a table"
        return
    for letter, fields in scales.items():
        where = ("scales", letter)
        if not re.fullmatch(r"[a-z]", letter) or letter in holes:
            yield where, f"the hole {letter!r}", "a single lower-case letter that numbers nothing"
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


def formula_faults(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Faults in the sizes and in the run configuration."""
    for key in ("sizes", "run"):
        if not isinstance(table.get(key, {}), dict):
            yield (key,), repr(table[key]), f"{key}: a table"
            return
    for name, text in table.get("sizes", {}).items():
        yield from ((("sizes", name), found, expected) for found, expected in text_faults(text))
    for name, value in table.get("run", {}).items():
        text = value[0] if isinstance(value, list) and len(value) in (1, 2) else value
        yield from ((("run", name), found, expected) for found, expected in text_faults(text))


def needs_faults(rows: Any) -> Iterator[Fault]:
    """Faults in what the inference code has in itself."""
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, list) or len(row) < 2 or any(isinstance(value, (list, dict)) for value in row):
            yield ("run_needs",), repr(row), "run_needs: rows of a formula and the values that it may come to"
            continue
        texts = [value.removeprefix("=") for value in row if isinstance(value, str) and value.startswith("=")]
        yield from ((("run_needs",), *fault) for text in (row[0], *texts) for fault in text_faults(text))


def text_faults(text: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(text, str):
        yield repr(text), "a formula over config keys"
        return
    try:
        parse(text)
    except ValueError as error:
        yield str(error), "a formula over config keys"


def hole_faults(holes: Any) -> Iterator[Fault]:
    if not isinstance(holes, dict):
        yield ("holes",), repr(holes), "holes: a table"
        return
    for name, fields in holes.items():
        where = ("holes", name)
        if not re.fullmatch(r"[a-z]", name):
            yield where, f"the hole {name!r}", "a single lower-case letter"
        elif not isinstance(fields, dict) or not all(
            isinstance(value, str) for key, value in fields.items() if key != "picked"
        ):
            yield where, repr(fields), "a table of strings"
        elif unknown := set(fields) - set(HOLE_KEYS):
            yield where, listed(sorted(unknown)), "only " + ", ".join(HOLE_KEYS)
        elif not fields.get("counts"):
            yield where, "no counts", "what the hole counts, such as counts = 'layers'"
        elif ("after" in fields) != ("marker" in fields):
            yield where, repr(fields), "after and marker together"
        elif ("picked" in fields) != ("picked_by" in fields) or not is_picked(fields.get("picked", [])):
            yield where, repr(fields), "picked_by and picked together: a config key, and a list of whole numbers"
        elif "listed" in fields and "some_of" not in fields:
            yield where, repr(fields), "listed with some_of: some members of another hole"
        else:
            texts = [fields[key] for key in ("size", "picked_by", "listed") if fields.get(key)]
            yield from ((where, *fault) for text in texts for fault in text_faults(text))
            yield from ((where, *fault) for fault in hole_links(name, fields, holes))


def is_picked(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def hole_links(name: str, fields: Mapping[str, str], holes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Faults in what a hole says of other holes and of tensors."""
    if "like" in fields and "after" not in fields:
        yield "like without after", "like of a hole that follows another"
    if ("within" in fields and "some_of" in fields) or (
        "picked_by" in fields and not {"within", "some_of"} & set(fields)
    ):
        yield listed(sorted(fields)), "within or some_of: one of them, and for picked_by just one"
    others = [fields[key] for key in ("within", "some_of", "after") if key in fields]
    for other in [*others, *fields.get("like", "")]:
        if other not in holes or other == name:
            yield f"the hole {other!r}", "another hole of this recipe"
    for key in ("marker", "rows_of"):
        yield from pattern_faults(fields[key], holes) if fields.get(key) else ()
    if "marker" in fields and HOLE.findall(fields["marker"]) != [name]:
        yield repr(fields["marker"]), f"marker: a name with the hole {{{name}}}"
    if unknown := set(HOLE.findall(fields.get("rows_of", ""))) - (set(holes) - {name}):
        yield f"the hole {listed(sorted(unknown))} in rows_of", "rows_of: a name with holes of this recipe"


def rules_faults(table: Mapping[str, Any]) -> Iterator[Fault]:
    holes, scales = table.get("holes", {}), table.get("scales", {})
    seen: dict[tuple[str, str], int] = {}
    for number, row in enumerate(table["rules"]):
        where = ("rules", number)
        if not is_texts(row) or len(row) not in (4, 5, 6):
            yield where, repr(row), "a row of relation, left, right, split and perhaps shape and only: 4 to 6 strings"
            continue
        faults = list(row_faults(Rule(*row), holes, scales))
        yield from ((where, found, expected) for found, expected in faults)
        for side, pattern in (("left", row[1]), ("right", row[2])):
            first = seen.setdefault((side, pattern), number)
            if pattern and first != number:
                yield where, f"{pattern!r} on the {side}", f"a name that row {first + 1} has not already"


def row_faults(rule: Rule, holes: Mapping[str, Any], scales: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    known = [*holes, *scales, *([REST] if rule.relation == "drop" else [])]
    if rule.relation not in RELATIONS:
        yield repr(rule.relation), "a relation: " + ", ".join(RELATIONS)
    for pattern in filter(None, (rule.left, rule.right)):
        yield from pattern_faults(pattern, known)
    if not rule.left:
        yield "no left name", "the name on the left"
    if rule.only and not CONDITION.fullmatch(rule.only):
        yield repr(rule.only), "'if KEY' or 'unless KEY', with a key of config.json; or 'maybe', or 'maybe if KEY'"
    if rule.shape:
        yield from shape_faults(rule.shape)
    if rule.relation == "drop":
        if rule.right or not rule.split:
            yield repr([rule.right, rule.split]), 'in a drop: "" on the right, and the reason in the place of the split'
        return
    yield from side_faults(rule, scales)
    if not (rule.split in SPLITS or UNITS.fullmatch(rule.split)) and rule.split not in {
        f"by {name}" for name in HOLE.findall(rule.left) if name in holes
    }:
        yield (
            repr(rule.split),
            "a split: " + ", ".join(SPLITS) + ", 'rows of' and a config key, or 'by' and a hole of the row",
        )


def side_faults(rule: Rule, scales: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The same holes on both sides; but what is dequantised has a scale on the left and none on the right."""
    left, right = sorted(HOLE.findall(rule.left)), sorted(HOLE.findall(rule.right))
    scaled = [letter for letter in left if letter in scales]
    if rule.relation == "dequantize":
        if len(scaled) != 1:
            yield repr(rule.left), "a weight with a block scale, for it to be dequantised"
        left = [letter for letter in left if letter not in scales]
    if left != right:
        yield f"{rule.left!r} and {rule.right!r}", "the same holes on the left and on the right"
    if len(scaled) > 1:
        yield repr(rule.left), "one hole for a weight and its block scale"
    for pattern in (rule.left, rule.right):
        if any(letter in scales for letter in HOLE.findall(pattern.rpartition(".")[0])):
            yield repr(pattern), "a weight and its block scale at the end of a name"
    if rule.relation == "dequantize" and any(scales[letter].get("stays") for letter in scaled):
        yield repr(rule.left), "`same`: what stays as it is cannot be dequantised"


def shape_faults(text: str) -> Iterator[tuple[str, str]]:
    try:
        dtype = parse_shape(text)[0]
    except ValueError as error:
        yield str(error), "a shape such as [vocab_size, hidden_size]"
        return
    if dtype and dtype not in BITS:
        yield f"{dtype!r} in {text!r}", "a dtype: " + ", ".join(BITS)


def pattern_faults(pattern: str, known: Iterable[str]) -> Iterator[tuple[str, str]]:
    *inner, last = pattern.split(".")
    if pattern.startswith("{") and pattern != f"{{{REST}}}":
        yield f"{pattern!r}", "a name that begins with text"  # by that we know it again in rank files
    # One of a kind is named: of a name with a million dots there would be a million, each with the whole name.
    if (wrong := next((part for part in (*inner, last) if not COMPONENT.fullmatch(part)), None)) is not None:
        yield f"{wrong!r} in {pattern!r}", "text, or a hole such as {i}, between two dots"
    if "{*}" in inner:
        yield f"{{*}} in {pattern!r}", "{*} at the end only"
    names = HOLE.findall(pattern)
    if unknown := sorted(set(names) - set(known)):
        yield f"the hole {listed('{' + name + '}' for name in unknown)} in {pattern!r}", f"one of {listed(known, 99)}"
    if len(set(names)) != len(names):
        yield f"a hole twice in {pattern!r}", "each hole once"


def lines_of(text: str, paths: set[Where]) -> dict[Where, int]:
    """For each path the line on which its value ends, by reading ever more of the text. Slow, for messages only; in a
    text so long that it would take minutes, the last of them have none.

    tomllib gives no positions; the first prefix that holds the value shows where it stands. The values that we ask for
    lie at the top or one level down, so closing at most one open list is enough.
    """
    lines = text.rstrip("\n").split("\n")
    found: dict[Where, int] = {}
    left = MOST_READ
    for count, line in enumerate(lines, 1):
        for ending in ("", "\n]") if line.strip() else ():
            prefix = "\n".join(lines[:count]) + ending
            left -= len(prefix)
            if left < 0 or len(found) == len(paths):
                return found
            with suppress(ValueError, RecursionError):
                table = tomllib.loads(prefix)
                found |= {path: count for path in paths - found.keys() if holds(table, path)}
    return dict.fromkeys(paths, len(lines)) | found


def holds(value: Any, path: Where) -> bool:
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return False
    return True
