"""The manifest `reshard.json`: reading it, and what it says of subsets and of the original checkpoint."""

import json
import zlib
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from reshard.errors import Refused, refuse
from reshard.formats.huggingface import CONFIG, INDEX, SUFFIX
from reshard.formats.json_input import MAX_HEADER_SIZE, is_plain, is_size, is_text, read_object
from reshard.formats.ranges import parse_ranges
from reshard.formats.safetensors import LENGTH_SIZE, parse_header
from reshard.formats.target_names import LARGEST_MANIFEST, MANIFEST
from reshard.text import listed, numbers_text
from reshard.types import Form, Share, Subset, Tensor

COUNTS = ("layers", "experts")

ITSELF = "source"
"""The key of what the source was a subset of itself."""

KEYS = {*COUNTS, "only", "left_out", ITSELF}


def is_subset(value: Any) -> bool:
    """Whether a value is as we write it: anyone can write a manifest."""
    while isinstance(value, dict) and value:
        kept = [value[key] for key in COUNTS if key in value]
        if not (
            set(value) <= KEYS
            and all(is_kept(entry) for entry in kept)
            and is_only(value.get("only", ["*"]))
            and is_numbers(value.get("left_out"), ("tensors", "bytes"))
        ):
            return False
        value = value.get(ITSELF, {})
    return isinstance(value, dict)


def is_only(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(pattern, str) for pattern in value)


def is_kept(value: Any) -> bool:
    """Whether a value is `{"kept": [0, 1], "of": 61}`."""
    numbers = value.get("kept") if isinstance(value, dict) else None
    return (
        isinstance(numbers, list)
        and bool(numbers)
        and all(type(number) is int and number >= 0 for number in numbers)
        and value.keys() == {"kept", "of"}
        and type(value["of"]) is int
    )


def is_numbers(value: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and value.keys() == set(keys) and all(type(value[key]) is int for key in keys)


def left_out(before: Mapping[str, Tensor], after: Mapping[str, Tensor], known: Mapping[str, int]) -> dict[str, int]:
    """What a subset lacks, and what it lacked before."""
    size = sum(tensor.size for tensor in before.values()) - sum(tensor.size for tensor in after.values())
    tensors = len(before) - len(after)
    return {"tensors": tensors + known.get("tensors", 0), "bytes": size + known.get("bytes", 0)}


def subset_text(subset: Mapping[str, Any]) -> str:
    """`layers 0-3 of 61, experts 0-15 of 256; 87,000 tensors left out, 600,000,000,000 bytes`."""
    return "; of a subset: ".join(own_text(one) for one in with_sources(subset))


def with_sources(subset: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A subset, what it is a subset of, and so on."""
    while subset:
        yield subset
        subset = subset.get(ITSELF, {})


def own_text(subset: Mapping[str, Any]) -> str:
    parts = [f"{key} {numbers_text(subset[key]['kept'])} of {subset[key]['of']:,}" for key in COUNTS if key in subset]
    parts += [f"only {listed(subset['only'])}"] if "only" in subset else []
    lacking = subset["left_out"]
    return f"{', '.join(parts)}; {lacking['tensors']:,} tensors left out, {lacking['bytes']:,} bytes"


def asked_of(source: Mapping[str, Any], target: Mapping[str, Any], name: str) -> Subset:
    """What was asked of a source, itself perhaps a subset, to get a target; `name` is that of the target's folder.

    Raises Refused if the target holds chosen tensors only, or came from another source.
    """
    if target == source:
        return Subset()
    if "only" in target:
        remedy = "verify it without --source, by the checksums of its manifest"
        raise refuse("incomplete-source", name, subset_text(target), "whole layers, to be compared", remedy)
    if target.get(ITSELF, {}) != source:
        found = f"a subset: {subset_text(target)}" if target else "a whole model"
        expected = f"made from this source, which is a subset: {subset_text(source)}" if source else "made from this"
        raise refuse("contradiction", name, found, expected, "name the source that it was made from")
    layers, experts = (tuple(target[key]["kept"]) if key in target else None for key in COUNTS)
    return Subset(layers, experts, renumber=True)


def subset_lines(subset: Mapping[str, Any]) -> Iterator[str]:
    """That this is not the whole model."""
    if subset:
        yield f"a subset: {subset_text(subset)}"


LARGEST_HEADERS = 4 * MAX_HEADER_SIZE
"""In bytes, of all headers together. A model of 1,000B parameters has 20 MB."""

LOST = ("dropped", "dequantized", "cast")
"""The uses of tensors that do not come back as they were."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Nothing of it is known of what the old script has written."""

    recipe: str = ""
    """The name of the recipe."""
    config: Mapping[str, Any] | None = None
    """The model's `config.json`, as the casts have left it."""
    shapes: Mapping[str, list[int]] | None = None
    """By name: the shape of what was padded, as it was."""
    forms: tuple[Form, ...] = ()
    """The files of the checkpoint."""
    texts: Mapping[str, bytes] | None = None
    """Its config and its index, letter by letter."""
    lost: tuple[Share, ...] | None = None
    """What of it is not in the rank files as it was; None if nobody knows."""
    raw: Mapping[str, Any] | None = None
    """As it stands in the manifest."""
    is_of_ranks: bool = False
    """Whether it is of rank files, be there a manifest or not."""


def unpacked(text: str, most: int) -> bytes:
    """Raises what can be wrong with it."""
    return zlib.decompressobj().decompress(b64decode(text), most)


def read_origin(manifest: Mapping[str, Any]) -> Origin:
    """What a manifest tells; of what is not as we write it nothing, for anyone can write one."""
    origin, recipe = manifest.get("origin"), manifest.get("recipe")
    name = recipe.get("name") if isinstance(recipe, dict) else ""
    unknown = Origin(name if isinstance(name, str) and is_text(name) else "", is_of_ranks=True)
    if not isinstance(origin, dict):
        return unknown
    config, shapes, headers, texts = (origin.get(key) for key in ("config", "shapes", "headers", "texts"))
    if not (config is None or isinstance(config, dict)) or not (isinstance(headers, dict) and isinstance(texts, dict)):
        return unknown
    try:
        require_shapes(shapes)
        forms = forms_of(headers)
        known = {name: unpacked(texts[name], MAX_HEADER_SIZE) for name in (CONFIG, INDEX) if name in texts}
        lost = shares_of(origin["lost"])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, zlib.error, Refused):
        return unknown
    return Origin(unknown.recipe, config, shapes, forms, known, lost, origin, is_of_ranks=True)


def shares_of(lost: Any) -> tuple[Share, ...] | None:
    """Raises what can be wrong with them."""
    if lost is None:
        return None
    shares = tuple(Share(**fields) for fields in lost)
    for share in shares:
        if not all(map(is_text, (share.use, share.what, share.reason))):
            raise ValueError(share)
        if share.use not in LOST or not (is_size(share.tensors) and is_size(share.size)):
            raise ValueError(share)
    return shares


def forms_of(headers: Mapping[str, str]) -> tuple[Form, ...]:
    """Files by their packed headers. Raises what can be wrong with them."""
    forms, left = [], LARGEST_HEADERS
    for name, text in headers.items():
        if not (is_plain(name) and name.endswith(SUFFIX)):
            raise ValueError(name)
        forms.append(form_of(name, text))
        left -= len(forms[-1].header)
        if left < 0:
            raise ValueError(name)
    return tuple(forms)


def require_shapes(shapes: Any) -> None:
    """Shapes by name. Raises what can be wrong with them."""
    for shape in shapes.values():
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(shape)


def form_of(name: str, text: str) -> Form:
    """A file by its packed header. Raises what can be wrong with it."""
    header = unpacked(text, MAX_HEADER_SIZE + LENGTH_SIZE)
    if int.from_bytes(header[:LENGTH_SIZE], "little") != len(header) - LENGTH_SIZE:
        raise ValueError(name)
    entries = json.loads(header[LENGTH_SIZE:])
    ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
    tensors = parse_header(header[LENGTH_SIZE:], 0, len(header) + max(ends, default=0), name)
    return Form(name, header, {tensor.name: tensor for tensor in tensors})


def manifest_at(folder: Path) -> Mapping[str, Any]:
    """As it stands there: what is told of it is a hint, so that its checksum need not be right."""
    return read_object(folder / MANIFEST, LARGEST_MANIFEST) or {}


FILE_TYPES = {"name": str, "rank": int, "size": int, "tensors": int, "ranges": str}

SIDE_TYPES = {"name": str, "size": int, "xxh3_128": str}


def own_checksum(manifest: Mapping[str, Any]) -> str:
    """Of a manifest without its checksum: so that nobody takes a damaged one at its word."""
    try:
        return xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    except RecursionError:
        return ""  # ours is two levels deep


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, or an empty one if it has none. Raises Refused if it is not as we wrote it."""
    manifest = read_object(folder / MANIFEST, LARGEST_MANIFEST)
    if manifest is None:
        return {}
    found = manifest.pop("xxh3_128", None)
    if found != own_checksum(manifest) or not is_well_formed(manifest):
        remedy = "verify with --source, or convert into another folder"
        raise refuse("wrong-manifest", str(folder / MANIFEST), "damaged or changed", "what reshard has written", remedy)
    return manifest


def is_well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether all that is read of a manifest later has its type. The checksum is no secret: anyone can write one."""
    files, sides = manifest.get("files"), manifest.get("side_files")
    if not (isinstance(files, list) and isinstance(sides, list) and is_size(manifest.get("ranks"))):
        return False
    if not is_subset(manifest.get("subset", {})):
        return False
    return all(has_types(entry, FILE_TYPES) and is_ranges(entry["ranges"], entry["size"]) for entry in files) and all(
        has_types(entry, SIDE_TYPES) for entry in sides
    )


def has_types(entry: Any, types: Mapping[str, type]) -> bool:
    """Whether an entry has at least these fields: a plain name, sizes and texts."""
    if not isinstance(entry, dict) or not all(type(entry.get(key)) is wanted for key, wanted in types.items()):
        return False
    sizes = [entry[key] for key, wanted in types.items() if wanted is int]
    return all(map(is_size, sizes)) and is_text(entry["name"]) and is_plain(entry["name"])


def is_ranges(text: str, size: int) -> bool:
    """Whether a text has the ranges of a file of that size."""
    try:
        return parse_ranges(text)[-1].stop == size
    except ValueError:
        return False


def file_names_of(manifest: Mapping[str, Any]) -> set[str]:
    """The names of the rank files that a manifest speaks of."""
    return {entry["name"] for entry in manifest.get("files", ())}


def subset_of(path: Path) -> Mapping[str, Any]:
    """What of a larger checkpoint a folder holds, by its manifest; empty if it is whole, or has no manifest of ours."""
    subset: Mapping[str, Any] = known_manifest(path).get("subset", {})
    return subset


def known_manifest(path: Path) -> Mapping[str, Any]:
    """The manifest of a folder; empty without one, and of a damaged one, which says nothing."""
    try:
        return read_manifest(path) if path.is_dir() else {}
    except Refused:
        return {}
