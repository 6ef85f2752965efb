"""Which rule covers a tensor, what is missing, and which recipe a checkpoint wants. By names alone, without files."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.errors import Problem, Refused
from reshard.formats.safetensors import BITS
from reshard.numbered_names import split_name
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import list_packaged_recipes, load_recipe, parse_recipe
from reshard.sources.match import Matched, match
from reshard.sources.recipe_choice import choose_recipe
from reshard.synthetic import DEEPSEEK_V2_LITE, SMALL_V3, TensorEntry, list_tensors
from reshard.types import Checkpoint, Tensor

TINY: Mapping[str, Any] = {**SMALL_V3, "first_k_dense_replace": 2, "n_routed_experts": 12, "num_hidden_layers": 12}
"""Layers and experts such that 10 sorts before 2; layer 12 is an MTP layer."""
PLAIN: Mapping[str, Any] = {key: value for key, value in TINY.items() if key != "quantization_config"}
WHOLE_QUERY: Mapping[str, Any] = {**TINY, "q_lora_rank": None}
V2_TINY: Mapping[str, Any] = {**DEEPSEEK_V2_LITE, "n_routed_experts": 4, "num_hidden_layers": 3}
V3 = load_recipe("deepseek-v3")
V2 = load_recipe("deepseek-v2")
OWN_RECIPE = """
name = "own"
about = "for one test"
left = "one"
right = "other"
files = "{rank}-of-{ranks}.safetensors"
placeholders.i = { counts = "layers" }
placeholders.e = { counts = "experts" }
rules = [
%s
]
"""


def checkpoint_of(entries: Iterable[TensorEntry], config: Mapping[str, Any] | None = None) -> Checkpoint:
    """A checkpoint that is nowhere."""
    tensors = {name: Tensor(name, dtype, shape, 0, 0, prod(shape) * BITS[dtype] // 8) for name, dtype, shape in entries}
    return Checkpoint(Path("nowhere"), (), tensors, config)


def named(*names: str) -> Checkpoint:
    return checkpoint_of((name, "U8", (2, 2)) for name in names)


def without(config: Mapping[str, Any], is_left_out: Callable[[str], bool], *, has_config: bool = True) -> Checkpoint:
    entries = (entry for entry in list_tensors(config) if not is_left_out(entry[0]))
    return checkpoint_of(entries, config if has_config else None)


def recipe_of(*rules: str) -> Recipe:
    return parse_recipe(OWN_RECIPE % ",\n".join(rules), "own.toml")


def problems_of(checkpoint: Checkpoint, recipe: Recipe = V3) -> list[Problem]:
    with pytest.raises(Refused) as refused:
        match(checkpoint, recipe)
    return list(refused.value.problems)


def new_names(matched: Matched) -> dict[str, str]:
    """By the name of each tensor that has one on the other side: that name."""
    pairs = [
        (tensor.name, name)
        for family in matched.families
        for tensor, name in zip(family.tensors, family.names, strict=True)
        if name
    ]
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


def left_out(matched: Matched, recipe: Recipe) -> set[str]:
    """The names of all tensors that are dropped unless they are asked for."""
    rules = recipe.rules
    return {
        tensor.name
        for family in matched.families
        if rules[family.rule].relation == "drop" or rules[family.rule].optional
        for tensor in family.tensors
    }


# --- names ---


@pytest.mark.parametrize(
    ("name", "key", "numbers"),
    [
        ("model.layers.3.mlp.experts.10.w", "model.layers.#.mlp.experts.#.w", ("3", "10")),
        ("model.layers.0", "model.layers.#", ("0",)),
        ("a.0.1.2.b", "a.#.#.#.b", ("0", "1", "2")),
        ("a.123456789.b", "a.#.b", ("123456789",)),
        ("model.norm.weight", "model.norm.weight", ()),
        ("w1.k3v.2d", "w1.k3v.2d", ()),
        # No other spelling is that number.
        ("layers.01.w", "layers.01.w", ()),
        ("layers.00.w", "layers.00.w", ()),
        ("layers.-1.w", "layers.-1.w", ()),
        ("layers.+1.w", "layers.+1.w", ()),
        ("layers.1_0.w", "layers.1_0.w", ()),
        ("layers. 1.w", "layers. 1.w", ()),
        ("layers.1e1.w", "layers.1e1.w", ()),
        ("layers.\uff11.w", "layers.\uff11.w", ()),
        ("layers.\u0661.w", "layers.\u0661.w", ()),
        ("layers.1234567890.w", "layers.1234567890.w", ()),
        # No dot before it, so not a component of its own.
        ("1.w", "1.w", ()),
    ],
)
def test_numbers_of_a_name(name: str, key: str, numbers: tuple[str, ...]) -> None:
    assert split_name(name) == (key, numbers)


RENAMED = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.0.input_layernorm.weight": "layers.0.attn_norm.weight",
    "model.layers.11.self_attn.q_a_proj.weight": "layers.11.attn.wq_a.weight",
    "model.layers.11.self_attn.q_a_proj.weight_scale_inv": "layers.11.attn.wq_a.scale",
    "model.layers.1.self_attn.q_a_layernorm.weight": "layers.1.attn.q_norm.weight",
    "model.layers.2.self_attn.q_b_proj.weight": "layers.2.attn.wq_b.weight",
    "model.layers.2.self_attn.kv_a_proj_with_mqa.weight": "layers.2.attn.wkv_a.weight",
    "model.layers.2.self_attn.kv_a_layernorm.weight": "layers.2.attn.kv_norm.weight",
    "model.layers.2.self_attn.kv_b_proj.weight_scale_inv": "layers.2.attn.wkv_b.scale",
    "model.layers.10.self_attn.o_proj.weight": "layers.10.attn.wo.weight",
    "model.layers.10.post_attention_layernorm.weight": "layers.10.ffn_norm.weight",
    "model.layers.1.mlp.gate_proj.weight": "layers.1.ffn.w1.weight",
    "model.layers.1.mlp.down_proj.weight": "layers.1.ffn.w2.weight",
    "model.layers.1.mlp.up_proj.weight_scale_inv": "layers.1.ffn.w3.scale",
    "model.layers.2.mlp.gate.weight": "layers.2.ffn.gate.weight",
    "model.layers.2.mlp.gate.e_score_correction_bias": "layers.2.ffn.gate.bias",
    "model.layers.2.mlp.shared_experts.gate_proj.weight": "layers.2.ffn.shared_experts.w1.weight",
    "model.layers.2.mlp.shared_experts.down_proj.weight_scale_inv": "layers.2.ffn.shared_experts.w2.scale",
    "model.layers.2.mlp.shared_experts.up_proj.weight": "layers.2.ffn.shared_experts.w3.weight",
    "model.layers.2.mlp.experts.10.gate_proj.weight": "layers.2.ffn.experts.10.w1.weight",
    "model.layers.10.mlp.experts.2.down_proj.weight": "layers.10.ffn.experts.2.w2.weight",
    "model.layers.10.mlp.experts.2.up_proj.weight_scale_inv": "layers.10.ffn.experts.2.w3.scale",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}


def test_the_names_on_the_other_side() -> None:
    matched = match(checkpoint_of(list_tensors(TINY), TINY), V3)
    found = new_names(matched)
    assert {name: found[name] for name in RENAMED} == RENAMED
    assert len(set(found.values())) == len(found)
    assert matched.counts == {"i": 12, "d": 2, "s": 10, "e": 12, "m": 1}


def test_the_names_of_a_whole_query_projection() -> None:
    found = new_names(match(checkpoint_of(list_tensors(V2_TINY), V2_TINY), V2))
    assert found["model.layers.2.self_attn.q_proj.weight"] == "layers.2.attn.wq.weight"


def test_placeholders_may_stand_in_another_order_on_the_right() -> None:
    recipe = recipe_of('["same", "layers.{i}.experts.{e}.w", "experts.{e}.layers.{i}.w", "by e"]')
    names = [f"layers.{layer}.experts.{expert}.w" for layer in range(2) for expert in range(11)]
    found = new_names(match(named(*names), recipe))
    assert found["layers.1.experts.10.w"] == "experts.10.layers.1.w"
    assert found["layers.0.experts.2.w"] == "experts.2.layers.0.w"
    assert sorted(found.values()) == sorted(f"experts.{e}.layers.{i}.w" for i in range(2) for e in range(11))


def test_percent_signs_are_letters() -> None:
    recipe = recipe_of('["same", "100%s.{i}.w%", "%d.{i}.%%", "rows"]')
    assert new_names(match(named("100%s.0.w%"), recipe)) == {"100%s.0.w%": "%d.0.%%"}


DIGITS = recipe_of(
    '["same", "tower.0.w", "first.w", "rows"]',
    '["same", "tower.10.w", "eleventh.w", "rows"]',
    '["same", "layers.{i}.1.w", "layers.{i}.w", "rows"]',
)


def test_digits_of_a_rule_stand_for_themselves() -> None:
    found = new_names(match(named("tower.0.w", "tower.10.w", "layers.0.1.w", "layers.1.1.w"), DIGITS))
    assert found == {
        "tower.0.w": "first.w",
        "tower.10.w": "eleventh.w",
        "layers.0.1.w": "layers.0.w",
        "layers.1.1.w": "layers.1.w",
    }


@pytest.mark.parametrize("name", ["tower.1.w", "tower.00.w", "layers.0.0.w", "layers.1.10.w", "tower.w"])
def test_other_digits_than_those_of_a_rule_are_unknown(name: str) -> None:
    problems = problems_of(named("tower.0.w", "tower.10.w", "layers.0.1.w", name), DIGITS)
    assert [(problem.kind, problem.subject) for problem in problems] == [("no-rule", name)]


def test_digits_that_a_rule_wants_are_missed() -> None:
    problems = problems_of(named("tower.0.w", "layers.0.1.w"), DIGITS)
    assert [(problem.kind, problem.subject) for problem in problems] == [("missing-tensor", "tower.10.w")]


def test_a_name_under_two_rules_is_refused() -> None:
    recipe = recipe_of('["same", "a.{i}.w", "x.{i}", "rows"]', '["same", "a.1.w", "y", "rows"]')
    (problem,) = problems_of(named("a.0.w", "a.1.w", "a.2.w"), recipe)
    assert (problem.kind, problem.subject) == ("two-rules", "a.1.w")
    assert "'a.{i}.w'" in problem.found
    assert "'a.1.w'" in problem.found


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.01.input_layernorm.weight",
        "model.layers.1.input_layernorm.weight.more",
        "model.layers.1.input_layernorm",
        "layers.1.input_layernorm.weight",
        "more.model.layers.1.input_layernorm.weight",
        "Model.norm.weight",
        "model.norm.weight ",
        "model.layers.1.input_layernorm.bias",
        "model.layers.1.input_layernorm.weight_scale_inv",
        "model.layers.3.mlp.experts.02.gate_proj.weight",
        "model.layers.3.mlp.experts.gate_proj.weight",
        "model.layers.3.mlp.experts.#.gate_proj.weight",
        "model.layers.3.self_attn.rotary_emb.inv_freqs",
        "model.layers.3.rotary_emb.inv_freq",
        "",
        "#",
    ],
)
def test_a_name_that_no_rule_knows_is_refused(name: str) -> None:
    problems = problems_of(checkpoint_of([*list_tensors(TINY), (name, "BF16", (1,))], TINY))
    assert [(problem.kind, problem.subject) for problem in problems] == [("no-rule", name)]


def test_every_unknown_name_is_told() -> None:
    names = [f"unknown.{number}" for number in range(100)]
    extra = [(name, "BF16", (1,)) for name in names]
    problems = problems_of(checkpoint_of([*list_tensors(TINY), *extra], TINY))
    assert [problem.subject for problem in problems] == names


# --- MTP layers ---


def is_in_layer(name: str, layer: int) -> bool:
    return name.startswith(f"model.layers.{layer}.")


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(("layers", "mtp_layers"), [(12, 1), (12, 2), (61, 1), (64, 1), (64, 0)])
def test_layers_with_the_marker_are_dropped_and_no_others(layers: int, mtp_layers: int, *, has_config: bool) -> None:
    """Layer 61 of a deeper model is a layer like any other."""
    config = {**TINY, "num_hidden_layers": layers, "num_nextn_predict_layers": mtp_layers, "n_routed_experts": 2}
    entries = list_tensors(config)
    matched = match(checkpoint_of(entries, config if has_config else None), V3)
    wanted = {
        name for name, *_ in entries if any(is_in_layer(name, layer) for layer in range(layers, layers + mtp_layers))
    }
    assert left_out(matched, V3) == wanted
    assert len(wanted) == mtp_layers * len([name for name, *_ in entries if is_in_layer(name, layers)])
    assert sum(len(family.tensors) for family in matched.families) == len(entries)
    assert (matched.counts["i"], matched.counts["m"]) == (layers, mtp_layers)


def test_without_the_marker_nothing_is_dropped() -> None:
    problems = problems_of(without(TINY, lambda name: name.endswith(".eh_proj.weight")))
    assert {problem.kind for problem in problems} == {"no-rule"}
    own = {"embed_tokens", "enorm", "hnorm", "shared_head.norm", "shared_head.head"}
    assert {problem.subject for problem in problems} == {f"model.layers.12.{name}.weight" for name in own}


def test_a_layer_past_the_last_without_the_marker_is_one_too_many() -> None:
    config = {**TINY, "num_hidden_layers": 13, "num_nextn_predict_layers": 0}
    problems = problems_of(checkpoint_of(list_tensors(config), TINY))
    assert [(problem.kind, problem.subject) for problem in problems] == [("contradiction", "layers")]


@pytest.mark.parametrize(("layer", "has_config"), [(0, True), (0, False), (5, True), (5, False), (11, True)])
def test_the_marker_in_a_layer_of_the_model_is_refused(layer: int, *, has_config: bool) -> None:
    """In the last one only the config can tell."""
    entries = [*list_tensors(TINY), (f"model.layers.{layer}.eh_proj.weight", "BF16", (1, 2))]
    problems = problems_of(checkpoint_of(entries, TINY if has_config else None))
    assert {problem.kind for problem in problems} & {"gap", "contradiction"}
    assert any("layers" in problem.subject for problem in problems)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.unknown.weight",
        "model.layers.12",
        "model.layers.012.enorm.weight",
        "model.layer.12.enorm.weight",
        "other.layers.12.enorm.weight",
        "model.layers.#.enorm.12",
        "model.layers.#.self_attn.12.weight",
    ],
)
def test_the_rest_of_a_drop_rule_takes_mtp_layers_only(name: str) -> None:
    problems = problems_of(checkpoint_of([*list_tensors(TINY), (name, "BF16", (1,))], TINY))
    assert [(problem.kind, problem.subject) for problem in problems] == [("no-rule", name)]


@pytest.mark.parametrize("keep_optional", [True, False])
def test_whatever_lies_in_an_mtp_layer_is_dropped(*, keep_optional: bool) -> None:
    """Even where it is to be kept: the other side has no name for it."""
    name = "model.layers.12.what.ever.7.it.is"
    checkpoint = checkpoint_of([*list_tensors(TINY), (name, "BF16", (1,))], TINY)
    matched = match(checkpoint, V3, keep_optional=keep_optional)
    assert name in left_out(matched, V3)
    assert name not in new_names(matched)


OF_MTP = {
    "model.layers.12.embed_tokens.weight": "layers.12.embed.weight",
    "model.layers.12.enorm.weight": "layers.12.enorm.weight",
    "model.layers.12.hnorm.weight": "layers.12.hnorm.weight",
    "model.layers.12.eh_proj.weight": "layers.12.eh_proj.weight",
    "model.layers.12.shared_head.norm.weight": "layers.12.norm.weight",
    "model.layers.12.shared_head.head.weight": "layers.12.head.weight",
    "model.layers.12.self_attn.o_proj.weight_scale_inv": "layers.12.attn.wo.scale",
    "model.layers.12.mlp.gate.weight": "layers.12.ffn.gate.weight",
    "model.layers.12.mlp.experts.10.up_proj.weight": "layers.12.ffn.experts.10.w3.weight",
}


def test_an_mtp_layer_that_is_kept_has_names_as_other_layers() -> None:
    checkpoint = checkpoint_of(list_tensors(TINY), TINY)
    found = new_names(match(checkpoint, V3, keep_optional=True))
    assert found.keys() == checkpoint.tensors.keys()
    assert {name: found[name] for name in OF_MTP} == OF_MTP
    others = {
        name: new for name, new in found.items() if is_in_layer(name, 12) and "model.layers.11." + rest(name) in found
    }
    assert len(others) == len(found) - len([name for name in found if not is_in_layer(name, 12)]) - 6
    assert others == {name: f"layers.12.{rest(found['model.layers.11.' + rest(name)], 2)}" for name in others}


def rest(name: str, components: int = 3) -> str:
    return name.split(".", components)[-1]


MTP_NAMES = [name for name, *_ in list_tensors({**TINY, "n_routed_experts": 2}) if name.startswith("model.layers.12.")]


@pytest.mark.parametrize("name", [name for name in MTP_NAMES if not name.endswith((".eh_proj.weight", "_scale_inv"))])
def test_an_mtp_layer_that_is_kept_is_complete(name: str) -> None:
    config = {**TINY, "n_routed_experts": 2}
    checkpoint = without(config, lambda other: other == name)
    match(checkpoint, V3)
    with pytest.raises(Refused) as refused:
        match(checkpoint, V3, keep_optional=True)
    assert [(problem.kind, problem.subject) for problem in refused.value.problems] == [("missing-tensor", name)]


def test_the_frequencies_of_the_rotary_embedding_are_dropped() -> None:
    """Kimi-K2 stores them. Of an MTP layer they are dropped with all else in it."""
    extra = [(f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", "F32", (32,)) for layer in range(13)]
    matched = match(checkpoint_of([*list_tensors(TINY), *extra], TINY), V3, keep_optional=True)
    assert left_out(matched, V3) >= {name for name, *_ in extra}
    assert not new_names(matched).keys() & {name for name, *_ in extra}


# --- placeholders that some members of another fill ---

PICKY = """
name = "picky"
about = "for one test"
left = "one"
right = "other"
files = "{rank}-of-{ranks}.safetensors"
placeholders.i = { counts = "layers", size = "layers" }
placeholders.c = { counts = "narrow layers", within = "i", picked_by = "ratios", picked = [0, 4] }
placeholders.f = { counts = "wide layers", within = "i", picked_by = "ratios", picked = [128] }
placeholders.h = { counts = "hashed layers", size = "hashed", some_of = "i" }
rules = [
["same", "layers.{i}.norm", "n.{i}", "rows"],
["same", "layers.{c}.narrow", "c.{c}", "rows"],
["same", "layers.{f}.wide", "f.{f}", "rows"],
["same", "layers.{h}.table", "h.{h}", "rows"],
]
"""
NORMS = [f"layers.{layer}.norm" for layer in range(4)]
KINDS = ["layers.0.narrow", "layers.1.wide", "layers.2.narrow", "layers.3.wide"]
TABLES = ["layers.1.table", "layers.2.table"]
RATIOS = {"layers": 4, "hashed": 2, "ratios": [0, 128, 4, 128]}


def picky(names: Iterable[str], config: Mapping[str, Any] | None) -> Checkpoint:
    return checkpoint_of(((name, "U8", (2, 2)) for name in names), config)


@pytest.mark.parametrize(
    "config",
    [
        RATIOS,
        None,
        {},
        # One more value, as for an MTP layer, picks nothing that is there.
        {**RATIOS, "ratios": [0, 128, 4, 128, 0]},
        {"ratios": None},
        {"ratios": "0"},
    ],
)
def test_a_list_of_the_config_picks_the_members_of_a_hole(config: Mapping[str, Any] | None) -> None:
    matched = match(picky([*NORMS, *KINDS, *TABLES], config), parse_recipe(PICKY, "picky.toml"))
    assert matched.counts == {"i": 4, "c": 2, "f": 2, "h": 2}


@pytest.mark.parametrize(
    ("names", "config", "wanted"),
    [
        # Another layer is picked than the names have.
        ([*NORMS, *KINDS, *TABLES], {**RATIOS, "ratios": [128, 128, 4, 128]}, {"narrow layers", "wide layers"}),
        ([*NORMS, *KINDS, *TABLES], {**RATIOS, "ratios": [0, 128, 4, 7]}, {"wide layers"}),
        ([*NORMS, *KINDS, *TABLES], {**RATIOS, "ratios": [0, 128, 4]}, {"wide layers"}),
        ([*NORMS, *KINDS, *TABLES], {**RATIOS, "ratios": []}, {"narrow layers", "wide layers"}),
        # The count of what some have, which need not be the first.
        ([*NORMS, *KINDS, *TABLES[:1]], RATIOS, {"hashed layers"}),
        ([*NORMS, *KINDS], RATIOS, {"hashed layers"}),
        # Neither, and both.
        ([*NORMS, *KINDS[:3], *TABLES], None, {"layers"}),
        ([*NORMS, *KINDS, "layers.0.wide", *TABLES], None, {"narrow layers"}),
        # A member of some is a member of all.
        ([*NORMS, *KINDS, "layers.4.table"], None, {"layers"}),
    ],
)
def test_members_that_the_config_does_not_pick_are_refused(
    names: list[str], config: Mapping[str, Any] | None, wanted: set[str]
) -> None:
    problems = problems_of(picky(names, config), parse_recipe(PICKY, "picky.toml"))
    assert {problem.subject for problem in problems} == wanted
    assert {problem.kind for problem in problems} <= {"contradiction", "gap"}


def test_what_some_have_is_told_with_the_members() -> None:
    (problem,) = problems_of(
        picky([*NORMS, *KINDS, *TABLES], {**RATIOS, "ratios": [0, 128, 4, 7]}), parse_recipe(PICKY, "picky.toml")
    )
    assert problem.found == "1, 3 by the names of the tensors"
    assert problem.expected == "1, as ratios of config.json says"


WITH_EYES = PICKY.replace(
    "rules = [",
    """placeholders.v = { counts = "eyes", only = "if sight.eyes", size = "sight.eyes" }
rules = [
["same", "eyes.{v}.lens", "e.{v}", "rows"],
["same", "optic.nerve", "nerve", "rows", "", "if sight.eyes"],""",
)
EYES = ["eyes.0.lens", "eyes.1.lens", "optic.nerve"]


@pytest.mark.parametrize(
    ("extra", "config", "wanted"),
    [
        (EYES, {"sight": {"eyes": 2}}, set()),
        (EYES, None, set()),
        (EYES, {}, set()),
        ([], None, set()),
        ([], {}, set()),
        ([], {"sight": {"eyes": 0}}, set()),
        ([], {"sight": None}, set()),
        (EYES, {"sight": {"eyes": 3}}, {"eyes"}),
        (EYES, {"sight": {"eyes": 0}}, {"eyes"}),
        (EYES, {"sight": None}, {"eyes"}),
        ([], {"sight": {"eyes": 2}}, {"eyes"}),
        # What has no number is under the same condition; without the key, whatever is there asks for all of it.
        (EYES[2:], {"sight": {"eyes": 0}}, {"optic.nerve"}),
        (EYES[:2], {"sight": {"eyes": 2}}, {"optic.nerve"}),
        (EYES[:2], {}, {"optic.nerve"}),
    ],
)
def test_a_hole_may_be_there_only_if_the_config_says_so(
    extra: list[str], config: Mapping[str, Any] | None, wanted: set[str]
) -> None:
    recipe, checkpoint = parse_recipe(WITH_EYES, "eyes.toml"), picky([*NORMS, *KINDS, *TABLES, *extra], config)
    if wanted:
        assert {problem.subject for problem in problems_of(checkpoint, recipe)} == wanted
    else:
        assert match(checkpoint, recipe).counts["v"] == len(extra[:2])


LISTED = PICKY.replace('size = "hashed", some_of = "i"', 'some_of = "i", listed = "text.hashed"')


@pytest.mark.parametrize(
    ("config", "is_right"),
    [
        ({"text": {"hashed": [1, 2]}}, True),
        ({"text": {"hashed": [2, 1, 1]}}, True),
        ({"text": {"hashed": [1, 2, 3]}}, False),
        ({"text": {"hashed": [1, 7]}}, False),
        ({"text": {"hashed": []}}, False),
        # A key of another form says nothing.
        ({"text": {"hashed": 2}}, True),
        ({"text": {"hashed": None}}, True),
        ({"text": 5}, True),
        ({}, True),
        (None, True),
    ],
)
def test_a_list_of_the_config_names_the_members_of_a_hole(config: Mapping[str, Any] | None, *, is_right: bool) -> None:
    recipe, checkpoint = parse_recipe(LISTED, "listed.toml"), picky([*NORMS, *KINDS, *TABLES], config)
    if is_right:
        assert match(checkpoint, recipe).counts["h"] == 2
        return
    (problem,) = problems_of(checkpoint, recipe)
    assert (problem.kind, problem.subject) == ("contradiction", "hashed layers")
    assert problem.expected.endswith("as text.hashed of config.json says")


@pytest.mark.parametrize(("hashed", "is_right"), [([2, 3], True), ([1, 2], False), ([2], False)])
def test_a_list_of_the_config_may_count_from_1(hashed: list[int], *, is_right: bool) -> None:
    recipe = parse_recipe(LISTED.replace('"text.hashed"', '"text.hashed", listed_from = 1'), "listed.toml")
    checkpoint = picky([*NORMS, *KINDS, *TABLES], {"text": {"hashed": hashed}})
    if is_right:
        assert match(checkpoint, recipe).counts["h"] == 2
        return
    (problem,) = problems_of(checkpoint, recipe)
    assert problem.found == "1-2 by the names of the tensors"
    assert problem.expected.endswith("as text.hashed of config.json says, which counts from 1")


@pytest.mark.parametrize(
    ("config", "is_right"),
    [({"all": [0, 0, 0, 0, 0], "less": 1}, True), ({"all": [0], "less": 1}, False), ({"all": 5, "less": 1}, True),
     ({"all": [0]}, True)],
)  # fmt: skip
def test_a_count_may_be_a_formula(config: Mapping[str, Any], *, is_right: bool) -> None:
    recipe = parse_recipe(PICKY.replace('size = "layers"', 'size = "len(all) - less"'), "counted.toml")
    checkpoint = picky([*NORMS, *KINDS, *TABLES], config)
    if is_right:
        assert match(checkpoint, recipe).counts["i"] == 4
    else:
        assert [problem.subject for problem in problems_of(checkpoint, recipe)] == ["layers"]


@pytest.mark.parametrize(
    ("names", "config", "subjects"),
    [
        (["a", "with"], {"text": {"key": 3}}, []),
        (["a", "without"], {"text": {"key": None}}, []),
        (["a", "without"], {"text": {"key": 0}}, []),
        (["a", "without"], {"text": {}}, []),
        (["a", "with"], {"text": {}}, []),
        (["a", "with"], {"text": 3}, []),
        (["a", "with"], {"text.key": None}, []),
        (["a", "without"], {"text": {"key": 3}}, ["with", "without"]),
        (["a", "with"], {"text": {"key": None}}, ["with", "without"]),
    ],
)
def test_a_condition_may_ask_for_a_key_within_another(
    names: list[str], config: Mapping[str, Any], subjects: list[str]
) -> None:
    recipe = recipe_of(
        '["same", "a", "a", "replicate"]',
        '["same", "with", "with", "replicate", "", "if text.key"]',
        '["same", "without", "without", "replicate", "", "unless text.key"]',
    )
    checkpoint = picky(names, config)
    if not subjects:
        assert match(checkpoint, recipe)
        return
    assert sorted(problem.subject for problem in problems_of(checkpoint, recipe)) == subjects


def test_a_row_of_some_is_expected_of_each_of_them() -> None:
    recipe = parse_recipe(
        PICKY.replace('["same", "layers.{h}', '["same", "layers.{h}.key", "k.{h}", "rows"],\n["same", "layers.{h}'), "x"
    )
    problems = problems_of(picky([*NORMS, *KINDS, *TABLES, "layers.1.key"], RATIOS), recipe)
    assert [(problem.kind, problem.subject) for problem in problems] == [("missing-tensor", "layers.2.key")]


# --- completeness ---

SMALLER: Mapping[str, Any] = {
    **PLAIN,
    "first_k_dense_replace": 1,
    "n_routed_experts": 2,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 0,
}
SMALLER_NAMES = [name for name, *_ in list_tensors(SMALLER)]


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize("name", SMALLER_NAMES)
def test_a_tensor_that_is_missing_is_named(name: str, *, has_config: bool) -> None:
    problems = problems_of(without(SMALLER, lambda other: other == name, has_config=has_config))
    assert [(problem.kind, problem.subject) for problem in problems] == [("missing-tensor", name)]


@given(st.sets(st.sampled_from(SMALLER_NAMES), min_size=2, max_size=2), st.booleans())
@settings(max_examples=100)
def test_all_that_is_missing_is_named(names: set[str], has_config: bool) -> None:  # noqa: FBT001 - drawn
    problems = problems_of(without(SMALLER, lambda other: other in names, has_config=has_config))
    assert sorted(problem.subject for problem in problems) == sorted(names)


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(
    ("lost", "kind", "subject", "found"),
    [
        (lambda name: is_in_layer(name, 5), "gap", "layers", "0-4, 6-11"),
        (lambda name: is_in_layer(name, 0), "gap", "layers", "1-11"),
        (lambda name: ".experts.3." in name, "gap", "experts", "0-2, 4-11"),
        (lambda name: ".experts.0." in name, "gap", "experts", "1-11"),
        (lambda name: ".experts.11." in name, "contradiction", "model.layers.2.mlp.gate.weight", "[12, 256]"),
        (lambda name: is_in_layer(name, 7) and ".mlp." in name, "gap", "layers", "7"),
        (lambda name: is_in_layer(name, 1) and ".mlp." in name, "gap", "layers", "1"),
        (lambda name: is_in_layer(name, 11), "gap", "MTP layers", "12"),
    ],
)
def test_a_gap_is_named(lost: Callable[[str], bool], kind: str, subject: str, found: str, *, has_config: bool) -> None:
    problems = problems_of(without(TINY, lost, has_config=has_config))
    fitting = [problem for problem in problems if (problem.kind, problem.subject) == (kind, subject)]
    assert any(found in problem.found for problem in fitting)


def test_an_expert_that_one_layer_lacks_is_named() -> None:
    problems = problems_of(without(TINY, lambda name: ".layers.4.mlp.experts.10." in name))
    assert {(problem.kind, problem.subject) for problem in problems} == {
        ("missing-tensor", f"model.layers.4.mlp.experts.10.{name}_proj.weight") for name in ("gate", "up", "down")
    }


def test_a_stray_number_is_not_counted_up_to() -> None:
    """A name may hold any number below a billion."""
    extra = ("model.layers.999999999.input_layernorm.weight", "BF16", (256,))
    problems = problems_of(checkpoint_of([*list_tensors(TINY), extra], None))
    assert any("0-11, 999999999" in problem.found for problem in problems)


def test_a_layer_that_is_dense_and_not_is_refused() -> None:
    extra = [(f"model.layers.4.mlp.{name}_proj.weight", "BF16", (4, 4)) for name in ("gate", "up", "down")]
    problems = problems_of(checkpoint_of([*list_tensors(PLAIN), *extra]))
    assert [(problem.kind, problem.found) for problem in problems] == [
        ("contradiction", "4 among the expert layers too")
    ]


@pytest.mark.parametrize(
    ("key", "subject"),
    [
        ("num_hidden_layers", "layers"),
        ("n_routed_experts", "experts"),
        ("first_k_dense_replace", "dense layers"),
    ],
)
@pytest.mark.parametrize("step", [1, -1])
def test_a_config_that_counts_otherwise_is_refused(key: str, subject: str, step: int) -> None:
    problems = problems_of(checkpoint_of(list_tensors(TINY), {**TINY, key: TINY[key] + step}))
    assert [(problem.kind, problem.subject) for problem in problems] == [("contradiction", subject)]
    assert key in problems[0].expected


@pytest.mark.parametrize("rows", [0, 11, 13])
def test_a_gate_that_counts_otherwise_is_refused(rows: int) -> None:
    gate = "model.layers.7.mlp.gate.weight"
    entries = [(name, dtype, (rows, 256) if name == gate else shape) for name, dtype, shape in list_tensors(TINY)]
    problems = problems_of(checkpoint_of(entries))
    assert [(problem.kind, problem.subject) for problem in problems] == [("contradiction", gate)]


# --- conditions ---

QUERY = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]
LOW_RANK = {
    name: [f"model.layers.{layer}.self_attn.{name}.weight" for layer in range(3)]
    for name in ("q_a_proj", "q_a_layernorm", "q_b_proj")
}


def queries(*names: str, config: Mapping[str, Any] | None) -> Checkpoint:
    """The smaller model with these tensors for its queries."""
    others = [entry for entry in list_tensors(SMALLER) if ".self_attn.q_" not in entry[0]]
    return checkpoint_of([*others, *((name, "BF16", (4, 4)) for name in names)], config)


ALL_LOW_RANK = [name for names in LOW_RANK.values() for name in names]


@pytest.mark.parametrize(
    ("names", "rank"),
    [(QUERY, {"q_lora_rank": None}), (QUERY, {}), (QUERY, {"q_lora_rank": 0}), (ALL_LOW_RANK, {"q_lora_rank": 192})],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_the_queries_are_whole_or_of_low_rank(names: list[str], rank: Mapping[str, Any], *, has_config: bool) -> None:
    config = {**{key: value for key, value in SMALLER.items() if key != "q_lora_rank"}, **rank}
    matched = match(queries(*names, config=config if has_config else None), V3)
    assert {name for name in new_names(matched) if ".q_" in name} == set(names)


@pytest.mark.parametrize(
    ("names", "rank", "missing", "contradicting"),
    [
        (QUERY, 192, ALL_LOW_RANK, {"q_proj"}),
        (ALL_LOW_RANK, None, QUERY, {"q_a_proj", "q_a_layernorm", "q_b_proj"}),
        ([*QUERY, *ALL_LOW_RANK], 192, [], {"q_proj"}),
        ([*QUERY, *ALL_LOW_RANK], None, [], {"q_a_proj", "q_a_layernorm", "q_b_proj"}),
        (QUERY[:2], None, QUERY[2:], set()),
        ([], None, QUERY, set()),
        ([], 192, ALL_LOW_RANK, set()),
    ],
)
def test_the_config_says_which_queries_there_are(
    names: list[str], rank: int | None, missing: list[str], contradicting: set[str]
) -> None:
    problems = problems_of(queries(*names, config={**SMALLER, "q_lora_rank": rank}))
    assert sorted(problem.subject for problem in problems if problem.kind == "missing-tensor") == sorted(missing)
    found = {problem.subject.split(".")[4] for problem in problems if problem.kind == "contradiction"}
    assert found == contradicting
    wanted = "q_lora_rank 0 in" if rank else "q_lora_rank in its config.json, with a value other than 0"
    assert all(wanted in problem.remedy for problem in problems if problem.kind == "missing-tensor")


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (QUERY[:2], QUERY[2:]),
        ([*QUERY[:1], *(names[layer] for names in LOW_RANK.values() for layer in (1, 2))], None),
        (ALL_LOW_RANK[1:], ALL_LOW_RANK[:1]),
        # A kind of which not one is left, beside others of the same condition.
        ([*LOW_RANK["q_a_proj"], *LOW_RANK["q_a_layernorm"]], LOW_RANK["q_b_proj"]),
        # No queries at all.
        ([], None),
    ],
)
def test_without_a_config_the_queries_are_complete_all_the_same(names: list[str], missing: list[str] | None) -> None:
    problems = problems_of(queries(*names, config=None))
    assert missing is None or sorted(problem.subject for problem in problems) == sorted(missing)


# --- the recipe of a checkpoint ---

RECIPES = [recipe for recipe in list_packaged_recipes() if not (recipe.engine or recipe.by_name)]


def models() -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "deepseek-v3", TINY
    yield "deepseek-v3", PLAIN
    yield "deepseek-v3", WHOLE_QUERY
    yield "deepseek-v2", V2_TINY
    yield "deepseek-v2", {**V2_TINY, "q_lora_rank": 5}


@pytest.mark.parametrize(("recipe", "config"), models())
def test_a_recipe_is_chosen_by_the_names_without_a_config(recipe: str, config: Mapping[str, Any]) -> None:
    assert choose_recipe(checkpoint_of(list_tensors(config)), RECIPES)[0].name == recipe


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        ({"model_type": "deepseek_v3"}, "deepseek-v3"),
        ({"model_type": "deepseek_v2"}, "deepseek-v2"),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "deepseek-v3"),
        ({"architectures": ["Other", "DeepseekV2ForCausalLM"]}, "deepseek-v2"),
        ({"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}, "deepseek-v3"),
        # The model type is the more exact of the two.
        ({"model_type": "deepseek_v2", "architectures": ["DeepseekV3ForCausalLM"]}, "deepseek-v2"),
    ],
)
def test_a_recipe_is_chosen_by_the_config_whatever_the_names(config: Mapping[str, Any], recipe: str) -> None:
    with pytest.raises(Refused) as refused:
        choose_recipe(checkpoint_of([("w", "U8", (1,))], config), RECIPES)
    (problem,) = refused.value.problems
    assert (problem.kind, problem.subject) == ("no-rule", "w")
    assert problem.expected.startswith(f"a rule of {recipe};")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": None, "architectures": None},
        {"model_type": ["deepseek_v3"], "architectures": "DeepseekV2ForCausalLM"},
        {"architectures": 5},
        {"architectures": [["DeepseekV2ForCausalLM"]]},
        {"architectures": []},
    ],
)
def test_a_config_that_says_nothing_leaves_it_to_the_names(config: Mapping[str, Any]) -> None:
    own = {"q_lora_rank": SMALLER["q_lora_rank"], **config}
    assert choose_recipe(checkpoint_of(list_tensors(SMALLER), own), RECIPES)[0].name == "deepseek-v3"


@pytest.mark.parametrize("config", [{"model_type": "another"}, {"architectures": ["Another"]}])
def test_another_model_with_the_names_of_a_known_one_is_refused(config: Mapping[str, Any]) -> None:
    own = {"q_lora_rank": SMALLER["q_lora_rank"], **config}
    with pytest.raises(Refused) as refused:
        choose_recipe(checkpoint_of(list_tensors(SMALLER), own), RECIPES)
    (problem,) = refused.value.problems
    assert "the nearest recipe is deepseek-v3: it fits" in problem.found
    assert problem.remedy.startswith("--recipe deepseek-v3, ")


def test_a_checkpoint_that_no_recipe_knows_is_refused_with_the_nearest() -> None:
    entries = [*list_tensors(PLAIN), ("model.layers.3.self_attn.q_norm.weight", "BF16", (1,))]
    with pytest.raises(Refused) as refused:
        choose_recipe(checkpoint_of(entries, {"model_type": "another"}), RECIPES)
    (problem,) = refused.value.problems
    assert problem.kind == "no-recipe"
    assert problem.found == (
        "another; the nearest recipe is deepseek-v3: it does not know model.layers.#.self_attn.q_norm.weight"
    )
    names = [recipe.name for recipe in RECIPES]
    shown, more = ", ".join(names[:3]), len(names) - 3
    assert problem.expected == f"one of {shown} and {more} more: reshard recipes lists them"


def test_a_checkpoint_that_is_incomplete_is_refused_without_a_config() -> None:
    entries = [entry for entry in list_tensors(PLAIN) if entry[0] != "lm_head.weight"]
    with pytest.raises(Refused) as refused:
        choose_recipe(checkpoint_of(entries), RECIPES)
    (problem,) = refused.value.problems
    assert (problem.kind, problem.subject) == ("missing-tensor", "lm_head.weight")
    assert problem.expected == "the rule 'lm_head.weight' (by the recipe deepseek-v3)"


def test_a_checkpoint_that_two_recipes_know_is_refused() -> None:
    """Without experts V2 and V3 are alike."""
    config = {**SMALLER, "first_k_dense_replace": 3}
    with pytest.raises(Refused) as refused:
        choose_recipe(checkpoint_of(list_tensors(config)), RECIPES)
    (problem,) = refused.value.problems
    assert problem.found == "deepseek-v2, deepseek-v3 all fit"
    assert problem.remedy.startswith("put the model's config.json beside the files")
    assert "--recipe" in problem.remedy


def test_the_way_out_of_an_unknown_name_is_a_row_in_ones_own_recipe() -> None:
    checkpoint = checkpoint_of([("strange.weight", "BF16", (2, 2))])
    own = recipe_of('["same", "a.weight", "b.weight", "rows"]')
    assert [problem.remedy for problem in problems_of(checkpoint, own)] == ["add a row or a drop to own.toml"]
    (remedy,) = (problem.remedy for problem in problems_of(checkpoint))
    assert remedy.startswith("to leave it out: reshard recipes show deepseek-v3 > my.toml; ")
