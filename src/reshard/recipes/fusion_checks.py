"""Finds faults in the rows that make a fused tensor together, and in the constants of a recipe."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reshard.recipes.formulas import parse_shape
from reshard.recipes.fusions import FUSED, find_stacked
from reshard.recipes.placeholder_checks import Fault, check_pattern

CONSTANT_ROW = 'a row of right name, dtype and shape, and value, such as ["model.scale", "F32 []", 1.0]'

CONSTANT_DTYPES = ("F32", "BF16", "F16")


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


def check_constants(rows: Any, placeholders: Mapping[str, Any]) -> Iterator[Fault]:
    """Finds faults in the constants."""
    for row in rows if isinstance(rows, list) else [rows]:
        if not (isinstance(row, list) and list(map(type, row)) == [str, str, float]):
            yield ("constants",), repr(row), CONSTANT_ROW
            continue
        yield from ((("constants",), *fault) for fault in check_pattern(row[0], placeholders))
        try:
            dtype, lengths = parse_shape(row[1])
        except ValueError as error:
            yield ("constants",), str(error), CONSTANT_ROW
            continue
        if dtype not in CONSTANT_DTYPES or not all(length.isdecimal() for length in lengths):
            yield ("constants",), repr(row[1]), f"one of {', '.join(CONSTANT_DTYPES)}, and a shape of numbers"
