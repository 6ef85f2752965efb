"""`--cast bf16` of F32 and F16 tensors, in rank files and whole files: against torch, what it leaves, what proves it.

The sources are written with the safetensors package. What is right is told by the same conversion of a source that
torch has rounded before, or by torch itself.
"""

import json
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from families import write_small
from jobs import Job, convert_checkpoint, plan_conversion
from oracle_casts import dequantize
from safetensors.torch import load_file, save_file
from small_models import write_model
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.execute import Settings
from reshard.verification.report import Report

BIAS = "e_score_correction_bias"
V4_STAYS = r"norm\.weight$|hc_|attn_sink$|compressor\.|gate\.bias$|^head\."
V41_STAYS = r"vision.*norm|hc_|attn_sink$|compressor\.w|gate\.bias|^head\.|markov_head\.head|confidence_head"
STAYS = {
    "deepseek-v3.2": rf"norm\.(weight|bias)$|^lm_head|indexer\.weights_proj|{BIAS}",
    "deepseek-v4-flash": V4_STAYS,
    "deepseek-v4-flash-0731": rf"{V4_STAYS}|markov_w2|confidence_head",
    "deepseek-v4-flash-vision": rf"{V4_STAYS}|markov_w2|confidence_head|gate\.bias_vl$|vision.*norm",
    "deepseek-v4.1-flash": V41_STAYS,
    "glm-5.1-fp8": BIAS,
}
"""By family, the names of the source that its code (or the published checkpoint) has in F32."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def edit(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Writes every tensor of a checkpoint anew, where it is."""
    for path in folder.glob("*.safetensors"):
        tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})


def round_by_torch(name: str, tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.dtype in (torch.float32, torch.float16) and BIAS not in name else tensor


def widen(_: str, tensor: Tensor) -> Tensor:
    """Values that BF16 has not, of a tensor that has none of a block scale."""
    return tensor.float() * 1.0009765625 if tensor.dtype == torch.bfloat16 else tensor


def require_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name].dtype != wanted[name].dtype] == []
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def verify(target: Path, source: Path, sample: Fraction | None = None) -> Report:
    report = reshard.verify(target, source, sample=sample)
    assert isinstance(report, Report)
    return report


@pytest.fixture(scope="module", params=["llama-biased", "mistral", "qwen3-moe", "mixtral", "glm4-moe", "gpt-oss"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of F32, as transformers writes it."""
    folder: Path = tmp_path_factory.mktemp("models") / request.param
    write_model(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def rounded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, rounded by torch."""
    folder = tmp_path_factory.mktemp("rounded") / model.name
    shutil.copytree(model, folder)
    edit(folder, round_by_torch)
    return folder


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_of_a_model_of_f32_are_those_of_one_that_torch_rounded(
    ranks: int, model: Path, rounded: Path, tmp_path: Path
) -> None:
    convert_checkpoint(Job(model, ranks, cast="bf16"), tmp_path / "found", Settings(jobs=2))
    convert_checkpoint(Job(rounded, ranks), tmp_path / "wanted")
    for path in (tmp_path / "wanted").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "found" / path.name).read_bytes()
    assert json.loads((tmp_path / "found" / "config.json").read_bytes())["dtype"] == "bfloat16"
    assert verify(tmp_path / "found", model).is_proven
    assert verify(tmp_path / "found", model, sample=Fraction(1)).problems == ()


def test_whole_files_are_those_of_torch(model: Path, rounded: Path, tmp_path: Path) -> None:
    convert_checkpoint(Job(model, 1, to="hf", cast="bf16", max_file_size=50_000), tmp_path / "found")
    require_same(tensors_of(tmp_path / "found"), tensors_of(rounded))
    assert verify(tmp_path / "found", model).is_proven
    config = json.loads((tmp_path / "found" / "config.json").read_bytes())
    assert config == {**json.loads((model / "config.json").read_bytes()), "dtype": "bfloat16"}


def test_the_cast_is_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "source", "llama")
    count = len(tensors_of(tmp_path / "source"))
    for command in ("plan", "convert"):
        target = [str(tmp_path / "target")] if command == "convert" else []
        assert main([command, str(tmp_path / "source"), *target, "--mp", "2", "--cast", "bf16"]) == 0
        assert f"round: {count} tensors of BF16" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "target" / "reshard.json").read_bytes())
    assert manifest["casts"] == {"round": count}


def test_f16_is_rounded_too(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama")
    edit(tmp_path / "source", lambda _, tensor: tensor.half())
    wanted = {name: tensor.bfloat16() for name, tensor in tensors_of(tmp_path / "source").items()}
    convert_checkpoint(Job(tmp_path / "source", 1, to="hf", cast="bf16"), tmp_path / "target")
    require_same(tensors_of(tmp_path / "target"), wanted)
    assert verify(tmp_path / "target", tmp_path / "source").is_proven


def test_special_values_follow_one_rule(tmp_path: Path) -> None:
    """Ties, the largest number, infinities, a subnormal, minus zero, and two NaNs of any sign and payload."""
    patterns = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFF800000, 0x00008001, 0x80000000, 0xFF800001, 0x7FFFFFFF]
    wanted = [0x3F80, 0x3F82, 0x7F80, 0xFF80, 0x0001, 0x8000, 0x7FC0, 0x7FC0]
    write_model(tmp_path / "source", "llama")
    values = torch.from_numpy(np.array(patterns, np.uint32).view(np.float32))

    def put(name: str, tensor: Tensor) -> Tensor:
        if name == "model.layers.1.mlp.up_proj.weight":
            tensor[5, :8] = values
        return tensor

    edit(tmp_path / "source", put)
    convert_checkpoint(Job(tmp_path / "source", 1, to="hf", cast="bf16"), tmp_path / "target")
    found = tensors_of(tmp_path / "target")["model.layers.1.mlp.up_proj.weight"]
    assert found.view(torch.uint16)[5, :8].tolist() == wanted
    assert verify(tmp_path / "target", tmp_path / "source").is_proven


@pytest.mark.parametrize("name", ["gpt-oss", "glm4-moe"])
def test_what_lies_packed_is_dequantized_and_the_rest_rounded(name: str, tmp_path: Path) -> None:
    """MXFP4, and FP8 with a scale for each row."""
    source = tmp_path / "source"
    write_model(source, name, hidden_size=64, intermediate_size=96)
    tensors = tensors_of(source)
    for path in [*source.glob("*.safetensors"), *source.glob("*.index.json")]:
        path.unlink()
    wanted = {
        key: tensor if re.search(rf"{BIAS}$", key) else round_by_torch(key, tensor) for key, tensor in tensors.items()
    }
    for key in [key for key in tensors if re.search(r"experts\.(gate_up|down)_proj$|_proj\.weight$", key)]:
        if name == "glm4-moe":
            codes, scales = tensors[key].to(torch.float8_e4m3fn), torch.rand(len(tensors[key]), 1)
            tensors |= {key: codes, f"{key}_scale": scales}
            wanted[key] = (codes.float() * scales).bfloat16()
        elif "experts" in key:
            experts, before, after = tensors.pop(key).shape
            blocks = torch.randint(256, (experts, after, before // 32, 16), dtype=torch.uint8)
            scales = torch.randint(250, (experts, after, before // 32), dtype=torch.uint8)
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
            wanted[key] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_bytes()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (source / "config.json").write_text(json.dumps(config))
    convert_checkpoint(Job(source, 1, to="hf", cast="bf16"), tmp_path / "target")
    found = tensors_of(tmp_path / "target")
    require_same({key: bits(found[key]) for key in found}, {key: bits(wanted[key]) for key in wanted})
    del config["quantization_config"]
    assert json.loads((tmp_path / "target" / "config.json").read_bytes()) == config | {"dtype": "bfloat16"}
    assert verify(tmp_path / "target", source).is_proven
    (tmp_path / "target" / "config.json").write_text(
        json.dumps({**config, "dtype": "bfloat16", "quantization_config": 1})
    )
    assert [problem.subject for problem in verify(tmp_path / "target", source).problems] == [
        "config.json: quantization_config"
    ]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# --- checkpoints of DeepSeek's ---


def test_norms_of_f32_beside_fp8(source: Callable[[str], Path], tmp_path: Path) -> None:
    """The router bias stays F32, the weights are dequantized, all else is rounded."""
    shutil.copytree(source("deepseek-v3"), tmp_path / "source")
    edit(tmp_path / "source", lambda name, tensor: widen(name, tensor) if "norm" in name else tensor)
    tensors = tensors_of(tmp_path / "source")
    wanted = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            wanted[name] = dequantize(tensor, tensors[f"{name}_scale_inv"], 128)
        elif not name.endswith("_scale_inv"):
            wanted[name] = round_by_torch(name, tensor)
    convert_checkpoint(Job(tmp_path / "source", 1, to="hf", cast="bf16"), tmp_path / "found")
    require_same(tensors_of(tmp_path / "found"), wanted)
    assert {tensor.dtype for name, tensor in wanted.items() if BIAS in name} == {torch.float32}
    assert verify(tmp_path / "found", tmp_path / "source").is_proven
    convert_checkpoint(Job(tmp_path / "source", 4, cast="bf16"), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "found", 4), tmp_path / "wanted")
    for path in (tmp_path / "wanted").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "ranks" / path.name).read_bytes()
    assert verify(tmp_path / "ranks", tmp_path / "source").is_proven


@pytest.mark.parametrize(("name", "stays"), STAYS.items())
def test_what_the_code_has_in_f32_stays(name: str, stays: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    """Of a published checkpoint not one tensor is rounded; of one that is F32 throughout, all but these."""
    plan = plan_conversion(Job(source(name), 1, to="hf", cast="bf16"))
    assert {cast.operation for cast in plan.casts} == {"dequantize"}
    shutil.copytree(source(name), tmp_path / "source")
    edit(tmp_path / "source", widen)
    casts = plan_conversion(Job(tmp_path / "source", 1, to="hf", cast="bf16")).casts
    made = {cast.weight.name for cast in casts if cast.operation == "round"}
    plain = {name for name, tensor in tensors_of(tmp_path / "source").items() if tensor.dtype == torch.float32}
    scales = {cast.scale.name for cast in casts if cast.scale}
    assert made == {name for name in plain - scales if not re.search(stays, name)}
    assert made


def test_padding_and_rounding_go_together(tmp_path: Path) -> None:
    write_small(tmp_path / "source", "deepseek-v3-for-32")
    edit(tmp_path / "source", lambda name, tensor: widen(name, tensor) if "embed" in name or "norm" in name else tensor)
    convert_checkpoint(Job(tmp_path / "source", 32, cast="bf16", pad=True), tmp_path / "target")
    assert verify(tmp_path / "target", tmp_path / "source").is_proven
    write_model(tmp_path / "llama", "llama", vocab_size=97)
    convert_checkpoint(Job(tmp_path / "llama", 4, cast="bf16", pad=True), tmp_path / "padded")
    embed = torch.cat(
        [load_file(path)["model.embed_tokens.weight"] for path in sorted((tmp_path / "padded").glob("*.safetensors"))]
    )
    source = tensors_of(tmp_path / "llama")["model.embed_tokens.weight"]
    assert torch.equal(embed[:97], source.bfloat16())
    assert not embed[97:].any()
    assert verify(tmp_path / "padded", tmp_path / "llama").is_proven


# --- to and fro ---


def test_rank_files_of_f32_become_a_whole_checkpoint_of_bf16(model: Path, rounded: Path, tmp_path: Path) -> None:
    convert_checkpoint(Job(model, 4), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf", cast="bf16"), tmp_path / "whole")
    require_same(tensors_of(tmp_path / "whole"), tensors_of(rounded))
    convert_checkpoint(Job(tmp_path / "ranks", 2, cast="bf16"), tmp_path / "other")
    assert verify(tmp_path / "other", model).is_proven


def test_what_was_rounded_is_not_restored_and_that_is_said(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama")
    convert_checkpoint(Job(tmp_path / "source", 2, cast="bf16"), tmp_path / "ranks")
    done = reshard.convert(tmp_path / "ranks", tmp_path / "back", to="hf")
    lines = [line for line in str(done).splitlines() if "not as it was" in line]
    (line,) = lines
    assert re.fullmatch(r"not as it was: all 30 tensors, [\d,]+ bytes, cast when converted", line)
    found = tensors_of(tmp_path / "back")
    require_same(found, {name: tensor.bfloat16() for name, tensor in tensors_of(tmp_path / "source").items()})


def test_a_part_that_was_rounded_is_said_in_one_line_by_rows(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama")
    edit(tmp_path / "source", lambda name, tensor: tensor.bfloat16() if "layernorm" in name else tensor)
    convert_checkpoint(Job(tmp_path / "source", 2, cast="bf16"), tmp_path / "ranks")
    done = reshard.convert(tmp_path / "ranks", tmp_path / "back", to="hf")
    (line,) = [line for line in str(done).splitlines() if "not as it was" in line]
    assert re.search(r"not as it was: 24 tensors, [\d,]+ bytes: \S+, \S+, \S+ and 7 more, cast when converted$", line)


def test_one_row_that_was_rounded_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama")
    edit(tmp_path / "source", lambda name, tensor: tensor.bfloat16() if name != "model.norm.weight" else tensor)
    convert_checkpoint(Job(tmp_path / "source", 2, cast="bf16"), tmp_path / "ranks")
    done = reshard.convert(tmp_path / "ranks", tmp_path / "back", to="hf")
    assert "not as it was: 1 tensor, 192 bytes: model.norm.weight, cast when converted" in str(done)


def test_load_gives_what_convert_writes(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "glm4-moe")
    convert_checkpoint(Job(tmp_path / "source", 4, cast="bf16"), tmp_path / "ranks")
    require_same(
        reshard.load(tmp_path / "source", mp=4, rank=3, cast="bf16"),
        load_file(tmp_path / "ranks" / "model-rank3-of-4.safetensors"),
    )


# --- what verify sees ---


def damaged(folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    write_model(folder / "source", "llama")
    convert_checkpoint(Job(folder / "source", 1, to="hf", cast="bf16"), folder / "target")
    edit(folder / "target", change)
    return folder / "target"


def test_a_value_that_was_cut_off_instead_of_rounded_is_seen(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"

    def cut_off(other: str, tensor: Tensor) -> Tensor:
        if other == name:
            full = tensors_of(tmp_path / "source")[name].view(torch.int32)
            tensor.view(torch.int16)[7] = (full >> 16).to(torch.int16)[7]
        return tensor

    (problem,) = verify(damaged(tmp_path, cut_off), tmp_path / "source").problems
    assert problem.kind == "differs"
    assert name in problem.subject
    assert f"what round makes of {name}" in problem.expected


def test_one_tensor_that_is_still_f32_is_a_mixture(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    target = damaged(tmp_path, lambda other, tensor: tensors_of(tmp_path / "source")[name] if other == name else tensor)
    problems = [problem for problem in verify(target, tmp_path / "source").problems if problem.kind == "mixture"]
    assert [name in problem.subject for problem in problems] == [True]


def test_a_rounded_router_bias_is_seen(tmp_path: Path) -> None:
    """No cast rounds it, so it is of the wrong dtype."""
    write_model(tmp_path / "source", "glm4-moe")
    convert_checkpoint(Job(tmp_path / "source", 1, to="hf", cast="bf16"), tmp_path / "target")
    edit(tmp_path / "target", lambda name, tensor: tensor.bfloat16() if BIAS in name else tensor)
    problems = verify(tmp_path / "target", tmp_path / "source").problems
    assert {problem.kind for problem in problems if BIAS in problem.subject} == {"wrong-shape"}


def test_a_config_that_still_says_float32_is_seen(tmp_path: Path) -> None:
    target = damaged(tmp_path, lambda _, tensor: tensor)
    shutil.copy(tmp_path / "source" / "config.json", target / "config.json")
    assert [problem.kind for problem in verify(target, tmp_path / "source").problems] == ["wrong-config"]


# --- what is refused ---


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "glm4-moe"])
def test_a_cast_that_changes_nothing_is_refused(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "source", name)
    edit(tmp_path / "source", round_by_torch)
    for job in (Job(tmp_path / "source", 1, to="hf", cast="bf16"), Job(tmp_path / "source", 2, cast="bf16")):
        with pytest.raises(Refused) as caught:
            plan_conversion(job)
        assert [(problem.kind, problem.subject) for problem in caught.value.problems] == [("wrong-option", "--cast")]


def test_fp8_of_f32_says_what_to_do_first(source: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(source("glm-5.1"), tmp_path / "source")
    edit(tmp_path / "source", widen)
    with pytest.raises(Refused) as caught:
        plan_conversion(Job(tmp_path / "source", 1, to="hf", cast="fp8"))
    (problem,) = caught.value.problems
    assert problem.kind == "wrong-dtype"
    assert problem.remedy == "--to hf --cast bf16 first, then --cast fp8 of the result"
    convert_checkpoint(Job(tmp_path / "source", 1, to="hf", cast="bf16"), tmp_path / "bf16")
    convert_checkpoint(Job(tmp_path / "bf16", 1, to="hf", cast="fp8"), tmp_path / "fp8")
    assert torch.float8_e4m3fn in {tensor.dtype for tensor in oracle.load_tensors(tmp_path / "fp8", ()).values()}
