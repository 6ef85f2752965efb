"""Fingerprints of what several processes work at together: all must see the same files."""

import json
import socket
from collections.abc import Sequence
from typing import Any

from xxhash import xxh3_128_hexdigest

from reshard.errors import refuse
from reshard.types import File, Share


def describe_file(file: File) -> list[Any]:
    """Describes a file as JSON values. On another machine a file has another time of change; in a store, a version."""
    return [file.name, file.size, file.header_hash, file.version if isinstance(file.version, str) else ""]


def compute_fingerprint(facts: Sequence[Any]) -> str:
    """Computes the fingerprint of JSON values that are to be equal on all machines."""
    return xxh3_128_hexdigest(json.dumps(facts).encode())


def require_fingerprint(share: Share, found: str) -> None:
    """Raises Refused if what is read on this machine is not what another one has asked about."""
    if share.fingerprint not in ("", found):
        where = f"other files on {socket.gethostname()}"
        remedy = "they must lie under the same path on every machine, as on a shared disk or in a store"
        raise refuse("another-job", f"share {share}", where, "what the other machines have", remedy)
