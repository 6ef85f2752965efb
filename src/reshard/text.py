"""How messages and reports write numbers, sizes, lists of names, tables, and names that strangers chose."""

from collections.abc import Iterable, Sequence

LONGEST_SHOWN = 2_000
"""In characters, of one field of a problem as a person sees it: a name in a hostile file may have millions."""

SIZE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def printable(text: str) -> str:
    """The text with every control, format, private, unassigned and surrogate character escaped, and every odd space.

    Tensor and file names come from strangers: printed raw, they could move the cursor, recolour the terminal or hide
    text.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def shown(text: str) -> str:
    """The text escaped by `printable`, cut after LONGEST_SHOWN characters."""
    if len(text) > LONGEST_SHOWN:
        text = f"{text[:LONGEST_SHOWN]}... ({len(text):,} characters)"
    return printable(text)


def listed(names: Iterable[str], most: int = 6) -> str:
    """`a, b, c and 12 more`: the first `most` names of a list, so that a message keeps its length."""
    shown = list(names)
    text = ", ".join(shown[:most])
    return f"{text} and {len(shown) - most:,} more" if len(shown) > most else text


def numbers_text(numbers: Iterable[int]) -> str:
    """`0-3, 7, 9-10`: a set of numbers, with runs of numbers as ranges; `none` for an empty set."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return listed((str(first) if first == last else f"{first}-{last}" for first, last in runs), 12) or "none"


def counted(count: int, things: str) -> str:
    """`2 files`, `1 file`: a number of things; `things` is the plural, which ends in `s`."""
    return f"{count:,} {things.removesuffix('s') if count == 1 else things}"


def size_text(size: int) -> str:
    """`40.18 GiB`, or `12 bytes`: a size given in bytes."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(SIZE_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return counted(size, "bytes") if unit == 0 else f"{value:.2f} {SIZE_UNITS[unit]}"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The rows under their heading, each column as wide as its widest cell; the first column left, others right."""
    lines = [tuple(heading), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
