"""Explains names that no change of a prefix makes known: which names begin alike, and what that would change."""

from collections.abc import Sequence
from dataclasses import replace

from reshard.errors import Problem, Refused
from reshard.formats.renaming import Renaming, RenamingStep, format_part, format_renaming, rename_all, rename_tensors
from reshard.recipes.patterns import split_name
from reshard.sources.completeness import OTHER_MODEL
from reshard.sources.match import match
from reshard.sources.prefixes import KnownNames, Names, list_renamings
from reshard.text import format_count, format_list
from reshard.types import Checkpoint, Recipe


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
        expected = f"the same for all names; the recipe {recipe.name} knows all of them once that is changed"
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
    if {problem.kind for problem in refused.problems} - {"no-rule", "no-recipe"}:
        return refused  # something better is known
    if not all(name.startswith(first + ".") for name in names.examples) or any(first in one.firsts for one in known):
        return refused
    wanted = format_list(sorted({begin for one in known for begin in one.firsts}), 3)
    recipes = format_list((one.recipe.name for one in known), 3)
    found = f"all {format_count(names.total, 'names')} begin with `{first}.`"
    expected = f"names that begin with {wanted}, as the recipe {recipes} has them; without the prefix they do not fit"
    return Refused([Problem("prefix", str(checkpoint.folder), found, expected, OTHER_MODEL), *refused.problems])
