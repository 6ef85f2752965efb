"""The tensor files of a target as its manifest describes them, with their ranges."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from xxhash import xxh3_128

from reshard.errors import refuse
from reshard.formats.part_manifests import choose_of_one_conversion, is_of_whole_files, read_manifests
from reshard.formats.ranges import CheckedRange, parse_ranges
from reshard.formats.target_names import MANIFEST
from reshard.paths import AnyPath
from reshard.storage.opened import measure_path, open_regular_file
from reshard.text import format_numbers
from reshard.verification.target_folder import refuse_ranks_of_whole_files

PIECE_SIZE = 4 << 20
"""In bytes: so much of a side file is read at a time."""


class ManifestFile(NamedTuple):
    """A file of the target, as the manifest describes it."""

    name: str
    rank: int
    """Of whole files a running number."""
    size: int
    """In bytes."""
    tensors: int
    """How many."""
    ranges: tuple[CheckedRange, ...]


def read_audited_manifests(target: AnyPath) -> Mapping[str, Mapping[str, Any]]:
    """The manifest of a target and those of other parts of the same conversion, by file name. Raises Refused if there
    is none.
    """
    if manifests := choose_of_one_conversion(read_manifests(target)):
        return manifests
    remedy = "verify it against what it was made from, with --source; or if it is a download, with --download"
    raise refuse("no-manifest", str(target), f"no {MANIFEST}", "a folder that reshard has written", remedy)


def choose_entries(
    known: Sequence[ManifestFile], ranks: Collection[int], manifest: Mapping[str, Any]
) -> list[ManifestFile]:
    """Chooses the files of some ranks. Raises Refused for ranks that no manifest here names, and for whole files."""
    if is_of_whole_files(manifest):
        raise refuse_ranks_of_whole_files()
    if unknown := set(ranks) - {entry.rank for entry in known}:
        expected = f"of ranks {format_numbers(entry.rank for entry in known)}, which {MANIFEST} names"
        raise refuse(
            "unknown-rank", "--ranks", f"rank {min(unknown)}", expected, "name some of these, or give --source"
        )
    return [entry for entry in known if entry.rank in ranks]


def read_manifest_files(manifest: Mapping[str, Any], target: AnyPath) -> list[ManifestFile]:
    """The files that a manifest names. Raises Refused if the manifest is not as reshard writes it."""
    entries = [parse_manifest_file(entry) for entry in manifest["files"]]
    if not entries or any(entry.ranges[-1].stop != entry.size for entry in entries):
        remedy = "copy it here again"
        raise refuse("wrong-manifest", str(target / MANIFEST), "not what reshard writes", "files with ranges", remedy)
    return entries


def parse_manifest_file(entry: Mapping[str, Any]) -> ManifestFile:
    ranges = parse_ranges(entry["ranges"])
    return ManifestFile(
        PurePath(entry["name"]).name, int(entry["rank"]), int(entry["size"]), int(entry["tensors"]), ranges
    )


def read_file_size(path: AnyPath) -> int | None:
    """The size of a file in bytes; None if there is no such file."""
    return measure_path(path) if path.is_file() else None


def compute_file_checksum(path: AnyPath) -> str:
    """The xxh3-128 of a file of any size, in hexadecimal. Raises OSError, Refused."""
    digest = xxh3_128()
    with open_regular_file(path) as file:
        while piece := file.read(PIECE_SIZE):
            digest.update(piece)
    return digest.hexdigest()
