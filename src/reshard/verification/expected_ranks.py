"""Finds the row of each source tensor, and by it the ranks that should hold the tensor."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from reshard.numbered_names import split_name
from reshard.recipe_types import Recipe
from reshard.recipes.alternatives import list_rules
from reshard.recipes.patterns import Pattern, find_later_members, make_patterns
from reshard.types import Checkpoint


class SourceRow(NamedTuple):
    """The row of a recipe that a source tensor stands in."""

    pattern: Pattern | None
    """None if no row matches its name."""
    numbers: tuple[str, ...]
    """Those in its name."""


def find_source_rows(source: Checkpoint, recipe: Recipe) -> dict[str, SourceRow]:
    """Finds the row of each source tensor, by name."""
    names = {name: split_name(name) for name in source.tensors}
    marked, before = find_later_members(names.values(), recipe)
    rules = list_rules(recipe, source.config)
    patterns = [pattern for number, rule in rules for pattern in make_patterns(number, rule, recipe)]
    found: dict[str, SourceRow] = {}
    by_key: dict[tuple[str, int], list[Pattern]] = {}
    for name, (key, numbers) in names.items():
        fitting = by_key.get((key, len(numbers)))
        if fitting is None:
            # Patterns that take every name that no other matches come last.
            fitting = [pattern for pattern in patterns if pattern.fits(key, numbers)]
            by_key[key, len(numbers)] = fitting = sorted(fitting, key=lambda pattern: pattern.takes_rest)
        found[name] = SourceRow(
            next((pattern for pattern in fitting if pattern.accepts(numbers, marked, before)), None), numbers
        )
    return found


class ExpectedRanks(NamedTuple):
    """The ranks that should hold a source tensor, or a part of it."""

    ranks: Collection[int]
    optional: str
    """The reason why all ranks may leave it out; empty if it is required."""


def find_expected_ranks(rows: Mapping[str, SourceRow], recipe: Recipe, ranks: int) -> dict[str, ExpectedRanks]:
    """Computes by source name which of `ranks` ranks should hold each tensor. Experts are assigned whole, in order."""
    found: dict[str, ExpectedRanks] = {}
    assigned: dict[str, tuple[str, int, str]] = {}
    for name, (pattern, numbers) in rows.items():
        rule = recipe.rules[pattern.rule] if pattern else None
        if pattern is None or rule is None:
            found[name] = ExpectedRanks(range(ranks), "")
        elif rule.relation == "drop" or (rule.relation == "dequantize" and pattern.is_scale):
            found[name] = ExpectedRanks((), "")
        elif letter := rule.split.placeholder:
            assigned[name] = letter, int(numbers[pattern.slots.index(letter)]), rule.optional
        else:
            found[name] = ExpectedRanks(range(ranks), rule.optional)
    members: dict[str, set[int]] = {}
    for letter, member, _ in assigned.values():
        members.setdefault(letter, set()).add(member)
    for name, (letter, member, optional) in assigned.items():
        found[name] = ExpectedRanks((member * ranks // len(members[letter]),), optional)
    return found
