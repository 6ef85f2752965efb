"""Lists the tensors of a path, from the headers alone and without a recipe: names, dtypes, shapes, bytes, files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reshard.formats.boxed_folder import is_boxed_folder, list_whole_files
from reshard.formats.folders_below import split_numbers
from reshard.formats.huggingface import INDEX, read_headers
from reshard.formats.name_patterns import match_any, require_fitting
from reshard.numbered_names import split_name
from reshard.paths import AnyPath
from reshard.recipes.recipe import list_recipes_to_try
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.rank_names import find_rank_names
from reshard.text import escape, format_count, format_list, format_size, format_table, is_terminal, shorten_name
from reshard.types import Checkpoint, Tensor

MOST_LISTED = 100
"""At most so many tensors are printed on a terminal; a pipe or file gets all."""


@dataclass(frozen=True, slots=True)
class ListedTensor:
    """A tensor of a file, or the part of it that a rank file has."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    """In bytes."""
    file: str
    """Its name; of a tensor in several parts, the first few names."""


def list_chosen_tensors(path: AnyPath, patterns: Sequence[str], recipe: str | None) -> tuple[ListedTensor, ...]:
    """The tensors whose names fit one of the shell `patterns`, layer 2 before layer 10; those of rank files are listed
    file by file for each name. Raises Refused for a pattern that fits none.
    """
    every = read_tensor_list(path, recipe)
    names = dict.fromkeys(tensor.name for tensor in every)
    require_fitting("wrong-option", "--tensors", patterns, names, "no tensor of such a name")
    chosen = set(match_any(names, patterns))
    return tuple(
        sorted(
            (tensor for tensor in every if tensor.name in chosen),
            key=lambda tensor: (split_numbers(tensor.name), split_numbers(tensor.file)),
        )
    )


def read_tensor_list(path: AnyPath, recipe: str | None) -> list[ListedTensor]:
    """All tensors at a path. Of a folder with an index, those that the index names; of boxes, the tensors that they
    make up. Raises Refused.
    """
    names = list_whole_files(path)
    if path.is_dir() and (ranks := find_rank_names(path, names, list_recipes_to_try(recipe))):
        stored = read_headers(path, [name for name in ranks.wanted if name not in ranks.missing])
    elif path.is_dir() and ((path / INDEX).is_file() or is_boxed_folder(path)):
        checkpoint = read_checkpoint(path, ignore_extra_files=True)
        return [
            ListedTensor(found.name, found.dtype, tuple(found.shape), found.size, name_tensor_files(found, checkpoint))
            for found in checkpoint.tensors.values()
        ]
    else:
        stored = read_headers(path if path.is_dir() else path.parent, names)
    return [
        ListedTensor(found.name, found.dtype, tuple(found.shape), found.size, stored.files[found.file].name)
        for found in stored.tensors
    ]


def name_tensor_files(tensor: Tensor, checkpoint: Checkpoint) -> str:
    """Names the file of a tensor; the first few of a tensor whose parts lie in several."""
    parts = [part for part, _ in (checkpoint.boxes or {}).get(tensor.file, ())] or [tensor]
    return format_list(dict.fromkeys(checkpoint.files[part.file].name for part in parts), 3)


def format_tensor_list(tensors: Sequence[ListedTensor]) -> str:
    """The tensors as a table for a person; on a terminal only the first of a long list."""
    size = sum(tensor.size for tensor in tensors)
    most = MOST_LISTED if is_terminal() else len(tensors)
    rows = [
        (shorten_name(tensor.name), tensor.dtype, str(list(tensor.shape)), f"{tensor.size:,}", escape(tensor.file))
        for tensor in tensors[:most]
    ]
    lines = [
        f"{format_count(len(tensors), 'tensors')} listed, {size:,} bytes ({format_size(size)})",
        "",
        format_table(("name", "dtype", "shape", "bytes", "file"), rows),
    ]
    if left := len(tensors) - len(rows):
        lines.append(f"... and {left:,} more; --json has all, and a pattern narrows the list")
    return "\n".join(lines)


def group_names(tensors: Iterable[Tensor]) -> dict[str, tuple[int, str]]:
    """Groups names that differ in their numbers only; sorted."""
    kinds: dict[str, list[str]] = {}
    for tensor in tensors:
        kinds.setdefault(split_name(tensor.name)[0], []).append(f"{tensor.dtype} {list(tensor.shape)}")
    return {name: (len(kinds[name]), format_list(dict.fromkeys(kinds[name]), 3)) for name in sorted(kinds)}
