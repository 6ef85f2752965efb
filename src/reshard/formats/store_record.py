"""The record of a target in a store, `reshard-store.json`: what the store told of each object when it was written."""

from collections.abc import Mapping

import msgspec

from reshard.errors import refuse
from reshard.formats.json_input import read_object
from reshard.formats.safetensors import Size
from reshard.formats.target_names import LARGEST_MANIFEST, STORE_RECORD
from reshard.paths import AnyPath


class StoredObject(msgspec.Struct, frozen=True):
    """An object as the store told of it when it was written."""

    size: Size
    """In bytes."""
    etag: str


class RecordEntries(msgspec.Struct, frozen=True):
    """The fields of a record, with their types."""

    objects: dict[str, StoredObject]


def read_store_record(folder: AnyPath) -> Mapping[str, StoredObject] | None:
    """By name, the objects of a target as they were written; None without a record. Raises Refused if it is not as
    reshard writes it.
    """
    found = read_object(folder / STORE_RECORD, LARGEST_MANIFEST)
    if found is None:
        return None
    try:
        return msgspec.convert(found, RecordEntries).objects
    except (ValueError, RecursionError):
        remedy = "leave --checksums-only out: then the files are read"
        subject = str(folder / STORE_RECORD)
        raise refuse("wrong-record", subject, "other fields", "what reshard has written", remedy) from None
