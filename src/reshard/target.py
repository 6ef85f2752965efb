"""The target folder: everything that could refuse a job there is looked at before its first byte is written."""

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from reshard.errors import Problem
from reshard.journal import JOURNAL
from reshard.text import size_text

PARTIAL = ".partial"
"""What a name ends in until the file is whole and durable."""


def our_names(target: Path, names: Iterable[str]) -> set[str]:
    """What an interrupted job that was to write `names` may have left in its target. Without its journal: nothing.

    Of which job the journal is, it says itself; the partial files of another one are ours as well.
    """
    if not (target / JOURNAL).exists():
        return set()
    return {JOURNAL, *names, *(name for name in names_in(target) if name.endswith(PARTIAL))}


def target_problems(source: Path, target: Path, needed: int, ours: set[str]) -> Iterator[Problem]:
    """Why the `needed` bytes cannot be written to the folder `target`, which may or may not be there yet, and may hold
    files of `ours` but no others.
    """
    resolved, origin = target.resolve(), source.resolve()
    if resolved.is_relative_to(origin if origin.is_dir() else origin / "no folder"):
        yield Problem("target-inside-source", str(target), f"inside {source}", "a folder elsewhere", "another target")
        return
    if target.exists() and not target.is_dir():
        yield Problem("target-not-folder", str(target), "a file", "a folder, or no such name", "another target")
        return
    if names := [name for name in names_in(target) if name not in ours]:
        found = f"{len(names)} files: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        yield Problem("target-not-empty", str(target), found, "an empty folder, or none", "another target, or empty it")
    above = nearest_folder(target)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        yield Problem("no-permission", str(above), "not a folder that we may write to", "write permission", "")
        return
    longest = os.pathconf(above, "PC_NAME_MAX")
    if long := [part for part in target.parts if len(os.fsencode(part)) > longest]:
        yield Problem(
            "wrong-name", long[0], f"{len(os.fsencode(long[0]))} bytes", f"at most {longest}", "another target"
        )
    free = shutil.disk_usage(above).free + sum(allocated(target / name) for name in ours if name.endswith(PARTIAL))
    if free < needed:
        found = f"{free:,} bytes free ({size_text(free)})"
        expected = f"{needed:,} bytes ({size_text(needed)})"
        yield Problem("no-space", str(above), found, expected, "make room, another target, or fewer --ranks at a time")


def is_side(path: Path) -> bool:
    """Whether a path is a file that could go along: not a folder, not hidden, as a shell's `*` has it."""
    return path.is_file() and not path.name.startswith(".")


def allocated(path: Path) -> int:
    """What a file takes of the disk, in bytes."""
    return path.stat().st_blocks * 512 if path.exists() else 0


def names_in(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest thing above it that exists."""
    return next(above for above in (path.absolute(), *path.absolute().parents) if above.exists())


def side_files(folder: Path, patterns: Iterable[str], carried: Iterable[str]) -> dict[str, Path]:
    """The files of a folder that go along, by name: those that fit a pattern and are not `carried` already."""
    patterns, taken = list(patterns), set(carried)
    found = {path.name: path for pattern in patterns for path in sorted(folder.glob(pattern)) if is_side(path)}
    return {name: path for name, path in sorted(found.items()) if name not in taken}
