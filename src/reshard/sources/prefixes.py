"""Names that fit a recipe once a prefix is changed: finds the shortest such change, and tells of it.

Trainers write other names than the published checkpoint has: `_orig_mod.` of torch.compile or `module.` of DDP in
front, `_fsdp_wrapped_module.` within, the text model of a larger one as `model.language_model.`, or no `model.` at all.
A change counts only if it leads every name to a rule of the recipe, and no two names to the same one. Nothing is looked
for in a checkpoint whose names fit as they are.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import NamedTuple

from reshard.errors import Problem, Refused
from reshard.formats.renaming import (
    HEAD,
    Renaming,
    RenamingStep,
    format_part,
    format_renaming,
    is_storable,
    rename_all,
    rename_tensors,
)
from reshard.recipes.patterns import make_patterns, split_name, split_names
from reshard.sources.completeness import OTHER_MODEL
from reshard.sources.match import Matched, choose_recipe, find_asked_recipes, list_architectures, match, match_names
from reshard.text import format_count, format_list
from reshard.types import Checkpoint, Note, Recipe

RENAMED = "renamed"
"""The kind of the note that tells of a renaming."""

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")
"""What torch.compile, FSDP, activation checkpointing and DDP add, to the whole model or to each wrapped module."""

REPLACEMENTS = {
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "model.model.": "model.",
    "language_model.": "",
    "text_model.": "",
}
"""Prefixes of the text model within a larger one; `lm_head` may stand beside it."""

BODY = "model."
"""The prefix that embedding models leave out."""

MOST_TRIED = 300
"""Renamings tried; a chain of four prefixes needs about fifty."""

MOST_KINDS, LONGEST_KINDS = 1_000, 200_000
"""A model has 100 kinds of names, numbers apart, of 5,000 characters. In files with more kinds, or with more characters
in them, no renaming is looked for: they are no model, but could keep us busy.
"""

MOST_FIRSTS = 5
"""Of the prefixes that only some names have, the most common ones are tried."""

Choose = Callable[[Checkpoint], tuple[Recipe, Matched]]
"""Chooses the recipe of a checkpoint and matches its tensors; raises Refused."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A checkpoint under the names of its recipe."""

    checkpoint: Checkpoint
    recipe: Recipe
    matched: Matched
    renaming: Renaming


class Names(NamedTuple):
    """The names of a checkpoint, one of each kind: those of a kind differ in their numbers only."""

    examples: tuple[str, ...]
    counts: tuple[int, ...]
    """How many names each example stands for."""

    @property
    def is_searched(self) -> bool:
        """Whether they are few enough to look for a renaming."""
        return len(self.examples) <= MOST_KINDS and sum(map(len, self.examples)) <= LONGEST_KINDS

    @property
    def total(self) -> int:
        """The number of all names."""
        return sum(self.counts)


class KnownNames:
    """The kinds of names that a recipe has a rule for."""

    def __init__(self, recipe: Recipe) -> None:
        patterns = [made for number, rule in enumerate(recipe.rules) for made in make_patterns(number, rule, recipe)]
        self.recipe = recipe
        self._exact = {(one.key, len(one.slots)) for one in patterns if not one.takes_rest}
        self._rest = [(one.key, len(one.slots)) for one in patterns if one.takes_rest]
        self.firsts = {key.partition(".")[0] for key, _ in (*self._exact, *self._rest)}

    def knows(self, key: str, numbers: Sequence[str]) -> bool:
        """Whether a rule may have a name, as `split_name` gives it; whether the numbers suit it too, `match` tells."""
        if (key, len(numbers)) in self._exact:
            return True
        return any(key.startswith(begin) and len(numbers) >= slots for begin, slots in self._rest)


def fit_names(
    checkpoint: Checkpoint, recipes: Sequence[Recipe], *, is_asked: bool, keep_optional: bool = False
) -> Fitted:
    """Chooses the recipe of a checkpoint and matches its tensors; renames them first if they fit in no other way.

    With `is_asked`, the first recipe was asked for. Raises Refused as `match` and `choose_recipe` do; if a renaming
    makes all names known, with the problems under the new names.
    """

    def choose(named: Checkpoint) -> tuple[Recipe, Matched]:
        if is_asked:
            return recipes[0], match(named, recipes[0], keep_optional=keep_optional)
        return choose_recipe(named, recipes, keep_optional=keep_optional)

    try:
        return Fitted(checkpoint, *choose(checkpoint), ())
    except Refused as refused:
        known = [KnownNames(recipe) for recipe in (recipes[:1] if is_asked else list_candidates(checkpoint, recipes))]
        names = list_names_by_kind(checkpoint.tensors)
        if not known or not names.is_searched or any(is_known(names.examples, one) for one in known):
            raise
        renaming = find_renaming(checkpoint, names, known)
        if not renaming:
            raise explain_names(checkpoint, names, known, refused, choose) from None
    renamed = rename_checkpoint(checkpoint, renaming)
    with explain_renaming(renamed):
        return Fitted(renamed, *choose(renamed), renaming)


def list_candidates(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> Sequence[Recipe]:
    """Lists the recipes for the config; all if it names no model; none if it names one that no recipe lists."""
    config = checkpoint.config or {}
    is_named = any(isinstance(name, str) for name in (config.get("model_type"), *list_architectures(config)))
    return find_asked_recipes(config, recipes) or (() if is_named else recipes)


def list_names_by_kind(tensors: Mapping[str, object]) -> Names:
    """Lists the first name of each kind, and how many there are of it."""
    found: dict[str, tuple[str, int]] = {}
    for name, (key, _) in zip(tensors, split_names(tensors), strict=True):
        first, number = found.get(key, (name, 0))
        found[key] = first, number + 1
    return Names(tuple(name for name, _ in found.values()), tuple(number for _, number in found.values()))


def is_known(names: Sequence[str], known: KnownNames) -> bool:
    """Whether a recipe may have a rule for every name."""
    return all(known.knows(*split_name(name)) for name in names)


def find_renaming(checkpoint: Checkpoint, names: Names, known: Sequence[KnownNames]) -> Renaming:
    """Finds the shortest renaming that leads every name to one rule of a recipe; empty if there is none."""
    for renaming, examples in list_renamings(names.examples):
        splits = [split_name(name) for name in examples]
        for one in known:
            if all(one.knows(*split) for split in splits) and is_complete(checkpoint, renaming, one.recipe):
                return renaming
    return ()


def is_complete(checkpoint: Checkpoint, renaming: Renaming, recipe: Recipe) -> bool:
    """Whether a renaming gives each tensor a name of its own, and leads it to one rule."""
    tensors = rename_tensors(checkpoint.tensors, renaming)
    if len(tensors) < len(checkpoint.tensors):
        return False
    return not match_names(replace(checkpoint, tensors=tensors), recipe)[1]


def list_renamings(names: Sequence[str], *, of_some: bool = False) -> Iterator[tuple[Renaming, tuple[str, ...]]]:
    """Yields renamings, by the number of characters they change, and the names that they make. Each makes other names.

    With `of_some`, also those that a person should judge: of a prefix that only some names have.
    """
    waiting: list[tuple[int, int, int, Renaming]] = [(0, 0, 0, ())]
    seen: set[tuple[str, ...]] = set()
    for number in range(1, MOST_TRIED):
        if not waiting:
            return
        cost, _, _, renaming = heappop(waiting)
        found = tuple(rename_all(names, renaming))
        if found in seen:
            continue
        seen.add(found)
        if renaming and is_storable(joined := join_steps(renaming, names)):
            yield joined, found
        for place, step in enumerate(list_steps(found, of_some=of_some)):
            # Taking off in front comes first: it is told in fewer words.
            change = abs(len(step.old) - len(step.new)) + step.inside
            heappush(waiting, (cost + change, number, place, (*renaming, step)))


def list_steps(names: Sequence[str], *, of_some: bool) -> Iterator[RenamingStep]:
    """Lists what may be changed of these names next. A prefix must be common to all names, `lm_head` apart: where only
    some have it, two models may lie in one folder.
    """
    first = names[0].partition(".")[0] + "."
    if all(name.startswith(first) for name in names):
        yield RenamingStep(first)
    for old in WRAPPERS:
        if any("." + old in name for name in names) and not any(name.startswith(old) for name in names):
            yield RenamingStep(old, inside=True)
    for old, new in REPLACEMENTS.items():
        others = [name for name in names if not name.startswith(old)]
        if len(others) < len(names) and (of_some or all(name.startswith(HEAD) for name in others)):
            yield RenamingStep(old, new)
    others = [name for name in names if not name.startswith((BODY, HEAD))]
    if others and (of_some or not any(name.startswith(BODY) for name in names)):
        yield RenamingStep("", BODY)
    if of_some:
        yield from (RenamingStep(first) for first in list_first_components(names))


def list_first_components(names: Sequence[str]) -> list[str]:
    """Lists the most common first components of names, each with its dot; those of body and head are none."""
    firsts = Counter(name.partition(".")[0] + "." for name in names)
    return [first for first, _ in firsts.most_common(MOST_FIRSTS + 2) if first not in (BODY, HEAD)]


def join_steps(renaming: Renaming, names: Sequence[str]) -> Renaming:
    """Joins steps that take one prefix after the other off all names."""
    joined: list[RenamingStep] = []
    was_common = False
    for step in renaming:
        is_common = (
            bool(step.old) and not (step.new or step.inside) and all(name.startswith(step.old) for name in names)
        )
        if was_common and is_common:
            joined[-1] = RenamingStep(joined[-1].old + step.old)
        else:
            joined.append(step)
        names, was_common = [step.rename(name) for name in names], is_common
    return tuple(joined)


def rename_checkpoint(checkpoint: Checkpoint, renaming: Renaming) -> Checkpoint:
    """Renames the tensors of a checkpoint, with a note that tells of it."""
    note = Note(RENAMED, format_renaming(checkpoint.tensors, renaming))
    return replace(checkpoint, tensors=rename_tensors(checkpoint.tensors, renaming), notes=(*checkpoint.notes, note))


@contextmanager
def explain_renaming(checkpoint: Checkpoint) -> Iterator[None]:
    """Adds to a refusal that the names were changed: its problems have names that no file has."""
    notes = [note.text for note in checkpoint.notes if note.kind == RENAMED]
    try:
        yield
    except Refused as refused:
        if not notes:
            raise
        first, *others = refused.problems
        found = f"{first.found} ({'; '.join(notes)})"
        raise Refused([replace(first, found=found), *others]) from None


def explain_names(
    checkpoint: Checkpoint, names: Names, known: Sequence[KnownNames], refused: Refused, choose: Choose
) -> Refused:
    """Explains names that no renaming makes known: a prefix that only some have, or one beside unknown names."""
    found = find_nearest_renaming(names, known)
    if found is None:
        return explain_common_prefix(checkpoint, names, known, refused)
    renaming, recipe, fitting = found
    problem = make_prefix_problem(checkpoint, names, renaming, recipe, fitting)
    tensors = rename_tensors(checkpoint.tensors, renaming)
    if fitting == names.total or len(tensors) < len(checkpoint.tensors):
        return Refused([problem])
    try:
        choose(replace(checkpoint, tensors=tensors))
    except Refused as rest:
        return Refused([problem, *rest.problems])
    return Refused([problem])


def find_nearest_renaming(names: Names, known: Sequence[KnownNames]) -> tuple[Renaming, Recipe, int] | None:
    """Finds the renaming that makes the most names known, of equal ones the shortest, with its recipe and that number.
    None if no renaming makes more known than are known already.
    """
    best, most = None, max(count_known(names.examples, names, one) for one in known)
    for renaming, examples in list_renamings(names.examples, of_some=True):
        for one in known:
            if (fitting := count_known(examples, names, one)) > most:
                best, most = (renaming, one.recipe, fitting), fitting
        if most == names.total:
            break
    return best


def count_known(examples: Sequence[str], names: Names, known: KnownNames) -> int:
    """Counts the names that a recipe may have a rule for; `examples` are those of `names`, renamed."""
    pairs = zip(examples, names.counts, strict=True)
    return sum(number for name, number in pairs if known.knows(*split_name(name)))


def make_prefix_problem(
    checkpoint: Checkpoint, names: Names, renaming: Renaming, recipe: Recipe, fitting: int
) -> Problem:
    """Makes the problem of a prefix whose change makes more names known, but not all, or not without a doubt."""
    step = renaming[0]
    found = describe_prefix(checkpoint, step)
    made = set(rename_all(checkpoint.tensors, renaming))
    if twice := len(checkpoint.tensors) - len(made):
        expected = f"one model; {format_count(twice, 'names')} would be there twice without that prefix"
        remedy = "save the tensors of one model into a folder of their own, and convert that"
    elif fitting == names.total:
        expected = f"the same for all names; the recipe {recipe.name} knows all of them without that prefix"
        remedy = "are these files of two saves? take those of one, or save the tensors again under one kind of names"
    else:
        change = format_renaming(checkpoint.tensors, renaming)
        expected = f"the recipe {recipe.name} would know {fitting:,} of {names.total:,} names ({change})"
        remedy = "see the other problems: they are of the names that are left"
    return Problem("prefix", str(checkpoint.folder), found, expected, remedy)


def describe_prefix(checkpoint: Checkpoint, step: RenamingStep) -> str:
    """Describes what a step would change: `291 of 300 names begin with ...`."""
    changed = sum(step.rename(name) != name for name in checkpoint.tensors)
    part = format_part(changed, len(checkpoint.tensors))
    if step.inside:
        return f"{part} have `{step.old}` within"
    return f"{part} begin with `{step.old}`" if step.old else f"{part} begin without `{step.new}`"


def explain_common_prefix(
    checkpoint: Checkpoint, names: Names, known: Sequence[KnownNames], refused: Refused
) -> Refused:
    """Adds to a refusal that all names begin with what no rule begins with; else it stays."""
    first = names.examples[0].partition(".")[0]
    if not all(name.startswith(first + ".") for name in names.examples) or any(first in one.firsts for one in known):
        return refused
    wanted = format_list(sorted({begin for one in known for begin in one.firsts}), 3)
    recipes = format_list((one.recipe.name for one in known), 3)
    found = f"all {format_count(names.total, 'names')} begin with `{first}.`"
    expected = f"names that begin with {wanted}, as the recipe {recipes} has them; without the prefix they do not fit"
    return Refused([Problem("prefix", str(checkpoint.folder), found, expected, OTHER_MODEL), *refused.problems])
