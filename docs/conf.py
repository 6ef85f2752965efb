"""The site of the documentation: the pages as they lie here, and the API from docstrings. `make docs` builds it.

Its source is the whole repository, so that the links of a page are right on the site and where pages are read raw.
"""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import reshard

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<!\[中文)\]\(([\w./-]+)\.md\)")  # not those at the head, to the other language
FRONT = set(LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
SECTIONS = {"Args:", "Returns:", "Raises:"}

project = "reshard"
release = reshard.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = ["*.md", "docs/**", "examples/*.md"]
source_suffix = {".md": "markdown"}
root_doc = "docs/README"
nitpicky = True
# There is no network to ask the pages of Python, so its classes are not linked.
nitpick_ignore_regex = [("py:class", r"(collections\.abc|fractions|os|pathlib)\.\w+")]
# Rows of a recipe are a part of TOML; issue forms of other projects have headings of the third level only.
suppress_warnings = ["misc.highlighting_failure", "myst.header"]

myst_heading_anchors = 4
default_role = "code"  # docstrings write code as Markdown does
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False

templates_path = ["_templates"]
html_theme = "furo"
html_title = f"reshard {release}"
html_additional_pages = {"index": "redirect.html"}
html_copy_source = html_show_copyright = html_use_index = False


def add_contents(_app: Sphinx, page: str, content: list[str]) -> None:
    """Adds the pages of the sidebar, which are those that a README links: the front page's, below its headings, and
    the rest of a folder below the README of the folder.
    """
    folder, _, name = page.removeprefix("docs/").rpartition("/")
    if page == root_doc:
        parts = re.split(r"^## (.+)$", content[0], flags=re.MULTILINE)
        for caption, text in zip(["", *parts[1::2]], parts[::2], strict=True):
            content[0] += format_contents(LINK.findall(text), caption)
    elif folder and name == "README":
        links = [link for link in LINK.findall(content[0]) if not link.startswith("..")]
        content[0] += format_contents([link for link in links if f"{folder}/{link}" not in FRONT])


def format_contents(pages: list[str], caption: str = "") -> str:
    """A table of contents that stands in the sidebar only."""
    options = [":hidden:", *([f":caption: {caption}"] if caption else []), ""]
    return "\n".join(["\n```{toctree}", *options, *dict.fromkeys(pages), "```\n"]) if pages else ""


def read_markdown(_app: Sphinx, what: str, _name: str, _thing: Any, _options: Any, lines: list[str]) -> None:
    """Makes a docstring what napoleon expects: its examples are only indented, and public names are only code."""
    for place in range(len(lines) - 1, 0, -1):
        if lines[place].startswith("    ") and not lines[place - 1].strip() and not SECTIONS & set(lines[:place]):
            lines[place:place] = [".. code-block:: python", ""]
    if what in {"attribute", "property"}:
        lines.insert(0, "\\ ")  # nothing; or napoleon takes what stands before a colon for a type
    if lines[-1].startswith("Alias for field number"):
        lines.clear()
    names = "|".join(reshard.__all__)
    lines[:] = [re.sub(rf"`({names})`", r":py:obj:`\1 <reshard.\1>`", line) for line in lines]


def hide_arguments(_app: Sphinx, what: str, *_: Any) -> tuple[str, str] | None:
    """Classes are returned or raised, and never made by a caller."""
    return ("", "") if what in {"class", "exception"} else None


def set_language(_app: Sphinx, page: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    """Names the language of a page, for browsers and screen readers."""
    context["language"] = "zh-CN" if "zh-CN" in page else "en"


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers what is done to pages and docstrings."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", read_markdown, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", hide_arguments)
    app.connect("html-page-context", set_language)
    return {"parallel_read_safe": True}
