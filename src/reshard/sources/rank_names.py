"""Reads the names of rank files: the number of ranks, missing ranks, and the recipes that name files this way.

Names of some engines do not tell the number of ranks. Then the headers may tell it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from reshard.errors import Problem, refuse
from reshard.formats.boxed_folder import list_whole_files
from reshard.formats.huggingface import INDEX, read_stated_ranks
from reshard.formats.part_manifests import is_of_slices, is_of_whole_files
from reshard.paths import AnyPath
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import has_ranks, list_packaged_recipes, list_recipes_to_try
from reshard.text import format_list
from reshard.types import MOST_RANKS, Note


class RankNames(NamedTuple):
    """The rank files of a folder, known from their names alone."""

    recipes: Sequence[Recipe]
    """The recipes that may have made them."""
    wanted: Sequence[str]
    """The file names of all ranks, in the order of the ranks."""
    missing: Sequence[str]
    """The names of files that should be there and are not."""
    extra: Sequence[str]
    """The names of other safetensors files in the folder."""

    def problems(self, *, ignore_extra_files: bool) -> Iterator[Problem]:
        """Reports missing rank files and, unless ignored, other safetensors files."""
        ranks = len(self.wanted)
        for name in self.missing:
            told = "names" if "{ranks}" in self.recipes[0].files else "headers"
            expected = f"{ranks} rank files, by the {told} of the others"
            yield Problem("missing-file", name, "no such file", expected, "copy it there")
        for name in () if ignore_extra_files else self.extra:
            remedy = "move it away, or pass --ignore-extra-files to leave it out"
            yield Problem("extra-file", name, f"a file beside those of {ranks} ranks", "none", remedy)


def note_files_beside_ranks(names: RankNames) -> Iterator[Note]:
    """Notes the safetensors files that are no rank files and are not read."""
    if names.extra:
        reason = f"not among the {len(names.wanted)} rank files"
        yield Note("left-aside", f"left aside: {format_list(names.extra)}; {reason}")


def holds_rank_files(path: AnyPath, recipe: str | None = None) -> bool:
    """Whether a folder holds the rank files of a recipe. Raises Refused if folder or recipe cannot be read."""
    return path.is_dir() and find_rank_names(path, list_whole_files(path), list_recipes_to_try(recipe)) is not None


def find_rank_names(path: AnyPath, names: Sequence[str], recipes: Sequence[Recipe]) -> RankNames | None:
    """Finds the rank files among the file names at a path. None if there are none, or if a folder with an index also
    has other files.

    Raises Refused if the path is a single rank file.
    """
    for recipe in recipes:
        numbers = {name: found for name in names if (found := parse_rank_name(name, recipe))}
        if numbers and (len(numbers) == len(names) or not (path / INDEX).exists()):
            if not path.is_dir():
                text = f"one of {numbers[path.name][1] or 'several'} rank files"
                raise refuse("rank-files", str(path), text, "the folder that holds all of them", f"name {path.parent}")
            return count_ranks(path, names, numbers, [known for known in recipes if known.files == recipe.files])
    return None


def count_ranks(
    path: AnyPath, names: Sequence[str], numbers: Mapping[str, tuple[int, int]], recipes: Sequence[Recipe]
) -> RankNames:
    """Counts the ranks, by the majority of the file names, and names the file of each rank. Where names do not tell the
    number, the majority of the headers does, else the highest rank. Raises Refused if the number is out of range.
    """
    ranks = Counter(total for _, total in numbers.values()).most_common(1)[0][0]
    if "{ranks}" not in recipes[0].files:
        said = Counter(filter(None, (read_stated_ranks(path / name) for name in numbers))).most_common(1)
        ranks = said[0][0] if said else 1 + max(rank for rank, _ in numbers.values())
    if not 1 <= ranks <= MOST_RANKS:
        raise refuse("wrong-ranks", next(iter(numbers)), f"{ranks} ranks", f"1 to {MOST_RANKS}")
    wanted = [recipes[0].files.format(rank=rank, ranks=ranks) for rank in range(ranks)]
    missing = sorted(set(wanted) - set(names), key=wanted.index)
    return RankNames(recipes, wanted, missing, sorted(set(names) - set(wanted)))


def parse_rank_name(name: str, recipe: Recipe) -> tuple[int, int] | None:
    """Parses rank and number of ranks from a file name, by the recipe's pattern; None for other names, and for a recipe
    without ranks. The number of ranks is 0 if the pattern has none.
    """
    if not has_ranks(recipe):
        return None
    pattern = re.escape(recipe.files)
    for key in ("rank", "ranks"):
        pattern = pattern.replace(rf"\{{{key}\}}", rf"(?P<{key}>0|[1-9][0-9]{{0,8}})")
    found = re.fullmatch(pattern, name)
    return (int(found["rank"]), int(found.groupdict().get("ranks", 0))) if found else None


def narrow_by_metadata(metadata: Iterable[Mapping[str, Any]], recipes: Sequence[Recipe]) -> Sequence[Recipe]:
    """Narrows recipes to those that the metadata of rank files name; returns all if they name none of them."""
    said = {each.get("recipe") for each in metadata}
    return [recipe for recipe in recipes if recipe.name in said] or recipes


def find_foreign_recipe(manifest: Mapping[str, Any], recipes: Sequence[Recipe]) -> str:
    """Finds the recipe that made the rank files, by their manifest, if it is not among `recipes`; else empty.

    The names of such files follow an unknown pattern: they must not be taken for whole files. A recipe without ranks
    has made whole files, under the one name that no rank file has.
    """
    recipe, layout = manifest.get("recipe"), manifest.get("layout")
    if not isinstance(recipe, dict) or not isinstance(layout, dict) or is_of_whole_files(manifest):
        return ""
    if is_of_slices(manifest):  # which have the same names whatever made them
        return ""
    name = str(recipe.get("name"))
    return "" if name in {known.name for known in recipes} else name


def require_known_recipe(path: AnyPath, manifest: Mapping[str, Any], recipes: Sequence[Recipe]) -> None:
    """Raises Refused if rank files were made by a recipe that is not among `recipes`."""
    if made_by := find_foreign_recipe(manifest, recipes):
        found, remedy = f"rank files made by the recipe {made_by}", "pass the file of that recipe with --recipe"
        if made_by in {known.name for known in list_packaged_recipes()}:
            remedy = "leave out --recipe; or first --to hf into another folder, then convert that with --recipe"
        raise refuse("no-recipe", str(path), found, "that recipe", remedy)
