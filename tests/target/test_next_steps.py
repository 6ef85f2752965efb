"""What a conversion says is to be done next: the commands are run as they are printed."""

import json
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from families import write_small
from inference_code import GENERATE
from small_models import write_model
from stacked_models import read_tensors
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from transformers import AutoModelForCausalLM

import reshard
from reshard.cli.main import main
from reshard.execution.staging import STAGING
from reshard.formats.target_names import JOURNAL
from reshard.recipes.recipe import load_recipe
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.target.engines import count_ranks_per_node
from reshard.target.next_steps import make_rank_patterns


def steps_of(text: str) -> dict[str, str]:
    """What each step is -> its command, from the end of a summary."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line == "next:")
    titles, commands = lines[first::2], lines[first + 1 :: 2]
    assert all(command.startswith("  ") for command in commands)
    return {title.removesuffix(":"): command.strip() for title, command in zip(titles, commands, strict=True)}


def convert(capsys: pytest.CaptureFixture[str], source: Path, target: Path, *options: str) -> dict[str, str]:
    capsys.readouterr()
    assert main(["convert", str(source), str(target), *options]) == 0
    return steps_of(capsys.readouterr().out)


def copy_by(command: str, node: Path, target: Path) -> None:
    """Runs the printed command with a folder of this machine in the place of a node; without rsync copies what its
    patterns choose.
    """
    *words, source, where = shlex.split(command)
    assert (source, where) == (f"{target}/", f"NODE:{target}/")
    node.mkdir()
    if shutil.which("rsync"):
        subprocess.run([*words, source, f"{node}/"], check=True)
        return
    includes = [word.removeprefix("--include=/") for word in words if word.startswith("--include=")]
    excludes = [word.removeprefix("--exclude=") for word in words if word.startswith("--exclude=")]
    for path in target.iterdir():
        if any(fnmatchcase(path.name, one) for one in includes) or not any(
            fnmatchcase(path.name, one) for one in excludes
        ):
            shutil.copy(path, node)


@pytest.mark.parametrize("name", ["target", "a target; of $HOME's"])
@pytest.mark.parametrize(("ranks", "chosen"), [(2, [1]), (4, [2, 3])])
def test_the_copy_has_its_ranks_and_is_proven_where_it_lies(
    name: str, ranks: int, chosen: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "source", SMALL_V3, 2)
    target = tmp_path / name
    steps = convert(capsys, tmp_path / "source", target, "--mp", str(ranks))
    (copy,) = [command for what, command in steps.items() if "copy rank" in what]
    (target / STAGING).mkdir()  # of a job that has not ended, no node needs anything
    for left in (f"{STAGING}/model1-mp{ranks}.safetensors.partial", "tokenizer.json.partial", JOURNAL):
        (target / left).write_text("begun", encoding="utf-8")
    copy_by(copy, tmp_path / "node", target)
    beside = {path.name for path in target.iterdir() if path.suffix == ".json"}
    assert {"run_config.json", "reshard.json", "tokenizer.json"} <= beside
    found = {path.name for path in (tmp_path / "node").iterdir()}
    assert found == beside | {f"model{rank}-mp{ranks}.safetensors" for rank in chosen}
    # On another node the folder has the same path.
    shutil.rmtree(target)
    (tmp_path / "node").rename(target)
    assert main(shlex.split(steps["verify there"])[1:]) == 0
    assert f"{len(chosen)} of {ranks} rank files" in capsys.readouterr().out
    damaged = target / f"model{chosen[0]}-mp{ranks}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert main(shlex.split(steps["verify there"])[1:]) == 1


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 1), (4, 7), (8, 15), (8, 9), (24, 31), (10, 19), (95, 110)])
def test_patterns_match_the_chosen_ranks_only(first: int, last: int) -> None:
    for name in ("deepseek-v3", "llama"):
        recipe = load_recipe(name)
        patterns = make_rank_patterns(recipe, 128, range(first, last + 1))
        names = {rank: recipe.files.format(rank=rank, ranks=128) for rank in range(128)}
        found = [rank for rank, file in names.items() if any(fnmatchcase(file, pattern) for pattern in patterns)]
        assert found == [*range(first, last + 1)]


def test_nodes_have_at_most_eight_ranks_each() -> None:
    found = {ranks: count_ranks_per_node(ranks) for ranks in (1, 2, 7, 8, 12, 13, 16, 32, 64)}
    assert found == {1: 1, 2: 2, 7: 7, 8: 8, 12: 6, 13: 1, 16: 8, 32: 8, 64: 8}


def test_the_start_runs_the_code_beside_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a source"
    write_checkpoint(source, SMALL_V3, 2)
    (source / "inference").mkdir()
    (source / "inference" / "generate.py").write_text(GENERATE)
    steps = convert(capsys, source, tmp_path / "a target", "--mp", "2")
    torchrun = f"{shlex.quote(sys.executable)} -m torch.distributed.run --standalone"
    command = steps["start on one node"].replace("torchrun", torchrun)
    subprocess.run(["bash", "-c", command], check=True, cwd="/", capture_output=True, timeout=300)
    assert sorted(path.name for path in (source / "inference").glob("ran-*")) == ["ran-0", "ran-1"]


def test_where_the_code_is_not_beside_the_source_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**SMALL_V3, "num_attention_heads": 32, "intermediate_size": 2048, "moe_intermediate_size": 128}
    write_checkpoint(tmp_path / "source", {**config, "num_hidden_layers": 2, "q_lora_rank": 128}, 2)
    target = tmp_path / "target"
    steps = convert(capsys, tmp_path / "source", target, "--mp", "16")
    assert len(steps) == 4
    where = "start on 2 nodes ($RANK from 0 on, $ADDR of the first), in the folder inference of DeepSeek-V3"
    assert steps[where] == (
        "torchrun --nnodes 2 --nproc-per-node 8 --node-rank $RANK --master-addr $ADDR generate.py "
        f"--ckpt-path {target} --config {target}/run_config.json --interactive"
    )
    assert "copy ranks 8-15 to another node" in steps


def test_some_ranks_are_started_where_a_node_has_all_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "source", SMALL_V3, 2)
    source, half = tmp_path / "source", tmp_path / "half"
    steps = convert(capsys, source, half, "--mp", "4", "--ranks", "0-1")
    where = "start on 2 nodes ($RANK from 0 on, $ADDR of the first), in the folder inference of DeepSeek-V3"
    join = "when the other parts are copied into this folder"
    assert [*steps] == ["next", join, where]
    assert " --nnodes 2 --nproc-per-node 2 " in steps[where]
    assert steps["next"] == f"reshard verify {half} --source {source} --ranks 0-1"
    assert main(shlex.split(steps["next"])[1:]) == 0
    # Ranks 1 and 2 are not all of a node.
    assert [*convert(capsys, source, tmp_path / "middle", "--mp", "4", "--ranks", "1-2")] == ["next", join]
    convert(capsys, source, tmp_path / "rest", "--mp", "4", "--ranks", "2-3")
    shutil.copytree(tmp_path / "rest", half, dirs_exist_ok=True)
    capsys.readouterr()
    assert main(shlex.split(steps[join])[1:]) == 0
    told = steps_of(capsys.readouterr().out)
    assert "start on one node, in the folder inference of DeepSeek-V3" in told
    assert main(["verify", str(half)]) == 0


def test_both_ways_to_start_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "source", SMALL_V3, 2)
    steps = convert(capsys, tmp_path / "source", tmp_path / "target", "--mp", "4")
    one, *other = [*steps][1:]
    assert one.startswith("start on one node")
    assert "--nproc-per-node 4 " in steps[one]
    assert other[:2] == ["or copy ranks 2-3 to another node", "verify there"]
    assert "--nnodes 2 --nproc-per-node 2 " in steps[other[2]]


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"model_type": "kimi_k2"}, ["--mp", "2"]),
        ({}, ["--mp", "2", "--mtp", "keep"]),
        ({}, ["--to", "hf", "--cast", "fp8"]),
    ],
)
def test_no_start_is_said_where_no_engine_is_known(
    change: dict[str, Any], options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "source", SMALL_V3, 2)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    if "fp8" in options:
        assert main(["convert", str(tmp_path / "source"), str(tmp_path / "bf16"), "--to", "hf", "--cast", "bf16"]) == 0
    source = tmp_path / ("bf16" if "fp8" in options else "source")
    steps = convert(capsys, source, tmp_path / "target", *options)
    assert [what for what in steps if what.startswith(("start", "try"))] == []


@pytest.mark.parametrize("family", ["glm-5.1", "deepseek-v4-flash-0731"])
def test_families_without_a_known_engine_have_no_start(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_small(tmp_path / "source", family)
    assert [*convert(capsys, tmp_path / "source", tmp_path / "target", "--mp", "1")] == ["next"]


def test_whole_files_and_plain_rank_files_have_readers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "source", "llama")
    whole = convert(capsys, tmp_path / "source", tmp_path / "whole", "--to", "hf")
    assert whole["start"] == f"vllm serve {tmp_path / 'whole'}"
    (tmp_path / "source" / "tokenizer.json").unlink()
    steps = convert(capsys, tmp_path / "source", tmp_path / "ranks", "--mp", "2")
    command = steps["try"].replace("torchrun", f"{shlex.quote(sys.executable)} -m torch.distributed.run --standalone")
    done = subprocess.run(["bash", "-c", command], check=True, cwd="/", capture_output=True, text=True, timeout=300)
    assert "generated: [" in done.stdout
    (tmp_path / "source" / "config.json").unlink()
    steps = convert(capsys, tmp_path / "source", tmp_path / "bare", "--to", "hf", "--recipe", "llama")
    assert [*steps] == ["next"]


def test_slices_are_loaded_by_the_lines_that_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "source", "llama")
    target = tmp_path / 'a "target"'
    steps = convert(capsys, tmp_path / "source", target, "--to", "dcp", "--ranks", "2")
    whole = read_tensors(tmp_path / "source")
    with_transformers, with_torch = (command for what, command in steps.items() if what.startswith("load"))
    model = eval(with_transformers, {"AutoModelForCausalLM": AutoModelForCausalLM})  # noqa: S307
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    state = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    known = {"dcp": dcp, "HuggingFaceStorageReader": HuggingFaceStorageReader, "state": state}
    eval(with_torch, known)  # noqa: S307
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(("family", "loaders"), [("deepseek-v3", ["torch"]), ("deepseek-v4-flash", [])])
def test_a_loader_that_does_not_read_slices_is_not_named(
    family: str, loaders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_small(tmp_path / "source", family)
    steps = convert(capsys, tmp_path / "source", tmp_path / "target", "--to", "dcp", "--ranks", "2")
    assert [what.split(",")[0] for what in steps] == ["next", *(f"load with {one}" for one in loaders)]
    some = convert(capsys, tmp_path / "source", tmp_path / "some", "--to", "dcp", "--mp", "2", "--ranks", "0")
    assert not any(what.startswith("load") for what in some)


def test_rank_files_for_vllm_are_started_by_vllm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "source", "llama")
    steps = convert(capsys, tmp_path / "source", tmp_path / "target", "--tp", "2", "--for", "vllm")
    wanted = f"vllm serve {tmp_path}/target --load-format sharded_state --tensor-parallel-size 2"
    assert steps["start"] == wanted
    steps = convert(capsys, tmp_path / "target", tmp_path / "back", "--to", "hf")
    assert steps["start"] == f"vllm serve {tmp_path}/back"


def test_json_has_the_same_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "source", SMALL_V3, 2)
    steps = convert(capsys, tmp_path / "source", tmp_path / "target", "--mp", "2")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "target"), "--mp", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["next"]
    assert {step["text"]: step["command"] for step in told} == steps
    assert [step["does"] for step in told] == ["verify", "start", "copy", "verify-copy", "start"]


def test_relative_paths_are_told_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "source", SMALL_V3, 2)
    shutil.copy(Path(reshard.__file__).parent / "recipes/families/deepseek-v3.toml", tmp_path / "own.toml")
    monkeypatch.chdir(tmp_path)
    steps = convert(capsys, Path("source"), Path("target"), "--mp", "2", "--recipe", "own.toml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(shlex.split(steps["next"])[1:]) == 0
