"""The index of a checkpoint, `model.safetensors.index.json`: it decides which file has a tensor."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from reshard.errors import Problem, refuse, require_none
from reshard.formats.huggingface import INDEX, SINGLE, SUFFIX, FolderHeaders
from reshard.formats.json_input import DOWNLOAD_AGAIN, is_plain, is_text, read_object, refuse_duplicate_keys
from reshard.formats.numbering import find_gaps, find_numbered_sets
from reshard.formats.unfinished_downloads import name_begun_downloads
from reshard.paths import AnyPath
from reshard.text import format_count, format_list
from reshard.types import Note, Tensor


class IndexContent(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """An index as the usual programs write it."""

    weight_map: dict[str, str]
    metadata: dict[str, int | float] | msgspec.UnsetType = msgspec.UNSET


INDEXES = msgspec.json.Decoder(IndexContent)


def parse_index(text: bytes) -> Any:
    """The JSON value of an index; an index as usual is parsed in a third of the time. Raises ValueError."""
    with suppress(ValueError, RecursionError):  # msgspec's own errors are ValueErrors too
        found = INDEXES.decode(text)
        metadata = {} if found.metadata is msgspec.UNSET else {"metadata": found.metadata}
        # Each string has two quotes. More of them: some key stood twice.
        quotes = 2 + 4 * len(found.weight_map) + sum(2 + 2 * len(values) for values in metadata.values())
        if b"\\" not in text and text.count(b'"') == quotes:
            return {"weight_map": found.weight_map}
    return json.loads(text, object_pairs_hook=refuse_duplicate_keys)


def read_index(folder: AnyPath) -> dict[str, str] | None:
    """Tensor name -> file name, from the index of a folder, if any. Raises Refused if a name leaves the folder."""
    index = read_object(folder / INDEX, parse=parse_index)
    if index is None:
        return None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refuse("wrong-index", str(folder / INDEX), "no weight_map", "a weight_map of names", DOWNLOAD_AGAIN)
    require_none(check_names_are_safe(weight_map))
    return weight_map


ENTRY_SIZE = 96
"""In bytes: an entry of a header is seldom longer, without its name."""


def guess_header_sizes(weight_map: Mapping[str, str]) -> dict[str, int]:
    """Guesses the size of each file's header, in bytes, rather too large: a header is asked for by its first bytes."""
    sizes: defaultdict[str, int] = defaultdict(lambda: 1 << 10)
    for tensor, file in weight_map.items():
        sizes[file] += len(tensor) + ENTRY_SIZE
    return sizes


def check_names_are_safe(weight_map: Mapping[str, Any]) -> Iterable[Problem]:
    """An index may name files of its own folder only: a path could make us read any file of the machine."""
    for name in {value if isinstance(value, str) else repr(value): None for value in weight_map.values()}:
        if not (is_plain(name) and is_text(name) and name.endswith(SUFFIX)):
            expected = f"a plain file name that ends in {SUFFIX}"
            yield Problem("unsafe-file-name", INDEX, f"the file name {name!r}", expected, "correct the index")


def choose_indexed_files(
    source: AnyPath, names: Sequence[str], weight_map: Mapping[str, str], *, ignore_extra_files: bool
) -> list[str]:
    """The files that the index names; refuses those that are missing, and extra ones unless they are to be ignored."""
    wanted = sorted(set(weight_map.values()))
    missing = [name for name in wanted if not is_file(source / name)]
    extra = sorted(set(names) - set(wanted))
    if len(missing) == len(wanted) and is_complete(extra):
        raise refuse_stale_index(wanted, extra)
    problems = list(name_begun_downloads(source, describe_missing_files(source, missing, weight_map)))
    if not ignore_extra_files:
        remedy = "move it away, or pass --ignore-extra-files to leave it out"
        if missing:  # leaving it out would not help, and it may be what is missing
            remedy = "keep it until the missing files are there: it may be one of them, under another name"
        problems += [
            Problem("extra-file", name, "a file that the index does not name", INDEX, remedy) for name in extra
        ]
    require_none(problems)
    return wanted


def is_complete(names: Sequence[str]) -> bool:
    """Whether files are a checkpoint without any index: `model.safetensors`, or numbered sets that lack no number."""
    sets = find_numbered_sets(names)
    return SINGLE in names or (bool(sets) and not any(map(find_gaps, sets)))


def refuse_stale_index(wanted: Sequence[str], names: Sequence[str]) -> Exception:
    """The refusal of an index that was left behind by other files."""
    here = format_list(names, 3)
    found = f"it names {format_list(wanted, 2)}, and none of them is here; here is {here}"
    remedy = f"the index is of other files: move or rename {INDEX} and keep the weights; without the index, " + (
        f"{SINGLE} is taken" if SINGLE in names else "the files are taken by their own names"
    )
    return refuse("wrong-index", INDEX, found, "the index of the files in this folder", remedy)


def is_file(path: AnyPath) -> bool:
    with suppress(OSError):
        return path.is_file()
    return False


def describe_missing_files(source: AnyPath, names: Sequence[str], weight_map: Mapping[str, str]) -> Iterable[Problem]:
    tensors: defaultdict[str, list[str]] = defaultdict(list)
    for tensor, file in weight_map.items() if names else ():
        tensors[file].append(tensor)
    for name in names:
        found = "no such file"
        with suppress(OSError):  # such as a name that is too long for the file system
            found = "a link to nothing" if (source / name).is_symlink() else found
        expected = f"{len(tensors[name]):,} tensors: {format_list(tensors[name])}"
        yield Problem("missing-file", name, found, expected, DOWNLOAD_AGAIN)


class IndexedTensors(NamedTuple):
    """The tensors of the files that an index names."""

    tensors: Mapping[str, Tensor]
    """By name: those that stand in the file that the index names for them."""
    shadowed: Mapping[str, str]
    """Name -> file of copies of such tensors, in other files."""
    misplaced: Mapping[str, str]
    """Name -> file of tensors that the index names, but for a file that does not have them."""
    unnamed: Mapping[str, str]
    """Name -> file of tensors that the index does not name at all."""


def sort_by_index(stored: FolderHeaders, weight_map: Mapping[str, str]) -> IndexedTensors:
    """Takes each tensor from the file that the index names for it, and sorts out the others."""
    names = [tensor.name for tensor in stored.tensors]
    files = [file.name for file in stored.files]
    held_by = [files[tensor.file] for tensor in stored.tensors]
    if list(map(weight_map.get, names)) == held_by:
        return IndexedTensors(dict(zip(names, stored.tensors, strict=True)), {}, {}, {})
    get_file = weight_map.get
    tensors = {tensor.name: tensor for tensor in stored.tensors if get_file(tensor.name) == files[tensor.file]}
    shadowed: dict[str, str] = {}
    misplaced: dict[str, str] = {}
    unnamed: dict[str, str] = {}
    if len(tensors) < len(stored.tensors):
        for tensor in stored.tensors:
            taken = tensors.get(tensor.name)
            if taken is not tensor:
                others = unnamed if tensor.name not in weight_map else misplaced if taken is None else shadowed
                others.setdefault(tensor.name, files[tensor.file])
    return IndexedTensors(tensors, shadowed, misplaced, unnamed)


def check_index(found: IndexedTensors, weight_map: Mapping[str, str]) -> Iterator[Problem]:
    """Reports the tensors that are not where the index says."""
    if len(found.tensors) == len(weight_map):
        return
    for name, file in weight_map.items():
        if name in found.misplaced:
            expected, remedy = f"in {file}, as the index says", "download the index and both files again"
            yield Problem("misplaced-tensor", name, f"in {found.misplaced[name]}", expected, remedy)
        elif name not in found.tensors:
            yield Problem("missing-tensor", name, f"not in {file}", "the index says that it is there", DOWNLOAD_AGAIN)


def note_left_tensors(found: IndexedTensors, weight_map: Mapping[str, str]) -> Iterator[Note]:
    """Notes the tensors that stand in the files but are not taken, because of the index."""
    if found.shadowed:
        copies = [f"{name} in {file} ({weight_map[name]} is taken)" for name, file in found.shadowed.items()]
        count = format_count(len(copies), "tensors")
        unread = "they were not compared, and may differ"
        text = f"copies of {count}, for the index names another file ({unread}): {format_list(copies, 3)}"
        yield Note("shadowed", f"left aside: {text}")
    if found.unnamed:
        others = [f"{name} in {file}" for name, file in found.unnamed.items()]
        count = format_count(len(others), "tensors")
        yield Note("not-in-index", f"left aside: {count} that the index does not name: {format_list(others, 3)}")
