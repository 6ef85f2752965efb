"""Reads a list of checksums in the style of `sha256sum`."""

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from reshard.errors import MOST_EXPLAINED, MOST_PROBLEMS, Problem, refuse, require_none
from reshard.formats.json_input import MAX_HEADER_SIZE
from reshard.storage.opened import open_regular_file
from reshard.text import format_list
from reshard.types import Note
from reshard.verification.file_hashes import SHA256_DIGITS, FileRecord, FileRecords

PLAIN_LINE = re.compile(r"(\\)?([0-9a-fA-F]{16,})(?: [ *]|[ \t]+)(.+)", re.DOTALL)
"""`HEX  name`, or `HEX *name` of a file that was read as binary. A backslash before it: the name is escaped."""

TAGGED_LINE = re.compile(r"(\\)?([\w/-]+) ?\((.+)\) ?= ?([0-9a-fA-F]+)", re.DOTALL)
"""`SHA256 (name) = HEX`, as BSD and `sha256sum --tag` write it, or openssl without the spaces."""

SHA256_TAGS = {"SHA256", "SHA2-256"}

ALGORITHMS = {32: "MD5", 40: "SHA-1", 56: "SHA-224", 96: "SHA-384", 128: "SHA-512"}
"""By the number of hexadecimal digits: hashes of other programs that a list may have."""

LINE_FORM = "HEX  NAME, with the 64 hexadecimal digits of a SHA-256; or SHA256 (NAME) = HEX"

MAKE_LIST_HINT = "make the list where the files are known to be good: sha256sum *.safetensors > SHA256SUMS"

INSIDE_HINT = (
    "cd into the folder of the checkpoint where its files are known to be good, and make the list again there: "
    "sha256sum *.safetensors > SHA256SUMS"
)

ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


class SumLine(NamedTuple):
    """A line of a list."""

    name: str
    """As it is written, without escapes."""
    digest: str
    """In lower case."""


def read_sums(folder: Path, path: Path) -> FileRecords:
    """The hashes that a list gives for the files of a folder. Raises Refused with every line that is wrong."""
    records: dict[str, FileRecord] = {}
    problems: list[Problem] = []
    for number, line in list_lines(path):
        subject = f"{path}: line {number:,}"
        parsed = parse_line(line, subject)
        name = None if isinstance(parsed, Problem) else find_name_in_folder(folder, parsed.name)
        if isinstance(parsed, Problem):
            problems.append(parsed)
        elif name is None:
            expected = f"a name within {folder}: names in the list are relative to it"
            problems.append(Problem("unsafe-file-name", subject, parsed.name, expected, INSIDE_HINT))
        elif records.setdefault(name, FileRecord(name, parsed.digest)).digest != parsed.digest:
            problems.append(Problem("wrong-sums", subject, f"another hash of {name} than before", "one hash a file"))
        # Another file than a list, or a list of other hashes: its first lines say it.
        if len(problems) >= (MOST_PROBLEMS if records else MOST_EXPLAINED):
            break
    require_none(problems)
    leading = find_leading_folder(folder, records)
    if not leading:
        require_some_of_folder(folder, path, records)
        return FileRecords(path.name, records, describe_fetch_again)
    shorter = {name.removeprefix(leading): record for name, record in records.items()}
    records = {name: record._replace(name=name) for name, record in shorter.items()}
    note = Note(
        "sums-names", f"the names of {path.name} are taken without `{leading}`, which all of them have in front"
    )
    return FileRecords(path.name, records, describe_fetch_again, notes=(note,))


def describe_fetch_again(_name: str, _commit: str) -> str:
    """How to get a file again, as a hint: a list does not tell where from."""
    return "download or copy the file again"


def list_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a list with their numbers from 1 on, without blank lines and comments. Raises Refused."""
    try:
        with open_regular_file(path) as file:
            content = file.read(MAX_HEADER_SIZE + 1)
    except OSError as error:
        expected = "a list of checksums, as sha256sum writes it"
        raise refuse("cannot-read", str(path), error.strerror or str(error), expected, MAKE_LIST_HINT) from None
    if len(content) > MAX_HEADER_SIZE:
        expected = f"a list of at most {MAX_HEADER_SIZE:,} bytes"
        raise refuse("too-large", str(path), "more", expected, "is it a list of checksums?")
    for number, line in enumerate(os.fsdecode(content.removeprefix(b"\xef\xbb\xbf")).split("\n"), 1):
        text = line.removesuffix("\r")
        if text.strip() and not text.startswith("#"):
            yield number, text


def parse_line(line: str, subject: str) -> SumLine | Problem:
    """The name and the hash of a line; the problem of a line that has another form or another hash."""
    if tagged := TAGGED_LINE.fullmatch(line):
        escaped, tag, name, digest = tagged.groups()
        algorithm = "SHA-256" if tag.upper() in SHA256_TAGS and len(digest) == SHA256_DIGITS else tag
    elif plain := PLAIN_LINE.fullmatch(line):
        escaped, digest, name = plain.groups()
        algorithm = ALGORITHMS.get(len(digest), "SHA-256" if len(digest) == SHA256_DIGITS else "")
    else:
        return Problem("wrong-sums", subject, repr(line[:200]), LINE_FORM, MAKE_LIST_HINT)
    if algorithm != "SHA-256":
        found = f"{algorithm or 'a hash'} of {len(digest)} digits"
        return Problem("wrong-sums", subject, found, "a SHA-256, of 64 digits", MAKE_LIST_HINT)
    name = re.sub(r"\\.", lambda match: ESCAPES.get(match[0], match[0]), name) if escaped else name
    return SumLine(name, digest.lower())


def find_name_in_folder(folder: Path, name: str) -> str | None:
    """The name relative to the folder, without `./`; None if it leads out of it."""
    root = os.path.abspath(folder)  # noqa: PTH100 - resolving links would change the names
    inside = os.path.relpath(os.path.join(root, name), root)  # noqa: PTH118
    return None if inside in {".", ".."} or inside.startswith("../") or "\0" in name else inside


def find_leading_folder(folder: Path, names: Collection[str]) -> str:
    """The folders, with a `/` behind them, that all names have in front if a list was made above the folder; else
    empty.

    None of the names must be there as it stands: `original/x` is not `x`.
    """
    # The names between the first and the last one begin with all that these two share.
    ends = [name.rpartition("/")[0] for name in (min(names), max(names))] if names else [""]
    common = os.path.commonpath(ends).split("/")
    if common == [""] or os.path.lexists(folder / common[0]):
        return ""
    leading = ("/".join(common[:depth]) + "/" for depth in range(1, len(common) + 1))
    return next((one for one in leading if any(os.path.lexists(folder / name[len(one) :]) for name in names)), "")


def require_some_of_folder(folder: Path, path: Path, records: Collection[str]) -> None:
    """Raises Refused if a list names nothing at all, or not one file of the folder."""
    if not records:
        raise refuse("wrong-sums", str(path), "no line with a checksum", LINE_FORM, MAKE_LIST_HINT)
    if any(os.path.lexists(folder / name) for name in records):
        return
    found = format_list(records, 3) + ": none of them is there"
    above = find_listed_folder(folder, records)
    remedy = f"the list names this folder from above: verify {above} with it" if above else "is it the right list?"
    raise refuse("wrong-sums", str(path), found, f"names of files, relative to {folder}", remedy)


def find_listed_folder(folder: Path, names: Collection[str]) -> Path | None:
    """The nearest folder above from which a list names files of this one; None if there is none.

    A file of the same list elsewhere is not enough: it would be verified in the place of this folder.
    """
    place = Path(os.path.abspath(folder))  # noqa: PTH100 - resolving links would change the names
    for above in place.parents:
        prefix = place.relative_to(above).as_posix() + "/"
        if any(name.startswith(prefix) and os.path.lexists(above / name) for name in names):
            return above
    return None
