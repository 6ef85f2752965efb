"""Unfinished downloads, by what download programs leave beside a file, and the hubs in their own folders."""

import base64
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from reshard.errors import MOST_EXPLAINED, Problem, require_none
from reshard.paths import AnyPath, RemotePath
from reshard.text import format_count

UNFINISHED = (
    ".aria2", ".incomplete", ".part", ".crdownload", ".download", ".opdownload", ".!ut", ".!qb", ".filepart", ".xltd",
    ".baiduyun.p.downloading",
)  # fmt: skip
"""The ends of names that download programs use until a file is whole, in small letters."""

HUB_RECORDS = (".cache/huggingface/download", ".huggingface/download")
"""In a folder that `hf download --local-dir` fills: by newer and by older versions."""

BEGUN_RECORD = re.compile(r"(.+?)\.[^.]+(?:\.[0-9a-f]{8})?\.incomplete", re.DOTALL)
"""`LABEL.HASH.incomplete` among these records; newer versions have eight digits of their own before the ending."""

MODELSCOPE_RECORDS = "._____temp"
"""In a folder that modelscope fills."""

BLOBS = "../../blobs"
"""From a snapshot in the hub's cache: where the files are that its links lead to."""

BEGUN_BLOB = re.compile(r"([^.]+)(?:\.[0-9a-f]{8})?\.incomplete")
"""`HASH.incomplete` among them; with the same digits."""

# Not "it goes on": newer versions of the hub's program begin an unfinished file anew.
FINISH = "finish the download: run it again until it ends; then convert"


def list_entries(folder: AnyPath) -> list[str]:
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


def check_unfinished(folder: AnyPath, names: Collection[str]) -> Iterator[Problem]:
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


def require_finished_download(path: AnyPath) -> None:
    """Raises Refused if a file is not downloaded yet, whether it has its final name already or not."""
    require_none(check_unfinished(path.parent, [path.name]))


def list_labels(name: str) -> tuple[str, str]:
    """Lists what the hub's program may call the beginning of a file: its name, or in the same folder a hash of it."""
    inner, slash, last = name.rpartition("/")
    digest = hashlib.sha1(f"{last}.metadata".encode(errors="replace"), usedforsecurity=False).digest()
    return name, f"{inner}{slash}{base64.urlsafe_b64encode(digest).decode()}"


def parse_begun_label(path: str) -> str | None:
    """Parses the path of a file among the hub's records: the label of what was begun; None for any other file."""
    inner, slash, last = path.rpartition("/")
    found = BEGUN_RECORD.fullmatch(last)
    return f"{inner}{slash}{found[1]}" if found else None


def find_unfinished(folder: AnyPath, name: str) -> str | None:
    """Finds the beginning of a download of the missing file `name`, and says where it lies; None if there is none.

    It lies beside, or in the folder where the hub's or modelscope's program keeps it until it is whole. In a snapshot
    of a hub cache it is among the blobs: only a link to nothing tells which of them.
    """
    inner, slash, last = name.rpartition("/")
    for beside in list_entries(folder / inner):
        if remove_ending(beside) == last:
            return f"an unfinished download: {inner}{slash}{beside} has its beginning"
    labels = list_labels(name)
    for records in HUB_RECORDS:
        # Not by its own name, of a hundred characters.
        begun = list_entries(folder / records / inner)
        if any(parse_begun_label(f"{inner}{slash}{entry}") in labels for entry in begun):
            return f"an unfinished download: {records} has its beginning"
    if last in list_entries(folder / MODELSCOPE_RECORDS / inner):
        return f"an unfinished download: {MODELSCOPE_RECORDS} has its beginning"
    blobs = list_begun_blobs(folder)
    if blob := read_link_name(folder / name):
        return f"an unfinished download: {BLOBS} has its beginning" if blob in blobs else None
    return f"{BLOBS} has {format_count(len(blobs), 'unfinished downloads')}" if blobs else None


def read_link_name(path: AnyPath) -> str:
    """The last name of the path that a link leads to; empty for anything else."""
    if isinstance(path, RemotePath):  # no store has links
        return ""
    try:
        return path.readlink().name
    except OSError:
        return ""


def list_begun_blobs(folder: AnyPath) -> list[str]:
    """Lists the hashes of the files that were begun in a hub cache, and are not there whole; `folder` is a snapshot."""
    if isinstance(folder, RemotePath):
        return []
    real = Path(os.path.realpath(folder))
    entries = set(list_entries(real.parent.parent / "blobs")) if real.parent.name == "snapshots" else set()
    return sorted({found[1] for entry in entries if (found := BEGUN_BLOB.fullmatch(entry))} - entries)


def name_begun_downloads(folder: AnyPath, problems: Iterable[Problem]) -> Iterator[Problem]:
    """Says of missing files where their downloads were begun; of the first, for each look lists folders."""
    for number, problem in enumerate(problems):
        is_looked_for = number < MOST_EXPLAINED and problem.kind == "missing-file"
        begun = find_unfinished(folder, problem.subject) if is_looked_for else None
        yield replace(problem, found=f"no such file, but {begun}", remedy=FINISH) if begun else problem


def find_unfinished_weights(folder: AnyPath) -> str | None:
    """Finds begun downloads of any weights in a folder that has none, and says where; None if there are none."""
    for beside in list_entries(folder):
        if (remove_ending(beside) or "").endswith(".safetensors"):
            return beside
    for name in list_entries(folder / MODELSCOPE_RECORDS):
        if name.endswith(".safetensors"):
            return f"{MODELSCOPE_RECORDS}/{name}"
    for records in HUB_RECORDS:
        if any(map(parse_begun_label, list_entries(folder / records))):
            return f"unfinished downloads in {records}"
    return f"unfinished downloads in {BLOBS}" if list_begun_blobs(folder) else None
