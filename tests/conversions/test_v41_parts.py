"""DeepSeek-V4.1 without its vision tower, without its draft blocks, and without both: its inference code runs these."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import oracle_families
import pytest
from conversions import require_equal
from families import FAMILIES, FEW_V41, SMALL_V41
from jobs import Job, convert_checkpoint, plan_conversion
from skeletons import differences
from skeletons_v4 import v41_parameters

import reshard
from reshard.errors import Refused
from reshard.synthetic import write_tensors

Config = Mapping[str, Any]
Change = Callable[[Config], Config]

RATIOS = FEW_V41["text_config"]["compress_ratios"]
DRAFT_RATIOS = 3


def text(config: Config, **changes: Any) -> Config:
    return {**config, "text_config": {**config["text_config"], **changes}}


def seen(config: Config, **changes: Any) -> Config:
    return {**config, "vision_config": {**config["vision_config"], **changes}}


def leave_out(config: Config, key: str) -> Config:
    return {name: value for name, value in config.items() if name != key}


def as_it_is(config: Config) -> Config:
    return config


BLIND: Mapping[str, Change] = {
    "eyes": as_it_is,
    "no layers": lambda config: seen(config, num_hidden_layers=0),
    "null": lambda config: {**config, "vision_config": None},
    "no key": lambda config: leave_out(config, "vision_config"),
}
DRAFTLESS: Mapping[str, Change] = {
    "draft": as_it_is,
    "0, ratios stay": lambda config: text(config, dspark_block_size=0),
    "0, ratios too": lambda config: text(config, dspark_block_size=0, compress_ratios=RATIOS[:-DRAFT_RATIOS]),
    "no key": lambda config: {
        **config,
        "text_config": {key: value for key, value in config["text_config"].items() if "dspark" not in key},
    },
}


def make(folder: Path, blind: str, draftless: str, whole: Config = FEW_V41) -> Config:
    config = DRAFTLESS[draftless](BLIND[blind](whole))
    write_tensors(folder, FAMILIES["deepseek-v4.1-flash"].tensors(config), config, 3)
    return config


@pytest.mark.parametrize(
    ("blind", "draftless"),
    [
        *((blind, "draft") for blind in BLIND if blind != "eyes"),
        *(("eyes", draftless) for draftless in DRAFTLESS if draftless != "draft"),
        ("no layers", "0, ratios stay"),
        ("no key", "no key"),
    ],
)
def test_the_ranks_are_those_of_the_oracle_and_of_the_model(blind: str, draftless: str, tmp_path: Path) -> None:
    make(tmp_path / "source", blind, draftless)
    oracle_families.convert_v41(tmp_path / "source", tmp_path / "wanted", 2)
    convert_checkpoint(Job(tmp_path / "source", 2), tmp_path / "found")
    require_equal(tmp_path / "wanted", tmp_path / "found")
    args = json.loads((tmp_path / "found" / "run_config.json").read_text())
    assert args["vision_n_layers"] == (11 if blind == "eyes" else 0)
    assert (args["n_mtp_layers"], args.get("dspark_block_size", 0)) == ((3, 5) if draftless == "draft" else (0, 0))
    for rank in range(2):
        assert differences(v41_parameters(args, 2, rank), tmp_path / "found" / f"model{rank}-mp2.safetensors") == []
    assert reshard.verify(tmp_path / "found", tmp_path / "source").is_proven
    assert reshard.verify(tmp_path / "found").is_proven


@pytest.mark.parametrize(
    ("blind", "draftless"), [("no layers", "draft"), ("eyes", "0, ratios stay"), ("null", "no key")]
)
def test_it_is_restored_and_cut_again(blind: str, draftless: str, tmp_path: Path) -> None:
    make(tmp_path / "source", blind, draftless)
    # `wo_a` becomes BF16 in rank files: what is restored once is exact from then on.
    convert_checkpoint(Job(tmp_path / "source", 2), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "whole")
    convert_checkpoint(Job(tmp_path / "whole", 4), tmp_path / "four")
    oracle_families.convert_v41(tmp_path / "source", tmp_path / "wanted", 4)
    require_equal(tmp_path / "wanted", tmp_path / "four")
    assert reshard.verify(tmp_path / "whole", tmp_path / "ranks").is_proven


@pytest.mark.parametrize(("blind", "draftless"), [("no layers", "0, ratios stay"), ("null", "no key")])
def test_some_layers_of_it_are_taken_out(blind: str, draftless: str, tmp_path: Path) -> None:
    make(tmp_path / "source", blind, draftless, SMALL_V41)
    reshard.convert(tmp_path / "source", tmp_path / "part", to="hf", experts=range(8))
    config = json.loads((tmp_path / "part" / "config.json").read_text())["text_config"]
    assert config["n_routed_experts"] == 8
    assert config.get("dspark_n_routed_experts") == (8 if draftless != "no key" else None)
    reshard.convert(tmp_path / "part", tmp_path / "ranks", mp=2)
    assert reshard.verify(tmp_path / "ranks", tmp_path / "part").is_proven


def write_with_config(folder: Path, tensors_of: Config, config: Config) -> None:
    """The tensors of one config, and the config of another."""
    write_tensors(folder, FAMILIES["deepseek-v4.1-flash"].tensors(tensors_of), config, 2)


@pytest.mark.parametrize(
    ("change", "subjects", "found", "key"),
    [
        (BLIND["no layers"], ["vision blocks"], "11 by the names", "0, as vision_config.num_hidden_layers"),
        (BLIND["null"], ["vision blocks"], "11 by the names", "0, as vision_config.num_hidden_layers"),
        (
            DRAFTLESS["0, ratios stay"],
            ["MTP blocks", "MTP experts"],
            "3 by the names",
            "0, as text_config.dspark_block_size",
        ),
    ],
)
def test_tensors_of_a_part_that_the_config_denies_are_refused(
    change: Change, subjects: list[str], found: str, key: str, tmp_path: Path
) -> None:
    write_with_config(tmp_path / "source", FEW_V41, change(FEW_V41))
    with pytest.raises(Refused) as refused:
        plan_conversion(Job(tmp_path / "source", 2))
    assert [problem.subject for problem in refused.value.problems] == subjects
    problem = refused.value.problems[0]
    assert (problem.kind, problem.found[: len(found)], problem.expected[: len(key)]) == ("contradiction", found, key)
    assert f"give {key.removeprefix('0, as ')} back its value" in problem.remedy


@pytest.mark.parametrize(
    ("change", "subject", "found", "hint"),
    [
        (BLIND["no layers"], "vision blocks", "0 by the names", "vision_config.num_hidden_layers in config.json to 0"),
        (
            DRAFTLESS["0, ratios too"],
            "MTP blocks",
            "0 by the names",
            "text_config.dspark_block_size in config.json to 0",
        ),
    ],
)
def test_a_part_that_the_config_promises_and_that_is_not_there_is_refused(
    change: Change, subject: str, found: str, hint: str, tmp_path: Path
) -> None:
    """The hint leads on: with that key changed the same tensors are converted."""
    write_with_config(tmp_path / "source", change(FEW_V41), FEW_V41)
    with pytest.raises(Refused) as refused:
        plan_conversion(Job(tmp_path / "source", 2))
    problem = refused.value.problems[0]
    assert (problem.subject, problem.found[: len(found)]) == (subject, found)
    assert hint in problem.remedy
    (tmp_path / "source" / "config.json").write_text(json.dumps(change(FEW_V41)))
    assert plan_conversion(Job(tmp_path / "source", 2)).files


def test_a_draft_that_the_ratios_leave_out_and_the_block_size_does_not_is_refused_with_the_key(tmp_path: Path) -> None:
    config = DRAFTLESS["0, ratios too"](FEW_V41)
    write_with_config(tmp_path / "source", config, text(config, dspark_block_size=5))
    with pytest.raises(Refused) as refused:
        plan_conversion(Job(tmp_path / "source", 2))
    problem = refused.value.problems[0]
    assert (problem.kind, problem.subject) == ("contradiction", "MTP experts")
    assert "text_config.dspark_block_size in config.json to 0" in problem.remedy


def test_a_missing_tensor_of_the_draft_is_named_and_so_is_the_key(tmp_path: Path) -> None:
    tensors = FAMILIES["deepseek-v4.1-flash"].tensors(FEW_V41)
    rest = [entry for entry in tensors if not entry[0].startswith("mtp.0.main_")]
    write_tensors(tmp_path / "source", rest, FEW_V41, 2)
    with pytest.raises(Refused) as refused:
        plan_conversion(Job(tmp_path / "source", 2))
    assert {problem.kind for problem in refused.value.problems} == {"missing-tensor"}
    assert {problem.subject for problem in refused.value.problems} >= {
        "mtp.0.main_proj.weight",
        "mtp.0.main_norm.weight",
    }
    assert "text_config.dspark_block_size 0" in refused.value.problems[0].remedy


def test_biases_for_images_without_a_vision_tower_are_refused(tmp_path: Path) -> None:
    """The code has none then, and loads strictly."""
    tensors = FAMILIES["deepseek-v4.1-flash"].tensors(FEW_V41)
    blind = [entry for entry in tensors if not entry[0].startswith(("vision.", "aligner.", "image_"))]
    write_tensors(tmp_path / "source", blind, BLIND["no layers"](FEW_V41), 2)
    with pytest.raises(Refused) as refused:
        plan_conversion(Job(tmp_path / "source", 2))
    problem = refused.value.problems[0]
    assert (problem.kind, problem.subject) == ("contradiction", "layers.{i}.ffn.gate.bias_vl")
    assert "recipe of your own" in problem.remedy
