"""Notes on dtypes that a router or a loader minds: said where true, with the name in the source, and nowhere else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from jobs import Job, plan_conversion
from safetensors.torch import load_file, save_file
from small_models import write_model
from torch import Tensor

from reshard.cli.main import main

Source = Callable[[str], Path]
V3_BIAS = "mlp.gate.e_score_correction_bias"


@pytest.fixture
def edited(source: Source, tmp_path: Path) -> Callable[[str, Callable[[str, Tensor], Tensor]], Path]:
    """A copy of the small checkpoint of a family, changed."""

    def make(name: str, change: Callable[[str, Tensor], Tensor]) -> Path:
        shutil.copytree(source(name), tmp_path / name)
        edit(tmp_path / name, change)
        return tmp_path / name

    return make


def edit(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    for path in folder.glob("*.safetensors"):
        save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def notes(job: Job) -> dict[str, str]:
    found = plan_conversion(job).notes
    assert len({note.kind for note in found}) == len(found)
    return {note.kind: note.text for note in found}


def rounded_bias(name: str, tensor: Tensor) -> Tensor:
    is_bias = name.endswith((V3_BIAS, ".ffn.gate.bias", ".ffn.gate.bias_vl"))
    return tensor.bfloat16() if is_bias else tensor


# --- published checkpoints ---


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"deepseek-v3.2", "deepseek-v3.2-exp"}))
def test_a_published_checkpoint_gets_no_note(name: str, source: Source) -> None:
    assert notes(Job(source(name), 1)) == {}
    assert notes(Job(source(name), 1, to="hf")) == {}


def test_what_v32_has_wider_in_the_code_is_noted(source: Source) -> None:
    """Head and `weights_proj` are BF16 as published, F32 in the code; the norms are F32 in both."""
    text = notes(Job(source("deepseek-v3.2"), 1))["loader-dtype"]
    count = 1 + FAMILIES["deepseek-v3.2"].small["num_hidden_layers"]
    assert text.startswith(f"{count} tensors of BF16 (the inference code has F32), such as lm_head.weight: safetensors")
    assert "safetensors 0.6.0 to 0.6.2 refuse" in text
    assert "has BF16" not in text
    assert notes(Job(source("deepseek-v3.2"), 1, to="hf")) == {}


# --- the router bias ---


@pytest.mark.parametrize(
    ("name", "subject"),
    [
        ("deepseek-v3", "such as model.layers.9.mlp.gate.e_score_correction_bias"),  # not layer 10
        ("glm-5.1-fp8", "mlp.gate.e_score_correction_bias"),
        ("deepseek-v4-flash", "ffn.gate.bias"),
        ("deepseek-v4.1-flash", "ffn.gate.bias"),
    ],
)
def test_a_rounded_router_bias_is_noted_in_every_layout(
    name: str, subject: str, edited: Callable[[str, Callable[[str, Tensor], Tensor]], Path]
) -> None:
    folder = edited(name, rounded_bias)
    for job in (Job(folder, 1), Job(folder, 1, to="hf"), Job(folder, 1, cast="bf16")):
        text = notes(job)["router-bias-dtype"]
        assert subject in text
        assert " of BF16, such as " in text
        assert text.endswith("tokens are routed otherwise; take them from the original checkpoint")
        assert "loader-dtype" not in notes(job)
    count = sum(rounded_bias(name, torch.zeros(1)).dtype == torch.bfloat16 for name in tensors_of(folder))
    whole = notes(Job(folder, 1, to="hf"))["router-bias-dtype"]
    assert whole.startswith(f"{count:,} router bias tensor")


def tensors_of(folder: Path) -> set[str]:
    return {name for path in folder.glob("*.safetensors") for name in load_file(path)}


def test_a_rounded_router_bias_of_a_tensor_parallel_model_is_noted(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "glm4-moe")
    edit(tmp_path / "source", lambda _, tensor: tensor.half())
    found = notes(Job(tmp_path / "source", 2))
    assert found.keys() == {"no-mtp", "router-bias-dtype"}
    assert found["router-bias-dtype"].startswith(f"2 router bias tensors of F16, such as model.layers.1.{V3_BIAS}")


# --- what a loader may refuse ---


def test_norms_of_f32_are_noted_for_ranks_only(edited: Callable[..., Path]) -> None:
    folder = edited("deepseek-v3", lambda name, tensor: tensor.float() if "norm" in name else tensor)
    norms = [name for name in tensors_of(folder) if "norm" in name and ".layers." in name]
    layers = {name.split(".")[2] for name in norms}
    last = max(layers, key=int)  # the MTP layer, which is dropped
    count = 1 + sum(name.split(".")[2] != last for name in norms)
    text = notes(Job(folder, 2))["loader-dtype"]
    assert text.startswith(f"{count} tensors of F32 (the inference code has BF16), such as model.")
    assert "--cast" not in text  # it would cast the FP8 weights too
    assert notes(Job(folder, 1, to="hf")) == {}
    assert notes(Job(folder, 2, cast="bf16")) == {}


def test_f32_throughout_is_told_of_the_cast(source: Source, tmp_path: Path) -> None:
    assert main(["convert", str(source("deepseek-v3")), str(tmp_path / "plain"), "--to", "hf", "--cast", "bf16"]) == 0
    edit(tmp_path / "plain", lambda _, tensor: tensor.float())
    assert notes(Job(tmp_path / "plain", 1))["loader-dtype"].endswith("; --cast bf16 rounds F32 to BF16")
    assert notes(Job(tmp_path / "plain", 1, cast="bf16")) == {}


@pytest.mark.parametrize(("layout", "is_noted"), [({}, True), ({"cast": "bf16"}, False)])
def test_block_scales_of_bf16_are_noted(
    layout: dict[str, str],
    is_noted: bool,  # noqa: FBT001
    edited: Callable[..., Path],
) -> None:
    folder = edited("deepseek-v3", lambda name, tensor: tensor.bfloat16() if "_scale_inv" in name else tensor)
    last = FAMILIES["deepseek-v3"].small["num_hidden_layers"]  # the MTP layer, which is dropped
    count = sum("_scale_inv" in name and f"layers.{last}." not in name for name in tensors_of(folder))
    text = notes(Job(folder, 1, **layout)).get("loader-dtype", "")  # type: ignore[arg-type]
    found = f"{count} tensors of BF16 (the inference code has F32), such as model.layers."
    assert text.startswith(found) is is_noted
    assert "weight_scale_inv: safetensors" in text or not is_noted
    assert notes(Job(folder, 1, to="hf")) == {}


def test_optional_layers_have_no_parameters(edited: Callable[..., Path]) -> None:
    last = FAMILIES["deepseek-v3"].small["num_hidden_layers"]
    folder = edited(
        "deepseek-v3", lambda name, tensor: tensor.float() if f".{last}." in name and "norm" in name else tensor
    )
    assert notes(Job(folder, 1, keep_mtp=True)) == {}


def test_whole_files_and_ranks_together_are_told_how_to_choose(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(source("deepseek-v3")), str(tmp_path / "target"), "--to", "hf", "--mp", "2"]
    assert main(command) == 2
    assert "hint:     for rank files leave out --to hf; for whole files leave out --mp" in capsys.readouterr().err


# --- where they are printed ---


def test_the_commands_print_them(
    edited: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edited("deepseek-v3", rounded_bias)
    for command in (["plan", str(folder)], ["convert", str(folder), str(tmp_path / "target")]):
        assert main([*command, "--mp", "1"]) == 0
        printed = capsys.readouterr().out
        assert printed.count("note: ") == 1
        assert f"such as model.layers.9.{V3_BIAS}" in printed
    assert main(["plan", str(folder), "--mp", "1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["notes"]
    assert [note["kind"] for note in said] == ["router-bias-dtype"]


# --- the dtype that the config says ---


def write_said(folder: Path, weights: str, **said: str) -> Path:
    """A small Llama whose weights are of one dtype, and whose config says another one."""
    write_model(folder, "llama", dtype=weights)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps({**config, **said}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_wider_weights_than_the_config_says_are_noted(key: str, tmp_path: Path) -> None:
    source = write_said(tmp_path / "source", "float32", **{key: "bfloat16"})
    for layout in ("hf", "dcp", "ranks"):
        text = notes(Job(source, 1, to=layout))["config-dtype"]
        assert text.startswith("F32 weights (")
        assert "config.json says bfloat16" in text
        assert "--cast bf16 rounds them here" in text
        assert "say float32 there" in text
        assert "config-dtype" not in notes(Job(source, 1, to=layout, cast="bf16"))


@pytest.mark.parametrize(
    ("weights", "said"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")],
)
def test_weights_that_no_loader_rounds_are_not_noted(weights: str, said: str, tmp_path: Path) -> None:
    source = write_said(tmp_path / "source", weights, dtype=said)
    assert "config-dtype" not in notes(Job(source, 1, to="hf"))


def test_some_wider_tensors_are_not_noted(tmp_path: Path) -> None:
    """Such as norms, or the router of a mixture of experts."""
    source = write_said(tmp_path / "source", "bfloat16", dtype="bfloat16")
    edit(source, lambda name, tensor: tensor.float() if "norm" in name else tensor)
    assert "config-dtype" not in notes(Job(source, 1, to="hf"))


def test_without_a_cast_to_the_dtype_none_is_named(tmp_path: Path) -> None:
    source = write_said(tmp_path / "source", "float32", dtype="float16")
    assert "--cast" not in notes(Job(source, 1, to="hf"))["config-dtype"]
