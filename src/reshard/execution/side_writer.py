"""Writes the files beside the tensors, such as a tokenizer: made or copied, of any size, in constant memory."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from xxhash import xxh3_128

from reshard.errors import refuse
from reshard.execution.journal import TargetLock
from reshard.formats.target_names import PARTIAL
from reshard.paths import AnyPath
from reshard.storage.counting import WorkCounter
from reshard.storage.local import CACHED, open_descriptor, reserve_blocks, write_range
from reshard.storage.opened import measure_open_file, open_regular_file

LARGEST_READ = 1 << 20
"""In bytes: so much of a side file is in memory at once."""


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file beside the tensors of a target: made, or copied from the source."""

    origin: bytes | AnyPath
    """The content of a made one; the path of one that is copied."""
    size: int
    """In bytes."""
    version: int | str = 0
    """Of one that is copied: as that of `File`."""


def write_side_files(
    target: Path, sides: Mapping[str, SideFile], counter: WorkCounter, lock: TargetLock
) -> dict[str, str]:
    """Writes side files under their temporary names and waits until they are on the disk; returns name -> xxh3-128.
    Their bytes are counted.

    Raises Refused if one cannot be read or has changed since it was looked at, and OSError if one cannot be written.
    """
    return {name: write_side_file(target / (name + PARTIAL), side, counter, lock) for name, side in sides.items()}


def write_side_file(path: Path, side: SideFile, counter: WorkCounter, lock: TargetLock) -> str:
    """Writes a side file; returns its xxh3-128, in hexadecimal. Raises Refused and OSError as `write_side_files`."""
    checksum, end = xxh3_128(), 0
    with ExitStack() as stack:
        descriptor = open_descriptor(stack, path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW)
        lock.require_held()  # else the file may be that of another run
        os.ftruncate(descriptor, 0)
        if side.size:  # no blocks at all are an error to the kernel
            reserve_blocks(descriptor, side.size)
        for data in read_side_file(side):
            checksum.update(data)
            write_range(descriptor, data, end, CACHED)
            end += len(data)
            counter.advance(len(data))
        os.fsync(descriptor)
    counter.settle(end)
    return checksum.hexdigest()


def compute_side_checksum(side: SideFile) -> str:
    """The xxh3-128 of a side file, in hexadecimal. Raises Refused as `read_side_file`."""
    checksum = xxh3_128()
    for data in read_side_file(side):
        checksum.update(data)
    return checksum.hexdigest()


def read_side_file(side: SideFile) -> Iterator[memoryview]:
    """Reads a side file part by part; each part is valid until the next one is read.

    Raises Refused if it cannot be read, or has changed since it was looked at.
    """
    if isinstance(side.origin, bytes):
        yield memoryview(side.origin)
        return
    buffer, left = memoryview(bytearray(min(LARGEST_READ, side.size))), side.size
    try:
        with open_regular_file(side.origin) as file:
            # Not to its end: one that is still written to, such as a log, may never end.
            while left and (count := file.readinto(buffer[:left])):  # type: ignore[attr-defined]
                yield buffer[:count]
                left -= count
            require_as_seen(side, file)
    except OSError as error:
        raise refuse("cannot-read", str(side.origin), error.strerror or str(error), "a readable file") from None


def require_as_seen(side: SideFile, file: BinaryIO) -> None:
    """Raises Refused if an open side file was written to since it was looked at."""
    size, version = measure_open_file(file)
    if (size, version) != (side.size, side.version):
        found, expected = f"{size:,} bytes, written just now", f"{side.size:,} bytes, unchanged"
        remedy = "let nobody write to it, and run the same command again"
        raise refuse("source-changed", str(side.origin), found, expected, remedy)
