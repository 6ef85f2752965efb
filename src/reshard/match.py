"""Stage 2: Checkpoint + Recipe -> Matched. Which rule covers each tensor, and that none is missing. Opens no file."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from reshard.errors import Problem, require_none
from reshard.holes import hole_members, hole_problems, missing_problems
from reshard.names import Pattern, pattern_of, patterns_of, split_name
from reshard.types import Checkpoint, Hole, Recipe, Tensor

OWN_RECIPE = "write a recipe of your own (docs/recipes.md) and pass it with --recipe FILE"
NEAREST_FOR = 50
"""For so many kinds of unknown name the nearest rule is looked for: it is slow, and beyond that nobody reads."""


class Match(NamedTuple):
    """A tensor, the rule that covers it, and its name on the other side."""

    tensor: Tensor
    rule: int
    """Index into the rules of the recipe."""
    numbers: tuple[str, ...]
    """What fills the holes of the rule's left name, in their order."""
    is_scale: bool
    right: str


@dataclass(frozen=True, slots=True)
class Matched:
    """Every tensor of a checkpoint under exactly one rule of a recipe."""

    kept: tuple[Match, ...]
    dropped: tuple[Match, ...]
    counts: Mapping[str, int]
    """How many members each hole has: `{"i": 61, "e": 256}`."""


def match(checkpoint: Checkpoint, recipe: Recipe) -> Matched:
    """Finds the one rule of each tensor.

    Raises Refused with every tensor that no rule or more than one rule covers; then with every gap in a numbered family
    and every contradiction with the config; then with every tensor that a rule expects and the checkpoint lacks.
    """
    matches = match_names(checkpoint, recipe)
    present: dict[int, set[tuple[str, ...]]] = {}
    for found in matches:
        if not found.is_scale:
            present.setdefault(found.rule, set()).add(found.numbers)
    members = hole_members(recipe, present)
    require_none(hole_problems(checkpoint, recipe, members))
    require_none(missing_problems(checkpoint.config, recipe, members, present))
    is_kept = [rule.relation != "drop" for rule in recipe.rules]
    return Matched(
        tuple(found for found in matches if is_kept[found.rule]),
        tuple(found for found in matches if not is_kept[found.rule]),
        {name: len(numbers) for name, numbers in members.items()},
    )


def match_names(checkpoint: Checkpoint, recipe: Recipe) -> list[Match]:
    """Each tensor with its one rule. Raises Refused with all tensors that have none or several."""
    patterns = [pattern for number, rule in enumerate(recipe.rules) for pattern in patterns_of(number, rule, recipe)]
    names = {name: split_name(name) for name in checkpoint.tensors}
    marked = {hole.name: marked_numbers(hole, names.values()) for hole in recipe.holes.values() if hole.after}
    before = {
        earlier.name: hole.name
        for hole in recipe.holes.values()
        for earlier in recipe.holes.values()
        if hole.after and hole.after in (earlier.name, earlier.within)
    }
    candidates: dict[tuple[str, int], list[Pattern]] = {}
    matches: list[Match] = []
    unmatched: dict[str, list[Pattern]] = {}
    for name, (key, numbers) in names.items():
        known = candidates.get((key, len(numbers)))
        if known is None:
            known = [pattern for pattern in patterns if pattern.fits(key, numbers)]
            candidates[key, len(numbers)] = known
        found = [pattern for pattern in known if pattern.accepts(numbers, marked, before)]
        if len(found) != 1:
            unmatched[name] = found
            continue
        pattern = found[0]
        right = pattern.right % tuple([numbers[place] for place in pattern.order])
        matches.append(Match(checkpoint.tensors[name], pattern.rule, numbers, pattern.is_scale, right))
    require_none(unmatched_problems(recipe, unmatched))
    return matches


def marked_numbers(hole: Hole, names: Iterable[tuple[str, tuple[str, ...]]]) -> set[str]:
    """The members of a hole that follows another: those whose marker is among the names."""
    marker = pattern_of(0, hole.marker, "", is_scale=False)
    place = marker.slots.index(hole.name)
    return {numbers[place] for key, numbers in names if marker.fits(key, numbers)}


def unmatched_problems(recipe: Recipe, unmatched: Mapping[str, Sequence[Pattern]]) -> Iterator[Problem]:
    lefts = [rule.left for rule in recipe.rules]
    nearest: dict[str, str] = {}
    for name, patterns in unmatched.items():
        if patterns:
            found = " and ".join(repr(recipe.rules[pattern.rule].left) for pattern in patterns)
            yield Problem("two-rules", name, found, "one rule", f"correct the recipe {recipe.origin}")
            continue
        key = split_name(name)[0]
        if key not in nearest and len(nearest) < NEAREST_FOR:
            nearest[key] = next(iter(get_close_matches(name, lefts, 1, 0.0)), "none")
        expected = f"a rule of {recipe.name}; the nearest is {nearest.get(key, lefts[0])!r}"
        yield Problem("no-rule", name, "no rule knows it", expected, f"another --recipe, or {OWN_RECIPE}")
