"""Verifies a target without its source: re-reads every file and compares it with the checksums of the manifest.

The checksums were taken of the bytes that were written, file by file. That the replicas in two ranks are equal follows
only if both were written from the same source; `verify --source` compares them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from xxhash import xxh3_128_hexdigest

from reshard.errors import Problem, Refused, refuse
from reshard.formats.huggingface import SUFFIX, read_header
from reshard.formats.manifest import read_manifest
from reshard.formats.ranges import CheckedRange, parse_ranges
from reshard.formats.target_names import MANIFEST
from reshard.storage.local import (
    PAGE,
    Ways,
    advise_random,
    aligned_buffer,
    open_source,
    read_window,
)
from reshard.storage.page_cache import reading_threads, ways_to_read
from reshard.storage.resources import in_threads
from reshard.text import listed
from reshard.types import WHOLE, Advance
from reshard.verification.chunks import spread
from reshard.verification.target_folder import AGAIN, MISSING, require_folder
from reshard.verification.verify import Report

READ_SIZE = 2 << 20
"""In bytes: adjacent ranges are read together up to this size; a larger range is read by itself."""


class Entry(NamedTuple):
    """A file of the target, as the manifest describes it."""

    name: str
    size: int
    """In bytes."""
    tensors: int
    """How many."""
    ranges: tuple[CheckedRange, ...]


class Batch(NamedTuple):
    """Adjacent ranges of a file that are read at once."""

    entry: Entry
    ranges: tuple[CheckedRange, ...]


def audit_target(target: Path, advance: Advance = lambda _: None, sample: Fraction | None = None) -> Report:
    """Compares every byte of every file that the manifest in the folder `target` names with its checksum.

    With a `sample`, a fraction such as 1/100, only about that share of the ranges of each file is compared, and always
    the first range, which is the header, and the last. Sizes and side files are still checked in full.

    Every difference is a problem of the report, with its file, byte range and tensors. Raises Refused if there is no
    readable manifest, or a file cannot be read.
    """
    require_folder(target)
    manifest = read_manifest(target)
    if not manifest:
        found, remedy = f"no {MANIFEST}", "verify it against what it was made from, with --source"
        raise refuse("no-manifest", str(target), found, "a folder that reshard has written", remedy)
    entries = entries_of(manifest, target)
    problems = list(folder_problems(target, entries))
    full = [entry for entry in entries if size_of(target / entry.name) == entry.size]
    batches = [batch for entry in full for batch in batches_of(entry, sample)]
    tensors, size = sum(entry.tensors for entry in full), sum(entry.size for entry in full)
    compared = sum(checked.size for batch in batches for checked in batch.ranges)
    advance(size - compared)  # bytes that a sample leaves out count as done
    wrong = wrong_ranges(target, full, batches, advance, is_sampled=sample is not None)
    for entry in full:
        problems.extend(content_problems(target, entry, entries, wrong[entry.name]))
    problems.extend(side_problems(target, manifest))
    layout = manifest.get("layout")
    is_whole = isinstance(layout, dict) and layout.get("to") == WHOLE
    return Report(
        int(manifest["ranks"]),
        len(full),
        tensors,
        size,
        compared,
        sample is not None,
        tuple(problems),
        is_whole=is_whole,
        subset=manifest.get("subset", {}),
    )


def entries_of(manifest: Mapping[str, Any], target: Path) -> list[Entry]:
    """The files that a manifest names. Raises Refused if the manifest is not as reshard writes it."""
    entries = [entry_of(entry) for entry in manifest["files"]]
    if not entries or any(entry.ranges[-1].stop != entry.size for entry in entries):
        raise refuse("wrong-manifest", str(target / MANIFEST), "not what reshard writes", "files with ranges", AGAIN)
    return entries


def entry_of(entry: Mapping[str, Any]) -> Entry:
    ranges = parse_ranges(entry["ranges"])
    return Entry(Path(entry["name"]).name, int(entry["size"]), int(entry["tensors"]), ranges)


def folder_problems(target: Path, entries: Sequence[Entry]) -> Iterator[Problem]:
    """Files that are missing, have another size, or are not in the manifest."""
    for entry in entries:
        size = size_of(target / entry.name)
        if size is None:
            yield Problem("missing-file", entry.name, "no such file", f"{entry.size:,} bytes", MISSING)
        elif size != entry.size and size == size_of_swapped(target / entry.name, entries):
            yield swapped(entry.name, file_with_header(target / entry.name, entries))
        elif size != entry.size:
            yield Problem("wrong-size", entry.name, f"{size:,} bytes", f"{entry.size:,} bytes", AGAIN)
    known = {entry.name for entry in entries}
    for path in sorted(target.glob("*" + SUFFIX)):
        if path.name not in known:
            yield Problem("extra-file", path.name, f"a file that {MANIFEST} does not name", "none", "move it away")


def size_of_swapped(path: Path, entries: Sequence[Entry]) -> int:
    """The size in bytes, by the manifest, of the file whose header lies at `path`; -1 if no file has this header."""
    other = file_with_header(path, entries)
    return next((entry.size for entry in entries if entry.name == other), -1)


def swapped(name: str, other: str) -> Problem:
    return Problem("swapped-file", name, f"the header of {other}", "its own", "give the files their names back")


def size_of(path: Path) -> int | None:
    """The size of a file in bytes; None if there is no such file."""
    return path.stat().st_size if path.is_file() else None


def batches_of(entry: Entry, sample: Fraction | None) -> Iterator[Batch]:
    """All ranges of a file, or those of a sample, in batches of at most READ_SIZE bytes."""
    numbers = range(len(entry.ranges))
    chosen = numbers if sample is None else sorted({0, numbers[-1], *spread(entry.name, len(numbers), sample)})
    batch: list[CheckedRange] = []
    for checked in (entry.ranges[number] for number in chosen):
        if batch and (checked.stop - batch[0].offset > READ_SIZE or checked.offset != batch[-1].stop):
            yield Batch(entry, tuple(batch))
            batch = []
        batch.append(checked)
    yield Batch(entry, tuple(batch))


def wrong_ranges(
    target: Path, entries: Sequence[Entry], batches: Sequence[Batch], advance: Advance, *, is_sampled: bool
) -> dict[str, list[CheckedRange]]:
    """By file name: the ranges whose bytes have another checksum, by offset. Reads with several threads."""
    wrong: dict[str, list[CheckedRange]] = {entry.name: [] for entry in entries}
    if not entries:
        return wrong
    ways = ways_to_read(target / entries[0].name, sum(entry.size for entry in entries))
    largest = max(batch.ranges[-1].stop - batch.ranges[0].offset for batch in batches)
    lock = Lock()
    with ExitStack() as stack:
        files = {entry.name: open_source(stack, target / entry.name, ways) for entry in entries}
        if is_sampled:
            advise_random(files.values())

        def work(buffer: memoryview, batch: Batch) -> None:
            found = wrong_of(batch, files[batch.entry.name], buffer, ways)
            with lock:
                wrong[batch.entry.name].extend(found)
            advance(batch.ranges[-1].stop - batch.ranges[0].offset)

        def make_worker() -> Callable[[Batch], None]:
            return partial(work, aligned_buffer(largest + 2 * PAGE))

        in_threads(batches, make_worker, reading_threads(ways))
    return {name: sorted(ranges) for name, ranges in wrong.items()}


def wrong_of(batch: Batch, descriptor: int, buffer: memoryview, ways: Ways) -> list[CheckedRange]:
    """The ranges of a batch whose bytes have another checksum."""
    start = batch.ranges[0].offset
    data = read_window(descriptor, start, batch.ranges[-1].stop - start, buffer, ways, batch.entry.name)
    return [
        checked
        for checked in batch.ranges
        if xxh3_128_hexdigest(data[checked.offset - start : checked.stop - start]) != checked.digest
    ]


def content_problems(
    target: Path, entry: Entry, entries: Sequence[Entry], wrong: Sequence[CheckedRange]
) -> Iterator[Problem]:
    """The byte ranges of a file that differ from what was written; or the name of the file that lies here instead."""
    if wrong and wrong[0].offset == 0 and (other := file_with_header(target / entry.name, entries)):
        yield swapped(entry.name, other)
        return
    merged: list[list[int]] = []
    for offset, size, _ in wrong:
        if merged and merged[-1][1] == offset:
            merged[-1][1] += size
        else:
            merged.append([offset, offset + size])
    for begin, end in merged:
        subject = f"{entry.name}: bytes {begin:,} to {end:,}: {names_at(target / entry.name, begin, end)}"
        yield Problem("wrong-checksum", subject, "other bytes than were written", "those of the manifest", AGAIN)


def file_with_header(path: Path, entries: Sequence[Entry]) -> str:
    """The file whose header, by the manifest, lies at `path`; the empty string if no file has this header."""
    with path.open("rb") as file:
        for entry in entries:
            file.seek(0)
            if xxh3_128_hexdigest(file.read(entry.ranges[0].size)) == entry.ranges[0].digest:
                return entry.name
    return ""


def names_at(path: Path, begin: int, end: int) -> str:
    """The names of the tensors between two offsets of a file; with `header`, if the range touches it."""
    try:
        file, tensors = read_header(path, 0)
    except Refused:
        return "header"
    names = [tensor.name for tensor in tensors if tensor.offset < end and tensor.offset + tensor.size > begin]
    return listed(["header", *names] if begin < file.header_size else names)


def side_problems(target: Path, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """Side files, such as `config.json`, that are missing or changed."""
    for entry in manifest.get("side_files", ()):
        path = target / Path(entry["name"]).name
        if not path.is_file():
            yield Problem("missing-file", path.name, "no such file", f"{entry['size']:,} bytes", MISSING)
        elif path.stat().st_size != entry["size"] or xxh3_128_hexdigest(path.read_bytes()) != entry["xxh3_128"]:
            yield Problem("wrong-checksum", path.name, "other bytes than were written", entry["xxh3_128"], AGAIN)
