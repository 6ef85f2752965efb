"""Lists the tensors of a path, from the headers alone and without a recipe: names, dtypes, shapes, bytes, files."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from pathlib import Path
from shlex import quote

from reshard.errors import Problem, require_none
from reshard.formats.folder import read_checkpoint
from reshard.formats.huggingface import INDEX, list_safetensors_files, read_headers
from reshard.formats.recognition import split_numbers
from reshard.numbered_names import split_name
from reshard.recipes.recipe import list_recipes_to_try
from reshard.sources.rank_names import find_rank_names
from reshard.text import escape, format_count, format_list, format_size, format_table, shorten_name

MOST_LISTED = 100
"""At most so many tensors are printed."""


@dataclass(frozen=True, slots=True)
class ListedTensor:
    """A tensor of a file, or the part of it that a rank file has."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    """In bytes."""
    file: str


def list_chosen_tensors(path: Path, patterns: Sequence[str], recipe: str | None) -> tuple[ListedTensor, ...]:
    """The tensors whose names fit one of the shell `patterns`, layer 2 before layer 10; those of rank files are listed
    file by file for each name. Raises Refused for a pattern that fits none.
    """
    every = read_tensor_list(path, recipe)
    fitting = [re.compile(translate(pattern)).match for pattern in patterns]
    names = dict.fromkeys(tensor.name for tensor in every)
    require_none(
        Problem("wrong-option", f"--tensors {pattern}", "no tensor of such a name", *suggest_names(pattern, names))
        for pattern, fits in zip(patterns, fitting, strict=True)
        if not any(map(fits, names))
    )
    chosen = {name for name in names if any(fits(name) for fits in fitting)}
    return tuple(
        sorted(
            (tensor for tensor in every if tensor.name in chosen),
            key=lambda tensor: (split_numbers(tensor.name), split_numbers(tensor.file)),
        )
    )


def read_tensor_list(path: Path, recipe: str | None) -> list[ListedTensor]:
    """All tensors at a path. Of a folder with an index, those that the index names. Raises Refused."""
    names = list_safetensors_files(path)
    if path.is_dir() and (ranks := find_rank_names(path, names, list_recipes_to_try(recipe))):
        stored = read_headers(path, [name for name in ranks.wanted if name not in ranks.missing])
    elif path.is_dir() and (path / INDEX).is_file():
        checkpoint = read_checkpoint(path, ignore_extra_files=True)
        files = checkpoint.files
        return [
            ListedTensor(found.name, found.dtype, tuple(found.shape), found.size, files[found.file].name)
            for found in checkpoint.tensors.values()
        ]
    else:
        stored = read_headers(path if path.is_dir() else path.parent, names)
    return [
        ListedTensor(found.name, found.dtype, tuple(found.shape), found.size, stored.files[found.file].name)
        for found in stored.tensors
    ]


def suggest_names(pattern: str, names: Iterable[str]) -> tuple[str, str]:
    """What was expected in the place of a pattern that fits no name, and what to do."""
    every = list(names)
    wider = f"*{pattern.strip('*')}*"
    if count := sum(map(bool, map(re.compile(translate(wider)).match, every))):
        return "a pattern of whole names", f"--tensors {quote(wider)} fits {format_count(count, 'names')}"
    firsts: dict[str, str] = {}  # one of each kind of name: they are few
    for name in every:
        firsts.setdefault(split_name(name)[0], name)
    wanted = split_name(pattern)[0]
    near = [firsts[kind] for kind in get_close_matches(wanted, firsts, 3, 0.4)] or list(firsts.values())[:3]
    return f"a pattern that fits some, such as {format_list(near)}", "--tensors '*' lists all"


def format_tensor_list(tensors: Sequence[ListedTensor]) -> str:
    """The tensors as a table for a person; of a long list, the first."""
    size = sum(tensor.size for tensor in tensors)
    rows = [
        (shorten_name(tensor.name), tensor.dtype, str(list(tensor.shape)), f"{tensor.size:,}", escape(tensor.file))
        for tensor in tensors[:MOST_LISTED]
    ]
    lines = [
        f"{format_count(len(tensors), 'tensors')} listed, {size:,} bytes ({format_size(size)})",
        "",
        format_table(("name", "dtype", "shape", "bytes", "file"), rows),
    ]
    if left := len(tensors) - len(rows):
        lines.append(f"... and {left:,} more; --json has all, and a pattern narrows the list")
    return "\n".join(lines)
