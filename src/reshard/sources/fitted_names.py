"""A checkpoint under the names of its recipe: renamed, if all names fit once a prefix is changed.

A change counts only if it leads every name to a rule of the recipe, and no two names to the same one. Nothing is looked
for in a checkpoint whose names fit as they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from reshard.errors import Refused
from reshard.formats.renaming import Renaming, format_renaming, rename_all, rename_tensors
from reshard.recipe_types import Recipe
from reshard.recipes.patterns import split_names
from reshard.sources.exempt_names import rename_exempt_modules
from reshard.sources.match import Matched, match, match_names, note_quantization
from reshard.sources.prefix_problems import explain_names
from reshard.sources.prefixes import KnownNames, Names, is_known, list_names_by_kind, list_renamings
from reshard.sources.recipe_choice import choose_recipe, find_asked_recipes, list_architectures
from reshard.types import Checkpoint, Note

RENAMED, UNSTACKED = "renamed", "unstacked"
"""The kinds of the notes that tell of a renaming, and of stacked experts that were taken apart."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A checkpoint under the names of its recipe."""

    checkpoint: Checkpoint
    recipe: Recipe
    matched: Matched
    renaming: Renaming


def match_or_rename(
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
        with explain_renaming(checkpoint):
            return note_and_fit(checkpoint, *choose(checkpoint), ())
    except Refused as refused:
        known = [KnownNames(recipe) for recipe in (recipes[:1] if is_asked else list_candidates(checkpoint, recipes))]
        names = list_names_by_kind(checkpoint.tensors)
        if not known or not names.is_searched or any(is_known(names.examples, one) for one in known):
            raise
        renaming = find_renaming(checkpoint, names, known)
        if not renaming:
            raise explain_names(checkpoint, names, known, refused) from None
    renamed = rename_checkpoint(checkpoint, renaming)
    with explain_renaming(renamed):
        return note_and_fit(renamed, *choose(renamed), renaming)


def note_and_fit(checkpoint: Checkpoint, recipe: Recipe, matched: Matched, renaming: Renaming) -> Fitted:
    """What fits, with a note on what its config says of quantization, if there is reason."""
    return Fitted(note_quantization(checkpoint, recipe, matched), recipe, matched, renaming)


def list_candidates(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> Sequence[Recipe]:
    """Lists the recipes for the config; all if it names no model; none if it names one that no recipe lists."""
    config = checkpoint.config or {}
    is_named = any(isinstance(name, str) for name in (config.get("model_type"), *list_architectures(config)))
    return find_asked_recipes(config, recipes) or (() if is_named else recipes)


def find_renaming(checkpoint: Checkpoint, names: Names, known: Sequence[KnownNames]) -> Renaming:
    """Finds the shortest renaming that leads every name to one rule of a recipe; empty if there is none."""
    for renaming, examples in list_renamings(names.examples):
        splits = split_names(examples)  # once for all recipes: it is what takes the time
        for one in known:
            if one.knows_all(splits) and is_fit(checkpoint, renaming, one.recipe):
                return renaming
    return ()


def is_fit(checkpoint: Checkpoint, renaming: Renaming, recipe: Recipe) -> bool:
    """Whether a renaming gives each tensor a name of its own, and leads it to one rule."""
    tensors = rename_tensors(checkpoint.tensors, renaming)
    if len(tensors) < len(checkpoint.tensors):
        return False
    return not match_names(replace(checkpoint, tensors=tensors), recipe)[1]


def rename_checkpoint(checkpoint: Checkpoint, renaming: Renaming) -> Checkpoint:
    """Renames the tensors of a checkpoint, and the modules that its config names, with a note that tells of it."""
    note = Note(RENAMED, format_renaming(checkpoint.tensors, renaming))
    return replace(
        checkpoint,
        tensors=rename_tensors(checkpoint.tensors, renaming),
        config=rename_exempt_modules(checkpoint.config, checkpoint.tensors, renaming),
        unnamed=dict(zip(rename_all(checkpoint.unnamed, renaming), checkpoint.unnamed.values(), strict=True)),
        notes=(*checkpoint.notes, note),
    )


@contextmanager
def explain_renaming(checkpoint: Checkpoint) -> Iterator[None]:
    """Adds to a refusal that the names were changed: its problems have names that no file has."""
    notes = [note.text for note in checkpoint.notes if note.kind in (RENAMED, UNSTACKED)]
    try:
        yield
    except Refused as refused:
        if not notes:
            raise
        first, *others = refused.problems
        found = f"{first.found} ({'; '.join(notes)})"
        raise Refused([replace(first, found=found), *others]) from None
