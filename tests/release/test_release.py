"""What is published: versions that agree, metadata, the contents of the wheel, the forms and pages around it."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_release import TESTS, list_lowest, read_metadata
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from release_uses import EXTRAS, LACKING
from repository import ROOT, find_test_file

import reshard
from reshard.cli.main import main
from reshard.synthetic import SMALL_V3, write_checkpoint

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Metadata:
    return read_metadata(wheel)


# --- one version ---


def test_the_version_is_the_same_in_all_places() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    closed = re.findall(r"^## \[([\d.]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert PROJECT["version"] == reshard.__version__ == str(citation["version"]) == closed[0][0]
    assert str(citation["date-released"]) == closed[0][1]
    assert citation["license"] == PROJECT["license"]
    assert [one["name"] for one in citation["authors"]] == [one["name"] for one in PROJECT["authors"]]


# --- the wheel ---


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert packed == {name for name in files if "__pycache__" not in name}
    assert {"reshard/py.typed", "reshard/recipes/families/llama.toml"} < packed
    assert any(name.startswith("reshard/synthetic_configs/") for name in packed)


def test_the_wheel_has_the_licence_and_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        texts = {
            name.partition(".dist-info/")[2]: archive.read(name) for name in archive.namelist() if "-info/" in name
        }
    assert texts["licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"reshard = reshard.cli.process:entry" in texts["entry_points.txt"]


def test_the_metadata_name_what_was_tried(metadata: Metadata) -> None:
    assert metadata.license_expression == "Apache-2.0"
    assert str(metadata.requires_python) == ">=3.11"
    assert metadata.classifiers
    assert metadata.description_content_type == "text/markdown"
    (pythons,) = re.findall(r"^PYTHONS \?= (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    tried = re.findall(r"python(3\.\d+)", pythons)
    named = [one.rpartition(" ")[2] for one in metadata.classifiers if re.search(r":: 3\.\d+$", one)]
    assert named == tried == ["3.11", "3.12", "3.13"]
    assert "Operating System :: POSIX :: Linux" in metadata.classifiers


def test_every_extra_of_users_is_used_and_missed_by_the_release() -> None:
    users = PROJECT["optional-dependencies"].keys() - {"test", "lint", "docs", "release"}
    assert EXTRAS.keys() == users
    assert LACKING.keys() == users - {"fast"}, "without numba nothing is refused"


def test_what_two_extras_need_has_one_lower_bound() -> None:
    bounds: dict[str, set[str]] = {}
    for wanted in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for one in map(Requirement, wanted):
            bounds.setdefault(one.name, set()).add(str(one.specifier))
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def test_the_lowest_versions_are_those_of_the_bounds(metadata: Metadata) -> None:
    assert list_lowest(metadata, "") == [one.replace(">=", "==") for one in PROJECT["dependencies"]]
    assert "obstore==0.12" in list_lowest(metadata, "remote")
    assert "obstore==0.12" not in list_lowest(metadata, "torch")


def test_the_tests_that_a_release_runs_are_there() -> None:
    assert [name for name in TESTS if not (ROOT / "tests" / name).exists()] == []


# --- the lock ---


def test_the_lock_has_all_that_tests_linters_and_release_need() -> None:
    lines = (ROOT / "requirements" / "development.txt").read_text(encoding="utf-8").splitlines()
    locked = dict(line.split("==") for line in lines if not line.startswith("#"))
    locked = {name.lower().replace("_", "-"): version for name, version in locked.items()}
    assert all(re.fullmatch(r"[\w.]+", version) for version in locked.values()), "no tags of builds, no addresses"
    extras = PROJECT["optional-dependencies"]
    for one in map(Requirement, [*PROJECT["dependencies"], *extras["test"], *extras["lint"], *extras["release"]]):
        assert one.specifier.contains(locked[one.name]), one
    assert locked["torch"] == "2.13.0"


# --- forms and pages ---


@pytest.mark.parametrize("form", [one for one in FORMS if one.name != "config.yml"], ids=lambda form: form.stem)
def test_a_form_has_what_the_code_host_asks_for(form: Path) -> None:
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "labels", "body"} == content.keys()
    fields = [one for one in content["body"] if one["type"] != "markdown"]
    assert {one["type"] for one in fields} <= {"input", "textarea"}
    assert len({one["id"] for one in fields}) == len(fields)
    assert all(
        {"label"} <= one["attributes"].keys() <= {"label", "description", "placeholder", "render"} for one in fields
    )
    assert any(one.get("validations") == {"required": True} for one in fields)
    asked = [one["attributes"] for one in fields]
    assert not [one for one in asked if "ttach" in one.get("description", "") and "render" in one], "takes no files"


ASKED = {command for form in FORMS for command in re.findall(r"`reshard ([^`;]+)", form.read_text(encoding="utf-8"))}
LONGEST_ISSUE = 65_536
"""In characters: the code host takes no more."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands in the place of each word in capital letters."""
    folder = tmp_path_factory.mktemp("places")
    write_checkpoint(folder / "source", SMALL_V3, 2)
    write_checkpoint(folder / "unknown", SMALL_V3, 2)
    (folder / "unknown" / "config.json").write_text(
        json.dumps({**SMALL_V3, "model_type": "beacon", "architectures": []}), encoding="utf-8"
    )
    reshard.convert(folder / "source", folder / "ranks", mp=2)
    recipe = ROOT / "src" / "reshard" / "recipes" / "families" / "deepseek-v3.toml"
    words = {"SOURCE": "source", "TARGET": "ranks", "hf://ORG/NAME": "unknown"}
    return {word: str(folder / name) for word, name in words.items()} | {"FILE": str(recipe)}


@pytest.mark.parametrize("command", sorted(ASKED))
def test_a_command_that_a_form_asks_for_prints_what_fits_into_an_issue(
    command: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([places.get(word, word) for word in command.split()])
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    assert code == 0, said.err
    assert 0 < len(said.out) < LONGEST_ISSUE / 2
    if "hf://" in command:
        assert "model.layers.#.mlp.experts.#.down_proj.weight" in said.out


def test_the_forms_ask_for_commands() -> None:
    assert {command.split()[0] for command in ASKED} == {"--version", "inspect", "recipes", "verify"}


def test_the_tests_that_the_page_on_security_names_are_there() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 25
    lacking = [name for file, name in named if f"\ndef {name}(" not in find_test_file(file).read_text(encoding="utf-8")]
    assert lacking == []
    rows = re.findall(r"^\| (?!from |-)(.+?) \|.*\| (.+) \|$", page, re.MULTILINE)
    assert len(rows) > 12
    assert [row for row, shown in rows if "::test_" not in shown] == []
