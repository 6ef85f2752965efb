"""Recipes of engines: chosen by `--for`, by a name, or by rank files; never otherwise. The commands that are printed
go on with the same recipe.
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from families import write_small
from jobs import Job
from targets import leave_unfinished

import reshard
from reshard.cli.main import main
from reshard.recipes import recipe as recipes
from reshard.recipes.recipe import FAMILIES_FOLDER

FILES = "other-{rank}-of-{ranks}.safetensors"


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of recipes with one more: DeepSeek-V3 for an engine, with other names of files."""
    folder = tmp_path / "families"
    shutil.copytree(FAMILIES_FOLDER, folder)
    text = (folder / "deepseek-v3.toml").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^name( *)= .*$", 'name = "deepseek-v3-other"\nengine = "other"', text, count=1)
    text = re.sub(r"(?m)^files( *)= .*$", f'files = "{FILES}"', text, count=1)
    (folder / "deepseek-v3-other.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(recipes, "FAMILIES_FOLDER", folder)
    recipes.list_packaged_recipes.cache_clear()
    yield tmp_path
    recipes.list_packaged_recipes.cache_clear()


@pytest.fixture
def source(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(packaged)
    write_small(packaged / "source", "deepseek-v3")
    return packaged / "source"


def run(command: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert main(shlex.split(command)) == code, capsys.readouterr()
    found = capsys.readouterr()
    return found.out + found.err


@pytest.mark.usefixtures("source")
def test_without_a_word_for_it_an_engine_takes_no_part(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ("--mp 2", "--tp 2"):
        assert json.loads(run(f"plan source {options} --json", capsys))["recipe"]["name"] == "deepseek-v3"
    assert json.loads(run("plan source --json", capsys))["recipe"].keys() == {"name", "sha256"}
    assert json.loads(run("inspect source --json", capsys))["recipe"] == "deepseek-v3"


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    "options", ["--for other", "--recipe deepseek-v3-other", "--recipe deepseek-v3-other --for other"]
)
def test_an_engine_is_chosen_by_its_name_or_that_of_its_recipe(
    options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(run(f"plan source --tp 2 {options} --json", capsys))
    assert (found["recipe"]["name"], found["recipe"]["engine"]) == ("deepseek-v3-other", "other")
    assert [file["name"] for file in found["files"]] == [FILES.format(rank=rank, ranks=2) for rank in range(2)]


@pytest.mark.usefixtures("source")
def test_what_was_made_for_an_engine_says_so_itself(capsys: pytest.CaptureFixture[str]) -> None:
    said = run("convert source target --tp 2 --for other", capsys)
    verify = re.search(r"next:\n +(reshard verify .*)", said)
    assert verify
    run(verify[1].removeprefix("reshard "), capsys)
    assert "deepseek-v3-other" in run("inspect target", capsys)
    run("convert target again --tp 1", capsys)
    assert [path.name for path in Path("again").glob("*.safetensors")] == [FILES.format(rank=0, ranks=1)]
    run("diff target again", capsys)
    run("convert target whole --to hf", capsys)
    run("verify whole --source target", capsys)
    run("verify whole --source source", capsys, 1)  # the MTP layer was dropped; but the recipe is found
    assert "missing-tensor" in run("verify whole --source source --json", capsys, 1)
    damaged = Path("target") / FILES.format(rank=1, ranks=2)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    run("verify target --source source", capsys, 1)
    run("repair target --source source", capsys)
    assert damaged.read_bytes() == content
    (Path("target") / "reshard.json").unlink()
    run("verify target --source source", capsys)  # by the names of the files


@pytest.mark.usefixtures("source")
def test_printed_commands_go_on_for_the_same_engine(capsys: pytest.CaptureFixture[str]) -> None:
    joined = r"reshard convert \S*source \S*target --mp 2 --recipe deepseek-v3-other"
    assert re.search(joined, run("convert source target --tp 2 --for other --ranks 0", capsys))
    Path("part").mkdir()
    run("convert source part --tp 2 --for other --ranks 1", capsys)
    shutil.copytree("part", "target", dirs_exist_ok=True)
    command = re.search(
        r"reshard (convert SOURCE \S*target --mp 2 --recipe deepseek-v3-other)", run("verify target", capsys, 1)
    )
    assert command
    run(command[1].replace("SOURCE", "source"), capsys)
    run("verify target --source source", capsys)
    said = run("plan source --for other", capsys)
    assert re.search(r"reshard convert source TARGET --mp \d+ --for other", said)


@pytest.mark.usefixtures("source")
def test_two_spellings_of_the_ranks_may_not_differ(capsys: pytest.CaptureFixture[str]) -> None:
    run("plan source --tp 2 --mp 2", capsys)
    with pytest.raises(SystemExit) as ended:
        main(["convert", "source", "target", "--mp", "4", "--tp", "2"])
    assert ended.value.code == 2
    assert "--tp 2: 4 ranks were asked for already" in capsys.readouterr().err
    assert not Path("target").exists()


def test_an_unfinished_run_tells_its_recipe(source: Path, tmp_path: Path) -> None:
    leave_unfinished(Job(source, 2, "deepseek-v3-other"), tmp_path / "target")
    found = reshard.inspect(tmp_path / "target").unfinished
    assert found is not None
    assert "--mp 2 --recipe deepseek-v3-other" in found.command
    assert found.ranks == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("plan source --mp 2 --for othr", ["'othr'", "did you mean other?"]),
        ("plan source --mp 2 --for nobody", ["'nobody'", "one of other"]),
        ("plan source --mp 2 --for other --recipe deepseek-v3", ["deepseek-v3 for no engine", "leave out --for"]),
        ("plan source --to hf --cast bf16 --for other", ["--to hf", "leave out --for"]),
        ("plan llama --mp 2 --for other", ["a model of llama", "deepseek-v3-other (deepseek_v3"]),
        ("plan ranks --mp 1 --for other", ["rank files of the recipe deepseek-v3", "first --to hf"]),
    ],
)
def test_an_engine_that_does_not_suit_is_refused_with_what_there_is(
    command: str, said: list[str], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "llama" in command:
        shutil.copytree(source, "llama")
        config = json.loads(Path("llama/config.json").read_text())
        Path("llama/config.json").write_text(json.dumps({**config, "model_type": "llama", "architectures": []}))
    if "ranks" in command:
        reshard.convert(source, "ranks", 2)
    found = run(command, capsys, 2)
    assert [words for words in said if words not in found] == [], found


def test_python_says_it_in_its_own_words(source: Path, tmp_path: Path) -> None:
    assert reshard.plan(source, 2, for_engine="other").recipe.name == "deepseek-v3-other"
    reshard.convert(source, tmp_path / "ranks", 2)
    with pytest.raises(reshard.Refused) as error:
        reshard.plan(tmp_path / "ranks", 1, for_engine="other")
    assert 'for_engine="other"' in str(error.value)
    assert "--" not in str(error.value)


@pytest.mark.usefixtures("packaged")
def test_the_list_of_recipes_tells_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("recipes list", capsys).splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("deepseek-v3-other"))
    assert any("--for other" in line for line in lines[place : place + 2])
    assert sum("--for other" in line for line in lines) == 1
    shown = json.loads(run("recipes show deepseek-v3-other --json", capsys))
    assert (shown["engine"], shown["constants"]) == ("other", [])
