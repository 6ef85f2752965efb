"""Bars in SVG: one for each rank, of the kinds of tensors in it, with lines for the memory of common GPUs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from reshard.pages.legends import LETTERS
from reshard.pages.markup import Markup, make_drawing, make_element
from reshard.pages.module_kinds import KINDS
from reshard.text import format_size

SHORT_LABEL, LONG_LABEL, SIZE = 56, 96, 80
"""Widths of the margins of a bar, in pixels: of its label, and of its size. `page.css` has them too."""

MOST_SHORT_LETTERS, MOST_LONG_LETTERS = 7, 14
"""Of labels that fit into these margins; longer ones are cut."""

CLOSE = 6
"""In percent of the width. Labels of lines that are closer are moved apart."""

LEAST_WITH_LETTER, LEAST_ON_PHONES = 1.75, 8
"""In percent of the width: parts of bars that have their letters, and those that have them on a narrow page too."""

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
    """Draws bars as wide as the page: places are in percent. Labels and sizes stand in the margins."""
    largest = max((bar.size for bar in drawn.bars), default=0)
    lines = drawn.memories if largest >= LEAST_WITH_LINES else ()
    percent = max(largest, *(memory * GB * 1.03 for memory in lines), 1) / 100
    height = 22 if len(drawn.bars) <= 24 else 15
    top = 26 if drawn.memories else 6
    bottom = top + height * len(drawn.bars) + 6
    is_short = all(len(bar.label) <= MOST_SHORT_LETTERS for bar in drawn.bars)
    left = -SHORT_LABEL if is_short else -LONG_LABEL
    parts: list[Markup] = []
    for number, bar in enumerate(drawn.bars):
        y = top + height * number + 2
        label = bar.label if len(bar.label) <= MOST_LONG_LETTERS else bar.label[: MOST_LONG_LETTERS - 3] + "..."
        parts += [make_element("text", label, x=left, y=y + height // 2 + 2), *paint_bar(bar, y, height - 4, percent)]
    parts += paint_lines(lines, bottom - 4, percent)
    if drawn.memories and not lines and largest:
        first = drawn.memories[0]
        words = f"{first} GB is {first * GB / largest:,.0f} times the longest bar"
        parts.append(make_element("text", words, x=left, y=18, class_="behind"))
    size = {"height": f"{bottom}", "class_": "bars" + " short" * is_short}
    return make_drawing(drawn.name, drawn.title, drawn.description, parts, **size)


def paint_bar(bar: Bar, y: int, height: int, percent: float) -> Iterator[Markup]:
    """Draws a bar and its size. A percent of the width is `percent` bytes."""
    middle = y + height // 2 + 4
    x = 0.0
    for kind, size in enumerate(bar.sizes):
        width = size / percent
        if size:
            title = make_element("title", f"{bar.label}, {KINDS[kind]}: {size:,} bytes ({format_size(size)})")
            yield make_element(
                "rect", title, class_=f"k{kind}", x=f"{x:.2f}%", y=y, width=f"{width:.2f}%", height=height
            )
        if width >= LEAST_WITH_LETTER:
            thin = " thin" * (width < LEAST_ON_PHONES)
            yield make_element("text", LETTERS[kind], x=f"{x + width / 2:.2f}%", y=middle, class_=f"letter{thin}")
        x += width
    yield make_element("text", format_size(bar.size), x="100%", dx=SIZE, y=middle, class_="row")


def paint_lines(memories: Sequence[int], bottom: int, percent: float) -> Iterator[Markup]:
    """Draws a line for the memory of each GPU, with its number above: on a narrow page of the first and the last."""
    places = [memory * GB / percent for memory in memories]
    for number, (memory, x) in enumerate(zip(memories, places, strict=True)):
        is_before = number + 1 < len(places) and places[number + 1] - x < CLOSE
        is_behind = number > 0 and x - places[number - 1] < CLOSE
        anchor = "before" if is_before else "behind" if is_behind else "column"
        thin = " thin" * (0 < number < len(places) - 1)
        yield make_element("line", class_="memory", x1=f"{x:.2f}%", x2=f"{x:.2f}%", y1=22, y2=bottom)
        yield make_element("text", f"{memory} GB", x=f"{x:.2f}%", y=18, class_=anchor + thin)
