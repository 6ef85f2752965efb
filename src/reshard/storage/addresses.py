"""Opens what lies behind an address: a repository on the hub, a bucket, a folder on a web server.

The module of a kind of store is named here, and imported when one is opened: who reads a disk needs no sockets.
"""

import re
from collections.abc import Mapping
from importlib import import_module

from reshard.paths import RemotePath
from reshard.storage.target_store import TargetStore

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", re.DOTALL)
"""An address as a path has it: a path has one slash where the address had two."""

SECRETS = re.compile(r"(.*?https?:/+)(?:[^/?#]*@)?([^?#]*)([?#].*)?", re.DOTALL | re.IGNORECASE)
"""In an address of a web server: a name with a password, and a query, which may be a key. The address may stand behind
an option.
"""

OPENERS: Mapping[str, str] = {
    "az": "reshard.storage.buckets:open_bucket",
    "gs": "reshard.storage.buckets:open_bucket",
    "hf": "reshard.storage.hub:open_hub",
    "http": "reshard.storage.web_folder:open_web",
    "https": "reshard.storage.web_folder:open_web",
    "s3": "reshard.storage.buckets:open_bucket",
}
"""By the scheme of an address, in small letters: the function that takes it and what stands behind it."""

TARGET_OPENER, WRITTEN = "reshard.storage.target_buckets:open_target_store", ("s3", "gs", "az")
"""The function that takes an address to be written to, and the schemes of such addresses."""


def hide_secrets(text: str) -> str:
    """A text, which may be an address, without what is secret in that of a web server."""
    found = SECRETS.fullmatch(text)
    return f"{found[1]}{found[2]}{'?...' if found[3] else ''}" if found else text


def open_address(address: str) -> RemotePath | None:
    """Opens what lies behind an address, and lists it; None if it is no address, or not one that can be read. Raises
    Refused.
    """
    found = ADDRESS.fullmatch(address)
    scheme = found[1].lower() if found else ""
    if not found or scheme not in OPENERS:
        return None
    module, function = OPENERS[scheme].split(":")
    opened: RemotePath = getattr(import_module(module), function)(scheme, found[2])
    return opened


def open_target_address(address: str) -> tuple[RemotePath, TargetStore] | None:
    """Opens the folder of a store behind an address, to write to it: as it is now, and what writes; None if it is no
    address, or not one that is written to. Raises Refused.
    """
    found = ADDRESS.fullmatch(address)
    if not found or found[1].lower() not in WRITTEN:
        return None
    module, function = TARGET_OPENER.split(":")
    folder, store = getattr(import_module(module), function)(address)
    return folder, store
