"""Writes `reshard-store.json` as a conversion into a bucket does, of a folder that is served as one."""

import json
from pathlib import Path

from store_servers import ServedFolder

RECORD = "reshard-store.json"


def write_record(folder: Path, served: ServedFolder) -> None:
    """The sizes and ETags of all files, as they are now."""
    files = {
        path.name: {"size": path.stat().st_size, "etag": f'"{served.hash_file(path)[:32]}"'}
        for path in folder.iterdir()
        if path.name not in (RECORD, "reshard.json")
    }
    (folder / RECORD).write_text(json.dumps({"objects": files}))
