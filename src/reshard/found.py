"""What lies in a target folder: rank files or whole ones, and their headers. Nothing is expected of it yet."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from reshard.books import require_finished
from reshard.errors import Problem, Refused, refuse
from reshard.read import SUFFIX, read_header
from reshard.types import MOST_RANKS, File, Recipe, Tensor

AGAIN = "remove the file and convert again"
MISSING = "copy it there, or convert again"


class Folder(NamedTuple):
    """The tensor files that a target folder has, or should have."""

    names: Mapping[int, str]
    """By the rank; or by a number, where files are not by rank."""
    ranks: int
    """1 where files are not by rank."""
    is_whole: bool
    """Whether these are not rank files, but tensors in one piece under the names of the source."""
    extra: Sequence[str]
    """The names of others beside rank files."""


class Found(NamedTuple):
    """One file of the target, as it stands."""

    number: int
    """Its rank, or its number."""
    file: File
    tensors: Sequence[Tensor]


def require_folder(target: Path) -> None:
    """Raises Refused if there is none, or if the conversion that writes it has not ended."""
    if not target.is_dir():
        found = "a file" if target.exists() else "no such folder"
        raise refuse("empty-target", str(target), found, "a folder that was converted into", "is the path right?")
    require_finished(target)


def look_at(target: Path, recipe: Recipe) -> Folder:
    """What files a folder should have. How many ranks there are is told by the names of most; where no file is named as
    a rank file is, they are whole. Raises Refused if there is none at all.
    """
    pattern = re.escape(recipe.files).replace(r"\{rank\}", r"(\d+)").replace(r"\{ranks\}", r"(\d+)")
    require_folder(target)
    paths = [path for path in sorted(target.iterdir()) if path.is_file()]
    tensor_files = [path.name for path in paths if path.name.endswith(SUFFIX)]
    fitting = [found for path in paths if (found := re.fullmatch(pattern, path.name))]
    if not fitting and tensor_files:
        return Folder(dict(enumerate(tensor_files)), 1, is_whole=True, extra=())
    if not fitting:
        lacking = f"no file such as {recipe.files.format(rank='0', ranks='N')}"
        raise refuse("empty-target", str(target), lacking, "a folder of rank files", "is it the right folder?")
    ranks = Counter(max(map(int, found.groups())) for found in fitting).most_common(1)[0][0]
    if ranks > MOST_RANKS:
        raise refuse("wrong-ranks", fitting[0][0], f"{ranks} ranks", f"at most {MOST_RANKS}")
    names = {rank: recipe.files.format(rank=rank, ranks=ranks) for rank in range(ranks)}
    known = set(names.values())
    return Folder(names, ranks, is_whole=False, extra=[name for name in tensor_files if name not in known])


def read_found(target: Path, names: Mapping[int, str]) -> tuple[list[Found], list[Problem]]:
    """The headers of the files that can be read, and what is wrong with the others."""
    files: list[Found] = []
    problems: list[Problem] = []
    for number, name in names.items():
        if not (target / name).exists():
            found = "a link to nothing" if (target / name).is_symlink() else "no such file"
            problems.append(Problem("missing-file", name, found, f"one of {len(names)} files", MISSING))
            continue
        try:
            files.append(Found(number, *read_header(target / name, number)))
        except Refused as refused:
            problems.extend(refused.problems)
    return files, problems
