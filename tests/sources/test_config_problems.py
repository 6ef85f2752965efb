"""Checkpoints that are not what their config.json says: each is refused, and the tensor is named.

The code of V4 loads without `strict`: what a file lacks it leaves unset, and says nothing. So this is the last place
where it can be seen. One tensor of each kind is lost or changed in turn, in what was read of the headers.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from families import FAMILIES
from jobs import make_plan

from reshard.errors import Problem, Refused
from reshard.recipe_types import Recipe
from reshard.recipes.formulas import find_lacking, find_unknown_keys, parse_formula
from reshard.recipes.recipe import load_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.synthetic import write_tensors
from reshard.types import Checkpoint, Layout, Tensor

NAMES = [
    "deepseek-v3.2",
    "glm-5.1-fp8",
    "glm-5.2-fp8",
    "deepseek-v4-pro",
    "deepseek-v4-flash-0731",
    "deepseek-v4.1-flash",
]
FEW = {"n_routed_experts": 4, "dspark_n_routed_experts": 2}
"""Experts, so that all is planned the sooner."""
TABLES = ("text_config", "vision_config")
BY_NUMBER = {
    "layers.ffn.gate.tid2eid": {"hash layers", "layers"},
    "layers.ffn.gate.bias": {"layers"},
    "layers.attn.compressor.wgate.weight": {"gated layers"},
}
"""Kinds of tensor that alone make a layer one of its sort: one that is missing is told by the number of its layer."""
ANY_SHAPE = {
    "layers.attn.compressor.ape": "its shape depends on the ratio of the layer",
    "layers.attn.compressor.wkv.weight": "its rows depend on the ratio of the layer",
    "layers.attn.compressor.wgate.weight": "its rows depend on the ratio of the layer",
    "layers.engram.embed.weight": "config.json has a list of rows, one for each table",
}
"""Kinds of tensor of which a dimension is not checked: every loader of them refuses another shape by itself."""


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return small(request.param, tmp_path_factory.mktemp("problems") / "source", FEW)


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return small("deepseek-v4-flash", tmp_path_factory.mktemp("flash") / "source")


@pytest.fixture(scope="module")
def v41(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return small("deepseek-v4.1-flash", tmp_path_factory.mktemp("v41") / "source")


def small(name: str, folder: Path, changes: Mapping[str, int] = MappingProxyType({})) -> Checkpoint:
    """The small checkpoint of a family, with some of its numbers changed wherever they stand."""
    family = FAMILIES[name]
    tables = {key: {**value, **changes_of(value, changes)} for key, value in family.small.items() if key in TABLES}
    config = {**family.small, **changes_of(family.small, changes), **tables}
    write_tensors(folder, family.tensors(config), config, 2, sparse=True)
    return read_checkpoint(folder)


def changes_of(table: Mapping[str, Any], changes: Mapping[str, int]) -> dict[str, int]:
    return {key: value for key, value in changes.items() if key in table}


def problems(checkpoint: Checkpoint) -> list[Problem]:
    """What is found wrong by a plan for two ranks; nothing if it is planned."""
    recipe = recipe_of(checkpoint.config or {})
    try:
        make_plan(checkpoint, recipe, Layout(2))
    except Refused as refused:
        return list(refused.problems)
    return []


@pytest.mark.parametrize(
    ("formula", "config", "found"),
    [
        ("a + len(b.c) * ceil(d / 2)", {}, ["a", "b.c", "d"]),
        ("a or b or 'word'", {}, []),
        ("a or b", {}, ["a", "b"]),
        ("a or b", {"b": 1}, []),
        ("a + b.c", {"a": None, "b": None}, []),
        ("b.c", {"b": 1}, ["b.c"]),
        ("b.c.d", {"b": {"c": {}}}, ["b.c.d"]),
        ("size + a", {}, ["a"]),
    ],
)
def test_a_key_that_a_config_lacks_is_named(formula: str, config: Mapping[str, Any], found: list[str]) -> None:
    assert find_lacking(parse_formula(formula, is_run=True), config, {"size": "b"}) == found


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_recipe_names_few_keys_that_its_configs_lack(name: str) -> None:
    config = FAMILIES[name].small
    assert find_unknown_keys(recipe_of(config), config).keys() <= {"quantization_config.scale_fmt"}


def recipe_of(config: Mapping[str, Any]) -> Recipe:
    """That which fits the sound checkpoint: which of two is chosen for a faulty one is another question."""
    names = {"deepseek_v32": "deepseek-v32", "glm_moe_dsa": "glm-5", "deepseek_v41": "deepseek-v41"}
    april = "deepseek-v4-dspark" if "dspark_block_size" in config else "deepseek-v4"
    april = "deepseek-v4-vision" if "vision_n_layers" in config else april
    return loaded(names.get(config["model_type"], april))


@cache
def loaded(name: str) -> Recipe:
    return load_recipe(name)


def one_of_each_kind(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """The kinds of name, numbers apart, and the second tensor of each, or the first. MTP layers of V3's line are left
    out anyway.
    """
    count = (checkpoint.config or {}).get("num_hidden_layers")
    kinds: dict[str, list[Tensor]] = {}
    for name, tensor in checkpoint.tensors.items():
        if not name.startswith(f"model.layers.{count}."):
            kinds.setdefault(re.sub(r"\.\d+(?=\.)", "", name), []).append(tensor)
    for kind, tensors in kinds.items():
        yield kind, tensors[:2][-1]


def with_tensor(checkpoint: Checkpoint, tensor: Tensor | None, name: str) -> Checkpoint:
    """Another tensor of that name, or none."""
    others = {key: value for key, value in checkpoint.tensors.items() if key != name or tensor}
    return replace(checkpoint, tensors=others | ({name: tensor} if tensor else {}))


def with_config(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> Checkpoint:
    config: dict[str, Any] = dict(checkpoint.config or {})
    for key, value in changes.items():
        if "." in key:
            table, inner = key.split(".")
            config[table] = {**config[table], inner: value}
        else:
            config[key] = value
    return replace(checkpoint, config=config)


def is_about(tensor: Tensor, found: list[Problem]) -> bool:
    """Whether a problem names the tensor, its weight or its scale."""
    prefix = tensor.name.removesuffix("_scale_inv").removesuffix("scale").removesuffix("weight")
    return any(problem.subject.startswith(prefix) for problem in found)


def test_a_sound_checkpoint_has_no_problems(checkpoint: Checkpoint) -> None:
    assert problems(checkpoint) == []


def test_no_kind_of_tensor_may_be_missing(checkpoint: Checkpoint) -> None:
    for kind, tensor in one_of_each_kind(checkpoint):
        found = problems(with_tensor(checkpoint, None, tensor.name))
        subjects = {problem.subject for problem in found}
        assert is_about(tensor, found) or (subjects and subjects <= BY_NUMBER[kind]), kind


def test_no_kind_of_tensor_may_have_another_shape(checkpoint: Checkpoint) -> None:
    unseen = []
    for kind, tensor in one_of_each_kind(checkpoint):
        for dimension in range(len(tensor.shape) if kind not in ANY_SHAPE else 0):
            shape = tuple(size + 32 * (place == dimension) for place, size in enumerate(tensor.shape))
            if not is_about(tensor, problems(with_tensor(checkpoint, tensor._replace(shape=shape), tensor.name))):
                unseen.append(kind)
    assert unseen == []


def test_no_kind_of_tensor_may_be_of_whole_numbers_that_is_not(checkpoint: Checkpoint) -> None:
    for kind, tensor in one_of_each_kind(checkpoint):
        dtype = "BF16" if tensor.dtype in {"I64", "I8"} else "I32"
        assert is_about(tensor, problems(with_tensor(checkpoint, tensor._replace(dtype=dtype), tensor.name))), kind


@pytest.mark.parametrize("number", range(11))
def test_every_ratio_counts(number: int, flash: Checkpoint) -> None:
    ratios = list((flash.config or {})["compress_ratios"])
    before, others = ratios[number], {0: [4, 128], 4: [0, 128], 128: [0, 4]}
    for other in others[before]:
        ratios[number] = other
        found = problems(with_config(flash, {"compress_ratios": ratios}))
        subjects = {"compressed layers"} if 0 in {before, other} else set()
        subjects |= {"indexed layers"} if 4 in {before, other} else set()
        assert {problem.subject for problem in found} == subjects
        assert {problem.expected.split(", as ")[1] for problem in found} == {"compress_ratios of config.json says"}


def test_a_ratio_too_many_is_an_mtp_block_too_few(flash: Checkpoint) -> None:
    ratios = (flash.config or {})["compress_ratios"]
    (problem,) = problems(with_config(flash, {"compress_ratios": [*ratios, 0]}))
    assert (problem.subject, problem.expected[0]) == ("MTP blocks", "2")


CHANGES: list[tuple[str, Any, str]] = [
    ("hc_mult", 2, "layers.0.hc_attn_fn"),
    ("head_dim", 64, "layers.0.attn.wkv.weight"),
    ("hidden_size", 256, "embed.weight"),
    ("index_head_dim", 64, "layers.2.attn.indexer.compressor.ape"),
    ("index_n_heads", 4, "layers.2.attn.indexer.weights_proj.weight"),
    ("moe_intermediate_size", 128, "layers.0.ffn.experts.0.w1.weight"),
    ("n_routed_experts", 24, "experts"),
    ("num_attention_heads", 64, "layers.0.attn.attn_sink"),
    ("num_experts_per_tok", 8, "layers.0.ffn.gate.tid2eid"),
    ("num_hash_layers", 2, "hash layers"),
    ("num_hidden_layers", 10, "layers"),
    ("o_groups", 8, "layers.0.attn.wo_a.weight"),
    ("o_lora_rank", 64, "layers.0.attn.wo_b.weight"),
    ("q_lora_rank", 48, "layers.0.attn.wq_a.weight"),
    ("vocab_size", 288, "head.weight"),
]


@pytest.mark.parametrize(("key", "value", "subject"), CHANGES)
def test_a_value_of_the_config_that_the_tensors_contradict(
    key: str, value: Any, subject: str, flash: Checkpoint
) -> None:
    assert subject in {problem.subject for problem in problems(with_config(flash, {key: value}))}


V41_CHANGES: list[tuple[str, Any, str]] = [
    ("text_config.dspark_n_routed_experts", 16, "MTP experts"),
    ("text_config.dspark_markov_rank", 32, "mtp.2.markov_head.embed.weight"),
    ("text_config.dspark_target_layer_ids", [9, 10], "mtp.0.main_proj.weight"),
    ("text_config.engram_head_dim", 32, "layers.1.engram.embed.weight"),
    ("text_config.engram_layer_ids", [1, 9], "engram layers"),
    ("text_config.engram_max_ngram_size", 3, "layers.1.engram.wkv.weight"),
    ("text_config.index_source_layer_ids", [2, 4, 8], "indexed layers"),
    ("text_config.kv_source_layer_ids", [2, 4], "key layers"),
    ("text_config.compress_ratios", [0, 0, *[1] * 10, 0, 0, 0], "gated layers"),
    ("text_config.hc_mult", 2, "layers.0.hc_attn_fn"),
    ("vision_config.hidden_size", 96, "vision.norm.weight"),
    ("vision_config.num_hidden_layers", 12, "vision blocks"),
    ("vision_config.patch_size", 16, "vision.patch_embed.proj.weight"),
]


@pytest.mark.parametrize(("key", "value", "subject"), V41_CHANGES)
def test_a_value_of_the_config_of_v41_that_the_tensors_contradict(
    key: str, value: Any, subject: str, v41: Checkpoint
) -> None:
    assert subject in {problem.subject for problem in problems(with_config(v41, {key: value}))}


def test_a_whole_engram_layer_is_missed_by_the_config_alone(v41: Checkpoint) -> None:
    """No number of another tensor tells of it."""
    tensors = {name: tensor for name, tensor in v41.tensors.items() if not name.startswith("layers.10.engram.")}
    (problem,) = problems(replace(v41, tensors=tensors))
    assert (problem.subject, problem.found) == ("engram layers", "1 by the names of the tensors")
    assert problem.expected == "1, 10, as text_config.engram_layer_ids of config.json says"


def test_the_exceptions_are_still_kinds_of_tensor() -> None:
    listed = {
        re.sub(r"\.\d+(?=\.)", "", name) for family in FAMILIES.values() for name, _, _ in family.tensors(family.small)
    }
    assert ANY_SHAPE.keys() <= listed


def test_other_blocks_than_those_of_the_scales_are_refused(tmp_path: Path) -> None:
    found = small("deepseek-v3.2", tmp_path / "source")
    quantization = {**(found.config or {})["quantization_config"], "weight_block_size": [64, 64]}
    other = replace(found, config={**(found.config or {}), "quantization_config": quantization})
    with pytest.raises(Refused) as error:
        make_plan(other, load_recipe("deepseek-v32"), Layout(1))
    (problem,) = error.value.problems
    assert (problem.kind, problem.found) == ("contradiction", "weight_block_size of [64, 64]")
