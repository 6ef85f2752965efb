"""Checks a download: the hash of every file against the records of the hub beside it, or against a list of checksums.

The bytes are not compared with anything but their hash, so this needs no source, no recipe and no known model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import Problem, Refused, describe_problems, refuse
from reshard.formats.huggingface import INDEX, SUFFIX, read_header
from reshard.formats.index import read_index
from reshard.formats.numbering import check_numbering
from reshard.formats.remote_names import restore_address, suggest_path
from reshard.formats.unfinished_downloads import find_unfinished
from reshard.storage.counting import count_progress
from reshard.text import escape, format_count, format_list
from reshard.types import Note, Progress
from reshard.verification.file_hashes import (
    GIT_DIGITS,
    GONE,
    FileRecord,
    FileRecords,
    HashedFile,
    compute_hashes,
    look_at_file,
)
from reshard.verification.hub_records import find_hub_records, list_files
from reshard.verification.sums import read_sums


@dataclass(frozen=True, slots=True, repr=False)
class DownloadReport:
    """The result of checking a download: how much was compared, and every difference."""

    keeper: str
    """Who wrote the records: `the hub`, or the name of a list."""
    records: int
    """The number of recorded hashes."""
    files: int
    """The number of files whose hash was compared."""
    size: int
    """Of these files, in bytes."""
    problems: tuple[Problem, ...]
    notes: tuple[Note, ...] = ()
    """Files that nothing is recorded of, and other things to know."""

    @property
    def is_proven(self) -> bool:
        """Whether every recorded file is there and has its hash, and no safetensors file is without a record."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """`proven against` so many records, or the number of problems."""
        if self.problems:
            return format_count(len(self.problems), "problems")
        return f"proven against {format_count(self.records, 'records')} of {self.keeper}"

    def __str__(self) -> str:
        return "\n".join([self.verdict, *list_download_lines(self)])

    __repr__ = __str__


def describe_download(report: DownloadReport, folder: Path) -> str:
    """The text of a report for a person."""
    return "\n".join([escape(f"{folder}: {report.verdict}"), *list_download_lines(report)])


def list_download_lines(report: DownloadReport) -> Iterator[str]:
    """The lines below the verdict: the problems, how much was compared, and the notes."""
    if report.problems:
        yield describe_problems(report.problems)
    equal = "" if report.problems else ", all equal"
    yield f"{format_count(report.files, 'files')}, {report.size:,} bytes compared{equal}"
    yield from (escape(f"note: {note.text}") for note in report.notes)


def verify_download(folder: Path, sums: Path | None, progress: Progress | None) -> DownloadReport:
    """Compares the hash of every file in a folder with what is recorded: in the list `sums`, or by the hub.

    Every difference is a problem of the report. Raises Refused if there is nothing to compare with, or if a file
    changes while it is read.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        remedy = suggest_path(folder)
        raise refuse("no-source", restore_address(folder), found, "the folder of a checkpoint", remedy)
    names = list_files(folder)
    expected, faults = list_expected_names(folder, names)
    records = read_sums(folder, sums) if sums is not None else find_hub_records(folder, names, expected)
    strangers, others = find_unrecorded_files(folder, names, records, sums)
    looked_at = {name: look_at_file(folder, record) for name, record in records.records.items()}
    absent = {name: found for name, found in looked_at.items() if isinstance(found, str)}
    present = [item for item in looked_at.values() if isinstance(item, HashedFile)]
    # A file that is not there may lie there under another name.
    looked_for = strangers if absent else []
    also = [item for name in looked_for if isinstance(item := look_at_file(folder, FileRecord(name, "")), HashedFile)]
    files = [*present, *also]
    size = sum(item.file.size for item in files)
    with count_progress(progress, size) as advance:
        hashes = compute_hashes(folder, files, advance)
    renamed = find_renamed_files(records, absent, {item.file.name: hashes[item.file.name] for item in also})
    problems = [
        *check_hashes(folder, records, present, hashes),
        *check_absent_files(folder, records, absent, renamed),
        *check_expected_files(folder, records, sorted({*expected} - {*names})),
        *check_strangers(records, [name for name in strangers if name not in renamed.values()]),
        *records.problems,
        # The hash of an index says by itself that it is damaged.
        *(faults if INDEX not in records.records else ()),
    ]
    notes = (*records.notes, *note_unrecorded_files(records, others))
    compared = sum(item.file.size for item in present)
    return DownloadReport(records.keeper, len(records.records), len(present), compared, tuple(problems), notes)


def list_expected_names(folder: Path, names: Sequence[str]) -> tuple[list[str], tuple[Problem, ...]]:
    """The names of files that should be there, by the index, or without one by the numbers in the names of others; and
    the faults of an index that cannot be read.
    """
    try:
        weight_map = read_index(folder)
    except Refused as refused:
        return [], refused.problems
    if weight_map is not None:
        return sorted(set(weight_map.values())), ()
    numbered = [name for name in names if name.endswith(SUFFIX) and "/" not in name]
    return [problem.subject for problem in check_numbering(numbered)], ()


def find_unrecorded_files(
    folder: Path, names: Iterable[str], records: FileRecords, sums: Path | None
) -> tuple[list[str], list[str]]:
    """The safetensors files without a record, in folders of which something is recorded; and all other files without
    one.
    """
    known = {*records.records, *(problem.subject for problem in records.problems)}
    folders = {"", *(name.rpartition("/")[0] for name in records.records)}
    strangers, others = [], []
    for name in names:
        if name in known or any(part.startswith(".") for part in name.split("/")):
            continue
        if name.endswith(SUFFIX) and name.rpartition("/")[0] in folders:
            strangers.append(name)
        elif sums is None or sums.resolve() != (folder / name).resolve():
            others.append(name)
    return strangers, others


def find_renamed_files(
    records: FileRecords, absent: Iterable[str], hashes: Mapping[str, str | Problem]
) -> dict[str, str]:
    """By the name of a file that is not there: the name under which its content lies there. The hashes are of files
    without a record.
    """
    names = {found: name for name, found in hashes.items() if isinstance(found, str)}
    return {name: names[digest] for name in absent if (digest := records.records[name].digest) in names}


def check_hashes(
    folder: Path, records: FileRecords, files: Sequence[HashedFile], hashes: Mapping[str, str | Problem]
) -> Iterator[Problem]:
    """Files that cannot be read, or whose hash is not the recorded one."""
    owners: dict[str, str] = {}
    for record in records.records.values():
        owners.setdefault(record.digest, record.name)
    for item in files:
        record, found = records.records[item.file.name], hashes[item.file.name]
        if isinstance(found, Problem):
            yield found
        elif found != record.digest:
            owner = owners.get(found, "")
            is_copy = hashes.get(owner) == found
            yield explain_other_hash(folder, records, item, found, owner, is_copy=is_copy)


def explain_other_hash(
    folder: Path, records: FileRecords, item: HashedFile, found: str, owner: str, *, is_copy: bool
) -> Problem:
    """The problem of a file with another hash: the content of another file, `owner`; cut off; or other bytes.

    `is_copy`: the other file has its own content too.
    """
    record = records.records[item.file.name]
    fetch = records.describe_fetch(record.name, record.commit) + records.overwriting
    actual, expected = describe_hash(found), f"{describe_hash(record.digest)}, by {records.keeper}"
    if owner:
        remedy = fetch if is_copy else f"give the files their names back; or download this one again: {fetch}"
        return Problem("swapped-file", record.name, f"the content of {owner}: {actual}", expected, remedy)
    if record.name.endswith(SUFFIX):
        try:
            read_header(folder / record.name, 0)
        except Refused as refused:
            fault = refused.problems[0]
            return Problem(fault.kind, record.name, f"{fault.found}; {actual}", f"{fault.expected}; {expected}", fetch)
    kept = "" if record.name.endswith(SUFFIX) else "; keep a copy, if you have changed it yourself"
    return Problem("wrong-checksum", record.name, f"{actual}, {item.file.size:,} bytes", expected, f"{fetch}{kept}")


def check_absent_files(
    folder: Path, records: FileRecords, absent: Mapping[str, str], renamed: Mapping[str, str]
) -> Iterator[Problem]:
    """Recorded files that are not there, or are no files. By name: what is there, and where the content lies."""
    for name, found in absent.items():
        record = records.records[name]
        expected = f"{describe_hash(record.digest)}, by {records.keeper}"
        fetch = records.describe_fetch(name, record.commit)
        if found not in GONE:
            yield Problem("cannot-read", name, found, expected, fetch + records.overwriting)
            continue
        other = find_unfinished(folder, name)
        if name in renamed:
            other, fetch = f"{renamed[name]} has its content", f"rename {renamed[name]} to {name}"
        yield Problem("missing-file", name, f"{found}, but {other}" if other else found, expected, fetch)


def check_expected_files(folder: Path, records: FileRecords, lacking: Iterable[str]) -> Iterator[Problem]:
    """Files that neither are there nor have a record, but that the index names, or that a download has begun."""
    found = {name: describe_unrecorded(folder, name) for name in lacking}
    for name, text in {**records.unfinished, **found}.items():
        if name not in records.records:
            expected = "one of the files of the checkpoint" if name in found else "a finished download"
            yield Problem("missing-file", name, text, expected, records.describe_fetch(name, ""))


def describe_unrecorded(folder: Path, name: str) -> str:
    """What is there of a file that is missing, and has no record."""
    begun = find_unfinished(folder, name)
    return f"no such file, but {begun}" if begun else "no such file, and no record of one"


def check_strangers(records: FileRecords, names: Iterable[str]) -> Iterator[Problem]:
    """Safetensors files without a record: nothing vouches for them."""
    for name in names:
        found = f"a safetensors file without a record of {records.keeper}"
        fetch = records.describe_fetch(name, "") + records.overwriting
        remedy = f"{fetch}; or move it away, if it is not of this checkpoint"
        yield Problem("no-record", name, found, "the hash that it should have", remedy)


def note_unrecorded_files(records: FileRecords, names: Sequence[str]) -> Iterator[Note]:
    """A note on the other files without a record."""
    if names:
        found = f"{format_count(len(names), 'files')} without a record of {records.keeper}"
        yield Note("no-record", f"{found}, not compared: {format_list(names)}")


def describe_hash(digest: str) -> str:
    """A hash with its name."""
    return f"{'git SHA-1' if len(digest) == GIT_DIGITS else 'SHA-256'} {digest}"
