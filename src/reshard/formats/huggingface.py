"""The safetensors files of a folder: their names, their headers, and the config beside them."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from reshard.errors import MOST_PROBLEMS, Problem, Refused, refuse, require_none
from reshard.formats.file_content import LOOKED_AT, require_safetensors_content
from reshard.formats.json_input import read_object, require_no_pointer
from reshard.formats.recognition import (
    refuse_other_content,
    require_no_slices,
    require_safetensors_file,
    require_whole_files,
)
from reshard.formats.remote_names import restore_address, suggest_path
from reshard.formats.safetensors import LENGTH_SIZE, parse_header, read_header_length
from reshard.formats.target_names import require_finished
from reshard.formats.unfinished_downloads import check_unfinished
from reshard.paths import AnyPath
from reshard.storage.opened import measure_open_file, measure_path, open_regular_file
from reshard.storage.remote_store import fetch_heads
from reshard.types import Checkpoint, File, Tensor

INDEX = "model.safetensors.index.json"

CONFIG = "config.json"

SUFFIX = ".safetensors"

SINGLE: str = "model" + SUFFIX
"""The whole model in one file. It needs no index."""


@dataclass(frozen=True, slots=True)
class FolderHeaders:
    """The headers of a folder as they stand, before any look across files."""

    folder: AnyPath
    files: tuple[File, ...]
    tensors: tuple[Tensor, ...]
    metadata: tuple[Mapping[str, Any], ...] = ()
    """Of each file: the `__metadata__` of its header."""


def is_safetensors_name(name: str) -> bool:
    """Whether a file in a folder is a safetensors file, by its name. A name that begins with a dot is none: macOS keeps
    the attributes of `model.safetensors` in `._model.safetensors`.
    """
    return name.endswith(SUFFIX) and not name.startswith(".")


def find_folder(source: AnyPath) -> AnyPath:
    return source if source.is_dir() else source.parent


def list_safetensors_files(source: AnyPath) -> list[str]:
    """The names of the safetensors files at `source`, sorted. Raises Refused if there is none or it is not there, and
    for a target whose conversion has not ended: it may lack files.
    """
    try:
        if not source.is_dir():
            measure_path(source)  # an error, if it is not there
            require_safetensors_file(source)
            return [source.name]
        names = sorted(path.name for path in source.iterdir() if is_safetensors_name(path.name))
    except OSError as error:
        expected, remedy = "a folder or a safetensors file", suggest_path(source)
        raise refuse("no-source", restore_address(source), error.strerror or str(error), expected, remedy) from None
    require_finished(source)
    require_whole_files(source, names)
    if not names and not (source / INDEX).exists():
        raise refuse_other_content(source)
    return names


MOST_METADATA = 1 << 20
"""In bytes: more of a header is not looked through for its metadata."""

METADATA_START = b'{"__metadata__":'


def read_config(folder: AnyPath) -> Mapping[str, Any] | None:
    """The parsed `config.json` of a folder, if it has one."""
    return read_object(folder / CONFIG)


def read_headers(folder: AnyPath, names: Sequence[str]) -> FolderHeaders:
    """The headers of the named files. Raises Refused with the faults of all of them."""
    files: list[File] = []
    tensors: list[Tensor] = []
    metadata: list[Mapping[str, Any]] = []
    problems: list[Problem] = []
    require_none(check_unfinished(folder, names))
    fetch_heads(folder, names)
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


def read_header(path: AnyPath, index: int) -> tuple[File, list[Tensor]]:
    """The header of one file, whose tensors will carry `index`. Raises Refused."""
    file, tensors, _ = read_described_header(path, index)
    return file, tensors


def read_described_header(path: AnyPath, index: int) -> tuple[File, list[Tensor], Mapping[str, Any]]:
    """The header of one file, whose tensors will carry `index`, and its metadata. Raises Refused."""
    file, text = read_header_text(path)
    require_no_slices(path, text)
    return file, parse_header(text, index, file.size, path.name), parse_metadata(text)


def read_header_text(path: AnyPath) -> tuple[File, bytes]:
    """A file, and the text of its header, which is not parsed yet. Raises Refused."""
    try:
        with open_regular_file(path) as file:
            size, version = measure_open_file(file)
            beginning = file.read(LOOKED_AT)
            require_no_pointer(path, beginning)
            require_safetensors_content(path, beginning)
            file.seek(0)
            first = file.read(LENGTH_SIZE)
            text = file.read(read_header_length(first, size, path.name))
    except OSError as error:
        raise refuse("cannot-read", str(path), error.strerror or str(error), "a readable file") from None
    header_hash = hashlib.sha256(first + text).hexdigest()
    return File(path.name, size, len(first) + len(text), header_hash, version), text


def read_file(path: AnyPath) -> Checkpoint:
    """A single file as it stands, though it be one of several. Raises Refused."""
    stored = read_headers(path.parent, list_safetensors_files(path))
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


def read_stated_ranks(path: AnyPath) -> int:
    """The number of ranks that the header of a rank file names; 0 if it names none."""
    said = None
    with suppress(OSError), open_regular_file(path) as file:
        length = int.from_bytes(file.read(LENGTH_SIZE), "little")
        said = parse_metadata(file.read(min(length, MOST_METADATA))).get("ranks")
    return int(said) if isinstance(said, str) and re.fullmatch(r"[1-9][0-9]{0,8}", said) else 0
