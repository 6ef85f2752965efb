"""The `.metadata` of a torch distributed checkpoint: its tensors, their parts, and the place of each part in a file."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeGuard

from reshard.errors import Problem, refuse
from reshard.formats.inert_pickle import read_pickle
from reshard.formats.json_input import MAX_INTEGER, is_plain, is_size, is_text
from reshard.formats.pickle_machine import Global, Inert
from reshard.formats.safetensors import MAX_DIMENSIONS
from reshard.formats.torch_dtypes import TORCH_DTYPES, UNREAD_DTYPES

METADATA = ".metadata"

CLASSES = "torch.distributed.checkpoint.metadata."

TENSOR, BYTES, PART = (f"{CLASSES}{name}StorageMetadata" for name in ("Tensor", "Bytes", "Chunk"))

INDEX_OF_PART, PROPERTIES = f"{CLASSES}MetadataIndex", f"{CLASSES}TensorProperties"

PLACE = "torch.distributed.checkpoint.filesystem._StorageInfo"

METADATA_CLASSES = frozenset(
    {
        f"{CLASSES}Metadata",
        "megatron.core.dist_checkpointing.mapping.MCoreMetadata",
        "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
    }
)
"""torch's own, and a class of Megatron with a field more."""

OLD = "torch.distributed._shard.sharded_tensor.metadata."
"""Where torch had some of the classes before 2.3."""

ALLOWED_CLASSES = METADATA_CLASSES.union(
    TORCH_DTYPES,
    UNREAD_DTYPES,
    {TENSOR, BYTES, PART, INDEX_OF_PART, PROPERTIES, PLACE},
    {f"{CLASSES}{name}" for name in ("_MEM_FORMAT_ENCODING", "StorageMeta")},
    {f"{OLD}{name}" for name in ("TensorProperties", "MEM_FORMAT_ENCODING")},
    {"torch.Size", "torch.serialization._get_layout", "collections.OrderedDict", "builtins.getattr"},
    {f"{module}.{name}Path" for module in ("pathlib", "pathlib._local") for name in ("Posix", "PurePosix", "Windows")},
)
"""The classes and functions that `.metadata` names, by torch 2.1 to 2.13."""

SAVED_BY_TORCH = "the metadata that torch.distributed.checkpoint writes"

COPY_AGAIN = "copy .metadata and the .distcp files again, all of one save"


class StoredPart(NamedTuple):
    """A part of a tensor, and the archive that has it."""

    tensor: str
    """The name."""
    dtype: str
    """As safetensors spells it."""
    offsets: tuple[int, ...]
    """Of its first element in the tensor, in elements."""
    shape: tuple[int, ...]
    """In elements."""
    file: str
    begin: int
    """Of the archive, in bytes from the start of the file."""
    size: int
    """Of the archive, in bytes."""


@dataclass(frozen=True, slots=True)
class DistcpMetadata:
    """What `.metadata` says, with the values of its pickle looked at where they are needed only."""

    tensors: Mapping[str, Inert]
    """By name: the shape and the parts of each tensor, not looked at yet."""
    others: tuple[str, ...]
    """Names of entries that are no tensors, such as the step of a training."""
    paths: Mapping[str, tuple[Any, ...]]
    """Name -> the keys of the nested mappings that it was flattened from, where that is known."""
    places: Mapping[tuple[str, tuple[int, ...]], Inert]
    """Name and offsets of a part -> its place in a file, not looked at yet."""


def parse_distcp_metadata(data: bytes, name: str) -> DistcpMetadata:
    """What the bytes of the file `name` say. Raises Refused."""
    value = read_pickle(data, ALLOWED_CLASSES, name)
    state = value.state if type(value) is Inert and value.name in METADATA_CLASSES else None
    found = state if type(state) is dict else {}
    described, stored = found.get("state_dict_metadata"), found.get("storage_data")
    if type(described) is not dict or type(stored) is not dict:
        raise refuse("wrong-metadata", name, "a pickle of another thing", SAVED_BY_TORCH, COPY_AGAIN)
    if not all(map(is_text, described)):
        raise refuse("wrong-metadata", name, "a tensor whose name is no text", SAVED_BY_TORCH, COPY_AGAIN)
    tensors = {key: entry for key, entry in described.items() if type(entry) is Inert and entry.name == TENSOR}
    paths = found.get("planner_data")
    known = paths.items() if type(paths) is dict else ()
    return DistcpMetadata(
        tensors,
        tuple(key for key in described if key not in tensors),
        {key: path for key, path in known if type(path) is tuple},
        dict(gather_places(stored, name)),
    )


def gather_places(stored: Mapping[Any, Any], name: str) -> Iterator[tuple[tuple[str, tuple[int, ...]], Inert]]:
    """Yields name and offsets of each part with its place. Raises Refused if one stands twice."""
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for key, place in stored.items():
        fields = get_fields(key, INDEX_OF_PART)
        tensor, offsets = fields.get("fqn"), fields.get("offset")
        if type(tensor) is str and is_shape(offsets) and type(place) is Inert:
            index: tuple[str, tuple[int, ...]] = tensor, offsets
            if index in seen:
                found = f"two places for the part of {tensor} at {list(offsets)}"
                raise refuse("wrong-metadata", name, found, SAVED_BY_TORCH, COPY_AGAIN)
            seen.add(index)
            yield index, place


def measure_saved_files(metadata: DistcpMetadata) -> dict[str, int]:
    """The least size of each file, in bytes, by the places of all parts: those of the state of an optimizer too."""
    least: dict[str, int] = {}
    for place in metadata.places.values():
        fields = get_fields(place, PLACE)
        file, begin, size = fields.get("relative_path"), fields.get("offset"), fields.get("length")
        if is_text(file) and isinstance(begin, int) and isinstance(size, int):
            least[file] = max(least.get(file, 0), begin + size)
    return least


def get_fields(value: Any, kind: str) -> Mapping[str, Any]:
    """The fields of a value of a class; none if it is another thing."""
    is_one = type(value) is Inert and value.name == kind and type(value.state) is dict
    return value.state if is_one else {}


def is_shape(value: Any) -> TypeGuard[tuple[int, ...]]:
    """Whether a value is a shape, or offsets, in elements."""
    return type(value) is tuple and len(value) <= MAX_DIMENSIONS and all(map(is_size, value))


class MetadataFault(ValueError):
    """A fault of a tensor in `.metadata`: the kind of the problem, what was found, and what was expected."""


def gather_parts(
    metadata: DistcpMetadata, names: Iterable[str], shapes: dict[str, tuple[int, ...]], parts: list[StoredPart]
) -> Iterator[Problem]:
    """Fills the shapes and parts of the named tensors; yields their faults."""
    seen: set[int] = set()
    for name in names:
        try:
            shape, found = describe_tensor(metadata, name, seen)
        except MetadataFault as fault:
            kind, said, expected = fault.args
            yield Problem(kind, f"{METADATA}: {name}", said, expected, COPY_AGAIN if kind == "wrong-metadata" else "")
            continue
        shapes[name] = shape
        parts += found


def describe_tensor(metadata: DistcpMetadata, name: str, seen: set[int]) -> tuple[tuple[int, ...], list[StoredPart]]:
    """The shape of a tensor, and its parts. `seen` holds the identities of earlier lists of parts: a hostile pickle can
    name a long one for each of many tensors. Raises MetadataFault.
    """
    fields = get_fields(metadata.tensors[name], TENSOR)
    dtype, shape, chunks = read_dtype(fields.get("properties")), fields.get("size"), fields.get("chunks")
    if not is_shape(shape) or prod(filter(None, shape)) > MAX_INTEGER or type(chunks) is not list:
        raise MetadataFault("wrong-metadata", "no shape, or no list of parts", "both")
    if id(chunks) in seen:
        raise MetadataFault("wrong-metadata", "the list of parts of another tensor", "a list of its own")
    seen.add(id(chunks))
    by_offsets: dict[tuple[int, ...], tuple[int, ...]] = {}
    for chunk in chunks:
        part = get_fields(chunk, PART)
        offsets, sizes = part.get("offsets"), part.get("sizes")
        if not (is_shape(offsets) and is_shape(sizes) and len(offsets) == len(sizes) == len(shape)):
            raise MetadataFault("wrong-metadata", "a part without offsets and sizes", "a number for each dimension")
        if any(offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)):
            found = f"a part {list(sizes)} at {list(offsets)}"
            raise MetadataFault("wrong-metadata", found, f"parts within the shape {list(shape)}")
        # Replicas have one place. A rank without any element may share the offsets of a rank with some.
        if 0 in by_offsets.get(offsets, (0,)):
            by_offsets[offsets] = sizes
        elif sizes != by_offsets[offsets] and 0 not in sizes:
            raise MetadataFault("wrong-metadata", f"two parts of different shapes at {list(offsets)}", "one")
    found_parts = [find_part_place(metadata, name, dtype, offsets, sizes) for offsets, sizes in by_offsets.items()]
    return shape, found_parts


def read_dtype(properties: Any) -> str:
    """The dtype, as safetensors spells it. Raises MetadataFault."""
    state = properties.state if type(properties) is Inert else None
    named = None
    if type(state) is tuple and state:
        named = state[0]
    elif type(state) is dict:
        named = state.get("dtype")
    if type(named) is not Global:
        raise MetadataFault("wrong-metadata", "no dtype", "the dtype of each tensor")
    dtype = TORCH_DTYPES.get(named.name)
    if dtype is None:
        raise MetadataFault("unknown-dtype", f"dtype {named.name}", "one of " + ", ".join(TORCH_DTYPES))
    return dtype


def find_part_place(
    metadata: DistcpMetadata, name: str, dtype: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> StoredPart:
    """A part with its place. Raises MetadataFault."""
    fields = get_fields(metadata.places.get((name, offsets)), PLACE)
    file, begin, size = fields.get("relative_path"), fields.get("offset"), fields.get("length")
    where = f"the part at {list(offsets)}"
    if fields.get("transform_descriptors"):
        expected = "files as torch writes them without extensions (`_extensions` of FileSystemWriter)"
        raise MetadataFault("other-format", f"{where} is compressed or transformed", expected)
    if not (is_text(file) and isinstance(begin, int) and is_size(begin) and isinstance(size, int) and is_size(size)):
        raise MetadataFault("wrong-metadata", f"no place of {where}", "a file, an offset and a length")
    if not is_plain(file):
        raise MetadataFault("unsafe-file-name", f"{where} in {file[:200]!r}", "the name of a file in the folder")
    return StoredPart(name, dtype, offsets, sizes, file, begin, size)
