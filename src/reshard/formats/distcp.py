"""Torch's distributed checkpoints, as `.metadata` and `.distcp` files: -> BoxedCheckpoint. Nothing is unpickled."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

from reshard.errors import MOST_PROBLEMS, Problem, Refused, refuse, require_none
from reshard.formats.archive_ends import fetch_ends
from reshard.formats.boxes import Box, BoxedCheckpoint
from reshard.formats.distcp_metadata import (
    METADATA,
    StoredPart,
    gather_parts,
    measure_saved_files,
    parse_distcp_metadata,
)
from reshard.formats.huggingface import read_config
from reshard.formats.other_formats import COPY_METADATA
from reshard.formats.safetensors import compute_size
from reshard.formats.torch_archives import (
    ArchiveFault,
    ArchiveReader,
    FileWindow,
    SavedTensor,
    find_tensor_bytes,
    is_contiguous,
)
from reshard.formats.training_state import choose_weights, note_training_state
from reshard.formats.unfinished_downloads import check_unfinished, list_entries, require_finished_download
from reshard.paths import AnyPath
from reshard.storage.opened import measure_open_file, open_regular_file
from reshard.text import format_count, format_list
from reshard.types import File, Note, Tensor

SUFFIX_OF_PARTS = ".distcp"

MOST_METADATA_SIZE = 1 << 29
"""In bytes. A million parts have 200 MB."""

RANK_METADATA = re.compile(r"__\d+\.metadata")

COPY_FILE = "copy the file again from where the checkpoint was saved"

SAVE_IN_ROWS = (
    "torch saves it in rows, without a training, if all of it fits into memory: python -m"
    " torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER all.pt, the same with torch_to_dcp all.pt NEW; then"
    " name NEW"
)


def is_distcp_folder(folder: AnyPath, names: Sequence[str]) -> bool:
    """Whether a folder with these names is a `.distcp` checkpoint, whole or not."""
    if any(name.endswith(SUFFIX_OF_PARTS) for name in names):
        return True
    if METADATA not in names:
        return False
    try:
        with open_regular_file(folder / METADATA) as file:
            return b"torch.distributed.checkpoint" in file.read(4096)
    except (OSError, Refused):
        return False


def read_distcp(folder: AnyPath) -> BoxedCheckpoint:
    """The weights of a folder of `.distcp` files, each part of a tensor with its place. Raises Refused with all faults.

    One small read for each part, in the order of the file; in a store many at a time. The state of an optimizer is left
    aside and noted.
    """
    data = read_metadata_file(folder)
    found = find_weights(folder, data)
    files, boxes = find_boxes(folder, found.parts, found.least, hashlib.sha256(data).hexdigest())
    by_name: dict[str, list[Box]] = {name: [] for name in found.shapes}
    for box in boxes:
        by_name[box.part.name].append(box)
    return BoxedCheckpoint(folder, files, by_name, found.shapes, read_config(folder), found.notes)


class SavedWeights(NamedTuple):
    """The weights of a save, by its metadata."""

    shapes: dict[str, tuple[int, ...]]
    parts: list[StoredPart]
    least: Mapping[str, int]
    """The least size of each file, by all that was saved, in bytes."""
    notes: tuple[Note, ...]


def find_weights(folder: AnyPath, data: bytes) -> SavedWeights:
    """The weights by the bytes of `.metadata`; all else that it says is let go of. Raises Refused."""
    metadata = parse_distcp_metadata(data, METADATA)
    names = list(metadata.tensors)
    weights = choose_weights(names, metadata.paths)
    if not weights:
        found = f"{format_count(len(names), 'tensors')}, all of the state of a training: {format_list(names, 3)}"
        remedy = "name the folder with the model; an optimizer has one of its own beside it"
        raise refuse("empty-source", str(folder), found, "weights", remedy)
    shapes: dict[str, tuple[int, ...]] = {}
    parts: list[StoredPart] = []
    require_none(gather_parts(metadata, weights, shapes, parts))
    notes = tuple(note_training_state(names, weights, metadata.others))
    return SavedWeights(shapes, parts, measure_saved_files(metadata), notes)


def read_metadata_file(folder: AnyPath) -> bytes:
    """The bytes of `.metadata`. Raises Refused."""
    path = folder / METADATA
    try:
        require_finished_download(path)
        with open_regular_file(path) as file:
            size, _ = measure_open_file(file)
            if size > MOST_METADATA_SIZE:
                raise refuse("too-large", str(path), f"{size:,} bytes", f"at most {MOST_METADATA_SIZE:,} bytes")
            return file.read(size)
    except FileNotFoundError:
        raise refuse_without_metadata(folder) from None
    except OSError as error:
        raise refuse("cannot-read", str(path), error.strerror or str(error), "a readable file") from None


def find_saved_files(folder: AnyPath, names: Sequence[str]) -> list[File]:
    """The named files of a folder, in their order. Raises Refused, OSError."""
    digest = hashlib.sha256(read_metadata_file(folder)).hexdigest()
    files: list[File] = []
    for name in names:
        with open_regular_file(folder / name) as file:
            files.append(describe_saved_file(name, *measure_open_file(file), digest))
    return files


def describe_saved_file(name: str, size: int, version: int | str, digest: str) -> File:
    """A file of parts. What a header is to others, `.metadata` is to all of them, by its digest."""
    return File(name, size, 0, digest, version)


def refuse_without_metadata(folder: AnyPath) -> Refused:
    """Makes the refusal of a folder that has parts of tensors, and nothing that says of which."""
    expected = f"{METADATA}, which says what the {SUFFIX_OF_PARTS} files hold"
    remedy = COPY_METADATA
    if any(map(RANK_METADATA.fullmatch, list_entries(folder))):
        remedy = "the ranks saved for themselves (use_collectives=False): save again with use_collectives=True"
    elif f"{METADATA}.tmp" in list_entries(folder):
        remedy = "the save did not end: take the save before it"
    return refuse("missing-file", str(folder / METADATA), "no such file", expected, remedy)


def find_boxes(
    folder: AnyPath, parts: Sequence[StoredPart], least: Mapping[str, int], digest: str
) -> tuple[tuple[File, ...], list[Box]]:
    """The files of some parts, and the parts as boxes in the order of the files. `least` has the size of each file, by
    all that was saved. Raises Refused with all faults.
    """
    by_file: dict[str, list[StoredPart]] = {}
    for part in parts:
        by_file.setdefault(part.file, []).append(part)
    names = sorted(by_file, key=split_rank)
    require_none(check_unfinished(folder, names))
    files: list[File] = []
    boxes: list[Box] = []
    problems: list[Problem] = []
    pickles: dict[bytes, SavedTensor] = {}
    in_order = {name: sorted(by_file[name], key=attrgetter("begin")) for name in names}
    archives = {name: [(part.begin, part.size) for part in wanted] for name, wanted in in_order.items()}
    for name, ends in fetch_ends(folder, archives):
        wanted = in_order[name]
        try:
            with open_regular_file(folder / name) as file:
                size, version = measure_open_file(file)
                problems += check_length(name, wanted, least[name], size)
                if least[name] <= size:
                    window = ends or FileWindow(file.fileno())
                    problems += find_stored_parts(window, wanted, len(files), boxes, pickles)
        except FileNotFoundError:
            problems.append(describe_missing(name, wanted, names))
            continue
        except OSError as error:
            problems.append(Problem("cannot-read", name, error.strerror or str(error), "a readable file"))
            continue
        files.append(describe_saved_file(name, size, version, digest))
        if len(problems) >= MOST_PROBLEMS:
            break
    require_none(problems)
    return tuple(files), boxes


def split_rank(name: str) -> tuple[list[int], str]:
    """Sorts `__2_0.distcp` before `__10_0.distcp`."""
    return [int(number) for number in re.findall(r"\d{1,18}", name)], name


def check_length(name: str, parts: Sequence[StoredPart], least: int, size: int) -> Iterator[Problem]:
    """Yields the problem of a file that is shorter than what was saved in it, though all weights be there."""
    if size < least:
        lost = [part.tensor for part in parts if part.begin + part.size > size]
        what = f"{format_count(len(lost), 'parts')}, such as of {format_list(lost, 2)}"
        found = f"{size:,} bytes; cut off: {what if lost else 'what lies behind the weights'}"
        yield Problem("truncated-file", name, found, f"at least {least:,} bytes, as {METADATA} says", COPY_FILE)


def describe_missing(name: str, parts: Sequence[StoredPart], names: Sequence[str]) -> Problem:
    """The problem of a file that is not there, with the tensors that it has parts of."""
    tensors = format_list(dict.fromkeys(part.tensor for part in parts), 2)
    found = f"no such file; it has {format_count(len(parts), 'parts')} of tensors: {tensors}"
    return Problem("missing-file", name, found, f"{format_count(len(names), 'files')}, as {METADATA} says", COPY_FILE)


def find_stored_parts(
    window: ArchiveReader, parts: Iterable[StoredPart], file: int, boxes: list[Box], pickles: dict[bytes, SavedTensor]
) -> Iterator[Problem]:
    """Fills the boxes of the parts of a file, in their order in it; yields what is wrong with their archives."""
    for part in parts:
        size = compute_size(part.dtype, part.shape)
        begin = part.begin
        if size:
            try:
                saved, begin = find_tensor_bytes(window, part.begin, part.size, pickles)
            except ArchiveFault as fault:
                yield describe_archive(part, Problem("wrong-archive", part.file, str(fault), ""))
                continue
            except Refused as refused:
                yield from (describe_archive(part, problem) for problem in refused.problems)
                continue
            if problem := compare_saved(part, saved):
                yield problem
                continue
        boxes.append(Box(Tensor(part.tensor, part.dtype, part.shape, file, begin, size), part.offsets))


def describe_archive(part: StoredPart, problem: Problem) -> Problem:
    """The problem of bytes that are not the archive of a part, with its place and what should be there."""
    where = f"{part.file}: {part.tensor} at {list(part.offsets)}"
    expected = f"what torch.save writes for a tensor, at byte {part.begin:,}"
    return replace(problem, subject=where, expected=expected, remedy=f"{COPY_FILE}, and {METADATA} of the same save")


def compare_saved(part: StoredPart, saved: SavedTensor) -> Problem | None:
    """The problem of an archive that holds another tensor than its metadata say, or one that does not lie in rows."""
    where = f"{part.file}: {part.tensor} at {list(part.offsets)}"
    if (saved.dtype, saved.shape) != (part.dtype, part.shape):
        found = f"{saved.dtype} {list(saved.shape)}"
        expected = f"{part.dtype} {list(part.shape)}, as {METADATA} says"
        remedy = f"{COPY_FILE}: another lies in its place; or {METADATA} is of another save"
        return Problem("wrong-shape", where, found, expected, remedy)
    if not is_contiguous(saved):
        found, expected = f"strides {list(saved.stride)} for shape {list(saved.shape)}", "rows one behind the other"
        return Problem("not-contiguous", where, found, expected, SAVE_IN_ROWS)
    return None
