"""Folders of buckets as targets: what lies there, and the store that is written to."""

import re
from typing import NamedTuple

from reshard.errors import refuse
from reshard.paths import RemotePath
from reshard.storage.access_hints import KEYS_OF, suggest_keys, suggest_server
from reshard.storage.buckets import BucketStore, list_bucket, make_bucket, run_in_store
from reshard.storage.range_requests import Denied
from reshard.storage.remote_store import has_plain_parts, try_again
from reshard.storage.s3_signing import find_s3_access
from reshard.storage.s3_uploads import PartedTarget
from reshard.storage.streamed_uploads import StreamedTarget, make_streaming_bucket
from reshard.storage.target_store import TargetStore
from reshard.storage.whole_objects import refuse_missing_bucket
from reshard.text import ADDRESS


class OpenedTarget(NamedTuple):
    """A folder of a bucket that is written to."""

    folder: RemotePath
    """What lay there when it was opened; nothing, if there was no such folder."""
    store: TargetStore


def open_target_store(address: str) -> OpenedTarget:
    """Opens a folder of a bucket to write to: `s3://BUCKET/FOLDER`. Raises Refused."""
    scheme, name, inner = split_target_address(address)
    folder, prefix = f"{scheme}://{name}" + (f"/{inner}" if inner else ""), f"{inner}/" if inner else ""
    bucket = make_bucket(scheme, name, folder)
    try:
        entries = try_again(folder, lambda: run_in_store(list_bucket(bucket, prefix, folder)), suggest_server(scheme))
    except FileNotFoundError:
        raise refuse_missing_bucket(folder) from None
    except Denied as denied:
        remedy = suggest_keys(scheme, str(denied))
        raise refuse("no-access", folder, str(denied), "a bucket that we may list and write to", remedy) from None
    access = find_s3_access(name) if scheme == "s3" else None
    store: TargetStore = (
        PartedTarget(folder, bucket, prefix, access)
        if access
        else StreamedTarget(folder, bucket, prefix, make_streaming_bucket(scheme, name, folder))
    )
    return OpenedTarget(RemotePath(BucketStore(scheme, folder, bucket, prefix, entries)), store)


def split_target_address(address: str) -> tuple[str, str, str]:
    """Splits an address that is to be written to into scheme, bucket and folder, which may be empty. Raises Refused."""
    found = ADDRESS.fullmatch(address)
    scheme = found[1].lower() if found else ""
    if not found or scheme not in KEYS_OF:
        shown = re.sub(r"//[^/]*@|\?.*", "//...", address, flags=re.DOTALL)  # what may be secret
        expected, remedy = "a folder, or s3://, gs:// or az://", "convert into a folder, then upload it"
        raise refuse("target-not-folder", shown, "an address that is not written to", expected, remedy)
    name, _, inner = found[2].strip("/").partition("/")
    address, expected = f"{scheme}://{found[2]}", f"{scheme}://BUCKET/FOLDER"
    if not name or (inner and not has_plain_parts(inner)):
        raise refuse("target-not-folder", address, "no folder of a bucket", expected, "is the address right?")
    if inner.endswith(".safetensors"):
        raise refuse(
            "target-not-folder", address, "the name of a file", expected, "give the folder that it is to be in"
        )
    return scheme, name, inner
