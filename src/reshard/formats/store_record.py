"""The record of a target in a store, `reshard-store.json`: what the store told of each object when it was written."""

from collections.abc import Mapping

import msgspec

from reshard.errors import refuse
from reshard.formats.json_input import read_object
from reshard.formats.manifest import compute_manifest_checksum
from reshard.formats.safetensors import Size
from reshard.formats.target_names import LARGEST_MANIFEST, STORE_RECORD
from reshard.paths import AnyPath

RECORD_VERSION = 1


class StoredObject(msgspec.Struct, frozen=True):
    """An object as the store told of it when it was written."""

    size: Size
    """In bytes."""
    etag: str


class RecordEntries(msgspec.Struct, frozen=True):
    """The fields of a record, with their types."""

    version: int
    files: dict[str, StoredObject]


def read_store_record(folder: AnyPath) -> Mapping[str, StoredObject] | None:
    """By name, the objects of a target as they were written; None without a record. Raises Refused if it is damaged, or
    of a newer reshard.
    """
    found = read_object(folder / STORE_RECORD, LARGEST_MANIFEST)
    if found is None:
        return None
    expected, remedy = "what reshard has written", "leave --checksums-only out: then the files are read"
    if found.pop("xxh3_128", None) != (compute_manifest_checksum(found) or None):
        raise refuse("wrong-record", str(folder / STORE_RECORD), "damaged or changed", expected, remedy)
    try:
        entries = msgspec.convert(found, RecordEntries)
    except (ValueError, RecursionError):
        raise refuse("wrong-record", str(folder / STORE_RECORD), "other fields", expected, remedy) from None
    if entries.version != RECORD_VERSION:
        shown, expected = f"version {entries.version}", f"version {RECORD_VERSION}"
        raise refuse("wrong-record", str(folder / STORE_RECORD), shown, expected, f"use a newer reshard; or {remedy}")
    return entries.files
