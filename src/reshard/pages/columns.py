"""The columns of a drawing: ranks or files, in groups where there are many; and like rows of tables as one."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from reshard.text import format_list, format_runs

MOST_COLUMNS = 64
"""More ranks are drawn in groups of neighbours."""

MOST_SOURCE_COLUMNS = 200
"""The same of source files."""

MOST_TABLE_ROWS = 120
"""Of a table; the last one has all others together."""


MOST_RUNS_SHOWN = 7


class Column(NamedTuple):
    """A column of a drawing: a file, or several beside each other."""

    label: str
    """Such as `3`, or `0-4`."""
    files: Sequence[int]
    """Indices into the files of the plan."""


def group_columns(numbers: Sequence[int], most: int = MOST_COLUMNS) -> list[Column]:
    """Groups files, by their numbers, into at most `most` columns."""
    size = -(-len(numbers) // most) or 1
    groups = [range(first, min(first + size, len(numbers))) for first in range(0, len(numbers), size)]
    return [Column(name_numbers([numbers[file] for file in group]), group) for group in groups]


def name_numbers(numbers: Sequence[int]) -> str:
    """Names numbers by their runs: `0-3`, or `0-3, 7`; the first runs of many, and `...`."""
    runs = format_runs(numbers)
    return ", ".join([*runs[:MOST_RUNS_SHOWN], *["..."] * (len(runs) > MOST_RUNS_SHOWN)])


def describe_cells(cells: Sequence[int], numbers: Sequence[int], thing: str, most: int = 4) -> str:
    """Describes a size for each file in words: `ranks 0-14: 1,024 bytes each; rank 15: 512 bytes`. Sizes of 0 are left
    out.
    """
    parts = []
    for size, group in group_equal(cells):
        if size:
            places = [numbers[place] for place in group]
            several = len(places) > 1
            parts.append(f"{thing}{'s' * several} {name_numbers(places)}: {size:,} bytes{' each' * several}")
    return format_list(parts, most).replace(", " + thing, "; " + thing) if parts else "nothing"


def group_equal(cells: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    """Groups neighbours of one value; yields the value and their places."""
    for size, group in groupby(range(len(cells)), key=lambda place: cells[place]):
        yield size, [*group]


class Line(NamedTuple):
    """A row of a table before it is formatted."""

    label: str
    words: str
    numbers: Sequence[int]


def merge_lines(lines: Sequence[Line]) -> list[Sequence[str]]:
    """Formats lines as rows of a table: neighbours with the same numbers and words become one, `layers.3 to layers.60`,
    and what comes behind MOST_TABLE_ROWS is added up in the last.
    """
    groups = [[*group] for _, group in groupby(lines, key=lambda line: (line.words, line.numbers))]
    rows = [format_line(name_group(group), group[0]) for group in groups[:MOST_TABLE_ROWS]]
    if rest := [line for group in groups[MOST_TABLE_ROWS:] for line in group]:
        sums = [sum(column) for column in zip(*(line.numbers for line in rest), strict=True)]
        words = "-" if any(line.words for line in rest) else ""
        rows.append(format_line(f"{len(rest):,} more, together", Line("", words, sums)))
    return rows


def format_line(label: str, line: Line) -> Sequence[str]:
    """Formats a line as cells; without words there is no cell for them."""
    return [label, *([line.words] if line.words else []), *(f"{number:,}" for number in line.numbers)]


def name_group(group: Sequence[Line]) -> str:
    """Names lines that are one row."""
    first, last = group[0].label, group[-1].label
    return first if len(group) == 1 else f"{first} to {last}, each"
