"""A folder of safetensors files with its index -> Checkpoint; names numbered and indexed files that are missing."""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reshard.errors import MOST_PROBLEMS, Problem, Refused, refuse, require_none
from reshard.formats.downloads import check_unfinished
from reshard.formats.file_content import LOOKED_AT, require_safetensors_content
from reshard.formats.json_input import (
    DOWNLOAD_AGAIN,
    is_plain,
    is_text,
    read_object,
    refuse_duplicate_keys,
    require_no_pointer,
)
from reshard.formats.recognition import (
    refuse_other_content,
    require_no_slices,
    require_safetensors_file,
    require_whole_files,
    suggest_download,
)
from reshard.formats.safetensors import LENGTH_SIZE, parse_header, read_header_length
from reshard.storage.local import open_regular_file
from reshard.text import format_list
from reshard.types import Checkpoint, File, Tensor

INDEX = "model.safetensors.index.json"

CONFIG = "config.json"

SUFFIX = ".safetensors"

NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class FolderHeaders:
    """The headers of a folder as they stand, before any look across files."""

    folder: Path
    files: tuple[File, ...]
    tensors: tuple[Tensor, ...]
    metadata: tuple[Mapping[str, Any], ...] = ()
    """Of each file: the `__metadata__` of its header."""


def read_whole(
    path: Path,
    names: Sequence[str],
    weight_map: Mapping[str, str] | None,
    config: Mapping[str, Any] | None,
    *,
    ignore_extra_files: bool = False,
) -> Checkpoint:
    """The checkpoint in the safetensors files of these names, from their headers.

    With an index, the index is the truth: each file and tensor that it names must be there, and nothing else may be,
    unless `ignore_extra_files` says that files it does not name are left out. Raises Refused with every fault found.
    """
    if weight_map is not None:
        names = choose_indexed_files(path, names, weight_map, ignore_extra_files=ignore_extra_files)
    else:
        require_none(check_numbering(names))
    stored = read_headers(find_folder(path), names)
    tensors: dict[str, Tensor] = {}
    problems = list(collect_tensors(stored, tensors))
    if weight_map is not None:
        problems.extend(check_index(stored, tensors, weight_map))
    if not tensors and not problems:
        problems.append(Problem("empty-source", str(path), "files without a tensor", "a checkpoint"))
    require_none(problems)
    return Checkpoint(stored.folder, stored.files, tensors, config)


def find_folder(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def list_safetensors_files(source: Path) -> list[str]:
    """The names of the safetensors files at `source`, sorted. Raises Refused if there is none or it is not there."""
    try:
        if not source.is_dir():
            source.stat()
            require_safetensors_file(source)
            return [source.name]
        names = sorted(path.name for path in source.iterdir() if path.name.endswith(SUFFIX))
    except OSError as error:
        expected, remedy = "a folder or a safetensors file", suggest_download(source)
        raise refuse("no-source", str(source), error.strerror or str(error), expected, remedy) from None
    require_whole_files(source, names)
    if not names and not (source / INDEX).exists():
        raise refuse_other_content(source)
    return names


MOST_METADATA = 1 << 20
"""In bytes: more of a header is not looked through for its metadata."""

METADATA_START = b'{"__metadata__":'


def read_config(folder: Path) -> Mapping[str, Any] | None:
    """The parsed `config.json` of a folder, if it has one."""
    return read_object(folder / CONFIG)


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name, from the index of a folder, if any. Raises Refused if a name leaves the folder."""
    index = read_object(folder / INDEX, pairs=refuse_duplicate_keys)
    if index is None:
        return None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise refuse("wrong-index", str(folder / INDEX), "no weight_map", "a weight_map of names", DOWNLOAD_AGAIN)
    require_none(check_names_are_safe(weight_map))
    return weight_map


def check_names_are_safe(weight_map: Mapping[str, Any]) -> Iterable[Problem]:
    """An index may name files of its own folder only: a path could make us read any file of the machine."""
    for name in {value if isinstance(value, str) else repr(value): None for value in weight_map.values()}:
        if not (is_plain(name) and is_text(name) and name.endswith(SUFFIX)):
            expected = f"a plain file name that ends in {SUFFIX}"
            yield Problem("unsafe-file-name", INDEX, f"the file name {name!r}", expected, "correct the index")


def choose_indexed_files(
    source: Path, names: Sequence[str], weight_map: Mapping[str, str], *, ignore_extra_files: bool
) -> list[str]:
    """The files that the index names; refuses those that are missing, and extra ones unless they are to be ignored."""
    wanted = sorted(set(weight_map.values()))
    problems = list(describe_missing_files(source, [name for name in wanted if not is_file(source / name)], weight_map))
    if not ignore_extra_files:
        remedy = "move it away, or pass --ignore-extra-files to leave it out"
        extra = sorted(set(names) - set(wanted))
        problems += [
            Problem("extra-file", name, "a file that the index does not name", INDEX, remedy) for name in extra
        ]
    require_none(problems)
    return wanted


def is_file(path: Path) -> bool:
    with suppress(OSError):
        return path.is_file()
    return False


def describe_missing_files(source: Path, names: Iterable[str], weight_map: Mapping[str, str]) -> Iterable[Problem]:
    tensors: defaultdict[str, list[str]] = defaultdict(list)
    for tensor, file in weight_map.items():
        tensors[file].append(tensor)
    for name in names:
        found = "no such file"
        with suppress(OSError):  # such as a name that is too long for the file system
            found = "a link to nothing" if (source / name).is_symlink() else found
        expected = f"{len(tensors[name]):,} tensors: {format_list(tensors[name])}"
        yield Problem("missing-file", name, found, expected, DOWNLOAD_AGAIN)


def check_numbering(names: Sequence[str]) -> Iterable[Problem]:
    """Without an index, `model-00002-of-00004.safetensors` still tells that there are four files."""
    present = set(names)
    for (stem, total), count in Counter((m[1], m[3]) for m in map(NUMBERED.fullmatch, names) if m).items():
        for number in range(1, min(int(total), 10 * count + 10) + 1):
            wanted = f"{stem}-{number:05}-of-{total}{SUFFIX}"
            if wanted not in present:
                yield Problem(
                    "missing-file", wanted, "no such file", f"{int(total)} files by their names", DOWNLOAD_AGAIN
                )


def read_headers(folder: Path, names: Sequence[str]) -> FolderHeaders:
    """The headers of the named files. Raises Refused with the faults of all of them."""
    files: list[File] = []
    tensors: list[Tensor] = []
    metadata: list[Mapping[str, Any]] = []
    problems: list[Problem] = []
    require_none(check_unfinished(folder, names))
    for name in names:
        try:
            file, entries, said = read_described_header(folder / name, len(files))
        except Refused as refused:
            problems.extend(refused.problems)
            if len(problems) >= MOST_PROBLEMS:
                break
            continue
        files.append(file)
        tensors.extend(entries)
        metadata.append(said)
    require_none(problems)
    return FolderHeaders(folder, tuple(files), tuple(tensors), tuple(metadata))


def read_header(path: Path, index: int) -> tuple[File, list[Tensor]]:
    """The header of one file, whose tensors will carry `index`. Raises Refused."""
    file, tensors, _ = read_described_header(path, index)
    return file, tensors


def read_described_header(path: Path, index: int) -> tuple[File, list[Tensor], Mapping[str, Any]]:
    """The header of one file, whose tensors will carry `index`, and its metadata. Raises Refused."""
    try:
        with open_regular_file(path) as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            beginning = file.read(LOOKED_AT)
            require_no_pointer(path, beginning)
            require_safetensors_content(path, beginning)
            file.seek(0)
            first = file.read(LENGTH_SIZE)
            text = file.read(read_header_length(first, size, path.name))
    except OSError as error:
        raise refuse("cannot-read", str(path), error.strerror or str(error), "a readable file") from None
    require_no_slices(path, text)
    tensors = parse_header(text, index, size, path.name)
    header_hash = hashlib.sha256(first + text).hexdigest()
    file_of = File(path.name, size, len(first) + len(text), header_hash, status.st_mtime_ns)
    return file_of, tensors, parse_metadata(text)


def read_file(path: Path) -> Checkpoint:
    """A single file as it stands, though it be one of several."""
    stored = read_headers(path.parent, [path.name])
    tensors = {tensor.name: tensor for tensor in stored.tensors}
    return Checkpoint(stored.folder, stored.files, tensors, read_config(path.parent))


def parse_metadata(text: bytes) -> Mapping[str, Any]:
    """The metadata of a header, where it stands first of all, as every writer puts it; else nothing."""
    if not text.startswith(METADATA_START):
        return {}
    found: Any = {}
    with suppress(ValueError, RecursionError):
        start = text[len(METADATA_START) : MOST_METADATA].decode(errors="replace")
        found, _ = json.JSONDecoder().raw_decode(start)
    return found if isinstance(found, dict) else {}


def collect_tensors(stored: FolderHeaders, tensors: dict[str, Tensor]) -> Iterable[Problem]:
    """Fills `tensors` by name; yields those that stand in two files."""
    for tensor in stored.tensors:
        first = tensors.setdefault(tensor.name, tensor)
        if first is not tensor:
            found = f"in {stored.files[first.file].name} and in {stored.files[tensor.file].name}"
            yield Problem("tensor-twice", tensor.name, found, "one file", "remove the file that does not belong")


def check_index(
    stored: FolderHeaders, tensors: Mapping[str, Tensor], weight_map: Mapping[str, str]
) -> Iterable[Problem]:
    """Where index and headers do not say the same."""
    if {name: stored.files[tensor.file].name for name, tensor in tensors.items()} == weight_map:
        return
    for name, file in weight_map.items():
        tensor = tensors.get(name)
        if tensor is None:
            yield Problem("missing-tensor", name, f"not in {file}", "the index says that it is there", DOWNLOAD_AGAIN)
        elif stored.files[tensor.file].name != file:
            found = f"in {stored.files[tensor.file].name}"
            yield Problem("misplaced-tensor", name, found, f"in {file}, as the index says", DOWNLOAD_AGAIN)
    for name, tensor in tensors.items():
        if name not in weight_map:
            found = f"in {stored.files[tensor.file].name}, not in the index"
            yield Problem(
                "extra-tensor", name, found, "each tensor in the index", "correct the index or remove the file"
            )
