"""Slices of `--to dcp` among which one is of another model, under another's name, or missing: no command mixes them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sliced_loads import slice_name
from small_models import write_model

import reshard
from reshard.cli.main import main
from reshard.errors import Refused

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another one of the same shapes, and one that ties its head; `a` and `b` are slices of the first two."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "llama", "llama", dtype="bfloat16")
    write_model(folder / "tied", "llama-tied")
    shutil.copytree(folder / "llama", folder / "other")
    for path in (folder / "other").glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    reshard.convert(folder / "llama", folder / "a", to="dcp", mp=4)
    reshard.convert(folder / "other", folder / "b", to="dcp", mp=4)
    return folder


def mix(models: Path, target: Path, rank: int = 1) -> Path:
    """Slices of which one is of the other model."""
    shutil.copytree(models / "a", target)
    shutil.copy(models / "b" / slice_name(rank), target)
    return target


def exchange(target: Path, one: int, other: int) -> None:
    first, second = target / slice_name(one), target / slice_name(other)
    first.rename(target / "aside")
    second.rename(first)
    (target / "aside").rename(second)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]"])
def test_a_damaged_manifest_is_no_permission(text: str, models: Path, tmp_path: Path) -> None:
    source = mix(models, tmp_path / "source")
    (source / "reshard.json").write_text(text)
    for read in (reshard.open, reshard.inspect, lambda path: reshard.convert(path, tmp_path / "again", to="hf")):
        with pytest.raises(Refused, match=r"reshard\.json"):
            read(source)
    assert not (tmp_path / "again").exists()


def test_names_are_counted_beside_another_manifest(models: Path, tmp_path: Path) -> None:
    """That of whole files tells nothing of slices."""
    source = tmp_path / "source"
    shutil.copytree(models / "a", source)
    reshard.convert(models / "llama", tmp_path / "whole", to="hf")
    shutil.copy(tmp_path / "whole" / "reshard.json", source)
    (source / slice_name(1)).unlink()
    with pytest.raises(Refused) as refused:
        reshard.convert(source, tmp_path / "again", to="hf")
    (problem,) = refused.value.problems
    assert problem.kind == "missing-file"
    assert problem.subject == "shard-00002-model-*-of-00001.safetensors"


def test_a_slice_of_another_model_is_refused_everywhere(models: Path, tmp_path: Path) -> None:
    source = mix(models, tmp_path / "source")
    for read in (
        reshard.open,
        reshard.inspect,
        lambda path: reshard.diff(path, models / "llama"),
        lambda path: reshard.load(path, mp=1, rank=0),
        lambda path: reshard.convert(path, tmp_path / "again", to="hf"),
    ):
        with pytest.raises(Refused) as refused:
            read(source)
        (problem,) = refused.value.problems
        assert problem.kind == "wrong-checksum"
        assert problem.subject.startswith(slice_name(1))
        assert "reshard repair" in problem.remedy
        assert "move reshard.json" not in problem.remedy
    assert {problem.kind for problem in reshard.verify(source, models / "llama").problems} == {"differs"}
    assert reshard.repair(source, models / "llama").is_proven
    with reshard.open(source):
        pass


def test_exchanged_slices_are_refused(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(models / "a", source)
    exchange(source, 0, 1)
    with pytest.raises(Refused) as refused:
        reshard.open(source)
    assert {problem.subject.partition(":")[0] for problem in refused.value.problems} == {slice_name(0), slice_name(1)}


def test_slices_saved_over_ours_are_taken_without_the_manifest(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(models / "b", source)
    shutil.copy(models / "a" / "reshard.json", source)
    with pytest.raises(Refused) as refused:
        reshard.open(source)
    assert all("another program has saved all of these files" in one.remedy for one in refused.value.problems)
    (source / "reshard.json").rename(tmp_path / "aside.json")
    assert reshard.diff(source, models / "other").is_same


def test_a_missing_slice_is_told_with_its_repair(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(models / "a", source)
    (source / slice_name(2)).rename(source / slice_name(8))
    with pytest.raises(Refused) as refused:
        reshard.open(source)
    (problem,) = refused.value.problems
    assert (problem.kind, problem.subject) == ("missing-file", slice_name(2))
    assert "reshard repair" in problem.remedy
    assert main(["inspect", str(source)]) == 0
    assert f"{slice_name(2)}: missing file" in capsys.readouterr().out


# Slices of rank files, which are proven in reverse.


@pytest.fixture
def sliced(models: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Rank files of a model with a tied head, and slices of them."""
    ranks, target = tmp_path / "ranks", tmp_path / "target"
    reshard.convert(models / "tied", ranks, mp=2)
    reshard.convert(ranks, target, to="dcp", mp=3)
    return ranks, target


def test_slices_of_rank_files_are_counted(sliced: tuple[Path, Path]) -> None:
    ranks, target = sliced
    report = reshard.verify(target, ranks)
    assert report.is_proven, report
    alone = reshard.verify(target)
    assert (report.ranks, report.files, report.tensors) == (3, 3, alone.tensors)
    assert reshard.verify(target, ranks, sample=0.1).verdict == "sampled"
    with pytest.raises(Refused, match="some slices"):
        reshard.verify(target, ranks, ranks=[1])


def test_exchanged_slices_of_rank_files_are_seen(sliced: tuple[Path, Path]) -> None:
    ranks, target = sliced
    exchange(target, 0, 1)
    found = {(problem.kind, problem.subject) for problem in reshard.verify(target, ranks).problems}
    assert found == {("swapped-file", slice_name(0)), ("swapped-file", slice_name(1))}


def test_a_missing_slice_of_rank_files_is_repaired(
    sliced: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks, target = sliced
    (target / slice_name(1)).unlink()
    assert main(["verify", str(target), "--source", str(ranks)]) == 1
    said = capsys.readouterr().out
    assert f"{slice_name(1)}: missing file" in said
    assert f"reshard repair {target} --source {ranks}" in said
    assert reshard.repair(target, ranks).is_proven
    assert reshard.verify(target, ranks).is_proven


def test_rows_that_torch_would_not_cut_are_seen(models: Path, tmp_path: Path) -> None:
    """Two slices of 50 and 46 rows hold the whole tensor, but not as `torch.chunk` cuts it."""
    reshard.convert(models / "llama", tmp_path / "ranks", mp=2)
    reshard.convert(models / "llama", tmp_path / "target", to="dcp", mp=2)
    move_rows(tmp_path / "target")
    (tmp_path / "target" / "reshard.json").unlink()
    problems = reshard.verify(tmp_path / "target", tmp_path / "ranks").problems
    assert {problem.kind for problem in problems} == {"wrong-shape"}
    assert all(HEAD in problem.subject for problem in problems)


def move_rows(target: Path) -> None:
    """Moves two rows of the head from the second slice to the first."""
    tensors = [load_file(target / slice_name(rank)) for rank in range(2)]
    first, second = tensors[0][HEAD], tensors[1][HEAD]
    tensors[0][HEAD], tensors[1][HEAD] = torch.cat([first, second[:2]]), second[2:].clone()
    save_as_slices(target, tensors)


def save_as_slices(target: Path, tensors: list[dict[str, torch.Tensor]]) -> None:
    """Saves rows, file by file, with the places that follow from those before them."""
    begin: dict[str, int] = {}
    for rank, rows in enumerate(tensors):
        places = {name: {"saved_offsets": [begin.get(name, 0), *[0] * (one.dim() - 1)]} for name, one in rows.items()}
        said = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"}
        save_file(rows, target / slice_name(rank), said)
        begin |= {name: begin.get(name, 0) + len(one) for name, one in rows.items()}


def test_a_tied_head_that_was_removed_is_missed(sliced: tuple[Path, Path]) -> None:
    ranks, target = sliced
    tensors = [load_file(target / slice_name(rank)) for rank in range(3)]
    save_as_slices(target, [{name: one for name, one in rows.items() if name != HEAD} for rows in tensors])
    (target / "reshard.json").unlink()
    (problem,) = reshard.verify(target, ranks).problems
    assert (problem.kind, problem.subject) == ("missing-tensor", HEAD)


def test_whole_files_are_proven_without_the_head_that_was_added(models: Path, tmp_path: Path) -> None:
    """The manifest of the slices, which told that the head was added, is there no more."""
    target, again = tmp_path / "target", tmp_path / "again"
    reshard.convert(models / "tied", target, to="dcp", mp=3)
    reshard.convert(target, again, to="hf")
    (target / "reshard.json").unlink()
    report = reshard.verify(again, target)
    assert report.is_proven, report
    tensors = [load_file(target / slice_name(rank)) for rank in range(3)]
    tensors[2][HEAD][-1, -1] += 1
    save_as_slices(target, tensors)
    (problem,) = reshard.verify(again, target).problems
    assert (problem.kind, problem.subject) == ("differs", HEAD)


# Hints and notes.


def test_no_further_slice_is_asked_for_beside_a_manifest(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(models / "a", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] * 2}))
    with pytest.raises(Refused) as refused:
        reshard.convert(source, tmp_path / "again", to="hf")
    assert all("shard-" not in problem.remedy for problem in refused.value.problems)
    (source / "reshard.json").unlink()
    with pytest.raises(Refused, match="is shard-00005-"):
        reshard.convert(source, tmp_path / "again", to="hf")


@pytest.mark.parametrize(("pattern", "is_told"), [("*.layers.0.*", False), (HEAD, True)])
def test_the_tied_head_is_noted_where_it_is_written(pattern: str, is_told: bool, models: Path) -> None:  # noqa: FBT001
    plan = reshard.plan(models / "tied", to="dcp", mp=2, only=[pattern])
    assert ("tied" in {note.kind for note in plan.notes}) == is_told


def test_chosen_ranks_are_no_number_of_ranks(models: Path) -> None:
    with pytest.raises(Refused) as refused:
        reshard.plan(models / "llama", to="dcp", ranks=range(4))
    assert "0-3, and no number of ranks" in str(refused.value)
    assert "add mp=N" in str(refused.value)
