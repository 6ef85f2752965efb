"""Stage 2: Checkpoint + Recipe -> Matched. Finds the rule of each tensor; refuses missing tensors. Opens no file."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from reshard.errors import MOST_PROBLEMS, Problem, require_none
from reshard.numbered_names import split_name
from reshard.recipe_types import Recipe
from reshard.recipes.alternatives import get_answer, list_rules
from reshard.recipes.fusions import FUSED
from reshard.recipes.patterns import (
    Pattern,
    find_later_members,
    find_scale_placeholder,
    group_names_by_key,
    make_patterns,
)
from reshard.recipes.recipe import FAMILIES_FOLDER
from reshard.sources.completeness import check_missing, check_placeholders, collect_members
from reshard.sources.problem_order import sort_by_layer, sort_problems
from reshard.sources.quantization_config import PROMISE_KEY, Stale, check_promise, find_stale, note_promise
from reshard.sources.quantized import check_codes, explain_unknown
from reshard.types import Checkpoint, Tensor

OWN_RECIPE = "write a recipe of your own (docs/recipes.md) and pass it with --recipe FILE"

NEAREST_FOR = 50
"""Number of unknown name patterns for which the nearest rule is searched: the search is slow, and nobody reads more."""

LONGEST_COMPARED = 500
"""In characters. Only the beginning of a name is compared with the rules: a hostile name may have a million."""


class Family(NamedTuple):
    """The tensors of one pattern of a recipe, in lists of equal length. A model has 100,000 tensors in 50 families."""

    rule: int
    """Index into the rules of the recipe."""
    is_scale: bool
    """Whether the tensors are block scales."""
    tensors: list[Tensor]
    numbers: list[tuple[str, ...]]
    """For each tensor: the numbers that fill the placeholders of the rule's left name, in their order."""
    names: list[str]
    """For each tensor: its name on the other side of the recipe; empty if it is dropped there."""


@dataclass(frozen=True, slots=True)
class Matched:
    """A checkpoint whose every tensor is covered by exactly one rule of a recipe."""

    families: tuple[Family, ...]
    members: Mapping[str, set[int]]
    """The numbers that fill each placeholder: `{"i": {0, 1, 2}, "e": {0, 1}}`."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of members of each placeholder: `{"i": 61, "e": 256}`."""
        return {name: len(numbers) for name, numbers in self.members.items()}

    @property
    def present(self) -> dict[int, set[tuple[str, ...]]]:
        """For each rule, by its index: the numbers of every tensor in the checkpoint, block scales excluded."""
        return {family.rule: set(family.numbers) for family in self.families if not family.is_scale}


def match(checkpoint: Checkpoint, recipe: Recipe, *, keep_optional: bool = False) -> Matched:
    """Finds the one rule of each tensor. Optional tensors (MTP layers) must be complete only if they are kept.

    Raises Refused with every tensor that no rule or more than one rule covers; else with every gap in a numbered family
    and every contradiction with the config; else with every tensor that a rule expects and the checkpoint lacks.
    """
    families, unmatched = match_names(checkpoint, recipe)
    matched = Matched(tuple(families), find_members(families, recipe))
    require_none(check_match(checkpoint, recipe, matched, unmatched, keep_optional=keep_optional))
    return matched


def check_match(
    checkpoint: Checkpoint,
    recipe: Recipe,
    matched: Matched,
    unmatched: Mapping[str, Sequence[Pattern]],
    *,
    keep_optional: bool,
) -> Iterator[Problem]:
    """Reports the problems of the first check that fails: problems of later checks would only follow from them."""
    families, members = matched.families, matched.members
    checks: tuple[Callable[[], Iterator[Problem]], ...] = (
        lambda: check_names(checkpoint, recipe, unmatched),
        lambda: check_clashes(families, recipe),
        lambda: check_quantization(checkpoint, recipe, families),
        lambda: check_placeholders(checkpoint, recipe, members),
        lambda: check_missing(checkpoint.config, recipe, members, matched.present, keep_optional=keep_optional),
    )
    for check in checks:
        found = list(islice(check(), MOST_PROBLEMS))
        if found:
            # Unmatched names are sorted already, with one of each pattern first.
            yield from found if check is checks[0] else sort_problems(found)
            return


def check_quantization(checkpoint: Checkpoint, recipe: Recipe, families: Sequence[Family]) -> Iterator[Problem]:
    """Reports a config that promises quantized weights where all are plain, or none where there are some; and quantized
    weights without scales.
    """
    yield from check_promise(find_stale_config(checkpoint, recipe, families))
    yield from check_unpromised(checkpoint, recipe, families)
    rules = [(recipe.rules[family.rule], family.tensors) for family in families]
    floats = (tensors for rule, tensors in rules if rule.shape.startswith("["))
    matrices = [tensor for tensor in chain.from_iterable(floats) if len(tensor.shape) > 1]
    yield from check_codes(checkpoint, recipe, matrices)


def check_unpromised(checkpoint: Checkpoint, recipe: Recipe, families: Sequence[Family]) -> Iterator[Problem]:
    """Reports tensors that a model has only if it is quantized, beside a config that does not say so: a loader would
    build the other model. Of other keys than this one, which is there or the model is plain, the tensors may decide.
    """
    names = [family.tensors[0].name for family in families if recipe.rules[family.rule].only == f"if {PROMISE_KEY}"]
    if names and checkpoint.config and not get_answer(PROMISE_KEY, checkpoint.config):
        expected = f"one, for quantized weights such as {names[0]}"
        remedy = "is config.json another model's? or was the key taken out? take the config.json of these weights"
        yield Problem("contradiction", "config.json", f"no {PROMISE_KEY}", expected, remedy)


def find_stale_config(checkpoint: Checkpoint, recipe: Recipe, families: Sequence[Family]) -> Stale | None:
    """Finds a config that promises quantized weights where all are plain."""
    has_scales = any(family.is_scale for family in families)
    rules = [(recipe.rules[family.rule], family.tensors) for family in families]
    known = [(rule, tensors) for rule, tensors in rules if rule.relation in ("same", *FUSED)]
    scaled = [tensors for rule, tensors in known if find_scale_placeholder(rule, recipe)]
    return find_stale(checkpoint, recipe, list(chain.from_iterable(scaled)), has_scales=has_scales)


def note_quantization(checkpoint: Checkpoint, recipe: Recipe, matched: Matched) -> Checkpoint:
    """The checkpoint, with a note if its config may promise quantized weights where all are plain."""
    found = [*note_promise(find_stale_config(checkpoint, recipe, matched.families))]
    return replace(checkpoint, notes=(*checkpoint.notes, *found)) if found else checkpoint


def check_names(
    checkpoint: Checkpoint, recipe: Recipe, unmatched: Mapping[str, Sequence[Pattern]]
) -> Iterator[Problem]:
    """Reports the tensors without exactly one rule: all as one problem, if they are of a quantized format or fused
    experts; else each.
    """
    unknown = [checkpoint.tensors[name] for name, patterns in unmatched.items() if not patterns]
    if problem := explain_unknown(checkpoint, recipe, unknown):
        yield problem
    else:
        yield from explain_unmatched(checkpoint, recipe, unmatched)


def find_members(families: Iterable[Family], recipe: Recipe) -> dict[str, set[int]]:
    """Collects the numbers that fill each placeholder of the recipe."""
    return collect_members(recipe, {family.rule: set(family.numbers) for family in families if not family.is_scale})


def check_optional(checkpoint: Checkpoint, recipe: Recipe, matched: Matched) -> Iterator[Problem]:
    """Reports the optional tensors that a checkpoint lacks, for a layout that keeps them. `match` checks the rest."""
    if any(rule.optional for rule in recipe.rules):
        yield from check_missing(checkpoint.config, recipe, matched.members, matched.present, keep_optional=True)


def match_names(checkpoint: Checkpoint, recipe: Recipe) -> tuple[list[Family], dict[str, list[Pattern]]]:
    """Groups the tensors into families. Also returns the tensors with no rule or several: name -> fitting patterns."""
    rules = list_rules(recipe, checkpoint.config)
    patterns = [pattern for number, rule in rules for pattern in make_patterns(number, rule, recipe)]
    groups, all_tensors = group_names_by_key(checkpoint.tensors), list(checkpoint.tensors.values())
    names = ((key, numbers) for key, group in groups.items() for numbers in group.numbers)
    marked, before = find_later_members(names, recipe)
    families: dict[Pattern, Family] = {}
    unmatched: dict[str, list[Pattern]] = {}
    for key, (places, members) in groups.items():
        tensors = [all_tensors[place] for place in places]
        fitting = [pattern for pattern in patterns if pattern.fits(key, members[0])]
        for found, chosen in decide_patterns(fitting, members, marked, before):
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


def decide_patterns(
    fitting: Sequence[Pattern],
    members: Sequence[tuple[str, ...]],
    marked: Mapping[str, set[str]],
    before: Mapping[str, str],
) -> Iterator[tuple[list[Pattern], Sequence[int]]]:
    """Decides which patterns accept the names of one key; yields the patterns and the indices of their names.

    A pattern with `{*}` counts only where no other pattern fits. Mostly the layer number alone decides, so each
    decision is made once for a layer, not for each expert.
    """
    checked = max((pattern.checked({*marked, *before}) for pattern in fitting), default=0)
    places: dict[tuple[str, ...], list[int]] = {}
    for place, numbers in enumerate(members):
        places.setdefault(numbers[:checked], []).append(place)
    for numbers, chosen in places.items():
        found = [pattern for pattern in fitting if pattern.accepts(numbers, marked, before)]
        yield [pattern for pattern in found if not pattern.takes_rest] or found, chosen


def check_clashes(families: Sequence[Family], recipe: Recipe) -> Iterator[Problem]:
    """Reports tensors that would get the same name on the other side, unless they are fused there. Dropped tensors have
    no name there.
    """
    named = [family for family in families if family.names and family.names[0]]
    # The parts of a fused tensor have one name, and are counted once.
    fused: dict[tuple[str, bool], set[str]] = {}
    for family in named:
        if recipe.rules[family.rule].relation in FUSED:
            fused.setdefault((recipe.rules[family.rule].right, family.is_scale), set()).update(family.names)
    others = [family for family in named if recipe.rules[family.rule].relation not in FUSED]
    count = sum(len(family.names) for family in others) + sum(map(len, fused.values()))
    if len({name for family in named for name in family.names}) == count:
        return
    first: dict[str, tuple[str, tuple[str, bool]]] = {}
    for family in named:
        rule = recipe.rules[family.rule]
        for name, tensor in zip(family.names, family.tensors, strict=True):
            owner = rule.right if rule.relation in FUSED else tensor.name, family.is_scale
            other, first_owner = first.setdefault(name, (tensor.name, owner))
            if first_owner != owner:
                found = f"the name of {other} too"
                yield Problem("same-name", f"{tensor.name} -> {name}", found, "a name for each", "mend the recipe")


def explain_unmatched(
    checkpoint: Checkpoint, recipe: Recipe, unmatched: Mapping[str, Sequence[Pattern]]
) -> Iterator[Problem]:
    """Reports each tensor that no rule or more than one rule covers, with the rules or the nearest one."""
    lefts = [rule.left for rule in recipe.rules]
    nearest: dict[str, str] = {}
    suggestion = suggest_rule(recipe, "a row or a drop")
    names = list(unmatched)
    for name in map(names.__getitem__, sort_by_layer(names)):
        patterns = unmatched[name]
        if patterns:
            found = " and ".join(repr(recipe.rules[pattern.rule].left) for pattern in patterns)
            yield Problem("two-rules", name, found, "one rule", f"correct the recipe {recipe.origin}")
            continue
        key = split_name(name)[0]
        if key not in nearest and len(nearest) < NEAREST_FOR:
            nearest[key] = next(iter(get_close_matches(name[:LONGEST_COMPARED], lefts, 1, 0.0)), "none")
        expected = f"a rule of {recipe.name}; the nearest is {nearest.get(key, lefts[0])!r}"
        found, remedy = find_place(checkpoint, name), suggest_drop(recipe, name) or suggestion
        if found in checkpoint.may_be_extra:
            remedy = f"if {found} is not part of the checkpoint: --ignore-extra-files leaves it out; else {remedy}"
        found = f"in {found}; no rule knows it" if found else "no rule knows it"
        yield Problem("no-rule", name, found, expected, remedy)


def find_place(checkpoint: Checkpoint, name: str) -> str:
    """Finds the file of a tensor; empty if it is assembled from several."""
    place = checkpoint.tensors[name].file
    return checkpoint.files[place].name if place < len(checkpoint.files) else ""


def suggest_drop(recipe: Recipe, name: str) -> str:
    """Suggests how to leave out a tensor of a module that no rule of a packaged recipe names; else empty."""
    module, dot, _ = name.partition(".")
    is_known = any(rule.left.partition(".")[0] == module for rule in recipe.rules)
    if is_known or not re.fullmatch(r"[A-Za-z]\w*", module) or Path(recipe.origin).parent != FAMILIES_FOLDER:
        return ""
    row = f'["drop", "{module}{".{*}" if dot else ""}", "", "not used"],'
    copy = f"reshard recipes show {recipe.name} > my.toml"
    return f"to leave it out: {copy}; add to the rows of my.toml {row} and pass it with --recipe FILE"


def suggest_rule(recipe: Recipe, row: str) -> str:
    """Suggests how to get the missing rule: add a row to the user's own recipe; else use another recipe."""
    if Path(recipe.origin).parent != FAMILIES_FOLDER:
        return f"add {row} to {recipe.origin}"
    return f"another --recipe, or {OWN_RECIPE}"
