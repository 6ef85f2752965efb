"""Experts cut within: all experts in every rank, a part of each; beside the recipes that assign whole experts."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensor_parallel
import torch
import transformers
from headers_by_recipe import make_headers
from jobs import Job, convert_checkpoint
from plain_shares import rewrite, share_with_cut_experts, tensors_of, write_mxfp4
from safetensors.torch import load_file, save_file
from small_models import write_model
from targets import leave_unfinished
from torch import Tensor

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.formats.manifest import Origin
from reshard.planning.rank_choices import list_rank_choices
from reshard.recipes.recipe import load_recipe
from reshard.sources.match import match
from reshard.sources.source import Source, read_source
from reshard.types import Layout

FAMILIES = ("mixtral", "qwen3-moe", "gpt-oss")
IDS = torch.tensor([[7, 1, 95, 33, 0, 64, 12, 12, 50], [3, 90, 2, 47, 48, 23, 24, 71, 72]])


def write_whole_blocks(folder: Path) -> None:
    """gpt-oss in MXFP4, with as many blocks of inner channels as 4 ranks share."""
    write_mxfp4(folder, intermediate_size=128)


def write_fp8(folder: Path) -> None:
    """Qwen3-MoE in FP8; the experts have two blocks of inner channels."""
    sizes: dict[str, Any] = {"hidden_size": 128, "head_dim": 64, "num_key_value_heads": 4, "moe_intermediate_size": 256}
    write_model(folder, "qwen3-moe", intermediate_size=512, num_experts=4, num_hidden_layers=2, **sizes)
    tensors = tensors_of(folder)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand([-(-size // 128) for size in tensors[name].shape])
    rewrite(folder, tensors, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})


WRITERS: Mapping[str, tuple[str, Callable[[Path], None]]] = {
    **{name: (name, lambda folder, name=name: write_model(folder, name)) for name in FAMILIES},  # type: ignore[misc]
    "mxfp4": ("gpt-oss", write_whole_blocks),
}


def recipe_of(family: str) -> str:
    return f"{family}-cut-experts"


def rank_name(rank: int, ranks: int) -> str:
    return f"model-rank{rank}-of-{ranks}.safetensors"


def require_shares(folder: Path, source: Path, ranks: int) -> None:
    """The files are those of a plain converter."""
    config, whole = json.loads((source / "config.json").read_text()), tensors_of(source)
    for rank in range(ranks):
        found = load_file(folder / rank_name(rank, ranks))
        assert found.keys() == whole.keys()
        for name, tensor in whole.items():
            wanted = share_with_cut_experts(name, tensor, config, rank, ranks)
            assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape), name
            assert torch.equal(found[name].view(torch.uint8), wanted.contiguous().view(torch.uint8)), name


def require_same_files(found: Path, wanted: Path) -> None:
    names = [path.name for path in wanted.iterdir() if path.suffix in (".safetensors", ".json")]
    assert names
    assert [name for name in names if (found / name).read_bytes() != (wanted / name).read_bytes()] == []


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("form", WRITERS)
def test_the_files_are_those_of_a_plain_converter_and_lead_back(form: str, ranks: int, tmp_path: Path) -> None:
    family, write = WRITERS[form]
    write(tmp_path / "source")
    convert_checkpoint(Job(tmp_path / "source", ranks, recipe=recipe_of(family)), tmp_path / "ranks")
    require_shares(tmp_path / "ranks", tmp_path / "source", ranks)
    report = reshard.verify(tmp_path / "ranks", tmp_path / "source")
    assert report.problems == ()
    assert report.compared == report.size > 0
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "back")
    require_same_files(tmp_path / "back", tmp_path / "source")
    assert reshard.verify(tmp_path / "back", tmp_path / "ranks").problems == ()


@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (4, 1)])
@pytest.mark.parametrize("form", WRITERS)
def test_ranks_of_one_number_become_those_of_another(form: str, first: int, second: int, tmp_path: Path) -> None:
    family, write = WRITERS[form]
    write(tmp_path / "source")
    convert_checkpoint(Job(tmp_path / "source", first, recipe=recipe_of(family)), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "ranks", second), tmp_path / "again")
    require_shares(tmp_path / "again", tmp_path / "source", second)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_block_scales_are_cut_with_experts_and_shared_by_ranks_inside_a_block(ranks: int, tmp_path: Path) -> None:
    """256 inner channels are two blocks: at 4 ranks two have the scales of one."""
    write_fp8(tmp_path / "source")
    convert_checkpoint(Job(tmp_path / "source", ranks, recipe=recipe_of("qwen3-moe")), tmp_path / "ranks")
    name = "model.layers.0.mlp.experts.3.{}_proj.weight_scale_inv"
    gate, down = (tensors_of(tmp_path / "source")[name.format(kind)] for kind in ("gate", "down"))
    for rank in range(ranks):
        found = load_file(tmp_path / "ranks" / rank_name(rank, ranks))
        blocks = slice(rank * 2 // ranks, max(rank * 2 // ranks + 1, (rank + 1) * 2 // ranks))
        assert torch.equal(found[name.format("gate")], gate[blocks])
        assert torch.equal(found[name.format("down")], down[:, blocks])
        assert found[name.format("gate").removesuffix("_scale_inv")].shape == (256 // ranks, 128)
    assert reshard.verify(tmp_path / "ranks", tmp_path / "source").problems == ()
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "back")
    require_same_files(tmp_path / "back", tmp_path / "source")


# --- what the rank files compute ---


def whole_logits(source: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def require_logits(folder: Path, ranks: int, wanted: Tensor) -> None:
    assert wanted.std() > 0.5
    for found in tensor_parallel.all_logits(folder, ranks, IDS):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_compute_what_the_whole_model_does(family: str, ranks: int, tmp_path: Path) -> None:
    write_model(tmp_path / "source", family)
    convert_checkpoint(Job(tmp_path / "source", ranks, recipe=recipe_of(family)), tmp_path / "ranks")
    require_logits(tmp_path / "ranks", ranks, whole_logits(tmp_path / "source"))


@pytest.mark.parametrize(("family", "key"), [("mixtral", "intermediate_size"), ("qwen3-moe", "moe_intermediate_size")])
def test_experts_widened_with_zeros_compute_the_same(family: str, key: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {key: 20}
    write_model(tmp_path / "source", family, **changes)
    recipe = recipe_of(family)
    with pytest.raises(Refused, match="or --pad"):
        convert_checkpoint(Job(tmp_path / "source", 8, recipe=recipe), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "source", 8, recipe=recipe, pad=True), tmp_path / "ranks")
    experts = [tensor.shape for name, tensor in tensors_of(tmp_path / "ranks").items() if ".experts.3." in name]
    assert set(experts) == {(3, 48), (48, 3)}  # 24 channels for 20
    require_logits(tmp_path / "ranks", 8, whole_logits(tmp_path / "source"))
    assert reshard.verify(tmp_path / "ranks", tmp_path / "source").problems == ()
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "back")
    require_same_files(tmp_path / "back", tmp_path / "source")


# --- the numbers of ranks ---


@pytest.mark.parametrize(
    ("family", "changes", "works"),
    [
        ("mixtral", {}, [1, 2, 4, 8]),  # 12 experts are not for 8 ranks, parts of them are
        ("qwen3-moe", {}, [1, 2, 4]),  # 20 inner channels
        ("gpt-oss", {}, [1, 2, 4, 8]),
        ("gpt-oss", {"intermediate_size": 46}, [1, 2]),  # at 4 ranks a pair of a gate and its channel would be cut
    ],
)
def test_the_numbers_of_ranks_that_work(family: str, changes: Any, works: list[int], tmp_path: Path) -> None:
    write_model(tmp_path / "source", family, **changes)
    source = read_source(tmp_path / "source", recipe_of(family))
    assert [choice.ranks for choice in list_rank_choices(source, Layout(0)) if not choice.needs_pad] == works
    with pytest.raises(Refused, match=f"--mp with one of {', '.join(map(str, works))}"):
        convert_checkpoint(Job(tmp_path / "source", 3, recipe=recipe_of(family)), tmp_path / "ranks")


def test_a_block_of_mxfp4_is_not_cut(tmp_path: Path) -> None:
    write_mxfp4(tmp_path / "source")
    with pytest.raises(Refused, match="3") as refused:
        convert_checkpoint(Job(tmp_path / "source", 2, recipe=recipe_of("gpt-oss")), tmp_path / "ranks")
    (problem,) = refused.value.problems
    assert (problem.kind, problem.remedy) == ("not-divisible", "--mp with one of 1")
    assert "down_proj_blocks" in problem.subject


def test_inner_channels_that_are_no_whole_blocks_of_mxfp4_are_refused(tmp_path: Path) -> None:
    """The last block would have other channels than the gates of its rank."""
    write_whole_blocks(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    tensors = tensors_of(tmp_path / "source")
    for name in [name for name in tensors if "experts.gate_up_proj" in name]:
        tensors[name] = tensors[name][:, :240].contiguous()
    rewrite(tmp_path / "source", tensors, **{**config, "intermediate_size": 120})
    assert reshard.plan(tmp_path / "source", mp=2)
    with pytest.raises(Refused, match="intermediate_size // 32"):
        convert_checkpoint(Job(tmp_path / "source", 2, recipe=recipe_of("gpt-oss")), tmp_path / "ranks")


# --- which recipe is taken ---


def strip_metadata(folder: Path) -> None:
    """Rank files as another program may write them: without a word of the recipe."""
    (folder / "reshard.json").unlink()
    for path in folder.glob("*.safetensors"):
        save_file(load_file(path), path)


def drop_manifest(folder: Path) -> None:
    (folder / "reshard.json").unlink()


@pytest.mark.parametrize("family", FAMILIES)
def test_nobody_gets_cut_experts_who_has_not_named_them(family: str, tmp_path: Path) -> None:
    write_model(tmp_path / "source", family)
    assert reshard.plan(tmp_path / "source", mp=2).recipe.name == family
    assert reshard.inspect(tmp_path / "source").recipe == family
    assert reshard.plan(tmp_path / "source", mp=2, recipe=recipe_of(family)).recipe.name == recipe_of(family)


@pytest.mark.parametrize("forget", [lambda _: None, drop_manifest, strip_metadata])
@pytest.mark.parametrize("ending", ["", "-cut-experts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rank_files_tell_their_recipe(family: str, ending: str, forget: Callable[[Path], None], tmp_path: Path) -> None:
    """By the manifest, by their metadata, by their shapes."""
    write_model(tmp_path / "source", family)
    convert_checkpoint(Job(tmp_path / "source", 2, recipe=f"{family}{ending}"), tmp_path / "ranks")
    forget(tmp_path / "ranks")
    assert read_source(tmp_path / "ranks").recipe.name == f"{family}{ending}"
    assert reshard.verify(tmp_path / "ranks", tmp_path / "source").problems == ()
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "back")
    found, wanted = tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source")
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert reshard.diff(tmp_path / "ranks", tmp_path / "source").is_same
    with reshard.open(tmp_path / "ranks") as opened:
        for name in [name for name in wanted if "experts" in name]:
            assert np.array_equal(opened[name][...], wanted[name].numpy()), name


def test_one_rank_without_a_word_is_of_the_usual_recipe(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "mixtral")
    convert_checkpoint(Job(tmp_path / "source", 1, recipe=recipe_of("mixtral")), tmp_path / "ranks")
    drop_manifest(tmp_path / "ranks")
    assert read_source(tmp_path / "ranks").recipe.name == recipe_of("mixtral")
    save_file(load_file(tmp_path / "ranks" / rank_name(0, 1)), tmp_path / "ranks" / rank_name(0, 1))
    assert read_source(tmp_path / "ranks").recipe.name == "mixtral"


def test_files_of_two_recipes_are_no_ranks_of_one_model(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "mixtral")
    convert_checkpoint(Job(tmp_path / "source", 4), tmp_path / "whole")
    convert_checkpoint(Job(tmp_path / "source", 4, recipe=recipe_of("mixtral")), tmp_path / "cut")
    drop_manifest(tmp_path / "cut")
    shutil.copy(tmp_path / "whole" / rank_name(1, 4), tmp_path / "cut")
    with pytest.raises(Refused) as refused:
        read_source(tmp_path / "cut")
    (problem,) = refused.value.problems
    assert (problem.kind, problem.subject) == ("wrong-ranks", rank_name(1, 4))
    assert "mixtral-cut-experts" in problem.expected


@pytest.mark.parametrize(("made", "asked"), [("", "-cut-experts"), ("-cut-experts", "")])
def test_one_way_of_cutting_leads_to_the_other_by_whole_files(made: str, asked: str, tmp_path: Path) -> None:
    write_model(tmp_path / "source", "mixtral")
    convert_checkpoint(Job(tmp_path / "source", 2, recipe=f"mixtral{made}"), tmp_path / "ranks")
    with pytest.raises(Refused) as refused:
        reshard.plan(tmp_path / "ranks", mp=4, recipe=f"mixtral{asked}")
    (problem,) = refused.value.problems
    assert (problem.kind, problem.subject) == ("wrong-option", "recipe")
    assert problem.remedy.startswith("leave out recipe; ")
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "whole")
    convert_checkpoint(Job(tmp_path / "whole", 4, recipe=f"mixtral{asked}"), tmp_path / "again")
    convert_checkpoint(Job(tmp_path / "source", 4, recipe=f"mixtral{asked}"), tmp_path / "wanted")
    for rank in range(4):
        name = rank_name(rank, 4)
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_damaged_rank_is_found_and_repaired(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "source", family)
    convert_checkpoint(Job(tmp_path / "source", 2, recipe=recipe_of(family)), tmp_path / "ranks")
    path = tmp_path / "ranks" / rank_name(1, 2)
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert main(["verify", str(tmp_path / "ranks"), "--source", str(tmp_path / "source")]) == 1
    reshard.repair(tmp_path / "ranks", tmp_path / "source")
    assert path.read_bytes() == sound
    assert main(["verify", str(tmp_path / "ranks"), "--source", str(tmp_path / "source")]) == 0
    assert "proven" in capsys.readouterr().out


def test_a_rank_is_loaded_without_files(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "gpt-oss")
    config, whole = json.loads((tmp_path / "source" / "config.json").read_text()), tensors_of(tmp_path / "source")
    loaded = reshard.load(tmp_path / "source", rank=1, mp=2, recipe=recipe_of("gpt-oss"))
    for name, tensor in whole.items():
        assert np.array_equal(loaded[name], share_with_cut_experts(name, tensor, config, 1, 2).numpy()), name


def test_the_list_of_recipes_says_how_they_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list"]) == 0
    lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("mixtral-cut-experts")]
    assert len(lines) == 1
    assert lines[0].endswith("; chosen by its name")


# --- the commands that are printed ---


def test_parts_made_apart_and_unfinished_runs_tell_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "source", "mixtral")
    words = ["convert", str(tmp_path / "source"), "--mp", "2", "--recipe", recipe_of("mixtral")]
    for rank in range(2):
        assert main([*words, str(tmp_path / f"part{rank}"), "--ranks", str(rank)]) == 0
    shutil.copytree(tmp_path / "part1", tmp_path / "part0", dirs_exist_ok=True)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "part0")]) == 1
    command = re.search(
        r"reshard (convert SOURCE \S*part0 --mp 2 --recipe mixtral-cut-experts)", capsys.readouterr().out
    )
    assert command
    assert main(shlex.split(command[1].replace("SOURCE", str(tmp_path / "source")))) == 0
    require_shares(tmp_path / "part0", tmp_path / "source", 2)
    leave_unfinished(Job(tmp_path / "source", 2, recipe_of("mixtral")), tmp_path / "begun")
    found = reshard.inspect(tmp_path / "begun").unfinished
    assert found is not None
    assert "--mp 2 --recipe mixtral-cut-experts" in found.command


# --- published sizes ---

MIXTRAL = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32_000, "num_local_experts": 8}  # fmt: skip
QWEN3 = {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151_936,
         "num_experts": 128}  # fmt: skip
GPT_OSS = {"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201_088, "num_local_experts": 32,
           "attention_bias": True}  # fmt: skip
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}
LARGE = {"hidden_size": 4096, "intermediate_size": 12_288, "moe_intermediate_size": 1536, "num_attention_heads": 64}

PUBLISHED: Mapping[str, tuple[Mapping[str, Any], Sequence[int], Sequence[int]]] = {
    "mixtral-8x7b": (MIXTRAL, [1, 2, 4, 8, 16, 32], []),
    "mixtral-8x22b": ({**MIXTRAL, "hidden_size": 6144, "intermediate_size": 16_384, "num_attention_heads": 48},
                      [1, 2, 4, 8, 16], []),
    "qwen3-30b-a3b": (QWEN3, [1, 2, 4, 8, 16, 32], []),
    "qwen3-30b-a3b-fp8": ({**QWEN3, **FP8}, [1, 2], [4, 8, 16, 32]),
    "qwen3-235b-a22b": ({**QWEN3, **LARGE}, [1, 2, 4, 8, 16, 32, 64], []),
    "qwen3-235b-a22b-fp8": ({**QWEN3, **LARGE, **FP8}, [1, 2, 4], [8, 16, 32, 64]),
    "gpt-oss-20b": ({**GPT_OSS, **MXFP4}, [1, 2], []),
    "gpt-oss-20b-bf16": (GPT_OSS, [1, 2, 4, 8, 16, 32, 64], []),
}  # fmt: skip
"""By the sizes of published models, with one layer: the powers of two that work, and those that need `--pad`."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ranks_that_published_sizes_allow(name: str) -> None:
    sizes, works, padded = PUBLISHED[name]
    config = {**sizes, "num_hidden_layers": 1}
    recipe = load_recipe(recipe_of(config["model_type"].replace("_", "-")))
    checkpoint = make_headers(recipe, config)
    source = Source(checkpoint.folder, checkpoint, recipe, match(checkpoint, recipe), Origin())
    found = list_rank_choices(source, Layout(0))
    powers = [choice for choice in found if choice.ranks & (choice.ranks - 1) == 0]
    assert [choice.ranks for choice in powers if not choice.needs_pad] == works
    assert [choice.ranks for choice in powers if choice.needs_pad] == padded
