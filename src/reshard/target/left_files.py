"""The files that an unfinished run has left in its target: by its journal, which in a store is an object."""

from collections.abc import Mapping
from typing import Any

from reshard.execution.journal import has_partial_files, list_left_files
from reshard.execution.store_journal import list_job_names, list_names_beside, parse_job
from reshard.formats.manifest import list_rank_files, read_valid_manifest
from reshard.formats.part_manifests import is_part_name
from reshard.formats.share_names import list_share_folders
from reshard.formats.target_names import JOURNAL, LOCK_NAMES, PARTIAL, PROGRESS, list_names
from reshard.paths import AnyPath, RemotePath


def list_own_names(target: AnyPath) -> set[str]:
    """Lists the files that an interrupted job may have left in its target: a lock; and by its journal all others."""
    if isinstance(target, RemotePath):
        return list_own_objects(target)
    if not (target / JOURNAL).exists():
        return {*LOCK_NAMES}
    parts = {name for name in list_names(target) if name.endswith(PARTIAL) and is_part_name(name)}
    return {JOURNAL, *LOCK_NAMES, *list_left_files(target), *parts}


def list_own_objects(folder: RemotePath) -> set[str]:
    """Lists the objects that a run may have left in a store, under their final names; also of shares."""
    job = read_job(folder)
    shares = [list_job_names(read_job(folder / name), "files") for name in list_share_folders(folder)]
    beside = list_names_beside(job, folder.store.entries)
    return {JOURNAL, PROGRESS, *list_job_names(job, "files"), *beside}.union(*shares)


def has_left_files(target: AnyPath) -> bool:
    """Whether a run that has not ended has left files in a target. In a store it has ended once the manifest names all
    of its files.
    """
    if not isinstance(target, RemotePath):
        return has_partial_files(target)
    return not list_job_names(read_job(target), "files") <= list_rank_files(read_valid_manifest(target))


def read_job(folder: RemotePath) -> Mapping[str, Any]:
    """Reads the job that a run in a store is of; empty if there is none, or if its object is damaged."""
    path = folder / JOURNAL
    return parse_job(path.read_bytes()) if path.is_file() else {}
