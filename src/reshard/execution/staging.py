"""The hidden folder inside a target in which `repair` writes: what it holds, and whether a repair has begun there."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from reshard.formats.target_names import JOURNAL, LOCK_NAMES, MANIFEST, PARTIAL, list_names
from reshard.storage.local import remove_files
from reshard.text import format_size
from reshard.types import Note

STAGING = ".reshard-repair"
"""The folder inside a target in which new files are written. It is hidden, so that nobody takes them for the target's;
inside, so that a file is renamed from there within one file system.
"""


def list_staged_names(manifest: Mapping[str, Any]) -> set[str]:
    """Lists the names that a repair of a target may give to files in the folder that it writes in."""
    names = {MANIFEST, *(entry["name"] for key in ("files", "side_files") for entry in manifest[key])}
    return {JOURNAL, *LOCK_NAMES, *names, *(name + PARTIAL for name in names)}


def find_staged_files(target: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Finds the files that a repair has left, as names in its folder. Behind a link nothing is ours."""
    staging = target / STAGING
    return [] if staging.is_symlink() else sorted(list_staged_names(manifest).intersection(list_names(staging)))


def remove_staged_files(target: Path, manifest: Mapping[str, Any]) -> None:
    """Removes what a repair has left; files of other people stay. Raises OSError if it cannot."""
    remove_files(target / STAGING, find_staged_files(target, manifest))
    with suppress(OSError):
        (target / STAGING).rmdir()


def note_begun_repair(target: Path) -> Iterator[Note]:
    """Notes a repair that has begun and has not ended: its files take room, and no other command removes them."""
    staging = target / STAGING
    size = 0
    for name in list_names(staging):
        with suppress(OSError):
            size += (staging / name).lstat().st_blocks * 512
    if list_names(staging):
        way_on = "reshard repair goes on with it, or removes its files if nothing is damaged any more"
        yield Note("begun-repair", f"a repair began here and has not ended ({STAGING}, {format_size(size)}): {way_on}")
