"""The rank files of a DeepSeek-V3, with their run configuration, compute what transformers computes with it whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import transformers
from deepseek import BLOCK, Rank, logits
from jobs import Job, convert_checkpoint
from safetensors.torch import load_file, save_file
from tensor_parallel import Exchange, in_threads
from torch import Tensor

IDS = torch.tensor([[5, 17, 100, 271, 0, 33, 34, 200, 5, 90, 1], [270, 269, 3, 3, 3, 8, 144, 145, 146, 90, 2]])
FACTOR = 2.0**-4
"""Makes the matrices so small that attention is spread and experts are near each other; exact in BF16."""
from_pretrained: Any = transformers.AutoModelForCausalLM.from_pretrained


def shrink(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        smaller = {name: tensor * FACTOR if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
        save_file(smaller, path, {"format": "pt"})


def dequantize(folder: Path, out: Path) -> None:
    """The same model without scales."""
    shutil.copytree(folder, out)
    tensors = checkpoints.load_checkpoint(folder)
    for path in out.glob("*.safetensors"):
        path.unlink()
    (out / "model.safetensors.index.json").unlink()
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight, scale = tensors[name.removesuffix("_scale_inv")], tensors.pop(name)
        spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.size(0), : weight.size(1)]
        tensors[name.removesuffix("_scale_inv")] = weight.float() * spread
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of 11 layers in BF16, and the same in FP8."""
    root = tmp_path_factory.mktemp("deepseek")
    found = {name: root / name for name in ("bf16", "fp8", "whole")}
    checkpoints.write_deepseek_v3(found["bf16"])
    shrink(found["bf16"])
    checkpoints.quantize(found["bf16"], found["fp8"])
    dequantize(found["fp8"], found["whole"])
    return found


@pytest.fixture(scope="module")
def wanted(sources: dict[str, Path]) -> dict[str, Tensor]:
    """The logits of transformers."""
    found = {}
    for name, folder in (("bf16", sources["bf16"]), ("fp8", sources["whole"])):
        model = from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
        with torch.no_grad():
            found[name] = model(IDS).logits
    return found


def run(target: Path, ranks: int, changes: dict[str, Any] | None = None) -> list[Tensor]:
    """The logits of every rank."""
    config = {**json.loads((target / "run_config.json").read_text()), **(changes or {})}

    def of(number: int, exchange: Exchange) -> Tensor:
        tensors = load_file(target / f"model{number}-mp{ranks}.safetensors")
        return logits(Rank(tensors, config, number, exchange), IDS)

    return in_threads(ranks, of)


def is_near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() < 1e-5 * wanted.abs().max())


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_the_ranks_together_compute_the_logits_of_transformers(
    name: str, ranks: int, sources: dict[str, Path], wanted: dict[str, Tensor], tmp_path: Path
) -> None:
    convert_checkpoint(Job(sources[name], ranks), tmp_path / "target")
    for found in run(tmp_path / "target", ranks):
        assert is_near(found, wanted[name])


@pytest.mark.parametrize(
    "key", ["n_layers", "n_activated_experts", "n_limited_groups", "route_scale", "n_dense_layers"]
)
def test_the_run_configuration_matters(
    key: str, sources: dict[str, Path], wanted: dict[str, Tensor], tmp_path: Path
) -> None:
    """Each of these numbers, one less, is another model or none: the comparison would see it."""
    convert_checkpoint(Job(sources["bf16"], 1), tmp_path / "target")
    number = json.loads((tmp_path / "target" / "run_config.json").read_text())[key]
    try:
        (found,) = run(tmp_path / "target", 1, {key: number - 1})
    except KeyError:
        return
    assert not is_near(found, wanted["bf16"])


def test_what_the_code_would_take_for_granted_is_said(sources: dict[str, Path], tmp_path: Path) -> None:
    """This model does not scale its rotary embedding, but the inference code does so unless it is told."""
    convert_checkpoint(Job(sources["bf16"], 1), tmp_path / "target")
    found = json.loads((tmp_path / "target" / "run_config.json").read_text())
    assert (found["rope_factor"], found["score_func"]) == (1, "sigmoid")
