"""Opens what lies behind an address: a repository on the hub, a bucket, a folder on a web server.

The module of a kind of store is named here, and imported when one is opened: who reads a disk needs no sockets.
"""

import os
import re
from collections.abc import Mapping
from importlib import import_module

from reshard.errors import refuse
from reshard.paths import RemotePath
from reshard.storage.access_hints import KEYS_OF
from reshard.storage.target_store import TargetStore
from reshard.text import ADDRESS, hide_in_address, hide_secrets

BUCKET_ADDRESS = re.compile(r"(s3|gs|az):(/+)(([^/]*).*)", re.DOTALL | re.IGNORECASE)

BUCKET_NAME = re.compile(r"[A-Za-z0-9._$-]+")

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


def require_plain_addresses(kind: str, *given: str | os.PathLike[str] | None) -> None:
    """Raises Refused, of a kind of problems, for the address of a bucket that names none, and for one with keys in it:
    nobody would take them from there. In a text the slashes are counted; a path has lost one of them.
    """
    for one in given:
        found = BUCKET_ADDRESS.fullmatch(os.fspath(one or ""))
        if not found:
            continue
        scheme, slashes, rest, bucket = found[1].lower(), found[2], found[3], found[4]
        address, expected = hide_secrets(os.fspath(one or "")), f"{scheme}://BUCKET/FOLDER"
        if not bucket or slashes not in (("//",) if isinstance(one, str) else ("//", "/")):
            raise refuse(kind, address, "an address without a bucket", expected, "is a variable not set?")
        if not BUCKET_NAME.fullmatch(bucket) or hide_in_address(f"{scheme}://", rest) != (rest, False):
            remedy = f"keys stand in the environment: {KEYS_OF[scheme]}"
            remedy += "; AWS_ENDPOINT_URL names another server" if scheme == "s3" else ""
            raise refuse(kind, address, "no name of a bucket, or keys in the address", expected, remedy)


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
