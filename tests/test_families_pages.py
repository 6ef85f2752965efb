"""The pages of docs/families: a page for each recipe, and the sizes that they show."""

import importlib.util
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
from jobs import make_plan
from repository import ROOT

from reshard.recipes.recipe import list_packaged_recipes, load_recipe
from reshard.types import Layout

PAGES = sorted((ROOT / "docs" / "families").glob("*.md"))
MODELS = [page for page in PAGES if page.name != "README.md"]
WITH_SIZES = [page for page in MODELS if page.name != "tensor-parallel.md"]
PLANNED = {"deepseek-v2", "deepseek-v3", "deepseek-v4"}
"""Pages whose sizes are planned again; the others are of models that these have most in common with."""
SIZES = re.compile(r"^\$ \.venv/bin/python benchmarks/sizes\.py (\S+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def sizes() -> ModuleType:
    """The script that the pages call."""
    spec = importlib.util.spec_from_file_location("sizes", ROOT / "benchmarks" / "sizes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_every_recipe_has_a_page_and_every_page_a_place_in_the_table() -> None:
    named = {page: named_by(page) for page in MODELS}
    assert {recipe for recipes in named.values() for recipe in recipes} == {r.name for r in list_packaged_recipes()}
    table = (ROOT / "docs" / "families" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[.+\]\((.+)\) \| (`.+?`) \|", table, re.MULTILINE)
    assert sorted(rows) == sorted((page.name, ", ".join(map("`{}`".format, named[page]))) for page in MODELS)


def named_by(page: Path) -> list[str]:
    """The recipes that a page is about: one, or several of one kind."""
    text = page.read_text(encoding="utf-8")
    (names,) = re.findall(r"^Recipes? ((?:`[\w-]+`(?:,\s)?)+)", text, re.MULTILINE)
    return re.findall(r"`([\w-]+)`", names)


def test_every_page_tells_what_was_checked_and_what_was_not() -> None:
    for page in MODELS:
        text = page.read_text(encoding="utf-8")
        assert "**Checked:**" in text, page
        assert re.search(r"\*\*Not\s+checked:\*\*", text), page


@pytest.mark.parametrize("page", [page for page in WITH_SIZES if page.stem in PLANNED], ids=lambda page: page.stem)
def test_the_sizes_of_a_page_are_those_of_a_plan(page: Path, sizes: ModuleType) -> None:
    """The last number of ranks of its first table; planning all of them, of all pages, would take minutes."""
    (name, options, text), *_ = SIZES.findall(page.read_text(encoding="utf-8"))
    assert options == ""
    heading, _, *rows = text.splitlines()
    row = [line for line in rows if not line.startswith("--mp")][-1].split()
    checkpoint = sizes.full_checkpoint(name)
    recipe = heading.rsplit(" ", 1)[1]
    assert heading == f"{name}: {len(checkpoint.tensors):,} tensors, recipe {recipe}"
    found = sizes.row(make_plan(checkpoint, load_recipe(recipe), Layout(int(row[0]))))
    assert " ".join(found).split() == row


def test_the_script_prints_what_a_page_shows(sizes: ModuleType) -> None:
    page = (ROOT / "docs" / "families" / "deepseek-v2.md").read_text(encoding="utf-8")
    (text,) = (text for name, _, text in SIZES.findall(page) if name == "deepseek-v2-lite")
    options = Namespace(name="deepseek-v2-lite", cast="", expert_dtype="", mtp="drop", pad=False)
    assert "\n".join(sizes.lines(options)) + "\n" == text
