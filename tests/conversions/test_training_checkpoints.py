"""Distributed checkpoints that torch saved, converted and read like the model that was trained: transformers saved it
whole beside them.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job
from safetensors.torch import load_file
from stacked_models import compute_logits, read_tensors
from targets import leave_unfinished
from trained_models import save_models

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.formats.boxed_folder import read_boxed

SAVES = ("moe-fsdp", "moe-grid", "moe-slices", "moe-stacked-grid", "moe-stacked-slices", "llama-hsdp")
"""The names tell the model, and the mesh or the format."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    save_models(folder)
    return folder


def original(models: Path, save: str) -> Path:
    """The folder of the same model, as transformers saved it."""
    return models / ("moe/hub" if save.startswith("moe") else "llama")


@pytest.mark.parametrize("save", SAVES)
def test_whole_files_are_those_of_transformers(save: str, models: Path, tmp_path: Path) -> None:
    source, whole, target = models / save, original(models, save), tmp_path / "target"
    reshard.convert(source, target, to="hf", config=whole)
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    names = {path.name for path in target.iterdir()} - {"reshard.json"}
    assert names == {path.name for path in whole.iterdir()}
    assert torch.equal(compute_logits(target), compute_logits(whole))
    assert reshard.verify(target, source, config=whole).is_proven
    assert reshard.verify(target, whole).is_proven
    assert reshard.verify(target).is_proven


@pytest.mark.parametrize("save", SAVES)
def test_rank_files_are_those_of_the_whole_checkpoint(save: str, models: Path, tmp_path: Path) -> None:
    source, whole = models / save, original(models, save)
    reshard.convert(source, tmp_path / "a", 2, config=whole, jobs=2)
    reshard.convert(whole, tmp_path / "b", 2)
    for path in (tmp_path / "b").glob("*.safetensors"):
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    assert reshard.verify(tmp_path / "a", source, config=whole).is_proven
    reshard.convert(tmp_path / "a", tmp_path / "again", to="hf")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    loaded = reshard.load(source, mp=2, rank=1, config=whole)
    stored = load_file(next((tmp_path / "b").glob("*1-*2.safetensors")))
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("to", [{"to": "hf"}, {"mp": 2}])
def test_master_weights_are_rounded(to: dict[str, Any], models: Path, tmp_path: Path) -> None:
    whole = models / "llama"
    reshard.convert(models / "llama-hsdp", tmp_path / "a", cast="bf16", config=whole, **to)
    reshard.convert(whole, tmp_path / "b", cast="bf16", **to)
    for path in (tmp_path / "b").glob("*.safetensors"):
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    if "to" in to:
        found, wanted = read_tensors(tmp_path / "a"), read_tensors(models / "llama-bf16")
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    assert reshard.verify(tmp_path / "a", models / "llama-hsdp", config=whole).is_proven


def test_for_vllm_and_for_transformers(models: Path, tmp_path: Path) -> None:
    whole = models / "moe" / "hub"
    reshard.convert(models / "moe-fsdp", tmp_path / "a", 2, for_engine="vllm", config=whole)
    reshard.convert(whole, tmp_path / "b", 2, for_engine="vllm")
    for path in (tmp_path / "b").glob("*.safetensors"):
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    reshard.convert(models / "moe-grid", tmp_path / "stacked", for_engine="transformers", config=whole)
    wanted = (models / "moe" / "stacked" / "model.safetensors").read_bytes()
    assert (tmp_path / "stacked" / "model.safetensors").read_bytes() == wanted
    assert reshard.verify(tmp_path / "stacked", models / "moe-fsdp", config=whole).is_proven


@pytest.mark.parametrize("save", ["moe-fsdp", "moe-stacked-slices", "llama-hsdp"])
def test_slices_for_other_ranks(save: str, models: Path, tmp_path: Path) -> None:
    """Of a training on four ranks, for three others."""
    source, whole = models / save, original(models, save)
    reshard.convert(source, tmp_path / "a", to="dcp", ranks=3, config=whole)
    reshard.convert(whole, tmp_path / "b", to="dcp", ranks=3)
    for path in (tmp_path / "b").glob("*.safetensors"):
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    assert reshard.verify(tmp_path / "a", source, config=whole).is_proven


def test_parts_of_it(models: Path, tmp_path: Path) -> None:
    source, whole = models / "moe-stacked-grid", models / "moe" / "hub"
    reshard.convert(source, tmp_path / "a", to="hf", layers=[0, 2], experts=[1, 3], renumber=True, config=whole)
    reshard.convert(whole, tmp_path / "b", to="hf", layers=[0, 2], experts=[1, 3], renumber=True)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    reshard.convert(source, tmp_path / "only", to="hf", only=["*.2.mlp.experts.7.*"], config=whole)
    found, all_tensors = read_tensors(tmp_path / "only"), read_tensors(whole)
    assert len(found) == 3
    assert all(torch.equal(tensor, all_tensors[name]) for name, tensor in found.items())


@pytest.mark.parametrize("save", SAVES)
def test_it_is_compared_and_opened(save: str, models: Path) -> None:
    source, whole = models / save, original(models, save)
    report = reshard.diff(source, whole)
    assert report.is_same, report
    assert reshard.diff(whole, source).is_same
    wanted = read_tensors(whole)
    with reshard.open(source) as opened:
        for name, tensor in wanted.items():
            own = name if name in opened else f"model.{name}"
            assert torch.equal(opened[own][:], tensor), name
            assert torch.equal(opened[own][1:3], tensor[1:3]), name


@pytest.mark.parametrize("save", ["moe-fsdp", "moe-slices"])
def test_a_target_is_repaired_from_it(
    save: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, whole, target = models / save, models / "moe" / "hub", tmp_path / "target"
    reshard.convert(source, target, 2, config=whole)
    path = next(target.glob("*0-of-2.safetensors"))
    wanted = path.read_bytes()
    path.write_bytes(wanted[:-1] + bytes([wanted[-1] ^ 1]))
    (target / "tokenizer.json").unlink()
    report = reshard.verify(target, source, config=whole)
    assert {problem.kind for problem in report.problems} == {"differs", "missing-file"}
    assert main(["verify", str(target), "--source", str(source), "--config", str(whole)]) == 1
    assert f"reshard repair {target} --source {source} --config {whole}" in capsys.readouterr().out
    assert reshard.repair(target, source, config=whole).is_proven
    assert path.read_bytes() == wanted
    assert reshard.verify(target, source, config=whole).is_proven


@pytest.mark.parametrize("save", ["moe-fsdp", "moe-slices"])
def test_no_repair_is_offered_from_another_step(save: str, models: Path, tmp_path: Path) -> None:
    """It differs in one byte of a weight only, near the beginning of a file: a repair looks at some bytes of each."""
    source, whole, target = tmp_path / "source", models / "moe" / "hub", tmp_path / "target"
    shutil.copytree(models / save, source)
    reshard.convert(source, target, 2, config=whole)
    boxed = read_boxed(source)
    assert boxed
    parts = [box.part for boxes in boxed.boxes.values() for box in boxes]
    part = min(parts, key=lambda part: part.offset)
    path = source / boxed.files[part.file].name
    content = bytearray(path.read_bytes())
    content[part.offset] ^= 1
    path.write_bytes(content)
    report = reshard.verify(target, source, config=whole)
    assert {problem.remedy.partition(";")[0] for problem in report.problems} == {
        "give the --source that this was made from"
    }


@pytest.mark.parametrize("save", ["moe-fsdp", "moe-slices"])
def test_an_interrupted_job_goes_on(save: str, models: Path, tmp_path: Path) -> None:
    """The config lies beside the tensors."""
    whole, target = models / "moe" / "hub", tmp_path / "target"
    source = copy_with_config(models / save, whole, tmp_path / "source")
    reshard.convert(whole, tmp_path / "wanted", 2)
    leave_unfinished(Job(source, 2), target)
    assert main(["inspect", str(target)]) == 0
    assert "left-behind" not in {note.kind for note in reshard.plan(source, to="hf").notes}
    done = reshard.convert(source, target, 2).done
    assert done is not None
    assert done.resumed > 0
    assert reshard.convert(source, target, 2).done is None
    for path in (tmp_path / "wanted").glob("*.safetensors"):
        assert (target / path.name).read_bytes() == path.read_bytes()


def copy_with_config(source: Path, whole: Path, folder: Path) -> Path:
    """A save with the config beside it."""
    shutil.copytree(source, folder)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy2(whole / name, folder)
    return folder


# What is wrong with it.


def list_damages(source: Path) -> Iterator[tuple[str, Path]]:
    """Each file in turn removed, truncated, and replaced by the one before, which has another layout."""
    files = sorted(path for path in source.iterdir() if path.name[0] in "_s")
    for number, path in enumerate(files):
        content = path.read_bytes()
        path.unlink()
        yield "removed", path
        path.write_bytes(content[:-1])
        yield "truncated", path
        other = files[number - 1].read_bytes() if number else files[1].read_bytes()
        path.write_bytes(other)
        yield "exchanged", path
        path.write_bytes(content)


@pytest.mark.parametrize("save", ["moe-fsdp", "moe-grid", "moe-slices", "moe-stacked-slices", "llama-hsdp"])
def test_a_damaged_file_is_refused_and_named(save: str, models: Path, tmp_path: Path) -> None:
    source, whole = tmp_path / "source", original(models, save)
    shutil.copytree(models / save, source)
    for damage, path in list_damages(source):
        with pytest.raises(Refused) as error:
            reshard.convert(source, tmp_path / "target", to="hf", config=whole)
        kinds, said = {problem.kind for problem in error.value.problems}, str(error.value)
        is_last = damage == "removed" and path.name.startswith("shard-00004")  # no name tells how many there were
        if is_last:
            assert kinds <= {"wrong-shape", "missing-tensor", "missing-box"}
        elif path.name.startswith("shard-") and damage == "exchanged":
            assert kinds == {"missing-box"}  # what it had; the other one stands there twice
        else:
            assert path.name[:11] in said, damage
        for run in () if is_last else (reshard.open, reshard.inspect):
            with pytest.raises(Refused):
                run(source)
        assert not (tmp_path / "target").exists()


def test_without_metadata_or_of_another_save(models: Path, tmp_path: Path) -> None:
    source, whole = tmp_path / "source", models / "moe" / "hub"
    shutil.copytree(models / "moe-grid", source)
    shutil.copy2(models / "moe-stacked-grid" / ".metadata", source)
    with pytest.raises(Refused):
        reshard.plan(source, 2, config=whole)
    (source / ".metadata").unlink()
    with pytest.raises(Refused, match="begins with a dot"):
        reshard.plan(source, 2, config=whole)


def test_the_config_of_another_folder(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, other = models / "moe" / "hub", tmp_path / "other"
    source = copy_with_config(models / "moe-slices", whole, tmp_path / "source")
    reshard.convert(source, tmp_path / "same", 2, config=whole)
    other.mkdir()
    for folder, found in ((other, "no config.json"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(Refused, match=found) as error:
            reshard.convert(source, tmp_path / "target", 2, config=folder)
        assert [problem.subject for problem in error.value.problems] == ["config"]
    (other / "config.json").write_text("{}")
    with pytest.raises(Refused, match="other things than"):
        reshard.verify(tmp_path / "same", source, config=other)
    with pytest.raises(Refused, match="with source only"):
        reshard.verify(tmp_path / "same", config=whole)
    (source / "config.json").unlink()
    assert main(["plan", str(source), "--config", str(whole)]) == 0
    said = capsys.readouterr().out
    assert f"--config {whole}" in said
    assert main(["convert", str(source), str(tmp_path / "target"), "--mp", "2", "--config", str(whole)]) == 0
    assert f"--config {whole}" in capsys.readouterr().out
    assert main(["inspect", str(source), "--config", str(whole), "--tensors", "*.q_proj.weight"]) == 0
    said = capsys.readouterr().out
    assert "recipe qwen3-moe" in said
    assert "a distributed checkpoint of torch: the tensors are stored in 342 parts" in said
    assert "shard-00001-model-00001-of-00001.safetensors, shard-00002" in said
    assert "no file tells how many were saved" in said


def test_the_config_of_rank_files(models: Path, tmp_path: Path) -> None:
    """They may have lost their manifest and config."""
    whole, ranks = models / "moe" / "hub", tmp_path / "ranks"
    reshard.convert(whole, ranks, 2)
    for name in ("config.json", "tokenizer.json"):
        (ranks / name).unlink()
    with pytest.raises(Refused, match="other things than reshard"):
        reshard.convert(ranks, tmp_path / "again", to="hf", config=models / "llama")
    (ranks / "reshard.json").unlink()
    reshard.convert(ranks, tmp_path / "again", to="hf", config=whole)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (whole / name).read_bytes()


def test_replicas_are_compared_or_the_first_is_taken(models: Path, tmp_path: Path) -> None:
    """Slices are not deduplicated in a folder that was put together by hand."""
    source, whole = tmp_path / "source", models / "moe" / "hub"
    shutil.copytree(models / "moe-slices", source)
    first = source / "shard-00001-model-00001-of-00001.safetensors"
    again = source / "shard-00005-model-00001-of-00001.safetensors"
    shutil.copy2(first, again)
    reshard.convert(source, tmp_path / "same", to="hf", config=whole)
    content = again.read_bytes()
    again.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Refused, match="replicas differ"):
        reshard.convert(source, tmp_path / "other", to="hf", config=whole)
    reshard.convert(source, tmp_path / "first", to="hf", config=whole, replicas="first")
    for name in ("same", "first"):
        found = (tmp_path / name / "model.safetensors").read_bytes()
        assert found == (whole / "model.safetensors").read_bytes()
    with pytest.raises(Refused, match="or a distributed checkpoint"):
        reshard.convert(whole, tmp_path / "third", 2, replicas="first")


def test_slices_without_a_config_are_refused_for_the_last_may_lack(models: Path) -> None:
    with pytest.raises(Refused) as refused:
        reshard.plan(models / "moe-slices", to="hf")
    assert [problem.kind for problem in refused.value.problems] == ["no-config"]
    assert refused.value.problems[0].remedy.endswith(" config")


def test_the_side_files_are_those_of_the_named_folder(models: Path, tmp_path: Path) -> None:
    # Also where an equal config lies beside the weights: there may be no tokenizer.
    whole = original(models, "moe-grid")
    source = copy_with_config(models / "moe-grid", whole, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    reshard.convert(source, tmp_path / "target", to="hf", config=whole)
    assert (tmp_path / "target" / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    with pytest.raises(Refused, match="name its folder"):
        reshard.plan(source, to="hf", config=whole / "config.json")
