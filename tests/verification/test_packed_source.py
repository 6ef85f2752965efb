"""How the weights of a source lie packed: found out from handmade headers; and every other way to read them is seen."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from reshard.formats.safetensors import BITS
from reshard.types import PACKED, Checkpoint, File, Packed, Tensor
from reshard.verification.packed_source import PackedSource, check_packed_source

Headers = dict[str, tuple[str, tuple[int, ...]]]
"""By name: dtype and shape."""

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.k_proj"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
OTHERS: Headers = {"model.norm.weight": ("F16", (64,)), f"{Q}.bias": ("F16", (48,)), "model.mystery": ("I32", (3,))}


def store(headers: Headers, config: Mapping[str, Any] | None) -> Checkpoint:
    """A checkpoint in two files, in which tensors lie one behind the other."""
    tensors, ends = {}, [100, 200]
    for number, (name, (dtype, shape)) in enumerate(headers.items()):
        size = prod(shape) * BITS[dtype] // 8
        tensors[name] = Tensor(name, dtype, shape, number % 2, ends[number % 2], size)
        ends[number % 2] += size
    files = tuple(File(f"model-{i}.safetensors", end, 100, "", 0) for i, end in enumerate(ends))
    return Checkpoint(Path("source"), files, tensors, config)


def make_packed(stored: Checkpoint, name: str, packing: str, shape: tuple[int, ...], *how: int, **parts: str) -> Packed:
    """A packed weight whose parts have these names."""
    found = {part: stored.tensors[one] for part, one in parts.items()}
    result = Tensor(name, "BF16", shape, PACKED, 0, prod(shape) * 2)
    given = found.get("zeros"), found.get("factor"), found.get("order")
    bits, group = how
    return Packed(packing, found["codes"], found["scales"], *given, bits, group, result)


def read(stored: Checkpoint, weights: Iterable[Packed], kept: Iterable[str]) -> Checkpoint:
    """The checkpoint as it was read."""
    placed = [one._replace(result=one.result._replace(file=PACKED + number)) for number, one in enumerate(weights)]
    tensors = {one.result.name: one.result for one in placed} | {name: stored.tensors[name] for name in kept}
    config = {key: value for key, value in (stored.config or {}).items() if key != "quantization_config"}
    if "text_config" in config:
        config["text_config"] = {}
    return replace(stored, tensors=tensors, packed=tuple(placed), config=config if stored.config else None)


def check(stored: Checkpoint, as_read: Checkpoint) -> list[tuple[str, str, str]]:
    problems = list(check_packed_source(PackedSource(stored, as_read)))
    assert {problem.kind for problem in problems} <= {"wrong-place"}
    return [(problem.subject, problem.found, problem.expected) for problem in problems]


def make_gptq(name: str) -> Headers:
    return {
        f"{name}.qweight": ("I32", (12, 48)),
        f"{name}.qzeros": ("I32", (3, 6)),
        f"{name}.scales": ("F16", (3, 48)),
        f"{name}.g_idx": ("I32", (96,)),
    }


def list_gptq(stored: Checkpoint, *modules: str, packing: str = "gptq") -> list[Packed]:
    ends = {"codes": "qweight", "scales": "scales", "zeros": "qzeros", "order": "g_idx"}
    return [
        make_packed(stored, f"{name}.weight", packing, (48, 96), 4, 32, **{p: f"{name}.{e}" for p, e in ends.items()})
        for name in modules
    ]


GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}}


@pytest.fixture
def stored() -> Checkpoint:
    """Two weights in GPTQ, and others."""
    return store({**make_gptq(Q), **make_gptq(K), **OTHERS}, GPTQ)


@pytest.fixture
def good(stored: Checkpoint) -> list[Packed]:
    return list_gptq(stored, Q, K)


def test_a_source_that_was_read_right_has_no_problems(stored: Checkpoint, good: list[Packed]) -> None:
    assert check(stored, read(stored, good, OTHERS)) == []
    assert check(stored, read(stored, reversed(good), OTHERS)) == []


def scheme(bits: int, group: int | None, **other: Any) -> dict[str, Any]:
    return {"num_bits": bits, "group_size": group, "strategy": "group" if group else "channel", **other}


def by_groups(*schemes: dict[str, Any], targets: list[list[str]] | None = None) -> dict[str, Any]:
    names = targets or [["Linear"]] * len(schemes)
    groups = {f"group_{i}": {"weights": one, "targets": names[i]} for i, one in enumerate(schemes)}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


WORDS = {"codes": f"{Q}.weight_packed", "scales": f"{Q}.weight_scale"}
INTEGERS: Headers = {WORDS["codes"]: ("I32", (64, 12)), WORDS["scales"]: ("BF16", (64, 3))}
SHAPE: Headers = {f"{Q}.weight_shape": ("I64", (2,)), f"{Q}.input_scale": ("F32", (1,))}
ZEROS: Headers = {f"{Q}.weight_zero_point": ("I32", (8, 3)), f"{Q}.weight_g_idx": ("I32", (96,))}
FP4 = {"codes": f"{Q}.weight_packed", "scales": f"{Q}.weight_scale", "factor": f"{Q}.weight_global_scale"}
CASES: Mapping[str, tuple[Headers, Mapping[str, Any] | None, tuple[Any, ...], Mapping[str, str]]] = {
    "integers": (INTEGERS | SHAPE, by_groups(scheme(4, 32)), ("integers", (64, 96), 4, 32), WORDS),
    "integers with zeros": (
        INTEGERS | ZEROS,
        by_groups(scheme(4, 32)),
        ("integers", (64, 96), 4, 32),
        {**WORDS, "zeros": f"{Q}.weight_zero_point", "order": f"{Q}.weight_g_idx"},
    ),
    "integers of 8 bits": (INTEGERS, by_groups(scheme(4, 64), scheme(8, 16)), ("integers", (64, 48), 8, 16), WORDS),
    "integers of a named module": (
        INTEGERS,
        by_groups(scheme(4, 32), scheme(8, 16), targets=[["Linear"], ["re:.*q_proj"]]),
        ("integers", (64, 48), 8, 16),
        WORDS,
    ),
    "integers with a scale a row": (
        {WORDS["codes"]: ("I32", (64, 12)), WORDS["scales"]: ("F32", (64, 1))},
        {"text_config": by_groups(scheme(8, None))},
        ("integers", (64, 48), 8, 48),
        WORDS,
    ),
    "nvfp4 that divides": (
        {FP4["codes"]: ("U8", (64, 48)), FP4["scales"]: ("F8_E4M3", (64, 6)), FP4["factor"]: ("F32", (1,))}
        | {f"{Q}.input_global_scale": ("F32", (1,)), "model.layers.0.self_attn.k_scale": ("F32", (1,))},
        None,
        ("nvfp4-divided", (64, 96), 4, 16),
        FP4,
    ),
    "nvfp4": (
        {f"{Q}.weight": ("U8", (64, 48)), f"{Q}.weight_scale": ("F8_E4M3", (64, 6)), f"{Q}.weight_scale_2": ("F32", ())}
        | {f"{Q}.input_scale": ("F32", ())},
        None,
        ("nvfp4", (64, 96), 4, 16),
        {"codes": f"{Q}.weight", "scales": f"{Q}.weight_scale", "factor": f"{Q}.weight_scale_2"},
    ),
    "awq": (
        {f"{Q}.qweight": ("I32", (96, 8)), f"{Q}.qzeros": ("I32", (3, 8)), f"{Q}.scales": ("F16", (3, 64))},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}},
        ("awq", (64, 96), 4, 32),
        {"codes": f"{Q}.qweight", "scales": f"{Q}.scales", "zeros": f"{Q}.qzeros"},
    ),
    "gptq of 8 bits without an order": (
        {f"{Q}.qweight": ("I32", (24, 64)), f"{Q}.qzeros": ("I32", (1, 16)), f"{Q}.scales": ("BF16", (1, 64))},
        {"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2"}},
        ("gptq-v2", (64, 96), 8, 96),
        {"codes": f"{Q}.qweight", "scales": f"{Q}.scales", "zeros": f"{Q}.qzeros"},
    ),
    "experts": (
        {f"{EXPERTS}_blocks": ("U8", (4, 24, 3, 16)), f"{EXPERTS}_scales": ("U8", (4, 24, 3))}
        | {f"{EXPERTS}_bias": ("BF16", (4, 24))},
        {"quantization_config": {"quant_method": "mxfp4"}},
        ("mxfp4-experts", (4, 96, 24), 4, 32),
        {"codes": f"{EXPERTS}_blocks", "scales": f"{EXPERTS}_scales"},
    ),
}
KEPT_TOO = {"experts": [f"{EXPERTS}_bias"]}


@pytest.mark.parametrize("case", CASES)
def test_every_packing_is_found(case: str) -> None:
    headers, config, (packing, shape, *how), parts = CASES[case]
    stored = store({**headers, **OTHERS}, config)
    name = EXPERTS if case == "experts" else f"{Q}.weight"
    weight = make_packed(stored, name, packing, shape, *how, **parts)
    kept = [*OTHERS, *KEPT_TOO.get(case, [])]
    assert check(stored, read(stored, [weight], kept)) == []
    assert check(stored, read(stored, [], kept)) == [
        (name, "not read", f"what is made of {parts['codes']} ({packing})")
    ]


@pytest.mark.parametrize("end", ["weight_packed", "weight"])
def test_rows_in_mxfp4_are_relabelled(end: str) -> None:
    codes, scales = f"{Q}.{end}", f"{Q}.weight_scale"
    stored = store({codes: ("U8", (64, 48)), scales: ("U8", (64, 3)), **OTHERS}, None)
    weight = make_packed(stored, f"{Q}.weight", "mxfp4", (64, 96), 4, 32, codes=codes, scales=scales)
    right = weight._replace(codes=weight.codes._replace(dtype="I8"), scales=weight.scales._replace(dtype="F8_E8M0"))
    assert check(stored, read(stored, [right], OTHERS)) == []
    assert {found.split(":")[0] for _, found, _ in check(stored, read(stored, [weight], OTHERS))} == {"codes", "scales"}


@pytest.mark.parametrize("shape", [(), (1,), (64,), (64, 1)])
def test_fp8_has_one_scale_or_one_a_row(shape: tuple[int, ...]) -> None:
    codes, scales = f"{Q}.weight", f"{Q}.weight_scale"
    stored = store({codes: ("F8_E4M3", (64, 96)), scales: ("F32", shape), **OTHERS}, None)
    weight = make_packed(stored, codes, "fp8", (64, 96), 8, 96, codes=codes, scales=scales)
    right = weight._replace(scales=weight.scales._replace(shape=(prod(shape), 1)))
    assert check(stored, read(stored, [right], OTHERS)) == []


@pytest.mark.parametrize("blocks", [(2, 3), (2, 128)])
def test_fp8_with_block_scales_is_not_packed(blocks: tuple[int, int]) -> None:
    """Nor is what lacks its scales: it keeps its name, and a recipe tells of it."""
    headers: Headers = {f"{Q}.weight": ("F8_E4M3", (256, 384)), f"{Q}.weight_scale": ("F32", blocks)}
    lacking: Headers = {f"{K}.weight_packed": ("U8", (64, 48)), f"{K}.k_scale": ("F32", ())}
    stored = store({**headers, **lacking, **OTHERS}, None)
    assert check(stored, stored) == []


@pytest.mark.parametrize("columns", [89, 96])
def test_integers_with_a_scale_a_row_may_end_inside_a_word(columns: int) -> None:
    headers: Headers = {WORDS["codes"]: ("I32", (64, 12)), WORDS["scales"]: ("F32", (1,))}
    stored = store({**headers, **SHAPE, **OTHERS}, by_groups(scheme(4, None, strategy="tensor")))
    weight = make_packed(stored, f"{Q}.weight", "integers", (64, columns), 4, columns, **WORDS)
    right = weight._replace(scales=weight.scales._replace(shape=(1, 1)))
    assert check(stored, read(stored, [right], OTHERS)) == []
    wrong = right._replace(result=right.result._replace(shape=(64, 97), size=128 * 97), group=97)
    assert [name for name, _, _ in check(stored, read(stored, [wrong], OTHERS))] == [f"{Q}.weight"] * 3
    wrong = right._replace(result=right.result._replace(shape=(64, 88), size=128 * 88), group=88)
    assert [name for name, _, _ in check(stored, read(stored, [wrong], OTHERS))] == [f"{Q}.weight"] * 3


@pytest.mark.parametrize(("bits", "columns"), [(4, 96), (4, 90), (8, 48), (8, 45)])
def test_without_a_config_only_a_tensor_tells_the_bits_of_integers(bits: int, columns: int) -> None:
    stored = store({**INTEGERS, **SHAPE, **OTHERS}, None)
    weight = make_packed(stored, f"{Q}.weight", "integers", (64, columns), bits, columns // 3, **WORDS)
    assert check(stored, read(stored, [weight], OTHERS)) == []
    for wrong in (weight._replace(bits=12 - bits), weight._replace(group=8)):
        assert {name for name, _, _ in check(stored, read(stored, [wrong], OTHERS))} == {f"{Q}.weight"}


# --- what was read wrongly ---


@pytest.mark.parametrize("place", ["quantization_config", "text_config", "hidden_size"])
def test_a_config_that_was_read_wrongly_is_seen(place: str) -> None:
    table = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    inner = {"quantization_config": {}, "layers": 2}
    stored = store({**make_gptq(Q), **OTHERS}, {"quantization_config": table, "text_config": inner, "hidden_size": 64})
    as_read = read(stored, list_gptq(stored, Q), OTHERS)
    right = {"text_config": {"layers": 2}, "hidden_size": 64}
    assert list(check_packed_source(PackedSource(stored, replace(as_read, config=right)))) == []
    wrong = {**right, place: {"quantization_config": table, "text_config": inner, "hidden_size": 65}[place]}
    (problem,) = check_packed_source(PackedSource(stored, replace(as_read, config=wrong)))
    assert (problem.kind, problem.subject) == ("wrong-config", f"config.json: {place}")


def swap(one: Packed, part: str, other: Packed | None = None) -> Packed:
    """A weight with a part of another one, or without it."""
    changed: dict[str, Any] = {part: getattr(other, part, None)}
    return one._replace(**changed)


@pytest.mark.parametrize("part", ["codes", "scales", "zeros", "order"])
def test_a_part_of_another_layer_is_seen(part: str, stored: Checkpoint, good: list[Packed]) -> None:
    wrong = swap(good[0], part, good[1])
    ((name, found, expected),) = check(stored, read(stored, [wrong, good[1]], OTHERS))
    assert name == f"{Q}.weight"
    assert found != expected
    assert found.startswith(f"{part}: ")
    assert expected.startswith(f"{part}: ")


@pytest.mark.parametrize("part", ["zeros", "order"])
def test_a_part_that_was_dropped_is_seen(part: str, stored: Checkpoint, good: list[Packed]) -> None:
    ((name, found, expected),) = check(stored, read(stored, [swap(good[0], part), good[1]], OTHERS))
    assert (name, found) == (f"{Q}.weight", f"{part}: none")
    assert "bytes" in expected


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"group": 16}, "gptq, 4 bits, groups of 16"),
        ({"bits": 8}, "gptq, 8 bits, groups of 32"),
        ({"packing": "gptq-v2"}, "gptq-v2, 4 bits, groups of 32"),
    ],
)
def test_another_way_of_packing_is_seen(
    change: dict[str, Any], found: str, stored: Checkpoint, good: list[Packed]
) -> None:
    wrong = good[0]._replace(**change)
    assert check(stored, read(stored, [wrong, good[1]], OTHERS)) == [
        (f"{Q}.weight", found, "gptq, 4 bits, groups of 32")
    ]


@pytest.mark.parametrize("change", [{"shape": (96, 48)}, {"dtype": "F16"}, {"offset": 8}, {"size": 4}])
def test_another_result_is_seen(change: dict[str, Any], stored: Checkpoint, good: list[Packed]) -> None:
    wrong = good[0]._replace(result=good[0].result._replace(**change))
    assert {name for name, _, _ in check(stored, read(stored, [wrong, good[1]], OTHERS))} == {f"{Q}.weight"}
    as_read = read(stored, good, OTHERS)
    tensors = {**as_read.tensors, f"{Q}.weight": as_read.tensors[f"{Q}.weight"]._replace(**change)}
    assert [name for name, _, _ in check(stored, replace(as_read, tensors=tensors))] == [f"{Q}.weight"]


def test_a_part_of_other_bytes_or_dtype_is_seen(stored: Checkpoint, good: list[Packed]) -> None:
    for change in ({"offset": 7}, {"file": 1}, {"dtype": "BF16"}, {"shape": (48, 3)}, {"size": 2}):
        wrong = good[0]._replace(scales=good[0].scales._replace(**change))
        ((name, found, _),) = check(stored, read(stored, [wrong, good[1]], OTHERS))
        assert (name, found[:7]) == (f"{Q}.weight", "scales:")


def test_a_weight_that_was_read_as_it_lies_is_seen(stored: Checkpoint, good: list[Packed]) -> None:
    as_read = read(stored, good[1:], [*OTHERS, *make_gptq(Q)])
    assert {name for name, _, _ in check(stored, as_read)} == {f"{Q}.weight", *make_gptq(Q)}


def test_two_weights_that_changed_places_are_seen(stored: Checkpoint, good: list[Packed]) -> None:
    as_read = read(stored, good, OTHERS)
    one, other = (as_read.tensors[f"{name}.weight"] for name in (Q, K))
    swapped = {**as_read.tensors, one.name: one._replace(file=other.file), other.name: other._replace(file=one.file)}
    found = check(stored, replace(as_read, tensors=swapped))
    assert {name for name, _, _ in found} == {one.name, other.name}


def test_a_weight_of_a_place_that_there_is_not_is_seen(stored: Checkpoint, good: list[Packed]) -> None:
    as_read = read(stored, good, OTHERS)
    beyond = as_read.tensors[f"{Q}.weight"]._replace(file=PACKED + 2)
    found = check(stored, replace(as_read, tensors={**as_read.tensors, beyond.name: beyond}))
    assert [name for name, _, _ in found] == [f"{Q}.weight"]


def test_every_other_tensor_must_be_read_from_its_place(stored: Checkpoint, good: list[Packed]) -> None:
    for name in OTHERS:
        kept = [other for other in OTHERS if other != name]
        assert [one for one, _, _ in check(stored, read(stored, good, kept))] == [name]
    as_read = read(stored, good, OTHERS)
    norm = as_read.tensors["model.norm.weight"]
    moved = {**as_read.tensors, norm.name: norm._replace(offset=norm.offset + 2)}
    assert [name for name, _, _ in check(stored, replace(as_read, tensors=moved))] == [norm.name]
    more = {**as_read.tensors, "model.more": norm._replace(name="model.more")}
    assert check(stored, replace(as_read, tensors=more))[0][::2] == ("model.more", "no tensor")


def test_a_plain_weight_beside_a_packed_one_of_its_name_is_seen() -> None:
    stored = store({**make_gptq(Q), **make_gptq(K), **OTHERS, f"{Q}.weight": ("BF16", (48, 96))}, GPTQ)
    assert [name for name, _, _ in check(stored, read(stored, list_gptq(stored, Q, K), OTHERS))] == [f"{Q}.weight"]
