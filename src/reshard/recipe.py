"""Recipes: a TOML file -> Recipe. Knows the language of the rows and checks it; never looks at a checkpoint."""

import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice, starmap
from pathlib import Path
from typing import Any

from reshard.errors import MOST_PROBLEMS, Problem, Refused, listed, refuse
from reshard.types import BlockScale, Hole, Recipe, Rule

FOLDER = Path(__file__).parent / "recipes"
TEXT_KEYS = ("name", "about", "left", "right", "files")
LIST_KEYS = ("carry", "model_types", "architectures", "ranks_divide")
ALL_KEYS = (*TEXT_KEYS, *LIST_KEYS, "holes", "scale", "rules")
HOLE_KEYS = ("counts", "size", "within", "after", "marker", "rows_of")
RELATIONS = ("same", "drop")
SPLITS = ("replicate", "rows", "columns")
HOLE = re.compile(r"\{([^{}]*)\}")
COMPONENT = re.compile(r"[^{}]+|\{[a-z]\}|\{\*\}")
CONDITION = re.compile(r"(if|unless) \w+")
PARAMETER = "p"
"""The hole that stands for a weight or its block scale."""
REST = "*"
"""The hole at the end of a drop rule that stands for the rest of the name."""
WEIGHT = "weight"
LARGEST_RECIPE = 64 << 10
"""In bytes: several hundred rows. The time of Python's TOML parser can grow with the square of the text."""
MOST_READ = 2 << 20
"""In characters: so much is read again to find the lines of faults. A recipe of 150 rows needs no more."""


def packaged_recipes() -> list[Recipe]:
    """Every recipe that comes with the package: the folder is the only registry."""
    return [load_recipe(str(path)) for path in sorted(FOLDER.glob("*.toml"))]


def load_recipe(name: str) -> Recipe:
    """The packaged recipe of that name, or the one in the file of that path. Raises Refused with every fault."""
    is_path = name.endswith(".toml") or Path(name).is_file()
    path = Path(name) if is_path else FOLDER / f"{name}.toml"
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_RECIPE + 1)
        if len(content) > LARGEST_RECIPE:
            raise refuse("too-large", str(path), "a longer file", f"at most {LARGEST_RECIPE:,} bytes for a recipe")
        return parse_recipe(content.decode(), str(path))
    except FileNotFoundError:
        names = [known.stem for known in sorted(FOLDER.glob("*.toml"))]
        remedy = f"did you mean {near[0]}?" if (near := get_close_matches(name, names, 1)) else "see reshard recipes"
        raise refuse("unknown-recipe", name, "no such recipe or file", f"one of {listed(names, 99)}", remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise refuse("cannot-read", str(path), str(error), "a readable TOML file") from None


def parse_recipe(text: str, origin: str) -> Recipe:
    """The recipe that `text` describes; `origin` names its file. Raises Refused with every fault and its line."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number may have more digits than Python reads
        line = re.search(r"at line (\d+)", str(error))
        subject = f"{origin}:{line[1] if line else text.count(chr(10)) + 1}"
        raise refuse("wrong-recipe", subject, str(error), "TOML") from None
    if faults := list(islice(table_faults(table), MOST_PROBLEMS)):
        lines = lines_of(text, {path for path, _, _ in faults})
        where = {path: f"{origin}:{line}" for path, line in lines.items()}
        raise Refused(
            Problem("wrong-recipe", where.get(path, origin), found, expected) for path, found, expected in faults
        )
    return Recipe(
        name=table["name"],
        about=table["about"],
        left=table["left"],
        right=table["right"],
        files=table["files"],
        carry=tuple(table.get("carry", ())),
        model_types=tuple(table.get("model_types", ())),
        architectures=tuple(table.get("architectures", ())),
        ranks_divide=tuple(table.get("ranks_divide", ())),
        holes={name: Hole(name, **fields) for name, fields in table.get("holes", {}).items()},
        scale=BlockScale(**table["scale"]) if "scale" in table else None,
        rules=tuple(starmap(Rule, table["rules"])),
        origin=origin,
        text_hash=hashlib.sha256(text.encode()).hexdigest(),
    )


Where = tuple[str | int, ...]
Fault = tuple[Where, str, str]
"""Where in the table, what was found, what was expected."""


def table_faults(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Every fault of a recipe's table. The rules are looked at only once all else is right, for they depend on it."""
    faults = [*key_faults(table), *scale_faults(table.get("scale")), *hole_faults(table.get("holes", {}))]
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
    if not isinstance(table.get("rules"), list) or not table["rules"]:
        yield ("rules",), repr(table.get("rules")), "rules: a list of rows"
    files = table.get("files")
    if isinstance(files, str) and not is_files_pattern(files):
        yield ("files",), repr(files), "a file name with {rank} and {ranks} that ends in .safetensors"
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


def scale_faults(scale: Any) -> Iterator[Fault]:
    if scale is None:
        return
    if not isinstance(scale, dict) or set(scale) != {"left", "right", "block"}:
        yield ("scale",), repr(scale), "scale: a table of left, right and block"
    elif not (isinstance(scale["left"], str) and isinstance(scale["right"], str)):
        yield ("scale",), repr(scale), "left and right: strings"
    elif type(scale["block"]) is not int or scale["block"] < 1:
        yield ("scale",), repr(scale["block"]), "block: a whole number of elements"


def hole_faults(holes: Any) -> Iterator[Fault]:
    if not isinstance(holes, dict):
        yield ("holes",), repr(holes), "holes: a table"
        return
    for name, fields in holes.items():
        where = ("holes", name)
        if not re.fullmatch(r"[a-z]", name) or name == PARAMETER:
            yield where, f"the hole {name!r}", f"a single lower-case letter, not {PARAMETER!r}"
        elif not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
            yield where, repr(fields), "a table of strings"
        elif unknown := set(fields) - set(HOLE_KEYS):
            yield where, listed(sorted(unknown)), "only " + ", ".join(HOLE_KEYS)
        elif not fields.get("counts"):
            yield where, "no counts", "what the hole counts, such as counts = 'layers'"
        elif ("after" in fields) != ("marker" in fields):
            yield where, repr(fields), "after and marker together"
        else:
            yield from ((where, *fault) for fault in hole_links(name, fields, holes))


def hole_links(name: str, fields: Mapping[str, str], holes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Faults in what a hole says of other holes and of tensors."""
    for other in (fields[key] for key in ("within", "after") if key in fields):
        if other not in holes or other == name:
            yield f"the hole {other!r}", "another hole of this recipe"
    for key in ("marker", "rows_of"):
        yield from pattern_faults(fields[key], holes) if fields.get(key) else ()
    if "marker" in fields and HOLE.findall(fields["marker"]) != [name]:
        yield repr(fields["marker"]), f"marker: a name with the hole {{{name}}}"
    if unknown := set(HOLE.findall(fields.get("rows_of", ""))) - (set(holes) - {name}):
        yield f"the hole {listed(sorted(unknown))} in rows_of", "rows_of: a name with holes of this recipe"


def rules_faults(table: Mapping[str, Any]) -> Iterator[Fault]:
    holes, scaled = table.get("holes", {}), "scale" in table
    seen: dict[tuple[str, str], int] = {}
    for number, row in enumerate(table["rules"]):
        where = ("rules", number)
        if not is_texts(row) or len(row) not in (4, 5):
            yield where, repr(row), "a row of relation, left, right, split and perhaps only: four or five strings"
            continue
        faults = list(row_faults(Rule(*row), holes, scaled=scaled))
        yield from ((where, found, expected) for found, expected in faults)
        for side, pattern in (("left", row[1]), ("right", row[2])):
            first = seen.setdefault((side, pattern), number)
            if pattern and first != number:
                yield where, f"{pattern!r} on the {side}", f"a name that row {first + 1} has not already"


def row_faults(rule: Rule, holes: Mapping[str, Any], *, scaled: bool) -> Iterator[tuple[str, str]]:
    known = [*holes, *([PARAMETER] if scaled else []), *([REST] if rule.relation == "drop" else [])]
    if rule.relation not in RELATIONS:
        yield repr(rule.relation), "a relation: " + " or ".join(RELATIONS)
    for pattern in filter(None, (rule.left, rule.right)):
        yield from pattern_faults(pattern, known)
    if not rule.left:
        yield "no left name", "the name on the left"
    if rule.only and not CONDITION.fullmatch(rule.only):
        yield repr(rule.only), "'if KEY' or 'unless KEY', with a key of config.json"
    if rule.relation == "drop":
        if rule.right or not rule.split:
            yield repr([rule.right, rule.split]), 'in a drop: "" on the right, and the reason in the place of the split'
    elif sorted(HOLE.findall(rule.left)) != sorted(HOLE.findall(rule.right)):
        yield f"{rule.left!r} and {rule.right!r}", "the same holes on the left and on the right"
    elif rule.split not in SPLITS and rule.split not in {
        f"by {name}" for name in HOLE.findall(rule.left) if name in holes
    }:
        yield repr(rule.split), "a split: " + ", ".join(SPLITS) + " or 'by' and a hole of the row"


def is_dealt(name: str, holes: Mapping[str, Any]) -> bool:
    """Whether the members of a hole can be dealt to ranks: they begin at 0, those of a part of another do not."""
    return name in holes and not {"within", "after"} & set(holes[name])


def pattern_faults(pattern: str, known: Iterable[str]) -> Iterator[tuple[str, str]]:
    *inner, last = pattern.split(".")
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
