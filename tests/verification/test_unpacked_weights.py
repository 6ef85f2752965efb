"""Targets in BF16 of packed weights, written by hand: true ones are proven, and every wrong byte is seen.

The target is cut by torch from what torch makes of the codes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import packed_weights
import pytest
import torch
from packed_weights import Stored, save_packed
from safetensors.torch import load_file, save_file
from verified_targets import verify_target

from reshard.recipes.recipe import load_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.types import PACKED, Checkpoint, Share
from reshard.verification.compared_shares import compare_traced_share, merge_comparisons
from reshard.verification.report import Report
from reshard.verification.stored_packings import find_packed_weights
from reshard.verification.verify import trace_target

RANKS = 2
LEAST = Fraction(1, 10**8)
SMALL_TILES = Fraction(1)
"""A sample of all: in its small tiles, of which a weight has many."""
RECIPE = """
name = "own"
about = "for one test"
left = "one"
right = "other"
files = "model{rank}-mp{ranks}.safetensors"
rules = [
["same", "awq.weight", "awq.weight", "rows"],
["same", "awq_cut.weight", "awq_cut.weight", "columns"],
["same", "gptq.weight", "gptq.weight", "rows"],
["same", "gptq_cut.weight", "gptq_cut.weight", "columns"],
["same", "integers.weight", "integers.weight", "replicate"],
["same", "nvfp4.weight", "nvfp4.weight", "rows padded to 64"],
["same", "experts.whole", "experts.whole", "rows"],
["same", "experts.middle", "experts.middle", "dimension 1"],
["same", "experts.last", "experts.last", "dimension 2"],
["flatten", "experts.flat", "experts.flat", "dimension 1", "[?, ?, 24]"],
["concat", "fp8.weight", "fused.weight", "rows"],
["concat", "mxfp4.weight", "fused.weight", "rows"],
["same", "plain", "plain", "rows"],
]
"""
SCHEME = {"num_bits": 4, "group_size": 32, "strategy": "group"}
CONFIG = {
    "torch_dtype": "float16",
    "quantization_config": {"bits": 4, "group_size": 32, "config_groups": {"one": {"weights": SCHEME}}},
}


def make_weights() -> dict[str, Stored]:
    """One packed weight of each packing, some of them twice, by the names of their modules."""
    return {
        "awq": packed_weights.make_awq(64, 96, "F16", 32),
        "awq_cut": packed_weights.make_awq(264, 672, "F16", 32),
        "gptq": packed_weights.make_gptq(64, 96, 4, "F16", 32, is_v2=False),
        "gptq_cut": packed_weights.make_gptq(72, 384, 4, "BF16", 32, is_v2=False),
        "integers": packed_weights.make_integers(67, 96, 4, "BF16", 32, has_zeros=True),
        "nvfp4": packed_weights.make_nvfp4(100, 96, divides=False),
        "experts.whole": packed_weights.make_experts(4, 24, 96),
        "experts.middle": packed_weights.make_experts(4, 600, 128),
        "experts.last": packed_weights.make_experts(4, 24, 96),
        "experts.flat": packed_weights.make_experts(4, 24, 128),
        "fp8": packed_weights.make_fp8(48, 96, "F32", each_row=True),
        "mxfp4": packed_weights.make_mxfp4(32, 96),
    }


def make_number(result: torch.Tensor) -> torch.Tensor:
    """The same with the one pattern for what is no number."""
    words = torch.where(torch.isnan(result), 0x7FC0, result.view(torch.int16).int()).to(torch.int16)
    return words.view(torch.bfloat16)


def make_rank(results: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """What a rank should hold, cut by torch."""

    def cut(name: str, dimension: int) -> torch.Tensor:
        return results[name].chunk(RANKS, dimension)[rank].contiguous()

    cuts = {"awq": 0, "awq_cut": 1, "gptq": 0, "gptq_cut": 1}
    made = {f"{name}.weight": cut(name, dimension) for name, dimension in cuts.items()}
    padded = torch.cat([results["nvfp4"], torch.zeros(28, 96, dtype=torch.bfloat16)])
    return {
        **made,
        "integers.weight": results["integers"],
        "nvfp4.weight": padded.chunk(RANKS)[rank].contiguous(),
        "experts.whole": cut("experts.whole", 0),
        "experts.middle": cut("experts.middle", 1),
        "experts.last": cut("experts.last", 2),
        "experts.flat": cut("experts.flat", 1).flatten(1),
        "fused.weight": torch.cat([cut("fp8", 0), cut("mxfp4", 0)]),
        "plain": cut("plain", 0),
    }


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a recipe and a target."""
    folder = tmp_path_factory.mktemp("unpacked")
    (folder / "source").mkdir()
    (folder / "target").mkdir()
    (folder / "whole").mkdir()
    weights, plain = make_weights(), torch.arange(40).bfloat16().reshape(8, 5)
    save_packed(folder / "source" / "model.safetensors", weights, {"plain": plain})
    (folder / "own.toml").write_text(RECIPE)
    (folder / "source" / "config.json").write_text(json.dumps(CONFIG))
    results = {name: make_number(stored.result) for name, stored in weights.items()}
    for rank in range(RANKS):
        save_file(make_rank({**results, "plain": plain}, rank), folder / "target" / f"model{rank}-mp2.safetensors")
    whole = {name if "." in name else f"{name}.weight": result for name, result in results.items()}
    save_file({**whole, "plain": plain}, folder / "whole" / "model.safetensors")
    (folder / "whole" / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    return folder


def read_dequantized(folder: Path) -> Checkpoint:
    """The checkpoint under plain names."""
    stored = read_checkpoint(folder)
    weights = tuple(find_packed_weights(stored))
    inputs = {part.name for packed in weights for part in packed.list_inputs()}
    tensors = {name: one for name, one in stored.tensors.items() if one.dtype == "BF16" and name not in inputs}
    placed = [packed._replace(result=packed.result._replace(file=PACKED + i)) for i, packed in enumerate(weights)]
    return replace(stored, tensors={**tensors, **{one.result.name: one.result for one in placed}}, packed=tuple(placed))


def verify(made: Path, target: str = "target", **options: Any) -> Report:
    recipe = load_recipe(str(made / "own.toml"))
    return verify_target(made / target, read_dequantized(made / "source"), recipe, **options)


def test_a_true_target_is_proven(made: Path) -> None:
    report = verify(made)
    assert not report.problems
    assert report.casts == {"dequantize": 12 * RANKS - RANKS}, "two are fused"
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in (made / "target").iterdir()]
    assert report.compared == report.size == sum(sizes)
    assert not verify(made, sample=SMALL_TILES).problems


def test_shares_compare_all_once(made: Path) -> None:
    recipe = load_recipe(str(made / "own.toml"))
    sides = made / "target", read_dequantized(made / "source"), recipe
    traced = trace_target(*sides, None, stacked=None, packed=None, ignore_extra_files=False)
    found = [compare_traced_share(traced, Share(number, 3), None, None) for number in range(3)]
    assert all(one.size and not one.differences for one in found)
    assert merge_comparisons(traced, found, None).size == verify(made).compared


def test_whole_files_are_proven(made: Path) -> None:
    report = verify(made, "whole")
    assert not report.problems
    assert report.casts == {"dequantize": 12}


def find_places(path: Path) -> dict[str, tuple[int, int]]:
    """By the name of a tensor: where its bytes begin and end in the file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return {
        name: (8 + size + entry["data_offsets"][0], 8 + size + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


@pytest.fixture
def damaged(made: Path) -> Callable[[str, int, int], list[tuple[str, str]]]:
    """Verifies a target with one changed byte of a tensor, and mends it."""

    def verify_damaged(name: str, rank: int, place: int, **options: Any) -> list[tuple[str, str]]:
        path = made / "target" / f"model{rank}-mp2.safetensors"
        begin, end = find_places(path)[name]
        place = begin + place if place >= 0 else end + place
        with path.open("r+b") as file:
            file.seek(place)
            (old,) = file.read(1)
            file.seek(place)
            file.write(bytes([old ^ 1]))
        try:
            report = verify(made, **options)
        finally:
            with path.open("r+b") as file:
                file.seek(place)
                file.write(bytes([old]))
        assert all(f"byte {place - begin:,} of the tensor" in problem.found for problem in report.problems)
        return [(problem.kind, problem.subject) for problem in report.problems]

    return verify_damaged


NAMES = [
    *("awq.weight", "awq_cut.weight", "gptq.weight", "gptq_cut.weight", "integers.weight", "nvfp4.weight"),
    *("experts.whole", "experts.middle", "experts.last", "experts.flat", "fused.weight"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_byte_is_seen(name: str, damaged: Callable[..., list[tuple[str, str]]]) -> None:
    for place, sample in ((0, None), (1801, None), (-1, None), (6001, SMALL_TILES)):
        assert damaged(name, 1, place, sample=sample) == [("differs", f"model1-mp2.safetensors: {name}")]


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_sees_both_ends(name: str, damaged: Callable[..., list[tuple[str, str]]]) -> None:
    for rank, place in ((0, 0), (1, -1)):
        assert damaged(name, rank, place, sample=LEAST) == [("differs", f"model{rank}-mp2.safetensors: {name}")]


def write_slices(folder: Path, whole: Mapping[str, torch.Tensor], ranks: int) -> None:
    """Slices of whole tensors, as `torch.chunk` cuts them."""
    folder.mkdir()
    for rank in range(ranks):
        step = {name: -(-len(tensor) // ranks) for name, tensor in whole.items()}
        own = {name: tensor[rank * step[name] : (rank + 1) * step[name]] for name, tensor in whole.items()}
        own = {name: part for name, part in own.items() if len(part)}
        places = {name: {"saved_offsets": [rank * step[name], *[0] * (part.dim() - 1)]} for name, part in own.items()}
        metadata = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0"}
        save_file(own, folder / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors", metadata)


def test_slices_are_proven(made: Path, tmp_path: Path) -> None:
    whole = load_file(made / "whole" / "model.safetensors")
    write_slices(tmp_path / "good", whole, 3)
    (tmp_path / "good" / "config.json").write_text((made / "whole" / "config.json").read_text())
    source, recipe = read_dequantized(made / "source"), load_recipe(str(made / "own.toml"))
    report = verify_target(tmp_path / "good", source, recipe)
    assert not report.problems
    assert report.compared == report.size == sum(tensor.nbytes for tensor in whole.values())
    for name, row in (("gptq_cut.weight", 71), ("experts.last", 2), ("integers.weight", 24)):
        changed = {**whole, name: whole[name].clone()}
        changed[name][row].view(-1).view(torch.int16)[-1] ^= 1
        write_slices(tmp_path / name, changed, 3)
        problems = verify_target(tmp_path / name, source, recipe).problems
        found = [(one.kind, one.subject.split()[-1]) for one in problems if one.kind == "differs"]
        assert found == [("differs", name)]


def test_a_difference_tells_what_it_was_made_of(made: Path, tmp_path: Path) -> None:
    wrong = load_file(made / "whole" / "model.safetensors")
    wrong["gptq.weight"].view(torch.int16)[3, 5] ^= 1
    save_file(wrong, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((made / "whole" / "config.json").read_text())
    recipe = load_recipe(str(made / "own.toml"))
    (problem,) = verify_target(tmp_path, read_dequantized(made / "source"), recipe).problems
    assert (problem.kind, problem.expected) == ("differs", "what dequantize makes of gptq.qweight (gptq)")


def test_a_weight_of_another_dtype_or_shape_is_seen(made: Path, tmp_path: Path) -> None:
    wrong = load_file(made / "whole" / "model.safetensors")
    wrong["gptq.weight"] = wrong["gptq.weight"].float()
    wrong["awq.weight"] = wrong["awq.weight"].T.contiguous()
    save_file(wrong, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((made / "whole" / "config.json").read_text())
    recipe = load_recipe(str(made / "own.toml"))
    problems = verify_target(tmp_path, read_dequantized(made / "source"), recipe).problems
    assert {(one.kind, one.subject.split()[-1]) for one in problems} >= {
        ("wrong-shape", "gptq.weight"),
        ("wrong-shape", "awq.weight"),
    }


SCALED_RECIPE = """
name = "scaled"
about = "for one test"
left = "one"
right = "other"
files = "model{rank}-mp{ranks}.safetensors"
scales.p = { left = "weight_scale_inv", right = "scale", block = 128 }
placeholders.i = { counts = "layers" }
rules = [
["same", "layers.{i}.{p}", "layers.{i}.{p}", "rows"],
]
"""


def test_a_weight_that_was_never_packed_may_stay_among_others(tmp_path: Path) -> None:
    """In a row whose weights may have block scales, most of one kind are cast in one way."""
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "own.toml").write_text(SCALED_RECIPE)
    packed = packed_weights.make_gptq(64, 96, 4, "F16", 32, is_v2=False)
    plain = torch.ones(64, 96, dtype=torch.bfloat16)
    others = {"layers.1.weight": plain, "layers.2.weight": plain + 1}
    save_packed(tmp_path / "source" / "model.safetensors", {"layers.0": packed}, others)
    (tmp_path / "source" / "config.json").write_text(json.dumps(CONFIG))
    save_file({"layers.0.weight": make_number(packed.result), **others}, tmp_path / "target" / "model0-mp1.safetensors")
    source, recipe = read_dequantized(tmp_path / "source"), load_recipe(str(tmp_path / "own.toml"))
    report = verify_target(tmp_path / "target", source, recipe)
    assert not report.problems
    assert report.casts == {"dequantize": 1}


def test_a_config_that_still_tells_of_codes_is_seen(made: Path, tmp_path: Path) -> None:
    save_file(load_file(made / "whole" / "model.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "bfloat16"}))
    recipe = load_recipe(str(made / "own.toml"))
    problems = verify_target(tmp_path, read_dequantized(made / "source"), recipe).problems
    assert [(one.kind, one.subject) for one in problems] == [("wrong-config", "config.json: quantization_config")]
