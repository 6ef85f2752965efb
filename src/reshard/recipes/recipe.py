"""Recipes: a TOML file -> Recipe. Knows the language of the rows and checks it; never looks at a checkpoint."""

import hashlib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from functools import cache
from itertools import islice, starmap
from pathlib import Path
from typing import Any

from reshard.errors import MOST_PROBLEMS, Problem, Refused, refuse
from reshard.recipe_types import BlockScale, Constant, Placeholder, Recipe, Rule
from reshard.recipes.code_dtypes import set_code_dtypes
from reshard.recipes.formulas import parse_shape
from reshard.recipes.patterns import PLACEHOLDER
from reshard.recipes.splits import make_rule
from reshard.recipes.table_checks import check_table, find_lines
from reshard.text import format_list

FAMILIES_FOLDER = Path(__file__).parent / "families"

LARGEST_RECIPE = 64 << 10
"""In bytes: several hundred rows. The time of Python's TOML parser can grow with the square of the text."""


@cache
def list_packaged_recipes() -> tuple[Recipe, ...]:
    """Every recipe that comes with the package: the folder is the only registry. They are not checked: a test has done
    it, and half of the time that a command needs to read them would go into it.
    """
    paths = sorted(FAMILIES_FOLDER.glob("*.toml"), key=lambda path: path.stem)
    texts = [(path.read_text(encoding="utf-8"), str(path)) for path in paths]
    return tuple(make_recipe(tomllib.loads(text), text, origin) for text, origin in texts)


def list_recipes_to_try(name: str | None) -> Sequence[Recipe]:
    """The one that is asked for, else every packaged one. Raises Refused."""
    return [load_recipe(name)] if name else list_packaged_recipes()


def make_full_recipe(name: str | None) -> str | None:
    """The name of a recipe, or the path of its file as it is from any folder."""
    return str(Path(name).absolute()) if name and Path(name).is_file() else name


def has_ranks(recipe: Recipe) -> bool:
    """Whether the right side of a recipe is cut for ranks. Else it is a whole checkpoint under other names, some of
    them of fused tensors.
    """
    return "{rank}" in recipe.files


def load_recipe(name: str) -> Recipe:
    """The packaged recipe of that name, or the one in the file of that path. Raises Refused with every fault."""
    is_path = name.endswith(".toml") or Path(name).is_file()
    path = Path(name) if is_path else FAMILIES_FOLDER / f"{name}.toml"
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_RECIPE + 1)
        if len(content) > LARGEST_RECIPE:
            raise refuse("too-large", str(path), "a longer file", f"at most {LARGEST_RECIPE:,} bytes for a recipe")
        return parse_recipe(content.decode(), str(path))
    except FileNotFoundError:
        names = [known.stem for known in sorted(FAMILIES_FOLDER.glob("*.toml"))]
        # Not far: gpt-oss in the place of vllm-gpt-oss is another layout.
        near = [known for known in names if known.startswith(name)] or get_close_matches(name, names, 1, 0.8)
        remedy = f"did you mean {format_list(near)}?" if near else "see reshard recipes"
        raise refuse(
            "unknown-recipe", name, "no such recipe or file", f"one of {format_list(names, 99)}", remedy
        ) from None
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
    if faults := list(islice(check_table(table), MOST_PROBLEMS)):
        lines, last = find_lines(text), text.rstrip("\n").count("\n") + 1
        places = (lines.get(path) or lines.get(path[:1]) or last for path, _, _ in faults)
        raise Refused(
            Problem("wrong-recipe", f"{origin}:{line}", found, expected)
            for line, (_, found, expected) in zip(places, faults, strict=True)
        )
    return make_recipe(table, text, origin)


def make_recipe(table: Mapping[str, Any], text: str, origin: str) -> Recipe:
    """Makes a recipe of a table without faults, which was read from `text`."""
    placeholders = {name: make_placeholder(name, fields) for name, fields in table.get("placeholders", {}).items()}
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
        placeholders=placeholders,
        scales={letter: make_block_scale(fields) for letter, fields in table.get("scales", {}).items()},
        sizes=table.get("sizes", {}),
        padded=tuple(table.get("padded", ())),
        run=table.get("run", {}),
        run_needs=tuple(map(tuple, table.get("run_needs", ()))),
        describes=table.get("describes", False),
        checked=table.get("checked", ""),
        rules=tuple(make_rules(table["rules"], placeholders, table.get("code_dtypes", {}))),
        constants=tuple(starmap(make_constant, table.get("constants", ()))),
        engine=table.get("engine", ""),
        whole_only=table.get("whole_only", ""),
        by_name=table.get("by_name", False),
        origin=origin,
        text_hash=hashlib.sha256(text.encode()).hexdigest(),
    )


def make_placeholder(name: str, fields: Mapping[str, Any]) -> Placeholder:
    return Placeholder(name, **{**fields, "picked": tuple(fields.get("picked", ()))})


def make_constant(right: str, shape: str, value: float, only: str = "") -> Constant:
    """Makes a constant of a row such as `["model.scale", "F32 []", 1.0]`, perhaps with `if {p}` behind."""
    dtype, lengths = parse_shape(shape)
    return Constant(right, dtype, tuple(map(int, lengths)), float(value), "".join(PLACEHOLDER.findall(only)))


def make_block_scale(fields: Mapping[str, Any]) -> BlockScale:
    packed, fp8_block = fields.get("packed", False), fields.get("fp8_block", 1)
    return BlockScale(
        fields["left"],
        fields["right"],
        read_block(fields["block"]),
        packed,
        read_block(fp8_block),
        fields.get("stays", False),
    )


def read_block(block: Any) -> tuple[int, int]:
    """Rows and columns of a block: one number is a square."""
    return (block[0], block[1]) if isinstance(block, list) else (block, block)


def make_rules(
    rows: Iterable[Iterable[str]], placeholders: Mapping[str, Placeholder], dtypes: Mapping[str, Any]
) -> Iterator[Rule]:
    """Every row as a rule; and again for each placeholder that is `like` a placeholder of the row."""
    conditioned = (add_condition(rule, placeholders) for rule in starmap(make_rule, rows))
    rules = list(set_code_dtypes(conditioned, dtypes))
    yield from (replace(rule, optional=find_optional_reason(rule, placeholders)) for rule in rules)
    for placeholder in placeholders.values():
        for rule in rules:
            letters = [letter for letter in PLACEHOLDER.findall(rule.left) if letter in placeholder.like]
            if letters:
                old, new = f"{{{letters[0]}}}", f"{{{placeholder.name}}}"
                left, right = rule.left.replace(old, new), rule.right.replace(old, new)
                yield replace(rule, left=left, right=right, optional=placeholder.optional)


def add_condition(rule: Rule, placeholders: Mapping[str, Placeholder]) -> Rule:
    """A rule with the condition of its placeholders, unless it has its own."""
    letters = PLACEHOLDER.findall(rule.left)
    conditions = [placeholders[name].only for name in letters if name in placeholders and placeholders[name].only]
    return replace(rule, only=conditions[0]) if conditions and not rule.only else rule


def find_optional_reason(rule: Rule, placeholders: Mapping[str, Placeholder]) -> str:
    """The reason why the tensors of a rule are left out unless they are asked for; empty if they never are."""
    letters = PLACEHOLDER.findall(rule.left + rule.only) if rule.relation != "drop" else []
    return next(
        (placeholders[name].optional for name in letters if name in placeholders and placeholders[name].optional), ""
    )


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """Lays out a recipe as the fields that `recipes show --json` prints. Their names are older than ours."""
    fields = {"holes" if name == "placeholders" else name: value for name, value in asdict(recipe).items()}
    for rule in fields["rules"]:
        rule["split"] = rule["split"]["text"]
    fields["constants"] = [constant._asdict() for constant in recipe.constants]
    return fields


def has_dropped_part(recipe: Recipe) -> bool:
    """Whether rank files leave out a whole part of a model, whatever it has: `vision_tower.{*}`."""
    rests = (rule.left for rule in recipe.rules if rule.relation == "drop" and rule.left.endswith("{*}"))
    return any(left.count("{") == 1 for left in rests)
