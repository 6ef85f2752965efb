"""Recognises torch's distributed checkpoints by the names in a folder, and reads them."""

from collections.abc import Iterator, Sequence

from reshard.formats.boxes import BoxedCheckpoint
from reshard.formats.dcp_safetensors import read_slices
from reshard.formats.distcp import SUFFIX_OF_PARTS, find_saved_files, is_distcp_folder, read_distcp
from reshard.formats.huggingface import is_safetensors_name, list_safetensors_files, read_header_text
from reshard.formats.part_manifests import require_target_of_shares
from reshard.formats.slice_names import is_sliced_folder
from reshard.formats.unfinished_downloads import list_entries
from reshard.paths import AnyPath
from reshard.storage.remote_store import fetch_heads
from reshard.text import format_list
from reshard.types import File, Note


def read_boxed(path: AnyPath, *, is_told: bool = False) -> BoxedCheckpoint | None:
    """The checkpoint of a folder of `.distcp` files, or of safetensors files that are slices; None if it is neither.
    Of slices the names are counted, unless the manifest of our own tells which files there should be (`is_told`).

    A folder with safetensors files that are whole is an ordinary checkpoint, whatever else lies in it. Raises Refused.
    """
    names = list_entries(path) if path.is_dir() else ()
    if slices := list_slices(names):
        return read_slices(path, slices, is_told=is_told)
    return read_distcp(path) if holds_distcp(path, names) else None


def is_boxed_folder(path: AnyPath) -> bool:
    """Whether a path is such a folder, by the names in it."""
    names = list_entries(path) if path.is_dir() else ()
    return bool(list_slices(names)) or holds_distcp(path, names)


def list_slices(names: Sequence[str]) -> list[str]:
    """Lists the safetensors files among the names of a folder, sorted, if all are slices by their names; else none."""
    weights = sorted(filter(is_safetensors_name, names))
    return weights if is_sliced_folder(weights) else []


def holds_distcp(folder: AnyPath, names: Sequence[str]) -> bool:
    """Whether a folder with these names holds `.distcp` files, and no safetensors files."""
    return bool(names) and not any(map(is_safetensors_name, names)) and is_distcp_folder(folder, names)


def list_whole_files(path: AnyPath) -> list[str]:
    """Lists the names of the safetensors files at a path, sorted; none of a folder of boxes. Raises Refused as
    `list_safetensors_files`.
    """
    require_target_of_shares(path)
    return [] if is_boxed_folder(path) else list_safetensors_files(path)


def note_distcp_beside(path: AnyPath) -> Iterator[Note]:
    """Notes `.distcp` files in a folder of safetensors files that are whole: those are not read."""
    names = list_entries(path) if path.is_dir() else ()
    if beside := [name for name in names if name.endswith(SUFFIX_OF_PARTS)]:
        reason = "the safetensors files are the checkpoint; to read these, move them and .metadata into another folder"
        yield Note("left-aside", f"left aside: {format_list(beside, 3)}; {reason}")


def find_stored_files(folder: AnyPath, names: Sequence[str]) -> list[File]:
    """The named files of a checkpoint of any format, in their order. Their tensors are not looked at. Raises Refused,
    OSError.
    """
    if all(map(is_safetensors_name, names)):
        fetch_heads(folder, names)
        return [read_header_text(folder / name)[0] for name in names]
    return find_saved_files(folder, names)
