"""Where a target is written: into a folder of this machine, or into one in a store."""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from reshard.errors import Refused
from reshard.formats.remote_names import add_other_way, require_target, restore_address, suggest_upload
from reshard.paths import AnyPath, RemotePath
from reshard.storage.addresses import open_target_address, require_plain_addresses
from reshard.storage.target_store import TargetStore
from reshard.text import make_path


class StoredFolder(NamedTuple):
    """A folder in a store that a target is written to."""

    folder: RemotePath
    """As it was when it was opened."""
    store: TargetStore
    """That writes to it."""


TargetPlace = Path | StoredFolder
"""A folder that a target is written to: of this machine, or in a store."""


def get_folder(place: TargetPlace) -> AnyPath:
    """The path of a folder that a target is written to, to read what lies there."""
    return place if isinstance(place, Path) else place.folder


def open_target(given: str | os.PathLike[str]) -> TargetPlace:
    """Opens the folder that a target is to be written to; it need not be there. Raises Refused for an empty string, and
    for an address where nothing can be written.
    """
    require_plain_addresses("target-not-folder", given)
    address = restore_address(make_path(os.fspath(given)))
    try:
        opened = open_target_address(address)
    except Refused as refused:
        raise add_upload(refused, address) from None
    return StoredFolder(*opened) if opened else require_target(given, is_written=True)


def open_again(place: TargetPlace) -> AnyPath:
    """The path of a folder, as it is now; as it was if the store does not tell: what was written is written."""
    with suppress(Refused):
        return get_folder(open_now(place))
    return get_folder(place)


def open_now(place: TargetPlace) -> TargetPlace:
    """Opens the same folder as it is now. Raises Refused."""
    return place if isinstance(place, Path) else open_target(place.store.address)


def add_upload(refused: Refused, address: str) -> Refused:
    """Adds to the refusal of a store that cannot be asked from here how to upload to it elsewhere."""
    return add_other_way(refused, address, suggest_upload(make_path(address)))
