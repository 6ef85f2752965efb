"""Some ranks of a target are verified where they lie, without the others: by the manifest, and against the source."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from downloads import flip
from jobs import Job, convert_checkpoint
from targets import RANKS, make_source_and_target, rank_file

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.verification.report import Report


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source_and_target(tmp_path_factory.mktemp("some-ranks"))


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    return source.with_name("whole")


@pytest.fixture
def node(whole: Path, tmp_path: Path) -> Path:
    """The second node: ranks 2 and 3, and the JSON files."""
    folder = tmp_path / "the second node"
    folder.mkdir()
    for path in [*whole.glob("*.json"), rank_file(whole, 2), rank_file(whole, 3)]:
        shutil.copy(path, folder)
    return folder


def facts(report: object) -> list[tuple[str, str]]:
    assert isinstance(report, Report)
    return [(problem.kind, problem.subject) for problem in report.problems]


def test_the_hint_for_a_folder_of_some_ranks_is_the_command_that_proves_them(
    node: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(node)]) == 1
    told = capsys.readouterr().out
    assert told.count("missing file") == 1
    assert "2 of 4 rank files are not here: ranks 0-1\n" in told
    command = told.split("for the ranks that are here: ")[1].split("; else")[0]
    assert shlex.split(command) == ["reshard", "verify", str(node), "--ranks", "2-3"]
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{node}: proven against reshard.json\n2 of 4 rank files, " in done.stdout


@pytest.mark.parametrize("ranks", [[2, 3], [3], [2]])
def test_only_the_chosen_files_are_read_and_counted(ranks: list[int], node: Path) -> None:
    for rank in {2, 3}.difference(ranks):
        flip(rank_file(node, rank), -1)
    told: list[tuple[int, int]] = []
    report = reshard.verify(node, ranks=ranks, progress=lambda done, total: told.append((done, total)))
    assert isinstance(report, Report)
    assert report.is_proven
    size = sum(rank_file(node, rank).stat().st_size for rank in ranks)
    assert (report.files, report.ranks, report.size, report.compared) == (len(ranks), RANKS, size, size)
    assert told[0] == (0, size)
    assert told[-1] == (size, size)


def test_what_is_wrong_with_the_chosen_files_is_named(node: Path) -> None:
    (node / "tokenizer.json").write_text("{}")
    os.truncate(rank_file(node, 2), 1000)
    flip(rank_file(node, 3), -1)
    found = facts(reshard.verify(node, ranks=[2, 3]))
    assert [kind for kind, _ in found] == ["wrong-size", "wrong-checksum", "wrong-checksum"]
    assert found[0][1] == rank_file(node, 2).name
    assert found[1][1].startswith(rank_file(node, 3).name)
    assert found[2][1] == "tokenizer.json"
    assert facts(reshard.verify(node, ranks=[1, 3]))[0] == ("missing-file", rank_file(node, 1).name)


@pytest.mark.parametrize("pair", [(0, 1), (2, 3), (3, 2)])
def test_files_that_changed_places_are_named(pair: tuple[int, int], whole: Path, tmp_path: Path) -> None:
    """One of the two is not chosen: its header is known all the same. Only the first two are of one size."""
    target = shutil.copytree(whole, tmp_path / "target")
    one, other = (rank_file(target, rank) for rank in pair)
    assert (one.stat().st_size == other.stat().st_size) == (pair == (0, 1))
    one.rename(target / "aside")
    other.rename(one)
    (target / "aside").rename(other)
    report = reshard.verify(target, ranks=[pair[0]])
    assert facts(report) == [("swapped-file", one.name)]
    assert report.problems[0].found == f"the header of {other.name}"


def test_a_sample_of_some_ranks(node: Path) -> None:
    report = reshard.verify(node, ranks=[2, 3], sample=Fraction(1, 100))
    assert isinstance(report, Report)
    assert report.verdict == "sampled"
    assert 0 < report.compared < report.size


def test_a_folder_that_was_made_with_some_ranks(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(Job(source, RANKS, ranks=[2, 3]), tmp_path / "part")
    for ranks in (None, [2, 3], [3]):
        report = reshard.verify(tmp_path / "part", ranks=ranks)
        assert isinstance(report, Report)
        assert report.is_proven
    with pytest.raises(Refused, match="of ranks 2-3, which reshard"):
        reshard.verify(tmp_path / "part", ranks=[1])


@pytest.mark.parametrize("ranks", [[2, 3], [3]])
def test_some_ranks_against_the_source(ranks: list[int], node: Path, source: Path) -> None:
    told: list[tuple[int, int]] = []
    report = reshard.verify(node, source, ranks=ranks, progress=lambda done, total: told.append((done, total)))
    assert isinstance(report, Report)
    assert report.is_proven
    assert (report.files, report.ranks) == (len(ranks), RANKS)
    size = sum(rank_file(node, rank).stat().st_size for rank in ranks)
    assert told[-1] == (size, size)
    flip(rank_file(node, 3), -1)
    assert [kind for kind, _ in facts(reshard.verify(node, source, ranks=ranks))] == ["differs"]
    problems = reshard.verify(node, source).problems
    assert {problem.remedy for problem in problems if problem.kind == "missing-file"} == {
        "for the ranks that are here: --ranks 2-3; else copy it there, or reshard repair writes it again"
    }


@pytest.mark.parametrize(
    ("options", "kind"),
    [(["--ranks", "9"], "unknown-rank"), (["--ranks", "2-9"], "unknown-rank"), (["--recipe", "llama"], "wrong-option")],
)
def test_what_cannot_be_asked_is_refused(
    options: list[str], kind: str, node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(node), *options, "--json"]) == 2
    assert [problem["kind"] for problem in json.loads(capsys.readouterr().out)["problems"]] == [kind]


def test_whole_files_have_no_ranks(source: Path, tmp_path: Path) -> None:
    reshard.convert(source, tmp_path / "hf", to="hf")
    for other in (None, source):
        with pytest.raises(Refused, match="leave it out: all files are verified"):
            reshard.verify(tmp_path / "hf", other, ranks=[0])
