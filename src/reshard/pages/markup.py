"""Elements of HTML and SVG as text. What is not markup yet is escaped: strangers write the names in checkpoints."""

from collections.abc import Iterable, Sequence
from html import escape as escape_html
from typing import NamedTuple

from reshard.text import escape

MOST_ON_A_LINE = 64
"""A heading of a row with so many letters is not broken."""

DRAWN = {"path", "rect", "line"}
"""Elements of SVG that have nothing inside."""

MOST_LISTED = 40
"""So many cells that stand out are listed in words."""


class Markup(str):
    """Text of HTML that is escaped already."""

    __slots__ = ()


NOTHING_HERE = Markup("")


def escape_text(text: str) -> Markup:
    """Escapes text for HTML, within elements and within attributes; control and format characters become visible."""
    return text if isinstance(text, Markup) else Markup(escape_html(escape(text)))


def join_markup(parts: Iterable[str], between: str = "") -> Markup:
    """Joins texts and elements; texts are escaped."""
    return Markup(Markup(between).join(map(escape_text, parts)))


def make_element(name: str, *inside: str, **attributes: str | float) -> Markup:
    """Makes an element of HTML or SVG: `make_element("td", text, class_="number")`.

    The names of attributes lose an underscore at their end, and get hyphens in the place of others.
    """
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape_text(value if isinstance(value, str) else str(value))}"'
        for key, value in attributes.items()
    )
    if name in DRAWN and not inside:
        return Markup(f"<{name}{words}/>")
    return Markup(f"<{name}{words}>{join_markup(inside)}</{name}>")


class Table(NamedTuple):
    """A table. The first cell of a row is its heading; one that begins with spaces is set in."""

    caption: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = ()
    """The columns, behind the first, that hold words and no numbers: these are on the left, and may take two lines."""
    has_total: bool = False
    """Whether the last row is the sum of the others."""


def make_table(table: Table) -> Markup:
    """Makes a table in a region of its own, which scrolls where the table is wider than the page."""
    classes = ["w" if column in (0, *table.words) else "n" for column in range(len(table.heading))]
    heading = [
        make_element("th", name, scope="col", class_=kind) for name, kind in zip(table.heading, classes, strict=True)
    ]
    rows = [
        make_element(
            "tr",
            make_element("th", row[0].strip(), scope="row", class_=choose_class(row[0])),
            *(make_element("td", cell, class_=kind) for cell, kind in zip(row[1:], classes[1:], strict=True)),
            **({"class_": "total"} if table.has_total and number == len(table.rows) else {}),
        )
        for number, row in enumerate(table.rows, 1)
    ]
    inside = make_element(
        "table",
        make_element("caption", table.caption),
        make_element("thead", make_element("tr", *heading)),
        make_element("tbody", *rows),
    )
    return make_region(f"Table: {table.caption}", inside)


def choose_class(heading: str) -> str:
    """Chooses the class of the heading of a row: whether it is set in, and whether it stands on one line."""
    return "w" + " deep" * heading.startswith(" ") + " line" * (len(heading) <= MOST_ON_A_LINE)


def make_region(label: str, *inside: str) -> Markup:
    """Wraps what may be wider than the page in a region that scrolls, by the keyboard too."""
    return make_element("div", *inside, class_="scroll", role="region", aria_label=label, tabindex="0")


def make_details(summary: str, *inside: str) -> Markup:
    """Makes a part that a reader opens."""
    return make_element("details", make_element("summary", summary), *inside)


def cut_items(items: Sequence[str]) -> list[str]:
    """Cuts a list behind MOST_LISTED items, and counts the others."""
    return [*items[:MOST_LISTED], *[f"and {len(items) - MOST_LISTED:,} more"] * (len(items) > MOST_LISTED)]


def make_list(items: Iterable[str], **attributes: str) -> Markup:
    """Makes a list; nothing of no items."""
    made = [make_element("li", item) for item in items]
    return make_element("ul", *made, **attributes) if made else NOTHING_HERE


def make_drawing(name: str, title: str, description: str, parts: Iterable[Markup], **attributes: str) -> Markup:
    """Makes a drawing, whose `attributes` tell its size, in a region that scrolls. Those who do not see it are told its
    title and its description, and nothing of its parts.
    """
    made = make_element(
        "svg",
        make_element("title", title, id=f"{name}-title"),
        make_element("desc", description, id=f"{name}-text"),
        make_element("g", *parts, aria_hidden="true"),
        role="img",
        aria_labelledby=f"{name}-title",
        aria_describedby=f"{name}-text",
        **attributes,
    )
    return make_region(title, made)
