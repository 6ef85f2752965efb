"""Stage 5 without the source: every file of a target, re-read and compared with the checksums of its manifest.

Each file is held against its own checksums, which were taken of the bytes that were written. That two ranks hold the
same replica follows only where both were written from the same source; `verify --source` compares them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from xxhash import xxh3_128_hexdigest

from reshard.errors import Problem, Refused, listed, refuse
from reshard.formats.huggingface import SUFFIX, read_header
from reshard.formats.manifest import read_manifest
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
from reshard.types import WHOLE, Advance
from reshard.verification.chunks import spread
from reshard.verification.target_folder import AGAIN, MISSING, require_folder
from reshard.verification.verify import Report

READ_SIZE = 2 << 20
"""In bytes: ranges that lie back to back are read together up to this size; a larger one is read by itself."""


class Range(NamedTuple):
    """A stretch of a file, and its checksum."""

    offset: int
    size: int
    digest: str


class Entry(NamedTuple):
    """What the manifest says of a rank file."""

    name: str
    size: int
    tensors: int
    ranges: tuple[Range, ...]


class Batch(NamedTuple):
    """Ranges of a file, back to back, that are read at once."""

    entry: Entry
    ranges: tuple[Range, ...]


def audit_target(target: Path, advance: Advance = lambda _: None, sample: Fraction | None = None) -> Report:
    """Compares every byte of every file that the manifest of the folder `target` names with its checksum.

    With a `sample`, about that share of the ranges of each file is compared, and always the first, which is the header,
    and the last. Sizes and side files are looked at in full all the same.

    Every difference is a problem of the report, with its file, range and tensors. Raises Refused if there is no
    manifest that could be understood, or a file cannot be read.
    """
    require_folder(target)
    manifest = read_manifest(target)
    if not manifest:
        found, remedy = f"no {MANIFEST}", "verify it against what it was made from, with --source"
        raise refuse("no-manifest", str(target), found, "a folder that reshard has written", remedy)
    entries = entries_of(manifest, target)
    problems = list(folder_problems(target, entries))
    whole = [entry for entry in entries if size_of(target / entry.name) == entry.size]
    batches = [batch for entry in whole for batch in batches_of(entry, sample)]
    tensors, size = sum(entry.tensors for entry in whole), sum(entry.size for entry in whole)
    compared = sum(found.size for batch in batches for found in batch.ranges)
    advance(size - compared)  # what a sample leaves out is done as well
    wrong = wrong_ranges(target, whole, batches, advance, is_sampled=sample is not None)
    for entry in whole:
        problems.extend(content_problems(target, entry, entries, wrong[entry.name]))
    problems.extend(side_problems(target, manifest))
    layout = manifest.get("layout")
    is_whole = isinstance(layout, dict) and layout.get("to") == WHOLE
    return Report(
        int(manifest["ranks"]),
        len(whole),
        tensors,
        size,
        compared,
        sample is not None,
        tuple(problems),
        is_whole=is_whole,
        subset=manifest.get("subset", {}),
    )


def entries_of(manifest: Mapping[str, Any], target: Path) -> list[Entry]:
    """The rank files that a manifest names. Raises Refused if it is not as reshard writes it."""
    entries = [entry_of(entry) for entry in manifest["files"]]
    ends = [entry.ranges[-1].offset + entry.ranges[-1].size for entry in entries]
    if not entries or ends != [entry.size for entry in entries]:
        raise refuse("wrong-manifest", str(target / MANIFEST), "not what reshard writes", "files with ranges", AGAIN)
    return entries


def entry_of(entry: Mapping[str, Any]) -> Entry:
    words = entry["ranges"].split()
    ranges, offset = [], 0
    for size, digest in zip(map(int, words[::2]), words[1::2], strict=True):
        ranges.append(Range(offset, size, digest))
        offset += size
    return Entry(Path(entry["name"]).name, int(entry["size"]), int(entry["tensors"]), tuple(ranges))


def folder_problems(target: Path, entries: Sequence[Entry]) -> Iterator[Problem]:
    """Files that are missing, of another size, or of no one's."""
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
    """In bytes: how large the file is whose header a file has now; -1 if it has none of the manifest's."""
    other = file_with_header(path, entries)
    return next((entry.size for entry in entries if entry.name == other), -1)


def swapped(name: str, other: str) -> Problem:
    return Problem("swapped-file", name, f"the header of {other}", "its own", "give the files their names back")


def size_of(path: Path) -> int | None:
    """In bytes; None if there is no such file."""
    return path.stat().st_size if path.is_file() else None


def batches_of(entry: Entry, sample: Fraction | None) -> Iterator[Batch]:
    """The ranges of a file, or those of a sample, in batches."""
    numbers = range(len(entry.ranges))
    chosen = numbers if sample is None else sorted({0, numbers[-1], *spread(entry.name, len(numbers), sample)})
    batch: list[Range] = []
    for found in (entry.ranges[number] for number in chosen):
        if batch and (found.offset + found.size - batch[0].offset > READ_SIZE or found.offset != end_of(batch)):
            yield Batch(entry, tuple(batch))
            batch = []
        batch.append(found)
    yield Batch(entry, tuple(batch))


def end_of(ranges: Sequence[Range]) -> int:
    return ranges[-1].offset + ranges[-1].size


def wrong_ranges(
    target: Path, entries: Sequence[Entry], batches: Sequence[Batch], advance: Advance, *, is_sampled: bool
) -> dict[str, list[Range]]:
    """For each file, by its name: the ranges whose checksum is another, in their order. Reads with several threads."""
    wrong: dict[str, list[Range]] = {entry.name: [] for entry in entries}
    if not entries:
        return wrong
    ways = ways_to_read(target / entries[0].name, sum(entry.size for entry in entries))
    largest = max(end_of(batch.ranges) - batch.ranges[0].offset for batch in batches)
    lock = Lock()
    with ExitStack() as stack:
        files = {entry.name: open_source(stack, target / entry.name, ways) for entry in entries}
        if is_sampled:
            advise_random(files.values())

        def work(buffer: memoryview, batch: Batch) -> None:
            found = wrong_of(batch, files[batch.entry.name], buffer, ways)
            with lock:
                wrong[batch.entry.name].extend(found)
            advance(end_of(batch.ranges) - batch.ranges[0].offset)

        def make_worker() -> Callable[[Batch], None]:
            return partial(work, aligned_buffer(largest + 2 * PAGE))

        in_threads(batches, make_worker, reading_threads(ways))
    return {name: sorted(ranges) for name, ranges in wrong.items()}


def wrong_of(batch: Batch, descriptor: int, buffer: memoryview, ways: Ways) -> list[Range]:
    """The ranges of a batch whose checksum is another."""
    start = batch.ranges[0].offset
    data = read_window(descriptor, start, end_of(batch.ranges) - start, buffer, ways, batch.entry.name)
    return [
        found
        for found in batch.ranges
        if xxh3_128_hexdigest(data[found.offset - start : found.offset - start + found.size]) != found.digest
    ]


def content_problems(target: Path, entry: Entry, entries: Sequence[Entry], wrong: Sequence[Range]) -> Iterator[Problem]:
    """The stretches of a file that are not what was written; or the file whose contents these seem to be."""
    if wrong and wrong[0].offset == 0 and (other := file_with_header(target / entry.name, entries)):
        yield swapped(entry.name, other)
        return
    stretches: list[list[int]] = []
    for offset, size, _ in wrong:
        if stretches and stretches[-1][1] == offset:
            stretches[-1][1] += size
        else:
            stretches.append([offset, offset + size])
    for begin, end in stretches:
        subject = f"{entry.name}: bytes {begin:,} to {end:,}: {names_at(target / entry.name, begin, end)}"
        yield Problem("wrong-checksum", subject, "other bytes than were written", "those of the manifest", AGAIN)


def file_with_header(path: Path, entries: Sequence[Entry]) -> str:
    """The name under which the manifest has the header that a file has now, or the empty string."""
    with path.open("rb") as file:
        for entry in entries:
            file.seek(0)
            if xxh3_128_hexdigest(file.read(entry.ranges[0].size)) == entry.ranges[0].digest:
                return entry.name
    return ""


def names_at(path: Path, begin: int, end: int) -> str:
    """The tensors that lie between two offsets of a file; `header` where it begins."""
    try:
        file, tensors = read_header(path, 0)
    except Refused:
        return "header"
    names = [tensor.name for tensor in tensors if tensor.offset < end and tensor.offset + tensor.size > begin]
    return listed(["header", *names] if begin < file.header_size else names)


def side_problems(target: Path, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """The small files beside the rank files."""
    for entry in manifest.get("side_files", ()):
        path = target / Path(entry["name"]).name
        if not path.is_file():
            yield Problem("missing-file", path.name, "no such file", f"{entry['size']:,} bytes", MISSING)
        elif path.stat().st_size != entry["size"] or xxh3_128_hexdigest(path.read_bytes()) != entry["xxh3_128"]:
            yield Problem("wrong-checksum", path.name, "other bytes than were written", entry["xxh3_128"], AGAIN)
