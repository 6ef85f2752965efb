"""Numbers and tables as people read them."""

from collections.abc import Iterable, Sequence

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def counted(count: int, things: str) -> str:
    """`2 files`, `1 file`: the number of things that are named in the plural with an `s`."""
    return f"{count:,} {things.removesuffix('s') if count == 1 else things}"


def size_text(size: int) -> str:
    """`40.18 GiB`, or `12 bytes`."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return counted(size, "bytes") if unit == 0 else f"{value:.2f} {UNITS[unit]}"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The rows under their heading, each column as wide as its widest cell; all but the first column to the right."""
    lines = [tuple(heading), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
