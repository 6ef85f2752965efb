"""Shares before they are joined: each is verified alone, and whoever takes their target for a whole one is told."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.formats.share_names import find_share_of_folder
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.types import Share

CONFIG = {**SMALL_V3, "num_hidden_layers": 2, "num_nextn_predict_layers": 0, "n_routed_experts": 4, "vocab_size": 512}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ranks": {"mp": 4},
    "kept": {"to": "hf", "max_file_size": 400_000},
    "dequantized": {"to": "hf", "cast": "bf16", "max_file_size": 400_000},
    "quantized": {"to": "hf", "cast": "fp8", "max_file_size": 200_000},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("unjoined")
    write_checkpoint(made / "source", CONFIG, 2)
    reshard.convert(made / "source", made / "plain", to="hf", cast="bf16")
    return made


def make_shares(folder: Path, layout: str, count: int) -> tuple[Path, Path]:
    """Returns source and target."""
    source = folder / ("plain" if layout == "quantized" else "source")
    target = folder / f"{layout}-{count}"
    for number in range(0 if target.exists() else count):
        reshard.convert(source, target, share=f"{number}/{count}", **LAYOUTS[layout])
    return source, target


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_share_is_proven_alone(folder: Path, layout: str, count: int) -> None:
    source, target = make_shares(folder, layout, count)
    compared = 0
    for share in target.glob(".share-*"):
        for other in (None, source):
            report = reshard.verify(share, other)
            assert report.is_proven, report
            assert f"share {find_share_of_folder(share)} alone, which has" in report.note
        compared += report.compared
    whole = folder / f"{layout}-whole"
    if not whole.exists():
        reshard.convert(source, whole, **LAYOUTS[layout])
    assert compared == reshard.verify(whole, source).size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_wrong_in_a_share_is_found(folder: Path, layout: str, tmp_path: Path) -> None:
    source, target = make_shares(folder, layout, 2)
    for damage in ("byte", "file"):
        share = shutil.copytree(target / ".share-1-of-2", tmp_path / damage / ".share-1-of-2")
        path = max(share.glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        if damage == "file":
            path.unlink()
        for other in (None, source):
            report = reshard.verify(share, other)
            assert path.name in report.problems[0].subject
            assert not report.is_proven


def test_whole_files_under_a_name_of_a_share_without_its_manifest_are_whole(folder: Path, tmp_path: Path) -> None:
    """Nothing says that other files lie elsewhere."""
    source, target = make_shares(folder, "kept", 2)
    share = shutil.copytree(target / ".share-0-of-2", tmp_path / ".share-0-of-2")
    (share / "reshard.json").unlink()
    assert "missing-tensor" in {problem.kind for problem in reshard.verify(share, source).problems}


@pytest.mark.parametrize("use", ["verify", "verify with source", "diff", "convert", "load", "source of verify"])
def test_who_takes_shares_for_a_target_is_told_how_to_join_them(folder: Path, use: str, tmp_path: Path) -> None:
    source, target = make_shares(folder, "ranks", 2)
    calls: dict[str, Callable[[], Any]] = {
        "verify": lambda: reshard.verify(target),
        "verify with source": lambda: reshard.verify(target, source),
        "diff": lambda: reshard.diff(source, target),
        "convert": lambda: reshard.convert(target, tmp_path / "out", to="hf"),
        "load": lambda: reshard.load(target, mp=2, rank=0),
        "source of verify": lambda: reshard.verify(folder / "plain", target),
    }
    with pytest.raises(Refused) as refused:
        calls[use]()
    (problem,) = refused.value.problems
    assert (problem.kind, problem.subject) == ("not-joined", str(target))
    assert f"reshard convert SOURCE {target} --mp 4" in problem.remedy
    assert f"reshard verify {target / '.share-0-of-2'}" in problem.remedy


def test_inspect_shows_each_share(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, target = make_shares(folder, "ranks", 2)
    begun = tmp_path / "begun"
    shutil.copytree(target / ".share-1-of-2", begun / ".share-1-of-2")
    assert main(["inspect", str(begun)]) == 0
    shown = capsys.readouterr().out
    assert "shares of a target, not joined yet\nshare 0/2: not begun\nshare 1/2: finished, ranks 2-3 of 4\n" in shown
    assert main(["inspect", "--json", str(begun)]) == 0
    assert '"status": "unfinished"' in capsys.readouterr().out


def test_a_share_tells_what_to_do_next(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands that it prints work."""
    source = folder / "source"
    for number in range(2):
        assert main(["convert", str(source), str(tmp_path / "t"), "--mp", "4", "--share", f"{number}/2"]) == 0
    steps = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  reshard ")]
    assert [step[1] for step in steps] == ["verify", "convert"] * 2
    for step in steps[2:]:
        assert main(step[1:]) == 0
    assert reshard.verify(tmp_path / "t", source).is_proven
    assert not list((tmp_path / "t").glob(".share-*"))


def test_names_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = tmp_path / ".share-1-of-4"
    share.mkdir()
    monkeypatch.chdir(share)
    assert find_share_of_folder(Path()) == find_share_of_folder(share) == Share(1, 4)
    assert find_share_of_folder(tmp_path) is None


@pytest.mark.parametrize("layout", ["ranks", "dcp"])
def test_a_share_of_some_ranks_tells_what_to_do_next(
    folder: Path, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(folder / "source"), str(tmp_path / "t"), "--mp", "4", "--to", layout, "--ranks", "0,1,3"]
    for number in range(2):
        assert main([*words, "--share", f"{number}/2"]) == 0
    steps = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  reshard ")]
    assert [step[1] for step in steps] == ["verify", "convert"] * 2
    for step in (steps[0], steps[2], steps[3]):
        assert main(step[1:]) == 0


@pytest.mark.parametrize("layout", ["ranks", "dcp"])
@pytest.mark.parametrize("count", [1, 2])
def test_shares_beside_a_part_are_seen(
    folder: Path, layout: str, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = folder / "source", tmp_path / "t"
    reshard.convert(source, target, 4, to=layout, ranks=[0])
    for number in range(count):
        reshard.convert(source, target, 4, to=layout, share=f"{number}/2")
    assert main(["inspect", str(target)]) == 0
    shown = capsys.readouterr().out
    assert "note: a part of a target: ranks 0 of 4" in shown
    assert "note: share 0/2: finished, rank 1 of 4\n" in shown
    assert f"note: share 1/2: {'finished, ranks 2-3 of 4' if count == 2 else 'not begun'}\n" in shown
    for call in (
        lambda: reshard.verify(target),
        lambda: reshard.verify(target, source),
        lambda: reshard.verify(target, ranks=[0, 2]),
        lambda: reshard.verify(source, target),
        lambda: reshard.repair(target, source),
        lambda: reshard.diff(source, target),
        lambda: reshard.convert(target, tmp_path / "out", to="hf"),
    ):
        with pytest.raises(Refused) as refused:
            call()
        (problem,) = refused.value.problems
        assert (problem.kind, problem.subject) == ("not-joined", str(target))
        assert problem.found == f"shares of it that are not joined, {count} of 2 finished, beside rank 0 of 4"
        assert problem.remedy.endswith("; verify and repair take what is joined: ranks 0")
    assert reshard.verify(target, ranks=[0]).is_proven
    assert reshard.repair(target, source, ranks=[0]).is_proven


def test_what_a_join_has_left_of_shares_hides_nothing(folder: Path, tmp_path: Path) -> None:
    """It ends with their manifests: a part with those of its own ranks is as whole as it was."""
    source, target = folder / "source", tmp_path / "t"
    for number in range(2):
        reshard.convert(source, target, 4, ranks=[0, 1], share=f"{number}/2")
    shutil.copytree(target / ".share-1-of-2", tmp_path / "left")
    reshard.convert(source, target, 4, ranks=[0, 1])
    (target / ".share-1-of-2").mkdir()
    shutil.copy(tmp_path / "left" / "reshard.json", target / ".share-1-of-2")
    assert reshard.verify(target).is_proven
    assert not any(note.kind == "share" for note in reshard.inspect(target).notes)
    reshard.convert(source, target, 4, ranks=[0, 1])
    assert not list(target.glob(".share-*"))


def test_the_command_that_joins_says_that_paths_lack(folder: Path) -> None:
    _, target = make_shares(folder, "ranks", 2)
    (note,) = [note for note in reshard.inspect(target).notes if note.kind == "not-joined"]
    assert f"reshard convert SOURCE {target} --mp 4, and --config or --recipe FILE if they had it; " in note.text


def test_a_share_without_files_to_write_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(folder / "source"), str(tmp_path / "t"), "--mp", "4"]
    assert main([*words, "--share", "4/6"]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}/t: share 4/6 has no file left to write; its folder was not made\n" in shown
    assert "note: share 4/6 has 0 of 4 files" in shown
    assert main([*words, "--share", "0/2"]) == 0
    capsys.readouterr()
    assert main([*words, "--share", "0/2"]) == 0
    assert f"{tmp_path}/t/.share-0-of-2: converted already; nothing was written\n" in capsys.readouterr().out
    assert main([*words, "--share", "1/2"]) == 0
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "--share", "0/2"]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path}/t: share 0/2 has no file left to write; its folder was not made\n" in shown
    assert "note: share 0/2 has 2 of 4 files" in shown
