"""Models of the V4 line without what drafts, and what is refused of V4-Flash-Vision-Exp."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle_families as oracles
import pytest
from conversions import Oracle, require_equal
from families import FAMILIES, write_small
from handmade import is_same
from jobs import Job, convert_checkpoint, plan_conversion
from safetensors.torch import load_file
from skeletons import Args, Parameters, differences
from skeletons_v4 import v4_0731_parameters, v4_parameters, v4_vision_parameters

import reshard
from reshard.errors import Problem, Refused
from reshard.synthetic import write_tensors
from reshard.types import Subset

Config = Mapping[str, Any]


def shorten(config: Config, **changes: Any) -> Config:
    """The config of the model without what drafts: one ratio for each layer of the backbone."""
    return {**config, "compress_ratios": config["compress_ratios"][: config["num_hidden_layers"]], **changes}


@dataclass(frozen=True, slots=True)
class Draftless:
    family: str
    recipe: str
    changes: Config
    oracle: Oracle
    skeleton: Callable[[Args, int, int], Parameters]
    ranks: tuple[int, ...]

    @property
    def config(self) -> Config:
        return shorten(FAMILIES[self.family].small, **self.changes)

    def write(self, folder: Path, config: Config | None = None) -> Path:
        """The tensors without what drafts, and this or another config."""
        tensors = FAMILIES[self.family].tensors(self.config)
        assert not [name for name, _, _ in tensors if name.startswith("mtp.")]
        write_tensors(folder, tensors, self.config if config is None else config, 3)
        return folder


DSPARK = "deepseek-v4-dspark"
NO_MTP = {"num_nextn_predict_layers": 0}
PARTS = {
    "V4-Flash": Draftless("deepseek-v4-flash", "deepseek-v4", NO_MTP, oracles.convert_v4, v4_parameters, (1, 2, 4)),
    "V4-Pro": Draftless("deepseek-v4-pro", "deepseek-v4", NO_MTP, oracles.convert_v4, v4_parameters, (1, 4, 16)),
    "0731": Draftless(
        "deepseek-v4-flash-0731", "deepseek-v4", NO_MTP, oracles.convert_v4_0731, v4_0731_parameters, (1, 2, 8)
    ),
    "Vision-Exp": Draftless(
        "deepseek-v4-flash-vision",
        "deepseek-v4-vision",
        {**NO_MTP, "dspark_block_size": 0},
        oracles.convert_v4_vision,
        v4_vision_parameters,
        (1, 2, 8),
    ),
}
CUTS = [(name, ranks) for name, part in PARTS.items() for ranks in part.ranks]


def problems_of(folder: Path, **options: Any) -> list[Problem]:
    with pytest.raises(Refused) as refused:
        plan_conversion(Job(folder, 2, **options))
    return list(refused.value.problems)


# --- without what drafts ---


@pytest.mark.parametrize(("name", "ranks"), CUTS)
def test_the_ranks_without_drafts_are_those_of_the_oracle_and_of_the_model(
    name: str, ranks: int, tmp_path: Path
) -> None:
    part = PARTS[name]
    part.write(tmp_path / "source")
    part.oracle(tmp_path / "source", tmp_path / "wanted", ranks)
    plan = convert_checkpoint(Job(tmp_path / "source", ranks), tmp_path / "found").plan
    assert (plan.recipe.name, plan.counts["m"], plan.notes) == (part.recipe, 0, ())
    require_equal(tmp_path / "wanted", tmp_path / "found")
    args = json.loads((tmp_path / "found" / "run_config.json").read_text())
    assert (args["n_mtp_layers"], args.get("dspark_block_size", 0)) == (0, 0)
    assert args["compress_ratios"] == part.config["compress_ratios"]
    for rank in range(ranks):
        path = tmp_path / "found" / f"model{rank}-mp{ranks}.safetensors"
        assert differences(part.skeleton(args, ranks, rank), path) == []
    assert reshard.verify(tmp_path / "found", tmp_path / "source").is_proven
    assert reshard.verify(tmp_path / "found").is_proven


@pytest.mark.parametrize("name", PARTS)
def test_it_is_restored_and_cut_again_without_drafts(name: str, tmp_path: Path) -> None:
    part = PARTS[name]
    # `wo_a` becomes BF16 in rank files: what is restored once is exact from then on.
    convert_checkpoint(Job(part.write(tmp_path / "source"), 2), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "whole")
    assert reshard.verify(tmp_path / "whole", tmp_path / "ranks").is_proven
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert {**config, "quantization_config": part.config["quantization_config"]} == part.config
    convert_checkpoint(Job(tmp_path / "whole", 4), tmp_path / "four")
    part.oracle(tmp_path / "source", tmp_path / "wanted", 4)
    require_equal(tmp_path / "wanted", tmp_path / "four")
    convert_checkpoint(Job(tmp_path / "ranks", 4), tmp_path / "recut")
    require_equal(tmp_path / "wanted", tmp_path / "recut")


@pytest.mark.parametrize("name", PARTS)
def test_it_is_loaded_and_saved_as_slices_without_drafts(name: str, tmp_path: Path) -> None:
    convert_checkpoint(Job(PARTS[name].write(tmp_path / "source"), 2), tmp_path / "ranks")
    for rank in range(2):
        wanted = load_file(tmp_path / "ranks" / f"model{rank}-mp2.safetensors")
        found = reshard.load(tmp_path / "source", mp=2, rank=rank)
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not is_same(found[key], wanted[key])] == []
    reshard.convert(tmp_path / "source", tmp_path / "slices", to="dcp", mp=3)
    assert reshard.verify(tmp_path / "slices", tmp_path / "source").is_proven
    reshard.convert(tmp_path / "slices", tmp_path / "again", to="hf")
    for path in (tmp_path / "source").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", PARTS)
def test_experts_become_fp8_without_drafts(name: str, tmp_path: Path) -> None:
    part = PARTS[name]
    part.write(tmp_path / "source")
    part.oracle(tmp_path / "source", tmp_path / "wanted", 2, expert_dtype="fp8")  # type: ignore[call-arg]
    convert_checkpoint(Job(tmp_path / "source", 2, expert_dtype="fp8"), tmp_path / "found")
    require_equal(tmp_path / "wanted", tmp_path / "found")


@pytest.mark.parametrize("name", PARTS)
def test_some_layers_of_it_are_taken_out_without_drafts(name: str, tmp_path: Path) -> None:
    part = PARTS[name]
    part.write(tmp_path / "source")
    subset = Subset((1, 2, 3, 4), None, renumber=True)
    convert_checkpoint(Job(tmp_path / "source", 1, to="hf", subset=subset), tmp_path / "part")
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    assert (config["num_hidden_layers"], len(config["compress_ratios"])) == (4, 4)
    plan = convert_checkpoint(Job(tmp_path / "part", 2), tmp_path / "ranks").plan
    assert (plan.recipe.name, plan.counts["m"], plan.counts["i"]) == (part.recipe, 0, 4)


@pytest.mark.parametrize("name", PARTS)
def test_a_config_that_promises_drafts_is_refused_with_the_key_that_says_so(name: str, tmp_path: Path) -> None:
    """The hint leads on: with that key changed the same tensors are converted."""
    part = PARTS[name]
    whole: dict[str, Any] = dict(FAMILIES[part.family].small)
    part.write(tmp_path / "source", whole)
    problem = problems_of(tmp_path / "source")[0]
    assert (problem.kind, problem.subject) == ("contradiction", "MTP blocks")
    assert problem.found == "0 by the names of the tensors (none)"
    if name == "Vision-Exp":
        assert "set dspark_block_size in config.json to 0" in problem.remedy
        mended = {**whole, "dspark_block_size": 0}
    else:
        assert f"shorten compress_ratios to its first {whole['num_hidden_layers']} values" in problem.remedy
        mended = dict(part.config)
    (tmp_path / "source" / "config.json").write_text(json.dumps(mended))
    assert plan_conversion(Job(tmp_path / "source", 2)).counts["m"] == 0


# --- V4-Flash-Vision-Exp ---

VISION = FAMILIES["deepseek-v4-flash-vision"]


@pytest.mark.parametrize(
    "lost",
    [
        "layers.0.ffn.gate.bias",
        "layers.4.ffn.gate.bias_vl",
        "layers.1.ffn.shared_experts.w2.scale",
        "mtp.1.ffn.gate.bias_vl",
        "mtp.2.markov_head.markov_w2.weight",
        "vision.norm.weight",
        "vision.blocks.10.attn.wqkv.bias",
        "aligner.w2.bias",
        "image_newline",
    ],
)
def test_what_lacks_of_a_model_with_vision_is_named(lost: str, tmp_path: Path) -> None:
    tensors = VISION.tensors(VISION.small)
    assert lost in {name for name, _, _ in tensors}
    write_tensors(tmp_path / "source", [entry for entry in tensors if entry[0] != lost], VISION.small, 2)
    (problem,) = problems_of(tmp_path / "source")
    if lost.endswith("scale"):
        assert (problem.kind, problem.subject) == ("weight-without-scale", lost.replace("scale", "weight"))
    else:
        assert (problem.kind, problem.subject) == ("missing-tensor", lost)


def test_a_hash_layer_without_its_table_is_refused_with_both_counts(tmp_path: Path) -> None:
    tensors = [entry for entry in VISION.tensors(VISION.small) if entry[0] != "layers.2.ffn.gate.tid2eid"]
    write_tensors(tmp_path / "source", tensors, VISION.small, 2)
    (problem,) = problems_of(tmp_path / "source")
    assert (problem.kind, problem.subject) == ("contradiction", "hash layers")
    assert problem.found.startswith("2 by the names")
    assert problem.expected.startswith("3, as num_hash_layers")


@pytest.mark.parametrize("told_by", ["config and names", "names"])
def test_the_recipe_with_vision_is_that_of_its_names_and_0731_has_another(told_by: str, tmp_path: Path) -> None:
    for name, recipe in (("deepseek-v4-flash-vision", "deepseek-v4-vision"), ("deepseek-v4-flash-0731", DSPARK)):
        write_small(tmp_path / name, name)
        if told_by == "names":
            (tmp_path / name / "config.json").unlink()
        assert plan_conversion(Job(tmp_path / name, 2)).recipe.name == recipe


@pytest.mark.parametrize("draftless", ["no key", "null", "0"])
def test_the_config_of_vision_tells_in_three_ways_that_nothing_drafts(draftless: str, tmp_path: Path) -> None:
    """The ratios of the draft blocks stay, and are not looked at."""
    config = {**VISION.small, "dspark_block_size": 0 if draftless == "0" else None}
    if draftless == "no key":
        config = {key: value for key, value in config.items() if not key.startswith("dspark")}
    tensors = VISION.tensors(VISION.small)
    write_tensors(tmp_path / "source", [one for one in tensors if not one[0].startswith("mtp.")], config, 2)
    convert_checkpoint(Job(tmp_path / "source", 2), tmp_path / "found")
    oracles.convert_v4_vision(tmp_path / "source", tmp_path / "wanted", 2)
    require_equal(tmp_path / "wanted", tmp_path / "found")
    args = json.loads((tmp_path / "found" / "run_config.json").read_text())
    assert (args["n_mtp_layers"], args.get("dspark_block_size", 0)) == (0, 0)


def test_drafts_that_the_config_denies_and_a_tower_that_lacks_are_refused(tmp_path: Path) -> None:
    tensors = VISION.tensors(VISION.small)
    write_tensors(tmp_path / "drafts", tensors, {**VISION.small, "dspark_block_size": 0}, 2)
    assert {(one.kind, one.subject) for one in problems_of(tmp_path / "drafts")} == {("contradiction", "MTP blocks")}
    blind = [one for one in tensors if not one[0].startswith(("vision.", "aligner.", "image_"))]
    write_tensors(tmp_path / "blind", blind, {**VISION.small, "vision_n_layers": 0}, 2)
    found = problems_of(tmp_path / "blind")
    assert {one.kind for one in found} == {"missing-tensor"}
    assert {one.subject for one in found} >= {"vision.norm.weight", "aligner.w1.weight", "image_pad"}


def test_the_run_configuration_tells_the_tower(tmp_path: Path) -> None:
    write_small(tmp_path / "source", "deepseek-v4-flash-vision")
    convert_checkpoint(Job(tmp_path / "source", 1), tmp_path / "found")
    args = json.loads((tmp_path / "found" / "run_config.json").read_text())
    assert {key: args[key] for key in args if key.startswith(("vision", "dspark"))} == {
        key: VISION.small[key] for key in VISION.small if key.startswith(("vision", "dspark"))
    }
    assert (args["n_mtp_layers"], args["norm_eps"], args["expert_dtype"]) == (3, 1e-20, "fp4")


# --- V4-Pro-0813 ---


@pytest.mark.parametrize("ranks", [1, 8, 16])
def test_pro_with_the_drafts_of_0731_is_cut_as_the_script_would(ranks: int, tmp_path: Path) -> None:
    write_small(tmp_path / "source", "deepseek-v4-pro-0813")
    oracles.convert_v4_0731(tmp_path / "source", tmp_path / "wanted", ranks)
    plan = convert_checkpoint(Job(tmp_path / "source", ranks), tmp_path / "found").plan
    assert (plan.recipe.name, plan.counts["m"], plan.notes) == (DSPARK, 3, ())
    require_equal(tmp_path / "wanted", tmp_path / "found")
    args = json.loads((tmp_path / "found" / "run_config.json").read_text())
    for rank in range(ranks):
        path = tmp_path / "found" / f"model{rank}-mp{ranks}.safetensors"
        assert differences(v4_0731_parameters(args, ranks, rank), path) == []
