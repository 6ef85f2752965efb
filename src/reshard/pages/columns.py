"""The columns of a drawing: ranks or files, in groups where there are many; and like rows of tables as one."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from reshard.formats.folders_below import split_numbers
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
    """Formats lines as rows of a table: neighbours with the same numbers and words become one,
    `layers.3 to layers.60, 58 rows, each`, and what comes behind MOST_TABLE_ROWS is added up in the last.
    """
    groups = group_lines(lines)
    rows = [format_line(name_group(group), group[0]) for group in groups[:MOST_TABLE_ROWS]]
    if rest := [line for group in groups[MOST_TABLE_ROWS:] for line in group]:
        sums = [sum(column) for column in zip(*(line.numbers for line in rest), strict=True)]
        words = "-" if any(line.words for line in rest) else ""
        rows.append(format_line(f"{len(rest):,} more, together", Line("", words, sums)))
    return rows


def group_lines(lines: Iterable[Line]) -> list[list[Line]]:
    """Groups neighbours which say the same, and whose labels are numbered one after the other: no row is hidden within
    a range, and no range has more than its rows.
    """
    groups: list[list[Line]] = []
    for line in lines:
        before = groups[-1][-1] if groups else None
        if before and before[1:] == line[1:] and is_next_label(before.label, line.label):
            groups[-1].append(line)
        else:
            groups.append([line])
    return groups


def is_next_label(before: str, after: str) -> bool:
    """Whether a label has the next number and is else the same: `layers.4` behind `layers.3`, but not behind
    `layers.2`; `4: b-4-of-9` behind `3: b-3-of-9`.
    """
    one, other = split_numbers(before), split_numbers(after)
    is_alike = [words for _, words in one] == [words for _, words in other]
    steps = [later - number for (number, _), (later, _) in zip(one, other, strict=False)]
    return is_alike and {*steps} <= {0, 1} and 1 in steps


def format_line(label: str, line: Line) -> Sequence[str]:
    """Formats a line as cells; without words there is no cell for them."""
    return [label, *([line.words] if line.words else []), *(f"{number:,}" for number in line.numbers)]


def name_group(group: Sequence[Line]) -> str:
    """Names lines that are one row."""
    first, last = group[0].label, group[-1].label
    return first if len(group) == 1 else f"{first} to {last}, {len(group):,} rows, each"
