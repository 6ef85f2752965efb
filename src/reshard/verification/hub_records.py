"""Finds what the downloaders of the Hugging Face hub leave beside the files: the hash that the hub has of each.

In a folder that was downloaded into, `.cache/huggingface/download/NAME.metadata` has three lines: the revision, the
hash, the time. In the hub's cache, each file is a link to `blobs/HASH`. The hash is the SHA-256 of a large file, or the
SHA-1 of git of a small one.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote

from reshard.errors import Problem, Refused, refuse
from reshard.formats.huggingface import CONFIG, INDEX, SINGLE, SUFFIX
from reshard.formats.recognition import explain_hub_cache
from reshard.formats.unfinished_downloads import (
    BLOBS,
    FINISH,
    HUB_RECORDS,
    find_unfinished,
    find_unfinished_weights,
    list_begun_blobs,
    list_entries,
    list_labels,
    parse_begun_label,
)
from reshard.storage.opened import open_regular_file
from reshard.text import format_count, format_list
from reshard.types import Note
from reshard.verification.file_hashes import FileRecord, FileRecords

OWN_FOLDERS = {".cache", ".huggingface", ".git"}

RECORD_SUFFIX = ".metadata"

MOST_RECORD_SIZE = 4096
"""In bytes."""

HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")

COMMIT = re.compile(r"[0-9a-f]{40}")

HASHED_LABEL = re.compile(r"[\w-]{27}=")
"""The SHA-1 of a name, as newer versions of the downloader have it."""

USUAL_NAMES = (INDEX, SINGLE, CONFIG)
"""Files that may have been begun before anything else tells their names."""

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


def find_hub_records(folder: Path, names: Sequence[str], expected: Iterable[str]) -> FileRecords:
    """The records of the hub for the files of a folder, whose names are given; `expected` are names that should be
    there. Raises Refused if there is no record at all.
    """
    require_no_cache_root(folder, names)
    records, problems, begun = read_local_records(folder)
    blobs = {name: blob for name in names if name not in records if (blob := find_blob(folder / name))}
    records.update((name, FileRecord(name, blob.name, find_snapshot(folder))) for name, blob in blobs.items())
    if not records and not problems:
        raise refuse_without_records(folder, names)
    commits = Counter(record.commit for record in records.values() if record.commit)
    origin = identify_origin(folder, blobs if 2 * len(blobs) > len(records) else {}, commits)
    unfinished = dict(name_begun_files(folder, begun, {*names, *records, *expected, *USUAL_NAMES}))
    notes = list(note_revisions(commits))
    if {*names}.issuperset(expected) and all(os.path.exists(blob) for blob in blobs.values()):  # noqa: PTH110 - no error
        add_begun_blobs(folder, unfinished, notes)
    return FileRecords(
        "the hub",
        records,
        partial(describe_hub_fetch, origin),
        overwriting=" --force-download",
        problems=tuple(problems),
        unfinished=unfinished,
        notes=tuple(notes),
    )


def require_no_cache_root(folder: Path, names: Iterable[str]) -> None:
    """Raises Refused for the hub's cache, or a repository in it: its files are in snapshots. A checkpoint may have a
    folder of such a name too.
    """
    is_checkpoint = any(name.endswith(SUFFIX) and "/" not in name for name in names)
    if is_checkpoint or any((folder / records).is_dir() for records in HUB_RECORDS):
        return
    if refused := explain_hub_cache(folder):
        raise refused


def refuse_without_records(folder: Path, names: Iterable[str]) -> Refused:
    """The refusal of a folder without a record of the hub; names the folder above that has records of it."""
    begun = find_unfinished_weights(folder)
    if begun and not any(name.endswith(SUFFIX) for name in names):
        remedy = FINISH.replace("convert", "verify it")
        return refuse("unfinished-download", str(folder), f"no weights yet: {begun}", "the whole files", remedy)
    place = folder.resolve()
    remedy = "give a list of checksums with --sums FILE; or download again by `hf download` into a folder of its own"
    for above in place.parents:
        if any((above / records / place.relative_to(above)).is_dir() for records in HUB_RECORDS):
            remedy = f"its records lie in a folder above it: verify {above}"
            break
    return refuse("no-record", str(folder), "no record of the hub beside the files", "one for each file", remedy)


def read_local_records(folder: Path) -> tuple[dict[str, FileRecord], list[Problem], dict[str, str]]:
    """The records in a folder that was downloaded into; the problems are of records that cannot be used. And label ->
    place of the downloads that were begun.
    """
    records: dict[str, FileRecord] = {}
    problems: list[Problem] = []
    begun: dict[str, str] = {}
    for place in HUB_RECORDS:
        for name in list_files(folder / place):
            if name.endswith(RECORD_SUFFIX):
                record = parse_record(name.removesuffix(RECORD_SUFFIX), read_text(folder / place / name))
                if isinstance(record, FileRecord):
                    records.setdefault(record.name, record)
                else:
                    problems.append(record)
            elif label := parse_begun_label(name):
                begun[label] = place
    return records, [problem for problem in problems if problem.subject not in records], begun


def name_begun_files(folder: Path, begun: Mapping[str, str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The name of each file that was begun and is not there, and what lies there; `names` are those that it can have.

    If none of them fits, it is the place instead.
    """
    by_label = {label: name for name in names for label in list_labels(name)}
    for label, place in begun.items():
        inner, slash, last = label.rpartition("/")
        if label not in by_label and HASHED_LABEL.fullmatch(last):
            yield f"{place}/{inner}{slash}{last[:8]}...", "an unfinished download, of a file whose name is not known"
        elif found := find_missing_file(folder, by_label.get(label, label)):
            yield found


def add_begun_blobs(folder: Path, unfinished: dict[str, str], notes: list[Note]) -> None:
    """Adds the unfinished downloads in the cache of a snapshot in which nothing is known to be missing: no name tells
    whose they are. Beside other snapshots they are only noted.
    """
    if not (blobs := list_begun_blobs(folder)):
        return
    count = format_count(len(blobs), "unfinished downloads")
    if len(list_entries(folder.resolve().parent)) == 1:
        unfinished[BLOBS] = f"{count}, of files whose names are not known"
    else:
        notes.append(Note("unfinished-download", f"{BLOBS} has {count}, of this revision or of another"))


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


def find_missing_file(folder: Path, name: str) -> tuple[str, str] | None:
    """The name of a file that is not there, and what lies there of its download; None if the file is there."""
    begun = None if os.path.lexists(folder / name) else find_unfinished(folder, name)
    return (name, f"no such file, but {begun}") if begun else None


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
    """How to download one file that is not there, as a hint."""
    if name.startswith(HUB_RECORDS):
        return "run the same `hf download` again until it ends"
    if name == BLOBS:
        return "run the same `hf download` again until it ends; what is left there then is of another revision"
    revision = f" --revision {commit or origin.commit}" if commit or origin.commit else ""
    return f"hf download {origin.repository} {quote(name)}{revision} {origin.place}"


def note_revisions(commits: Counter[str]) -> Iterator[Note]:
    """A note if the files are of several revisions of the repository."""
    if len(commits) > 1:
        shown = format_list(
            f"{commit[:12]} ({format_count(count, 'files')})" for commit, count in commits.most_common()
        )
        yield Note("several-revisions", f"the files are of several revisions of the repository: {shown}")
