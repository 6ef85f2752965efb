"""Stage 5 without the source: every file of a target, re-read and compared with the checksums of its manifest."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_128_hexdigest

from reshard.disk import CACHED, PAGE, Ways, aligned_buffer, available_memory, open_source, read_window, way_to_read
from reshard.errors import Problem, Refused, listed, refuse
from reshard.manifest import read_manifest
from reshard.read import SUFFIX, read_header
from reshard.target import MANIFEST
from reshard.types import Advance
from reshard.verify import Report

AGAIN = "remove the file and convert again"


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


def audit_target(target: Path, advance: Advance = lambda _: None) -> Report:
    """Compares every byte of every file that the manifest of the folder `target` names with its checksum.

    Every difference is a problem of the report, with its file, range and tensors. Raises Refused only if there is no
    manifest that could be understood.
    """
    manifest = read_manifest(target)
    if not manifest:
        found, remedy = f"no {MANIFEST}", "verify it against what it was made from, with --source"
        raise refuse("no-manifest", str(target), found, "a folder that reshard has written", remedy)
    entries = entries_of(manifest, target)
    problems = list(folder_problems(target, entries))
    whole = [entry for entry in entries if size_of(target / entry.name) == entry.size]
    ways = ways_to_read(target, whole)
    # A file a thread: each is read from its first byte to its last.
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        found_digests = list(pool.map(lambda entry: digests_of(target, entry, ways, advance), whole))
    for entry, digests in zip(whole, found_digests, strict=True):
        problems.extend(content_problems(target, entry, entries, digests))
    problems.extend(side_problems(target, manifest))
    tensors = sum(entry.tensors for entry in whole)
    return Report(int(manifest["ranks"]), len(whole), tensors, sum(entry.size for entry in whole), tuple(problems))


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
            yield Problem("missing-file", entry.name, "no such file", f"{entry.size:,} bytes", AGAIN)
        elif size != entry.size:
            yield Problem("wrong-size", entry.name, f"{size:,} bytes", f"{entry.size:,} bytes", AGAIN)
    known = {entry.name for entry in entries}
    for path in sorted(target.glob("*" + SUFFIX)):
        if path.name not in known:
            yield Problem("extra-file", path.name, f"a file that {MANIFEST} does not name", "none", "move it away")


def size_of(path: Path) -> int | None:
    """In bytes; None if there is no such file."""
    return path.stat().st_size if path.is_file() else None


def ways_to_read(target: Path, entries: Sequence[Entry]) -> Ways:
    """Past the page cache, if the files are larger than a third of the memory."""
    if not entries or sum(entry.size for entry in entries) <= available_memory() // 3:
        return CACHED
    return Ways(way_to_read(target / entries[0].name), CACHED.write)


def digests_of(target: Path, entry: Entry, ways: Ways, advance: Advance) -> list[str]:
    """The checksum of each range of a file, as it is now."""
    buffer = aligned_buffer(max(found.size for found in entry.ranges) + 2 * PAGE)
    digests = []
    with ExitStack() as stack:
        descriptor = open_source(stack, target / entry.name, ways)
        for offset, size, _ in entry.ranges:
            digests.append(xxh3_128_hexdigest(read_window(descriptor, offset, size, buffer, ways, entry.name)))
            advance(size)
    return digests


def content_problems(target: Path, entry: Entry, entries: Sequence[Entry], digests: Sequence[str]) -> Iterator[Problem]:
    """The stretches of a file that are not what was written; or the file whose contents these seem to be."""
    wrong = [found for found, digest in zip(entry.ranges, digests, strict=True) if found.digest != digest]
    if wrong and wrong[0].offset == 0 and (other := file_with_header(target / entry.name, entries)):
        yield Problem(
            "swapped-file", entry.name, f"the header of {other}", "its own", "give the files their names back"
        )
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
            yield Problem("missing-file", path.name, "no such file", f"{entry['size']:,} bytes", AGAIN)
        elif path.stat().st_size != entry["size"] or xxh3_128_hexdigest(path.read_bytes()) != entry["xxh3_128"]:
            yield Problem("wrong-checksum", path.name, "other bytes than were written", entry["xxh3_128"], AGAIN)
