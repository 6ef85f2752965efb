"""Sources: a path -> Checkpoint, Recipe and Origin, whichever layout lies there. Reads headers and the manifest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reshard.choose import choose_recipe
from reshard.errors import Refused, listed, refuse
from reshard.gather import gather
from reshard.manifest import read_manifest
from reshard.match import match
from reshard.names import ranks_of
from reshard.origin import Origin, read_origin
from reshard.read import file_names, read_checkpoint, read_config, read_headers
from reshard.recipe import load_recipe, packaged_recipes
from reshard.subset_text import subset_text
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
    checkpoint = replace(read_checkpoint(path, ignore_extra_files=ignore_extra_files), subset=subset_of(path))
    require_whole(checkpoint.subset, path)
    return Source(checkpoint, recipes[0] if recipe else choose_recipe(checkpoint, recipes), Origin())


def rank_recipes(path: Path, recipes: Sequence[Recipe]) -> list[Recipe]:
    """The recipes whose rank files these could be, by the names of the files; none if the path is something else."""
    names = file_names(path) if path.is_dir() else []
    return [recipe for recipe in recipes if ranks_of(names, recipe)]


def read_rank_files(path: Path, recipes: Sequence[Recipe], *, first_replica: bool) -> Source:
    """Rank files as one checkpoint, by the recipe that the manifest names, else by the one that fits their tensors."""
    ranks = ranks_of(file_names(path), recipes[0])
    stored = read_headers(path, [recipes[0].files.format(rank=rank, ranks=ranks) for rank in range(ranks)])
    manifest = read_manifest(path)
    origin, subset = read_origin(manifest), manifest.get("subset", {})
    require_whole(subset, path)
    if origin.config is None:
        origin = replace(origin, config=read_config(path))
    found, refusals = [], []
    for recipe in [recipe for recipe in recipes if recipe.name == origin.recipe] or recipes:
        try:
            checkpoint = gather(stored, recipe, origin, first_replica=first_replica)
            match(checkpoint, recipe)
        except Refused as refused:
            refusals.append(refused)
        else:
            found.append(Source(replace(checkpoint, subset=subset), recipe, origin))
    if not found:
        raise min(refusals, key=lambda refused: len(refused.problems))
    if len(found) > 1:
        names = listed(source.recipe.name for source in found)
        raise refuse("no-recipe", str(path), f"{names} all fit", "one recipe", "choose one with --recipe")
    return found[0]


def subset_of(path: Path) -> Mapping[str, Any]:
    """What of a larger checkpoint a folder holds, by its manifest; empty if it is whole, or has no manifest of ours."""
    try:
        subset: Mapping[str, Any] = read_manifest(path).get("subset", {}) if path.is_dir() else {}
    except Refused:
        return {}
    return subset


def require_whole(subset: Mapping[str, Any], path: Path) -> None:
    """Chosen tensors are no source. Raises Refused."""
    if "only" in subset:
        remedy = "convert what these tensors came from"
        raise refuse("incomplete-source", str(path), subset_text(subset), "a whole model", remedy)
