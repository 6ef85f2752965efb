"""A page: title, facts and sections as one document of HTML, with its style, without scripts or other addresses."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from reshard import __version__
from reshard.pages.markup import NOTHING_HERE, Markup, escape_text, join_markup, make_element, make_list

STYLE = Path(__file__).with_name("page.css")
"""Colours, light and dark, and the layout."""

MARK = '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="reshard '
"""The beginning of every page: by it a page is known, and may be written again."""


class Section(NamedTuple):
    """A part of a page, under a heading of its own."""

    name: str
    """A word of its own within the page, for links."""
    title: str
    parts: Sequence[Markup]


class Page(NamedTuple):
    """What stands on a page."""

    kind: str
    """Such as `plan`."""
    title: str
    lead: str
    """One sentence: what it is about."""
    facts: Sequence[tuple[str, str]]
    """What one looks for first: names and values."""
    sections: Sequence[Section]


def format_page(page: Page) -> str:
    """The text of a page."""
    title = join_markup([page.title, " - reshard ", page.kind])
    head = join_markup(
        [
            make_element("title", title),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Markup('<meta name="color-scheme" content="light dark">'),
            make_element("style", Markup(STYLE.read_text(encoding="utf-8"))),
        ],
        "\n",
    )
    body = join_markup(
        [
            make_element("a", "Skip to the content", class_="skip", href="#content"),
            make_element("header", make_element("p", f"reshard {page.kind}", class_="kind"), *make_top(page)),
            make_contents(page.sections),
            make_element("main", *map(make_section, page.sections), id="content", tabindex="-1"),
            make_element("footer", make_element("p", describe_page(page))),
        ],
        "\n",
    )
    return f'{MARK}{escape_text(__version__)}">\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def describe_page(page: Page) -> str:
    """Says where a page comes from, and what its units are."""
    return (
        f"Written by reshard {__version__}, {page.kind}. Sizes in bytes are exact; KiB, MiB, GiB and TiB are powers of "
        "1024 bytes."
    )


def make_top(page: Page) -> Iterable[Markup]:
    """Makes the heading of a page and its facts."""
    yield make_element("h1", page.title)
    yield make_element("p", page.lead, class_="lead")
    pairs = (make_element("div", make_element("dt", name), make_element("dd", value)) for name, value in page.facts)
    yield make_element("dl", *pairs, class_="facts") if page.facts else NOTHING_HERE


def make_contents(sections: Sequence[Section]) -> Markup:
    """Makes the list of the sections."""
    links = (make_element("a", section.title, href=f"#{section.name}") for section in sections)
    return make_element("nav", make_list(links), aria_label="Sections")


def make_section(section: Section) -> Markup:
    """Makes a section."""
    heading = f"{section.name}-heading"
    inside = make_element("h2", section.title, id=heading)
    return make_element("section", inside, *section.parts, id=section.name, aria_labelledby=heading)


def make_paragraph(text: str, **attributes: str) -> Markup:
    """Makes a paragraph."""
    return make_element("p", text, **attributes)
