"""The command `plan`: without a number of ranks, with a target; and targets that have another conversion."""

import json
import shlex
from pathlib import Path

import pytest
from jobs import Job, convert_checkpoint
from targets import leave_unfinished

import reshard.execution.execute
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.synthetic import SMALL_V3, write_checkpoint

CHOICES = [1, 2, 4]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "source"
    write_checkpoint(folder, SMALL_V3, 3)
    return folder


# --- without a number of ranks ---


def test_the_numbers_of_ranks_fit_a_terminal_and_end_with_a_command_that_works(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    assert main(["plan", "source", "--cast", "bf16", "--only", "*norm*", "--only", "*mlp*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "next:"
    assert max(map(len, lines[:-1])) <= 80
    assert sum("80 GB" in line for line in lines) > len(CHOICES)
    words = shlex.split(lines[-1])
    assert words[:5] == ["reshard", "convert", "source", "TARGET", "--mp"]
    assert words[-6:] == ["--cast", "bf16", "--only", "*norm*", "--only", "*mlp*"]
    assert main([str(tmp_path / "target") if word == "TARGET" else word for word in words[1:]]) == 0


def test_the_numbers_of_ranks_as_json(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(source), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tried"] == [1, 256]
    assert [choice["ranks"] for choice in said["choices"] if not choice["pad"]] == CHOICES
    assert {choice["gpu_gb"] for choice in said["choices"]} == {80}
    for choice in said["choices"]:
        assert main(["plan", str(source), "--json", "--mp", str(choice["ranks"]), *["--pad"] * choice["pad"]]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert max(file["tensors"] for file in planned["files"]) == choice["tensors"]


@pytest.mark.parametrize("words", [["--ranks", "0"], ["--target", "elsewhere"]])
def test_what_needs_a_number_of_ranks_is_refused_without_one(
    words: list[str], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(source), *words]) == 2
    assert f"{words[0]}: wrong option" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_convert_without_one_is_refused_and_names_those_that_work(
    more: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(tmp_path / "target"), *more]) == 2
    text = capsys.readouterr().err
    assert "expected: one of 1, 2, 4" in text
    assert "reshard plan SOURCE" in text
    assert not (tmp_path / "target").exists()


def test_in_python_the_same_refusal_names_arguments(source: Path) -> None:
    with pytest.raises(Refused) as refused:
        reshard.plan(source)
    (problem,) = refused.value.problems
    assert problem.subject == "mp"
    assert problem.expected.startswith("one of 1, 2, 4")


# --- with a target ---


def test_a_plan_with_a_target_says_room_and_time(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(source), "--mp", "2", "--target", str(tmp_path / "target")]) == 0
    text = capsys.readouterr().out
    assert f"\n{tmp_path}: " in text
    assert "(rough: reads " in text
    assert main(["convert", str(source), str(tmp_path / "target"), "--mp", "2", "--dry-run", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)["estimate"]
    assert estimate["folder"] == str(tmp_path)
    assert estimate["free"] > estimate["needed"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_a_finished_target_says_so(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_checkpoint(Job(source, 2), tmp_path / "target")
    assert main(["plan", str(source), "--mp", "2", "--target", str(tmp_path / "target")]) == 0
    assert "converted already" in capsys.readouterr().out


# --- a target of another conversion ---


def test_a_finished_target_for_other_ranks_is_one_problem_and_its_hint_works(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(Job(source, 4), tmp_path / "four")
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(source, 2), tmp_path / "four")
    (problem,) = refused.value.problems
    assert (problem.found, problem.expected) == ("a finished conversion: 4 ranks", "this one: 2 ranks")
    command = problem.remedy.removeprefix("another target; or ").partition(" makes")[0]
    words = shlex.split(command)[1:]
    assert main([str(tmp_path / "two") if word == "NEW" else word for word in words]) == 0
    assert main(["verify", str(tmp_path / "two"), "--source", str(source)]) == 0


def test_a_finished_target_of_another_kind_names_what_differs(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(Job(source, 2, ranks=(0,)), tmp_path / "target")
    for job, before, now in (
        (Job(source, 2, cast="bf16"), "no cast", "cast bf16"),
        (Job(source, 1, to="hf"), "2 ranks", "whole files"),
        # Not all of its ranks are there: the others cannot be made from them.
        (Job(source, 4), "2 ranks", "4 ranks"),
    ):
        with pytest.raises(Refused) as refused:
            convert_checkpoint(job, tmp_path / "target")
        (problem,) = refused.value.problems
        assert problem.found == f"a finished conversion: {before}"
        assert problem.expected == f"this one: {now}"
        assert problem.remedy == "another target"


def test_an_unfinished_target_for_other_ranks_is_one_problem_that_destroys_nothing(
    source: Path, tmp_path: Path
) -> None:
    leave_unfinished(Job(source, 4), tmp_path / "target")
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(source, 2), tmp_path / "target")
    (problem,) = refused.value.problems
    assert (problem.kind, problem.subject) == ("another-job", str(tmp_path / "target"))
    assert (problem.found, problem.expected) == ("an unfinished conversion: 4 ranks", "this conversion: 2 ranks")
    assert "restart" not in problem.remedy
    assert problem.remedy.endswith(f"by the command that reshard inspect {tmp_path / 'target'} prints")
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(source, 4, ranks=(1,)), tmp_path / "target")
    (problem,) = refused.value.problems
    assert problem.expected == "this conversion: the files model1-mp4.safetensors"
    convert_checkpoint(Job(source, 4), tmp_path / "target")


def test_a_target_of_another_source_is_told_apart_from_this_one(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(Job(source, 2, cast="bf16"), tmp_path / "target")
    write_checkpoint(tmp_path / "other", SMALL_V3, 2, seed=1)
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(tmp_path / "other", 4), tmp_path / "target")
    (problem,) = refused.value.problems
    assert problem.found == "a finished conversion: 2 ranks, cast bf16, of another source, or of other bytes"
    assert problem.expected == "this one: 4 ranks, no cast, of this source"


@pytest.mark.parametrize(("option", "hint"), [("--target", "add --mp N or --to hf;"), ("--ranks", "add --mp N;")])
def test_an_option_that_needs_ranks_says_so(
    option: str, hint: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(source), option, "1"]) == 2
    told = capsys.readouterr().err
    assert f"hint:     {hint} without {option}, plan shows which N work\n" in told
    assert main(["plan", str(tmp_path / "no checkpoint"), option, "1"]) == 2
    assert "no checkpoint: no source\n" in capsys.readouterr().err


def test_numbers_as_a_string_are_refused_whole(source: Path) -> None:
    with pytest.raises(Refused, match="layers: wrong option") as refused:
        reshard.plan(source, 2, layers="0-2")  # type: ignore[arg-type]
    (problem,) = refused.value.problems
    assert problem.found == "'0-2'"
    assert "range(0, 3)" in problem.remedy


def test_plan_without_ranks_in_python_names_those_that_work(source: Path) -> None:
    with pytest.raises(Refused, match="mp=N; the command reshard plan SOURCE shows"):
        reshard.plan(source)
