"""Stacked experts of transformers 5, there and back: held against what transformers itself writes, byte for byte."""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from downloads import flip
from jobs import Job
from safetensors.torch import load_file, save_file
from small_models import write_model
from stacked_models import (
    STACKED_MODELS,
    assert_same_tensors,
    compute_logits,
    read_tensors,
    write_stacked_model,
)
from targets import leave_unfinished
from torture import contents

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.formats.huggingface import read_header
from reshard.recipes.recipe import load_recipe
from reshard.sources import fused_shards
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.stacked_experts import unstack_checkpoint
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.types import Tensor
from reshard.verification.stacked_source import StackedSource, check_stacked_source

MODEL = "model.safetensors"
GATE_UP, DOWN = (f"model.layers.2.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=[(name, experts) for name in STACKED_MODELS for experts in (2, 10)], ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stacked")
    write_stacked_model(folder, *request.param)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    write_stacked_model(folder, "qwen3-moe")
    return folder


def rank_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("stacked", ["stacked", "stacked-parts"])
def test_hub_files_of_stacked_ones_are_those_of_transformers(stacked: str, written: Path, tmp_path: Path) -> None:
    found = reshard.convert(written / stacked, tmp_path / "hub", to="hf")
    assert_same_tensors(tmp_path / "hub", written / "hub")
    assert "under the hub's names" in str(found)
    assert reshard.verify(tmp_path / "hub", written / stacked).is_proven
    assert (tmp_path / "hub" / MODEL).read_bytes() == (written / "hub" / MODEL).read_bytes()


@pytest.mark.parametrize("source", ["hub", "hub-parts", "stacked-parts"])
def test_the_stacked_file_is_that_of_transformers_to_the_byte(source: str, written: Path, tmp_path: Path) -> None:
    reshard.convert(written / source, tmp_path / "made", for_engine="transformers")
    assert (tmp_path / "made" / MODEL).read_bytes() == (written / "stacked" / MODEL).read_bytes()
    report = reshard.verify(tmp_path / "made", written / source)
    assert report.is_proven, report
    assert reshard.verify(tmp_path / "made").is_proven
    assert torch.equal(compute_logits(tmp_path / "made"), compute_logits(written / "hub"))


def test_rank_files_of_stacked_ones_are_those_of_the_hub(written: Path, tmp_path: Path) -> None:
    for source in ("hub", "stacked-parts"):
        reshard.convert(written / source, tmp_path / source, mp=2)
    assert rank_bytes(tmp_path / "hub") == rank_bytes(tmp_path / "stacked-parts")
    for source in ("hub", "stacked", "stacked-parts"):
        assert reshard.verify(tmp_path / "stacked-parts", written / source).is_proven
    reshard.convert(tmp_path / "stacked-parts", tmp_path / "again", to="hf")
    assert_same_tensors(tmp_path / "again", written / "hub")


def test_what_transformers_has_written_is_verified_against_the_hub(written: Path) -> None:
    for stacked in ("stacked", "stacked-parts"):
        report = reshard.verify(written / stacked, written / "hub-parts")
        assert report.is_proven, report
        assert report.is_whole
        assert reshard.diff(written / stacked, written / "hub").is_same
    assert reshard.diff(written / "stacked", written / "stacked-parts").is_same
    with pytest.raises(Refused, match="the source itself"):
        reshard.verify(written / "stacked", written / "stacked")


def test_without_a_config_the_names_tell(written: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    shutil.copy(written / "stacked" / MODEL, tmp_path / "source")
    reshard.convert(tmp_path / "source", tmp_path / "hub", to="hf")
    assert_same_tensors(tmp_path / "hub", written / "hub")


def test_originals_come_back_with_their_files_and_names(written: Path, tmp_path: Path) -> None:
    reshard.convert(written / "hub-parts", tmp_path / "stacked", for_engine="transformers")
    reshard.convert(tmp_path / "stacked", tmp_path / "hub", to="hf")
    reshard.convert(tmp_path / "stacked", tmp_path / "ranks", mp=2)
    reshard.convert(tmp_path / "ranks", tmp_path / "again", to="hf")
    before = contents(written / "hub-parts")
    for made in ("hub", "again"):
        found = contents(tmp_path / made)
        lost = before.keys() - found.keys()
        assert lost <= ({"generation_config.json"} if made == "again" else set())  # some recipes carry none
        assert {name: found[name] for name in before.keys() - lost} == {
            name: before[name] for name in before.keys() - lost
        }
        assert found.keys() - before.keys() == {"reshard.json"}


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_files_for_vllm_are_made_of_stacked_ones(name: str, tmp_path: Path) -> None:
    write_stacked_model(tmp_path, name)
    for source in ("hub", "stacked-parts"):
        reshard.convert(tmp_path / source, tmp_path / f"vllm-{source}", mp=2, for_engine="vllm")
    assert rank_bytes(tmp_path / "vllm-hub") == rank_bytes(tmp_path / "vllm-stacked-parts")
    assert reshard.verify(tmp_path / "vllm-hub", tmp_path / "stacked").is_proven


def test_casts_and_subsets_are_those_of_the_hub(tmp_path: Path) -> None:
    write_stacked_model(tmp_path, "mixtral", dtype="float32")
    options: dict[str, Any] = {"to": "hf", "cast": "bf16", "layers": [0, 2], "experts": [1, 9], "renumber": True}
    options["allow_inexact"] = True
    for source in ("hub", "stacked"):
        reshard.convert(tmp_path / source, tmp_path / f"cut-{source}", **options)
    assert_same_tensors(tmp_path / "cut-hub", tmp_path / "cut-stacked")
    assert reshard.verify(tmp_path / "cut-stacked", tmp_path / "stacked").is_proven
    reshard.convert(tmp_path / "hub", tmp_path / "made", for_engine="transformers", cast="bf16", allow_inexact=True)
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == "bfloat16"
    assert reshard.verify(tmp_path / "made", tmp_path / "stacked").is_proven
    wanted = {name: tensor.bfloat16() for name, tensor in read_tensors(tmp_path / "stacked").items()}
    found = read_tensors(tmp_path / "made")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_subset_has_its_own_config_and_can_be_read_back(tmp_path: Path) -> None:
    write_stacked_model(tmp_path, "qwen3-moe")
    options: dict[str, Any] = {"layers": [0, 2], "experts": [1, 4, 9], "renumber": True}
    reshard.convert(tmp_path / "hub", tmp_path / "made", for_engine="transformers", **options)
    reshard.convert(tmp_path / "hub", tmp_path / "cut", to="hf", **options)
    assert torch.equal(compute_logits(tmp_path / "made"), compute_logits(tmp_path / "cut"))
    assert reshard.verify(tmp_path / "made", tmp_path / "hub").is_proven
    reshard.convert(tmp_path / "made", tmp_path / "back", to="hf")
    assert_same_tensors(tmp_path / "back", tmp_path / "cut")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "cut" / "config.json").read_bytes()


def test_open_and_load_know_the_names_of_the_hub(qwen: Path) -> None:
    hub = read_tensors(qwen / "hub")
    with reshard.open(qwen / "stacked-parts") as tensors:
        assert {name: list(lazy.shape) for name, lazy in tensors.items()} == {at: list(hub[at].shape) for at in hub}
        name = "model.layers.0.mlp.experts.7.up_proj.weight"
        assert torch.equal(tensors[name][3:9], hub[name][3:9])
    loaded = reshard.load(qwen / "stacked", mp=2, rank=1)
    of_hub = reshard.load(qwen / "hub", mp=2, rank=1)
    assert loaded.keys() == of_hub.keys()
    assert all(torch.equal(loaded[name], of_hub[name]) for name in loaded)
    stacked = reshard.load(qwen / "hub", mp=1, rank=0, recipe="transformers-qwen3-moe")
    assert torch.equal(stacked[GATE_UP], read_tensors(qwen / "stacked")[GATE_UP])


def test_inspect_shows_what_is_there(qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = reshard.inspect(qwen / "stacked")
    assert (found.layout, found.recipe, found.tensors) == ("transformers-stacked", "transformers-qwen3-moe", 36)
    assert found.counts["experts"] == 10
    assert "4 stacked tensors of transformers are read as 60" in str(found)
    assert main(["recipes", "check", "qwen3-moe", str(qwen / "stacked")]) == 0
    assert "92 tensors, each under one rule" in capsys.readouterr().out


def change(written: Path, folder: Path, damage: Callable[[Tensors], None], **config: Any) -> Path:
    """The stacked model with other tensors, and other values in its config."""
    folder.mkdir(parents=True)
    tensors = read_tensors(written / "stacked")
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / MODEL, {"format": "pt"})
    told = json.loads((written / "stacked" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **config}))
    return folder


def refuse_plan(folder: Path, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(Refused) as refused:
        reshard.plan(folder, 2, **options)
    return [(problem.kind, problem.subject) for problem in refused.value.problems]


def mix(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.experts.0.gate_proj.weight"] = torch.zeros(24, 48, dtype=torch.bfloat16)


def quantize(tensors: Tensors) -> None:
    tensors[GATE_UP] = tensors[GATE_UP].to(torch.float8_e4m3fn)
    tensors[f"{GATE_UP}_scale_inv"] = torch.ones(10, 2, 1)


def shorten(tensors: Tensors) -> None:
    tensors[GATE_UP], tensors[DOWN] = tensors[GATE_UP][:9], tensors[DOWN][:9]


def narrow(tensors: Tensors) -> None:
    tensors[GATE_UP] = tensors[GATE_UP][:, :47]


def empty(tensors: Tensors) -> None:
    tensors[GATE_UP] = tensors[GATE_UP][:, :, :0]


def flatten(tensors: Tensors) -> None:
    tensors[GATE_UP] = tensors[GATE_UP].reshape(-1)


def lose_down(tensors: Tensors) -> None:
    del tensors[DOWN]


def lose_both(tensors: Tensors) -> None:
    del tensors[DOWN], tensors[GATE_UP]


def lose_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.2." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("damage", "kind", "subject"),
    [
        (mix, "fused-experts", "model.layers.2.mlp.experts.0.gate_proj.weight"),
        (quantize, "quantized", ""),
        (shorten, "wrong-shape", f"{MODEL}: {DOWN}"),
        (narrow, "wrong-shape", f"{MODEL}: {GATE_UP}"),
        (empty, "wrong-shape", f"{MODEL}: {GATE_UP}"),
        (flatten, "wrong-shape", f"{MODEL}: {GATE_UP}"),
        (lose_down, "missing-tensor", DOWN),
        (lose_both, "missing-tensor", GATE_UP),
        (lose_layer, "contradiction", "layers"),
    ],
)
def test_stacks_that_are_in_doubt_are_refused_by_name(
    damage: Callable[[Tensors], None], kind: str, subject: str, qwen: Path, tmp_path: Path
) -> None:
    folder = change(qwen, tmp_path / "source", damage)
    found = refuse_plan(folder)
    assert found[0] == (kind, subject or str(folder))
    assert {one for one, _ in found} == {kind}
    with pytest.raises(Refused) as refused:
        reshard.plan(folder, 2)
    assert not any("rank file" in problem.remedy for problem in refused.value.problems)
    assert not reshard.diff(folder, folder).only_a  # it can still be compared as it lies there
    with reshard.open(folder) as tensors:
        assert tensors.keys() >= {"model.norm.weight"}


def test_stacks_that_lack_are_one_problem_each_by_their_own_names(qwen: Path, tmp_path: Path) -> None:
    folder = change(qwen, tmp_path / "source", lose_both)
    assert refuse_plan(folder) == [("missing-tensor", GATE_UP), ("missing-tensor", DOWN)]
    for lost in ([GATE_UP], [GATE_UP, DOWN]):
        named = tmp_path / f"named-{len(lost)}"
        shutil.copytree(qwen / "stacked-parts", named)
        index = json.loads((named / "model.safetensors.index.json").read_text())
        files = [index["weight_map"].pop(name) for name in lost]
        (named / "model.safetensors.index.json").write_text(json.dumps(index))
        assert refuse_plan(named) == [("not-in-index", name) for name in lost]
        with pytest.raises(Refused, match=f'add "{GATE_UP}": "{files[0]}" to the weight_map'):
            reshard.plan(named, 2)


def test_another_number_of_experts_and_another_model_are_refused(qwen: Path, tmp_path: Path) -> None:
    more = change(qwen, tmp_path / "more", lambda _: None, num_experts=16)
    assert refuse_plan(more)[0] == ("wrong-shape", f"{MODEL}: model.layers.0.mlp.experts.down_proj")
    write_stacked_model(tmp_path / "v3", "deepseek-v3")
    other = change(tmp_path / "v3", tmp_path / "other", lambda _: None, model_type="kimi_k2", architectures=[])
    assert refuse_plan(other)[0][0] == "fused-experts"


def test_a_part_without_a_config_is_not_guessed_at(qwen: Path, tmp_path: Path) -> None:
    folder = change(qwen, tmp_path / "source", lose_down)
    (folder / "config.json").unlink()
    with pytest.raises(Refused, match=r"config\.json") as refused:
        reshard.plan(folder, 2)
    last = refused.value.problems[-1]
    assert (last.kind, last.subject, "by the recipe transformers-" in last.expected) == ("missing-tensor", DOWN, True)


def test_names_with_a_prefix_and_without_one_are_read(qwen: Path, tmp_path: Path) -> None:
    def wrap(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"module.{name}"] = tensors.pop(name)

    def unwrap(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    for word, damage in (("wrapped", wrap), ("bare", unwrap)):
        folder = change(qwen, tmp_path / word, damage)
        reshard.convert(folder, tmp_path / f"{word}-hub", to="hf")
        assert_same_tensors(tmp_path / f"{word}-hub", qwen / "hub")
        assert reshard.verify(tmp_path / f"{word}-hub", folder).is_proven
        with pytest.raises(Refused) as refused:
            reshard.verify(folder, qwen / "hub")
        (problem,) = refused.value.problems
        assert (problem.kind, "36 names" in problem.expected) == ("prefix", True)
        assert reshard.verify(tmp_path / f"{word}-hub", qwen / "hub").is_proven  # as the hint says


def test_quantized_experts_are_never_cast_without_their_scales(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "v3", SMALL_V3, 1)
    with pytest.raises(Refused) as refused:
        reshard.convert(tmp_path / "v3", tmp_path / "made", for_engine="transformers")
    (problem,) = refused.value.problems
    assert problem.kind == "quantized"
    command = problem.remedy.split(": ", 1)[1].split("; ")[0].replace("OTHER", str(tmp_path / "bf16"))
    assert main(shlex.split(command)[1:]) == 0
    found = reshard.convert(tmp_path / "bf16", tmp_path / "made", for_engine="transformers")
    assert "transformers' models have none" in str(found)  # MTP layers are dropped
    assert reshard.verify(tmp_path / "made", tmp_path / "bf16").is_proven


def test_a_tensor_read_from_another_place_is_a_problem(qwen: Path) -> None:
    stored, recipe, read = unstack_checkpoint(read_checkpoint(qwen / "stacked")) or pytest.fail("nothing is stacked")
    assert [*check_stacked_source(StackedSource(stored, recipe, read))] == []
    gate, up = (f"model.layers.2.mlp.experts.3.{name}.weight" for name in ("gate_proj", "up_proj"))
    one, other = read.tensors[gate], read.tensors[up]

    def check(**changed: Tensor) -> dict[str, tuple[str, str]]:
        tensors = {**read.tensors, **changed}
        lost = {name: tensor for name, tensor in tensors.items() if tensor.size}
        problems = [*check_stacked_source(StackedSource(stored, recipe, replace(read, tensors=lost)))]
        assert {problem.kind for problem in problems} <= {"wrong-place"}
        return {problem.subject: (problem.found, problem.expected) for problem in problems}

    assert check(**{gate: other._replace(name=gate), up: one._replace(name=up)}).keys() == {gate, up}
    assert check(**{gate: one._replace(offset=one.offset + 2)}).keys() == {gate}
    assert check(**{gate: one._replace(shape=one.shape[::-1])}).keys() == {gate}
    assert check(**{gate: one._replace(size=0)})[gate][0] == "not read"
    assert check(more=one._replace(name="more"))["more"][1] == "no tensor"


def test_verify_sees_a_byte_and_a_file_that_are_not_right(qwen: Path, tmp_path: Path) -> None:
    reshard.convert(qwen / "hub", tmp_path / "made", for_engine="transformers")
    place = next(one for one in read_checkpoint(tmp_path / "made").tensors.values() if one.name == GATE_UP)
    flip(tmp_path / "made" / MODEL, place.offset + place.size - 1)
    (problem,) = reshard.verify(tmp_path / "made", qwen / "hub").problems
    assert (problem.kind, problem.subject) == ("differs", f"{MODEL}: {GATE_UP}")
    assert problem.expected == "those of model.layers.2.mlp.experts.9.up_proj.weight"
    assert [one.kind for one in reshard.verify(tmp_path / "made").problems] == ["wrong-checksum"]
    assert main(["repair", str(tmp_path / "made"), "--source", str(qwen / "hub")]) == 0
    assert reshard.verify(tmp_path / "made", qwen / "stacked").is_proven
    shutil.copy(qwen / "hub" / MODEL, tmp_path / "made" / "other.safetensors")
    (problem,) = reshard.verify(tmp_path / "made", qwen / "hub").problems
    assert (problem.kind, problem.found) == ("extra-file", "a file that is not read")


def test_verify_sees_another_models_config_beside_stacks(qwen: Path, tmp_path: Path) -> None:
    def verify_with(folder: Path, **changes: Any) -> list[tuple[str, str]]:
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**told, **changes}))
        return [(one.kind, one.subject) for one in reshard.verify(folder, qwen / "hub").problems]

    reshard.convert(qwen / "hub", tmp_path / "made", for_engine="transformers")
    assert verify_with(tmp_path / "made", rope_theta=7) == [("wrong-config", "config.json: rope_theta")]
    shutil.copytree(qwen / "stacked", tmp_path / "saved")
    assert verify_with(tmp_path / "saved", transformers_version="6.0") == []  # what another program wrote has its own
    assert verify_with(tmp_path / "saved", vocab_size=95) == [("wrong-config", "config.json: vocab_size")]
    for folder in ("made", "saved"):
        (tmp_path / folder / "config.json").unlink()
        problems = reshard.verify(tmp_path / folder, qwen / "hub").problems
        assert [(one.kind, one.subject) for one in problems] == [("missing-file", "config.json")]


def test_verify_sees_what_parts_lack_and_have_twice(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen / "stacked-parts", tmp_path / "parts")
    paths = {one.name: path for path in (tmp_path / "parts").glob("*.safetensors") for one in read_header(path, 0)[1]}
    shutil.copy(paths[GATE_UP], tmp_path / "parts" / "zz.safetensors")
    kinds = {one.kind for one in reshard.verify(tmp_path / "parts", qwen / "hub").problems}
    assert kinds == {"tensor-twice", "wrong-index"}
    (tmp_path / "parts" / "zz.safetensors").unlink()
    paths[GATE_UP].unlink()
    problems = reshard.verify(tmp_path / "parts", qwen / "hub").problems
    (lost,) = [one for one in problems if (one.kind, one.subject) == ("missing-tensor", GATE_UP)]
    assert (lost.found, lost.expected) == ("in none of these files", "in one of them")


def test_a_changed_target_is_no_source(qwen: Path, tmp_path: Path) -> None:
    reshard.convert(qwen / "hub", tmp_path / "made", for_engine="transformers")
    shutil.copy(qwen / "hub" / MODEL, tmp_path / "made" / MODEL)
    assert reshard.plan(tmp_path / "made", 2).notes == ()  # hub files now, with a manifest of others
    flip(tmp_path / "made" / MODEL, -1)
    reshard.convert(qwen / "hub", tmp_path / "again", for_engine="transformers")
    flip(tmp_path / "again" / MODEL, -1)
    assert refuse_plan(tmp_path / "again")[0][0] == "wrong-checksum"


@pytest.mark.parametrize("options", [{}, {"for_engine": "vllm"}])
def test_stacks_are_verified_against_rank_files(options: dict[str, Any], qwen: Path, tmp_path: Path) -> None:
    reshard.convert(qwen / "hub", tmp_path / "ranks", mp=2, **options)
    reshard.convert(qwen / "hub", tmp_path / "made", for_engine="transformers")
    for folder in (tmp_path / "made", qwen / "stacked-parts"):
        report = reshard.verify(folder, tmp_path / "ranks")
        assert report.is_proven, report
    place = next(one for one in read_checkpoint(tmp_path / "made").tensors.values() if one.name == GATE_UP)
    flip(tmp_path / "made" / MODEL, place.offset + place.size - 1)
    (problem,) = reshard.verify(tmp_path / "made", tmp_path / "ranks").problems
    assert problem.kind == "differs"


def test_an_interrupted_run_goes_on(qwen: Path, tmp_path: Path) -> None:
    leave_unfinished(Job(qwen / "hub", 1, "transformers-qwen3-moe"), tmp_path / "made")
    assert "--for transformers" in str(reshard.inspect(tmp_path / "made")) or "--recipe" in str(
        reshard.inspect(tmp_path / "made")
    )
    found = reshard.convert(qwen / "hub", tmp_path / "made", for_engine="transformers")
    assert found.done
    assert found.done.resumed
    assert (tmp_path / "made" / MODEL).read_bytes() == (qwen / "stacked" / MODEL).read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--mp", "4"],
            "leave out --mp; rank files are made without --for transformers and --recipe transformers-qwen3-moe",
        ),
        (["--max-file-size", "1GB"], "the recipe transformers-qwen3-moe has one file"),
        (["--mp", "1", "--ranks", "0"], "--ranks: wrong option"),
        (["--to", "hf"], "leave out --to hf"),
        (["--recipe", "mixtral"], "wrong option"),
    ],
)
def test_options_that_do_not_suit_whole_files(
    options: list[str], said: str, qwen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(qwen / "hub"), "--for", "transformers", *options]) == 2
    assert said in capsys.readouterr().err


def test_plan_and_convert_need_no_number_of_ranks(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(qwen / "hub"), "--for", "transformers"]) == 0
    assert "1 whole file by the recipe transformers-qwen3-moe" in capsys.readouterr().out
    assert main(["convert", str(qwen / "hub"), str(tmp_path / "made"), "--for", "transformers"]) == 0
    shown = capsys.readouterr().out
    command = next(line for line in shown.splitlines() if "reshard verify" in line)
    assert main(shlex.split(command)[1:]) == 0
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "reshard.json", "tokenizer.json")
    }
    with pytest.raises(Refused, match="did you mean transformers"):
        reshard.plan(qwen / "hub", for_engine="transformer")


def test_rank_files_are_not_stacked_at_once(qwen: Path, tmp_path: Path) -> None:
    reshard.convert(qwen / "hub", tmp_path / "ranks", mp=2)
    with pytest.raises(Refused, match=r"first to=.hf."):
        reshard.convert(tmp_path / "ranks", tmp_path / "made", for_engine="transformers")


def test_a_recipe_of_ones_own_reads_its_right_side(qwen: Path, tmp_path: Path) -> None:
    text = Path(load_recipe("transformers-qwen3-moe").origin).read_text()
    own = tmp_path / "own.toml"
    own.write_text(text.replace("transformers-qwen3-moe", "own").replace("experts.gate_up_proj", "all.w13"))
    reshard.convert(qwen / "hub", tmp_path / "made", recipe=str(own))
    assert f"{GATE_UP.replace('experts.gate_up_proj', 'all.w13')}" in read_tensors(tmp_path / "made")
    reshard.convert(tmp_path / "made", tmp_path / "hub", to="hf", recipe=str(own))
    assert_same_tensors(tmp_path / "hub", qwen / "hub")
    assert reshard.verify(tmp_path / "made", qwen / "hub", recipe=str(own)).is_proven


def test_other_models_with_such_names_are_verified_without_a_config(tmp_path: Path) -> None:
    write_model(tmp_path / "gpt", "gpt-oss")
    (tmp_path / "gpt" / "config.json").unlink()
    reshard.convert(tmp_path / "gpt", tmp_path / "made", to="hf")
    assert reshard.verify(tmp_path / "made", tmp_path / "gpt").is_proven
    (tmp_path / "made" / "reshard.json").unlink()
    assert reshard.verify(tmp_path / "made", tmp_path / "gpt").is_proven


def test_a_named_recipe_takes_stacks_of_another_model_name_apart(qwen: Path, tmp_path: Path) -> None:
    source = change(qwen, tmp_path / "source", lambda _: None, model_type="our_moe", architectures=["OurMoe"])
    with pytest.raises(Refused):
        reshard.plan(source, 2)
    for recipe in ("qwen3-moe", "transformers-qwen3-moe", "vllm-qwen3-moe"):
        assert reshard.plan(source, 1, recipe=recipe).notes
    reshard.convert(source, tmp_path / "hub", to="hf", recipe="qwen3-moe")
    assert_same_tensors(tmp_path / "hub", qwen / "hub")
    assert reshard.verify(tmp_path / "hub", source, recipe="qwen3-moe").is_proven


def write_headers(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A file of BF16 tensors, all of them zeros that lie in a hole."""
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * prod(shape)]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / MODEL).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize(("members", "fewer", "most"), [(1 << 16, 0, 0), (400, 1, 0), (400, 0, 4 * 2 * 3 * 400)])
def test_stacks_of_no_model_are_not_split_in_vain(
    members: int, fewer: int, most: int, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, split = list[str](), fused_shards.split_fused

    def count(*arguments: Any) -> Iterator[fused_shards.PartShard]:
        for part in split(*arguments):
            made.append(part.name)
            yield part

    monkeypatch.setattr(fused_shards, "split_fused", count)
    shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(qwen / "stacked").items()}
    shapes |= {name: (members, 2, 1) for name in shapes if name.endswith("gate_up_proj")}
    shapes |= {name: (members - fewer, 1, 1) for name in shapes if name.endswith("experts.down_proj")}
    write_headers(tmp_path / "source", shapes)
    with pytest.raises(Refused):
        reshard.plan(tmp_path / "source", 2)
    assert len(made) <= most  # two recipes have all these names, and are asked once more for their reasons


def test_transposed_stacks_are_not_read_without_a_config(qwen: Path, tmp_path: Path) -> None:
    def transpose(tensors: Tensors) -> None:
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].transpose(1, 2).contiguous()

    folder = change(qwen, tmp_path / "source", transpose)
    (folder / "config.json").unlink()
    with pytest.raises(Refused) as refused:
        reshard.plan(folder, to="hf", recipe="qwen3-moe")
    assert (refused.value.problems[0].kind, "transposed" in refused.value.problems[0].remedy) == ("wrong-shape", True)
    with pytest.raises(Refused, match=r"config\.json"):
        reshard.plan(folder, to="hf")


def test_verify_sees_what_a_fault_of_reading_has_exchanged(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = fused_shards.split_fused

    def exchange(*arguments: Any) -> list[fused_shards.PartShard]:
        parts = list(split(*arguments))
        return [
            one._replace(shard=parts[place ^ 1].shard) if len(parts) % 2 == 0 and "down" not in one.name else one
            for place, one in enumerate(parts)
        ]

    monkeypatch.setattr(fused_shards, "split_fused", exchange)
    reshard.convert(qwen / "stacked", tmp_path / "hub", to="hf")
    report = reshard.verify(tmp_path / "hub", qwen / "stacked")
    assert {problem.kind for problem in report.problems} == {"wrong-place"}


def test_an_index_of_before_a_cast_does_not_come_back(qwen: Path, tmp_path: Path) -> None:
    shutil.copytree(qwen / "hub-parts", tmp_path / "wide")
    for path in (tmp_path / "wide").glob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    index = tmp_path / "wide" / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    known["metadata"]["total_size"] *= 2
    index.write_text(json.dumps(known))
    reshard.convert(tmp_path / "wide", tmp_path / "ranks", mp=2, cast="bf16")
    reshard.convert(tmp_path / "ranks", tmp_path / "back", to="hf")
    found = json.loads((tmp_path / "back" / index.name).read_text())
    assert found["metadata"]["total_size"] == known["metadata"]["total_size"] // 2
