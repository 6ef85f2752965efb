"""Stage 2: Checkpoint + Recipe -> Matched. Which rule covers each tensor, and that none is missing. Opens no file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from reshard.errors import Problem, require_none
from reshard.holes import hole_members, hole_problems, missing_problems
from reshard.names import Pattern, later_members, patterns_of, split_name, split_names
from reshard.types import Checkpoint, Recipe, Tensor

OWN_RECIPE = "write a recipe of your own (docs/recipes.md) and pass it with --recipe FILE"
NEAREST_FOR = 50
"""For so many kinds of unknown name the nearest rule is looked for: it is slow, and beyond that nobody reads."""

LONGEST_COMPARED = 500
"""In characters: so much of a name is compared with the rules. A hostile one has a million."""


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
    matches, unmatched = match_names(checkpoint, recipe)
    require_none(unmatched_problems(recipe, unmatched))
    present: dict[int, set[tuple[str, ...]]] = {}
    for found in matches:
        if not found.is_scale:
            present.setdefault(found.rule, set()).add(found.numbers)
    require_none(clashes(matches))
    members = hole_members(recipe, present)
    require_none(hole_problems(checkpoint, recipe, members))
    require_none(missing_problems(checkpoint.config, recipe, members, present))
    is_kept = [rule.relation != "drop" for rule in recipe.rules]
    return Matched(
        tuple(found for found in matches if is_kept[found.rule]),
        tuple(found for found in matches if not is_kept[found.rule]),
        {name: len(numbers) for name, numbers in members.items()},
    )


def match_names(checkpoint: Checkpoint, recipe: Recipe) -> tuple[list[Match], dict[str, list[Pattern]]]:
    """Each tensor with its one rule; and by name those with none or several, with the patterns that fit them."""
    patterns = [pattern for number, rule in enumerate(recipe.rules) for pattern in patterns_of(number, rule, recipe)]
    names = split_names(checkpoint.tensors)
    marked, before = later_members(names.values(), recipe)
    fitting: dict[tuple[str, int], tuple[list[Pattern], int]] = {}
    accepting: dict[tuple[str, tuple[str, ...]], list[Pattern]] = {}
    matches: list[Match] = []
    unmatched: dict[str, list[Pattern]] = {}
    for name, (key, numbers) in names.items():
        known, checked = fitting.get((key, len(numbers)), (None, 0))
        if known is None:
            known = [pattern for pattern in patterns if pattern.fits(key, numbers)]
            checked = max((pattern.checked({*marked, *before}) for pattern in known), default=0)
            fitting[key, len(numbers)] = known, checked
        # Of a name's numbers mostly the layer alone decides: so each decision is made once a layer, not once an expert.
        found = accepting.get((key, numbers[:checked]))
        if found is None:
            found = [pattern for pattern in known if pattern.accepts(numbers, marked, before)]
            accepting[key, numbers[:checked]] = found
        if len(found) != 1:
            unmatched[name] = found
            continue
        pattern = found[0]
        right = pattern.right % (numbers if pattern.is_plain else tuple([numbers[place] for place in pattern.order]))
        matches.append(Match(checkpoint.tensors[name], pattern.rule, numbers, pattern.is_scale, right))
    return matches, unmatched


def clashes(matches: Sequence[Match]) -> Iterator[Problem]:
    """Tensors that would have the same name on the other side. What is dropped has none there."""
    named = [found for found in matches if found.right]
    if len({found.right for found in named}) == len(named):
        return
    first: dict[str, str] = {}
    for found in named:
        other = first.setdefault(found.right, found.tensor.name)
        if other != found.tensor.name:
            both = f"the name of {other} too"
            yield Problem(
                "same-name", f"{found.tensor.name} -> {found.right}", both, "a name for each", "mend the recipe"
            )


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
            nearest[key] = next(iter(get_close_matches(name[:LONGEST_COMPARED], lefts, 1, 0.0)), "none")
        expected = f"a rule of {recipe.name}; the nearest is {nearest.get(key, lefts[0])!r}"
        yield Problem("no-rule", name, "no rule knows it", expected, f"another --recipe, or {OWN_RECIPE}")
