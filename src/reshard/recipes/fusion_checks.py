"""Finds faults in the rows that make a fused tensor together, and in the constants of a recipe."""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from reshard.recipes.formulas import parse_shape
from reshard.recipes.fusions import FUSED, find_stacked
from reshard.recipes.patterns import PLACEHOLDER
from reshard.recipes.placeholder_checks import Fault, check_pattern

CONSTANT_ROW = 'a row of right name, dtype and shape, and value, such as ["model.scale", "F32 []", 1.0]'

CONDITION = re.compile(r"if \{([a-z])\}")
"""Of a constant: only where weights have this block scale."""

LARGEST_VALUES = {"F32": 3.4e38, "BF16": 3.38e38, "F16": 65504.0}
"""By dtype of a constant: the largest value that it may have."""

MOST_VALUES = 1 << 20
"""In elements, of a constant."""


def check_fusions(rows: Sequence[Sequence[str]], placeholders: Mapping[str, Any]) -> Iterator[Fault]:
    """Finds faults in groups of rows with one right name: their relations, their order, and what they stack."""
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if row[0] in FUSED:
            groups.setdefault(row[2], []).append(number)
    for right, numbers in groups.items():
        first, *others = (rows[number] for number in numbers)
        where = ("rules", numbers[-1])
        stacked = [find_stacked(row[1], right) for row in (first, *others)]
        if first[0] == "concat" and not others:
            yield where, f"one concat into {right!r}", "two rows or more with that right name"
        if len({"".join(row[5:6]) for row in (first, *others)}) > 1:
            yield where, f"rows of {right!r} of which only some may be missing", "one condition for all of them"
        if numbers[-1] - numbers[0] != len(others):
            yield where, f"rows between those of {right!r}", "all its rows behind each other, in the order of the parts"
        if len({(row[0], letter) for row, letter in zip((first, *others), stacked, strict=True)}) > 1:
            yield where, f"rows of {right!r} that differ", "one relation, and one placeholder that is stacked"
        elif first[0] == "stack" and not is_stackable(placeholders, stacked[0]):
            found = f"a stack of {{{stacked[0]}}}" if stacked[0] else "nothing that is stacked"
            yield where, found, "one placeholder more on the left than on the right, which counts from 0 by itself"


def is_stackable(placeholders: Mapping[str, Any], letter: str) -> bool:
    """Whether the members of a placeholder count from 0 without a gap, so that its numbers are places in a stack."""
    fields = placeholders.get(letter)
    return fields is not None and not {"within", "some_of", "after"} & set(fields)


def holds_fused(rows: Sequence[Sequence[str]]) -> bool:
    """Whether rows with one right name make a fused tensor."""
    return all(row[0] in FUSED for row in rows)


def check_constants(rows: Any, placeholders: Mapping[str, Any], scales: Any) -> Iterator[Fault]:
    """Finds faults in the constants. `scales` is what the recipe says of block scales, right or wrong."""
    for row in rows if isinstance(rows, list) else [rows]:
        if not (isinstance(row, list) and [*map(type, row[:3])] == [str, str, float] and len(row) in (3, 4)):
            yield ("constants",), repr(row), CONSTANT_ROW
            continue
        condition = CONDITION.fullmatch(row[3]) if row[3:] and isinstance(row[3], str) else None
        if row[3:] and not (condition and isinstance(scales, dict) and condition[1] in scales):
            yield ("constants",), repr(row[3]), "'if' and the placeholder of a block scale, such as 'if {p}'"
        yield from ((("constants",), *fault) for fault in check_pattern(row[0], placeholders))
        try:
            dtype, lengths = parse_shape(row[1])
        except ValueError as error:
            yield ("constants",), str(error), CONSTANT_ROW
            continue
        if dtype not in LARGEST_VALUES or not all(re.fullmatch(r"[0-9]{1,7}", length) for length in lengths):
            yield ("constants",), repr(row[1]), f"one of {', '.join(LARGEST_VALUES)}, and a shape of numbers"
        elif prod(map(int, lengths)) > MOST_VALUES or not abs(row[2]) <= LARGEST_VALUES[dtype]:  # NaN is neither
            yield ("constants",), repr(row), f"at most {MOST_VALUES:,} elements, of a finite value that {dtype} has"
        if len(PLACEHOLDER.findall(row[0])) > 1:
            yield ("constants",), repr(row[0]), "one placeholder at most"
