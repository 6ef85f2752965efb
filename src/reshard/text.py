"""Formats numbers, sizes, lists of names and tables for messages; escapes untrusted names and hides secrets; makes a
path of a text.
"""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

LONGEST_SHOWN = 2_000
"""In characters, of one shown field of a problem: a name in a hostile file may have millions."""

LONGEST_NAME = 100
"""Of a tensor in a table, in characters."""

SIZE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", re.DOTALL)
"""An address as a path has it: a path has one slash where the address had two."""

SCHEME = re.compile(r"((?<![A-Za-z0-9+.?#-])[A-Za-z0-9+.-]*:/+)")
"""What an address in a text begins with. Behind a question mark it is a query."""

BEGINNING = re.compile(r"(?:--[\w-]+ )?\S*")
"""What may stand in front of an address that is the rest of the text, and may have blanks then."""

WEB_LOGIN = re.compile(r"[^/?#]*@|(?=[^/?#@]*:\d*[^\W\d]).*@", re.DOTALL)
"""In an address of a web server: a name with a password, which may have slashes."""

LOGIN = re.compile(r"(?!\.\.\.@)(?=[^/\s]*(?:@|:(?!\d{1,5}(?:[/;,.:)'\"\s]|\Z))\S))(?:.*(?=@)|\S*)", re.DOTALL)
"""In any other address: a name with a password, or keys where a bucket should be. They may have slashes.
A port stays.
"""

FILE_LOGIN = re.compile(r"(?!\.\.\.@)(?=[^/\s]*:\S)(?:.*(?=@)|\S*)", re.DOTALL)
"""In an address of this machine, where an `@` alone is part of a name; of a bucket, which has no port."""

BUCKETS = ("s3:", "gs:", "az:")

END = r"(?=[;,.:)?'\"\]]{0,9}(?:\s|\Z))"
"""Of an address in a sentence. The dots that stand for what is hidden are taken for it too."""

PLAIN = re.compile(rf"(?:[^?#]++|[?#]{END})*+")
"""An address without its query."""

PLAIN_IN_BUCKET = re.compile(rf"(?:[^?]++|\?{END}|\?(?=/))*+")
"""The same of a bucket, where the name of a folder may end in a question mark."""


def escape(text: str) -> str:
    """Escapes every control, format, private, unassigned and surrogate character, and every space but the plain one.

    Tensor and file names are untrusted: printed raw, they could move the cursor, recolour the terminal or hide text.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def escape_and_clip(text: str, most: int = LONGEST_SHOWN) -> str:
    """Cuts the text after `most` characters and escapes it."""
    if len(text) > most:
        text = f"{text[:most]}... ({len(text):,} characters)"
    return escape(text)


def shorten_name(name: str) -> str:
    """Shortens a name for a table cell, and escapes it here already: a line break would end the row."""
    text = escape(name)
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}... ({len(name):,} characters)"


def format_list(names: Iterable[str], most: int = 6) -> str:
    """Joins the first `most` names and counts the rest: `a, b, c and 12 more`."""
    shown = list(names)
    text = ", ".join(shown[:most])
    return f"{text} and {len(shown) - most:,} more" if len(shown) > most else text


def format_numbers(numbers: Iterable[int]) -> str:
    """Formats a set of numbers as ranges: `0-3, 7, 9-10`; `none` for an empty set."""
    return format_list(format_runs(numbers), 12) or "none"


def format_runs(numbers: Iterable[int]) -> list[str]:
    """Formats each run of numbers that follow each other: `0-3`, or `7`. An option takes them joined by commas."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]


def format_count(count: int, things: str) -> str:
    """Formats a number of things: `2 files`, `1 file`. `things` is the plural, which ends in `s`."""
    return f"{count:,} {things.removesuffix('s') if count == 1 else things}"


def format_size(size: int) -> str:
    """Formats a size given in bytes: `40.18 GiB`, or `12 bytes`."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(SIZE_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return format_count(size, "bytes") if unit == 0 else f"{value:.2f} {SIZE_UNITS[unit]}"


def round_to_total(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to weights, which add up to `total`: each rounded down, or up where most is lost. All
    are 0 if the weights are.
    """
    whole = sum(weights)
    exact = [weight / whole * total if whole else 0.0 for weight in weights]
    rounded = [int(one) for one in exact]
    by_loss = sorted(range(len(exact)), key=lambda place: rounded[place] - exact[place])
    for place in by_loss[: total - sum(rounded)] if whole else []:
        rounded[place] += 1
    return rounded


def format_rate(rate: float) -> str:
    """Formats a rate in bytes a second: `1.25 GiB/s`."""
    return f"{format_size(int(rate))}/s"


def format_percent(part: int, whole: int) -> str:
    """Formats a share, rounded down: `100.0%` is the whole and nothing less."""
    tenths = part * 1000 // whole if whole else 1000
    return f"{tenths // 10}.{tenths % 10}%"


def format_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats rows under a heading. A column is as wide as its widest cell; the first is left-aligned, others right.

    On a terminal that is too narrow for it, each row becomes a record instead: its first cell, and the others below.
    The heading of the first column stands above all.
    """
    lines = [tuple(heading), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    terminal = measure_terminal()
    if 0 < terminal < sum(widths) + 2 * len(widths) - 2:
        above = [f"{heading[0]}:"] if heading[0] else []
        return "\n".join([*above, *(format_record(heading, line, terminal) for line in lines[1:])])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_record(heading: Sequence[str], row: Sequence[str], width: int) -> str:
    """Formats a row as a record: `model0.safetensors`, and below it `    tensors: 163  bytes: 286,376`. Cells that are
    together wider than `width` fill several lines.
    """
    cells = [(f"{name}: " if name else "") + cell for name, cell in zip(heading[1:], row[1:], strict=True) if cell]
    below: list[str] = []
    for cell in cells:
        if below and len(below[-1]) + 2 + len(cell) <= width:
            below[-1] += f"  {cell}"
        else:
            below.append(f"    {cell}")
    return "\n".join([row[0].rstrip(), *below])


def is_terminal() -> bool:
    """Whether standard output is a terminal: a pipe or a file gets whole tables and whole lists."""
    return sys.stdout.isatty()


def measure_terminal() -> int:
    """The width of the terminal that standard output is, in columns; 0 if it is none, or tells no width."""
    if not is_terminal():
        return 0
    columns = os.environ.get("COLUMNS", "")
    with suppress(OSError, ValueError):  # of a stream without a descriptor
        return int(columns) if columns.isdecimal() else os.get_terminal_size(sys.stdout.fileno()).columns
    return 0


def format_command_lines(title: str, command: str) -> tuple[str, str]:
    """Two lines: what a command is for, and the command alone, so that its line can be pasted into a shell."""
    return f"{title}:", f"  {command}"


def make_path(text: str) -> Path:
    """Makes a path of a text. One that begins with `./` and whose folder is not there becomes absolute, for without the
    dot it would look like a name on a hub.
    """
    path = Path(text)
    return path.absolute() if text.startswith("./") and not path.parent.exists() else path


def hide_secrets(text: str) -> str:
    """A text without what is secret in the addresses in it: names, passwords, keys and queries. A second time it stays
    as it is.
    """
    if ":/" not in text:  # a name may have millions of characters
        return text
    shown, *rest = SCHEME.split(text)
    is_whole = BEGINNING.fullmatch(shown)
    for turn in range(0, len(rest), 2):
        scheme, place = rest[turn : turn + 2]
        quote = shown[-1:] if shown.endswith(("'", '"')) else ""
        address, blank, behind = (place, "", "") if is_whole or quote else re.split(r"(\s|\Z)", place, maxsplit=1)
        address, is_cut = hide_in_address(scheme, address)
        shown += f"{scheme}{address}"
        if is_cut:  # a query may have blanks, and another address
            _, end, tail = "".join(rest[turn + 1 :]).rpartition(quote) if quote else ("", "", "")
            return f"{shown}{end}{hide_secrets(tail) if end else ''}"
        shown += f"{blank}{behind}"
    return shown


def hide_in_address(scheme: str, place: str) -> tuple[str, bool]:
    """What stands behind the scheme of an address, without what is secret; and whether it had a query."""
    kind = scheme.rstrip("/").lower()
    if kind in ("http:", "https:"):
        place = WEB_LOGIN.sub("", place, count=1) if WEB_LOGIN.match(place) else place
    elif (found := FILE_LOGIN.match(place) if kind == "file:" and scheme.endswith("///") else LOGIN.match(place)) or (
        kind in BUCKETS and (found := FILE_LOGIN.match(place))
    ):
        place = f"...{place[found.end() :]}"
    plain = (PLAIN_IN_BUCKET if kind in BUCKETS else PLAIN).match(place)
    if plain is None or plain.end() == len(place):
        return place, False
    # A revision of the hub has no question mark.
    return re.sub(r"@[^@/]*\Z", "", plain[0]) + "?...", True
