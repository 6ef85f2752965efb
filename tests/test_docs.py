"""The pages say what is so: marked blocks run, links lead somewhere, lists of files and of problems are whole.

A block is marked behind its language: `console run` and `python run` are run in the order of the page, in one folder;
a block with `write=NAME` is written there; `text tree` is a list of files.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path

import pytest
from page_folders import write_folders
from repository import ROOT, find_test_file

import reshard
from reshard.recipes.placeholder_checks import PLACEHOLDER_KEYS, SCALE_KEYS
from reshard.recipes.splits import SPLITS
from reshard.recipes.table_checks import ALL_KEYS, RELATIONS

PACKAGE = Path(reshard.__file__).parent
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES_THAT_RUN = [
    "README.md",
    "docs/README.md",
    "docs/recipes.md",
    "docs/casts.md",
    "docs/diff.md",
    "docs/format.md",
    "docs/library.md",
    "docs/tutorial-recipe.md",
    "docs/subsets.md",
    "docs/two-nodes.md",
    "docs/cluster.md",
    "docs/pages.md",
    *(f"docs/tasks/{page.name}" for page in sorted((ROOT / "docs" / "tasks").glob("*.md")) if page.name != "README.md"),
]
BLOCK = re.compile(r"^```(\w+) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
KIND = re.compile(
    r'(?:Problem|refuse|Fault)\(\s*"([a-z-]+)"'  # as an argument
    r'|return "([a-z]+(?:-[a-z]+)+)", '  # as the first of a fault
    r'|kind = "([a-z-]+)" if .+ else "([a-z-]+)"'
)
STANDS_FOR = {"make demo": "reshard demo"}
"""What the Makefile runs once everything is set up."""


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Language, mark and text of each marked block."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def tree() -> set[Path]:
    """Every file and folder that docs/architecture.md lists."""
    (text,) = (text for _, mark, text in blocks(ROOT / "docs" / "architecture.md") if mark == "tree")
    found: list[Path] = []
    folders: dict[int, Path] = {-1: ROOT}
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth] = folders[depth - 1] / line.split()[0]
        found.append(folders[depth])
    return set(found)


# --- blocks ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder in which a page is run, with the command `reshard` in `bin`."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "reshard"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m reshard "$@"\n')
    command.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("name", PAGES_THAT_RUN)
def test_marked_blocks_give_what_the_page_shows(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(ROOT / name)
    assert any(mark == "run" for _, mark, _ in found)
    with write_folders(folder, (ROOT / name).read_text(encoding="utf-8")) as settings:
        for key, value in settings.items():
            monkeypatch.setenv(key, value)
        require_blocks(found, folder)


def require_blocks(found: list[tuple[str, str, str]], folder: Path) -> None:
    """Writes and runs the blocks of a page in their order."""
    for language, mark, text in found:
        if mark.startswith("write="):
            (folder / mark.removeprefix("write=")).write_text(text, encoding="utf-8")
        elif language == "python":
            code, output = run([sys.executable, "-c", text], folder)
            assert code == 0, output
        elif language == "console":
            require_console(text, folder)


def require_console(text: str, folder: Path) -> None:
    """Each command prints what stands below it, `...` for anything; one with nothing below it succeeds."""
    code = 0
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, wanted = part.partition("\n")
        line = STANDS_FOR.get(command, command)
        code, output = run(["bash", "-c", f"(exit {code}); {line}"], folder)
        if wanted:
            wanted, output = without_chance(wanted), without_chance(output)
            same = OutputChecker().check_output(wanted, output, ELLIPSIS | NORMALIZE_WHITESPACE)
            assert same, f"$ {command}\n{output}\n--- instead of\n{wanted}"
        else:
            assert code == 0, output


def run(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and all output, in the order in which it is written."""
    paths = {
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": str(PACKAGE.parent),
        "PYTHONUNBUFFERED": "1",
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | paths,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def without_chance(output: str) -> str:
    """Without what differs from run to run: seconds, rates, the lines of progress, the folder for temporary files."""
    lines = [line for line in output.splitlines() if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line)]
    return re.sub(r"in \d+\.\d s\b.*", "in ... s", "\n".join(lines)).replace(tempfile.gettempdir(), "/tmp")  # noqa: S108


# --- links and lists ---


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not re.match(r"\w+:", link)]
    assert [link for link in links if not (page.parent / link.partition("#")[0]).exists()] == []


def test_every_page_is_listed_by_a_readme_of_its_folder_or_above() -> None:
    """The site's sidebar has these and no other."""
    folder = ROOT / "docs"
    listed = {
        (readme.parent / link).resolve()
        for readme in folder.rglob("README.md")
        for link in LINK.findall(readme.read_text(encoding="utf-8"))
        if not link.startswith("..")
    }
    assert [page for page in sorted(folder.rglob("*.md")) if page not in {folder / "README.md", *listed}] == []


def test_tree_lists_every_file_of_the_package() -> None:
    files = {path for ending in ("py", "toml") for path in (ROOT / "src").rglob(f"*.{ending}")}
    assert sorted(files - tree()) == []


def test_tree_lists_nothing_else() -> None:
    assert [path for path in sorted(tree()) if not path.exists()] == []


def test_format_page_lists_every_kind_of_problem() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))
    kinds = {kind for groups in KIND.findall(sources) for kind in groups if kind}
    listed = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "docs" / "format.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(kinds)


def test_recipes_page_has_every_key_of_a_recipe_and_no_other() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for heading, keys in (("The keys", ALL_KEYS), ("Placeholders", PLACEHOLDER_KEYS)):
        text = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", text, re.MULTILINE)
        assert sorted(re.findall(r"\w+", " ".join(rows))) == sorted(keys)
    for words, section in ((SCALE_KEYS, "Block scales"), (RELATIONS, "Rows"), (SPLITS, "Splits")):
        text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        assert [word for word in words if not re.search(rf'\b{word}(?:[`"]| = )', text)] == []


def test_the_tests_that_the_page_on_reliability_names_are_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 20
    lacking = [name for file, name in named if f"\ndef {name}(" not in find_test_file(file).read_text(encoding="utf-8")]
    assert lacking == []
