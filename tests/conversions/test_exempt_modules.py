"""FP8 checkpoints with a prefix whose config names modules that are not quantized: config and tensors stay together."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_small
from prefixed import LLAMA, add_prefix, name_text_model, write_model_as
from safetensors.torch import load_file, save_file

import reshard
from reshard.formats.renaming import RenamingStep
from reshard.sources.exempt_names import rename_exempt_modules

PLAIN = "model.layers.0.self_attn.o_proj"
"""A module that is BF16 amid FP8."""

NORM = "model.layers.1.input_layernorm"

WRAPPED, BARE, DDP = RenamingStep("_orig_mod.", inside=True), RenamingStep("", "model."), RenamingStep("module.")


def write_exempt(folder: Path, rename: Callable[[str], str], key: str, modules: list[Any]) -> None:
    """Writes a small V3 whose o_proj of layer 0 is BF16, under other names, with these exempt modules in its config."""
    write_small(folder, "deepseek-v3", index=False)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if tensors.pop(f"{PLAIN}.weight_scale_inv", None) is not None:
            tensors[f"{PLAIN}.weight"] = torch.ones(tensors[f"{PLAIN}.weight"].shape, dtype=torch.bfloat16)
        save_file({rename(name): tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = modules
    (folder / "config.json").write_text(json.dumps(config))


def exempt(folder: Path, key: str) -> list[Any]:
    found: list[Any] = json.loads((folder / "config.json").read_text())["quantization_config"][key]
    return found


def require_proven(target: Path, source: Path) -> None:
    report = reshard.verify(target, source)
    assert report.is_proven, report


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers", "ignore"])
def test_clean_names_in_the_files_and_in_the_config(key: str, tmp_path: Path) -> None:
    source, ranks, whole = (tmp_path / name for name in ("source", "ranks", "whole"))
    modules = [name_text_model(PLAIN), name_text_model(NORM), "lm_head", name_text_model("model.layers.*"), "re:x", 3]
    write_exempt(source, name_text_model, key, modules)
    wanted = [PLAIN, NORM, "lm_head", "model.layers.*", "re:x", 3]
    reshard.convert(source, whole, to="hf")
    assert exempt(whole, key) == wanted
    require_proven(whole, source)
    reshard.convert(source, ranks, mp=2)
    require_proven(ranks, source)
    (whole / "config.json").write_bytes((source / "config.json").read_bytes())
    assert {problem.kind for problem in reshard.verify(whole, source).problems} == {"wrong-config"}


def test_original_names_come_back_with_the_original_config(tmp_path: Path) -> None:
    source, ranks, back, sized = (tmp_path / name for name in ("source", "ranks", "back", "sized"))
    write_exempt(source, add_prefix("module."), "ignored_layers", [f"module.{PLAIN}"])
    reshard.convert(source, ranks, mp=2, keep_mtp=True)
    reshard.convert(ranks, back, to="hf")
    for path in source.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()
    require_proven(back, ranks)
    reshard.convert(ranks, sized, to="hf", max_file_size=10_000_000)
    assert exempt(sized, "ignored_layers") == [PLAIN]
    require_proven(sized, source)


def test_a_config_with_the_names_of_the_recipe_stays(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_exempt(source, add_prefix("_orig_mod."), "ignore", [PLAIN])
    reshard.convert(source, tmp_path / "whole", to="hf")
    assert exempt(tmp_path / "whole", "ignore") == [PLAIN]


@pytest.mark.parametrize(
    ("step", "name", "modules"),
    [
        (WRAPPED, "layers.1._orig_mod.gate.weight", {"layers.1._orig_mod": "layers.1", "gate": "gate"}),
        (BARE, "layers.1.mlp.gate.weight", {"layers.1.mlp.gate": "model.layers.1.mlp.gate", "gate": "gate"}),
        (DDP, "module.model.norm.weight", {"module": "module", "module.model.norm.weight": "model.norm.weight"}),
        (DDP, "module.model.norm.weight", {"module.model.n": "module.model.n", "model.norm": "model.norm"}),
    ],
)  # fmt: skip
def test_modules_are_renamed_as_their_tensors(step: RenamingStep, name: str, modules: Mapping[str, str]) -> None:
    for nest in (lambda table: table, lambda table: {"text_config": table}):
        config = nest({"quantization_config": {"ignore": list(modules), "bits": 8}})
        found = rename_exempt_modules(config, [name, "lm_head.weight"], (step,))
        assert found == nest({"quantization_config": {"ignore": list(modules.values()), "bits": 8}})


def test_a_config_without_such_modules_comes_back_itself() -> None:
    config = {"quantization_config": {"ignore": ["lm_head"]}, "text_config": {"quantization_config": 3}}
    assert rename_exempt_modules(config, ["module.lm_head.weight"], (DDP,)) is config
    assert rename_exempt_modules(None, ["module.lm_head.weight"], (DDP,)) is None


def test_the_config_beside_rank_files_has_the_names_of_the_recipe(tmp_path: Path) -> None:
    source, ranks, back = (tmp_path / name for name in ("source", "ranks", "back"))
    unused = {"load_in_8bit": False, "load_in_4bit": False, "modules_to_not_convert": ["module.lm_head"]}
    write_model_as(source, add_prefix("module."), {**LLAMA, "quantization_config": unused})
    reshard.convert(source, ranks, mp=2)
    assert exempt(ranks, "modules_to_not_convert") == ["lm_head"]
    assert json.loads((ranks / "config.json").read_text())["hidden_size"] == LLAMA["hidden_size"]
    reshard.convert(ranks, back, to="hf")
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    require_proven(back, source)
