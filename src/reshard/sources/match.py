"""Stage 2: Checkpoint + Recipe -> Matched. Which rule covers each tensor, and that none is missing. Opens no file."""

import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from reshard.errors import MOST_PROBLEMS, Problem, Refused, refuse, require_none
from reshard.recipes.patterns import Pattern, later_members, patterns_of, split_name, split_names
from reshard.recipes.recipe import FOLDER
from reshard.sources.completeness import hole_members, hole_problems, missing_problems
from reshard.text import listed
from reshard.types import Checkpoint, Recipe, Tensor

OWN_RECIPE = "write a recipe of your own (docs/recipes.md) and pass it with --recipe FILE"

NEAREST_FOR = 50
"""For so many kinds of unknown name the nearest rule is looked for: it is slow, and beyond that nobody reads."""

LONGEST_COMPARED = 500
"""In characters: so much of a name is compared with the rules. A hostile one has a million."""


class Family(NamedTuple):
    """The tensors of one pattern of a recipe, in columns of equal length: a model has 100,000, in 50 families."""

    rule: int
    """Index into the rules of the recipe."""
    is_scale: bool
    tensors: list[Tensor]
    numbers: list[tuple[str, ...]]
    """For each tensor: what fills the placeholders of the rule's left name, in their order."""
    names: list[str]
    """For each tensor: its name on the other side; empty for what is dropped there."""


@dataclass(frozen=True, slots=True)
class Matched:
    """Every tensor of a checkpoint under exactly one rule of a recipe."""

    families: tuple[Family, ...]
    members: Mapping[str, set[int]]
    """The numbers that fill each placeholder: `{"i": {0, 1, 2}, "e": {0, 1}}`."""

    @property
    def counts(self) -> dict[str, int]:
        """How many members each placeholder has: `{"i": 61, "e": 256}`."""
        return {letter: len(numbers) for letter, numbers in self.members.items()}

    @property
    def present(self) -> dict[int, set[tuple[str, ...]]]:
        """By rule: the numbers of each tensor that is there, block scales apart."""
        return {family.rule: set(family.numbers) for family in self.families if not family.is_scale}


def match(checkpoint: Checkpoint, recipe: Recipe, *, keep_optional: bool = False) -> Matched:
    """Finds the one rule of each tensor. Optional tensors (MTP layers) need not be complete, unless they are kept.

    Raises Refused with every tensor that no rule or more than one rule covers; else with every gap in a numbered family
    and every contradiction with the config; else with every tensor that a rule expects and the checkpoint lacks.
    """
    families, unmatched = match_names(checkpoint, recipe)
    matched = Matched(tuple(families), find_members(families, recipe))
    require_none(match_problems(checkpoint, recipe, matched, unmatched, keep_optional=keep_optional))
    return matched


def match_problems(
    checkpoint: Checkpoint,
    recipe: Recipe,
    matched: Matched,
    unmatched: Mapping[str, Sequence[Pattern]],
    *,
    keep_optional: bool,
) -> Iterator[Problem]:
    """The problems of the first kind that there are: each of the later kinds would only follow from the earlier."""
    families, members = matched.families, matched.members
    kinds: tuple[Callable[[], Iterator[Problem]], ...] = (
        lambda: unmatched_problems(recipe, unmatched),
        lambda: clashes(families),
        lambda: hole_problems(checkpoint, recipe, members),
        lambda: missing_problems(checkpoint.config, recipe, members, matched.present, keep_optional=keep_optional),
    )
    for problems in kinds:
        found = list(islice(problems(), MOST_PROBLEMS))
        if found:
            yield from found
            return


def find_members(families: Iterable[Family], recipe: Recipe) -> dict[str, set[int]]:
    """The numbers that fill each placeholder of the recipe."""
    return hole_members(recipe, {family.rule: set(family.numbers) for family in families if not family.is_scale})


def optional_problems(checkpoint: Checkpoint, recipe: Recipe, matched: Matched) -> Iterator[Problem]:
    """The optional tensors that a checkpoint lacks, once they are to be kept; the others have been looked for."""
    if any(rule.optional for rule in recipe.rules):
        yield from missing_problems(checkpoint.config, recipe, matched.members, matched.present, keep_optional=True)


def match_names(checkpoint: Checkpoint, recipe: Recipe) -> tuple[list[Family], dict[str, list[Pattern]]]:
    """The families of a checkpoint; and by name the tensors with no rule or several, with the patterns that fit."""
    patterns = [pattern for number, rule in enumerate(recipe.rules) for pattern in patterns_of(number, rule, recipe)]
    names = split_names(checkpoint.tensors)
    marked, before = later_members(names, recipe)
    groups: dict[str, tuple[list[Tensor], list[tuple[str, ...]]]] = {}
    for (key, numbers), tensor in zip(names, checkpoint.tensors.values(), strict=True):
        group = groups.get(key)
        if group is None:
            group = groups[key] = [], []
        group[0].append(tensor)
        group[1].append(numbers)
    families: dict[Pattern, Family] = {}
    unmatched: dict[str, list[Pattern]] = {}
    for key, (tensors, members) in groups.items():
        fitting = [pattern for pattern in patterns if pattern.fits(key, members[0])]
        for found, chosen in decided(fitting, members, marked, before):
            if len(found) != 1:
                unmatched |= {tensors[place].name: found for place in chosen}
                continue
            family = families.setdefault(found[0], Family(found[0].rule, found[0].is_scale, [], [], []))
            family.tensors.extend([tensors[place] for place in chosen])
            taken = [members[place] for place in chosen]
            family.numbers.extend(taken)
            family.names.extend(found[0].renamed(taken))
    order = {pattern: place for place, pattern in enumerate(patterns)}
    return [families[pattern] for pattern in sorted(families, key=order.__getitem__)], unmatched


def decided(
    fitting: Sequence[Pattern],
    members: Sequence[tuple[str, ...]],
    marked: Mapping[str, set[str]],
    before: Mapping[str, str],
) -> Iterator[tuple[list[Pattern], Sequence[int]]]:
    """The patterns that accept names of one key, with the places of the names; a rest only where nothing else does.

    Of a name's numbers mostly the layer alone decides: so each decision is made once a layer, not once an expert.
    """
    checked = max((pattern.checked({*marked, *before}) for pattern in fitting), default=0)
    places: dict[tuple[str, ...], list[int]] = {}
    for place, numbers in enumerate(members):
        places.setdefault(numbers[:checked], []).append(place)
    for numbers, chosen in places.items():
        found = [pattern for pattern in fitting if pattern.accepts(numbers, marked, before)]
        yield [pattern for pattern in found if not pattern.takes_rest] or found, chosen


def clashes(families: Sequence[Family]) -> Iterator[Problem]:
    """Tensors that would have the same name on the other side. What is dropped has none there."""
    named = [family for family in families if family.names and family.names[0]]
    if len({name for family in named for name in family.names}) == sum(len(family.names) for family in named):
        return
    first: dict[str, str] = {}
    for family in named:
        for name, tensor in zip(family.names, family.tensors, strict=True):
            other = first.setdefault(name, tensor.name)
            if other != tensor.name:
                found = f"the name of {other} too"
                yield Problem("same-name", f"{tensor.name} -> {name}", found, "a name for each", "mend the recipe")


def unmatched_problems(recipe: Recipe, unmatched: Mapping[str, Sequence[Pattern]]) -> Iterator[Problem]:
    lefts = [rule.left for rule in recipe.rules]
    nearest: dict[str, str] = {}
    for name in one_of_each_first(unmatched):
        patterns = unmatched[name]
        if patterns:
            found = " and ".join(repr(recipe.rules[pattern.rule].left) for pattern in patterns)
            yield Problem("two-rules", name, found, "one rule", f"correct the recipe {recipe.origin}")
            continue
        key = split_name(name)[0]
        if key not in nearest and len(nearest) < NEAREST_FOR:
            nearest[key] = next(iter(get_close_matches(name[:LONGEST_COMPARED], lefts, 1, 0.0)), "none")
        expected = f"a rule of {recipe.name}; the nearest is {nearest.get(key, lefts[0])!r}"
        yield Problem("no-rule", name, "no rule knows it", expected, way_to_rule(recipe, "a row or a drop"))


def way_to_rule(recipe: Recipe, row: str) -> str:
    """What to do where a recipe knows no rule: to one's own a row is added."""
    if Path(recipe.origin).parent != FOLDER:
        return f"add {row} to {recipe.origin}"
    return f"another --recipe, or {OWN_RECIPE}"


def one_of_each_first(names: Iterable[str]) -> list[str]:
    """The names, such that those that differ in their numbers only do not fill the few lines that are shown."""
    turns: Counter[str] = Counter()
    found = []
    for name in names:
        key = split_name(name)[0]
        found.append((turns[key], name))
        turns[key] += 1
    return [name for _, name in sorted(found, key=itemgetter(0))]


FITS = "it fits, but the config names another model"


def choose_recipe(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> tuple[Recipe, Matched]:
    """The recipe of a checkpoint, with the rule of each tensor: by its config's model type, else its architecture; of
    several, or where the config says neither, by the names of the tensors.

    Raises Refused if none fits or, by the names, more than one; and for a model that no recipe speaks of, whatever its
    names: another model may have borrowed them.
    """
    config = checkpoint.config or {}
    asked = asked_recipes(config, recipes)
    if not asked and any(isinstance(name, str) for name in (config.get("model_type"), *architectures_of(config))):
        raise no_recipe(checkpoint, recipes, [])
    candidates = asked or recipes
    if len(candidates) == 1:
        return candidates[0], match(checkpoint, candidates[0])
    fitting = [(recipe, matched) for recipe in candidates if (matched := match_or_none(checkpoint, recipe))]
    if len(fitting) == 1:
        return fitting[0]
    raise no_recipe(checkpoint, candidates, [recipe for recipe, _ in fitting])


def wanted_recipes(config: Mapping[str, Any], recipes: Sequence[Recipe]) -> Sequence[Recipe]:
    """Those that a config asks for; all if it asks for none of them."""
    return asked_recipes(config, recipes) or recipes


def asked_recipes(config: Mapping[str, Any], recipes: Sequence[Recipe]) -> Sequence[Recipe]:
    """Those that a config asks for, by its model type or else its architecture."""
    known = architectures_of(config)
    by_type = [recipe for recipe in recipes if config.get("model_type") in recipe.model_types]
    return by_type or [recipe for recipe in recipes if any(found in known for found in recipe.architectures)]


def architectures_of(config: Mapping[str, Any]) -> list[Any]:
    found = config.get("architectures")
    return found if isinstance(found, list) else []


def match_or_none(checkpoint: Checkpoint, recipe: Recipe) -> Matched | None:
    """The rule of each tensor, or None where a recipe does not fit."""
    if match_names(checkpoint, recipe)[1]:  # at once: match would first look for the nearest rule of every name
        return None
    try:
        return match(checkpoint, recipe)
    except Refused:
        return None


def misfit(checkpoint: Checkpoint, recipes: Sequence[Recipe], name: str, unknown: Sequence[str]) -> str:
    """Why a recipe does not fit, in a few words; `#` is a number."""
    if unknown:
        return f"it does not know {listed(dict.fromkeys(split_name(name)[0] for name in unknown))}"
    try:
        match(checkpoint, next(recipe for recipe in recipes if recipe.name == name))
    except Refused as refused:
        return listed((f"{problem.subject}: {problem.found}" for problem in refused.problems), 3)
    return FITS


def no_recipe(checkpoint: Checkpoint, recipes: Sequence[Recipe], fitting: Sequence[Recipe]) -> Refused:
    """Names the recipe that knows most of the tensors, and what it does not know."""
    if fitting:
        names = listed(recipe.name for recipe in fitting)
        return refuse("no-recipe", str(checkpoint.folder), f"{names} all fit", "one recipe", "choose one with --recipe")
    unknown = {recipe.name: list(match_names(checkpoint, recipe)[1]) for recipe in recipes}
    nearest = min(unknown, key=lambda name: len(unknown[name]))
    model = (checkpoint.config or {}).get("model_type", "no model_type in a config.json")
    model = model if isinstance(model, str) else reprlib.repr(model)
    misfits = misfit(checkpoint, recipes, nearest, unknown[nearest])
    found = f"{model}; the nearest recipe is {nearest}: {misfits}"
    remedy = f"--recipe {nearest}, if it is that model under another name; or {OWN_RECIPE}"
    remedy = remedy if misfits == FITS else OWN_RECIPE
    return refuse("no-recipe", str(checkpoint.folder), found, f"one of {listed(unknown, 99)}", remedy)
