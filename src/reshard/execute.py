"""Stage 4: Plan -> files. The only writer.

Everything is written under temporary names, made durable, and renamed last: a file under its final name is whole.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.copies import Copies
from reshard.errors import refuse
from reshard.plan import Plan

BUFFER_SIZE = 4 << 20
"""In bytes. Small enough to stay in the processor's cache between the read and the write."""
PARTIAL = ".partial"
"""What a name ends in until the file is whole and durable."""

Advance = Callable[[int], None]
"""Told how many more bytes of the target have been written."""


class Task(NamedTuple):
    """A piece of a copy that fits the buffer: `rows` runs of `run` bytes, `pitch` bytes apart in the source."""

    source_file: int
    source_offset: int
    pitch: int
    run: int
    rows: int
    target_file: int
    target_offset: int


def execute_plan(plan: Plan, target: Path, others: Mapping[str, bytes | Path], advance: Advance) -> None:
    """Writes the files of the plan, and the `others` by name (contents, or a file to copy), into the folder `target`.

    The folder is made if it is not there. Raises Refused if a source file ends early or the file system refuses; then
    what was written is removed, and nothing has its final name.
    """
    names = [*(file.name for file in plan.files), *others]
    try:
        target.mkdir(parents=True, exist_ok=True)
        try:
            write_ranks(plan, target, advance)
            for name, content in others.items():
                write_whole(target / (name + PARTIAL), content)
        except BaseException:
            for name in names:
                (target / (name + PARTIAL)).unlink(missing_ok=True)
            raise
        for name in names:
            (target / (name + PARTIAL)).rename(target / name)
        sync_folder(target)
        sync_folder(target.parent)
    except OSError as error:
        subject = str(error.filename or target)
        found = error.strerror or str(error)
        raise refuse("cannot-write", subject, found, "to read the source and write the target", "") from None


def write_ranks(plan: Plan, target: Path, advance: Advance) -> None:
    """Writes every rank file under its temporary name and makes it durable."""
    buffer = np.empty(BUFFER_SIZE, np.uint8)
    with ExitStack() as stack:
        sources = [open_file(stack, plan.source.folder / file.name, os.O_RDONLY) for file in plan.source.files]
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        targets = [open_file(stack, target / (file.name + PARTIAL), flags) for file in plan.files]
        for file, descriptor in zip(plan.files, targets, strict=True):
            os.posix_fallocate(descriptor, 0, file.size)
            write_all(descriptor, file.header, 0)
            advance(len(file.header))
        for task in tasks(plan.copies, BUFFER_SIZE):
            data = read_task(sources[task.source_file], task, buffer, plan.source.files[task.source_file].name)
            write_all(targets[task.target_file], data, task.target_offset)
            advance(task.run * task.rows)
        for descriptor in targets:
            os.fsync(descriptor)


def open_file(stack: ExitStack, path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    stack.callback(os.close, descriptor)
    return descriptor


def tasks(copies: Copies, most: int) -> Iterator[Task]:
    """The copies in the order of the source, each in pieces whose band of source rows has at most `most` bytes."""
    order = np.lexsort((copies.source_offset, copies.source_file))
    columns = [getattr(copies, name)[order].tolist() for name in Task._fields]
    for task in map(Task._make, zip(*columns, strict=True)):
        if task.rows == 1 or task.pitch > most:
            for row in range(task.rows):
                yield from run_tasks(task, row, most)
        else:
            yield from band_tasks(task, most // task.pitch)


def run_tasks(task: Task, row: int, most: int) -> Iterator[Task]:
    """One run of a copy, in pieces of at most `most` bytes."""
    source, target = task.source_offset + row * task.pitch, task.target_offset + row * task.run
    for start in range(0, task.run, most):
        size = min(most, task.run - start)
        yield Task(task.source_file, source + start, size, size, 1, task.target_file, target + start)


def band_tasks(task: Task, most_rows: int) -> Iterator[Task]:
    """The runs of a copy, so many at a time."""
    for row in range(0, task.rows, most_rows):
        source, target = task.source_offset + row * task.pitch, task.target_offset + row * task.run
        yield task._replace(source_offset=source, rows=min(most_rows, task.rows - row), target_offset=target)


def read_task(source: int, task: Task, buffer: NDArray[np.uint8], name: str) -> memoryview:
    """The bytes that a task moves, as they will lie in the target. Raises Refused if the file `name` ends early."""
    size = (task.rows - 1) * task.pitch + task.run
    read_all(source, buffer.data[:size], task.source_offset, name)
    if task.rows == 1:
        return buffer.data[:size]
    runs = np.lib.stride_tricks.as_strided(buffer, (task.rows, task.run), (task.pitch, 1))
    return np.ascontiguousarray(runs).reshape(-1).data


def read_all(descriptor: int, into: memoryview, offset: int, name: str) -> None:
    """Fills `into` from an offset of the file, however many calls it takes."""
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            found = f"it ends at byte {offset + done:,}"
            raise refuse(
                "source-changed", name, found, f"at least {offset + len(into):,} bytes, as when it was planned"
            )
        done += count


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Writes the data at an offset of the file, however many calls it takes."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def write_whole(path: Path, content: bytes | Path) -> None:
    """A small file, durable."""
    data = content if isinstance(content, bytes) else content.read_bytes()
    with ExitStack() as stack:
        descriptor = open_file(stack, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        write_all(descriptor, data, 0)
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    with ExitStack() as stack:
        os.fsync(open_file(stack, folder, os.O_RDONLY | os.O_DIRECTORY))
