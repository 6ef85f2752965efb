"""Writes `reshard-store.json` as a conversion into a bucket does, of a folder that is served as one."""

import json
from pathlib import Path

from store_servers import ServedFolder
from xxhash import xxh3_128_hexdigest

RECORD = "reshard-store.json"


def write_record(folder: Path, served: ServedFolder) -> None:
    """The sizes and ETags of all files, as they are now."""
    files = {
        path.name: {"size": path.stat().st_size, "etag": f'"{served.hash_file(path)[:32]}"'}
        for path in folder.iterdir()
        if path.name not in (RECORD, "reshard.json")
    }
    seal_record(folder, {"version": 1, "files": files})


def seal_record(folder: Path, record: dict[str, object]) -> None:
    """Writes a record with its checksum."""
    checksum = xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())
    (folder / RECORD).write_text(json.dumps({**record, "xxh3_128": checksum}))
