"""The names of manifest, journal, lock, partial files and a store's record; whether a conversion has finished."""

from reshard.errors import refuse
from reshard.paths import AnyPath

MANIFEST = "reshard.json"

LARGEST_MANIFEST = 1 << 30
"""In bytes. A model of 671B parameters has one of 12 MB."""

JOURNAL = "reshard.journal"

PROGRESS = "reshard.journal.d"
"""In a store, which appends to nothing: the folder of what the journal would have."""

PARTIAL = ".partial"

LOCK = "reshard.lock"
"""Where the kernel's locks are not to be trusted: the lock on the journal beside it."""

LOCK_NAMES = (LOCK, LOCK + PARTIAL, JOURNAL + PARTIAL)
"""What there is of a lock: itself, and while it is taken over from a run that has ended."""

STORE_RECORD = "reshard-store.json"
"""Of a target in a store: the size and the ETag of every object, as the store told them when they were written."""


def require_finished(folder: AnyPath) -> None:
    """Raises Refused if a folder holds a conversion that has not ended. Where the same conversion for other ranks has
    ended before, there is something to look at.
    """
    if (folder / JOURNAL).is_file() and not (folder / MANIFEST).exists():
        expected, remedy = (
            f"a finished one, which has a {MANIFEST}",
            "run the same convert again: it goes on from there; `reshard inspect` says how far it is",
        )
        raise refuse("unfinished-target", str(folder), "an unfinished conversion", expected, remedy)


def list_names(folder: AnyPath) -> list[str]:
    """Lists the names in a folder, sorted; empty if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []
