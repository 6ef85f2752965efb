"""Opens the files of a checkpoint, and refuses to go on if one has changed since its header was read."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from reshard.errors import Refused, refuse
from reshard.paths import AnyPath
from reshard.storage.local import ReadableFile, Ways, refuse_unreadable
from reshard.storage.opened import OpenFile, RemoteFile, open_file
from reshard.types import File

START_AGAIN = "begin again with the files as they are now"


@contextmanager
def open_unchanged(
    folder: AnyPath, files: Sequence[File], ways: Ways, *, is_source: bool = True, again: str = START_AGAIN
) -> Iterator[list[OpenFile]]:
    """A context that opens files for reading and gives them, in the order of `files`.

    Raises Refused if a file cannot be opened, or has changed since its header was read: before the context begins or by
    the time it ends.
    """
    with ExitStack() as stack:
        paths = [folder / file.name for file in files]
        opened = []
        for path in paths:
            with refuse_unreadable(path):
                opened.append(open_file(stack, path, ways, path.name if is_source else str(path)))
        require_unchanged(folder, files, opened, is_source=is_source, again=again)
        try:
            yield opened
        except Refused:
            # In a comparison, "written to" explains more than "ends too early". Of a source, the byte is told.
            if not is_source:
                require_unchanged(folder, files, opened, is_source=is_source, again=again)
            raise
        require_unchanged(folder, files, opened, is_source=is_source, again=again)


def require_unchanged(
    folder: AnyPath,
    files: Sequence[File],
    opened: Sequence[OpenFile],
    *,
    is_source: bool = True,
    again: str = START_AGAIN,
) -> None:
    """Raises Refused if an open file was written to, removed or replaced since its header was read.

    `again` tells how to begin again, for the hint of the refusal.
    """
    for file, readable in zip(files, opened, strict=True):
        path = folder / file.name
        require_unwritten(path, file, readable, is_source=is_source, again=again)
        if isinstance(path, Path) and not has_its_name(readable, path):
            remedy = f"put it back and run the same command again; or {again}"
            raise refuse_changed(
                path, "removed or replaced", "the file whose header was read", remedy, is_source=is_source
            )


def require_unwritten(
    path: AnyPath, file: File, readable: OpenFile, *, is_source: bool = True, again: str = START_AGAIN
) -> None:
    """Raises Refused if an open file was written to since its header was read, whatever its name is by now. A store
    tells that with each read.
    """
    if isinstance(readable, RemoteFile):
        return
    status = os.fstat(readable.descriptor)
    if (status.st_size, status.st_mtime_ns) != (file.size, file.version):
        found, expected = f"{status.st_size:,} bytes, written since its header was read", f"{file.size:,} bytes"
        raise refuse_changed(
            path, found, f"{expected}, unchanged", f"let nobody write to it; {again}", is_source=is_source
        )


def refuse_changed(path: AnyPath, found: str, expected: str, remedy: str, *, is_source: bool) -> Refused:
    """The refusal of a file that has changed: `source-changed` where it is converted, `file-changed` where compared."""
    kind = "source-changed" if is_source else "file-changed"
    return refuse(kind, str(path), found, expected, remedy)


def has_its_name(readable: OpenFile, path: Path) -> bool:
    """Whether a path still leads to the open file, and not to another or to none."""
    try:
        return isinstance(readable, ReadableFile) and os.path.samestat(os.fstat(readable.descriptor), path.stat())
    except FileNotFoundError:
        return False
