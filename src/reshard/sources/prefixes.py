"""Finds how the names of a checkpoint may have got a prefix, or lost one: the changes to try, the shortest first.

Trainers write other names than the published checkpoint has: `_orig_mod.` of torch.compile or `module.` of DDP in
front, `_fsdp_wrapped_module.` within, the text model of a larger one as `model.language_model.`, or no `model.` at all.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from reshard.formats.renaming import HEAD, Renaming, RenamingStep, is_storable, rename_all
from reshard.numbered_names import split_name
from reshard.recipe_types import Recipe
from reshard.recipes.patterns import make_patterns, split_names

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

MOST_RENAMED = 30_000
"""Names that all tries together may make: with many kinds of names there are fewer tries."""

MOST_KINDS, LONGEST_KINDS = 1_000, 200_000
"""A model has 100 kinds of names, numbers apart, of 5,000 characters. In files with more kinds, or with more characters
in them, no renaming is looked for: they are no model, but could keep us busy.
"""

MOST_FIRSTS = 5
"""Of the prefixes that only some names have, the most common ones are tried."""


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

    def knows_all(self, splits: Sequence[tuple[str, Sequence[str]]]) -> bool:
        """Whether it knows several names, and not all of them as a rest that a rule drops."""
        return self.has_one_of(splits) and all(self.knows(key, numbers) for key, numbers in splits)

    def has_one_of(self, splits: Sequence[tuple[str, Sequence[str]]]) -> bool:
        """Whether a rule is of one of several names, and not of any rest."""
        return any((key, len(numbers)) in self._exact for key, numbers in splits)


def list_names_by_kind(tensors: Collection[str]) -> Names:
    """Lists the first name of each kind, and how many there are of it."""
    found: dict[str, tuple[str, int]] = {}
    for name, (key, _) in zip(tensors, split_names(tensors), strict=True):
        first, number = found.get(key, (name, 0))
        found[key] = first, number + 1
    return Names(tuple(name for name, _ in found.values()), tuple(number for _, number in found.values()))


def is_known(names: Sequence[str], known: KnownNames) -> bool:
    """Whether a recipe may have a rule for every name."""
    return all(known.knows(key, numbers) for key, numbers in split_names(names))


def list_renamings(names: Sequence[str], *, of_some: bool = False) -> Iterator[tuple[Renaming, tuple[str, ...]]]:
    """Yields renamings, by the number of characters they change, and the names that they make. Each makes other names.

    With `of_some`, also those that a person should judge: of a prefix that only some names have.
    """
    waiting: list[tuple[int, int, int, Renaming]] = [(0, 0, 0, ())]
    seen: set[tuple[str, ...]] = set()
    for number in range(1, min(MOST_TRIED, MOST_RENAMED // len(names) + 2)):
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


def find_renaming_to(tensors: Collection[str], wanted: Collection[str]) -> Renaming:
    """Finds the shortest renaming after which all names are among the wanted ones, or all wanted ones among them. Empty
    if there is none, or if they are already.
    """
    names, others = list_names_by_kind(tensors), list_names_by_kind(wanted)
    if not (tensors and wanted and names.is_searched) or is_within(set(tensors), set(wanted)):
        return ()
    kinds = {split_name(name)[0] for name in others.examples}
    for renaming, examples in list_renamings(names.examples):
        if is_within({split_name(name)[0] for name in examples}, kinds):
            made = rename_all(tensors, renaming)
            if len(set(made)) == len(made) and is_within(set(made), set(wanted)):
                return renaming
    return ()


def find_partial_renaming_to(tensors: Collection[str], wanted: Collection[str]) -> tuple[Renaming, int]:
    """Finds the renaming of some names after which the most names are wanted ones, and how many more these are. It is
    for a person to judge. Empty and 0 if there is none that makes most of the names that it changes wanted ones.
    """
    names, others = list_names_by_kind(tensors), set(wanted)
    if not names.examples or not names.is_searched:
        return (), 0
    kinds = {split_name(name)[0] for name in others}
    best: Renaming = ()
    most = count_wanted(names.examples, names, kinds)
    for renaming, examples in list_renamings(names.examples, of_some=True):
        changed = [new for old, new in zip(names.examples, examples, strict=True) if old != new]
        is_likely = 2 * sum(split_name(name)[0] in kinds for name in changed) > len(changed)
        if is_likely and (fitting := count_wanted(examples, names, kinds)) > most:
            best, most = renaming, fitting
    more = len(others.intersection(rename_all(tensors, best))) - len(others.intersection(tensors))
    return (best, more) if more > 0 else ((), 0)


def count_wanted(examples: Sequence[str], names: Names, kinds: Collection[str]) -> int:
    """Counts the names whose kind is wanted; `examples` are those of `names`, renamed."""
    return sum(count for name, count in zip(examples, names.counts, strict=True) if split_name(name)[0] in kinds)


def is_within(a: set[str], b: set[str]) -> bool:
    """Whether one of two sets holds the other."""
    return a <= b or b <= a
