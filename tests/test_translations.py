"""The Chinese pages say what the English ones say: block by block the same commands, code, links, names and numbers.

Commands are run in the English pages only (test_docs.py): the blocks here are the same, but for comments.
"""

# ruff: noqa: RUF001 - Chinese punctuation is meant

import re
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple
from unicodedata import east_asian_width

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from repository import ROOT

DOCS = ROOT / "docs"
CHINESE = DOCS / "zh-CN"
INDEX = CHINESE / "README.md"
PAIRS = {ROOT / "README.md": ROOT / "README.zh-CN.md"}
PAIRS |= {page: CHINESE / "tasks" / page.name for page in sorted((DOCS / "tasks").glob("*.md"))}
BOTH_WAYS = {DOCS / "README.md": INDEX, **PAIRS}
"""The index of the Chinese pages is no translation: it leads to English pages too."""
BOTH_WAYS |= {chinese: english for english, chinese in BOTH_WAYS.items()}
CHINESE_PAGES = [ROOT / "README.zh-CN.md", INDEX, *sorted((CHINESE / "tasks").glob("*.md"))]
LANGUAGE_LINE = re.compile(r"^\[(?:中文|English)\]\(.*$", re.MULTILINE)
COMMENT = re.compile(r"(?:^|[ \t]{2,})# .*$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^]]*)\]\(([^)]*)\)")
NUMBER = re.compile(r"(?<![A-Za-z0-9.-])\d+(?:[.,]\d+)*")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NAME = re.compile(r"\b[A-Za-z][\w.-]*\d\w*", re.ASCII)
"""Such as BF16, DeepSeek-V3 and K2.7."""
MOST_COLUMNS = 120
"""Of a line. A Chinese character has two."""
HAN = "[\u4e00-\u9fff]"
MARK = "[，。；：、（）《》“”]"
TYPOGRAPHY = {
    "no space between Chinese and letters, digits or code": rf"{HAN}[A-Za-z0-9`$]|[A-Za-z0-9`%]{HAN}",
    "half-width punctuation beside Chinese": rf"{HAN}[,;:?!()]|[,;:?!()]{HAN}|{HAN}\.(?!\.)",
    "a space, or an end of a line, where none belongs": rf"{HAN} {HAN}|(?<!\|) {MARK}|{MARK} (?!\|)",
    "the polite you": "您",
}


class Block(NamedTuple):
    """A block of a page, or its begin or end. `text` is what stands in a heading, a paragraph or a cell."""

    kind: str
    code: str
    text: list[Token]
    line: int


def read_blocks(page: Path) -> Iterator[Block]:
    """Reads a page, without the line that leads to its translation, and without comments in code."""
    text = LANGUAGE_LINE.sub("", page.read_text(encoding="utf-8"), count=1)
    line = 0
    for token in MarkdownIt().enable("table").parse(text):
        line = token.map[0] + 1 if token.map else line
        code = COMMENT.sub("", token.content) if token.type == "fence" else ""
        yield Block(f"{token.type} {token.tag} {token.info}", code, token.children or [], line)


def count_code(block: Block) -> Counter[str]:
    return Counter(token.content for token in block.text if token.type == "code_inline")


def count_links(block: Block, page: Path) -> Counter[str]:
    """Where the links lead, as if the page were English; but not those to its translation."""
    found = Counter[str]()
    for target in (str(token.attrs["href"]) for token in block.text if token.type == "link_open"):
        path, mark, heading = target.partition("#")
        file = (page.parent / path).resolve()
        if "://" in target:
            found[target] += 1
        elif file != BOTH_WAYS[page]:
            found[f"{BOTH_WAYS[file] if page in CHINESE_PAGES and file in CHINESE_PAGES else file}{mark}{heading}"] += 1
    return found


def read_words(block: Block) -> str:
    return " ".join(token.content for token in block.text if token.type == "text")


@pytest.fixture(params=PAIRS, ids=lambda page: str(page.relative_to(ROOT)))
def pair(request: pytest.FixtureRequest) -> Path:
    """An English page that has a translation."""
    page: Path = request.param
    return page


def match_blocks(english: Path) -> Iterator[tuple[Block, Block]]:
    """Each block beside its translation: as many headings, paragraphs, items, rows and blocks of code, in one order."""
    nothing = Block("nothing", "", [], 0)
    for left, right in zip_longest(read_blocks(english), read_blocks(PAIRS[english]), fillvalue=nothing):
        assert left.kind == right.kind, f"lines {left.line} and {right.line}"
        yield left, right


# --- the same ---


def test_every_task_has_a_translation_and_no_other_page_has() -> None:
    assert [page.name for page in sorted((CHINESE / "tasks").iterdir())] == [
        page.name for page in sorted((DOCS / "tasks").iterdir())
    ]


def test_the_blocks_of_a_page_are_the_same(pair: Path) -> None:
    blocks = list(match_blocks(pair))
    assert len(blocks) > 10
    for left, right in blocks:
        assert left.code == right.code, f"lines {left.line} and {right.line}"


def test_no_command_and_no_option_is_lost_or_added(pair: Path) -> None:
    for left, right in match_blocks(pair):
        assert count_code(left) == count_code(right), f"lines {left.line} and {right.line}"


def test_links_lead_to_the_same_pages_in_chinese_where_there_are(pair: Path) -> None:
    for left, right in match_blocks(pair):
        assert count_links(left, pair) == count_links(right, PAIRS[pair]), f"lines {left.line} and {right.line}"
        english = [token.attrs["href"] for token in right.text if token.type == "link_open"]
        targets = [(PAIRS[pair].parent / str(link).partition("#")[0]).resolve() for link in english]
        assert [target for target in targets if target in PAIRS and target != pair] == [], f"line {right.line}"


def test_what_is_bold_is_the_same(pair: Path) -> None:
    """As many, for `**` beside Chinese punctuation may be no mark."""
    for left, right in match_blocks(pair):
        english, chinese = (sum(token.type == "strong_open" for token in block.text) for block in (left, right))
        assert english == chinese, f"line {right.line}"
        assert "**" not in read_words(right), f"line {right.line}"


def test_numbers_are_the_same(pair: Path) -> None:
    """But for `two`, which may be a digit in Chinese."""
    for left, right in match_blocks(pair):
        english, chinese = (Counter(NUMBER.findall(read_words(block))) for block in (left, right))
        words = set(re.findall(r"\w+", read_words(left)))
        spelled = {str(number) for number, word in enumerate(NUMBER_WORDS) if word in words}
        assert english - chinese == Counter(), f"lost in line {right.line}"
        assert (chinese - english).keys() <= spelled, f"added in line {right.line}"


def test_names_of_models_and_formats_are_the_same(pair: Path) -> None:
    for left, right in match_blocks(pair):
        english, chinese = (set(NAME.findall(read_words(block))) for block in (left, right))
        assert english == chinese, f"lines {left.line} and {right.line}"


# --- the way there and back ---


@pytest.mark.parametrize("page", BOTH_WAYS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_leads_to_its_other_language_at_its_head(page: Path) -> None:
    head = page.read_text(encoding="utf-8").partition("\n## ")[0]
    (link,) = re.findall(r"\[English\]\(([^)]*)\)" if page in CHINESE_PAGES else r"\[中文\]\(([^)]*)\)", head)
    assert (page.parent / link).resolve() == BOTH_WAYS[page]


@pytest.mark.parametrize("page", sorted((CHINESE / "tasks").glob("*.md")), ids=lambda page: page.name)
def test_links_to_english_pages_say_so(page: Path) -> None:
    text = LANGUAGE_LINE.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.finditer(text):
        is_chinese = (page.parent / link[2].partition("#")[0]).resolve() in CHINESE_PAGES
        assert is_chinese != text[link.end() :].startswith("（英文）"), link[0]


# --- how Chinese is written ---


@pytest.mark.parametrize("page", CHINESE_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_chinese_is_set_as_usual(page: Path) -> None:
    text = LINK.sub(r"\1", FENCE.sub("", page.read_text(encoding="utf-8"))).replace("**", "")
    text = re.sub(r"(?<=[^\n|])\n(?=[^\n|-])", " ", text.strip())  # as browsers show the end of a line
    found = {fault: [part[0] for part in re.finditer(pattern, text)] for fault, pattern in TYPOGRAPHY.items()}
    assert {fault: parts for fault, parts in found.items() if parts} == {}


@pytest.mark.parametrize("page", CHINESE_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_are_no_longer_than_english_ones(page: Path) -> None:
    """Cells of tables may be."""
    lines = [line for line in FENCE.sub("", page.read_text(encoding="utf-8")).splitlines() if not line.startswith("|")]
    assert [line for line in lines if sum(map(count_columns, line)) > MOST_COLUMNS] == []


def count_columns(letter: str) -> int:
    return 2 if east_asian_width(letter) in {"W", "F"} else 1


def test_one_word_is_used_for_one_thing() -> None:
    """The last column of the glossary has the words that are not used."""
    text, _, glossary = INDEX.read_text(encoding="utf-8").partition("\n## 术语\n")
    rows = re.findall(r"^\| [^|]+ \| [^|]+ \| ([^|]+) \|$", glossary, re.MULTILINE)
    others = {word for row in rows[1:] for word in row.split("、")}
    assert len(others) > 20
    pages = {page: page.read_text(encoding="utf-8") for page in CHINESE_PAGES} | {INDEX: text}
    assert [(page.name, word) for page, written in pages.items() for word in sorted(others) if word in written] == []


def test_the_chinese_index_leads_to_every_page_for_users() -> None:
    part = (DOCS / "README.md").read_text(encoding="utf-8").partition("\n## Using it\n")[2].partition("\n## ")[0]
    pages = {(DOCS / link).resolve() for _, link in LINK.findall(part) if ":" not in link}
    assert len(pages) > 10
    found = {
        (CHINESE / link.partition("#")[0]).resolve() for _, link in LINK.findall(INDEX.read_text(encoding="utf-8"))
    }
    assert pages - found == {DOCS / "families" / name for name in ("vllm.md", "transformers.md")}, "named in one row"
