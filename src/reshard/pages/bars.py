"""Bars in SVG: one for each rank, of the kinds of tensors in it, with lines for the memory of common GPUs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from reshard.pages.heat_map import LETTER
from reshard.pages.legends import LETTERS, format_decimal
from reshard.pages.markup import Markup, make_drawing, make_element
from reshard.pages.module_kinds import KINDS

PLOT = 800
"""Width of the longest possible bar, in pixels."""

CLOSE = 48
"""In pixels. Labels of lines that are closer are moved apart."""

GB = 10**9

LEAST_WITH_LINES = 10 * GB
"""In bytes. Below, bars are drawn to their own scale: up to the first line, nothing in them could be seen."""


class Bar(NamedTuple):
    """One bar."""

    label: str
    sizes: Sequence[int]
    """Of each of KINDS, in bytes."""

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(self.sizes)


class Bars(NamedTuple):
    """Bars and their words."""

    name: str
    """A word of its own within the page."""
    title: str
    description: str
    bars: Sequence[Bar]
    memories: Sequence[int]
    """Of common GPUs, in GB."""


def paint_bars(drawn: Bars) -> Markup:
    """Draws bars, in a region that scrolls."""
    largest = max((bar.size for bar in drawn.bars), default=0)
    lines = drawn.memories if largest >= LEAST_WITH_LINES else ()
    end = max(largest * 1.02, *(memory * GB * 1.03 for memory in lines), 1)
    left = max((len(bar.label) for bar in drawn.bars), default=0) * LETTER + 12
    height = 22 if len(drawn.bars) <= 24 else 15
    top = 26 if drawn.memories else 6
    bottom = top + height * len(drawn.bars) + 6
    right = left + PLOT + 84
    parts: list[Markup] = []
    for number, bar in enumerate(drawn.bars):
        parts += paint_bar(bar, left, top + height * number + 2, height - 4, PLOT / end)
    parts += paint_lines(lines, left, bottom - 4, PLOT / end)
    if drawn.memories and not lines and largest:
        first = drawn.memories[0]
        words = (
            f"the line of {first} GB would be {first * GB / largest:,.1f} times as far from the left as the longest bar"
        )
        parts.append(make_element("text", words, x=f"{left:.0f}", y=18, class_="behind"))
    return make_drawing(drawn.name, drawn.title, drawn.description, parts, size=(right, bottom))


def paint_bar(bar: Bar, left: float, y: float, height: float, scale: float) -> Iterator[Markup]:
    """Draws a bar, its label and its size. `scale` is in pixels a byte."""
    middle = y + height / 2 + 4
    yield make_element("text", bar.label, x=f"{left - 6:.0f}", y=f"{middle:.0f}", class_="row")
    yield make_element("path", class_="base", d=f"M{left:.0f} {y}h{PLOT}v{height}h-{PLOT}z")
    x = left
    for kind, size in enumerate(bar.sizes):
        width = size * scale
        if size:
            title = make_element("title", f"{bar.label}, {KINDS[kind]}: {size:,} bytes ({format_decimal(size)})")
            outline = f"M{x:.1f} {y}h{width:.1f}v{height}h-{width:.1f}z"
            yield make_element("path", title, class_=f"k{kind}", d=outline)
        if width >= 14:
            yield make_element("text", LETTERS[kind], x=f"{x + width / 2:.1f}", y=f"{middle:.0f}", class_="letter")
        x += width
    yield make_element("text", format_decimal(bar.size), x=f"{left + PLOT + 80:.0f}", y=f"{middle:.0f}", class_="row")


def paint_lines(memories: Sequence[int], left: float, bottom: float, scale: float) -> Iterator[Markup]:
    """Draws a line for the memory of each GPU, with its number above."""
    places = [left + memory * GB * scale for memory in memories]
    for number, (memory, x) in enumerate(zip(memories, places, strict=True)):
        is_before = number + 1 < len(places) and places[number + 1] - x < CLOSE
        is_behind = number > 0 and x - places[number - 1] < CLOSE
        anchor = "before" if is_before else "behind" if is_behind else "column"
        yield make_element("path", class_="memory", d=f"M{x:.1f} 22v{bottom - 22:.0f}")
        yield make_element("text", f"{memory} GB", x=f"{x:.1f}", y=18, class_=anchor)
