"""Checks that files can be written to a folder: that nothing of other people lies there; and on this machine its
permissions, names and room.
"""

import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from reshard.errors import Problem
from reshard.formats.target_names import list_names
from reshard.paths import AnyPath, RemotePath
from reshard.text import format_count, format_list, format_size

MORE_ROOM = "make room, another target, or fewer --ranks at a time"


def check_folder(
    source: AnyPath,
    target: Path,
    needed: int,
    ours: set[str],
    present: Collection[str],
    remedy: str = "another target",
    room: str = MORE_ROOM,
) -> Iterator[Problem]:
    """Checks that `needed` bytes can be written to the folder `target`. The folder need not exist; if it does, it may
    hold only files named in `ours`, and hidden ones: no file of ours has such a name, and macOS and git write them.

    `present` has the names that were there before `ours` was found out: a run that has begun since then is met by its
    lock, and what it writes is not called a stranger's. `remedy` is for other files there, `room` for a full disk.
    """
    if isinstance(source, Path) and source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        yield Problem("target-inside-source", str(target), f"inside {source}", "a folder elsewhere", "another target")
        return
    if target.exists() and not target.is_dir():
        yield Problem("target-not-folder", str(target), "a file", "a folder, or no such name", "another target")
        return
    yield from check_strangers(target, {*present}.intersection(list_names(target)) - ours, remedy)
    denied = [*check_permission(find_nearest_folder(target))]
    yield from denied
    if not denied:
        yield from check_name_lengths(target)
        yield from check_space(target, needed, ours, room)


def check_strangers(target: AnyPath, names: Iterable[str], remedy: str) -> Iterator[Problem]:
    """Reports files in a target that are not of its conversion."""
    if found := sorted(name for name in names if not name.startswith(".")):
        listed = f"{format_count(len(found), 'files')}: {format_list(found, 4)}"
        yield Problem("target-not-empty", str(target), listed, "an empty folder, or none", remedy)


def check_stored_folder(source: AnyPath, folder: RemotePath, present: Iterable[str], remedy: str) -> Iterator[Problem]:
    """Checks that a folder in a store may be written to: it is not in the source, and `present`, what lies there beside
    the files of the conversion, is hidden. Room and permission are the store's matter.
    """
    if str(folder) == str(source) or str(folder).startswith(f"{source}/"):
        found, expected = f"inside {source}", "a folder elsewhere"
        yield Problem("target-inside-source", str(folder), found, expected, "another target")
        return
    yield from check_strangers(folder, present, remedy)


def check_permission(folder: Path) -> Iterator[Problem]:
    """Checks that files and folders can be made in an existing folder."""
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        found, remedy = "not a folder that we may write to", "write permission, or another target"
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            found, remedy = "on a read-only file system", "have it mounted for writing, or another target"
        yield Problem("no-permission", str(folder), found, "a folder that we may write to", remedy)


def check_name_lengths(target: Path) -> Iterator[Problem]:
    """Checks that the file system allows names as long as those in a path."""
    longest = os.pathconf(find_nearest_folder(target), "PC_NAME_MAX")
    for part in target.parts:
        if len(os.fsencode(part)) > longest:
            yield Problem("wrong-name", part, f"{len(os.fsencode(part))} bytes", f"at most {longest}", "another target")


def check_space(target: Path, needed: int, ours: set[str], room: str = MORE_ROOM) -> Iterator[Problem]:
    """Checks that `needed` bytes fit on the disk of a target, in which the files named in `ours` are replaced."""
    above = find_nearest_folder(target)
    free = shutil.disk_usage(above).free + sum(measure_allocated(target / name) for name in ours)
    if free < needed:
        found = f"{free:,} bytes free ({format_size(free)})"
        expected = f"{needed:,} bytes ({format_size(needed)})"
        yield Problem("no-space", str(above), found, expected, room)


def measure_allocated(path: Path) -> int:
    """Measures the disk space that is free once a file is removed, in bytes: none of what a link points to, and of what
    has other names.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def find_nearest_folder(path: Path) -> Path:
    """Finds the nearest existing path: the path itself, or one above it."""
    return next(above for above in (path.absolute(), *path.absolute().parents) if above.exists())
