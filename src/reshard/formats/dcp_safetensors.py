"""Safetensors files that hold slices of tensors, as torch's distributed checkpoints write them: -> BoxedCheckpoint."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from reshard.errors import MOST_PROBLEMS, Problem, Refused, require_none
from reshard.formats.boxes import Box, BoxedCheckpoint
from reshard.formats.huggingface import read_config, read_header_text
from reshard.formats.json_input import is_size, refuse_duplicate_keys, shorten_json
from reshard.formats.safetensors import BITS, parse_header
from reshard.formats.unfinished_downloads import check_unfinished
from reshard.paths import AnyPath
from reshard.text import format_count, format_list, format_numbers
from reshard.types import File, Note, Tensor

SLICE_NAME = re.compile(r"shard-(\d{1,9})-model-(\d{1,9})-of-(\d{1,9})\.safetensors")
"""The number of the process that wrote the file, from 1 on; the number of the file, and how many there are."""

SHARDING, VERSION = "DCP_SHARDING_INFO", "DCP_VERSION"

KNOWN_VERSIONS = {"1", "1.0"}

MOST_FILES = 1_000_000
"""Of one process. A hostile name may claim more."""

COPY_FILE_AGAIN = "copy the file again from where the checkpoint was saved"


class HeaderMetadata(msgspec.Struct):
    """The metadata of a header; its other entries are skipped."""

    said: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict)


def name_slices(ranks: int) -> list[str]:
    """Names the files of some ranks as torch does: it counts processes from 1 on, and each has one file."""
    return [f"shard-{rank + 1:05}-model-00001-of-00001.safetensors" for rank in range(ranks)]


def is_sliced_folder(names: Sequence[str]) -> bool:
    """Whether all safetensors files of a folder are slices by their names. Whole tensors beside them come first."""
    return bool(names) and all(map(SLICE_NAME.fullmatch, names))


def read_slices(folder: AnyPath, names: Sequence[str], *, is_told: bool = False) -> BoxedCheckpoint:
    """The checkpoint of a folder of slices. Raises Refused with the faults of all files, missing ones named, unless
    something else tells which files there should be (`is_told`).
    """
    if not is_told:
        require_none(check_shard_numbers(names))
    require_none(check_unfinished(folder, names))
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


# The numbers in the names.


def parse_shard_numbers(names: Sequence[str]) -> list[tuple[int, int, int]]:
    """Of each name: the number of its process, the number of the file, and how many files there are."""
    found = map(SLICE_NAME.fullmatch, names)
    return [(int(match[1]), int(match[2]), int(match[3])) for match in found if match]


def check_shard_numbers(names: Sequence[str]) -> Iterator[Problem]:
    """Yields the files that the numbers in the names call for. How many processes there were, no name tells."""
    numbers = parse_shard_numbers(names)
    totals = sorted({total for _, _, total in numbers})
    if len(totals) > 1:
        found = f"files of {format_list(map(str, totals))} in one folder"
        yield Problem("mixed-files", names[-1], found, "files of one save", "move those of the other save elsewhere")
        return
    (total,) = totals
    shards, files = {shard for shard, _, _ in numbers}, {file for _, file, _ in numbers}
    remedy = f"{COPY_FILE_AGAIN}; or, if that process wrote nothing, number the shards without a gap"
    for shard in find_absent(shards, max(shards)):
        found = f"no such file; there are shards {format_numbers(shards)}"
        yield Problem("missing-file", f"shard-{shard:05}-model-*-of-{total:05}.safetensors", found,
                      f"shards 1-{max(shards)}, by the names", remedy)  # fmt: skip
    for file in find_absent(files, min(total, MOST_FILES)):
        found = f"no such file of any shard; there are {format_numbers(files)}"
        yield Problem("missing-file", f"shard-*-model-{file:05}-of-{total:05}.safetensors", found,
                      f"files 1-{total}, by the names", COPY_FILE_AGAIN)  # fmt: skip


def find_absent(numbers: set[int], last: int) -> list[int]:
    """The first numbers from 1 to `last` that are not there; a few more than there are."""
    most = 10 * len(numbers) + 10
    return list(islice((number for number in range(1, last + 1) if number not in numbers), most))


def note_shard_numbers(names: Sequence[str]) -> Iterator[Note]:
    """Notes what the names leave open: whether a last shard is missing, and files that some shards do not have."""
    numbers = parse_shard_numbers(names)
    shards = {shard for shard, _, _ in numbers}
    yield Note("numbering", f"{format_count(len(shards), 'shards')} are read; no file tells how many were saved")
    absent = len(shards) * numbers[0][2] - len(numbers)
    if absent > 0:
        have = {(shard, file) for shard, file, _ in numbers}
        every = ((shard, file) for shard in sorted(shards) for file in range(1, numbers[0][2] + 1))
        first = [f"shard {shard} of file {file}" for shard, file in islice((p for p in every if p not in have), 3)]
        text = f"files that are not there: {absent:,}, which is right if nothing was saved in them"
        yield Note("numbering", f"{text}: {', '.join(first)}{' ...' if absent > len(first) else ''}")
