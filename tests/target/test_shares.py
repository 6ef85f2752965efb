"""Shares of a conversion, made one by one and joined. The oracle is one run for everything: whatever was done to the
shares, in the end every file of the target has its SHA-256, the manifest too.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from downloads import flip
from small_models import write_model
from targets import CONFIG, RANKS, Crash, crashes, make_source_and_target, rank_file, stamps
from torture import contents

import reshard
import reshard.execution.execute
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.finished_files import rename_to_final
from reshard.execution.journal import lock_journal
from reshard.execution.staging import STAGING
from reshard.formats.manifest import compute_manifest_checksum
from reshard.formats.share_assignment import assign_to_shares
from reshard.formats.target_names import JOURNAL, MANIFEST, PARTIAL
from reshard.synthetic import write_checkpoint
from reshard.types import Share


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source_and_target(tmp_path_factory.mktemp("shares"))


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    return source.with_name("whole")


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    """A target with three finished shares, the second of two ranks."""
    return make_shares(source, source.with_name("made"), 3)


def make_shares(source: Path, target: Path, count: int, *, lacking: int | None = None) -> Path:
    for number in range(count):
        if number != lacking:
            reshard.convert(source, target, RANKS, share=f"{number}/{count}")
    return target


def copy(made: Path, target: Path) -> Path:
    return Path(shutil.copytree(made, target))


def share_folder(target: Path, number: int, count: int = 3) -> Path:
    return target / f".share-{number}-of-{count}"


def facts(refused: pytest.ExceptionInfo[Refused]) -> list[tuple[str, str]]:
    """The kind of each problem, and the last part of the thing at fault."""
    return [(problem.kind, problem.subject.rpartition("/")[2]) for problem in refused.value.problems]


def texts(refused: pytest.ExceptionInfo[Refused]) -> str:
    return str(refused.value)


def leave_share_unfinished(source: Path, target: Path, share: str) -> None:
    def crash(*_: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshard.execution.execute, "rename_to_final", crash)
        with pytest.raises(Crash):
            reshard.convert(source, target, RANKS, share=share)


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    del manifest["xxh3_128"]
    path.write_text(json.dumps({**manifest, "xxh3_128": compute_manifest_checksum(manifest)}), encoding="utf-8")


# --- which files a share has ---


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([1, 1, 1, 1], 2, [[0, 1], [2, 3]]),
        ([1] * 16, 3, [[*range(5)], [*range(5, 11)], [*range(11, 16)]]),
        ([9, 1, 1, 1], 2, [[0], [1, 2, 3]]),
        ([1, 1, 1, 9], 2, [[0, 1, 2], [3]]),
        ([5, 5, 1], 2, [[0], [1, 2]]),
        ([9, 1, 1], 3, [[0], [1], [2]]),
        ([1, 9, 1], 3, [[0], [1], [2]]),
        ([1, 1, 9], 3, [[0], [1], [2]]),
        ([3, 3], 4, [[0], [1], [], []]),
        ([7], 1, [[0]]),
    ],
)
def test_neighbours_go_together_and_the_bytes_are_even(sizes: list[int], count: int, expected: list[list[int]]) -> None:
    assert assign_to_shares(sizes, count) == expected


def test_every_file_is_in_one_share_and_none_has_a_file_too_much() -> None:
    for count in range(1, 12):
        for length in range(1, 14):
            sizes = [1000 + 37 * (place * place % 11) for place in range(length)]
            shares = assign_to_shares(sizes, count)
            assert [place for share in shares for place in share] == [*range(length)]
            assert len(shares) == count
            totals = [sum(sizes[place] for place in share) for share in shares if share]
            assert len(totals) == min(count, length)
            assert max(totals) <= sum(sizes) / count + max(sizes)


# --- joined ---


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_the_joined_target_is_that_of_one_run(count: int, source: Path, whole: Path, tmp_path: Path) -> None:
    target = make_shares(source, tmp_path / "target", count)
    assert all(name.startswith(".share-") for name in contents_beside(target))
    inodes = {path.stat().st_ino for path in target.rglob("*.safetensors")}
    conversion = reshard.convert(source, target, RANKS)
    assert contents(target) == contents(whole)
    assert {path.stat().st_ino for path in target.glob("*.safetensors")} == inodes, "moved, not copied"
    assert not conversion.plan.files
    assert reshard.convert(source, target, RANKS).done is None
    assert reshard.convert(source, target, RANKS, share="0/2").done is None
    assert contents(target) == contents(whole)


def contents_beside(target: Path) -> list[str]:
    return [path.name for path in target.iterdir()]


LAYOUTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "whole files": ("v3", {"to": "hf", "max_file_size": 3_000_000}),
    "one whole file": ("v3", {"to": "hf", "max_file_size": 1 << 40}),
    "whole files in BF16": ("v3", {"to": "hf", "cast": "bf16", "max_file_size": 9_000_000}),
    "ranks in BF16": ("v3", {"mp": 4, "cast": "bf16"}),
    "some layers": ("v3", {"mp": 2, "layers": [0], "experts": range(16), "renumber": True}),
    "some ranks": ("v3", {"mp": 4, "ranks": [1, 2, 3]}),
    "slices": ("qwen3-moe", {"mp": 4, "to": "dcp"}),
    "fused for vLLM": ("qwen3-moe", {"mp": 2, "for_engine": "vllm"}),
    "odd parts": ("llama-tied", {"mp": 4}),
    "stacked experts": ("qwen3-moe", {"for_engine": "transformers"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_joined_target_is_that_of_one_run_in_every_layout(name: str, source: Path, tmp_path: Path) -> None:
    model, options = LAYOUTS[name]
    if model != "v3":
        source = tmp_path / "source"
        write_model(source, model, dtype="bfloat16")
    reshard.convert(source, tmp_path / "whole", **options)
    for number in (2, 0, 1):
        reshard.convert(source, tmp_path / "target", **options, share=f"{number}/3")
    reshard.convert(source, tmp_path / "target", **options)
    assert contents(tmp_path / "target") == contents(tmp_path / "whole")


def test_rank_files_are_a_source_too(whole: Path, tmp_path: Path) -> None:
    for options in ({"mp": 2}, {"to": "hf", "max_file_size": 3_000_000}):
        name = str(options.get("to", "ranks"))
        reshard.convert(whole, tmp_path / name / "whole", **options)
        for number in range(2):
            reshard.convert(whole, tmp_path / name / "target", **options, share=f"{number}/2")
        reshard.convert(whole, tmp_path / name / "target", **options)
        assert contents(tmp_path / name / "target") == contents(tmp_path / name / "whole")


def test_shares_that_were_copied_together_are_joined(source: Path, whole: Path, tmp_path: Path) -> None:
    for number in range(2):
        node = tmp_path / f"node{number}"
        reshard.convert(source, node, RANKS, share=f"{number}/2")
        shutil.copytree(node, tmp_path / "target", dirs_exist_ok=True)
    reshard.convert(source, tmp_path / "target", RANKS)
    assert contents(tmp_path / "target") == contents(whole)


def test_what_the_target_has_already_no_share_makes_again(source: Path, whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    reshard.convert(source, target, RANKS, ranks=[0, 3])
    before = stamps(target)
    for number in range(4):
        made = reshard.convert(source, target, RANKS, share=f"{number}/4").plan.files
        assert [file.rank for file in made] == ([number] if number in (1, 2) else [])
    assert not share_folder(target, 0, 4).exists()
    assert stamps(target).items() >= {name: one for name, one in before.items() if "model" in name}.items()
    reshard.convert(source, target, RANKS)
    assert contents(target) == contents(whole)


def test_a_share_without_a_file_is_finished(source: Path, tmp_path: Path) -> None:
    conversion = reshard.convert(source, tmp_path / "target", RANKS, share="5/6")
    assert conversion.done is None
    assert "share 5/6 has 0 of 4 files" in str(conversion)
    assert not (tmp_path / "target").exists()


def test_a_finished_share_says_so(source: Path, made: Path, tmp_path: Path) -> None:
    target = copy(made, tmp_path / "target")
    before = stamps(share_folder(target, 1))
    assert reshard.convert(source, target, RANKS, share="1/3").done is None
    assert stamps(share_folder(target, 1)) == before


def test_the_plan_of_a_share(source: Path, made: Path, tmp_path: Path) -> None:
    assert [file.rank for file in reshard.plan(source, RANKS, share="1/3").files] == [1, 2]
    assert [file.rank for file in reshard.plan(source, RANKS, share="1/3", target=tmp_path / "none").files] == [1, 2]
    assert not reshard.plan(source, RANKS, share="1/3", target=made).files


# --- killed ---


def test_a_share_goes_on_where_it_was(source: Path, whole: Path, tmp_path: Path) -> None:
    target = make_shares(source, tmp_path / "target", 2, lacking=1)
    leave_share_unfinished(source, target, "1/2")
    assert (share_folder(target, 1, 2) / JOURNAL).exists()
    shutil.copytree(target, tmp_path / "moved")  # as another machine finds it
    done = reshard.convert(source, tmp_path / "moved", RANKS, share="1/2").done
    assert done
    assert done.resumed > 0
    reshard.convert(source, tmp_path / "moved", RANKS)
    assert contents(tmp_path / "moved") == contents(whole)


def test_a_crash_while_joining_leaves_what_the_same_command_finishes(
    source: Path, whole: Path, made: Path, tmp_path: Path
) -> None:
    wanted, target, moments = contents(whole), tmp_path / "target", 0

    def run() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(made, target)
        reshard.convert(source, target, RANKS)

    for _ in crashes(run):
        moments += 1
        found = {path.name: path for path in target.rglob("*.safetensors")}
        assert found.keys() == {rank_file(target, rank).name for rank in range(RANKS)}
        # Whatever is done next: a share that runs again, and the join.
        if moments % 2:
            assert reshard.convert(source, target, RANKS, share="1/3").done is None
        reshard.convert(source, target, RANKS)
        assert contents(target) == wanted
    assert moments > 20


def test_a_restart_throws_one_share_away(source: Path, whole: Path, tmp_path: Path) -> None:
    target = make_shares(source, tmp_path / "target", 2, lacking=1)
    leave_share_unfinished(source, target, "1/2")
    before = stamps(share_folder(target, 0, 2))
    done = reshard.convert(source, target, RANKS, share="1/2", restart=True).done
    assert done
    assert not done.resumed
    with pytest.raises(Refused, match="yes=True") as refused:
        reshard.convert(source, target, RANKS, share="1/2", restart=True)
    assert facts(refused) == [("finished-target", ".share-1-of-2")]
    assert reshard.convert(source, target, RANKS, share="1/2", restart=True, yes=True).done
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS, restart=True, yes=True)
    assert facts(refused) == [("unfinished-target", "target")]
    assert stamps(share_folder(target, 0, 2)) == before
    reshard.convert(source, target, RANKS)
    assert contents(target) == contents(whole)


def test_a_share_that_nobody_needs_is_told(source: Path, whole: Path, tmp_path: Path) -> None:
    leave_share_unfinished(source, tmp_path / "target", "1/2")
    for path in whole.iterdir():
        shutil.copy(path, tmp_path / "target")
    conversion = reshard.convert(source, tmp_path / "target", RANKS)
    assert conversion.done is None
    assert "of no use to the finished target: .share-1-of-2" in str(conversion)


# --- refused ---


def test_what_lacks_is_named_and_nothing_is_moved(source: Path, tmp_path: Path) -> None:
    target = make_shares(source, tmp_path / "target", 4, lacking=2)
    leave_share_unfinished(source, target, "2/4")
    shutil.rmtree(share_folder(target, 0, 4))
    before = [stamps(folder) for folder in sorted(target.iterdir())]
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS)
    assert [(problem.kind, problem.subject) for problem in refused.value.problems] == [
        ("unfinished-share", "share 0/4"),
        ("unfinished-share", "share 2/4"),
    ]
    assert "not begun; it makes model0-mp4" in texts(refused)
    assert "not finished; it makes model2-mp4" in texts(refused)
    assert [stamps(folder) for folder in sorted(target.iterdir())] == before


@pytest.mark.parametrize("state", ["finished", "begun"])
def test_a_share_of_another_conversion_is_refused(state: str, source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_checkpoint(other, CONFIG, 2, seed=1)  # fine-tuned: the same headers
    target = tmp_path / "target"
    if state == "finished":
        reshard.convert(other, target, RANKS, share="0/2")
    else:
        leave_share_unfinished(other, target, "0/2")
    for options in ({"mp": RANKS, "cast": "bf16"}, {"mp": 2}, {"to": "hf", "max_file_size": 3_000_000}):
        with pytest.raises(Refused) as refused:
            reshard.convert(source, target, share="1/2", **options)
        assert ("another-job", ".share-0-of-2") in facts(refused)
        with pytest.raises(Refused) as refused:
            reshard.convert(source, target, **options)
        assert ("another-job", ".share-0-of-2") in facts(refused)
    if state == "finished":
        for share in ("1/2", None):
            with pytest.raises(Refused) as refused:
                reshard.convert(source, target, RANKS, share=share)
            assert ("another-job", ".share-0-of-2") in facts(refused)
    assert contents_beside(target) == [".share-0-of-2"]


def test_a_share_of_another_version_is_refused(source: Path, made: Path, tmp_path: Path) -> None:
    target = copy(made, tmp_path / "target")
    edit_manifest(share_folder(target, 1) / MANIFEST, reshard="0.1.0")
    for share in ("0/3", None):
        with pytest.raises(Refused, match=r"0\.1\.0") as refused:
            reshard.convert(source, target, RANKS, share=share)
        assert ("another-job", ".share-1-of-3") in facts(refused)


def test_a_source_that_changed_between_two_shares_is_refused(source: Path, tmp_path: Path) -> None:
    other, target = copy(source, tmp_path / "other"), tmp_path / "target"
    reshard.convert(other, target, RANKS, share="0/2")
    file = next(iter(other.glob("*.safetensors")))
    flip(file, file.stat().st_size - 5)
    for share in ("1/2", None):
        with pytest.raises(Refused) as refused:
            reshard.convert(other, target, RANKS, share=share)
        assert ("another-job", ".share-0-of-2") in facts(refused)


def test_shares_of_another_number_are_refused(source: Path, made: Path, tmp_path: Path) -> None:
    target = copy(made, tmp_path / "target")
    shutil.rmtree(share_folder(target, 0))
    with pytest.raises(Refused, match=r"2 shares of 3") as refused:
        reshard.convert(source, target, RANKS, share="0/4")
    assert facts(refused) == [("another-job", "target")]


def test_a_run_without_shares_comes_first(source: Path, whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"

    def crash(*_: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshard.execution.execute, "rename_to_final", crash)
        with pytest.raises(Crash):
            reshard.convert(source, target, RANKS)
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS, share="0/2")
    assert facts(refused) == [("unfinished-target", "target")]
    reshard.convert(source, target, RANKS)
    assert contents(target) == contents(whole)


def test_files_of_strangers_are_refused_before_a_share_begins(source: Path, whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS, share="0/2")
    assert facts(refused) == [("target-not-empty", "target")]
    shutil.copy(rank_file(whole, 1), target)
    (target / "notes.txt").unlink()
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS, share="0/2")
    assert facts(refused) == [("no-manifest", "target")]
    (share_folder(target, 0, 2)).mkdir()
    (share_folder(target, 0, 2) / "notes.txt").write_text("mine", encoding="utf-8")
    rank_file(target, 1).unlink()
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS, share="0/2")
    assert facts(refused) == [("target-not-empty", ".share-0-of-2")]


def test_a_file_that_was_damaged_in_its_share_is_refused(source: Path, made: Path, tmp_path: Path) -> None:
    target = copy(made, tmp_path / "target")
    flip(rank_file(share_folder(target, 1), 2), 12)
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS)
    assert [problem.kind for problem in refused.value.problems] == ["wrong-checksum"]
    assert ".share-1-of-3/model2-mp4" in texts(refused)
    rank_file(share_folder(target, 1), 2).unlink()
    with pytest.raises(Refused, match="damaged; it makes model2-mp4") as refused:
        reshard.convert(source, target, RANKS)
    assert reshard.convert(source, target, RANKS, share="1/3").done
    reshard.convert(source, target, RANKS)


def test_a_side_file_that_somebody_has_changed_in_a_share_is_kept(source: Path, made: Path, tmp_path: Path) -> None:
    target = copy(made, tmp_path / "target")
    mine = share_folder(target, 2) / "tokenizer.json"
    mine.write_text("mine", encoding="utf-8")
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS)
    assert facts(refused) == [("wrong-checksum", "tokenizer.json")]
    assert mine.read_text(encoding="utf-8") == "mine"


def test_a_file_of_somebody_in_a_share_stays(source: Path, whole: Path, made: Path, tmp_path: Path) -> None:
    target = copy(made, tmp_path / "target")
    mine = share_folder(target, 2) / "notes.txt"
    mine.write_text("mine", encoding="utf-8")
    reshard.convert(source, target, RANKS)
    assert mine.read_text(encoding="utf-8") == "mine"
    assert [path.name for path in target.iterdir() if path.is_dir()] == [".share-2-of-3"]
    shutil.rmtree(share_folder(target, 2))
    assert contents(target) == contents(whole)


def test_a_file_that_is_there_twice_is_refused(source: Path, whole: Path, made: Path, tmp_path: Path) -> None:
    target = copy(made, tmp_path / "target")
    shutil.copy(rank_file(whole, 1), target)
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS)
    assert facts(refused) == [("contradiction", "model1-mp4.safetensors")]


def test_a_part_of_another_conversion_is_no_share(source: Path) -> None:
    right = reshard.convert(source, source.with_name("right"), RANKS, share=Share(0, 2)).plan
    assert right.files
    with pytest.raises(Refused, match="the same files, options and version") as refused:
        reshard.convert(source, source.with_name("wrong"), RANKS, share=Share(0, 2, "0123456789"))
    assert facts(refused) == [("another-job", "2")]
    assert not source.with_name("wrong").exists()


@pytest.mark.parametrize("text", ["4/4", "0/0", "1", "a/b", "-1/4", "1/4/4", "0/9999999", "٣/4"])
def test_values_that_are_no_share_are_refused(
    text: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(tmp_path / "target"), "--mp", "4", f"--share={text}"]) == 2
    assert "--share" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_an_unfinished_share_leaves_partial_files_in_its_folder_only(source: Path, tmp_path: Path) -> None:
    leave_share_unfinished(source, tmp_path / "target", "1/2")
    assert contents_beside(tmp_path / "target") == [".share-1-of-2"]
    names = contents_beside(share_folder(tmp_path / "target", 1, 2))
    assert {name for name in names if name.endswith(PARTIAL)} > {"model2-mp4.safetensors.partial"}


def test_a_join_that_was_killed_goes_on_with_a_source_of_another_time(
    source: Path, whole: Path, made: Path, tmp_path: Path
) -> None:
    """As on another machine: its copy has other times of change."""
    other, target = copy(source, tmp_path / "other"), copy(made, tmp_path / "target")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshard.execution.execute, "rename_to_final", raise_crash)
        with pytest.raises(Crash):
            reshard.convert(source, target, RANKS)
    assert (target / JOURNAL).exists()
    for path in other.iterdir():
        os.utime(path, (1, 1))
    reshard.convert(other, target, RANKS)
    assert contents(target) == contents(whole)


def raise_crash(*_: object) -> None:
    raise Crash


def test_a_join_waits_for_whoever_is_at_work_in_a_share(source: Path, whole: Path, made: Path, tmp_path: Path) -> None:
    """Such as a repair, which holds the lock of the share and writes nothing into its journal."""
    target = copy(made, tmp_path / "target")
    with ExitStack() as stack:
        lock_journal(stack, share_folder(target, 1) / JOURNAL)
        with pytest.raises(Refused) as refused:
            reshard.convert(source, target, RANKS)
        assert facts(refused) == [("target-in-use", ".share-1-of-3")]
    (share_folder(target, 2) / STAGING).mkdir()
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS)
    assert facts(refused) == [("unfinished-share", ".share-2-of-3")]
    (share_folder(target, 2) / STAGING).rmdir()
    reshard.convert(source, target, RANKS)
    assert contents(target) == contents(whole)


def test_of_two_joins_at_once_one_joins(source: Path, whole: Path, made: Path, tmp_path: Path) -> None:
    """The second begins when the first has moved its files, and ends before that one has written its manifest."""
    target, met = copy(made, tmp_path / "target"), list[tuple[str, str]]()

    def join_again(*arguments: Any) -> None:
        with pytest.raises(Refused) as refused:
            reshard.convert(source, target, RANKS)
        met.extend(facts(refused))
        rename_to_final(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshard.execution.execute, "rename_to_final", join_again)
        reshard.convert(source, target, RANKS)
    assert {kind for kind, _ in met} == {"target-in-use"}
    assert contents(target) == contents(whole)


def test_a_share_with_other_files_beside_the_tensors_is_refused_at_once(
    source: Path, made: Path, tmp_path: Path
) -> None:
    target, tokenizer = copy(made, tmp_path / "target"), tmp_path / "tokenizer"
    shutil.rmtree(share_folder(target, 0))
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS, share="0/3", tokenizer_path=tokenizer)
    assert ("source-changed", "tokenizer.json") in facts(refused)
    assert not share_folder(target, 0).exists()


def test_a_damaged_manifest_stops_its_own_share_only(source: Path, whole: Path, made: Path, tmp_path: Path) -> None:
    target = copy(made, tmp_path / "target")
    shutil.rmtree(share_folder(target, 2))
    (share_folder(target, 1) / MANIFEST).write_text("{", encoding="utf-8")
    reshard.convert(source, target, RANKS, share="2/3")
    with pytest.raises(Refused, match="damaged; it makes model1") as refused:
        reshard.convert(source, target, RANKS)
    assert facts(refused) == [("unfinished-share", "3")]
    with pytest.raises(Refused, match="makes the share anew") as refused:
        reshard.convert(source, target, RANKS, share="1/3", restart=True, yes=True)
    assert facts(refused) == [("wrong-manifest", MANIFEST)]
    share_folder(target, 1).rename(tmp_path / "away")
    reshard.convert(source, target, RANKS, share="1/3")
    reshard.convert(source, target, RANKS)
    assert contents(target) == contents(whole)


@pytest.mark.parametrize("share", [Share(5, 4), Share(-1, 4), Share(0, 0), (1, 4), Share("0", 4)])  # type: ignore[arg-type]
def test_a_share_of_wrong_numbers_is_refused_in_python(share: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        reshard.convert(source, tmp_path / "target", RANKS, share=share)
    assert [problem.subject for problem in refused.value.problems] == ["share"]


def test_a_link_in_a_share_is_refused(source: Path, made: Path, tmp_path: Path) -> None:
    target = copy(made, tmp_path / "target")
    file = rank_file(share_folder(target, 1), 2)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS)
    assert facts(refused) == [("target-not-folder", file.name)]
    assert file.is_symlink()


def test_shares_that_both_have_a_file_are_refused(source: Path, made: Path, tmp_path: Path) -> None:
    target = copy(made, tmp_path / "target")
    shutil.copytree(share_folder(target, 1), share_folder(target, 1, 2))
    with pytest.raises(Refused) as refused:
        reshard.convert(source, target, RANKS)
    assert {kind for kind, _ in facts(refused)} == {"contradiction"}


@pytest.mark.parametrize("state", ["finished", "begun"])
def test_shares_of_other_ranks_are_refused(state: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if state == "finished":
        reshard.convert(source, target, RANKS, share="0/2")
    else:
        leave_share_unfinished(source, target, "0/2")
    for share in ("1/2", None):
        with pytest.raises(Refused, match="it has model0-mp4") as refused:
            reshard.convert(source, target, RANKS, ranks=[1, 2], share=share)
        assert ("another-job", ".share-0-of-2") in facts(refused)
    assert contents_beside(target) == [".share-0-of-2"]
