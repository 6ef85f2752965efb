"""Training checkpoints that are not read, or not all of them: what the refusal names, and whether its way on works.

A Llama of three layers, saved by torch from one process.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_state

import reshard
from reshard.cli.main import main
from reshard.errors import Refused

CONFIG = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 4,
          "num_key_value_heads": 2, "vocab_size": 64, "tie_word_embeddings": False, "num_hidden_layers": 3}  # fmt: skip
LAYER = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (32, 16),
    "mlp.up_proj": (32, 16),
    "mlp.down_proj": (16, 32),
    "input_layernorm": (16,),
    "post_attention_layernorm": (16,),
}
BODY, HEAD = "model.", "lm_head.weight"


def make_llama(seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of the model, under the names of the hub."""
    shapes = {"model.embed_tokens.weight": (64, 16), "model.norm.weight": (16,), HEAD: (64, 16)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(3) for name, shape in LAYER.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_body(seed: int = 0) -> dict[str, torch.Tensor]:
    """The same without the head, as the inner model of transformers names them."""
    return {name.removeprefix(BODY): tensor for name, tensor in make_llama(seed).items() if name != HEAD}


def save(folder: Path, state: dict[str, Any]) -> Path:
    save_state(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


def save_slices(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> Path:
    """Saves rows as torch's slices, a file a shard."""
    folder.mkdir()
    for shard in range(shards):
        part = {name: tensor.chunk(shards)[shard].clone() for name, tensor in tensors.items()}
        begin = {name: [shard * len(rows), *[0] * (rows.dim() - 1)] for name, rows in part.items()}
        said = json.dumps({name: {"saved_offsets": offsets} for name, offsets in begin.items()})
        name = f"shard-{shard + 1:05}-model-00001-of-00001.safetensors"
        save_file(part, folder / name, {"DCP_SHARDING_INFO": said, "DCP_VERSION": "1.0"})
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of the same model with its config."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(make_llama(), folder / "model.safetensors")
    return folder


def refuse(source: Path, base: Path | None = None) -> Refused:
    with pytest.raises(Refused) as error:
        reshard.plan(source, to="hf", config=base)
    return error.value


def require_converted(source: Path, base: Path, target: Path, seed: int = 0) -> None:
    """Converts a source and compares it with the model."""
    reshard.convert(source, target, to="hf", config=base)
    found, wanted = load_file(target / "model.safetensors"), make_llama(seed)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


# Beside the model.


def test_a_head_beside_the_mapping_of_the_model_is_taken(base: Path, tmp_path: Path) -> None:
    tensors = make_llama()
    optimizer = {"state": {"lm_head.weight.exp_avg": torch.ones(3)}}
    state = {"model": make_body(), "lm_head": {"weight": tensors[HEAD]}, "optimizer": optimizer, "step": 3}
    require_converted(save(tmp_path / "source", state), base, tmp_path / "target")


def test_a_missing_tensor_names_those_left_aside(base: Path, tmp_path: Path) -> None:
    state = {"model": make_body(), "value_head": {"weight": make_llama()[HEAD]}}
    refused = refuse(save(tmp_path / "source", state), base)
    assert [(problem.kind, problem.subject) for problem in refused.problems] == [("missing-tensor", HEAD)]
    assert "value_head.weight" in refused.problems[0].found
    assert refused.problems[0].remedy.startswith("is the config another model's? else: is it one of those?")
    assert "one mapping" in refused.problems[0].remedy
    assert "tie_word_embeddings" not in str(refused)
    assert "one mapping" in reshard.inspect(tmp_path / "source", config=base).remark


@pytest.mark.parametrize("mapping", ["model", ""])
def test_counters_are_no_weights(mapping: str, base: Path, tmp_path: Path) -> None:
    """Scripts save them as tensors. A config of another model is not blamed on them."""
    counters = {name: torch.tensor(3) for name in ("step", "global_step", "epoch", "iteration")}
    weights = {mapping: make_llama()} if mapping else make_llama()
    source = save(tmp_path / "source", {**weights, **counters})
    (note,) = [note for note in reshard.inspect(source).notes if "left aside" in note.text]
    assert note.kind == "left-aside"
    assert "4 tensors beside the weights" in note.text
    require_converted(source, base, tmp_path / "target")

    (base / "config.json").write_text(json.dumps({**CONFIG, "model_type": "qwen2"}))
    refused = refuse(source, base)
    assert {problem.kind for problem in refused.problems} == {"missing-tensor"}
    assert "the config another model's?" in refused.problems[0].remedy
    assert "step" not in str(refused)


def test_averaged_weights_are_taken_out_by_torch(base: Path, tmp_path: Path) -> None:
    """As docs/convert.md has it."""
    source = save(tmp_path / "source", {"model": make_llama(), "ema": make_llama(1)})
    require_converted(source, base, tmp_path / "model")
    assert "ema.model" in next(note.text for note in reshard.inspect(source).notes if note.kind == "beside-model")
    dcp_to_torch_save(source, tmp_path / "all.pt")
    state = torch.load(tmp_path / "all.pt", mmap=True)
    torch.save({"model": state["ema"]}, tmp_path / "ema.pt")
    torch_save_to_dcp(tmp_path / "ema.pt", tmp_path / "averaged")
    require_converted(tmp_path / "averaged", base, tmp_path / "ema", seed=1)


def test_distcp_files_beside_whole_ones_are_noted(base: Path, tmp_path: Path) -> None:
    save(base, {"model": make_llama(1)})
    for notes in (reshard.inspect(base).notes, reshard.plan(base, 2).notes):
        assert any("__0_0.distcp" in note.text for note in notes if note.kind == "left-aside")
    require_converted(base, base, tmp_path / "target")


# Paths.


def test_metadata_as_a_path_names_its_folder(tmp_path: Path) -> None:
    source = save(tmp_path / "source", {"model": make_llama()})
    for path in (source / ".metadata", source / "__0_0.distcp"):
        assert refuse(path).problems[0].remedy.endswith(f"name {source}")


@pytest.mark.parametrize("above", ["", "run/checkpoints"])
@pytest.mark.parametrize("inner", ["", "pytorch_model_fsdp_0"])
def test_all_steps_of_a_training_are_named(above: str, inner: str, tmp_path: Path) -> None:
    """From three levels above too; but none that is not whole, and no optimizer."""
    if above and inner:
        above = "run"
    numbers = range(100, 1300, 100)
    beside = [f"step_1100/{inner and 'optimizer_0'}", "step_1200/" + inner]
    for name in [*(f"step_{number}/{inner}" for number in numbers), *beside]:
        folder = tmp_path / above / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__0_0.distcp").touch()
        (folder / ".metadata").touch()
    (tmp_path / above / "step_1200" / inner / ".metadata").unlink()
    (problem,) = refuse(tmp_path).problems
    shown = ", ".join(str(tmp_path / above / f"step_{number}" / inner) for number in numbers[:10])
    assert problem.remedy == f"name one of them: {shown} and 1 more"


def test_a_part_as_a_path_is_told_what_is_read(tmp_path: Path) -> None:
    source = save(tmp_path / "source", {"model": make_llama()})
    assert "distributed checkpoint" in refuse(source / "__0_0.distcp").problems[0].expected


# What lacks, and what lies otherwise.


def test_the_last_slice_may_be_missing(base: Path, tmp_path: Path) -> None:
    source = save_slices(tmp_path / "source", make_llama(), 4)
    require_converted(source, base, tmp_path / "target")
    (source / "shard-00004-model-00001-of-00001.safetensors").unlink()
    problems = refuse(source, base).problems
    assert {problem.kind for problem in problems} == {"wrong-shape"}
    assert all("shard-00005" not in problem.remedy for problem in problems)
    assert all(problem.remedy.startswith("is shard-00004-* missing?") for problem in problems)


def test_a_transposed_tensor_is_saved_in_rows_by_torch(base: Path, tmp_path: Path) -> None:
    """By the commands of the hint."""
    tensors = make_llama()
    tensors[HEAD] = tensors[HEAD].t().contiguous().t()
    source = save(tmp_path / "source", {"model": tensors})
    (problem,) = refuse(source, base).problems
    assert problem.kind == "not-contiguous"
    assert "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER all.pt" in problem.remedy
    dcp_to_torch_save(source, tmp_path / "all.pt")
    torch_save_to_dcp(tmp_path / "all.pt", tmp_path / "new")
    require_converted(tmp_path / "new", base, tmp_path / "target")


# Megatron.


def test_megatron_is_named(base: Path, tmp_path: Path) -> None:
    """Layers lie in one tensor, `torch_dist` has objects beside them."""
    names = {
        "embedding.word_embeddings.weight": (64, 16),
        "decoder.layers.self_attention.linear_qkv.weight": (3, 32, 16),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (3, 16),
        "decoder.layers.self_attention.linear_proj.weight": (3, 16, 16),
        "decoder.layers.mlp.linear_fc1.weight": (3, 64, 16),
        "decoder.layers.mlp.linear_fc2.weight": (3, 16, 32),
        "decoder.final_layernorm.weight": (16,),
        "output_layer.weight": (64, 16),
    }
    state: dict[str, Any] = {name: torch.ones(shape) for name, shape in names.items()}
    state |= {f"optimizer.state.exp_avg.{name}": torch.ones(shape) for name, shape in names.items()}
    state["decoder.layers.mlp.linear_fc1._extra_state/shard_0_3"] = b"an object"
    source = save(tmp_path / "iter_0000100", state)
    for config in (base, None):
        (problem,) = refuse(source, config).problems
        assert (problem.kind, problem.subject) == ("other-format", str(source))
        assert "Megatron" in problem.found
        assert "Megatron Bridge" in problem.remedy
    with reshard.open(source) as opened:
        assert sorted(opened) == sorted(names)
    content = reshard.inspect(source)
    assert content.notes[0].text.startswith("left aside: 8 tensors beside the weights")
    assert "Megatron Bridge" in content.remark
    own = tmp_path / "own.toml"
    own.write_text(
        'name = "own"\nabout = "a part"\nleft = "one"\nright = "other"\nfiles = "{rank}-{ranks}.safetensors"\n'
        'rules = [["same", "output_layer.weight", "head", "rows"]]\n'
    )
    with pytest.raises(Refused) as error:
        reshard.plan(source, 2, recipe=str(own))
    assert {problem.kind for problem in error.value.problems} == {"no-rule"}


# A config of another folder, for `open` and `diff`.


def test_open_and_diff_take_a_config(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks, source = tmp_path / "ranks", save(tmp_path / "source", {"model": make_llama()})
    reshard.convert(base, ranks, 2)
    for name in ("config.json", "reshard.json"):
        (ranks / name).unlink()
    with reshard.open(ranks, config=base) as opened:
        assert torch.equal(opened[HEAD][:], make_llama()[HEAD])
    assert reshard.diff(ranks, source, config=base).is_same
    assert main(["diff", str(ranks), str(base), "--config", str(base)]) == 0
    assert "rank files by the recipe llama" in capsys.readouterr().out
    for run in (
        lambda: reshard.diff(base, base, config=base),
        lambda: reshard.open(base / "model.safetensors", config=base),
    ):
        with pytest.raises(Refused) as error:
            run()
        assert [problem.subject for problem in error.value.problems] == ["config"]
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (other / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 8}))
    with pytest.raises(Refused, match="other things than"):
        reshard.open(base, config=other)


def test_diff_takes_the_first_of_parts_that_are_stored_twice(base: Path, tmp_path: Path) -> None:
    source = save_slices(tmp_path / "source", make_llama(), 2)
    again = source / "shard-00003-model-00001-of-00001.safetensors"
    shutil.copy2(source / "shard-00001-model-00001-of-00001.safetensors", again)
    content = np.fromfile(again, np.uint8)
    content[-1] ^= 1
    again.write_bytes(content.tobytes())
    with pytest.raises(Refused, match="replicas differ"):
        reshard.diff(source, base)
    assert reshard.diff(source, base, replicas="first").is_same
    with pytest.raises(Refused, match="distributed checkpoint"):
        reshard.diff(base, base, replicas="first")
