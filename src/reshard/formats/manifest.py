"""The manifest `reshard.json`: reads and validates it, and tells subset and origin of the source from it."""

import json
import zlib
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from xxhash import xxh3_128_hexdigest

from reshard.errors import Refused, refuse
from reshard.formats.huggingface import CONFIG, INDEX, SUFFIX
from reshard.formats.json_input import MAX_HEADER_SIZE, is_plain, is_text, read_object
from reshard.formats.ranges import parse_ranges
from reshard.formats.renaming import Renaming, StoredRenaming
from reshard.formats.safetensors import LENGTH_SIZE, Size, parse_header
from reshard.formats.target_names import LARGEST_MANIFEST, MANIFEST
from reshard.formats.tensor_uses import TensorUse
from reshard.paths import AnyPath
from reshard.text import format_list, format_numbers
from reshard.types import OriginalFile, Subset, Tensor

COUNTS = ("layers", "experts")

LONGEST_NAME = 255
"""In bytes, of a file: to ask the kernel for a longer one is an error."""

SUBSET_SOURCE = "source"
"""The key of what the source was a subset of itself."""

Number = Annotated[int, msgspec.Meta(ge=0)]


class KeptNumbers(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The layers, or the experts, that a subset keeps."""

    kept: Annotated[list[Number], msgspec.Meta(min_length=1)]
    of: int


class LeftOut(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How much a subset lacks."""

    tensors: int
    bytes: int


class SubsetEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The description of a subset, as we write it."""

    left_out: LeftOut
    layers: KeptNumbers | msgspec.UnsetType = msgspec.UNSET
    experts: KeptNumbers | msgspec.UnsetType = msgspec.UNSET
    only: Annotated[list[str], msgspec.Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET
    source: dict[str, Any] = {}
    """Of the same form, or empty: checked by `is_subset`, for they can be nested deeper than Python can call."""


class FileEntry(msgspec.Struct, frozen=True):
    """A rank file in the manifest. Other fields may stand there."""

    name: str
    rank: Size
    size: Size
    """In bytes."""
    tensors: Size
    ranges: str


class SideFileEntry(msgspec.Struct, frozen=True):
    """A side file in the manifest."""

    name: str
    size: Size
    """In bytes."""
    xxh3_128: str


class ManifestEntries(msgspec.Struct, frozen=True):
    """The fields of a manifest that are read later, with their types."""

    ranks: Size
    files: list[FileEntry]
    side_files: list[SideFileEntry]


def is_subset(value: Any) -> bool:
    """Whether a value describes a subset as we write it, or is empty: anyone can write a manifest."""
    while value:
        try:
            value = msgspec.convert(value, SubsetEntry).source
        except ValueError:  # msgspec's own errors are ValueErrors; a key that UTF-8 cannot write is another
            return False
    return isinstance(value, dict)


def count_left_out(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], known: Mapping[str, int]
) -> dict[str, int]:
    """Counts the tensors and bytes that a subset lacks, with those that it lacked before."""
    size = sum(tensor.size for tensor in before.values()) - sum(tensor.size for tensor in after.values())
    tensors = len(before) - len(after)
    return {"tensors": tensors + known.get("tensors", 0), "bytes": size + known.get("bytes", 0)}


def format_subset(subset: Mapping[str, Any]) -> str:
    """`layers 0-3 of 61, experts 0-15 of 256; 87,000 tensors left out, 600,000,000,000 bytes`."""
    return "; of a subset: ".join(format_own_subset(one) for one in list_with_sources(subset))


def list_with_sources(subset: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A subset, what it is a subset of, and so on."""
    while subset:
        yield subset
        subset = subset.get(SUBSET_SOURCE, {})


def format_own_subset(subset: Mapping[str, Any]) -> str:
    parts = [f"{key} {format_numbers(subset[key]['kept'])} of {subset[key]['of']:,}" for key in COUNTS if key in subset]
    parts += [f"only {format_list(subset['only'])}"] if "only" in subset else []
    lacking = subset["left_out"]
    return f"{', '.join(parts)}; {lacking['tensors']:,} tensors left out, {lacking['bytes']:,} bytes"


def find_asked_subset(source: Mapping[str, Any], target: Mapping[str, Any], name: str) -> Subset:
    """Finds the choice that made a target of a source, which may be a subset itself. `name` is the target's folder.

    Raises Refused if the target holds chosen tensors only, or came from another source.
    """
    if target == source:
        return Subset()
    if "only" in target:
        remedy = "verify it without --source, by the checksums of its manifest"
        raise refuse("incomplete-source", name, format_subset(target), "whole layers, to be compared", remedy)
    if target.get(SUBSET_SOURCE, {}) != source:
        found = f"a subset: {format_subset(target)}" if target else "a whole model"
        expected = f"made from this source, which is a subset: {format_subset(source)}" if source else "made from this"
        raise refuse("contradiction", name, found, expected, "name the source that it was made from")
    layers, experts = (tuple(target[key]["kept"]) if key in target else None for key in COUNTS)
    return Subset(layers, experts, renumber=True)


def list_subset_lines(subset: Mapping[str, Any]) -> Iterator[str]:
    """That this is not the whole model."""
    if subset:
        yield f"a subset: {format_subset(subset)}"


LARGEST_HEADERS = 4 * MAX_HEADER_SIZE
"""In bytes, of all headers together. A model of 1,000B parameters has 20 MB."""

LOST = ("dropped", "dequantized", "cast")
"""The uses of source tensors whose bytes the target does not hold."""


class LostEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A `TensorUse` in the manifest."""

    use: Literal[LOST]  # type: ignore[valid-type]
    what: str
    reason: str
    tensors: Size
    size: Size
    """In bytes of the source."""


class OriginEntry(msgspec.Struct, frozen=True):
    """The origin in the manifest: what the source was."""

    shapes: dict[str, list[Number]]
    headers: dict[str, str]
    """By file name: zlib-packed headers in base 64."""
    texts: dict[str, str]
    """By file name: zlib-packed JSON files in base 64."""
    lost: list[LostEntry] | None
    config: dict[str, Any] | None = None
    renamed: StoredRenaming = []


@dataclass(frozen=True, slots=True)
class Origin:
    """Nothing of it is known of what the old script has written."""

    recipe: str = ""
    """The name of the recipe."""
    config: Mapping[str, Any] | None = None
    """The model's `config.json`, as the casts have left it. Of a renamed checkpoint in its original layout: as it is in
    the file, if the renaming changed it; else None.
    """
    shapes: Mapping[str, list[int]] | None = None
    """By name: the shape of what was padded, as it was."""
    forms: tuple[OriginalFile, ...] = ()
    """The files of the checkpoint."""
    texts: Mapping[str, bytes] | None = None
    """Its config and its index, letter by letter."""
    lost: tuple[TensorUse, ...] | None = None
    """The tensors that the rank files do not have as they were; None if nobody knows."""
    raw: Mapping[str, Any] | None = None
    """As it stands in the manifest."""
    is_of_ranks: bool = False
    """Whether it is of rank files, be there a manifest or not."""
    renaming: Renaming = ()
    """The steps from the names in the original files, and in `forms`, to those of the recipe."""
    is_altered: bool = False
    """Whether the tensors are not as they lie in the files: stacked experts were taken apart, slices put together.
    These files cannot be restored.
    """


def unpack_text(text: str, most: int) -> bytes:
    """Unpacks base 64 of zlib, to at most so many bytes. Raises ValueError or zlib.error."""
    return zlib.decompressobj().decompress(b64decode(text), most)


def read_origin(manifest: Mapping[str, Any]) -> Origin:
    """Reads what a manifest tells of the source. An origin that is not as we write it is left out: anyone can write
    one.
    """
    origin, recipe = manifest.get("origin"), manifest.get("recipe")
    name = recipe.get("name") if isinstance(recipe, dict) else ""
    unknown = Origin(name if is_text(name) else "", is_of_ranks=True)
    try:
        entry = msgspec.convert(origin, OriginEntry)
        forms = unpack_original_files(entry.headers)
        texts = {
            name: unpack_text(entry.texts[name], MAX_HEADER_SIZE) for name in (CONFIG, INDEX) if name in entry.texts
        }
        lost = make_shares(entry.lost)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, zlib.error, Refused):
        return unknown
    known = entry.config, entry.shapes, forms, texts, lost, origin
    return Origin(unknown.recipe, *known, is_of_ranks=True, renaming=tuple(entry.renamed))


def make_shares(lost: list[LostEntry] | None) -> tuple[TensorUse, ...] | None:
    """The shares of an origin. Raises ValueError for a text that UTF-8 cannot write."""
    if lost is None:
        return None
    if not all(is_text(share.what) and is_text(share.reason) for share in lost):
        raise ValueError("not UTF-8")
    return tuple(TensorUse(share.use, share.what, share.reason, share.tensors, share.size) for share in lost)


def unpack_original_files(headers: Mapping[str, str]) -> tuple[OriginalFile, ...]:
    """Files by their packed headers. Raises what can be wrong with them."""
    forms, left = [], LARGEST_HEADERS
    for name, text in headers.items():
        if not (is_plain(name) and name.endswith(SUFFIX)):
            raise ValueError(name)
        forms.append(unpack_original_file(name, text))
        left -= len(forms[-1].header)
        if left < 0:
            raise ValueError(name)
    return tuple(forms)


def unpack_original_file(name: str, text: str) -> OriginalFile:
    """A file by its packed header. Raises what can be wrong with it."""
    header = unpack_text(text, MAX_HEADER_SIZE + LENGTH_SIZE)
    if int.from_bytes(header[:LENGTH_SIZE], "little") != len(header) - LENGTH_SIZE:
        raise ValueError(name)
    entries = json.loads(header[LENGTH_SIZE:])
    ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
    tensors = parse_header(header[LENGTH_SIZE:], 0, len(header) + max(ends, default=0), name)
    return OriginalFile(name, header, {tensor.name: tensor for tensor in tensors})


def read_manifest_unchecked(folder: AnyPath) -> Mapping[str, Any]:
    """As it stands there: what is told of it is a hint, so that its checksum need not be right."""
    return read_object(folder / MANIFEST, LARGEST_MANIFEST) or {}


def compute_manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """Of a manifest without its checksum: so that nobody takes a damaged one at its word."""
    try:
        return xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    except RecursionError:
        return ""  # ours is two levels deep


def read_manifest(folder: AnyPath, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a folder, or an empty one if it has none. Raises Refused if it is not as we wrote it."""
    manifest = read_object(folder / name, LARGEST_MANIFEST)
    if manifest is None:
        return {}
    found = manifest.pop("xxh3_128", None) or None  # an empty one is none
    if found != compute_manifest_checksum(manifest) or not is_well_formed(manifest):
        remedy = (
            "copy it again from another node or folder that has it; verify with --source tells whether the tensors are "
            "right; or convert into another folder"
        )
        raise refuse("wrong-manifest", str(folder / name), "damaged or changed", "what reshard has written", remedy)
    return manifest


def is_well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether all that is read of a manifest later has its type. The checksum is no secret: anyone can write one."""
    try:
        entries = msgspec.convert(manifest, ManifestEntries)
    except (ValueError, RecursionError):
        return False
    names = [*(file.name for file in entries.files), *(file.name for file in entries.side_files)]
    return (
        is_subset(manifest.get("subset", {}))
        and all(is_text(name) and is_plain(name) and len(name.encode()) <= LONGEST_NAME for name in names)
        and all(covers_file(entry.ranges, entry.size) for entry in entries.files)
    )


def covers_file(text: str, size: int) -> bool:
    """Whether a text has the ranges of a file of that size."""
    try:
        return parse_ranges(text)[-1].stop == size
    except ValueError:
        return False


def list_rank_files(manifest: Mapping[str, Any]) -> set[str]:
    """The names of the rank files that a manifest speaks of."""
    return {entry["name"] for entry in manifest.get("files", ())}


def read_subset(path: AnyPath) -> Mapping[str, Any]:
    """The part of a larger checkpoint that a folder holds, by its manifest; empty if it is whole or has no manifest."""
    subset: Mapping[str, Any] = read_valid_manifest(path).get("subset", {})
    return subset


def read_valid_manifest(path: AnyPath) -> Mapping[str, Any]:
    """The manifest of a folder; empty without one, and of a damaged one, which says nothing."""
    try:
        return read_manifest(path) if path.is_dir() else {}
    except Refused:
        return {}


def read_conversion_options(manifest: Mapping[str, Any]) -> Mapping[str, str]:
    """The options of the conversion and their values, by the manifest; a flag has the value `keep` or none."""
    layout = manifest.get("layout")
    layout = layout if isinstance(layout, dict) else {}
    flags = {"--mtp": ("keep_optional", "keep"), "--pad": ("pad", "")}
    texts = {"--cast": "cast", "--expert-dtype": "expert_dtype"}
    values = {option: layout[key] for option, key in texts.items() if isinstance(layout.get(key), str) and layout[key]}
    return values | {option: value for option, (key, value) in flags.items() if layout.get(key) is True}
