"""Mends a finished target: writes what is lost beside its rank files, and removes what a crash has left."""

from contextlib import ExitStack
from pathlib import Path

from reshard.errors import Refused, refuse, require_none
from reshard.execution.execute import refuse_unwritable
from reshard.execution.finished_files import remove_empty_shares, rename_to_final
from reshard.execution.journal import has_partial_files, lock_journal
from reshard.execution.parts import PART_SIZE
from reshard.execution.side_writer import write_side_files
from reshard.execution.store_journal import check_noted_uploads, remove_job
from reshard.execution.store_objects import put_side_file, remove_finished_objects, write_store_record
from reshard.formats.share_names import parse_share_folder
from reshard.formats.target_names import (
    JOURNAL,
    LOCK_NAMES,
    MANIFEST,
    PARTIAL,
    PROGRESS,
    STORE_RECORD,
    list_names,
)
from reshard.paths import AnyPath
from reshard.storage.counting import WorkCounter
from reshard.storage.local import write_durable
from reshard.target.left_files import has_left_files
from reshard.target.places import StoredFolder
from reshard.target.state import TargetState, list_lost_sides, require_same


def mend_target(state: TargetState) -> list[str]:
    """Writes the side files and the manifest of its part that a finished target lacks, and returns their names; removes
    what a job that crashed after its last rename has left.

    Raises Refused if they cannot be written, or if side files are missing while other ranks are half written: that job
    must end first.
    """
    target, sides = state.folder, list_lost_sides(state)
    part = [state.part] if state.part and not (target / state.part).exists() else []
    if has_left_files(target):
        if sides:
            found, remedy = "an unfinished conversion of other ranks", "run its command again, then this one"
            raise refuse("another-job", str(target / JOURNAL), found, "none", remedy)
        return []
    has_notes = isinstance(state.place, StoredFolder) and (target / PROGRESS).exists()
    is_left = any((target / name).exists() for name in (JOURNAL, *LOCK_NAMES))
    if not (sides or part or state.superseded or is_left or has_notes or has_empty_share(target)):
        return []
    if isinstance(state.place, Path):
        mend_folder(state, state.place, sides, part)
    else:
        mend_stored_folder(state, state.place, sides, part)
    return [*sides, *part]


def has_empty_share(target: AnyPath) -> bool:
    """Whether a crash has left the folder of a share that was joined."""
    folders = [target / name for name in list_names(target) if parse_share_folder(name)]
    return any(folder.is_dir() and not list_names(folder) for folder in folders)


def mend_folder(state: TargetState, target: Path, sides: list[str], part: list[str]) -> None:
    """Mends a folder of this machine, while no other run is at work there. Raises Refused."""
    try:
        with ExitStack() as stack:
            lock = lock_journal(stack, target / JOURNAL)
            require_same(state)
            if has_partial_files(target):
                raise refuse_begun(state)
            write_side_files(target, {name: state.sides[name] for name in sides}, WorkCounter(None, 0), lock)
            for name in part:
                write_durable(target / (name + PARTIAL), (target / MANIFEST).read_bytes())
            rename_to_final(target, [*sides, *part], lock, state.superseded)
            remove_empty_shares(target)
    except OSError as error:
        raise refuse_unwritable(target, error) from None


def refuse_begun(state: TargetState) -> Refused:
    """Makes the refusal where another run has begun since the target was looked at."""
    return refuse("target-changed", str(state.folder), "another run has begun there", "none", "run it again")


def mend_stored_folder(state: TargetState, place: StoredFolder, sides: list[str], part: list[str]) -> None:
    """Mends a folder in a store, where nothing is locked: a run that begins meanwhile loses nothing but what it has
    noted. Raises Refused.
    """
    store, folder = place.store, place.folder
    seen = (folder / JOURNAL).read_bytes() if (folder / JOURNAL).is_file() else None
    require_same(state)
    if store.get(JOURNAL) != seen:
        raise refuse_begun(state)
    require_none(check_noted_uploads(seen or b"", store))
    etags = {}
    for name in sides:
        side = state.sides[name]
        etags[name] = side.size, put_side_file(store, name, side, PART_SIZE)[0]
    if etags:
        store.put(STORE_RECORD, write_store_record(store.get(STORE_RECORD), list_names(folder), etags))
    for name in part:
        store.put(name, (folder / MANIFEST).read_bytes())
    remove_finished_objects(store, state.superseded)
    remove_job(store)
