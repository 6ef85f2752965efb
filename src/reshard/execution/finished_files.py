"""The finished files of a target: they get their final names, come from the folders of shares, or are removed."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from reshard.execution.journal import TargetLock, lock_journal
from reshard.formats.share_names import parse_share_folder
from reshard.formats.target_names import JOURNAL, MANIFEST, PARTIAL, list_names
from reshard.storage.local import remove_files, sync_folder


def lock_shares(stack: ExitStack, target: Path, superseded: Sequence[str]) -> None:
    """Locks the folders of the shares that are joined, those from which something is `superseded`, until the stack
    closes. Raises Refused if a run, such as a repair, is at work there.
    """
    for folder in dict.fromkeys((target / name).parent for name in superseded if "/" in name):
        lock_journal(stack, folder / JOURNAL)


def remove_finished_files(target: Path, names: Sequence[str]) -> None:
    """Removes finished files, in their order: whatever a crash leaves of them is named by a manifest that is left."""
    others = [name for name in names if name != MANIFEST]
    for group in (others, names[len(others) :]):
        if group:
            remove_files(target, group)
            sync_folder(target)


def move_finished_files(target: Path, names: Sequence[tuple[str, str]], lock: TargetLock) -> None:
    """Moves finished files from the folders of shares. Their manifests, which are still there, vouch for them. Raises
    Refused if the lock is no more ours.
    """
    for before, after in names:
        lock.require_held()
        (target / before).rename(target / after)
    if names:
        sync_folder(target)


def rename_to_final(target: Path, names: Sequence[str], lock: TargetLock, superseded: Sequence[str] = ()) -> None:
    """Gives every file its final name, then removes the journal, and files that are superseded. A crash in between
    leaves everything to resume. Raises Refused if the lock is no more ours.
    """
    for name in names:
        partial = target / (name + PARTIAL)
        lock.require_held()
        if name == MANIFEST:  # its presence says that the others have their final names
            sync_folder(target)
        if partial.exists():
            partial.rename(target / name)
    sync_folder(target)
    with suppress(PermissionError):  # the folder above may be one that we can enter but not read
        sync_folder(target.parent)
    lock.require_held()
    remove_files(target, [*superseded, JOURNAL])
    sync_folder(target)


def remove_empty_shares(target: Path) -> None:
    """Removes the folders of shares from which all was taken, unless somebody has put a file of his own there."""
    for name in list_names(target):
        if parse_share_folder(name):
            with suppress(OSError):
                (target / name).rmdir()
