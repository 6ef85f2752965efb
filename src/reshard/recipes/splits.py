"""Parses the splits of a recipe: the dimension that is cut, and into how many parts."""

import re
from collections.abc import Collection, Iterator

from reshard.recipe_types import Rule, Split

ROWS, COLUMNS = 0, 1
"""The dimensions that have a word of their own; `dimension 2` names another, from 0 on."""

HALVES = 2
"""Tensors that lie packed in one: a gate, and what it is multiplied with."""

SPLITS = {
    "replicate": Split("replicate"),
    "rows": Split("rows", ROWS),
    "columns": Split("columns", COLUMNS),
    "padded rows": Split("padded rows", ROWS, is_padded=True),
    "packed rows": Split("packed rows", ROWS, is_packed=True),
    "first rank": Split("first rank", ROWS, is_padded=True, is_first=True),
}
"""The splits that name nothing of the recipe or of the config."""

HEADS = re.compile(r"rows of ([\w.]+)")

PADDED = re.compile(r"rows padded to ([1-9][0-9]{0,5})")

MEMBERS = re.compile(r"by ([a-z])")

DIMENSION = re.compile(r"dimension ([0-9])(?: in blocks of ([1-9][0-9]{0,5}))?")


def parse_split(text: str) -> Split | None:
    """Parses a split as recipes write it, such as `rows`, `rows of KEY` or `by e`. None if the text is no split."""
    if found := HEADS.fullmatch(text):
        return Split(text, ROWS, heads_key=found[1])
    if found := MEMBERS.fullmatch(text):
        return Split(text, placeholder=found[1])
    if found := PADDED.fullmatch(text):
        return Split(text, ROWS, is_padded=True, multiple=int(found[1]))
    if found := DIMENSION.fullmatch(text):
        return Split(text, int(found[1]), step=int(found[2] or 0))
    return SPLITS.get(text)


def check_split(
    rule: Rule, placeholders: Collection[str], *, is_fused: bool, is_scaled: bool
) -> Iterator[tuple[str, str]]:
    """Reports a text that is no split, and a split that does not suit its row: the found, and the expected.
    `placeholders` are the letters of the row that count something; `is_scaled`: its weights have block scales.
    """
    text, split = rule.split.text, parse_split(rule.split.text)
    if not split or (split.placeholder and split.placeholder not in placeholders):
        others = "'rows of' and a config key, 'dimension' and a digit, the same 'in blocks of' a number, "
        others += "or 'by' and a placeholder of the row"
        yield repr(text), f"a split: {', '.join(SPLITS)}, {others}"
        return
    if is_fused and (split.is_padded or split.is_packed or split.placeholder or split.step):
        others = "'dimension' and a digit, or 'rows of' a config key"
        yield repr(text), f"a split for a {rule.relation}: replicate, rows, columns, {others}"
    if is_scaled and split.dimension not in (None, ROWS, COLUMNS):
        yield repr(text), "rows or columns: a weight with block scales has two dimensions"
    elif is_scaled and (split.step or split.is_first):
        yield repr(text), "rows, columns, or another split into equal parts, for a weight with block scales"


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


def measure_largest_part(length: int, step: int, ranks: int) -> int:
    """Measures the parts into which ranks cut a length in blocks of `step`, in elements: each rank has as many blocks
    as the first, but the last ones, which have what is left.
    """
    blocks = -(-length // step)
    return -(-blocks // ranks) * step
