"""The site of the documentation: whole, without a request to another server, and strict about what it refers to."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from repository import ROOT

import reshard

for package in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(package, reason="the site needs `make .venv/docs`")

PARTS = (
    "README.md",
    "README.zh-CN.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    ".github",
    "LICENSE",
    "docs",
    "examples",
    "src",
    "tests",
)

FAULTS = (
    ("docs/casts.md", "# Casts\n", "# Casts\n\n[a page](gone.md)\n", "docs/casts.md:3: WARNING: .*'gone.md'"),
    ("docs/diff.md", "](casts.md)", "](casts.md#gone)", "docs/diff.md:\\d+: WARNING: local id not found .*'gone'"),
    ("docs/json.md", "# JSON\n", "# JSON\n\n![a picture](gone.png)\n", "docs/json.md:3: WARNING: .*gone.png"),
    ("docs/alone.md", "", "# Alone\n", "docs/alone.md: WARNING: document isn't included in any toctree"),
    ("src/reshard/api.py", "As for `convert`.", "As for :py:func:`gone`.", "WARNING: py:func reference .*: gone"),
    ("src/reshard/types.py", "class Note(", "class Gone(NamedTuple):\n    pass\n\n\nclass Note(", ""),
    ("src/reshard/target/repair.py", "    target: Path\n", "    target: Gone\n", "WARNING: py:class .*types.Gone"),
    ("src/reshard/target/repair.py", "import Note, ", "import Gone, Note, ", ""),
)
"""File, text, what is put in its place, and the warning that this must give."""


class Site(NamedTuple):
    """What was built of the pages with these faults."""

    folder: Path
    exit_code: int
    warnings: list[str]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    copy, target = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("site")
    for part in PARTS:
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, copy / part)
    for name, text, other, _ in FAULTS:
        path = copy / name
        content = path.read_text(encoding="utf-8") if text else ""
        assert text in content, name
        path.write_text(content.replace(text, other, 1) or other, encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (words,) = re.findall(r"^\t\$\(BIN\)/sphinx-build (.*) build/docs$", makefile, re.MULTILINE)
    command = [sys.executable, "-m", "sphinx", *words.split(), str(target)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, env={"PYTHONPATH": "src"})
    assert (target / "index.html").exists(), done.stderr
    found = re.sub(r"\x1b\[[\d;]*m", "", done.stderr)
    return Site(target, done.returncode, [line for line in found.splitlines() if "WARNING: " in line])


def test_each_broken_reference_fails_the_build_and_nothing_else_does(site: Site) -> None:
    wanted = [pattern for *_, pattern in FAULTS if pattern]
    unseen = [pattern for pattern in wanted if not any(re.search(pattern, line) for line in site.warnings)]
    unwanted = [line for line in site.warnings if not any(re.search(pattern, line) for pattern in wanted)]
    assert (unseen, unwanted, site.exit_code) == ([], [], 1)


def test_every_page_is_there(site: Site) -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if not (site.folder / page.relative_to(ROOT)).with_suffix(".html").exists()] == []


def test_no_page_asks_another_server(site: Site) -> None:
    outside = re.compile(
        r'<(?:script|img|iframe|link|source)\b[^>]*(?:src|href)="(?:\w+:)?//'  # of HTML
        r"|url\(\s*[\"']?(?:\w+:)?//|@import|@font-face"  # of CSS
    )
    files = [path for path in site.folder.rglob("*") if path.suffix in {".html", ".css"}]
    assert len(files) > 80
    assert [path for path in files if outside.search(path.read_text(encoding="utf-8"))] == []


def test_the_api_has_every_public_function_with_its_arguments(site: Site) -> None:
    text = (site.folder / "docs" / "api.html").read_text(encoding="utf-8")
    for name in reshard.__all__:
        assert f'id="reshard.{name}"' in text, name
    assert "<strong>max_file_size</strong>" in text  # of convert, in its list of arguments
    assert 'id="reshard.verification.report.Report.is_proven"' in text
