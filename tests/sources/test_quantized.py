"""What a checkpoint is, if its weights are quantized in a way that no recipe takes, or plain against its config."""

import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.numpy import load_file
from small_models import write_model

from reshard import inspect, plan
from reshard.errors import Problem, Refused
from reshard.formats.safetensors import BITS
from reshard.recipes.recipe import list_packaged_recipes
from reshard.sources.exemptions import read_exemptions
from reshard.sources.quantization_config import read_promise
from reshard.sources.recipe_choice import choose_recipe
from reshard.synthetic import SMALL_V3, TensorEntry, list_tensors, write_checkpoint
from reshard.types import Checkpoint, Tensor

LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 12,
    "hidden_size": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 8,
    "vocab_size": 8,
}
PLAIN_V3: Mapping[str, Any] = {key: value for key, value in SMALL_V3.items() if key != "quantization_config"}
RECIPES = [recipe for recipe in list_packaged_recipes() if not (recipe.engine or recipe.by_name)]
SQUARE = (8, 8)
PARTS: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PARTS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEAR = [f"model.layers.{layer}.{part}" for layer in range(12) for part in PARTS]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
COMPRESSED: Mapping[str, Any] = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": {"num_bits": 8}, "targets": ["Linear"]}},
}
QUARK = {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}
Make = Callable[[str], Iterable[TensorEntry]]


def plain(module: str, dtype: str = "BF16") -> Iterable[TensorEntry]:
    return [(f"{module}.weight", dtype, SQUARE)]


def llama(make: Make = plain) -> Iterable[TensorEntry]:
    """Layer 10 before layer 2, as in a file."""
    entries = [entry for module in LINEAR for entry in make(module)]
    norms = (f"model.layers.{layer}.{norm}_layernorm" for layer in range(12) for norm in ("input", "post_attention"))
    entries += [(f"{norm}.weight", "BF16", (8,)) for norm in norms]
    entries += [("model.norm.weight", "BF16", (8,)), *plain("lm_head"), *plain("model.embed_tokens")]
    return sorted(entries)


def problems(entries: Iterable[TensorEntry], config: Mapping[str, Any] | None) -> list[Problem]:
    tensors = {name: Tensor(name, dtype, shape, 0, 0, prod(shape) * BITS[dtype] // 8) for name, dtype, shape in entries}
    try:
        choose_recipe(Checkpoint(Path("here"), (), tensors, config), RECIPES)
    except Refused as refused:
        return list(refused.problems)
    return []


def awq(module: str) -> Iterable[TensorEntry]:
    yield from ((f"{module}.{end}", "I32", (1, 8)) for end in ("qweight", "qzeros"))
    yield f"{module}.scales", "F16", (1, 8)


def gptq(module: str) -> Iterable[TensorEntry]:
    yield from awq(module)
    yield f"{module}.g_idx", "I32", (8,)


def nvfp4(module: str) -> Iterable[TensorEntry]:
    yield f"{module}.weight", "U8", (8, 4)
    yield f"{module}.weight_scale", "F8_E4M3", (8, 1)
    yield from ((f"{module}.{end}", "F32", ()) for end in ("weight_scale_2", "input_scale"))


def bitsandbytes(module: str) -> Iterable[TensorEntry]:
    yield f"{module}.weight", "U8", (32, 1)
    yield from ((f"{module}.weight.{end}", "F32", (16,)) for end in ("absmax", "quant_map"))
    yield f"{module}.weight.quant_state.bitsandbytes__nf4", "U8", (80,)


def eight_bits(module: str) -> Iterable[TensorEntry]:
    yield f"{module}.weight", "I8", SQUARE
    yield f"{module}.SCB", "F32", (8,)


def packed(module: str) -> Iterable[TensorEntry]:
    yield f"{module}.weight_packed", "I32", (8, 1)
    yield f"{module}.weight_scale", "BF16", (8, 1)
    yield f"{module}.weight_shape", "I64", (2,)


def static(module: str) -> Iterable[TensorEntry]:
    yield f"{module}.weight", "F8_E4M3", SQUARE
    yield from ((f"{module}.{end}", "F32", ()) for end in ("weight_scale", "input_scale"))


def mlx(module: str) -> Iterable[TensorEntry]:
    yield f"{module}.weight", "U32", (8, 1)
    yield from ((f"{module}.{end}", "BF16", (8, 1)) for end in ("scales", "biases"))


MADE: list[tuple[Make, str]] = [
    (awq, "AWQ or GPTQ"),
    (gptq, "GPTQ"),
    (nvfp4, "NVFP4 of ModelOpt"),
    (bitsandbytes, "bitsandbytes with 4 bits"),
    (eight_bits, "bitsandbytes with 8 bits"),
    (packed, "packed integers of compressed-tensors"),
    (static, "FP8 or INT8 with a scale for each tensor or row"),
    (mlx, "MLX"),
]


@pytest.mark.parametrize(("make", "words"), MADE)
def test_a_format_is_known_by_the_names_alone(make: Make, words: str) -> None:
    (problem,) = problems(llama(make), LLAMA)
    assert (problem.kind, problem.subject) == ("quantized", "here")
    assert problem.found.startswith(f"{words}, by the names of ")
    assert " model.layers.0.mlp.down_proj." in problem.found
    assert problem.expected == "weights that the recipe llama takes: BF16, F16 or F32"
    assert "quantized from" in problem.remedy
    assert "recipe of your own" not in problem.remedy


@pytest.mark.parametrize(
    ("key", "told", "words"),
    [
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "AWQ with 4 bits"),
        ("quantization_config", {"quant_method": "gptq", "bits": 8}, "GPTQ with 8 bits"),
        ("quantization_config", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt (NVFP4)"),
        ("quantization_config", {"load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes with 4 bits"),
        ("compression_config", {**COMPRESSED, "format": "x"}, "compressed-tensors (x)"),
        ("quantization", {"bits": 4, "group_size": 64}, "MLX with 4 bits"),
    ],
)
def test_a_format_is_described_by_the_config(key: str, told: Mapping[str, Any], words: str) -> None:
    config = {**LLAMA, key: told, "_name_or_path": "org/base"}
    (problem,) = problems(llama(awq), config)
    assert problem.found.startswith(f"{words}, by {key} of config.json; 252 tensors such as model.layers.0.")
    assert "(org/base, by _name_or_path of config.json)" in problem.remedy


def test_a_format_that_only_the_config_knows_is_named() -> None:
    entries = llama(lambda module: [(f"{module}.strange", "I32", SQUARE)])
    assert {problem.kind for problem in problems(entries, LLAMA)} == {"no-rule"}
    (problem,) = problems(entries, {**LLAMA, "quantization_config": {"quant_method": "new"}})
    assert problem.found.startswith("new, by quantization_config of config.json; 84 tensors such as model.layers.0.")


def test_an_unknown_name_beside_block_scales_stays_an_unknown_name() -> None:
    entries = [(name.replace("up_proj", "upper"), dtype, shape) for name, dtype, shape in list_tensors(SMALL_V3)]
    found = problems(entries, SMALL_V3)
    assert {problem.kind for problem in found} == {"no-rule"}
    assert any(problem.subject.endswith("weight_scale_inv") for problem in found)


def test_fp8_without_scales_is_one_problem_but_a_single_weight_is_not() -> None:
    (problem,) = problems(llama(lambda module: plain(module, "F8_E4M3")), LLAMA)
    assert problem.found.startswith("F8_E4M3 without scales, by the names of 84 tensors")
    one = LINEAR[0]
    assert problems(llama(lambda module: plain(module, "F8_E4M3" if module == one else "BF16")), LLAMA) == []


def test_an_unknown_model_is_said_to_be_quantized() -> None:
    (problem,) = problems(llama(awq), {"model_type": "other"})
    assert problem.kind == "no-recipe"
    assert "quantized: AWQ or GPTQ, by the names of" in problem.found
    assert problem.remedy.endswith("and --cast bf16; its rows have the names of BF16 weights")
    (problem,) = problems(llama(mlx), {"model_type": "other"})
    assert problem.remedy.startswith("first convert the checkpoint that it was quantized from")
    (problem,) = problems(llama(awq), None)
    assert problem.kind == "quantized"


@pytest.mark.parametrize("told", [FP8, {"quant_method": "awq", "bits": 4}, {"quant_method": "mxfp4"}])
def test_a_quantization_that_no_weight_has_is_one_problem(told: Mapping[str, Any]) -> None:
    (problem,) = problems(list_tensors(PLAIN_V3), {**PLAIN_V3, "quantization_config": told})
    assert (problem.kind, problem.subject) == ("contradiction", "quantization_config of config.json")
    assert "weights has a block scale; they are BF16" in problem.found
    assert "take quantization_config out of config.json" in problem.remedy
    (problem,) = problems(llama(), {**LLAMA, "quantization_config": told})
    assert "but none of the 86 weights is quantized; they are BF16" in problem.found


@pytest.mark.parametrize(
    "told",
    [
        None,
        {},
        {"quant_method": None},
        {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False},
        {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}},
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
        {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}},
        {"quant_method": "gptq", "bits": 16},
        {**FP8, "modules_to_not_convert": ["model", "lm_head"]},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}},
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": None, "targets": ["Linear"]}}},
        {**COMPRESSED, "ignore": ["re:.*"]},
        {**COMPRESSED, "ignore": ["re:.*layers.*", r"re:^model\.embed.*$", "lm_head"]},
        {**COMPRESSED, "ignore": ["re:.*proj$", "re:.*embed_tokens", "re:lm_head"]},
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["model.*", "lm_head"]},
        {"quant_method": "quark", "global_quant_config": {"weight": None, "input_tensors": {"dtype": "fp8"}}},
        {"quant_method": ["x"], "bits": float("inf")},
    ],
)
def test_a_quantization_of_no_weight_is_accepted(told: Mapping[str, Any] | None) -> None:
    assert problems(llama(), {**LLAMA, "quantization_config": told}) == []


@pytest.mark.parametrize(
    "told",
    [
        {**COMPRESSED, "ignore": ["re:(.*a|b)+", "lm_head"]},
        {**COMPRESSED, "ignore": ["re:.*(proj|head|tokens)$"]},
        {**COMPRESSED, "ignore": ["Linear"]},
        {**COMPRESSED, "config_groups": {"group_0": {"weights": {"num_bits": 8}, "targets": ["re:.*experts.*"]}}},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*": {}}},
        {"quant_method": "new", "bits": 4},
        {"quant_method": ["x"], "bits": 4},
    ],
)
def test_a_quantization_that_may_be_of_no_weight_is_noted(told: Mapping[str, Any], tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama", quantization_config=None)
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": told}))
    for notes in (plan(tmp_path / "source", mp=2).notes, inspect(tmp_path / "source").notes):
        (note,) = notes
        assert note.kind == "quantization-config"
        assert "but no weight is quantized (" in note.text
        assert " weights of F32)" in note.text


@pytest.mark.parametrize(
    "told",
    [
        COMPRESSED,
        QUARK,
        {**COMPRESSED, "ignore": ["re:.*self_attn.*", "lm_head"]},
        {**COMPRESSED, "ignore": ["re:layers.*"]},  # a regular expression holds from the beginning of the name
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["*lm_head*"]},
    ],
)
def test_a_stale_quantization_with_some_exempt_modules_is_refused(told: Mapping[str, Any]) -> None:
    (problem,) = problems(llama(), {**LLAMA, "quantization_config": told})
    assert (problem.kind, problem.subject) == ("contradiction", "quantization_config of config.json")


def test_patterns_of_strangers_are_not_run() -> None:
    exemptions = read_exemptions({"ignore": ["re:(a*)*b", "re:" + ".*a" * 500, "*a" * 500]})
    assert not exemptions.are_clear
    assert not exemptions.cover("a" * 499 + "c.weight")


@pytest.mark.parametrize(
    "told", [{"quant_method": "compressed-tensors", "sparsity_config": {}}, {**FP8, "ignored_layers": ["re:.*"]}]
)
def test_a_quantization_of_no_weight_asks_no_scales_of_plain_weights(told: Mapping[str, Any], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", PLAIN_V3, 1)
    config = {**PLAIN_V3, "quantization_config": told}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    assert plan(tmp_path / "source", mp=2).notes == ()


def test_a_model_without_experts_and_config_is_none_of_experts() -> None:
    tensors = {name: Tensor(name, dtype, shape, 0, 0, prod(shape) * BITS[dtype] // 8) for name, dtype, shape in llama()}
    assert choose_recipe(Checkpoint(Path("here"), (), tensors, None), RECIPES)[0].name == "llama"


def test_a_mixture_is_no_stale_config() -> None:
    lost = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    assert problems((entry for entry in list_tensors(SMALL_V3) if entry[0] != lost), SMALL_V3) == []


def test_a_quantization_within_the_text_config_is_read() -> None:
    promise = read_promise({"text_config": {"quantization_config": {"quant_method": "awq"}}})
    assert promise is not None
    assert promise.place == "text_config.quantization_config of config.json"


def test_fused_experts_that_no_recipe_knows_are_refused_and_the_hint_unfuses_them(tmp_path: Path) -> None:
    write_model(tmp_path / "written", "qwen3-moe")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    (tmp_path / "fused" / "config.json").write_text(
        json.dumps({**config, "model_type": "unknown", "architectures": []})
    )
    with pytest.raises(Refused) as refused:
        plan(tmp_path / "fused", mp=2, recipe="glm-5")
    (problem,) = refused.value.problems
    assert (problem.kind, problem.subject) == ("fused-experts", "model.layers.0.mlp.experts.down_proj and 3 more")
    assert "save_original_format=True" in problem.remedy
    (tmp_path / "fused" / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    vars(loaded)["_weight_conversions"] = None
    loaded.save_pretrained(tmp_path / "apart", save_original_format=True)
    names = [name for path in (tmp_path / "apart").glob("*.safetensors") for name in load_file(path)]
    assert sorted(names) == sorted(
        name for path in (tmp_path / "written").glob("*.safetensors") for name in load_file(path)
    )
    assert plan(tmp_path / "apart", mp=2).files
