"""Parts of a target that were made apart, brought into one folder by `cp` and by hand, and joined by `convert`.

The oracle is one run for all ranks: whatever was done to the parts, in the end every file has its SHA-256.
"""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from downloads import flip
from jobs import Job, convert_checkpoint
from targets import CONFIG, RANKS, crashes, leave_unfinished, make_source_and_target, rank_file, stamps
from torture import contents

import reshard
import reshard.execution.execute
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.execute import Settings
from reshard.formats.manifest import compute_manifest_checksum
from reshard.formats.part_manifests import Manifests, read_manifests_with_shares
from reshard.formats.target_names import JOURNAL, MANIFEST
from reshard.synthetic import write_checkpoint
from reshard.target import other_files, preflight
from reshard.target.left_files import list_own_names
from reshard.types import Subset


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source_and_target(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
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


def stamp_ranks(folder: Path) -> dict[str, tuple[int, int]]:
    """Of each rank file: another pair, if it is written again."""
    return {name: stamp for name, stamp in stamps(folder).items() if name.endswith(".safetensors")}


def facts(refused: pytest.ExceptionInfo[Refused]) -> list[tuple[str, str]]:
    return [(problem.kind, Path(problem.subject).name) for problem in refused.value.problems]


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
    before = stamp_ranks(target)
    result = convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == contents(whole)
    assert {name: stamp for name, stamp in stamp_ranks(target).items() if name in before} == before
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
    flip(rank_file(target, 3), -1)
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


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (Job(Path(), RANKS, cast="bf16", pad=True), "--mp 4 --cast bf16 --pad"),
        (
            Job(Path(), RANKS, subset=Subset(layers=(1,), renumber=True)),
            "--mp 4 --layers 1 --renumber",
        ),
        (
            Job(Path(), RANKS, subset=Subset(only=("*.self_attn.*", "model.norm.weight"))),
            "--mp 4 --only '*.self_attn.*' --only model.norm.weight",
        ),
    ],
)
def test_the_command_that_joins_works(
    chosen: Job, words: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, ranks in (("low", [0, 1]), ("high", [2, 3])):
        convert_checkpoint(replace(chosen, source=source, ranks=ranks), tmp_path / name)
    target = bring_together(tmp_path / "target", tmp_path / "low", tmp_path / "high")
    assert main(["verify", str(target)]) == 1
    command = capsys.readouterr().out.split("without --ranks: ")[1].splitlines()[0]
    assert command == f"reshard convert SOURCE {target} {words}"
    assert main([str(source) if word == "SOURCE" else word for word in shlex.split(command)][1:]) == 0
    assert reshard.verify(target).is_proven


def test_no_word_of_a_manifest_is_run_by_the_command(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = bring_together(tmp_path / "target", parts["0-1"], parts["2-3"])
    for path in target.glob("reshard*.json"):
        rewrite_manifest(path, lambda text: text.replace('"layout": {', '"layout": {"cast": "bf16; rm -r $HOME",'))
    assert main(["verify", str(target)]) == 1
    assert "--cast 'bf16; rm -r $HOME'\n" in capsys.readouterr().out


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


@pytest.mark.parametrize("ranks", [None, [0]])
def test_a_changed_file_is_seen_whichever_manifest_names_it(
    ranks: list[int] | None, source: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    """`reshard.json` is that of the part which was copied last: its files were copied as well."""
    target = bring_together(tmp_path / "target", parts["0-1"], parts["2-3"])
    for rank in (1, 3):
        flip(rank_file(target, rank), -1)
    before = contents(target)
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(source, RANKS, ranks=ranks), target)
    named = [(problem.kind, problem.subject.split(":")[0]) for problem in refused.value.problems]
    assert sorted(named) == [("wrong-checksum", str(rank_file(target, rank))) for rank in (1, 3)]
    assert contents(target) == before


@pytest.mark.parametrize(("others", "ranks"), [(["2-3"], None), ([], None), ([], [2])])
def test_a_side_file_that_someone_has_changed_is_not_replaced(
    others: list[str], ranks: list[int] | None, source: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    target = bring_together(tmp_path / "target", parts["0-1"], *(parts[text] for text in others))
    mine = target / "tokenizer_config.json"
    mine.write_text('{"chat_template": "mine"}')
    before = contents(target)
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(source, RANKS, ranks=ranks), target)
    assert facts(refused) == [("wrong-checksum", mine.name)]
    assert contents(target) == before
    mine.rename(tmp_path / "mine")  # as the hint says
    convert_checkpoint(Job(source, RANKS, ranks=ranks), target)
    assert mine.read_bytes() == (source / mine.name).read_bytes()


def test_files_of_others_are_not_replaced_by_joining(
    source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    target = bring_together(tmp_path / "target", parts["0-1"], parts["2-3"])
    theirs = [target / name for name in ("tokenizer.json.partial", "reshard.json.partial", "model0-mp2.safetensors")]
    for path in theirs:
        path.write_text("theirs")
    before = contents(target)
    with pytest.raises(Refused, match="move them out of the folder, or another target") as refused:
        convert_checkpoint(Job(source, RANKS), target)
    assert facts(refused) == [("target-not-empty", "target")]
    assert contents(target) == before
    for path in theirs:
        path.rename(tmp_path / path.name)
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == contents(whole)


@pytest.mark.parametrize("others", [["2-3"], []])
def test_a_tokenizer_of_before_is_asked_for_again(others: list[str], source: Path, tmp_path: Path) -> None:
    """Else `reshard.json` would no more name the tokenizer that lies there, and nobody would verify it."""
    bare, tokenizer = shutil.copytree(source, tmp_path / "source"), tmp_path / "tokenizer"
    tokenizer.mkdir()
    for path in bare.glob("tokenizer*"):
        path.rename(tokenizer / path.name)
    for text in ("0-1", *others):
        ranks = [int(word) for word in text.split("-")]
        reshard.convert(bare, tmp_path / text, RANKS, ranks=ranks, tokenizer_path=tokenizer)
    target = bring_together(tmp_path / "target", tmp_path / "0-1", *(tmp_path / text for text in others))
    before = contents(target)
    with pytest.raises(Refused, match="tokenizer_path as they were") as refused:
        reshard.convert(bare, target, RANKS)
    assert facts(refused)[0] == ("source-changed", "tokenizer.json")
    assert contents(target) == before
    reshard.convert(bare, target, RANKS, tokenizer_path=tokenizer)
    assert reshard.verify(target).is_proven


def test_manifests_that_contradict_each_other_prove_nothing(
    source: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    """The same rank with other bytes: the source had changed in between, where no sample is taken."""
    target = bring_together(tmp_path / "target", parts["0-1"], parts["1"])
    assert [problem.kind for problem in reshard.verify(target).problems] == ["not-joined"]
    rewrite_manifest(target / "reshard.ranks-0-1.json", lambda text: text.replace(last_checksum(text), "0" * 32))
    before = contents(target)
    for ranks, kinds in ((None, ["contradiction", "not-joined"]), ([1], ["contradiction"]), ([0], [])):
        assert [problem.kind for problem in reshard.verify(target, ranks=ranks).problems] == kinds
    with pytest.raises(Refused, match=r"other bytes by reshard.ranks-0-1.json than by reshard.json") as refused:
        convert_checkpoint(Job(source, RANKS), target)
    assert facts(refused) == [("contradiction", rank_file(target, 1).name)]
    assert contents(target) == before


def last_checksum(manifest: str) -> str:
    """Of the last range of the last rank file."""
    last: str = json.loads(manifest)["files"][-1]["ranges"].split(" ")[-1]
    return last


def rewrite_manifest(path: Path, change: Callable[[str], str]) -> None:
    """Changes the text of a manifest and gives it the checksum that is right then, as anyone can."""
    manifest = json.loads(change(path.read_text()))
    del manifest["xxh3_128"]
    path.write_text(json.dumps({**manifest, "xxh3_128": compute_manifest_checksum(manifest)}))


def test_a_link_to_nothing_is_no_manifest(parts: dict[str, Path], tmp_path: Path) -> None:
    target = bring_together(tmp_path / "target", parts["0-1"])
    (target / "reshard.a.json").symlink_to("nowhere")
    assert reshard.verify(target).is_proven
    (target / MANIFEST).unlink()
    assert [problem.kind for problem in reshard.verify(target).problems] == ["not-joined"]


# --- while another run writes here ---


def test_a_run_that_begins_while_we_look_is_no_stranger(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is met by its lock. This one has ended at once."""
    target, look = tmp_path / "target", list_own_names

    def look_and_begin(folder: Path) -> set[str]:
        found = look(folder)
        folder.mkdir()
        (folder / JOURNAL).touch()
        return found

    monkeypatch.setattr(other_files, "list_own_names", look_and_begin)
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == contents(whole)


def test_a_run_that_ends_while_we_look_has_left_nothing_unknown(
    source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    target, read = bring_together(tmp_path / "target", parts["0-1"]), read_manifests_with_shares

    def read_and_end(folder: Path) -> Manifests:
        found = read(folder)
        bring_together(folder, parts["2-3"])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "read_manifests_with_shares", read_and_end)
        with pytest.raises(Refused, match="run it again") as refused:
            convert_checkpoint(Job(source, RANKS), target)
    assert facts(refused) == [("target-changed", "target")]
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == contents(whole)


# --- killed ---


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
    leave_unfinished(Job(source, RANKS, ranks=[2, 3]), tmp_path / "part")
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
    target = tmp_path / "target"
    leave_unfinished(Job(source, RANKS, ranks=[2, 3]), target)
    (target / "model2-mp4.safetensors.partial").unlink()
    bring_together(target, parts["0-1"], parts["2-3"])
    before = stamp_ranks(target)
    keeps = "begins again, and keeps model2-mp4.safetensors, model3-mp4.safetensors, which came here finished"
    with pytest.raises(Refused, match=f"--restart throws the partial files away and {keeps}"):
        convert_checkpoint(Job(source, RANKS), target)
    assert stamp_ranks(target) == before
    convert_checkpoint(Job(source, RANKS), target, Settings(restart=True))
    assert stamp_ranks(target) == before
    assert contents(target) == contents(whole)


def test_a_finished_part_that_is_copied_over_an_unfinished_run_has_a_way_on(
    source: Path, whole: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    """The command that began the run would now write other files: it does not go on from there."""
    target = tmp_path / "target"
    leave_unfinished(Job(source, RANKS), target)
    bring_together(target, parts["2-3"])
    before = stamp_ranks(target)
    with pytest.raises(Refused, match="--restart throws the partial files away and begins again, and keeps model2"):
        convert_checkpoint(Job(source, RANKS), target)
    assert stamp_ranks(target) == before
    convert_checkpoint(Job(source, RANKS), target, Settings(restart=True))
    assert stamp_ranks(target).items() >= before.items()
    assert contents(target) == contents(whole)
