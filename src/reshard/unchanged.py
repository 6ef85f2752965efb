"""Whether open files are what they were when their headers were read. Reads none of their bytes."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from reshard.errors import Refused, refuse
from reshard.types import File

AGAIN = "begin again with the files as they are now"


class Watched(NamedTuple):
    """Open files of a folder."""

    folder: Path
    files: Sequence[File]
    """As they were when their headers were read."""
    descriptors: Sequence[int]


@contextmanager
def unchanged(sides: Iterable[Watched]) -> Iterator[None]:
    """A context to compare files in. Raises Refused if they have changed before it begins or by the time it ends."""
    watched = list(sides)
    require_all_unchanged(watched)
    try:
        yield
    except Refused:
        require_all_unchanged(watched)  # of a file that ends too early, this tells more
        raise
    require_all_unchanged(watched)


def require_all_unchanged(sides: Iterable[Watched]) -> None:
    for side in sides:
        require_unchanged(*side, is_source=False)


def require_unchanged(
    folder: Path, files: Sequence[File], descriptors: Sequence[int], *, is_source: bool = True, again: str = AGAIN
) -> None:
    """Nothing was written to the files of a folder, and each still has its name: what was made of their headers holds
    for what is there. `again` is what can be done if not. Raises Refused.
    """
    for file, descriptor in zip(files, descriptors, strict=True):
        path = folder / file.name
        require_unwritten(path, file, descriptor, is_source=is_source, again=again)
        if not is_named(descriptor, path):
            remedy = f"put it back and run the same command again; or {again}"
            raise changed(path, "removed or replaced", "the file whose header was read", remedy, is_source=is_source)


def require_unwritten(path: Path, file: File, descriptor: int, *, is_source: bool = True, again: str = AGAIN) -> None:
    """Nothing was written to an open file, whatever name it has by now. Raises Refused."""
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
        found, expected = f"{status.st_size:,} bytes, written since its header was read", f"{file.size:,} bytes"
        raise changed(path, found, f"{expected}, unchanged", f"let nobody write to it; {again}", is_source=is_source)


def changed(path: Path, found: str, expected: str, remedy: str, *, is_source: bool) -> Refused:
    kind = "source-changed" if is_source else "file-changed"
    return refuse(kind, str(path), found, expected, remedy)


def is_named(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one that has its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
