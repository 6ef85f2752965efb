"""The recorded hash of a file, and the hashes of many files: several at a time, in fixed memory."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import NamedTuple, Protocol

from reshard.errors import Problem, Refused
from reshard.storage.local import CACHED, PAGE, Ways, allocate_aligned
from reshard.storage.opened import read_range
from reshard.storage.page_cache import choose_ways_to_read
from reshard.storage.resources import run_in_threads
from reshard.storage.unchanged import open_unchanged
from reshard.types import Advance, File, Note

SHA256_DIGITS, GIT_DIGITS = 64, 40
"""Hexadecimal digits of a SHA-256, and of the SHA-1 by which git names the content of a file."""

HASH_READ_SIZE = 1 << 20
"""In bytes. Small enough to stay in the cache of a processor between reading and hashing."""

MOST_HASHING_THREADS = 32

GONE = ("no such file", "a link to nothing")
"""What is found in the place of a file that is not there."""


class FileRecord(NamedTuple):
    """The hash that a file should have."""

    name: str
    """Of the file within the checkpoint, with `/` between folders."""
    digest: str
    """In lower-case hexadecimal digits: SHA256_DIGITS or GIT_DIGITS of them."""
    commit: str = ""
    """The revision of the repository, where it is known."""


@dataclass(frozen=True, slots=True)
class FileRecords:
    """All that is recorded about the files of a checkpoint."""

    keeper: str
    """Who wrote the records: `the hub`, or the name of a list."""
    records: Mapping[str, FileRecord]
    """By the name of the file."""
    describe_fetch: Callable[[str, str], str]
    """For the name of a file and a revision: how to get a file that is not there, as a hint."""
    overwriting: str = ""
    """What is to be added to that hint for a file that is there."""
    problems: tuple[Problem, ...] = ()
    """Of records that cannot be used."""
    unfinished: Mapping[str, str] = field(default_factory=dict)
    """Downloads that were begun, of files that have no record: by the name of the file, or else by the place; what
    lies there.
    """
    notes: tuple[Note, ...] = ()


class HashedFile(NamedTuple):
    """A file to be hashed."""

    file: File
    """Its name within the checkpoint, its size and time; the fields on its header are empty."""
    is_git: bool
    """Whether by the SHA-1 of git instead of SHA-256."""
    device: int
    """The number of the file system that it lies on."""


class Digest(Protocol):
    """A hash that is being computed."""

    def update(self, data: memoryview, /) -> None:
        """Adds bytes."""

    def hexdigest(self) -> str:
        """The hash of all bytes so far."""


def look_at_file(folder: Path, record: FileRecord) -> HashedFile | str:
    """The file of a record before it is read; text if it cannot be read: why not."""
    path = folder / record.name
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return GONE[path.is_symlink()]
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISREG(status.st_mode):
        return "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
    file = File(record.name, status.st_size, 0, "", status.st_mtime_ns)
    return HashedFile(file, len(record.digest) == GIT_DIGITS, status.st_dev)


def compute_hashes(folder: Path, files: Sequence[HashedFile], advance: Advance) -> dict[str, str | Problem]:
    """By file name: the hash in hexadecimal digits, or the problem of a file that cannot be read.

    Raises Refused if a file changes while it is read.
    """
    results: dict[str, str | Problem] = {}
    stopped = Event()
    ways = choose_ways_by_device(folder, files)

    def make_worker() -> Callable[[HashedFile], None]:
        buffer = allocate_aligned(HASH_READ_SIZE + 2 * PAGE)

        def work(item: HashedFile) -> None:
            results[item.file.name] = compute_hash(folder, item, buffer, ways[item.device], advance, stopped)

        return work

    def pass_on(ended: Event) -> None:
        # A file may take minutes: a thread has to see an interrupt between two reads, not only between two files.
        ended.wait()
        stopped.set()

    # The largest first: one that begins last would be read alone.
    queue = sorted(files, key=lambda item: (-item.file.size, item.file.name))
    run_in_threads(queue, make_worker, choose_hashing_threads(len(files), ways.values()), pass_on)
    return results


def choose_ways_by_device(folder: Path, files: Iterable[HashedFile]) -> dict[int, Ways]:
    """How to read the files of each file system: not all allow every way past the page cache."""
    sizes = sum(item.file.size for item in files)
    ways: dict[int, Ways] = {}
    for item in files:
        if item.device not in ways:
            try:
                ways[item.device] = choose_ways_to_read(folder / item.file.name, sizes)
            except Refused:  # this file will be a problem; the next one of its file system may be readable
                continue
    return {item.device: ways.get(item.device, CACHED) for item in files}


def choose_hashing_threads(files: int, ways: Iterable[Ways]) -> int:
    """The number of threads: one a processor; past the page cache two, so that one reads while the other computes."""
    is_cached = all(way.read == CACHED.read for way in ways)
    processors = len(os.sched_getaffinity(0))
    return max(1, min(files, MOST_HASHING_THREADS, processors if is_cached else 2 * processors))


def compute_hash(
    folder: Path, item: HashedFile, buffer: memoryview, ways: Ways, advance: Advance, stopped: Event
) -> str | Problem:
    """The hash of a file, or the problem if it cannot be read. Raises Refused if it changes meanwhile."""
    file = item.file
    digest = start_digest(item)
    done = 0
    try:
        with open_unchanged(folder, [file], ways, is_source=False) as (readable,):
            while done < file.size and not stopped.is_set():
                size = min(HASH_READ_SIZE, file.size - done)
                digest.update(read_range(readable, done, size, buffer))
                done += size
                advance(size)
    except OSError as error:
        fault = Problem("cannot-read", file.name, error.strerror or str(error), "a readable file")
    except Refused as refused:
        fault = replace(refused.problems[0], subject=file.name)
        if fault.kind != "cannot-read":
            raise
    else:
        return digest.hexdigest()
    advance(file.size - done)
    return fault


def start_digest(item: HashedFile) -> Digest:
    """Starts the hash of a file."""
    if item.is_git:
        return hashlib.sha1(b"blob %d\0" % item.file.size, usedforsecurity=False)
    return hashlib.sha256()
