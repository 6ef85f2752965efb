"""docs/json.md has every field that a command prints with `--json`, and no other."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import Job, convert_checkpoint
from repository import ROOT
from s3_server import serve_s3, set_s3_environment
from safetensors.numpy import save_file
from targets import leave_unfinished

from reshard.cli.main import COMMANDS, main
from reshard.synthetic import SMALL_V3, write_checkpoint

Page = Mapping[str, Mapping[str, str]]
"""Section -> field -> its row of the table."""

BY_DATA = {"counts", "casts", "dtypes", "made", "names", "not_in_config", "layout", "subset"}
BY_DATA |= {"holes", "scales", "sizes", "run"}
"""Fields whose keys are those of the model, of the recipe or of the options."""

REFUSAL, PLAN, CONVERT = "A refusal, of any command", "`plan`, `convert --dry-run`", "`convert`, `deepseek`"
VERIFY, DOWNLOAD = "`verify`, `demo`", "`verify --download`, `verify --sums`"
DIFF, INSPECT, REPAIR = "`diff`", "`inspect`", "`repair`"
CHOICES = "`plan` without `--mp`"
RECIPES, CHECK = "`recipes`, `recipes list`, `recipes show`", "`recipes check`"

RUNS: Mapping[str, list[str]] = {
    REFUSAL: ["plan nowhere --mp 2", "verify nowhere", "repair nowhere", "inspect nowhere", "diff nowhere source",
              "demo source", "convert nowhere out --mp 2", "recipes show nowhere", "recipes check deepseek-v3 nowhere",
              "deepseek --hf-ckpt-path nowhere --save-path out --model-parallel 2"],
    PLAN: ["plan source --mp 2 --layers 0-1", "convert source out --mp 2 --dry-run", "plan source --to hf --cast bf16",
           "plan source --mp 2 --target s3://models/new", "plan source --mp 2 --html page.html"],
    CHOICES: ["plan source"],
    CONVERT: ["convert source ranks --mp 2", "convert source ranks --mp 2", "convert source few --mp 2 --layers 0-1",
              "deepseek --hf-ckpt-path source --save-path script --model-parallel 2"],
    VERIFY: ["verify ranks", "verify ranks --source source", "verify ranks --sample 1%", "verify ranks --source other",
             "demo"],
    DOWNLOAD: ["verify source --sums sums", "verify other --sums sums"],
    REPAIR: ["repair ranks", "repair damaged --dry-run", "repair damaged --source source"],
    DIFF: ["diff ranks source", "diff source other", "diff source thin", "diff ranks source --html page.html"],
    INSPECT: ["inspect source", "inspect ranks", "inspect few", "inspect thin", "inspect unfinished",
              "inspect source --html page.html"],
    RECIPES: ["recipes", "recipes list", "recipes show deepseek-v3"],
    CHECK: ["recipes check deepseek-v3 source"],
}  # fmt: skip
"""The commands of each section, which are run in this order."""


def read_page() -> Page:
    page: dict[str, dict[str, str]] = {}
    for text in (ROOT / "docs" / "json.md").read_text(encoding="utf-8").split("\n### ")[1:]:
        title, _, rest = text.partition("\n")
        fields = page.setdefault(title, {})
        for row in re.findall(r"^\| (`.+) \|$", rest, re.MULTILINE):
            names, _, meaning = row.partition(" | ")
            fields |= dict.fromkeys(re.findall(r"`(\w+)`", names), meaning)
    planned = {name: row for name, row in page[PLAN].items() if name not in ("estimate", "upload", "page")}
    return {**page, CONVERT: {**planned, **page[CONVERT]}}


def fields_within(value: Any) -> Iterator[str]:
    """The names of the fields in a value, to any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            if name not in BY_DATA:
                yield from fields_within(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from fields_within(inner)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Any]]:
    """Section -> what its commands print."""
    folder = tmp_path_factory.mktemp("json")
    write_checkpoint(folder / "source", SMALL_V3, 2)
    write_checkpoint(folder / "other", SMALL_V3, 2, seed=1)
    (folder / "thin").mkdir()
    save_file({"model.norm.weight": np.zeros(3, np.float16)}, folder / "thin" / "model.safetensors")
    files = sorted((folder / "source").iterdir())
    sums = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in files)
    leave_unfinished(Job(folder / "source", 2), folder / "unfinished")
    convert_checkpoint(Job(folder / "source", 2), folder / "damaged")
    (folder / "damaged" / "model1-mp2.safetensors").unlink()
    (folder / "source" / "original").mkdir()  # a note tells that it stays behind
    (folder / "sums").write_text("\n".join(sums))
    found: dict[str, list[Any]] = {}
    with pytest.MonkeyPatch.context() as patch, serve_s3() as state:
        set_s3_environment(patch, state, folder)
        patch.chdir(folder)
        for section, commands in RUNS.items():
            found[section] = [print_json(command, 2 if section == REFUSAL else None) for command in commands]
    return found


def print_json(command: str, code: int | None) -> Any:
    """What a command prints. It must not be refused, unless that is what the section is about."""
    out = Path("said.json")
    with pytest.MonkeyPatch.context() as patch, out.open("w", encoding="utf-8") as stream:
        patch.setattr("sys.stdout", stream)
        ended = main([*command.split(), "--json"])
    assert ended == code if code else ended in (0, 1), command
    return json.loads(out.read_bytes())


def test_every_command_has_a_section() -> None:
    assert read_page().keys() == RUNS.keys()
    words = {name for section in RUNS for name in re.findall(r"`(\w+)", section)}
    assert words == {command.name for command in COMMANDS}
    assert {command.name for command in COMMANDS} == {
        command.split()[0] for section, commands in RUNS.items() if section != REFUSAL for command in commands
    }


@pytest.mark.parametrize("section", RUNS)
def test_the_page_has_the_fields_that_are_printed_and_no_other(section: str, printed: Mapping[str, list[Any]]) -> None:
    page = read_page()[section]
    documents = [one for said in printed[section] for one in (said if isinstance(said, list) else [said])]
    assert {name for document in documents for name in document} == page.keys()
    for document in documents:
        assert page.keys() - document.keys() <= {"subset", "estimate", "upload", "page"}, (
            "only where it is not all, with a target, and with --html"
        )


@pytest.mark.parametrize("section", RUNS)
def test_the_rows_of_the_page_name_the_fields_inside(section: str, printed: Mapping[str, list[Any]]) -> None:
    page = read_page()
    shown = page[REFUSAL]["problems"]
    seen = set()
    for document in printed[section]:
        for one in document if isinstance(document, list) else [document]:
            for name in one.keys() - BY_DATA:
                row = page[section][name] + (shown if name == "problems" else "")
                inside = set(fields_within(one[name]))
                assert inside <= {*re.findall(r"`(\w+)`", row)}, name
                seen |= {name} if inside else set()
    wanted = {
        REFUSAL: {"problems"}, PLAN: {"recipe", "source", "coverage", "files", "notes", "estimate", "upload"},
        CHOICES: {"choices"},
        CONVERT: {"recipe", "source", "coverage", "files", "done"}, VERIFY: {"problems"}, DOWNLOAD: {"problems"},
        DIFF: {"values", "kinds", "layers", "modules"}, INSPECT: {"unfinished"}, RECIPES: {"rules"}, CHECK: set(),
    }  # fmt: skip
    assert wanted.get(section, set()) <= seen, "else the comparison says nothing"
