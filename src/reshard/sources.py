"""Sources: a path -> Checkpoint, Recipe and Origin, whichever layout lies there. Reads headers and the manifest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reshard.choose import choose_recipe
from reshard.errors import Refused, listed, refuse
from reshard.gather import gather
from reshard.manifest import read_manifest
from reshard.match import match
from reshard.names import ranks_of
from reshard.origin import Origin, read_origin
from reshard.read import file_names, read_checkpoint, read_config, read_headers
from reshard.recipe import load_recipe, packaged_recipes
from reshard.types import Checkpoint, Recipe


@dataclass(frozen=True, slots=True)
class Source:
    """What there is to be converted."""

    checkpoint: Checkpoint
    recipe: Recipe
    origin: Origin
    """What is known of the checkpoint that it was once; nothing, if it is that itself."""


def read_source(
    path: Path, recipe: str | None = None, *, ignore_extra_files: bool = False, first_replica: bool = False
) -> Source:
    """A checkpoint, or rank files as one; with the recipe of that name or file, else the one that it wants.

    Raises Refused.
    """
    recipes = [load_recipe(recipe)] if recipe else packaged_recipes()
    if candidates := rank_recipes(path, recipes):
        return read_rank_files(path, candidates, first_replica=first_replica)
    checkpoint = read_checkpoint(path, ignore_extra_files=ignore_extra_files)
    return Source(checkpoint, recipes[0] if recipe else choose_recipe(checkpoint, recipes), Origin())


def rank_recipes(path: Path, recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes whose rank files these could be, by the names of the files; none if the path is something else."""
    names = file_names(path) if path.is_dir() else []
    return [recipe for recipe in recipes if ranks_of(names, recipe)]


def read_rank_files(path: Path, recipes: Sequence[Recipe], *, first_replica: bool) -> Source:
    """Rank files as one checkpoint, by the recipe that the manifest names, else by the model's type, or by the one that
    fits their tensors.
    """
    ranks = ranks_of(file_names(path), recipes[0])
    stored = read_headers(path, [recipes[0].files.format(rank=rank, ranks=ranks) for rank in range(ranks)])
    origin = read_origin(read_manifest(path))
    if origin.config is None:
        origin = replace(origin, config=read_config(path))
    found, refusals = [], []
    named = [recipe for recipe in recipes if recipe.name == origin.recipe]
    of_type = [recipe for recipe in recipes if (origin.config or {}).get("model_type") in recipe.model_types]
    for recipe in named or of_type or recipes:
        try:
            checkpoint = gather(stored, recipe, origin, first_replica=first_replica)
            match(checkpoint, recipe)
        except Refused as refused:
            refusals.append(refused)
        else:
            found.append(Source(checkpoint, recipe, origin))
    if not found:
        raise min(refusals, key=lambda refused: len(refused.problems))
    if len(found) > 1:
        names = listed(source.recipe.name for source in found)
        raise refuse("no-recipe", str(path), f"{names} all fit", "one recipe", "choose one with --recipe")
    return found[0]
