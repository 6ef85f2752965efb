"""Rank files for vLLM's `sharded_state`: what vLLM's own models want, as an independent converter makes them."""

import json
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, convert_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, bfloat16, uint8
from vllm_models import CASES, DEEPSEEK, SCALE, SCALE_DTYPES, write_case
from vllm_oracle import LIST, make_rank_tensors, write_rank_files

from reshard import api
from reshard.errors import Refused

WANTED: dict[str, Any] = json.loads(LIST.read_text())
RANKS: tuple[int, ...] = tuple(WANTED["ranks"])


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("vllm") / request.param
    write_case(folder, request.param)
    return request.param, folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def describe(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Dtype and shape of each, as the list has them."""
    names = {"torch.bfloat16": "BF16", "torch.float32": "F32", "torch.float8_e4m3fn": "F8_E4M3"}
    return {name: f"{names[str(tensor.dtype)]} {list(tensor.shape)}" for name, tensor in tensors.items()}


def list_wanted(case: str, ranks: int) -> dict[str, str]:
    """What vLLM wants, but for scales that are BF16 in the checkpoint: vLLM widens them as it loads them."""
    wanted = {name: shapes[RANKS.index(ranks)] for name, shapes in WANTED["models"][case].items()}
    if SCALE_DTYPES.get(case) is bfloat16:
        return {name: shape.replace("F32", "BF16") if SCALE in name else shape for name, shape in wanted.items()}
    return wanted


def name_recipe(source: Path) -> str:
    model: str = json.loads((source / "config.json").read_text())["model_type"]
    return f"vllm-{model.replace('_', '-').replace('mistral', 'llama')}"


def data_of(path: Path) -> bytes:
    """What a file holds behind its header."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_the_list_is_of_every_case_and_names_its_version() -> None:
    assert set(WANTED["models"]) == set(CASES)
    assert WANTED["vllm"] == "0.32.0"
    assert len({WANTED["models"][case]["model.norm.weight"][0] for case in CASES}) == 3


@pytest.mark.parametrize("ranks", RANKS)
def test_the_oracle_makes_what_vllm_wants(model: tuple[str, Path], ranks: int) -> None:
    case, source = model
    for rank in range(ranks):
        assert describe(make_rank_tensors(source, rank, ranks)) == list_wanted(case, ranks)


@pytest.mark.parametrize("ranks", RANKS)
def test_rank_files_are_those_of_the_oracle_and_lead_back(model: tuple[str, Path], ranks: int, tmp_path: Path) -> None:
    case, source = model
    convert_checkpoint(Job(source, ranks, recipe=name_recipe(source)), tmp_path / "target")
    write_rank_files(source, tmp_path / "wanted", ranks)
    names = [f"model-rank-{rank}-part-0.safetensors" for rank in range(ranks)]
    assert sorted(path.name for path in (tmp_path / "target").glob("*.safetensors")) == names
    for name in names:
        found, wanted = tmp_path / "target" / name, tmp_path / "wanted" / name
        assert describe(load_file(found)) == list_wanted(case, ranks)
        assert data_of(found) == data_of(wanted)
    report = api.verify(tmp_path / "target", source)
    assert report.problems == ()
    convert_checkpoint(Job(tmp_path / "target", 1, to="hf"), tmp_path / "back")
    layers = DEEPSEEK.get(case, {}).get("num_hidden_layers")  # the layer behind the last is the MTP layer
    whole = {name: tensor for name, tensor in tensors_of(source).items() if f"layers.{layers}." not in name}
    back = tensors_of(tmp_path / "back")
    assert set(back) == set(whole)
    assert all(back[name].dtype == whole[name].dtype for name in whole)
    assert all(back[name].view(uint8).equal(whole[name].view(uint8)) for name in whole)


def test_a_stored_head_of_a_tied_model_is_left_out(tmp_path: Path) -> None:
    """Qwen3-0.6B has one. vLLM knows no second table, and would end with a KeyError."""
    write_case(tmp_path / "source", "qwen3-tied")
    tensors = tensors_of(tmp_path / "source")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    write_case(tmp_path / "plain", "qwen3-tied")
    add_tensors(tmp_path / "source", head)
    for name in ("source", "plain"):
        convert_checkpoint(Job(tmp_path / name, 2, recipe="vllm-qwen3"), tmp_path / f"{name}-target")
    for rank in range(2):
        file = f"model-rank-{rank}-part-0.safetensors"
        assert data_of(tmp_path / "source-target" / file) == data_of(tmp_path / "plain-target" / file)
    assert api.verify(tmp_path / "source-target", tmp_path / "source").problems == ()


def test_rank_files_of_vllm_that_no_recipe_fits_are_called_so(tmp_path: Path) -> None:
    """Another version of vLLM may have other names; and there are models that no recipe for it lists."""
    write_case(tmp_path / "source", "llama")
    write_rank_files(tmp_path / "source", tmp_path / "ranks", 2)
    path = tmp_path / "ranks" / "model-rank-1-part-0.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.new.scale": tensors["model.norm.weight"].clone()}, path)
    with pytest.raises(Refused) as caught:
        convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "back")
    first, last = caught.value.problems
    assert (first.kind, last.kind) == ("no-rule", "rank-files")
    assert "vLLM" in last.expected
    config = tmp_path / "ranks" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "new", "architectures": ["New"]}))
    with pytest.raises(Refused) as caught:
        convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "back")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.found) == ("no-recipe", "for vllm, a model of new")
    assert "name the checkpoint" in problem.remedy


def add_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Adds a file with tensors, and its names to the index."""
    save_file(tensors, folder / "model-more.safetensors", {"format": "pt"})
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-more.safetensors")
    path.write_text(json.dumps(index))
