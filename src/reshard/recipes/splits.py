"""Parses the splits of a recipe: the dimension that is cut, and into how many parts."""

import re

from reshard.types import Rule, Split

ROWS, COLUMNS = 0, 1
"""The dimensions that a split can cut."""

HALVES = 2
"""Tensors that lie packed in one: a gate, and what it is multiplied with."""

SPLITS = {
    "replicate": Split("replicate"),
    "rows": Split("rows", ROWS),
    "columns": Split("columns", COLUMNS),
    "padded rows": Split("padded rows", ROWS, is_padded=True),
    "packed rows": Split("packed rows", ROWS, is_packed=True),
}
"""The splits that name nothing of the recipe or of the config."""

HEADS = re.compile(r"rows of ([\w.]+)")

PADDED = re.compile(r"rows padded to ([1-9][0-9]{0,5})")

MEMBERS = re.compile(r"by ([a-z])")


def parse_split(text: str) -> Split | None:
    """Parses a split as recipes write it, such as `rows`, `rows of KEY` or `by e`. None if the text is no split."""
    if found := HEADS.fullmatch(text):
        return Split(text, ROWS, heads_key=found[1])
    if found := MEMBERS.fullmatch(text):
        return Split(text, placeholder=found[1])
    if found := PADDED.fullmatch(text):
        return Split(text, ROWS, is_padded=True, multiple=int(found[1]))
    return SPLITS.get(text)


def make_rule(relation: str, left: str, right: str, split: str, shape: str = "", only: str = "") -> Rule:
    """Makes a rule of the strings of a row. The reason of a `drop`, and a wrong split, are kept as text that cuts
    nothing.
    """
    parsed = parse_split(split) if relation != "drop" else None
    return Rule(relation, left, right, parsed or Split(split), shape, only)


def count_parts(ranks: int, heads: int) -> int:
    """Counts the parts into which ranks cut a tensor: one for each rank. Where there are fewer heads than ranks, one
    for each head, held by several ranks. 0 if neither number divides the other. `heads` is 0 where the split is not by
    heads.
    """
    if not heads or heads % ranks == 0:
        return ranks
    return heads if ranks % heads == 0 else 0
