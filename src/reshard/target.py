"""The target folder: everything that could refuse a job there is looked at before its first byte is written."""

import os
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from reshard.books import MANIFEST
from reshard.errors import Problem, require_none
from reshard.journal import JOURNAL, PARTIAL, left_names
from reshard.read import SUFFIX
from reshard.text import size_text


def our_names(target: Path) -> set[str]:
    """What an interrupted job may have left in its target, by its journal; without a journal nothing is ours."""
    if not (target / JOURNAL).exists():
        return set()
    return {JOURNAL, *left_names(target)}


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
    free = shutil.disk_usage(above).free + sum(allocated(target / name) for name in ours)
    if free < needed:
        found = f"{free:,} bytes free ({size_text(free)})"
        expected = f"{needed:,} bytes ({size_text(needed)})"
        yield Problem("no-space", str(above), found, expected, "make room, another target, or fewer --ranks at a time")


def is_side(path: Path) -> bool:
    """Whether a path is a file that could go along: not a folder, not hidden, as a shell's `*` has it, no part of the
    checkpoint itself and nothing that we keep books in. A link to nothing was to be a file.
    """
    is_ours = path.name in (MANIFEST, JOURNAL) or path.name.endswith(PARTIAL)
    is_checkpoint = path.name.endswith((SUFFIX, SUFFIX + ".index.json"))
    return (path.is_file() or is_lost(path)) and not (path.name.startswith(".") or is_ours or is_checkpoint)


def is_lost(path: Path) -> bool:
    """Whether a path is a link to nothing."""
    return path.is_symlink() and not path.exists()


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


def side_files(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """The files of a folder that fit a pattern and go along, by name. Raises Refused if one is a link to nothing."""
    fitting = [name for name in names_in(folder) if any(fnmatchcase(name, pattern) for pattern in patterns)]
    found = {name: folder / name for name in fitting if is_side(folder / name)}
    lost = [str(path) for path in found.values() if is_lost(path)]
    expected, remedy = "a file that goes along", "download it again, or remove the link"
    require_none(Problem("missing-file", path, "a link to nothing", expected, remedy) for path in lost)
    return found
