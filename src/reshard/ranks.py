"""The names of rank files: whether a folder holds them, for how many ranks, and which are missing."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reshard.errors import Problem, refuse
from reshard.read import INDEX, file_names
from reshard.types import MOST_RANKS, RANKS, Recipe


class RankNames(NamedTuple):
    """Rank files as their names tell."""

    recipes: Sequence[Recipe]
    """Those whose rank files they could be."""
    wanted: Sequence[str]
    """The names that there should be, in the order of the ranks."""
    missing: Sequence[str]
    extra: Sequence[str]
    """Those of other safetensors files."""

    def problems(self, *, ignore_extra_files: bool) -> Iterator[Problem]:
        """Why they are not just the files of all ranks."""
        ranks = len(self.wanted)
        for name in self.missing:
            expected = f"{ranks} rank files, by the names of the others"
            yield Problem("missing-file", name, "no such file", expected, "copy it there")
        for name in () if ignore_extra_files else self.extra:
            remedy = "move it away, or pass --ignore-extra-files to leave it out"
            yield Problem("extra-file", name, f"a file beside those of {ranks} ranks", "none", remedy)


def ranks_at(path: Path, recipes: Sequence[Recipe]) -> RankNames | None:
    """The rank files at a path; None if something else lies there, or it holds a checkpoint with an index besides.

    Raises Refused for a single one of several.
    """
    names = file_names(path)
    for recipe in recipes:
        numbers = {name: found for name in names if (found := numbers_of(name, recipe))}
        if numbers and (len(numbers) == len(names) or not (path / INDEX).exists()):
            if not path.is_dir():
                text = f"one of {numbers[path.name][1]} rank files"
                raise refuse("rank-files", str(path), text, "the folder that holds all of them", f"name {path.parent}")
            return rank_names(names, numbers, [known for known in recipes if known.files == recipe.files])
    return None


def rank_names(names: Sequence[str], numbers: dict[str, tuple[int, int]], recipes: Sequence[Recipe]) -> RankNames:
    """How many ranks there are is told by the names of most."""
    ranks = Counter(total for _, total in numbers.values()).most_common(1)[0][0]
    if not 1 <= ranks <= MOST_RANKS:
        raise refuse("wrong-ranks", next(iter(numbers)), f"{ranks} ranks", f"1 to {MOST_RANKS}")
    wanted = [recipes[0].files.format(rank=rank, ranks=ranks) for rank in range(ranks)]
    missing = sorted(set(wanted) - set(names), key=wanted.index)
    return RankNames(recipes, wanted, missing, sorted(set(names) - set(wanted)))


def foreign_recipe(manifest: Mapping[str, Any], recipes: Sequence[Recipe]) -> str:
    """The recipe that cut rank files, by their manifest, if it is none of these.

    The names of the files tell nothing then, and they are not to be taken for whole ones.
    """
    recipe, layout = manifest.get("recipe"), manifest.get("layout")
    if not isinstance(recipe, dict) or not isinstance(layout, dict) or layout.get("to", RANKS) != RANKS:
        return ""
    name = str(recipe.get("name"))
    return "" if name in {known.name for known in recipes} else name


def numbers_of(name: str, recipe: Recipe) -> tuple[int, int] | None:
    """The rank and the number of ranks in the name of a rank file, if it is one, as the recipe spells it."""
    pattern = re.escape(recipe.files)
    for key in ("rank", "ranks"):
        pattern = pattern.replace(rf"\{{{key}\}}", rf"(?P<{key}>0|[1-9][0-9]{{0,8}})")
    found = re.fullmatch(pattern, name)
    return (int(found["rank"]), int(found["ranks"])) if found else None
