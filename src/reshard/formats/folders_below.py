"""Looks for checkpoints in the folders below a given one: those nearest to it."""

import re
from collections.abc import Iterator
from itertools import islice

from reshard.formats.distcp_metadata import METADATA
from reshard.formats.unfinished_downloads import list_entries
from reshard.paths import AnyPath

WEIGHTS = ".safetensors"

MOST_FOLDERS = 1000
"""Folders of a level that are looked into."""

SAVES_DEPTH = 3
"""Levels in which saves are looked for: `checkpoints/step-100/pytorch_model_fsdp_0` has three."""

OPTIMIZER = "optimizer"
"""How accelerate begins the name of the folder of an optimizer's state, which is a distributed checkpoint too."""


def list_saves(folder: AnyPath) -> list[str]:
    """Lists the nearest folders below that hold a distributed checkpoint with its metadata, in the order of their
    numbers.
    """
    for depth in range(1, SAVES_DEPTH + 1):
        found = [
            str(path)
            for path in list_folders(folder, depth)
            if not path.name.startswith(OPTIMIZER) and (path / METADATA).is_file()
            and any(name.endswith(".distcp") for name in list_entries(path))
        ]  # fmt: skip
        if found:
            return sorted(found, key=split_numbers)
    return []


def list_weight_folders(folder: AnyPath) -> list[str]:
    """Lists the sub-folders that hold safetensors files, in the order of their numbers; else deeper ones."""
    for depth in (1, 2):
        found = {str(path.parent).removeprefix(f"{folder}/") for path in list_weight_files(folder, depth)}
        if found:
            return sorted(found, key=split_numbers)
    return []


def list_weight_files(folder: AnyPath, depth: int) -> Iterator[AnyPath]:
    """Lists the safetensors files in the folders at a depth."""
    for path in list_folders(folder, depth):
        yield from (path / name for name in list_entries(path) if name.endswith(WEIGHTS) and not name.startswith("."))


def list_folders(folder: AnyPath, depth: int) -> list[AnyPath]:
    """Lists the folders so many levels below, at most MOST_FOLDERS of each level."""
    folders = [folder]
    for _ in range(depth):
        below = (above / name for above in folders for name in list_entries(above) if not name.startswith("."))
        folders = list(islice((path for path in below if path.is_dir()), MOST_FOLDERS))
    return folders


def split_numbers(name: str) -> list[tuple[int, str]]:
    """Splits a name at its numbers, to sort `checkpoint-500` before `checkpoint-1000`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d{1,18})", name)]
