"""Reads, writes and locks the journal: a record of the groups of a job that are durable, so that a rerun resumes it.

It lies in the target folder: a line of JSON with the identity of the job, then batches of fixed-size records. A batch
is appended only after the bytes that it records are on the disk, and has its own checksum. A batch that a crash tore
off at the end, or whose length points behind the end, is ignored with all that follows; other damage is refused.

The file is also the lock on the target. The kernel releases it with the process, so that it is never stale. The first
line also says who has it: it may be stale, and is asked only when the lock is held. On a network file system the lock
is a file of its own (`lock_files.py`).
"""

import fcntl
import json
import os
import shlex
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_digest

from reshard.errors import Problem, refuse, require_none
from reshard.execution.holders import HOLDER_TEXT, describe_holder, name_host, refuse_in_use
from reshard.execution.lock_files import LockFile, find_lock_holder, take_lock_file
from reshard.execution.other_jobs import describe_other_job
from reshard.formats.target_names import JOURNAL, LOCK, PARTIAL
from reshard.storage.file_systems import is_on_network
from reshard.storage.local import open_descriptor, write_durable
from reshard.storage.opened import open_regular_file
from reshard.text import format_list

RECORD = struct.Struct("<QII16s")
"""Offset in the target file, index of the target file, size, xxh3-128 of the bytes."""

BATCH_COUNT = struct.Struct("<I")
"""Number of records in a batch."""

CHECKSUM_SIZE = 8
"""In bytes, of a batch: xxh3-64."""

LONGEST_JOB_LINE = 64 << 20
"""In bytes."""

HOLDER = "held_by"
"""Key. Its value is padded with spaces: it is written again in its place by whoever resumes the job."""

RESTART = "--restart throws the partial files away and begins again"


@dataclass(frozen=True, slots=True)
class TargetLock:
    """The lock on a target, held by this process."""

    descriptor: int
    """Of the journal."""
    file: LockFile | None
    """On a network file system. The lock of a kernel is never lost."""

    def is_held(self) -> bool:
        """Whether it is still ours. Raises OSError if that cannot be seen."""
        return self.file is None or self.file.is_held()

    def require_held(self) -> None:
        """Raises Refused if another run has taken it over, and OSError."""
        if self.file is not None:
            self.file.require_held()


@dataclass(frozen=True, slots=True)
class Journal:
    """An open and locked journal."""

    descriptor: int
    lock: TargetLock
    path: Path
    start: int
    """Where its records begin, in bytes."""
    records: bytearray
    """The records that were in it when it was opened; whoever appends to it adds them here too."""


def open_journal(
    stack: ExitStack, folder: Path, job: Mapping[str, Any], kept: Collection[str] = (), *, restart: bool = False
) -> Journal:
    """Opens the journal of a folder, locked until the stack closes; a new one if there is none, or to `restart`, or if
    its job has left nothing but finished files. These are `kept`, also by a restart: a manifest names them.

    Raises Refused if another process has locked it, if it belongs to another job, or if it is damaged.
    """
    path = folder / JOURNAL
    lock = lock_journal(stack, path)
    descriptor = lock.descriptor
    content = path.read_bytes()
    left = list_left_files(folder)
    is_over = (bool(left) and left.issubset(kept)) or (job.get("files") == [] and has_no_files(content))
    if restart:
        # Only now that it is locked: no other process is writing these files.
        for name in left.difference(kept):
            (folder / name).unlink(missing_ok=True)
    if restart or is_over or b"\n" not in content:
        # Without a complete first line nothing can be durable yet.
        line = (json.dumps({HOLDER: describe_holder(), **job}) + "\n").encode()
        os.ftruncate(descriptor, 0)
        append_durably(descriptor, line)
        return Journal(descriptor, lock, path, len(line), bytearray())
    start = content.index(b"\n") + 1
    finished = [name for name in sorted(kept) if (folder / name).exists()]
    require_none(check_same_job(content[:start], job, path, finished))
    records, end = read_batches(content, start, path)
    rewrite_holder(descriptor, content)
    os.ftruncate(descriptor, end)
    os.lseek(descriptor, end, os.SEEK_SET)
    return Journal(descriptor, lock, path, start, records)


def has_no_files(content: bytes) -> bool:
    """Whether a journal is of a job that writes no tensors, such as a join, or is none. Nothing in it is durable."""
    try:
        return not json.loads(content.partition(b"\n")[0])["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return True


def list_left_files(folder: Path) -> set[str]:
    """The files that an interrupted job has left in a folder, by its journal; none if that is missing or damaged.

    Every rank file has its temporary name from the start of a job. So a rank file without one was renamed by the job,
    and its final name belongs to the job too; so do those of the side files, once all rank files are renamed.
    """
    try:
        with (folder / JOURNAL).open("rb") as file:
            job = json.loads(file.readline(LONGEST_JOB_LINE))
        files, others = (set(map(str, job[key])) for key in ("files", "others"))
        present = {path.name for path in folder.iterdir()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    partials = {name + PARTIAL for name in files | others} & present
    renamed = {name for name in files & present if name + PARTIAL not in partials}
    is_ending = renamed and not any(name + PARTIAL in partials for name in files)
    return partials | renamed | (others & present if is_ending else set())


def has_partial_files(folder: Path) -> bool:
    """Whether an unfinished job, by its journal, has left files with temporary names in a folder."""
    return any(name.endswith(PARTIAL) for name in list_left_files(folder))


def has_records(journal: Journal) -> bool:
    """Whether any bytes of the job are durable."""
    return os.fstat(journal.descriptor).st_size > journal.start


def has_durable_bytes(folder: Path) -> bool:
    """Whether a run that was interrupted has left bytes in a folder that the next one need not write again."""
    try:
        with open_regular_file(folder / JOURNAL) as file:
            line = file.readline(LONGEST_JOB_LINE)
            return line.endswith(b"\n") and os.fstat(file.fileno()).st_size > len(line)
    except OSError:
        return False


def lock_journal(stack: ExitStack, path: Path) -> TargetLock:
    """Opens and locks the journal. Raises Refused if another process has locked it, and OSError."""
    lock_path, is_trusted = path.with_name(LOCK), not is_on_network(path.parent)
    if is_trusted:
        descriptor = lock_by_kernel(stack, path)
        if not os.path.lexists(lock_path):
            return TargetLock(descriptor, None)
    # Where the kernel is to be trusted, the lock file is of another machine that has this disk mounted over a network.
    file = take_lock_file(stack, lock_path)
    if file.was_taken:
        replace_journal(path)
    return TargetLock(open_descriptor(stack, path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW), file)


def lock_by_kernel(stack: ExitStack, path: Path) -> int:
    """Opens the journal and locks it by `flock`; returns its descriptor. Raises Refused if another process has."""
    while True:
        descriptor = open_descriptor(stack, path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refuse_in_use(path.parent, find_holder(path) or "another process") from None
        except OSError as error:
            found = f"a file system without locks ({error.strerror})"
            expected = "a lock: two runs at one time would spoil the target"
            remedy = "a target on another disk, or have it mounted with locks"
            raise refuse("cannot-write", str(path.parent), found, expected, remedy) from None
        # The one before us may have removed the file between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor


def replace_journal(path: Path) -> None:
    """Puts a copy in the place of the journal: who had the lock, and wakes up while it writes to it, writes to a file
    that is no more.
    """
    if path.exists():
        copy = path.with_name(path.name + PARTIAL)
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            write_durable(copy, file.read())
        copy.rename(path)


def rewrite_holder(descriptor: int, content: bytes) -> None:
    """Writes into the first line that this process has the lock now; not into a line of before there was such a field.

    Whatever a crash leaves of it is still a line of JSON of the same length.
    """
    field = json.dumps({HOLDER: describe_holder()}).encode().removesuffix(b"}")
    if content.startswith(field[: field.index(b":")]) and content[len(field) : len(field) + 1] in (b",", b"}"):
        os.pwrite(descriptor, field, 0)
        os.fsync(descriptor)


def find_holder(path: Path, inode: int | None = None) -> str:
    """The process that has locked a journal, as it says in its first line; empty if that is not known.

    A process of this host that is there no more has not the lock: another one took it just now. With an `inode`, that
    of the journal, nobody has found it locked: then the process is named only if this host's kernel names it too, or
    a lock file does.
    """
    if inode is not None and (holder := find_lock_holder(path.with_name(LOCK))):
        return holder
    try:
        with open_regular_file(path) as file:
            field = json.loads(file.readline(LONGEST_JOB_LINE)).get(HOLDER, "")
        found = HOLDER_TEXT.fullmatch(field.rstrip())
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
    is_gone = found and found[2] == name_host() and not Path("/proc", found[1]).exists()
    if not found or is_gone or (inode is not None and not has_lock(int(found[1]), inode)):
        return ""
    return found[0]


def has_lock(process: int, inode: int) -> bool:
    """Whether a process has locked a file, by the kernel's list. Taking the lock to see would refuse it to others."""
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return False
    kind, number, place = 1, 4, 5  # as in `1: FLOCK ADVISORY WRITE 4711 08:01:131073 0 EOF`
    locks = [line.split() for line in lines]
    mine = [lock for lock in locks if len(lock) > place and (lock[kind], lock[number]) == ("FLOCK", str(process))]
    return any(lock[place].endswith(f":{inode}") for lock in mine)


def check_same_job(line: bytes, job: Mapping[str, Any], path: Path, finished: Collection[str]) -> Iterator[Problem]:
    """Reports how the job of the journal differs from the job that is asked for, as one problem. `finished` has
    the files that another job has finished.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        yield Problem("damaged-journal", str(path), "a first line that is not JSON", "the job that it is of", RESTART)
        return
    yield from find_job_differences(found, job, str(path.parent), finished)


def find_job_differences(
    found: Mapping[str, Any], job: Mapping[str, Any], target: str, finished: Collection[str]
) -> Iterator[Problem]:
    """Reports how a job that a journal has differs from the one that is asked for, as one problem."""
    found = {key: value for key, value in found.items() if key != HOLDER}
    wanted = json.loads(json.dumps(job))
    if found != wanted:
        before, now = describe_other_job(found, wanted), describe_other_job(wanted, found, "of this source")
        remedy = suggest_way(found, wanted, finished, target)
        expected = f"this conversion: {now}"
        yield Problem("another-job", target, f"an unfinished conversion: {before}", expected, remedy)


def suggest_way(found: Mapping[str, Any], wanted: Mapping[str, Any], finished: Collection[str], target: str) -> str:
    """The way on from an unfinished conversion of another job. Neither one whose source has changed can be finished,
    nor one of whose files some were made elsewhere and copied here.
    """
    other, files = {key for key, value in wanted.items() if found.get(key) != value}, found.get("files")
    brought = [name for name in finished if isinstance(files, list) and name in files]
    if brought and other <= {"source", "files", "sizes"}:
        return f"another target; {RESTART}, and keeps {format_list(brought)}, which came here finished"
    if other <= {"source"}:
        return f"another target; {RESTART}"
    command = shlex.join(["reshard", "inspect", target])
    return f"another target; or go on with that one, by the command that {command} prints"


def read_batches(content: bytes, start: int, path: Path) -> tuple[bytearray, int]:
    """The records of all complete batches, and the byte where the last of them ends. Raises Refused for damage."""
    found = bytearray()
    while start < len(content):
        head = content[start : start + BATCH_COUNT.size]
        size = BATCH_COUNT.unpack(head)[0] * RECORD.size if len(head) == BATCH_COUNT.size else 0
        end = start + BATCH_COUNT.size + size + CHECKSUM_SIZE
        batch = content[start : end - CHECKSUM_SIZE]
        if not size or end > len(content) or xxh3_64_digest(batch) != content[end - CHECKSUM_SIZE : end]:
            if is_torn(content, start, end):
                return found, start
            found_text = f"a batch at byte {start:,} whose checksum is wrong"
            raise refuse("damaged-journal", str(path), found_text, "what was written there", RESTART)
        found += batch[BATCH_COUNT.size :]
        start = end
    return found, start


def is_torn(content: bytes, start: int, end: int) -> bool:
    """Whether a bad batch is what a crash leaves at the end of the file: too short, or only zeros."""
    return end >= len(content) or not any(content[start:])


def append_durably(descriptor: int, data: bytes) -> None:
    """Appends to the journal and waits until it is on the disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fdatasync(descriptor)


def append_records(journal: Journal, records: bytes) -> None:
    """Appends a batch of records. The bytes that they record must be durable already. Raises Refused if another run has
    the journal by now.
    """
    journal.lock.require_held()
    batch = BATCH_COUNT.pack(len(records) // RECORD.size) + records
    append_durably(journal.descriptor, batch + xxh3_64_digest(batch))
