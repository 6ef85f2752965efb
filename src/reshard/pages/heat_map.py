"""Heat maps in SVG: rows of cells whose colour is a level, with runs of equal cells drawn as one."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from reshard.pages.markup import Markup, make_drawing, make_element

LEVELS = 7
"""Colours of a heat map, from 1 on; level 0 is a cell without a difference."""

LETTERED = LEVELS + 1
"""The level of a cell with a letter: a colour apart from the others."""

NOT_THERE = -1
"""The level of a cell with nothing in it: it is not drawn, and has the colour of the page."""

LETTER = 6.7
"""Width of a letter of a label, in pixels."""

WIDEST = 1000
"""Of a drawing, in pixels, where its cells are not narrower than NARROWEST."""

NARROWEST, BROADEST = 3, 34
"""Of a cell, in pixels."""

MOST_LETTERS = 44
"""Of the label of a row; a longer name is cut in its middle."""


class Run(NamedTuple):
    """Cells beside each other in a row that say the same."""

    first: int
    """Index of its first column."""
    end: int
    """Index of the column behind it."""
    level: int
    """0 to LEVELS; LETTERED, or NOT_THERE."""
    title: str = ""
    """The words that a browser shows under the pointer; empty for none."""
    is_odd: bool = False
    """Whether it is outlined."""
    mark: str = ""
    """A letter in the middle of each cell, of the level LETTERED, for what colour alone cannot say."""


class HeatMap(NamedTuple):
    """A heat map and its words."""

    name: str
    """A word of its own within the page."""
    title: str
    description: str
    """The same in a sentence or two, for those who do not see it."""
    rows: Sequence[tuple[str, Sequence[Run]]]
    """The label and the runs of each row."""
    columns: Sequence[str]
    """The labels of the columns."""
    heading: str
    """The things that the columns are, such as `rank`."""


class Sizes(NamedTuple):
    """The sizes of a drawing, in pixels."""

    left: float
    """Width of the labels of the rows."""
    top: float
    """Height of the labels of the columns."""
    width: float
    """Of a cell."""
    height: float
    """Of a cell."""


def paint_heat_map(drawn: HeatMap) -> Markup:
    """Draws a heat map, in a region that scrolls."""
    labels = [shorten_middle(label) for label, _ in drawn.rows]
    left = max(map(len, labels), default=0) * LETTER + 12
    width = max(NARROWEST, min(BROADEST, int(WIDEST - left) // max(1, len(drawn.columns))))
    sizes = Sizes(left, 34 if any(drawn.columns) else 4, width, 18 if len(labels) <= 24 else 13)
    right, bottom = left + width * len(drawn.columns) + 12, sizes.top + sizes.height * len(labels) + 4
    has_titles = any(run.title for _, runs in drawn.rows for run in runs)
    parts = [
        make_element("text", drawn.heading, x=round(left), y=12, class_="axis"),
        *paint_column_labels(drawn.columns, sizes),
        *paint_row_labels(labels, sizes),
        *(paint_runs(drawn.rows, sizes) if has_titles else paint_levels(drawn.rows, sizes)),
        *paint_grid(len(labels), len(drawn.columns), sizes),
        *paint_marks(drawn.rows, sizes),
    ]
    size = {"viewBox": f"0 0 {right:.0f} {bottom:.0f}", "width": f"{right:.0f}", "height": f"{bottom:.0f}"}
    return make_drawing(drawn.name, drawn.title, drawn.description, parts, **size)


def paint_column_labels(columns: Sequence[str], sizes: Sizes) -> Iterator[Markup]:
    """Draws the labels of as many columns as there is room for."""
    step = next(
        step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 10**6) if has_room(columns, step, sizes)
    )
    for number, label in enumerate(columns):
        if number % step == 0:
            x = sizes.left + sizes.width * (number + 0.5)
            yield make_element("text", label, x=f"{x:.1f}", y=sizes.top - 6, class_="column")


def has_room(columns: Sequence[str], step: int, sizes: Sizes) -> bool:
    """Whether labels do not touch each other, of which only one in `step` is drawn."""
    return max(map(len, columns[::step]), default=0) * LETTER + 5 <= step * sizes.width or step >= len(columns)


def paint_row_labels(labels: Iterable[str], sizes: Sizes) -> Iterator[Markup]:
    """Draws the labels of the rows."""
    for number, label in enumerate(labels):
        y = sizes.top + sizes.height * (number + 0.5) + 4
        yield make_element("text", label, x=f"{sizes.left - 6:.0f}", y=f"{y:.0f}", class_="row")


def paint_runs(rows: Sequence[tuple[str, Sequence[Run]]], sizes: Sizes) -> Iterator[Markup]:
    """Draws each run as an element of its own, with its words."""
    for number, (_, runs) in enumerate(rows):
        for run in runs:
            if run.level != NOT_THERE:
                title = [make_element("title", run.title)] if run.title else []
                yield make_element("path", *title, class_=f"s{run.level}", d=trace_run(number, run, sizes))


def paint_levels(rows: Sequence[tuple[str, Sequence[Run]]], sizes: Sizes) -> Iterator[Markup]:
    """Draws all cells of a level as one element."""
    for level in range(LETTERED + 1):
        runs = [(number, run) for number, (_, runs) in enumerate(rows) for run in runs if run.level == level]
        if runs:
            yield make_element("path", class_=f"s{level}", d="".join(trace_run(*one, sizes) for one in runs))


def trace_run(row: int, run: Run, sizes: Sizes) -> str:
    """Traces the outline of a run as a path."""
    x, y = sizes.left + sizes.width * run.first, sizes.top + sizes.height * row
    width = sizes.width * (run.end - run.first)
    return f"M{x:.0f} {y:.0f}h{width:.0f}v{sizes.height:.0f}h-{width:.0f}z"


def paint_grid(rows: int, columns: int, sizes: Sizes) -> Iterator[Markup]:
    """Draws the gaps between the rows, and between columns that are broad enough."""
    width, height = sizes.width * columns, sizes.height * rows
    lines = [f"M{sizes.left:.0f} {sizes.top + sizes.height * row:.0f}h{width:.0f}" for row in range(rows + 1)]
    if sizes.width >= 7:
        lines += [f"M{sizes.left + sizes.width * at:.0f} {sizes.top:.0f}v{height:.0f}" for at in range(columns + 1)]
    yield make_element("path", class_="grid", d="".join(lines))


def paint_marks(rows: Sequence[tuple[str, Sequence[Run]]], sizes: Sizes) -> Iterator[Markup]:
    """Draws the outlines of odd runs, and the letters."""
    odd = [(number, run) for number, (_, runs) in enumerate(rows) for run in runs if run.is_odd]
    if odd:
        outlines = "".join(trace_run(*one, sizes) for one in odd)
        yield make_element("path", class_="halo", d=outlines)
        yield make_element("path", class_="odd", d=outlines)
    for number, (_, runs) in enumerate(rows):
        y = sizes.top + sizes.height * (number + 0.5) + 4
        for run in runs:
            for column in range(run.first, run.end) if run.mark else ():
                x = sizes.left + sizes.width * (column + 0.5)
                yield make_element("text", run.mark, x=f"{x:.1f}", y=f"{y:.0f}", class_="mark")


def merge_cells(cells: Iterable[tuple[int, str, bool, str]]) -> list[Run]:
    """Merges the cells of a row, each a level, its words, whether it is odd, and its mark, into runs."""
    runs: list[Run] = []
    for cell, same in groupby(cells):
        first = runs[-1].end if runs else 0
        runs.append(Run(first, first + len(list(same)), *cell))
    return runs


def shorten_middle(label: str) -> str:
    """Shortens a label in its middle: names differ at both ends."""
    half = (MOST_LETTERS - 3) // 2
    return label if len(label) <= MOST_LETTERS else f"{label[:half]}...{label[-half:]}"


SHARES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
"""The upper ends of the levels of sizes, as parts of the largest one."""


def find_level(size: int, largest: int) -> int:
    """Finds the level of a size; both in bytes."""
    if not size:
        return NOT_THERE
    return next(level for level, share in enumerate(SHARES, 1) if size <= share * largest or share == 1)
