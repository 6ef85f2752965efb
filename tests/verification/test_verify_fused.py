"""Fused rank files, written by hand, against their source: true ones are proven, and every damage is named."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import fused_files
import pytest
import torch
from fused_files import EXPERTS, F8, Tensors, describe, make_rank, name_rank_file, write_rank, write_ranks
from safetensors.torch import load_file
from verified_targets import verify_target

from reshard.recipe_types import Recipe
from reshard.recipes.recipe import load_recipe, parse_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.verification.constants import list_expected_constants
from reshard.verification.expected_ranks import find_source_rows
from reshard.verification.report import Report

LEAST = Fraction(1, 10**8)
BASE = "layers.0"
QKV = f"{BASE}.attn.qkv_proj.weight"
BIAS = f"{BASE}.attn.qkv_proj.bias"
GATE_UP = f"{BASE}.mlp.gate_up_proj.weight"
W13, W2 = f"{BASE}.experts.w13_weight", f"{BASE}.experts.w2_weight"
CONSTANT = f"{BASE}.attn._k_scale"
VERSION = "model.version"


@pytest.fixture(scope="session")
def left() -> Tensors:
    return fused_files.make_source()


@pytest.fixture(scope="session")
def source(left: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fused_files.write_source(tmp_path_factory.mktemp("fused") / "source", left)


@pytest.fixture(scope="session")
def good(left: Tensors, source: Path) -> Path:
    return write_ranks(source.parent / "good", left, 2)


@pytest.fixture
def target(good: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(good, tmp_path / "target")


def load_tiny(source: Path) -> Recipe:
    return load_recipe(str(source.parent / "tiny-fused.toml"))


def verify(target: Path, source: Path, **options: Any) -> Report:
    return verify_target(target, read_checkpoint(source), load_tiny(source), **options)


def change(target: Path, rank: int, changes: Mapping[str, torch.Tensor | None]) -> None:
    """Write a rank file anew with these tensors in the place of its own; None leaves one out."""
    tensors = {**load_file(target / name_rank_file(rank)), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_rank(target, rank, kept, describe(rank, 2))


def facts(report: Report) -> list[tuple[str, str]]:
    return [(problem.kind, problem.subject) for problem in report.problems]


def subject(rank: int, name: str) -> str:
    return f"{name_rank_file(rank)}: {name}"


def find_data(path: Path, name: str) -> int:
    """Find the first byte of a tensor in its file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return start + int(json.loads(content[8:start])[name]["data_offsets"][0])


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))


# --- true ones ---


def keep(tensors: Tensors) -> Tensors:
    return tensors


CASTS: Mapping[str, tuple[dict[str, torch.dtype], Callable[[Tensors], Tensors], set[str]]] = {
    "kept": ({}, keep, set()),
    "dequantized": ({}, fused_files.cast_all_to_bf16, {"dequantize"}),
    "quantized": ({"quantized": torch.bfloat16}, fused_files.quantize_all, {"quantize"}),
    "rounded": ({"quantized": torch.bfloat16, "plain": torch.float32}, fused_files.cast_all_to_bf16, {"round"}),
    "F32": ({"plain": torch.float32}, keep, set()),
}


@pytest.mark.parametrize("has_metadata", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", CASTS)
def test_true_fused_files_are_proven(case: str, ranks: int, has_metadata: bool, tmp_path: Path) -> None:  # noqa: FBT001
    dtypes, cast, told = CASTS[case]
    left = fused_files.make_source(**dtypes)
    source = fused_files.write_source(tmp_path / "source", left)
    target = write_ranks(tmp_path / "target", cast(left), ranks, has_metadata=has_metadata)
    report = verify(target, source)
    assert report.is_proven, report
    assert (report.ranks, report.files) == (ranks, ranks)
    assert (
        report.compared == report.size == sum(t.nbytes for path in target.iterdir() for t in load_file(path).values())
    )
    assert set(report.casts) == {"fill", *told}
    assert report.casts["fill"] == 5 * ranks


def test_a_fused_tensor_counts_once(left: Tensors, source: Path, tmp_path: Path) -> None:
    """Not once for each of its parts."""
    report = verify(write_ranks(tmp_path / "target", fused_files.cast_all_to_bf16(left), 2), source)
    assert report.casts == {"dequantize": 2 * 2 * 4, "fill": 2 * 5}
    assert "16 tensors as the cast should give: dequantized to BF16" in str(report)
    assert "10 tensors as the recipe says: constants, counted in each rank file" in str(report)


@pytest.mark.parametrize("sample", [LEAST, Fraction(1, 10)])
def test_a_sample_of_true_files_finds_nothing(sample: Fraction, good: Path, source: Path) -> None:
    report = verify(good, source, sample=sample)
    assert report.verdict == "sampled"


def test_some_ranks_are_verified_alone(target: Path, source: Path) -> None:
    (target / name_rank_file(0)).unlink()
    report = verify(target, source, ranks=[1])
    assert report.is_proven, report
    assert (report.files, report.ranks) == (1, 2)


def test_whole_files_of_such_a_recipe_have_no_fused_tensors_and_no_constants(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "target")
    (tmp_path / "target" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {n: p.name for p in source.glob("*.safetensors") for n in load_file(p)}})
    )
    report = verify(tmp_path / "target", source)
    assert report.is_proven, report
    assert report.is_whole


def test_a_model_without_biases_has_no_fused_bias(left: Tensors, tmp_path: Path) -> None:
    without = {name: tensor for name, tensor in left.items() if not name.endswith("bias")}
    source = fused_files.write_source(tmp_path / "source", without)
    for rank in range(2):
        tensors = {name: t for name, t in make_rank(left, rank, 2).items() if not name.endswith("bias")}
        write_rank(tmp_path / "target", rank, tensors, describe(rank, 2))
    report = verify(tmp_path / "target", source)
    assert report.is_proven, report


# --- one byte ---


def list_parts(left: Tensors, ranks: int) -> list[tuple[str, int, int, str]]:
    """List parts of the fused tensors of layer 0: the fused name, the part's first byte and size in it, its source."""
    heads = min(ranks, fused_files.KV_HEADS)
    groups = {
        QKV: [
            (f"{BASE}.attn.{kind}_proj.weight", parts) for kind, parts in zip("qkv", (ranks, heads, heads), strict=True)
        ],
        BIAS: [
            (f"{BASE}.attn.{kind}_proj.bias", parts) for kind, parts in zip("qkv", (ranks, heads, heads), strict=True)
        ],
    }
    for word in ("weight", "weight_scale_inv"):
        both = ("gate", "up")
        groups[f"{BASE}.mlp.gate_up_proj.{word}"] = [(f"{BASE}.mlp.{kind}_proj.{word}", ranks) for kind in both]
        groups[f"{BASE}.experts.w13_{word}"] = [
            (f"{BASE}.experts.{expert}.{kind}_proj.{word}", ranks) for expert in range(EXPERTS) for kind in both
        ]
        groups[f"{BASE}.experts.w2_{word}"] = [
            (f"{BASE}.experts.{expert}.down_proj.{word}", ranks) for expert in range(EXPERTS)
        ]
    found = []
    for fused, parts in groups.items():
        place = 0
        for name, count in parts:
            size = left[name].nbytes // count
            found.append((fused, place, size, name))
            place += size
    return found


@pytest.mark.parametrize("sample", [None, LEAST])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_byte_of_every_part_is_named_with_its_source(
    ranks: int, sample: Fraction | None, left: Tensors, source: Path, tmp_path: Path
) -> None:
    target = write_ranks(tmp_path / "target", left, ranks)
    rank = ranks - 1
    path = target / name_rank_file(rank)
    expected = set()
    for number, (fused, begin, size, name) in enumerate(list_parts(left, ranks)):
        place = begin if number % 2 else begin + size - 1
        flip(path, find_data(path, fused) + place)
        byte = f"byte {place:,} of the tensor"
        expected.add((subject(rank, fused), f"first in {byte}", f"those of {name}"))
    report = verify(target, source, sample=sample)
    assert {problem.kind for problem in report.problems} == {"differs"}
    found = {(one.subject, one.found.split(", ")[1], one.expected) for one in report.problems}
    assert found == expected
    assert all(problem.found.startswith("1 other byte than in the source, ") for problem in report.problems)


def test_a_byte_of_a_cast_part_is_named_with_its_source(left: Tensors, source: Path, tmp_path: Path) -> None:
    target = write_ranks(tmp_path / "target", fused_files.cast_all_to_bf16(left), 2)
    path = target / name_rank_file(1)
    # Expert 10: behind ten experts of gate and up, 8 rows of 16 columns of BF16 each; then its gate.
    place = (10 * 2 + 1) * 8 * 16 * 2
    flip(path, find_data(path, W13) + place)
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.subject) == ("differs", subject(1, W13))
    assert f"first in byte {place:,} of the tensor" in problem.found
    assert problem.expected == f"what dequantize makes of {BASE}.experts.10.up_proj.weight"


def test_a_byte_of_a_new_fused_scale_is_named_with_its_source(tmp_path: Path) -> None:
    left = fused_files.make_source(quantized=torch.bfloat16)
    source = fused_files.write_source(tmp_path / "source", left)
    target = write_ranks(tmp_path / "target", fused_files.quantize_all(left), 2)
    path = target / name_rank_file(0)
    scale = f"{BASE}.mlp.gate_up_proj.weight_scale_inv"
    place = 4 * 4 * 4 + 1  # behind the scales of gate: 4 rows of blocks, 4 columns
    flip(path, find_data(path, scale) + place)
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.subject) == ("differs", subject(0, scale))
    assert f"first in byte {place:,} of the tensor" in problem.found
    assert problem.expected == f"what quantize makes of {BASE}.mlp.up_proj.weight"


# --- parts that changed places ---


def exchange(tensor: torch.Tensor, order: list[int]) -> torch.Tensor:
    return tensor.view(torch.uint8)[order].view(tensor.dtype) if tensor.element_size() == 1 else tensor[order]


@pytest.mark.parametrize("name", [W13, W2, f"{W13}_scale_inv", f"{W2}_scale_inv"])
def test_exchanged_experts_are_named(name: str, target: Path, source: Path) -> None:
    order = [{2: 10, 10: 2}.get(expert, expert) for expert in range(EXPERTS)]
    change(target, 0, {name: exchange(load_file(target / name_rank_file(0))[name], order)})
    report = verify(target, source)
    kinds = ("gate", "up") if "w13" in name else ("down",)
    word = name.rpartition(".")[2].partition("_")[2]
    wanted = {f"those of {BASE}.experts.{expert}.{kind}_proj.{word}" for expert in (2, 10) for kind in kinds}
    assert {problem.expected for problem in report.problems} == wanted
    assert set(facts(report)) == {("differs", subject(0, name))}


def test_experts_in_the_order_of_their_names_as_text_are_wrong(target: Path, source: Path) -> None:
    order = sorted(range(EXPERTS), key=str)
    change(target, 0, {W2: exchange(load_file(target / name_rank_file(0))[W2], order)})
    named = {problem.expected for problem in verify(target, source).problems}
    assert named == {f"those of {BASE}.experts.{expert}.down_proj.weight" for expert in range(2, EXPERTS)}


@pytest.mark.parametrize(
    ("name", "order", "kinds"),
    [
        (QKV, [*range(8), *range(12, 16), *range(8, 12)], ("k", "v")),
        (BIAS, [*range(8), *range(12, 16), *range(8, 12)], ("k", "v")),
        (QKV, [*range(8, 16), *range(8)], ("q", "k", "v")),
        (GATE_UP, [*range(16, 32), *range(16)], ("gate", "up")),
        (f"{GATE_UP}_scale_inv", [*range(4, 8), *range(4)], ("gate", "up")),
    ],
)
def test_exchanged_parts_are_named(
    name: str, order: list[int], kinds: tuple[str, ...], target: Path, source: Path
) -> None:
    change(target, 1, {name: exchange(load_file(target / name_rank_file(1))[name], order)})
    report = verify(target, source)
    assert set(facts(report)) == {("differs", subject(1, name))}
    base, word = ("attn" if "qkv" in name else "mlp"), name.rpartition(".")[2]
    wanted = {f"those of {BASE}.{base}.{kind}_proj.{word}" for kind in kinds}
    assert {problem.expected for problem in report.problems} == wanted


def test_the_gate_and_up_of_an_expert_that_changed_places_are_named(target: Path, source: Path) -> None:
    tensor = load_file(target / name_rank_file(0))[W13].view(torch.uint8).clone()
    tensor[7] = torch.cat([tensor[7, 8:], tensor[7, :8]])
    change(target, 0, {W13: tensor.view(F8)})
    wanted = {f"those of {BASE}.experts.7.{kind}_proj.weight" for kind in ("gate", "up")}
    assert {problem.expected for problem in verify(target, source).problems} == wanted


def test_the_heads_of_another_rank_are_named(left: Tensors, source: Path, tmp_path: Path) -> None:
    """At four ranks of two heads, ranks 2 and 3 hold the second."""
    target = write_ranks(tmp_path / "target", left, 4)
    tensors = make_rank(left, 2, 4)
    tensors[QKV][4:8] = left[f"{BASE}.attn.k_proj.weight"][:4]
    write_rank(target, 2, tensors, describe(2, 4))
    (problem,) = verify(target, source).problems
    assert (problem.subject, problem.expected) == (subject(2, QKV), f"those of {BASE}.attn.k_proj.weight")


# --- padded rows ---


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_margin_that_is_not_zero_is_seen(ranks: int, left: Tensors, source: Path, tmp_path: Path) -> None:
    target = write_ranks(tmp_path / "target", left, ranks)
    path = target / name_rank_file(ranks - 1)
    size = fused_files.PADDED_VOCABULARY // ranks * fused_files.HIDDEN * 2
    flip(path, find_data(path, "model.embed_tokens.weight") + size - 1)
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.subject) == ("differs", subject(ranks - 1, "model.embed_tokens.weight"))
    assert f"first in byte {size - 1:,} of the tensor" in problem.found


@pytest.mark.parametrize("rows", [50, 56, 128])
def test_rows_that_are_not_padded_to_the_multiple_are_named(rows: int, target: Path, source: Path) -> None:
    name = "model.embed_tokens.weight"
    change(target, 0, {name: torch.zeros(rows, fused_files.HIDDEN, dtype=torch.bfloat16)})
    problems = {(one.kind, one.subject): one.expected for one in verify(target, source).problems}
    assert problems["wrong-shape", subject(0, name)] == "BF16 [64, 16]"


# --- constants ---


@pytest.mark.parametrize(
    ("name", "value", "kind", "found", "expected"),
    [
        (CONSTANT, torch.tensor(0.25), "differs", "the value 0.25", "1.0, a constant of the recipe tiny-fused"),
        (CONSTANT, torch.tensor(float("nan")), "differs", "the value nan", "1.0, a constant of the recipe tiny-fused"),
        (CONSTANT, torch.tensor([1.0]), "wrong-shape", "F32 [1]", "F32 []"),
        (CONSTANT, torch.tensor(1, dtype=torch.int32), "wrong-shape", "I32 []", "F32 []"),
        (
            VERSION,
            torch.tensor([0.5, 0.75], dtype=torch.bfloat16),
            "differs",
            "the value 0.75",
            "0.5, a constant of the recipe tiny-fused",
        ),
        (
            f"{BASE}.attn._v_scale",
            torch.tensor(2.0, dtype=torch.float16),
            "differs",
            "the value 2.0",
            "1.0, a constant of the recipe tiny-fused",
        ),
    ],
)
def test_a_wrong_constant_is_named(
    name: str, value: torch.Tensor, kind: str, found: str, expected: str, target: Path, source: Path
) -> None:
    change(target, 1, {name: value})
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.subject) == (kind, subject(1, name))
    assert (problem.found, problem.expected) == (found, expected)


def test_a_constant_that_all_ranks_lack_is_named(target: Path, source: Path) -> None:
    for rank in range(2):
        change(target, rank, {CONSTANT: None})
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.subject) == ("missing-tensor", CONSTANT)


def test_a_constant_that_one_rank_lacks_is_named(target: Path, source: Path) -> None:
    change(target, 0, {VERSION: None})
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.subject, problem.found) == ("wrong-ranks", VERSION, "in ranks [1]")


def test_a_constant_of_a_layer_that_the_source_lacks_is_named(target: Path, source: Path) -> None:
    name = "layers.2.attn._k_scale"
    change(target, 0, {name: torch.tensor(1.0)})
    assert facts(verify(target, source)) == [("extra-tensor", subject(0, name))]


def test_a_constant_counts_the_members_of_its_placeholders(source: Path) -> None:
    """Those of dense layers are layers too; what is left out unless asked for counts only if it was."""
    text = load_text(source)
    text = text.replace(
        "placeholders.e = {",
        'placeholders.d = { counts = "dense layers", within = "i" }\n'
        'placeholders.m = { counts = "MTP layers", after = "i", marker = "layers.{m}.eh_proj.weight",'
        ' like = "i", optional = "drafts only" }\n'
        "placeholders.e = {",
    )
    for kind in ("gate", "up"):
        text = text.replace(f'"layers.{{i}}.mlp.{kind}_proj', f'"layers.{{d}}.mlp.{kind}_proj')
    text = text.replace('"layers.{i}.mlp.gate_up_proj', '"layers.{d}.mlp.gate_up_proj')
    text = text.replace("]\n\nrules", '["layers.{m}.attn._k_scale", "F32 []", 1.0],\n]\n\nrules')
    text = text.replace(
        "rules = [",
        'rules = [\n["same", "layers.{m}.eh_proj.weight", "layers.{m}.eh_proj.weight", "replicate"],',
    )
    recipe = parse_recipe(text, "tiny.toml")
    whole = read_checkpoint(source)
    some = {name: t for name, t in whole.tensors.items() if "layers.1" not in name or "mlp.gate_proj" in name}
    some["layers.2.eh_proj.weight"] = some["model.embed_tokens.weight"]._replace(name="layers.2.eh_proj.weight")
    some["layers.2.norm.weight"] = some["model.embed_tokens.weight"]._replace(name="layers.2.norm.weight")
    rows = find_source_rows(replace(whole, tensors=some), recipe).values()
    layers = [f"layers.{layer}.attn._{kind}_scale" for kind in "kv" for layer in (0, 1)]
    assert sorted(list_expected_constants(rows, recipe, [], has_optional=False)) == sorted([VERSION, *layers])
    with_mtp = [VERSION, *layers, "layers.2.attn._k_scale"]
    assert sorted(list_expected_constants(rows, recipe, [], has_optional=True)) == sorted(with_mtp)


def load_text(source: Path) -> str:
    return (source.parent / "tiny-fused.toml").read_text()


# --- missing and too many ---


@pytest.mark.parametrize("name", [QKV, BIAS, GATE_UP, f"{GATE_UP}_scale_inv", W13, W2, f"{W13}_scale_inv"])
def test_a_fused_tensor_that_all_ranks_lack_is_named_once(name: str, target: Path, source: Path) -> None:
    for rank in range(2):
        change(target, rank, {name: None})
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.subject, problem.expected) == ("missing-tensor", name, "in ranks [0, 1]")


@pytest.mark.parametrize("name", [QKV, W13, f"{W2}_scale_inv"])
def test_a_fused_tensor_that_one_rank_lacks_is_named_once(name: str, target: Path, source: Path) -> None:
    change(target, 1, {name: None})
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.subject, problem.found) == ("wrong-ranks", name, "in ranks [0]")


def test_a_new_weight_without_its_scale_is_named(tmp_path: Path) -> None:
    left = fused_files.make_source(quantized=torch.bfloat16)
    source = fused_files.write_source(tmp_path / "source", left)
    target = write_ranks(tmp_path / "target", fused_files.quantize_all(left), 2)
    change(target, 0, {f"{W13}_scale_inv": None})
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.subject) == ("missing-tensor", subject(0, W13))


def test_a_scale_of_a_dequantized_weight_is_named(left: Tensors, source: Path, tmp_path: Path) -> None:
    target = write_ranks(tmp_path / "target", fused_files.cast_all_to_bf16(left), 2)
    change(target, 0, {f"{W13}_scale_inv": torch.ones(EXPERTS, 4, 4)})
    assert facts(verify(target, source)) == [("extra-tensor", subject(0, f"{W13}_scale_inv"))]


@pytest.mark.parametrize("name", [f"{W13}_scale_inv", f"{BASE}.mlp.down_proj.weight_scale_inv"])
def test_a_scale_of_a_rounded_weight_is_named(name: str, tmp_path: Path) -> None:
    left = fused_files.make_source(quantized=torch.float32, plain=torch.float32)
    source = fused_files.write_source(tmp_path / "source", left)
    target = write_ranks(tmp_path / "target", fused_files.cast_all_to_bf16(left), 2)
    change(target, 0, {name: torch.ones(4, 4)})
    assert facts(verify(target, source)) == [("extra-tensor", subject(0, name))]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("layers.2.attn.qkv_proj.weight", "no layers.2.attn.q_proj.weight in the source"),
        ("layers.2.experts.w13_weight", "no layers.2.experts.0.gate_proj.weight in the source"),
        (f"{BASE}.attn.q_proj.weight", "no rule of the recipe"),
        (f"{BASE}.attn.rotary_emb.inv_freq", "no rule of the recipe"),
    ],
)
def test_a_tensor_too_many_is_named(name: str, found: str, target: Path, source: Path) -> None:
    change(target, 0, {name: torch.zeros(4, 4)})
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.subject, problem.found) == ("extra-tensor", subject(0, name), found)


def test_a_weight_that_was_converted_in_another_way_is_named_once(tmp_path: Path) -> None:
    left = fused_files.make_source()
    source = fused_files.write_source(tmp_path / "source", left)
    target = write_ranks(tmp_path / "target", left, 2)
    cast = make_rank(fused_files.cast_all_to_bf16(left), 1, 2)
    change(target, 1, {W13: cast[W13], f"{W13}_scale_inv": None})
    assert facts(verify(target, source)) == [("mixture", subject(1, W13))]


# --- shapes ---


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (QKV, (2, 8, 16), "BF16 [16, 16]"),
        (W13, (24, 8, 16), "F8_E4M3 [12, 16, 16]"),
        (W2, (12, 8, 16), "F8_E4M3 [12, 16, 8]"),
        (f"{W2}_scale_inv", (48, 2), "F32 [12, 4, 2]"),
    ],
)
def test_another_shape_of_the_same_bytes_is_named(
    name: str, shape: tuple[int, ...], expected: str, target: Path, source: Path
) -> None:
    change(target, 0, {name: load_file(target / name_rank_file(0))[name].reshape(shape)})
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.subject, problem.expected) == ("wrong-shape", subject(0, name), expected)


def test_another_dtype_of_the_same_bytes_is_named(target: Path, source: Path) -> None:
    change(target, 0, {QKV: load_file(target / name_rank_file(0))[QKV].view(torch.int16)})
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.found, problem.expected) == ("wrong-shape", "I16 [16, 16]", "BF16 [16, 16]")


def test_a_stack_of_too_few_experts_is_named(target: Path, source: Path) -> None:
    whole = load_file(target / name_rank_file(0))
    change(target, 0, {W2: exchange(whole[W2], [*range(11)])})
    (problem,) = verify(target, source).problems
    assert (problem.kind, problem.found) == ("wrong-shape", "F8_E4M3 [11, 16, 8]")


def test_parts_of_several_dtypes_are_told(left: Tensors, tmp_path: Path) -> None:
    """No fused tensor can hold both."""
    k = f"{BASE}.attn.k_proj.weight"
    source = fused_files.write_source(tmp_path / "source", {**left, k: left[k].view(torch.int16)})
    (one, other) = verify(write_ranks(tmp_path / "target", left, 2), source).problems
    assert (one.kind, other.kind, one.subject) == ("wrong-shape", "wrong-shape", subject(0, QKV))
    assert f"{k} I16 [4, 16]" in one.expected


def test_parts_whose_scales_do_not_lie_on_the_blocks_of_the_fused_tensor_are_told(tmp_path: Path) -> None:
    """Six rows of gate end inside a block of four."""
    left = fused_files.make_source()
    for kind in ("gate", "up"):
        name = f"{BASE}.mlp.{kind}_proj.weight"
        left[name] = left[name].view(torch.uint8)[:6].view(F8)
        left[f"{name}_scale_inv"] = left[f"{name}_scale_inv"][:2]
    source = fused_files.write_source(tmp_path / "source", left)
    (problem,) = verify(write_ranks(tmp_path / "target", left, 1), source).problems
    assert (problem.kind, problem.subject) == ("wrong-shape", subject(0, GATE_UP))
    assert problem.found == f"6 rows of {BASE}.mlp.gate_proj.weight"


# --- sources that lack parts ---


@pytest.mark.parametrize(
    "name",
    [
        f"{BASE}.attn.q_proj.weight",
        f"{BASE}.attn.v_proj.weight",
        f"{BASE}.attn.k_proj.bias",
        f"{BASE}.experts.5.up_proj.weight",
    ],
)
def test_a_part_that_the_source_lacks_is_named(name: str, left: Tensors, tmp_path: Path) -> None:
    some = {other: tensor for other, tensor in left.items() if other not in (name, f"{name}_scale_inv")}
    source = fused_files.write_source(tmp_path / "source", some)
    report = verify(write_ranks(tmp_path / "target", left, 2), source)
    assert ("missing-tensor", name) in facts(report)
    assert [problem.found for problem in report.problems if problem.subject == name] == ["not in the source"]
    assert len(report.problems) == 1


def test_a_gap_in_a_stack_is_named_unless_the_source_is_a_part(left: Tensors, source: Path, tmp_path: Path) -> None:
    gone = tuple(f".experts.{expert}." for expert in range(EXPERTS) if expert not in (0, 2, 10))
    target = tmp_path / "target"
    for rank in range(2):
        tensors = make_rank(left, rank, 2)
        for name in [name for name in tensors if ".experts.w" in name]:
            tensors[name] = exchange(tensors[name], [0, 2, 10])
        write_rank(target, rank, tensors, describe(rank, 2))
    whole = read_checkpoint(source)
    some = {name: tensor for name, tensor in whole.tensors.items() if not any(part in name for part in gone)}
    part = replace(whole, tensors=some, subset={"experts": [0, 2, 10]})
    report = verify_target(target, part, load_tiny(source))
    assert report.is_proven, report
    report = verify_target(target, replace(part, subset={}), load_tiny(source))
    assert ("missing-tensor", f"{BASE}.experts.5.up_proj.weight") in facts(report)


def test_an_expert_with_a_wild_number_does_not_make_a_stack_of_a_billion(left: Tensors, tmp_path: Path) -> None:
    name = f"{BASE}.experts.11.down_proj.weight"
    moved = {other.replace(".experts.11.", ".experts.999999999."): tensor for other, tensor in left.items()}
    source = fused_files.write_source(tmp_path / "source", moved)
    report = verify(write_ranks(tmp_path / "target", left, 1), source)
    assert ("missing-tensor", name) in facts(report)


# --- files ---


def test_swapped_rank_files_are_named_by_their_headers(target: Path, source: Path) -> None:
    one, other = (target / name_rank_file(rank) for rank in range(2))
    one.rename(target / "aside")
    other.rename(one)
    (target / "aside").rename(other)
    problems = [(p.kind, p.subject, p.found) for p in verify(target, source).problems]
    assert problems == [
        ("swapped-file", one.name, f"the header of {other.name}"),
        ("swapped-file", other.name, f"the header of {one.name}"),
    ]


def test_swapped_rank_files_without_metadata_are_seen(left: Tensors, source: Path, tmp_path: Path) -> None:
    for rank in range(2):
        write_rank(tmp_path, 1 - rank, make_rank(left, rank, 2), None)
    named = set(facts(verify(tmp_path, source)))
    assert {("differs", subject(rank, name)) for rank in range(2) for name in (QKV, W13, W2, GATE_UP)} <= named


@pytest.mark.parametrize("lost", range(4))
def test_a_missing_rank_file_is_named_by_the_headers_of_the_others(
    lost: int, left: Tensors, source: Path, tmp_path: Path
) -> None:
    write_ranks(tmp_path, left, 4)
    (tmp_path / name_rank_file(lost)).unlink()
    assert facts(verify(tmp_path, source)) == [("missing-file", name_rank_file(lost))]


def test_without_metadata_the_highest_number_counts(left: Tensors, source: Path, tmp_path: Path) -> None:
    write_ranks(tmp_path, left, 4, has_metadata=False)
    (tmp_path / name_rank_file(1)).unlink()
    assert facts(verify(tmp_path, source)) == [("missing-file", name_rank_file(1))]


def test_a_file_of_another_number_of_ranks_is_named(left: Tensors, target: Path, source: Path) -> None:
    write_ranks(target, left, 2)
    tensors = make_rank(left, 1, 2)
    write_rank(target, 1, tensors, describe(1, 2) | {"ranks": "1"})
    write_rank(target, 5, tensors, describe(5, 2))
    problems = facts(verify(target, source))
    assert problems == [("extra-file", name_rank_file(5)), ("wrong-ranks", name_rank_file(1))]


def test_a_second_part_of_a_rank_is_a_file_too_many(target: Path, source: Path) -> None:
    shutil.copy(target / name_rank_file(0), target / "model-rank-0-part-1.safetensors")
    assert facts(verify(target, source)) == [("extra-file", "model-rank-0-part-1.safetensors")]


@pytest.mark.parametrize("ranks", ["0", "-3", "many", "9" * 5000])
def test_a_number_of_ranks_that_is_none_is_not_believed(
    ranks: str, left: Tensors, source: Path, tmp_path: Path
) -> None:
    for rank in range(2):
        write_rank(tmp_path, rank, make_rank(left, rank, 2), describe(rank, 2) | {"ranks": ranks})
    report = verify(tmp_path, source)
    assert report.ranks == 2
    assert set(facts(report)) == {("wrong-ranks", name_rank_file(rank)) for rank in range(2)}
