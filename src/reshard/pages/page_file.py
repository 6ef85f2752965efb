"""The file of a page: refused before the work begins where it cannot be written, and written whole or not at all."""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from reshard.errors import Problem, refuse, require_none
from reshard.formats.remote_names import is_address
from reshard.pages.page import MARK

OPTION = "--html"


def check_page_path(path: Path, checkpoints: Iterable[Path | None]) -> Iterator[Problem]:
    """Reports why a page cannot be written to a file: it lies in a checkpoint that is read or written, or is there and
    no page of reshard, or its folder is not there.
    """
    subject, folder = f"{OPTION} {path}", Path(path).parent
    if is_address(path):
        yield Problem("cannot-write", subject, "an address", "a file of this machine", "write it here, and copy it")
        return
    path = Path(path)
    for one in checkpoints:
        if one is not None and not is_address(one) and is_inside(path, Path(one)):
            found, expected = f"it would lie in {one}", "a file outside of the checkpoints"
            yield Problem("target-inside-source", subject, found, expected, "another file")
            return
    if str(path) == "-":
        yield Problem("cannot-write", subject, "no name", "the name of a file", f"{OPTION} page.html")
    elif not is_visible_folder(folder):
        yield Problem(
            "cannot-write", subject, f"no folder {folder}", "a file in a folder that is there", "make the folder"
        )
    elif is_visible_folder(path):
        yield Problem("cannot-write", subject, "a folder", "the name of a file", f"{OPTION} {path / 'page.html'}")
    elif os.path.lexists(path) and not is_page(path):
        found, expected = "a file that is no page of reshard", "a new file, or a page to be replaced"
        yield Problem("not-a-page", subject, found, expected, "another file")
    else:
        yield from try_to_write(path)


def try_to_write(path: Path) -> Iterator[Problem]:
    """Reports what the system says to the name of a page, and to a file without a name in its folder."""
    subject, expected = f"{OPTION} {path}", "to write the page"
    try:
        with TemporaryFile(dir=path.parent), suppress(FileNotFoundError):
            path.lstat()
    except PermissionError:
        yield Problem("no-permission", subject, f"no files can be made in {path.parent}", expected, "another file")
    except OSError as error:
        yield Problem("cannot-write", subject, error.strerror or str(error), expected, "another file")


def is_inside(path: Path, checkpoint: Path) -> bool:
    """Whether a file, or what it is a link to, lies in a folder, whatever links lead there; or is the checkpoint."""
    named, real = Path(os.path.realpath(path.parent)) / path.name, Path(os.path.realpath(path))
    return Path(os.path.realpath(checkpoint)) in (named, *named.parents, real, *real.parents)


def is_visible_folder(path: Path) -> bool:
    """Whether a path is a folder that can be seen."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_page(path: Path) -> bool:
    """Whether a file is a page that reshard has written."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MARK)) == MARK.encode()
    except OSError:
        return False


def write_page(path: Path, text: str) -> None:
    """Writes a page under another name, and renames it when it is whole; through a link, to where it leads. Raises
    Refused if the system does not let it, or if another file has come to stand there meanwhile.
    """
    real = Path(os.path.realpath(path))
    partial = real.with_name(f".reshard-page-{secrets.token_hex(8)}.partial")
    try:
        with partial.open("x", encoding="utf-8", newline="\n") as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                require_none(check_page_path(path, ()))
                partial.replace(real)
            except BaseException:
                partial.unlink()
                raise
    except OSError as error:
        found = error.strerror or str(error)
        raise refuse("cannot-write", f"{OPTION} {path}", found, "to write the page", "another file") from None


def describe_page_file(path: Path | None) -> dict[str, str]:
    """Describes where a page was written, as JSON values; nothing without one."""
    return {"page": str(path)} if path else {}


def name_page(path: Path | None) -> list[str]:
    """Says in a line where a page was written; no line without one."""
    return [f"page: {path}"] if path else []
