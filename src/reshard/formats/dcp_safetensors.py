"""Safetensors files that hold slices of tensors, as torch's distributed checkpoints write them: -> BoxedCheckpoint."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from reshard.errors import MOST_PROBLEMS, Problem, Refused, require_none
from reshard.formats.boxes import Box, BoxedCheckpoint
from reshard.formats.huggingface import read_config, read_header_text
from reshard.formats.json_input import is_size, refuse_duplicate_keys, shorten_json
from reshard.formats.safetensors import BITS, parse_header
from reshard.formats.slice_names import COPY_FILE_AGAIN, check_shard_numbers, note_shard_numbers
from reshard.formats.unfinished_downloads import check_unfinished
from reshard.paths import AnyPath
from reshard.storage.remote_store import fetch_heads
from reshard.types import File, Tensor

SHARDING, VERSION = "DCP_SHARDING_INFO", "DCP_VERSION"

KNOWN_VERSIONS = {"1", "1.0"}


class HeaderMetadata(msgspec.Struct):
    """The metadata of a header; its other entries are skipped."""

    said: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


def read_slices(folder: AnyPath, names: Sequence[str], *, is_told: bool = False) -> BoxedCheckpoint:
    """The checkpoint of a folder of slices. Raises Refused with the faults of all files, missing ones named, unless
    something else tells which files there should be (`is_told`).
    """
    if not is_told:
        require_none(check_shard_numbers(names))
    require_none(check_unfinished(folder, names))
    fetch_heads(folder, names)
    files: list[File] = []
    boxes: dict[str, list[Box]] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            file, text = read_header_text(folder / name)
            tensors = parse_header(text, len(files), file.size, name)
        except Refused as refused:
            problems += refused.problems
            continue
        places, faults = parse_sharding(text, name)
        problems += faults
        if not faults:
            problems += gather_slices(name, tensors, places, boxes)
        files.append(file)
        if len(problems) >= MOST_PROBLEMS:
            break
    require_none(problems)
    return BoxedCheckpoint(folder, tuple(files), boxes, {}, read_config(folder), tuple(note_shard_numbers(names)))


def gather_slices(
    name: str, tensors: Sequence[Tensor], places: dict[str, Any], boxes: dict[str, list[Box]]
) -> Iterator[Problem]:
    """Fills the boxes of a file; yields the faults of their places. A tensor without a place is whole."""
    for tensor in tensors:
        dimensions = len(tensor.shape)
        said = places.pop(tensor.name, {"saved_offsets": [0] * dimensions})
        offsets = said.get("saved_offsets") if isinstance(said, dict) and len(said) == 1 else None
        subject = f"{name}: {tensor.name}"
        if not isinstance(offsets, list) or not all(map(is_size, offsets)):
            expected = '{"saved_offsets": [...]} with whole numbers, none negative'
            yield Problem("wrong-metadata", subject, shorten_json(said), expected, COPY_FILE_AGAIN)
        elif len(offsets) != dimensions:
            expected = f"{dimensions} offsets: its shape is {list(tensor.shape)}"
            yield Problem(
                "wrong-metadata", subject, f"saved_offsets {shorten_json(offsets)}", expected, COPY_FILE_AGAIN
            )
        elif BITS[tensor.dtype] < 8 and any(offsets):
            expected = "a dtype of whole bytes: torch counts two FP4 values as one"
            yield Problem("unknown-dtype", subject, f"a slice of {tensor.dtype}", expected)
        else:
            boxes.setdefault(tensor.name, []).append(Box(tensor, tuple(offsets)))
    for lost in places:
        expected = f"a tensor for each entry of {SHARDING}"
        yield Problem("missing-tensor", f"{name}: {lost}", "not in the file", expected, COPY_FILE_AGAIN)


def parse_sharding(text: bytes, name: str) -> tuple[dict[str, Any], list[Problem]]:
    """The places of the slices of a file, by its header: tensor -> `saved_offsets`; and what is wrong with them."""
    said: Mapping[str, str] = {}
    found: Any = None
    try:
        said = msgspec.json.decode(text, type=HeaderMetadata).said
        found = json.loads(said.get(SHARDING, "null"), object_pairs_hook=refuse_duplicate_keys)
    except (ValueError, RecursionError) as error:
        fault = f"{type(error).__name__}: {error}"
        return {}, [Problem("wrong-metadata", f"{name}: {SHARDING}", fault, "JSON", COPY_FILE_AGAIN)]
    if said.get(VERSION, "1.0") not in KNOWN_VERSIONS:
        shown = f"version {shorten_json(said[VERSION])}"
        return {}, [
            Problem("wrong-metadata", f"{name}: {VERSION}", shown, "version 1.0", "use a newer version of reshard")
        ]
    if isinstance(found, dict):
        return found, []
    shown = shorten_json(found) if SHARDING in said else "no such entry in its metadata"
    expected = "the places of its slices, as torch writes them"
    remedy = "rename the files if they are not slices; else save them again with torch"
    return {}, [Problem("wrong-metadata", f"{name}: {SHARDING}", shown, expected, remedy)]
