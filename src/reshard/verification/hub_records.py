"""Finds what the downloaders of the Hugging Face hub leave beside the files: the hash that the hub has of each.

In a folder that was downloaded into, `.cache/huggingface/download/NAME.metadata` has three lines: the revision, the
hash, the time. In the hub's cache, each file is a link to `blobs/HASH`. The hash is the SHA-256 of a large file, or the
SHA-1 of git of a small one.
"""

import base64
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from reshard.errors import Problem, Refused, refuse
from reshard.formats.unfinished_downloads import HUB_RECORDS
from reshard.storage.local import open_regular_file
from reshard.text import format_count, format_list
from reshard.types import Note
from reshard.verification.file_hashes import FileRecord, FileRecords

OWN_FOLDERS = {".cache", ".huggingface", ".git"}

RECORD_SUFFIX, UNFINISHED_SUFFIX = ".metadata", ".incomplete"

MOST_RECORD_SIZE = 4096
"""In bytes."""

HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")

COMMIT = re.compile(r"[0-9a-f]{40}")

BEGUN_RECORD = re.compile(rf"(.+)\.({HASH.pattern}){re.escape(UNFINISHED_SUFFIX)}", re.DOTALL)

HASHED_LABEL = re.compile(r"[\w-]{27}=")
"""The SHA-1 of a name, as newer versions of the downloader have it."""

REPOSITORY = re.compile(r"models--([\w.-]+)")

MOST_LINKS = 40
"""Links to links that are followed: as many as Linux follows."""


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """The repository that files came from, as far as it is known, and the options of `hf download` that name its place
    on this machine.
    """

    repository: str
    commit: str
    """The revision of most files; empty if it is not known."""
    place: str


class UnfinishedFile(NamedTuple):
    """A file that a download has begun and not finished."""

    folder: str
    """Within the checkpoint, with a `/` at its end; empty for the checkpoint itself."""
    label: str
    """The name of the file, or a hash of it."""
    digest: str
    size: int
    """Of what is there, in bytes."""


def find_hub_records(folder: Path, names: Sequence[str], expected: Iterable[str]) -> FileRecords:
    """The records of the hub for the files of a folder, whose names are given; `expected` are names that should be
    there. Raises Refused if there is no record at all.
    """
    require_no_cache_root(folder)
    records, problems, unfinished = read_local_records(folder)
    blobs = {name: blob for name in names if name not in records if (blob := find_blob(folder / name))}
    records.update((name, FileRecord(name, blob.name, find_snapshot(folder))) for name, blob in blobs.items())
    if not records and not problems:
        raise refuse_without_records(folder)
    commits = Counter(record.commit for record in records.values() if record.commit)
    origin = identify_origin(folder, blobs if 2 * len(blobs) > len(records) else {}, commits)
    known = set(records)
    left = {name: describe_unfinished_blob(blob) for name, blob in blobs.items() if not blob.exists()}
    for part in unfinished:
        name = find_unfinished_name(part, {*known, *expected})
        if name.startswith(HUB_RECORDS) or not (folder / name).exists():
            left[name] = f"an unfinished download, of {part.size:,} bytes so far"
    return FileRecords(
        "the hub", records, partial(describe_hub_fetch, origin), tuple(problems), left, tuple(note_revisions(commits))
    )


def require_no_cache_root(folder: Path) -> None:
    """Raises Refused for the folder of a repository in the hub's cache: its files are in a snapshot of it."""
    if not ((folder / "blobs").is_dir() and (folder / "snapshots").is_dir()):
        return
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = read_text(folder / "refs" / "main")
    chosen = [path for path in snapshots if path.name == main] or snapshots
    remedy = f"one of its snapshots: {format_list(map(str, chosen))}" if chosen else "download it again"
    raise refuse("empty-source", str(folder), "a repository of the hub's cache", "the folder of a snapshot", remedy)


def refuse_without_records(folder: Path) -> Refused:
    """The refusal of a folder without a record of the hub; names the folder above that has records of it."""
    place = folder.resolve()
    remedy = "give a list of checksums with --sums FILE; or download again by `hf download` into a folder of its own"
    for above in place.parents:
        if any((above / records / place.relative_to(above)).is_dir() for records in HUB_RECORDS):
            remedy = f"its records lie in a folder above it: verify {above}"
            break
    return refuse("no-record", str(folder), "no record of the hub beside the files", "one for each file", remedy)


def read_local_records(folder: Path) -> tuple[dict[str, FileRecord], list[Problem], list[UnfinishedFile]]:
    """The records in a folder that was downloaded into; the problems are of records that cannot be used."""
    records: dict[str, FileRecord] = {}
    problems: list[Problem] = []
    unfinished: list[UnfinishedFile] = []
    for root in (folder / place for place in HUB_RECORDS):
        for name in list_files(root):
            if name.endswith(RECORD_SUFFIX):
                record = parse_record(name.removesuffix(RECORD_SUFFIX), read_text(root / name))
                if isinstance(record, FileRecord):
                    records.setdefault(record.name, record)
                else:
                    problems.append(record)
            elif part := parse_unfinished_name(root, name):
                unfinished.append(part)
    return records, [problem for problem in problems if problem.subject not in records], unfinished


def list_files(folder: Path) -> list[str]:
    """The names of all files in a folder and its subfolders, sorted, but none of the hub's or git's own folders, or
    behind links to folders. Raises Refused if one cannot be listed.
    """
    found = []
    for root, folders, names in os.walk(folder, onerror=raise_unlistable):
        folders[:] = [name for name in folders if name not in OWN_FOLDERS]
        inner = Path(root).relative_to(folder).as_posix()
        found += names if inner == "." else [f"{inner}/{name}" for name in names]
    return sorted(found)


def raise_unlistable(error: OSError) -> None:
    """Raises Refused, unless the folder is not there."""
    if not isinstance(error, FileNotFoundError):
        raise refuse("cannot-read", str(error.filename), error.strerror or str(error), "a folder that can be listed")


def read_text(path: Path) -> str:
    """The first bytes of a small file as text; empty if it cannot be read."""
    try:
        with open_regular_file(path) as file:
            return file.read(MOST_RECORD_SIZE).decode(errors="replace").strip()
    except OSError:
        return ""


def parse_record(name: str, text: str) -> FileRecord | Problem:
    """The record of a file, or the problem if it is damaged, or has no hash of the content."""
    lines = [line.strip() for line in text.split("\n")]
    tag = lines[1] if len(lines) > 1 else ""
    # As HTTP has it: W/"tag".
    digest = tag.removeprefix("W/").strip('"').lower()
    if not HASH.fullmatch(digest):
        found = f"a record of the hub with {tag[:100]!r} for a hash" if tag else "a damaged record of the hub"
        remedy = "download the file again, which writes a new record; or give its checksum with --sums FILE"
        return Problem("wrong-record", name, found, "a SHA-256 of 64 digits, or a git hash of 40", remedy)
    return FileRecord(name, digest, lines[0] if COMMIT.fullmatch(lines[0]) else "")


def parse_unfinished_name(root: Path, name: str) -> UnfinishedFile | None:
    """The unfinished file of such a name below the records; None if it has another name, or has gone."""
    inner, slash, last = name.rpartition("/")
    if not (found := BEGUN_RECORD.fullmatch(last)):
        return None
    try:
        return UnfinishedFile(inner + slash, found[1], found[2], (root / name).stat().st_size)
    except OSError:
        return None


def find_unfinished_name(part: UnfinishedFile, names: Iterable[str]) -> str:
    """The name of the file that an unfinished one is to become; its own name, if that cannot be told."""
    for name in names:
        inner, slash, last = name.rpartition("/")
        hashed = hashlib.sha1((last + RECORD_SUFFIX).encode(errors="replace"), usedforsecurity=False).digest()
        if inner + slash == part.folder and part.label in (last, base64.urlsafe_b64encode(hashed).decode()):
            return name
    if HASHED_LABEL.fullmatch(part.label):
        return f"{HUB_RECORDS[0]}/{part.folder}{part.label}.{part.digest}{UNFINISHED_SUFFIX}"
    return part.folder + part.label


def find_blob(path: Path) -> Path | None:
    """The file of the hub's cache that a link leads to, whose name is its hash; None if it is no such link.

    Not the end of the way: the blob can itself be a link, to a file with a name of another kind.
    """
    for _ in range(MOST_LINKS):
        if not path.is_symlink():
            return None
        # `..` counts from where the folder really is.
        path = Path(os.path.normpath(Path(os.path.realpath(path.parent)) / path.readlink()))
        if path.parent.name == "blobs" and HASH.fullmatch(path.name):
            return path
    return None


def find_snapshot(folder: Path) -> str:
    """The revision of a snapshot in the hub's cache; empty for any other folder."""
    real = folder.resolve()
    return real.name if real.parent.name == "snapshots" and COMMIT.fullmatch(real.name) else ""


def describe_unfinished_blob(blob: Path) -> str:
    """What lies in the cache in the place of a file that is not there."""
    part = blob.with_name(blob.name + UNFINISHED_SUFFIX)
    return "an unfinished download" if part.exists() else "nothing where it leads to"


def identify_origin(folder: Path, blobs: Mapping[str, Path], commits: Counter[str]) -> HubOrigin:
    """The repository of a folder: the hub's cache has its name, a folder that was downloaded into has not."""
    commit = max(commits, key=lambda one: commits[one], default="")
    if not blobs:
        return HubOrigin("ORG/NAME", commit, f"--local-dir {quote(str(folder))}")
    root = next(iter(blobs.values())).parent.parent
    named = REPOSITORY.fullmatch(root.name)
    return HubOrigin(
        named[1].replace("--", "/") if named else "ORG/NAME", commit, f"--cache-dir {quote(str(root.parent))}"
    )


def describe_hub_fetch(origin: HubOrigin, name: str, commit: str) -> str:
    """How to download one file again, as a hint."""
    if name.startswith(HUB_RECORDS):
        return "run the same `hf download` again, which finishes it"
    revision = f" --revision {commit or origin.commit}" if commit or origin.commit else ""
    return f"hf download {origin.repository} {quote(name)}{revision} {origin.place} --force-download"


def note_revisions(commits: Counter[str]) -> Iterator[Note]:
    """A note if the files are of several revisions of the repository."""
    if len(commits) > 1:
        shown = format_list(
            f"{commit[:12]} ({format_count(count, 'files')})" for commit, count in commits.most_common()
        )
        yield Note("several-revisions", f"the files are of several revisions of the repository: {shown}")
