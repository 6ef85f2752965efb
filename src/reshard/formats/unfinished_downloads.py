"""Unfinished downloads, by what download programs leave beside a file, and the hubs in their own folders."""

import base64
import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from reshard.errors import MOST_SHOWN_PER_KIND, Problem, require_none

UNFINISHED = (
    ".aria2", ".incomplete", ".part", ".crdownload", ".download", ".opdownload", ".!ut", ".!qb", ".filepart", ".xltd",
    ".baiduyun.p.downloading",
)  # fmt: skip
"""The ends of names that download programs use until a file is whole, in small letters."""

HUB_RECORDS = (".cache/huggingface/download", ".huggingface/download")
"""In a folder that `hf download --local-dir` fills: by newer and by older versions."""

MODELSCOPE_RECORDS = "._____temp"
"""In a folder that modelscope fills."""

FINISH = "finish the download: the same command again goes on; then convert"


def list_entries(folder: Path) -> list[str]:
    """Lists the names in a folder, sorted; empty if it cannot be read."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def remove_ending(name: str) -> str | None:
    """Removes the ending of an unfinished download: `x.safetensors.part` -> `x.safetensors`; None without one."""
    for ending in UNFINISHED:
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return None


def check_unfinished(folder: Path, names: Collection[str]) -> Iterator[Problem]:
    """Reports the files of these names that are not downloaded yet, by the files beside them.

    A file may have its final name and size already: aria2 reserves both before the first byte comes.
    """
    wanted = set(names)
    entries = list_entries(folder)
    for beside in entries:
        name = remove_ending(beside)
        if name and (name in wanted or (beside in wanted and name not in entries)):
            found = f"{beside} lies beside it" if name in entries else f"only {beside}"
            remedy = f"{FINISH}; if {name} is known to be whole, move {beside} away" if name in entries else FINISH
            yield Problem("unfinished-download", str(folder / name), found, "the whole file", remedy)


def require_finished_download(path: Path) -> None:
    """Raises Refused if a file is not downloaded yet, whether it has its final name already or not."""
    require_none(check_unfinished(path.parent, [path.name]))


def find_unfinished(folder: Path, name: str) -> str | None:
    """Finds the beginning of a download of the missing file `name`: its path from the folder on; None if there is none.

    It lies beside, or in the folder where the hub's or modelscope's program keeps it until it is whole. In a snapshot
    of a hub cache it is among the blobs, whose names do not tell the file.
    """
    for beside in list_entries(folder):
        if remove_ending(beside) == name:
            return beside
    hashed = base64.urlsafe_b64encode(hashlib.sha1(f"{name}.metadata".encode(), usedforsecurity=False).digest())
    for records, begun in list_begun_records(folder):
        if begun.startswith((f"{name}.", f"{hashed.decode()}.")):
            return f"{records}/{begun}"
    if name in list_entries(folder / MODELSCOPE_RECORDS):  # to ask for the path would fail for too long a name
        return f"{MODELSCOPE_RECORDS}/{name}"
    return find_begun_blob(folder)


def list_begun_records(folder: Path) -> Iterator[tuple[str, str]]:
    """Lists what the hub's program has begun in a folder: where it keeps it, and its name there."""
    for records in HUB_RECORDS:
        yield from ((records, name) for name in list_entries(folder / records) if name.endswith(".incomplete"))


def name_begun_downloads(folder: Path, problems: Iterable[Problem]) -> Iterator[Problem]:
    """Says of missing files which downloads of them were begun; of those that are shown, for a look lists folders."""
    for number, problem in enumerate(problems):
        is_looked_for = number < MOST_SHOWN_PER_KIND and problem.kind == "missing-file"
        beside = find_unfinished(folder, problem.subject) if is_looked_for else None
        yield replace(problem, found=f"only {beside}, an unfinished download", remedy=FINISH) if beside else problem


def find_begun_blob(folder: Path) -> str | None:
    """Finds a begun download among the blobs, for a snapshot of a hub cache; None if there is none."""
    blobs = list_entries(folder.parent.parent / "blobs") if folder.parent.name == "snapshots" else []
    return next((f"../../blobs/{blob}" for blob in blobs if blob.endswith(".incomplete")), None)


def find_unfinished_weights(folder: Path) -> str | None:
    """Finds any begun download of a safetensors file in a folder that has none: its path from the folder on."""
    for beside in list_entries(folder):
        if (remove_ending(beside) or "").endswith(".safetensors"):
            return beside
    for name in list_entries(folder / MODELSCOPE_RECORDS):
        if name.endswith(".safetensors"):
            return f"{MODELSCOPE_RECORDS}/{name}"
    for records, begun in list_begun_records(folder):
        return f"{records}/{begun}"
    return find_begun_blob(folder)
