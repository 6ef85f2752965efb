"""Fingerprints of what several processes work at together: all must see the same files."""

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from reshard.errors import refuse
from reshard.paths import AnyPath
from reshard.storage.file_systems import FUSE, find_kind
from reshard.storage.local import refuse_unreadable
from reshard.types import Share


def describe_file(path: AnyPath) -> list[Any]:
    """Describes the very file that lies under a path, as JSON values: one file on a shared disk is the same from every
    machine, but a copy of it is another, which may have other bytes. Raises Refused.
    """
    if not isinstance(path, Path):
        return [path.entry.size, path.entry.version]
    with refuse_unreadable(path):
        status = path.stat()
    number = status.st_ino if find_kind(path) != FUSE else 0  # which there each machine may choose for itself
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, number]


def compute_fingerprint(facts: Sequence[Any]) -> str:
    """Computes the fingerprint of JSON values that are to be equal on all machines."""
    return xxh3_128_hexdigest(json.dumps(facts).encode())


def require_all_compared(compared: int, expected: int, what: str) -> None:
    """Raises Refused if several processes have, added up, not compared what one would have."""
    if compared != expected:
        remedy = "run it again; without --on it is done by one process"
        raise refuse("another-job", "all shares", f"{compared:,} {what} compared", f"{expected:,}", remedy)


def require_fingerprint(share: Share, found: str) -> None:
    """Raises Refused if what is read on this machine is not what another one has asked about."""
    if share.fingerprint not in ("", found):
        where = f"other files on {socket.gethostname()}"
        remedy = "they must lie under the same path on every machine, as on a shared disk or in a store"
        raise refuse("another-job", f"share {share}", where, "what the other machines have", remedy)
