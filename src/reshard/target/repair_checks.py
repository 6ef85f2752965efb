"""Checks that a repair can write: the places of the damaged files, and the folder and the room for the new ones."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from reshard.errors import Problem
from reshard.execution.staging import STAGING, find_staged_files, list_staged_names
from reshard.formats.target_names import list_names
from reshard.target.repair_plan import CONVERT_ANEW, Damage, RepairPlan
from reshard.target.room import check_folder, check_space
from reshard.target.state import MOVE_AND_REPEAT
from reshard.verification.checksums import Audit

REPAIR_ROOM = (
    "make room on this disk, or repair fewer --ranks at a time: the new files lie beside the damaged ones first"
)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder itself, not a link to one: files of ours lie nowhere else."""
    return path.is_dir() and not path.is_symlink()


def check_places(target: Path, names: Iterable[str]) -> Iterator[Problem]:
    """Reports folders, pipes and the like where a file has to be written: no file can be renamed there."""
    for path in (target / name for name in names):
        if path.exists() and not path.is_file():
            found = "a folder" if path.is_dir() else "no file"
            yield Problem("cannot-write", str(path), found, "a file, or no such name", MOVE_AND_REPEAT)


def check_staging(audit: Audit[Path], work: RepairPlan) -> Iterator[Problem]:
    """Checks that the new files can be written beside the damaged ones, which stay until the new ones are proven."""
    staging = audit.target / STAGING
    if os.path.lexists(staging) and not is_folder(staging):
        found = "a link" if staging.is_symlink() else "a file"
        yield Problem("target-not-folder", str(staging), found, "a folder, or no such name", MOVE_AND_REPEAT)
    else:
        ours, remedy = list_staged_names(audit.manifest), "move them elsewhere, and run the same command again"
        present = list_names(staging)
        for problem in check_folder(work.plan.path, staging, work.size, ours, present, remedy, REPAIR_ROOM):
            is_denied = problem.kind == "no-permission"
            yield replace(problem, remedy=f"make it writable, {CONVERT_ANEW}") if is_denied else problem


def check_repair_space(audit: Audit[Path], damage: Damage) -> Iterator[Problem]:
    """Checks that damaged files can be written beside those that are there, before anything of a source is known."""
    size = sum(entry.size for entry in damage.files) + sum(entry["size"] for entry in damage.sides)
    if size:
        ours = find_staged_files(audit.target, audit.manifest)
        yield from check_space(audit.target / STAGING, size, {*ours}, REPAIR_ROOM)
