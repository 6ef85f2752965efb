"""Verifies a target without its source: re-reads every file and compares it with the checksums of the manifest.

The checksums were taken of the bytes that were written, file by file. That the replicas in two ranks are equal follows
only if both were written from the same source; `verify --source` compares them.
"""

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import PurePath
from typing import Any, Generic, TypeVar

from xxhash import xxh3_128_hexdigest

from reshard.errors import Problem, Refused
from reshard.formats.huggingface import is_safetensors_name, read_header_text
from reshard.formats.part_manifests import (
    check_agreement,
    check_joined,
    is_of_whole_files,
    join_manifests,
    name_part_manifest,
    require_shares_joined,
)
from reshard.formats.ranges import CheckedRange
from reshard.formats.safetensors import parse_header
from reshard.formats.target_names import MANIFEST, list_names
from reshard.paths import AnyPath
from reshard.storage.opened import map_paths, open_regular_file
from reshard.text import format_list, format_numbers, format_runs
from reshard.types import MOST_RANKS, Progress
from reshard.verification.checked_ranges import ChangedRanges, compare_files
from reshard.verification.manifest_files import (
    ManifestFile,
    choose_entries,
    compute_file_checksum,
    read_audited_manifests,
    read_file_size,
    read_manifest_files,
)
from reshard.verification.report import Report
from reshard.verification.target_folder import COPY_AGAIN_HINT, LOST_FILE_HINT, require_target_folder, reword_for_store

CompareEntries = Callable[
    [AnyPath, Sequence[ManifestFile], Progress | None, Fraction | None], tuple[ChangedRanges, int]
]
"""Compares files as `compare_files` does."""


def audit_target(
    target: AnyPath,
    progress: Progress | None = None,
    sample: Fraction | None = None,
    ranks: Collection[int] | None = None,
    compare: CompareEntries = compare_files,
) -> Report:
    """Compares every byte of every file that the manifest in the folder `target` names with its checksum; or of the
    files of these `ranks` only, and then the others need not be there. `progress` counts the bytes of these files.

    With a `sample`, a fraction such as 1/100, only about that share of the ranges of each file is compared, and always
    the first range, which is the header, and the last. Sizes and side files are still checked in full.

    Every difference is a problem of the report, with its file, byte range and tensors. Raises Refused if there is no
    readable manifest, if it does not name a rank, or if a file cannot be read.
    """
    audit = audit_files(target, progress, sample, ranks, compare)
    return make_audit_report(audit, list_audit_problems(audit))


TargetPath = TypeVar("TargetPath", bound=AnyPath)
"""Of this machine, or of a store: who looks at a target of the one kind has an audit of that kind."""


@dataclass(frozen=True, slots=True)
class Audit(Generic[TargetPath]):
    """What was found of a target that was compared with its manifest."""

    target: TargetPath
    manifests: Mapping[str, Mapping[str, Any]]
    """Those of all parts of the same conversion, by file name."""
    manifest: Mapping[str, Any]
    """All of them joined."""
    known: Sequence[ManifestFile]
    """All files that it names."""
    entries: Sequence[ManifestFile]
    """Those that were to be compared."""
    full: Sequence[ManifestFile]
    """Of these, the ones that are there with their size: they were read."""
    wrong: ChangedRanges = field(default_factory=dict)
    compared: int = 0
    """In bytes."""
    is_sampled: bool = False


def audit_files(
    target: TargetPath,
    progress: Progress | None = None,
    sample: Fraction | None = None,
    ranks: Collection[int] | None = None,
    compare: CompareEntries = compare_files,
) -> Audit[TargetPath]:
    """Compares files with their manifest as `audit_target` does, for whoever needs more than a report. Raises Refused
    as it does.
    """
    audit = find_audited_files(target, ranks)
    wrong, compared = compare(target, audit.full, progress, sample)
    return replace(audit, wrong=wrong, compared=compared, is_sampled=sample is not None)


def find_audited_files(target: TargetPath, ranks: Collection[int] | None) -> Audit[TargetPath]:
    """Finds the files that the manifest of a target names, or those of some ranks, and reads none. Raises Refused."""
    require_target_folder(target)
    require_shares_joined(target, ranks)
    manifests = read_audited_manifests(target)
    manifest = join_manifests(manifests.values())
    known = read_manifest_files(manifest, target)
    entries = known if ranks is None else choose_entries(known, ranks, manifest)
    full = [entry for entry in entries if read_file_size(target / entry.name) == entry.size]
    return Audit(target, manifests, manifest, known, entries, full)


def make_audit_report(audit: Audit[Any], problems: Iterable[Problem], *, is_unread: bool = False) -> Report:
    """Makes the report of an audit."""
    return Report(
        int(audit.manifest["ranks"]),
        len(audit.full),
        sum(entry.tensors for entry in audit.full),
        sum(entry.size for entry in audit.full),
        audit.compared,
        audit.is_sampled,
        tuple(reword_for_store(audit.target, problems)),
        is_whole=is_of_whole_files(audit.manifest),
        subset=audit.manifest.get("subset", {}),
        is_unread=is_unread,
    )


def list_audit_problems(audit: Audit[Any]) -> Iterator[Problem]:
    """Lists every difference that an audit has found. It looks at sizes and side files again."""
    yield from list_set_problems(audit)
    for entry in audit.full:
        yield from check_changed_ranges(audit.target, entry, audit.known, audit.wrong[entry.name])
    yield from check_manifest_side_files(audit.target, audit.manifest)


def list_set_problems(audit: Audit[Any]) -> Iterator[Problem]:
    """Lists what is wrong with the names and sizes of the files of a target, and between its manifests."""
    target, known, manifest = audit.target, audit.known, audit.manifest
    yield from check_file_set(audit)
    names = {entry.name for entry in audit.entries}
    for problem in check_agreement(target, audit.manifests):
        if PurePath(problem.subject).name in names:
            yield problem
    if audit.entries is known:
        yield from check_extra_files(target, known, manifest)
        yield from check_joined(target, audit.manifests)


def find_damaged_files(audit: Audit[Any]) -> list[ManifestFile]:
    """Finds the files that an audit has found missing, of another size, or with other bytes."""
    full = {entry.name for entry in audit.full}
    return [entry for entry in audit.entries if entry.name not in full or audit.wrong.get(entry.name)]


def check_file_set(audit: Audit[Any]) -> Iterator[Problem]:
    """Files that are missing or have another size; they may have the names of others that are known. Missing rank files
    are one problem: perhaps they lie on another machine.
    """
    target = audit.target
    missing = [entry for entry in audit.entries if read_file_size(target / entry.name) is None]
    if missing and is_of_whole_files(audit.manifest):
        for entry in missing:
            yield Problem("missing-file", entry.name, "no such file", f"{entry.size:,} bytes", LOST_FILE_HINT)
    elif missing:
        yield make_missing_ranks_problem(audit, missing)
    for entry in audit.entries:
        size = read_file_size(target / entry.name)
        if size in (None, entry.size):
            continue
        if size == find_size_by_header(target / entry.name, audit.known):
            yield make_swapped_file_problem(entry.name, find_file_by_header(target / entry.name, audit.known))
        else:
            yield Problem("wrong-size", entry.name, f"{size:,} bytes", f"{entry.size:,} bytes", COPY_AGAIN_HINT)


def make_missing_ranks_problem(audit: Audit[Any], missing: Sequence[ManifestFile]) -> Problem:
    """Makes the problem of missing rank files; the hint is the command that verifies those that are here, if these are
    sound.
    """
    found = "no such file"
    if len(missing) > 1:
        ranks = format_numbers(entry.rank for entry in missing)
        found = f"{len(missing)} of {audit.manifest['ranks']} rank files are not here: ranks {ranks}"
    remedy = LOST_FILE_HINT
    if audit.full and len(find_damaged_files(audit)) == len(missing):
        here = ",".join(format_runs(entry.rank for entry in audit.full))
        command = f"reshard verify {shlex.quote(str(audit.target))} --ranks {here}"
        remedy = f"for the ranks that are here: {command}; else {remedy}"
    size = sum(entry.size for entry in missing)
    return Problem("missing-file", format_list(entry.name for entry in missing), found, f"{size:,} bytes", remedy)


def check_extra_files(
    target: AnyPath, entries: Sequence[ManifestFile], manifest: Mapping[str, Any]
) -> Iterator[Problem]:
    """Tensor files that no manifest here names. Beside a part they may be other ranks, without their manifest."""
    remedy = "move it away"
    if not is_of_whole_files(manifest) and len(entries) < manifest["ranks"] <= MOST_RANKS:
        name = name_part_manifest({*range(manifest["ranks"])} - {entry.rank for entry in entries})
        remedy += f"; or, if it is a rank of the same conversion, copy {MANIFEST} of its folder here as {name}"
    known = {entry.name for entry in entries}
    for name in list_names(target):
        if is_safetensors_name(name) and name not in known:
            yield Problem("extra-file", name, f"a file that {MANIFEST} does not name", "none", remedy)


def find_size_by_header(path: AnyPath, entries: Sequence[ManifestFile]) -> int:
    """The size in bytes, by the manifest, of the file whose header lies at `path`; -1 if no file has this header."""
    other = find_file_by_header(path, entries)
    return next((entry.size for entry in entries if entry.name == other), -1)


def make_swapped_file_problem(name: str, other: str) -> Problem:
    return Problem("swapped-file", name, f"the header of {other}", "its own", "give the files their names back")


def check_changed_ranges(
    target: AnyPath, entry: ManifestFile, entries: Sequence[ManifestFile], wrong: Sequence[CheckedRange]
) -> Iterator[Problem]:
    """The byte ranges of a file that differ from what was written; or the name of the file that lies here instead."""
    if wrong and wrong[0].offset == 0 and (other := find_file_by_header(target / entry.name, entries)):
        yield make_swapped_file_problem(entry.name, other)
        return
    merged: list[list[int]] = []
    for offset, size, _ in wrong:
        if merged and merged[-1][1] == offset:
            merged[-1][1] += size
        else:
            merged.append([offset, offset + size])
    for begin, end in merged:
        subject = f"{entry.name}: bytes {begin:,} to {end:,}: {list_names_in_range(target / entry.name, begin, end)}"
        yield Problem(
            "wrong-checksum", subject, "other bytes than were written", "those of the manifest", COPY_AGAIN_HINT
        )


def find_file_by_header(path: AnyPath, entries: Sequence[ManifestFile]) -> str:
    """The file whose header, by the manifest, lies at `path`; the empty string if no file has this header."""
    with open_regular_file(path) as file:
        for entry in entries:
            file.seek(0)
            if xxh3_128_hexdigest(file.read(entry.ranges[0].size)) == entry.ranges[0].digest:
                return entry.name
    return ""


def list_names_in_range(path: AnyPath, begin: int, end: int) -> str:
    """The names of the tensors between two offsets of a file; with `header`, if the range touches it."""
    try:
        file, text = read_header_text(path)  # of slices too, so not `read_header`
        tensors = parse_header(text, 0, file.size, path.name)
    except Refused:
        return "header"
    names = [tensor.name for tensor in tensors if tensor.offset < end and tensor.offset + tensor.size > begin]
    return format_list(["header", *names] if begin < file.header_size else names)


def check_manifest_side_files(target: AnyPath, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """Side files, such as `config.json`, that are missing or changed."""
    for entry in find_damaged_side_files(target, manifest):
        path = target / PurePath(entry["name"]).name
        if not path.is_file():
            yield Problem("missing-file", path.name, "no such file", f"{entry['size']:,} bytes", LOST_FILE_HINT)
        else:
            expected = "those of the manifest"
            yield Problem("wrong-checksum", path.name, "other bytes than were written", expected, COPY_AGAIN_HINT)


def find_damaged_side_files(target: AnyPath, manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Finds the side files that are missing or changed, as entries of the manifest."""

    def is_damaged(entry: Mapping[str, Any]) -> bool:
        path = target / PurePath(entry["name"]).name
        return bool(read_file_size(path) != entry["size"]) or compute_file_checksum(path) != entry["xxh3_128"]

    entries = manifest.get("side_files", ())
    found = map_paths(is_damaged, target, entries)
    yield from (entry for entry, damaged in zip(entries, found, strict=True) if damaged)
