"""Formats numbers, sizes, lists of names and tables for messages; escapes names that come from untrusted files."""

from collections.abc import Iterable, Sequence

LONGEST_SHOWN = 2_000
"""In characters, of one shown field of a problem: a name in a hostile file may have millions."""

SIZE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def escape(text: str) -> str:
    """Escapes every control, format, private, unassigned and surrogate character, and every space but the plain one.

    Tensor and file names are untrusted: printed raw, they could move the cursor, recolour the terminal or hide text.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def escape_and_clip(text: str) -> str:
    """Cuts the text after LONGEST_SHOWN characters and escapes it."""
    if len(text) > LONGEST_SHOWN:
        text = f"{text[:LONGEST_SHOWN]}... ({len(text):,} characters)"
    return escape(text)


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


def format_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats rows under a heading. A column is as wide as its widest cell; the first is left-aligned, others right."""
    lines = [tuple(heading), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
