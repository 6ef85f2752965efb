"""Everything that a job is refused for, through the command: what it says, and that not a byte has been written.

Each row of the list damages a small checkpoint or the options.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from refusals import (
    EMBED,
    REFUSALS,
    TINY,
    Damage,
    Stored,
    Trial,
    all_of,
    config,
    edit_tensors,
    index_names,
    model,
    options,
    recipe,
    renamed,
    side_file_that_is_no_utf8,
    stray_file,
    truncated_file,
)

from reshard.cli.main import main
from reshard.errors import Refused
from reshard.sources.source import read_source
from reshard.synthetic import write_checkpoint


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals") / "pristine"
    write_checkpoint(folder, TINY, 3)
    return folder


@pytest.fixture
def trial(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    shutil.copytree(pristine, tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    return Trial(tmp_path / "source", tmp_path / "target")


# What the damages are made of.


# The damages that have a name.


def snapshot(folder: Path) -> dict[str, str]:
    """Everything below a folder: a file by the hash of its bytes, a large one (all holes) by its time of change."""
    return dict(sorted(snapshot_entries(folder)))


def snapshot_entries(folder: Path) -> Iterator[tuple[str, str]]:
    for path in folder.rglob("*"):
        name = ascii(str(path.relative_to(folder)))
        state = path.lstat()
        if path.is_symlink():
            yield name, f"-> {path.readlink()}"
        elif path.is_dir():
            yield name, "folder"
        elif state.st_size > 2**30:
            yield name, f"{state.st_size} bytes, changed at {state.st_mtime_ns}"
        else:
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("damage", "kind", "word"), [pytest.param(*row, id=name) for name, *row in REFUSALS])
def test_the_job_is_refused_and_nothing_is_written(
    trial: Trial, damage: Damage, kind: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(trial)
    before = snapshot(trial.source.parent)

    assert main([*trial.arguments, "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["status"] == "refused"
    problems = [problem for problem in said["problems"] if problem["kind"] == kind]
    assert problems, said
    assert all(problem.keys() == {"kind", "subject", "found", "expected", "remedy"} for problem in problems)
    assert any(word in text for problem in problems for text in problem.values()), problems

    assert main(trial.arguments) == 2
    out, text = capsys.readouterr()
    assert out == ""
    assert text.startswith("reshard: refused\n")
    assert kind.replace("-", " ") in text
    assert "\n  found:    " in text
    assert re.search(r"\n  (found: .*; )?expected: ", text)
    assert snapshot(trial.source.parent) == before


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(
            all_of(config(model_type=None, architectures=5), renamed("input_layernorm", "ln_1")),
            id="a number as the architectures",
        ),
        pytest.param(
            all_of(config(model_type=None, architectures=[{}]), renamed("input_layernorm", "ln_1")),
            id="an object among the architectures",
        ),
        pytest.param(index_names("x" * 300 + ".safetensors"), id="a file name of 300 letters in the index"),
        pytest.param(lambda trial: setattr(trial, "target", Path("x" * 300)), id="a target of 300 letters"),
        pytest.param(lambda trial: setattr(trial, "target", Path("new", "x" * 300)), id="300 letters in a new folder"),
        pytest.param(lambda trial: trial.target.symlink_to(trial.target), id="a target that links to itself"),
        pytest.param(lambda trial: trial.target.symlink_to("nowhere"), id="a target that links to nothing"),
        pytest.param(recipe('["*token*"]', '["/*"]'), id="a recipe that carries the root"),
        pytest.param(recipe('"by e"', '"by p"'), id="a recipe that deals by weight and scale"),
        pytest.param(recipe(".safetensors", ".safetensors{"), id="a recipe with a stray brace in its file names"),
        pytest.param(recipe("{m}.eh_proj", "{i}.eh_proj"), id="a recipe with a marker of another placeholder"),
    ],
)
def test_a_strange_job_is_refused_without_a_traceback(
    trial: Trial, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(trial)
    before = snapshot(trial.source.parent)
    assert main(trial.arguments) == 2
    assert "\n  found:    " in capsys.readouterr().err
    assert snapshot(trial.source.parent) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(
            '"layers.{s}.ffn.gate.weight",          ', '"layers.{s}.ffn_norm.weight",', id="by two placeholders"
        ),
        pytest.param('"norm.weight",  ', '"layers.0.ffn_norm.weight",', id="by a placeholder and a number"),
        pytest.param('"norm.weight",  ', '"layers.0.attn.wo.scale",', id="by a scale and a weight"),
    ],
)
def test_two_tensors_of_one_name_in_the_target_are_refused(
    trial: Trial, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe(old, new)(trial)
    before = snapshot(trial.source.parent)
    assert main(trial.arguments) == 2
    assert new.strip('", ').rsplit("}", maxsplit=1)[-1] in capsys.readouterr().err
    assert snapshot(trial.source.parent) == before


@pytest.mark.parametrize("cast", ["fp8", "fp8-ue8m0"])
def test_weights_that_are_fp8_already_are_one_problem(
    trial: Trial, cast: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options("--mp", "2", "--cast", cast)(trial)
    assert main([*trial.arguments, "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["kind"], problem["subject"]) == ("wrong-option", f"--cast {cast}")
    assert re.fullmatch(r"\d\d weights that are FP8 already, with block scales", problem["found"])
    assert problem["remedy"].endswith("--cast bf16 first")


@pytest.mark.parametrize("recipe_name", ["deepseek-v2", "llama"])
def test_recipes_check_hints_at_no_option_that_it_does_not_have(
    trial: Trial, recipe_name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(trial.source)
    assert main(["convert", source, str(trial.target), "--mp", "2", "--recipe", recipe_name]) == 2
    assert "then another --recipe\n" in capsys.readouterr().err
    assert main(["recipes", "check", recipe_name, source]) == 2
    assert "then another RECIPE\n" in capsys.readouterr().err
    renamed(r"^model\.norm", "model.norms")(trial)
    assert main(["recipes", "check", "deepseek-v3", source]) == 2
    text = capsys.readouterr().err
    assert "another RECIPE, or write a recipe of your own (docs/recipes.md) and pass it as RECIPE\n" in text
    assert "--" not in text


def test_every_tensor_without_a_rule_is_named_with_the_nearest_rule(
    trial: Trial, capsys: pytest.CaptureFixture[str]
) -> None:
    renamed(r"experts\.(\d+)\.up_proj", r"experts.\1.upper_proj")(trial)
    with pytest.raises(Refused) as refused:
        read_source(trial.source)
    problems = refused.value.problems
    expected = {
        f"model.layers.{layer}.mlp.experts.{expert}.upper_proj.{end}"
        for layer in (1, 2)
        for expert in range(8)
        for end in ("weight", "weight_scale_inv")
    }
    assert {problem.subject for problem in problems} == expected
    assert all("'model.layers.{s}.mlp.experts.{e}.up_proj.{p}'" in problem.expected for problem in problems)

    assert main([*trial.arguments, "--json"]) == 2
    printed, text = capsys.readouterr()
    assert [problem["subject"] for problem in json.loads(printed)["problems"]] == [one.subject for one in problems]
    assert text.startswith(
        "reshard: refused\n"
        "model.layers.1-2.mlp.experts.0-7.upper_proj.weight_scale_inv: no rule (16 times)\n"
        "  hint:     another --recipe, or write a recipe of your own (docs/recipes.md) and pass it with --recipe FILE\n"
    )
    assert text.endswith("\n  also:     model.layers.1-2.mlp.experts.0-7.upper_proj.weight (16 times)\n")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(model("--mp", "4", n_routed_experts=6), id="experts"),
        pytest.param(model("--mp", "4", num_attention_heads=6), id="heads"),
        pytest.param(model("--mp", "4", vocab_size=130), id="a dimension"),
        pytest.param(model("--mp", "4", intermediate_size=768), id="blocks"),
        pytest.param(model("--mp", "16"), id="too many"),
        pytest.param(model("--mp", "5", vocab_size=120, num_attention_heads=12, n_routed_experts=12), id="thirds"),
    ],
)
def test_the_numbers_of_ranks_that_are_named_are_those_that_work(
    trial: Trial, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(trial)
    assert main([*trial.arguments, "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert len({problem["remedy"] for problem in problems}) == 1
    named = [int(number) for number in re.findall(r"\d+", problems[0]["remedy"])]
    working = [ranks for ranks in range(1, 33) if main(["plan", str(trial.source), "--mp", str(ranks)]) == 0]
    assert named == working


def test_no_number_of_ranks_is_named_where_none_works(trial: Trial, capsys: pytest.CaptureFixture[str]) -> None:
    def scalar(tensors: Stored) -> Stored:
        return {name: ("BF16", [], b"12") if name == EMBED else tensor for name, tensor in tensors.items()}

    edit_tensors(trial.source, scalar)
    assert main([*trial.arguments, "--json"]) == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [(problem["kind"], problem["subject"]) for problem in problems] == [("wrong-shape", EMBED)]
    assert not re.search(r"\d", problems[0]["remedy"])


def test_a_file_that_the_index_does_not_name_can_be_ignored(trial: Trial) -> None:
    assert main(trial.arguments) == 0
    stray_file(trial)
    other = trial.target.with_name("other")
    assert main(["convert", str(trial.source), str(other), "--mp", "2"]) == 2
    assert main(["convert", str(trial.source), str(other), "--mp", "2", "--ignore-extra-files"]) == 0
    ranks = {path.name: path.read_bytes() for path in trial.target.glob("*.safetensors")}
    assert {path.name: path.read_bytes() for path in other.glob("*.safetensors")} == ranks
    assert main(["verify", str(other), "--source", str(trial.source)]) == 2
    assert main(["verify", str(other), "--source", str(trial.source), "--ignore-extra-files"]) == 0


@pytest.mark.parametrize("path", ["empty", "absent", "absent/below/absent"])
def test_an_empty_or_absent_target_is_taken(trial: Trial, path: str) -> None:
    (trial.target.parent / "empty").mkdir()
    trial.target = trial.target.parent / path
    assert main(trial.arguments) == 0
    assert sorted(path.name for path in trial.target.glob("*.safetensors")) == [
        "model0-mp2.safetensors",
        "model1-mp2.safetensors",
    ]


@pytest.mark.parametrize("arguments", [["plan"], ["inspect"], ["recipes", "check", "deepseek-v3"]])
def test_the_other_commands_refuse_a_damaged_source_too(
    trial: Trial, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    truncated_file(trial)
    assert main([*arguments, str(trial.source), *(["--mp", "2"] if arguments == ["plan"] else [])]) == 2
    assert "truncated file" in capsys.readouterr().err


def test_side_files_keep_names_that_are_no_utf8(trial: Trial) -> None:
    side_file_that_is_no_utf8(trial)
    assert main(trial.arguments) == 0
    assert os.fsdecode(b"token\xff") in {path.name for path in trial.target.iterdir()}
