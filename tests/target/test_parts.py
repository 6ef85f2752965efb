"""Parts of a target that were made apart, brought into one folder by `cp` and by hand, and joined by `convert`.

The oracle is one run for all ranks: whatever was done to the parts, in the end every file has its SHA-256.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import Job, convert_checkpoint
from torture import contents

import reshard
import reshard.execution.execute
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.execute import Settings
from reshard.formats.target_names import JOURNAL, MANIFEST
from reshard.synthetic import SMALL_V3, write_checkpoint

RANKS = 4
CONFIG = {**SMALL_V3, "num_hidden_layers": 2, "num_nextn_predict_layers": 0, "vocab_size": 512}


class Crash(BaseException):
    """The end of the program, without a word."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "source"
    write_checkpoint(folder, CONFIG, 2)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    convert_checkpoint(Job(source, RANKS), source.with_name("whole"))
    return source.with_name("whole")


@pytest.fixture(scope="module")
def parts(source: Path) -> dict[str, Path]:
    """By the numbers of their ranks: folders that were made by runs with `--ranks`."""
    made = {}
    for text, ranks in (("0-1", [0, 1]), ("2-3", [2, 3]), ("0", [0]), ("1", [1]), ("2", [2])):
        made[text] = source.with_name(f"part-{text}")
        convert_checkpoint(Job(source, RANKS, ranks=ranks), made[text])
    return made


def bring_together(target: Path, *folders: Path) -> Path:
    """Copies the folders over each other, as a person does."""
    target.mkdir(exist_ok=True)
    for folder in folders:
        subprocess.run(["cp", "-r", f"{folder}/.", target], check=True)
    return target


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"model{rank}-mp{RANKS}.safetensors"


def facts(refused: pytest.ExceptionInfo[Refused]) -> list[tuple[str, str]]:
    return [(problem.kind, Path(problem.subject).name) for problem in refused.value.problems]


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Of each rank file: another pair, if it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.safetensors")}


# --- what a run for some ranks leaves ---


def test_a_part_has_its_manifest_under_two_names(parts: dict[str, Path]) -> None:
    assert (parts["2-3"] / "reshard.ranks-2-3.json").read_bytes() == (parts["2-3"] / MANIFEST).read_bytes()
    assert {path.name for path in parts["2-3"].glob("reshard*")} == {MANIFEST, "reshard.ranks-2-3.json"}


def test_a_run_into_a_shared_folder_replaces_the_manifests_of_its_parts(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    found = []
    for ranks in ([0], [2], [1], [3]):
        convert_checkpoint(Job(source, RANKS, ranks=ranks), tmp_path / "target")
        found.append(sorted(path.name for path in (tmp_path / "target").glob("reshard.*")))
    assert found == [
        ["reshard.json", "reshard.ranks-0.json"],
        ["reshard.json", "reshard.ranks-0+2.json"],
        ["reshard.json", "reshard.ranks-0-2.json"],
        ["reshard.json"],
    ]
    assert contents(tmp_path / "target") == contents(whole)


# --- brought together and joined ---


@pytest.mark.parametrize("order", [("0-1", "2-3"), ("2-3", "0-1"), ("2", "0", "1"), ("0-1", "1", "2"), ("2-3",)])
def test_parts_become_the_target_of_one_run(
    order: tuple[str, ...], source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    target = bring_together(tmp_path / "target", *(parts[text] for text in order))
    before = stamps(target)
    result = convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == contents(whole)
    assert {name: stamp for name, stamp in stamps(target).items() if name in before} == before
    assert len(result.plan.files) == RANKS - len(before)
    assert convert_checkpoint(Job(source, RANKS), target).done is None


def test_the_command_says_what_it_joins(
    source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = bring_together(tmp_path / "my target", parts["2-3"], parts["0-1"])
    note = "note: parts that were made apart are joined into reshard.json: ranks 2-3 of reshard.ranks-2-3.json\n"
    before = contents(target)
    assert main(["convert", str(source), str(target), "--mp", "4", "--dry-run"]) == 0
    assert note in capsys.readouterr().out
    assert main(["verify", str(target)]) == 1
    told = capsys.readouterr().out
    assert "found:    names 2 of 4 rank files; reshard.ranks-2-3.json names 2 others\n" in told
    assert f"reshard convert SOURCE '{target}' --mp 4\n" in told
    assert main(["inspect", str(target)]) == 0
    assert "note: the parts are not joined yet: reshard.json names 2 of 4 rank files" in capsys.readouterr().out
    assert main(["verify", str(target), "--source", str(source)]) == 0
    told = capsys.readouterr().out
    assert told.splitlines()[2].startswith("note: the parts are not joined yet: reshard.json names 2 of 4 rank files; ")
    assert told.endswith(f"without --ranks: reshard convert {source} '{target}' --mp 4\n")
    assert contents(target) == before
    assert main(["convert", str(source), str(target), "--mp", "4"]) == 0
    told = capsys.readouterr().out
    assert note in told
    assert "the parts that were made apart are joined; no rank file was written\n" in told
    assert contents(target) == contents(whole)
    assert main(["verify", str(target)]) == 0
    assert main(["inspect", str(target)]) == 0
    assert "not joined" not in capsys.readouterr().out


def test_every_byte_of_parts_that_are_not_joined_is_verified(parts: dict[str, Path], tmp_path: Path) -> None:
    target = bring_together(tmp_path / "target", parts["2-3"], parts["0-1"])
    report = reshard.verify(target)
    assert [problem.kind for problem in report.problems] == ["not-joined"]
    assert report.files == RANKS
    assert reshard.verify(target, ranks=[1, 2]).is_proven
    with rank_file(target, 3).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert [problem.kind for problem in reshard.verify(target).problems] == ["not-joined", "wrong-checksum"]


@pytest.mark.parametrize(
    "rearrange",
    [
        lambda target: (target / "reshard.json").unlink(),
        lambda target: (target / "reshard.ranks-2-3.json").unlink(),  # reshard.json is the same
        lambda target: (target / "reshard.ranks-0-1.json").rename(target / "reshard.ranks-0+1.json"),
    ],
)
def test_the_manifests_may_be_told_apart_otherwise(
    rearrange: Callable[[Path], None], source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    target = bring_together(tmp_path / "target", parts["0-1"], parts["2-3"])
    rearrange(target)
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == contents(whole)


@pytest.mark.parametrize("name", ["reshard.json~", "reshard-node1.json", "reshard.json.bak"])
def test_a_manifest_that_was_renamed_by_hand_vouches_and_stays(
    name: str, source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    target = bring_together(tmp_path / "target", parts["0-1"])
    (target / "reshard.ranks-0-1.json").unlink()
    (target / "reshard.json").rename(target / name)
    bring_together(target, parts["2-3"])
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target).keys() - contents(whole).keys() == {name}
    assert contents(target).items() >= contents(whole).items()


def test_parts_that_are_not_joined_are_read_as_a_source(whole: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    target = bring_together(tmp_path / "target", parts["0-1"], parts["2-3"])
    reshard.convert(whole, tmp_path / "wanted", to="hf")
    reshard.convert(target, tmp_path / "found", to="hf")
    assert contents(tmp_path / "found") == contents(tmp_path / "wanted")


def test_manifests_of_parts_do_not_go_along_from_a_source(parts: dict[str, Path], tmp_path: Path) -> None:
    target = bring_together(tmp_path / "target", parts["0-1"], parts["2-3"])
    reshard.convert(target, tmp_path / "whole", to="hf")
    assert [path.name for path in (tmp_path / "whole").glob("reshard*")] == [MANIFEST]


# --- what nothing vouches for ---


def test_rank_files_without_a_manifest_are_refused_and_both_hints_work(
    source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    target = bring_together(tmp_path / "target", parts["0-1"], parts["2-3"])
    (target / "reshard.ranks-0-1.json").unlink()
    before = contents(target)
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(source, RANKS), target)
    assert facts(refused) == [("no-manifest", "target")]
    (problem,) = refused.value.problems
    assert f"2 files that no manifest here names: {rank_file(target, 0).name}, {rank_file(target, 1).name}" in (
        problem.found
    )
    assert "here as reshard.ranks-0-1.json; or move them out" in problem.remedy
    assert contents(target) == before
    report = reshard.verify(target)
    assert {problem.kind for problem in report.problems} == {"extra-file"}
    assert all("here as reshard.ranks-0-1.json" in problem.remedy for problem in report.problems)
    with pytest.raises(Refused, match="does not name"):
        reshard.convert(target, tmp_path / "hf", to="hf")

    other = shutil.copytree(target, tmp_path / "other")
    shutil.copy(parts["0-1"] / MANIFEST, target / "reshard.ranks-0-1.json")
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == contents(whole)
    for rank in (0, 1):
        rank_file(other, rank).rename(tmp_path / f"aside-{rank}")
    convert_checkpoint(Job(source, RANKS), other)
    assert contents(other) == contents(whole)


@pytest.mark.parametrize("ranks", [None, [0], [3]])
def test_rank_files_without_any_manifest_are_refused(
    ranks: list[int] | None, source: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    target = bring_together(tmp_path / "target", parts["0-1"])
    for path in target.glob("reshard.*"):
        path.unlink()
    before = contents(target)
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(source, RANKS, ranks=ranks), target)
    assert facts(refused) == [("no-manifest", "target")]
    assert contents(target) == before


def test_a_part_of_another_conversion_is_not_joined(source: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "twin", CONFIG, 2, seed=1)
    convert_checkpoint(Job(tmp_path / "twin", RANKS, ranks=[2, 3]), tmp_path / "part")
    for order in ((tmp_path / "part", parts["0-1"]), (parts["0-1"], tmp_path / "part")):
        target = bring_together(tmp_path / f"target-{order[0].name}", *order)
        before = contents(target)
        with pytest.raises(Refused) as refused:
            convert_checkpoint(Job(source, RANKS), target)
        assert "of another conversion: of another source, or of other bytes" in str(refused.value)
        assert {kind for kind, _ in facts(refused)} <= {"no-manifest", "another-job"}
        assert {problem.kind for problem in reshard.verify(target).problems} == {"extra-file"}
        with pytest.raises(Refused, match="does not name"):
            reshard.convert(target, tmp_path / "hf", to="hf")
        assert contents(target) == before


def test_another_layout_is_said_by_its_options(source: Path, whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(Refused, match="a finished conversion: 4 ranks") as refused:
        convert_checkpoint(Job(source, 2), whole)
    assert facts(refused) == [("target-not-empty", whole.name)]
    assert contents(whole) == before


def test_what_has_changed_in_a_part_is_not_adopted(
    source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    target = bring_together(tmp_path / "target", parts["0-1"], parts["2-3"])
    os.truncate(rank_file(target, 0), 1000)
    shutil.copy(rank_file(whole, 0), rank_file(target, 1))
    (target / "reshard.ranks-2-3.json").write_text("{}")
    before = contents(target)
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(source, RANKS), target)
    assert [kind for kind, _ in facts(refused)] == ["wrong-size", "wrong-checksum", "wrong-manifest"]
    assert contents(target) == before
    for path in (rank_file(target, 0), rank_file(target, 1), target / "reshard.ranks-2-3.json"):
        path.rename(tmp_path / path.name)  # as the hints say
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == contents(whole)


def test_side_files_that_differ_are_seen(source: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "source")
    (other / "tokenizer.json").write_text("{}")
    convert_checkpoint(Job(other, RANKS, ranks=[2, 3]), tmp_path / "part")
    target = bring_together(tmp_path / "target", parts["0-1"], tmp_path / "part")
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(source, RANKS), target)
    assert ("source-changed", "tokenizer.json") in facts(refused)


# --- killed ---


def crashes(run: Callable[[], object]) -> Iterator[int]:
    """Runs again and again, and ends the program behind its first step, its second, and so on, until a run gets
    through: files are made durable, renamed and removed.
    """
    steps = ("write_durable", "write_side_files", "remove_files", "sync_folder")
    for last in range(100):
        left = last

        def crash_behind(function: Callable[..., object]) -> Callable[..., object]:
            def step(*arguments: object, **options: object) -> object:
                nonlocal left
                result = function(*arguments, **options)
                if left == 0:
                    raise Crash
                left -= 1
                return result

            return step

        with pytest.MonkeyPatch.context() as patch:
            for name in steps:
                patch.setattr(reshard.execution.execute, name, crash_behind(getattr(reshard.execution.execute, name)))
            patch.setattr(Path, "rename", crash_behind(Path.rename))
            patch.setattr(Path, "unlink", crash_behind(Path.unlink))
            try:
                run()
            except Crash:
                pass
            else:
                return
        yield last
    raise AssertionError("no run gets through")


@pytest.mark.parametrize("last", ["2-3", "2"])
def test_a_crash_while_joining_leaves_what_the_same_command_finishes(
    last: str, source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    made = bring_together(tmp_path / "made", parts["0-1"], parts[last])
    wanted, target, moments = contents(whole), tmp_path / "target", 0

    def run() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(made, target)
        convert_checkpoint(Job(source, RANKS), target)

    for _ in crashes(run):
        moments += 1
        assert all(contents(target).get(name) in (None, wanted[name]) for name in wanted if name != MANIFEST)
        convert_checkpoint(Job(source, RANKS), target)
        assert contents(target) == wanted
    assert moments > 8, "every step was a moment"
    assert contents(target) == wanted


def test_a_crash_of_a_run_for_some_ranks_leaves_what_the_same_command_finishes(
    source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    wanted, target = contents(parts["2-3"]), tmp_path / "target"

    def run() -> None:
        shutil.rmtree(target, ignore_errors=True)
        convert_checkpoint(Job(source, RANKS, ranks=[2, 3]), target)

    for last in crashes(run):
        left = shutil.copytree(target, tmp_path / f"left-{last}")
        convert_checkpoint(Job(source, RANKS, ranks=[2, 3]), target)
        assert contents(target) == wanted
        # The other part is brought here before it goes on; nothing is lost by that.
        bring_together(left, parts["0-1"])
        convert_checkpoint(Job(source, RANKS, ranks=[2, 3]), left)
        convert_checkpoint(Job(source, RANKS), left)
        assert contents(left) == contents(whole)
    assert contents(target) == wanted


def test_an_interrupted_part_goes_on_in_the_folder_of_all(
    source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    def crash(*_: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshard.execution.execute, "rename_to_final", crash)
        with pytest.raises(Crash):
            convert_checkpoint(Job(source, RANKS, ranks=[2, 3]), tmp_path / "part")
    assert (tmp_path / "part" / JOURNAL).exists()
    target = bring_together(tmp_path / "target", parts["0-1"], tmp_path / "part")
    result = convert_checkpoint(Job(source, RANKS), target)
    assert result.done is not None
    assert result.done.resumed > 0
    assert contents(target) == contents(whole)


def test_a_restart_keeps_what_was_brought_here_finished(
    source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    """An unfinished part lies here, and the same part from elsewhere, finished."""

    def crash(*_: object) -> None:
        raise Crash

    target = tmp_path / "target"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshard.execution.execute, "rename_to_final", crash)
        with pytest.raises(Crash):
            convert_checkpoint(Job(source, RANKS, ranks=[2, 3]), target)
    (target / "model2-mp4.safetensors.partial").unlink()
    bring_together(target, parts["0-1"], parts["2-3"])
    before = stamps(target)
    with pytest.raises(Refused, match="an unfinished conversion"):
        convert_checkpoint(Job(source, RANKS), target)
    assert stamps(target) == before
    convert_checkpoint(Job(source, RANKS), target, Settings(restart=True))
    assert stamps(target) == before
    assert contents(target) == contents(whole)
