"""Reads a page as a browser does, without one: its elements, tables and drawings, and whether each is closed."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

VOID = {"meta", "br", "wbr", "hr", "img", "input", "link"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str]
    inside: list["Element | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(one if isinstance(one, str) else one.text for one in self.inside)

    @property
    def children(self) -> list["Element"]:
        return [one for one in self.inside if isinstance(one, Element)]

    def find_all(self, name: str) -> list["Element"]:
        """All elements of a name within, in their order."""
        return [found for one in self.children for found in ([one] * (one.name == name) + one.find_all(name))]


class PageParser(HTMLParser):
    """Takes no page with an element that is not closed, or closed in another's place."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.top = Element("", {})
        self.open = [self.top]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice: {attrs}"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert any(one.name == "svg" for one in self.open), f"<{tag}/> closes nothing in HTML"
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> within <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def parse_page(text: str) -> Element:
    """Parses a page; raises AssertionError where it is not well-formed."""
    parser = PageParser()
    parser.feed(text)
    parser.close()
    assert parser.open == [parser.top], "elements that are not closed"
    return parser.top


def read_drawings(text: str) -> list[ET.Element]:
    """The drawings of a page, by a parser of XML."""
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]  # noqa: S314


def read_tables(page: Element) -> dict[str, list[list[str]]]:
    """The tables of a page by their captions: the heading, then the rows."""
    return {
        table.find_all("caption")[0].text: [[cell.text for cell in row.children] for row in table.find_all("tr")]
        for table in page.find_all("table")
    }


def read_number(text: str) -> int:
    return int(text.replace(",", ""))


def read_facts(page: Element) -> dict[str, str]:
    """The names and values at the top of a page."""
    return {
        one.find_all("dt")[0].text: one.find_all("dd")[0].text
        for facts in page.find_all("dl")
        for one in facts.children
    }


def expand_cells(words: str) -> dict[int, int]:
    """`ranks 0-1: 1,024 bytes each; rank 2: 512 bytes` -> {0: 1024, 1: 1024, 2: 512}."""
    found: dict[int, int] = {}
    for part in words.split("; "):
        numbers, size = re.fullmatch(r"(?:rank|file)s? ([\d, -]+): ([\d,]+) bytes(?: each)?", part).groups()  # type: ignore[union-attr]
        for run in numbers.split(", "):
            first, _, last = run.partition("-")
            found |= dict.fromkeys(range(int(first), int(last or first) + 1), read_number(size))
    return found
