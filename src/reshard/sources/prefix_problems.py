"""Explains names that no change of a prefix makes known: which names begin alike, and what that would change."""

from collections.abc import Sequence
from dataclasses import replace

from reshard.errors import Problem, Refused
from reshard.formats.renaming import (
    HEAD,
    Renaming,
    RenamingStep,
    format_part,
    format_renaming,
    rename_all,
    rename_tensors,
)
from reshard.recipe_types import Recipe
from reshard.recipes.patterns import split_names
from reshard.sources.match import match
from reshard.sources.picked_members import OTHER_MODEL
from reshard.sources.prefixes import KnownNames, Names, list_renamings
from reshard.text import format_count, format_list
from reshard.types import Checkpoint

SplitName = tuple[str, tuple[str, ...]]
"""As `split_names` gives them."""

FEW_FILES = 3
"""So many files are named; more are no help."""


def explain_names(checkpoint: Checkpoint, names: Names, known: Sequence[KnownNames], refused: Refused) -> Refused:
    """Explains names that no renaming makes known: a prefix that only some have, or one beside unknown names. `refused`
    is the refusal of the names as they are.
    """
    found = find_nearest_renaming(names, known)
    if found is None:
        return explain_common_prefix(checkpoint, names, known, refused)
    renaming, recipe, fitting = found
    problem = make_prefix_problem(checkpoint, names, renaming, recipe, fitting)
    tensors = rename_tensors(checkpoint.tensors, renaming)
    if fitting == names.total or len(tensors) < len(checkpoint.tensors):
        return Refused([problem])
    try:
        match(replace(checkpoint, tensors=tensors), recipe)
    except Refused as rest:
        return Refused([problem, *rest.problems])
    return Refused([problem])


def find_nearest_renaming(names: Names, known: Sequence[KnownNames]) -> tuple[Renaming, Recipe, int] | None:
    """Finds the renaming that makes the most names known, of equal ones the shortest, with its recipe and that number.
    None if no renaming makes more known than are known already, and most of the names that it changes.
    """
    splits = split_names(names.examples)
    best, most = None, max(count_known(splits, names, one) for one in known)
    for renaming, examples in list_renamings(names.examples, of_some=True):
        splits = split_names(examples)  # once for all recipes: it is what takes the time
        for one in known:
            if (fitting := count_known(splits, names, one)) > most and has_most_known(examples, splits, names, one):
                best, most = (renaming, one.recipe, fitting), fitting
        if most == names.total:
            break
    return best


def count_known(splits: Sequence[SplitName], names: Names, known: KnownNames) -> int:
    """Counts the names that a recipe may have a rule for; none, if it only drops them, whatever they are. `splits` are
    the examples of `names`, renamed and split.
    """
    pairs = zip(splits, names.counts, strict=True) if known.has_one_of(splits) else ()
    return sum(number for split, number in pairs if known.knows(*split))


def has_most_known(examples: Sequence[str], splits: Sequence[SplitName], names: Names, known: KnownNames) -> bool:
    """Whether most names that a renaming changes become known. A prefix that makes a few names fit by chance tells
    nothing.
    """
    changed = [place for place, name in enumerate(examples) if name != names.examples[place]]
    fitting = sum(names.counts[place] for place in changed if known.knows(*splits[place]))
    return fitting * 2 > sum(names.counts[place] for place in changed)


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
    elif fitting == names.total and is_only_head_without(checkpoint, step):
        change = format_renaming(checkpoint.tensors, renaming)
        expected = f"names as the recipe {recipe.name} has them; it would know all of them so: {change}"
        remedy = "if it is that model: give the tensors these names, with load_file and save_file of safetensors.torch"
    elif fitting == names.total:
        expected = f"the same for all names; the recipe {recipe.name} knows all of them once that is changed"
        remedy = "are these files of two saves? take those of one, or save the tensors again under one kind of names"
    else:
        change = format_renaming(checkpoint.tensors, renaming)
        expected = f"the recipe {recipe.name} would know {fitting:,} of {names.total:,} names ({change})"
        remedy = "see the other problems: they are of the names that are left"
    return Problem("prefix", str(checkpoint.folder), found, expected, remedy)


def describe_prefix(checkpoint: Checkpoint, step: RenamingStep) -> str:
    """Describes what a step would change, and in which files: `291 of 300 names begin with ...`."""
    changed = [name for name in checkpoint.tensors if step.rename(name) != name]
    part = format_part(len(changed), len(checkpoint.tensors))
    place = describe_places(checkpoint, changed)
    if is_only_head_without(checkpoint, step):
        part, place = f"{format_part(len(changed), len(changed))} but those of {HEAD[:-1]}", ""
    if step.inside:
        return f"{part} have `{step.old}` within{place}"
    return f"{part} begin {f'with `{step.old}`' if step.old else f'without `{step.new}`'}{place}"


def is_only_head_without(checkpoint: Checkpoint, step: RenamingStep) -> bool:
    """Whether a prefix is in front of all names but those of the head: it stands beside the rest in every model."""
    others = [name for name in checkpoint.tensors if not name.startswith(step.old)]
    return bool(step.old and others) and not step.inside and all(name.startswith(HEAD) for name in others)


def describe_places(checkpoint: Checkpoint, changed: Sequence[str]) -> str:
    """Describes in which files the changed names are, or else the others; empty if they are in many, or in all."""
    everywhere = {tensor.file for tensor in checkpoint.tensors.values()}
    chosen = set(changed)
    for words, names in (("all", chosen), ("the others all", checkpoint.tensors.keys() - chosen)):
        files = {checkpoint.tensors[name].file for name in names}
        if 0 < len(files) <= FEW_FILES and files < everywhere:
            return f", {words} in {format_list(checkpoint.files[file].name for file in sorted(files))}"
    return ""


def explain_common_prefix(
    checkpoint: Checkpoint, names: Names, known: Sequence[KnownNames], refused: Refused
) -> Refused:
    """Adds to a refusal that all names begin with what no rule begins with; else it stays."""
    first = names.examples[0].partition(".")[0]
    if {problem.kind for problem in refused.problems} - {"no-rule", "no-recipe"}:
        return refused  # something better is known
    if not all(name.startswith(first + ".") for name in names.examples) or any(first in one.firsts for one in known):
        return refused
    wanted = format_list(sorted({begin for one in known for begin in one.firsts}), 3)
    recipes = format_list((one.recipe.name for one in known), 3)
    found = f"all {format_count(names.total, 'names')} begin with `{first}.`"
    expected = f"names that begin with {wanted}, as the recipe {recipes} has them; without the prefix they do not fit"
    return Refused([Problem("prefix", str(checkpoint.folder), found, expected, OTHER_MODEL), *refused.problems])
