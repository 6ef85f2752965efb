"""GLM-5.2, where only some layers have an indexer: by the config, in every direction, against transformers."""

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import oracle_families
import pytest
import torch
import transformers
from conversions import require_equal
from families import FAMILIES
from jobs import Job, convert_checkpoint, plan_conversion

import reshard
from reshard.errors import Problem, Refused
from reshard.recipes.recipe import load_recipe
from reshard.sources.picked_members import find_picked
from reshard.synthetic import TensorEntry, write_tensors
from reshard.types import Subset

Config = Mapping[str, Any]

GLM = FAMILIES["glm-5.2-fp8"]
SMALL: Config = {**GLM.small, "n_routed_experts": 12}
WAYS = ("index_topk_freq", "index_skip_topk_offset", "indexer_types", "index_topk_pattern")
"""The keys of a config that tell the layers with an indexer."""
SHARED = (3, 4, 5, 7, 8, 9)
INDEXER = ("k_norm.bias", "k_norm.weight", "weights_proj.weight", "wk.weight", "wq_b.weight")


def tensors_of(config: Config = SMALL, *, in_all: bool = False) -> list[TensorEntry]:
    """Those of GLM-5.2; or of a copy of it with an indexer in every layer."""
    return GLM.tensors({**config, "indexer_types": []} if in_all else config)


def told_by(**keys: Any) -> Config:
    return {**{key: value for key, value in SMALL.items() if key not in WAYS}, **keys}


def problems_of(folder: Path, **options: Any) -> list[Problem]:
    with pytest.raises(Refused) as refused:
        plan_conversion(Job(folder, 2, **options))
    return list(refused.value.problems)


def name_indexer(*layers: int) -> list[str]:
    return sorted(f"model.layers.{layer}.self_attn.indexer.{part}" for layer in layers for part in INDEXER)


# --- the tensors of transformers ---


def make_model(config: Config) -> torch.nn.Module:
    with torch.device("meta"):
        return transformers.GlmMoeDsaForCausalLM(transformers.GlmMoeDsaConfig(**config))


def stack(tensors: list[TensorEntry]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, experts as transformers has them in memory."""
    found: dict[str, tuple[int, ...]] = {}
    count = sum(".layers.3.mlp.experts." in name and "down_proj" in name for name, _, _ in tensors)
    for name, _, (*shape,) in tensors:
        expert = re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if not expert:
            found[name] = tuple(shape)
        elif expert[3] == "down":
            found[f"{expert[1]}.down_proj"] = (count, *shape)
        else:
            found[f"{expert[1]}.gate_up_proj"] = (count, 2 * shape[0], *shape[1:])
    return found


@pytest.mark.parametrize("leave_out", [(), ("indexer_types",)])
def test_the_layers_and_shapes_are_those_of_transformers(leave_out: tuple[str, ...]) -> None:
    """Of the published model. Without the list, transformers counts by the other keys. It has no MTP layer."""
    glm = FAMILIES["glm-5.2"]
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in make_model({key: value for key, value in glm.full.items() if key not in leave_out})
        .state_dict()
        .items()
    }
    found = stack([entry for entry in glm.tensors(glm.full) if not entry[0].startswith("model.layers.78.")])
    assert found == wanted
    assert len({name.split(".")[2] for name in wanted if ".indexer." in name}) == 21
    assert sum(map(prod, found.values())) == 743_377_019_904


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"index_topk_freq": 4},
        {"index_topk_freq": 3, "index_skip_topk_offset": 0},
        {"index_topk_freq": 5, "index_skip_topk_offset": 1},
        {"index_topk_freq": 0, "index_skip_topk_offset": 7},
        {"index_topk_pattern": "FSFFSSSFSFF", "index_topk_freq": 4},
        {"index_topk_pattern": ["full", "shared"] * 5 + ["full"]},
        {"indexer_types": ["shared", "full"] * 5 + ["full"], "index_topk_pattern": "F" * 11},
        {"indexer_types": None, "index_topk_pattern": None, "index_topk_freq": 2, "index_skip_topk_offset": 4},
    ],
)
def test_the_config_picks_the_layers_that_transformers_picks(keys: Config) -> None:
    place = load_recipe("glm-5").placeholders["f"]
    types = transformers.GlmMoeDsaConfig(num_hidden_layers=11, **keys).indexer_types
    wanted = {layer for layer, kind in enumerate(types or ()) if kind == "full"}
    assert find_picked(place, set(range(11)), keys) == wanted
    assert find_picked(place, set(range(11)), None) is None


# --- there and back ---


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        told_by(index_topk_freq=4, index_skip_topk_offset=3),
        told_by(index_topk_pattern="FFFSSSFSSSF"),
        told_by(index_topk_freq=4, index_skip_topk_offset=3, indexer_types=SMALL["indexer_types"]),
    ],
    ids=["as published", "counted", "pattern", "list"],
)
def test_the_ranks_are_those_of_the_oracle_however_the_config_tells(config: Config, tmp_path: Path) -> None:
    write_tensors(tmp_path / "source", tensors_of(), config, 3)
    oracle_families.convert_glm51(tmp_path / "source", tmp_path / "wanted", 2)
    plan = convert_checkpoint(Job(tmp_path / "source", 2), tmp_path / "found").plan
    require_equal(tmp_path / "wanted", tmp_path / "found")
    assert (plan.counts["f"], plan.notes) == (5, ())
    assert reshard.verify(tmp_path / "found", tmp_path / "source").is_proven
    args = json.loads((tmp_path / "found" / "run_config.json").read_text())
    types = config.get("indexer_types") or config.get("index_topk_pattern")
    assert (args.get("indexer_types"), args.get("index_topk_freq")) == (types, config.get("index_topk_freq"))


def test_indexers_of_shared_layers_go_there_and_back_with_a_note(tmp_path: Path) -> None:
    write_tensors(tmp_path / "source", tensors_of(in_all=True), SMALL, 3)
    oracle_families.convert_glm51(tmp_path / "source", tmp_path / "wanted", 4)
    convert_checkpoint(Job(tmp_path / "source", 4), tmp_path / "found")
    require_equal(tmp_path / "wanted", tmp_path / "found")
    job = Job(tmp_path / "source", 4, keep_mtp=True)
    plan = convert_checkpoint(job, tmp_path / "ranks").plan
    assert plan.counts["f"] == 11
    (note,) = plan.notes
    assert note.kind == "not-picked"
    assert "layers 3-5, 7-9, where indexer_types of config.json has none: kept" in note.text
    assert "transformers and vLLM leave them unread" in note.text
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "back")
    for path in (tmp_path / "source").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes(), path.name
    assert reshard.verify(tmp_path / "ranks", tmp_path / "source").is_proven
    convert_checkpoint(Job(tmp_path / "source", 1, to="hf"), tmp_path / "whole")
    assert reshard.verify(tmp_path / "whole", tmp_path / "source").is_proven


def test_without_a_config_the_names_tell_and_that_is_said(tmp_path: Path) -> None:
    write_tensors(tmp_path / "source", tensors_of(), SMALL, 3)
    (tmp_path / "source" / "config.json").unlink()
    plan = plan_conversion(Job(tmp_path / "source", 2))
    assert (plan.recipe.name, plan.counts["f"]) == ("glm-5", 5)
    assert [note.kind for note in plan.notes] == ["not-picked"]
    assert "indexers in 5 of 11 layers by the names" in plan.notes[0].text


# --- what lacks, and what is too much ---


@pytest.mark.parametrize("layer", [0, 6, 10])
def test_a_full_layer_without_its_indexer_is_refused_by_name(layer: int, tmp_path: Path) -> None:
    lost = f"model.layers.{layer}.self_attn.indexer."
    write_tensors(tmp_path / "source", [entry for entry in tensors_of() if not entry[0].startswith(lost)], SMALL, 2)
    problems = problems_of(tmp_path / "source")
    assert {problem.kind for problem in problems} == {"missing-tensor"}
    assert sorted(problem.subject for problem in problems) == name_indexer(layer)
    assert "indexer_types in config.json tells the indexers" in problems[0].remedy


def test_of_an_indexer_that_a_shared_layer_has_every_tensor_must_be_there(tmp_path: Path) -> None:
    lost = "model.layers.4.self_attn.indexer.k_norm.bias"
    write_tensors(tmp_path / "source", [entry for entry in tensors_of(in_all=True) if entry[0] != lost], SMALL, 2)
    assert [(problem.kind, problem.subject) for problem in problems_of(tmp_path / "source")] == [
        ("missing-tensor", lost)
    ]


def test_a_config_that_tells_no_layers_wants_an_indexer_in_each(tmp_path: Path) -> None:
    """As that of GLM-5.1."""
    write_tensors(tmp_path / "source", tensors_of(), told_by(), 2)
    problems = problems_of(tmp_path / "source")
    assert sorted(problem.subject for problem in problems) == name_indexer(*SHARED)
    assert "tells them in its config.json: indexer_types, index_topk_pattern, index_topk_freq" in problems[0].remedy
    (tmp_path / "all").mkdir()
    write_tensors(tmp_path / "all", tensors_of(in_all=True), told_by(), 2)
    assert plan_conversion(Job(tmp_path / "all", 2)).notes == ()


def test_a_list_that_is_too_short_is_refused(tmp_path: Path) -> None:
    config = {**SMALL, "indexer_types": SMALL["indexer_types"][:9]}
    write_tensors(tmp_path / "source", tensors_of(in_all=True), config, 2)
    (problem,) = problems_of(tmp_path / "source")
    assert (problem.subject, problem.found) == ("indexer_types of config.json", "9 values")
    assert problem.expected == "11, one for each of the layers"


def test_the_mtp_layer_lacks_its_indexer_only_where_it_is_left_out(tmp_path: Path) -> None:
    lost = "model.layers.11.self_attn.indexer."
    write_tensors(tmp_path / "source", [entry for entry in tensors_of() if not entry[0].startswith(lost)], SMALL, 2)
    assert plan_conversion(Job(tmp_path / "source", 2)).files
    assert sorted(problem.subject for problem in problems_of(tmp_path / "source", keep_mtp=True)) == name_indexer(11)


# --- some layers of it ---


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6), (0, 6), (1, 2, 6, 7)])
@pytest.mark.parametrize("way", ["list", "counted"])
def test_layers_that_the_config_still_counts_right_are_taken_out(
    way: str, layers: tuple[int, ...], tmp_path: Path
) -> None:
    config = SMALL if way == "list" else told_by(index_topk_freq=4, index_skip_topk_offset=3)
    write_tensors(tmp_path / "source", tensors_of(), config, 2)
    subset = Subset(layers, None, renumber=True)
    convert_checkpoint(Job(tmp_path / "source", 1, to="hf", subset=subset), tmp_path / "part")
    found = json.loads((tmp_path / "part" / "config.json").read_text())
    assert found["num_hidden_layers"] == len(layers)
    assert found["mlp_layer_types"] == [SMALL["mlp_layer_types"][layer] for layer in layers]
    types = found.pop("indexer_types", None)
    assert types == ([SMALL["indexer_types"][layer] for layer in layers] if way == "list" else None)
    # By the list, and as engines count that have never heard of it.
    assert reshard.plan(tmp_path / "part", mp=2).notes == ()
    (tmp_path / "part" / "config.json").write_text(json.dumps(found))
    assert reshard.plan(tmp_path / "part", mp=2).notes == ()


@pytest.mark.parametrize("layers", [(0, 1, 2, 6), (3, 4, 6), (0, 1, 2, 3, 6)])
def test_layers_that_would_be_counted_wrong_are_refused(layers: tuple[int, ...], tmp_path: Path) -> None:
    write_tensors(tmp_path / "source", tensors_of(), SMALL, 2)
    (problem,) = problems_of(tmp_path / "source", subset=Subset(layers, None, renumber=True))
    assert (problem.kind, problem.subject) == ("needs-layers", "--layers")
    assert "index_topk_freq of config.json counts them" in problem.expected
    (tmp_path / "list").mkdir()
    config = told_by(indexer_types=SMALL["indexer_types"])
    write_tensors(tmp_path / "list", tensors_of(), config, 2)
    assert plan_conversion(Job(tmp_path / "list", 2, subset=Subset(layers, None, renumber=True))).files
