"""The run configurations: those of the published models are the published ones, and those of small ones load.

What a model takes for granted where its configuration is silent is here too, so that silence is tested as well.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import skeletons
from conversions import LEGAL, ORACLES
from families import FAMILIES, write_full
from jobs import Job, convert_checkpoint, plan_conversion
from model_skeletons import MODELS, TAKEN_FOR_GRANTED
from skeletons import BF16, E8M0, F8, FP4, Parameters

from reshard.errors import Refused
from reshard.execution.execute import Settings
from reshard.recipes.recipe import FAMILIES_FOLDER, parse_recipe
from reshard.target.run_config import find_run_obstacles, make_run_config

Source = Callable[[str], Path]

V4_FLASH = """{
    "vocab_size": 129280,
    "dim": 4096,
    "moe_inter_dim": 2048,
    "n_layers": 43,
    "n_hash_layers": 3,
    "n_heads": 64,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 6,
    "score_func": "sqrtsoftplus",
    "route_scale": 1.5,
    "swiglu_limit": 10.0,
    "q_lora_rank": 1024,
    "head_dim": 512,
    "rope_head_dim": 64,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "window_size": 128,
    "original_seq_len": 65536,
    "rope_theta": 10000,
    "rope_factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "dtype": "fp8",
    "scale_fmt": "ue8m0",
    "expert_dtype": "fp4",
    "compress_rope_theta": 160000,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, \
4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 0]
}"""
V4_PRO = """{
    "vocab_size": 129280,
    "dim": 7168,
    "moe_inter_dim": 3072,
    "n_layers": 61,
    "n_hash_layers": 3,
    "n_heads": 128,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "n_activated_experts": 6,
    "score_func": "sqrtsoftplus",
    "route_scale": 2.5,
    "swiglu_limit": 10.0,
    "q_lora_rank": 1536,
    "head_dim": 512,
    "rope_head_dim": 64,
    "o_groups": 16,
    "o_lora_rank": 1024,
    "window_size": 128,
    "original_seq_len": 65536,
    "rope_theta": 10000,
    "rope_factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 1024,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "dtype": "fp8",
    "scale_fmt": "ue8m0",
    "expert_dtype": "fp4",
    "compress_rope_theta": 160000,
    "compress_ratios": [128, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, \
128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, 4, 128, \
4, 128, 4, 128, 4, 128, 4, 128, 4, 0]
}"""
V3: Mapping[str, Any] = {
    "vocab_size": 129280,
    "dim": 7168,
    "inter_dim": 18432,
    "moe_inter_dim": 2048,
    "n_layers": 61,
    "n_dense_layers": 3,
    "n_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 8,
    "n_expert_groups": 8,
    "n_limited_groups": 4,
    "route_scale": 2.5,
    "score_func": "sigmoid",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "dtype": "fp8",
}
UNGROUPED = {key: value for key, value in V3.items() if key not in {"n_expert_groups", "n_limited_groups"}}
KIMI_K2 = {
    **UNGROUPED,
    "vocab_size": 163840,
    "n_dense_layers": 1,
    "n_heads": 64,
    "n_routed_experts": 384,
    "route_scale": 2.827,
    "rope_theta": 50000,
    "rope_factor": 32,
    "beta_fast": 1,
}
GLM_5_1 = {
    **UNGROUPED,
    "vocab_size": 154880,
    "dim": 6144,
    "inter_dim": 12288,
    "n_layers": 78,
    "n_heads": 64,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "original_seq_len": 202752,
    "rope_theta": 1000000,
}
V2: Mapping[str, Any] = {
    "vocab_size": 102400,
    "dim": 5120,
    "inter_dim": 12288,
    "moe_inter_dim": 1536,
    "n_layers": 60,
    "n_dense_layers": 1,
    "n_heads": 128,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "n_expert_groups": 8,
    "n_limited_groups": 3,
    "route_scale": 16.0,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
V2_LITE: Mapping[str, Any] = {
    "vocab_size": 102400,
    "dim": 2048,
    "inter_dim": 10944,
    "moe_inter_dim": 1408,
    "n_layers": 27,
    "n_dense_layers": 1,
    "n_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "n_activated_experts": 6,
    "route_scale": 1.0,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "mscale": 0.707,
}
"""Published with `q_lora_rank` 0, which the code takes for granted."""
V4_FLASH_0731 = {
    **json.loads(V4_FLASH),
    "n_mtp_layers": 3,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}
V41_FLASH: Mapping[str, Any] = {
    "vocab_size": 129280,
    "dim": 5120,
    "moe_inter_dim": 2304,
    "n_layers": 40,
    "n_mtp_layers": 3,
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [37, 38, 39],
    "dspark_markov_rank": 256,
    "dspark_n_routed_experts": 128,
    "dspark_n_activated_experts": 3,
    "n_heads": 64,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "n_activated_experts": 6,
    "score_func": "sqrtsoftplus",
    "route_scale": 1.5,
    "swiglu_limit": 10.0,
    "q_lora_rank": 1280,
    "head_dim": 512,
    "rope_head_dim": 64,
    "norm_eps": 1e-20,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "window_size": 128,
    "kv_source_layers": [2, 8, 14, 20],
    "index_source_layers": [2, 8, 14, 20, 24, 28, 32, 36],
    "original_seq_len": 65536,
    "rope_theta": 10000,
    "rope_factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 512,
    "candidate_source_layer": 20,
    "candidate_topk_blocks": 2048,
    "candidate_block_size": 8,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-06,
    "engram_layer_ids": [1, 14],
    "engram_vocab_size": 16000000,
    "engram_num_embeddings": [384006168, 384016682],
    "engram_max_ngram_size": 4,
    "engram_pad_id": 2,
    "engram_compressed_vocab_size": 99092,
    "dtype": "fp8",
    "expert_dtype": "fp4",
    "compress_rope_theta": 160000,
    "compress_ratios": [0, 0, *[2] * 18, *[1] * 20, 0, 0, 0],
    "vision_n_layers": 32,
    "vision_dim": 1024,
    "vision_n_heads": 16,
    "vision_inter_dim": 2816,
    "vision_patch_size": 14,
    "vision_downsample_ratio": 3,
    "vision_max_n_token": 1024,
    "vision_min_pixels": 295936,
    "vision_max_wh_ratio": None,
    "image_token_id": 129264,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "vision_rope_theta": 10000,
}
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "deepseek-v3": V3,
    "deepseek-v3.2": {**V3, "scale_fmt": "ue8m0", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048},
    "kimi-k2": KIMI_K2,
    "glm-5.1-fp8": GLM_5_1,
    "deepseek-v4-flash-0731": V4_FLASH_0731,
    "deepseek-v4.1-flash": V41_FLASH,
}
HUB_V2: Mapping[str, Any] = {
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_group": 3,
    "v_head_dim": 128,
    "vocab_size": 102400,
}
HUB_V2_LITE = {
    **HUB_V2,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "q_lora_rank": None,
    "rope_scaling": {**HUB_V2["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
}


VARIANTS: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling.type"),
    "one mscale": (
        {"rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.5}},
        "rope_scaling.mscale",
    ),
    "no mscale": ({"rope_scaling": None, "rope_parameters": {"rope_type": "yarn", "factor": 40}}, "mscale"),
    "not normed": ({"norm_topk_prob": False}, "norm_topk_prob is false"),
    "another score": ({"scoring_func": "tanh"}, 'scoring_func is "tanh"'),
}


def test_what_the_inference_code_cannot_run_has_no_configuration(source: Source, tmp_path: Path) -> None:
    for number, (changes, word) in enumerate(VARIANTS.values()):
        folder, target = tmp_path / f"source {number}", tmp_path / f"target {number}"
        shutil.copytree(source("deepseek-v3"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        plan = convert_checkpoint(Job(folder, 2), target).plan
        assert not (target / "run_config.json").exists()
        assert any(word in reason for reason in find_run_obstacles(plan))


def run_config_of(folder: Path, changes: Mapping[str, Any], tmp_path: Path) -> dict[str, Any]:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    convert_checkpoint(Job(copy, 2), tmp_path / "target")
    found: dict[str, Any] = json.loads((tmp_path / "target" / "run_config.json").read_text())
    return found


def test_of_several_rotary_embeddings_the_main_one_is_meant(source: Source, tmp_path: Path) -> None:
    main = {"rope_type": "yarn", "rope_theta": 50000, "factor": 32, "mscale": 1.0, "mscale_all_dim": 1.0}
    changes = {"rope_scaling": None, "rope_theta": None, "rope_parameters": {"main": main, "other": {"factor": 2}}}
    found = run_config_of(source("deepseek-v3"), changes, tmp_path)
    assert (found["rope_theta"], found["rope_factor"]) == (50000, 32)


def test_the_dtype_is_that_of_the_files(source: Source, tmp_path: Path) -> None:
    """Not what a config says of it, or does not say."""
    assert run_config_of(source("deepseek-v3"), {"quantization_config": None}, tmp_path)["dtype"] == "fp8"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


def as_published(job: Job, config: Mapping[str, Any]) -> str:
    """The run configuration of the small model of a job, had it the config of the published one."""
    return make_run_config(replace(plan_conversion(job), config=config))


# --- the published ones ---


def test_the_file_of_v4_flash_is_byte_for_byte_the_published_one(tmp_path: Path) -> None:
    """Of the whole model; what is planned is all that counts."""
    write_full(tmp_path, "deepseek-v4-flash")
    assert make_run_config(plan_conversion(Job(tmp_path, 4))) == V4_FLASH


def test_the_file_of_v4_pro_is_byte_for_byte_the_published_one(source: Source) -> None:
    name = "deepseek-v4-pro"
    assert as_published(Job(source(name), 8), FAMILIES[name].full) == V4_PRO


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_is_that_of_the_published_configuration(name: str, source: Source) -> None:
    assert json.loads(as_published(Job(source(name), 1), FAMILIES[name].full)) == PUBLISHED[name]


def test_the_keys_of_v3_are_in_the_published_order(source: Source) -> None:
    found = json.loads(as_published(Job(source("deepseek-v3"), 1), FAMILIES["deepseek-v3"].full))
    assert list(found) == list(V3)


def test_v31_has_the_format_of_its_scales_too(source: Source) -> None:
    config = FAMILIES["deepseek-v3"].full
    config = {**config, "quantization_config": {**config["quantization_config"], "scale_fmt": "ue8m0"}}
    found = json.loads(as_published(Job(source("deepseek-v3"), 1), config))
    assert list(found.items()) == list({**V3, "scale_fmt": "ue8m0"}.items())


@pytest.mark.parametrize(("hub", "wanted"), [(HUB_V2, V2), (HUB_V2_LITE, V2_LITE)])
def test_both_sizes_of_v2_have_the_published_keys(
    hub: Mapping[str, Any], wanted: Mapping[str, Any], tmp_path: Path
) -> None:
    checkpoints.write_deepseek_v2(tmp_path, q_lora=hub["q_lora_rank"] is not None)
    assert json.loads(as_published(Job(tmp_path, 1), hub)) == wanted


def test_a_config_with_rope_parameters_says_the_same_as_an_older_one(source: Source) -> None:
    """As transformers writes it today. Of Kimi, whose numbers the code does not take for granted."""
    config = dict(FAMILIES["kimi-k2"].full)
    config["rope_parameters"] = {**config.pop("rope_scaling"), "rope_theta": config.pop("rope_theta")}
    assert json.loads(as_published(Job(source("kimi-k2"), 1), config)) == KIMI_K2


def test_the_eps_of_v4_are_said_if_they_are_not_the_usual_ones(source: Source) -> None:
    name = "deepseek-v4-pro"
    config = {**FAMILIES[name].full, "rms_norm_eps": 1e-5, "hc_eps": 1e-7}
    found = json.loads(as_published(Job(source(name), 1), config))
    assert (found["norm_eps"], found["hc_eps"]) == (1e-5, 1e-7)


# --- after a cast, and with padding ---


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2", "glm-5.1-fp8"])
def test_cast_to_bf16_the_dtype_is_taken_for_granted(name: str, source: Source) -> None:
    found = json.loads(as_published(Job(source(name), 1, cast="bf16"), FAMILIES[name].full))
    assert found == {key: value for key, value in PUBLISHED[name].items() if key not in {"dtype", "scale_fmt"}}


@pytest.mark.parametrize("name", ["deepseek-v4-flash-0731", "deepseek-v4.1-flash"])
def test_cast_to_bf16_the_v4_line_must_be_told(name: str, source: Source) -> None:
    """It takes FP8 for granted, and V4.1 FP4 for experts."""
    found = json.loads(as_published(Job(source(name), 1, cast="bf16"), FAMILIES[name].full))
    wanted = {key: value for key, value in PUBLISHED[name].items() if key not in {"scale_fmt", "expert_dtype"}}
    assert found == {**wanted, "dtype": "bf16"} | ({"expert_dtype": None} if name == "deepseek-v4.1-flash" else {})


def test_experts_cast_to_fp8_are_not_called_fp4(source: Source) -> None:
    for name in ("deepseek-v4-flash-0731", "deepseek-v4.1-flash"):
        found = json.loads(as_published(Job(source(name), 1, expert_dtype="fp8"), FAMILIES[name].full))
        wanted = {key: value for key, value in PUBLISHED[name].items() if key != "expert_dtype"}
        assert found == wanted | ({"expert_dtype": None} if name == "deepseek-v4.1-flash" else {})


def test_cast_to_fp8_the_dtype_is_said(source: Source) -> None:
    config = {**FAMILIES["glm-5.1"].full}
    plain, power = (
        json.loads(as_published(Job(source("glm-5.1"), 1, cast=cast), config)) for cast in ("fp8", "fp8-ue8m0")
    )
    assert plain == GLM_5_1
    assert power == {**GLM_5_1, "scale_fmt": "ue8m0"}


def test_padding_is_a_wider_model(source: Source) -> None:
    """The widths are those of V3."""
    plan = plan_conversion(Job(source("deepseek-v3-for-32"), 32, pad=True))
    found = json.loads(make_run_config(plan))
    assert (found["inter_dim"], found["moe_inter_dim"], found["n_shared_experts"]) == (20480, 2048, 2)
    without = json.loads(make_run_config(plan_conversion(Job(source("deepseek-v3-for-32"), 16))))
    assert {key for key in found if found[key] != without[key]} == {"inter_dim", "n_shared_experts"}


# --- what is written loads into the model that it describes ---


def require_loads(job: Job, name: str, target: Path) -> None:
    convert_checkpoint(job, target, Settings(jobs=1))
    require_loaded(target, job.mp, name)


def require_loaded(target: Path, ranks: int, name: str) -> None:
    """Every rank file loads strictly into the model of the run configuration beside it."""
    line, skeleton = MODELS[name]
    args = {**TAKEN_FOR_GRANTED[line], **json.loads((target / "run_config.json").read_bytes())}
    for rank in range(ranks):
        parameters = skeleton(args, ranks, rank)
        if line != "v3" and args["dtype"] == "bf16":
            parameters = in_bf16(parameters)
        path = target / f"model{rank}-mp{ranks}.safetensors"
        assert skeletons.differences(parameters, path) == []
        skeletons.load(parameters, path, strict=True)


def in_bf16(parameters: Parameters) -> Parameters:
    """The same model of the V4 line with BF16 in the place of FP8 and FP4; but tables of n-grams are always FP8."""
    found: Parameters = {}
    for name, (shape, dtype) in parameters.items():
        if ".engram.embed." in name:
            found[name] = shape, dtype
        elif dtype in {F8, FP4}:
            found[name] = ((shape[0], shape[1] * 2) if dtype == FP4 else shape), BF16
        elif dtype != E8M0:
            found[name] = shape, dtype
    return found


@pytest.mark.parametrize(("name", "ranks"), [(name, ranks) for name in ORACLES for ranks in (1, LEGAL[name][-1])])
def test_every_rank_file_loads_strictly_into_the_model_of_its_run_configuration(
    name: str, ranks: int, converted: Callable[[str, int], Path]
) -> None:
    require_loaded(converted(name, ranks), ranks, name)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"deepseek-v3-for-32", "glm-5.1", "deepseek-v3.2-exp"}))
def test_so_it_does_after_a_cast_to_bf16(name: str, source: Source, folder: Path) -> None:
    require_loads(Job(source(name), 2, cast="bf16"), name, folder / "target")


@pytest.mark.parametrize(
    "name", ["deepseek-v4-flash", "deepseek-v4-pro", "deepseek-v4-flash-0731", "deepseek-v4.1-flash"]
)
def test_so_it_does_with_experts_cast_to_fp8(name: str, source: Source, folder: Path) -> None:
    require_loads(Job(source(name), 4, expert_dtype="fp8"), name, folder / "target")


@pytest.mark.parametrize("cast", ["fp8", "fp8-ue8m0"])
def test_so_it_does_after_a_cast_to_fp8(cast: str, source: Source, folder: Path) -> None:
    require_loads(Job(source("glm-5.1"), 1, cast=cast), "glm-5.1", folder / "target")


def test_so_it_does_with_padding(source: Source, folder: Path) -> None:
    require_loads(Job(source("deepseek-v3-for-32"), 32, pad=True), "deepseek-v3-for-32", folder / "target")


@pytest.mark.parametrize("q_lora", [True, False])
def test_so_it_does_for_v2(folder: Path, q_lora: bool) -> None:  # noqa: FBT001 - a parameter of the test
    checkpoints.write_deepseek_v2(folder / "source", q_lora=q_lora)
    target = folder / "target"
    convert_checkpoint(Job(folder / "source", 2), target)
    args = {**TAKEN_FOR_GRANTED["v3"], **json.loads((target / "run_config.json").read_bytes())}
    for rank in range(2):
        parameters = skeletons.v3_parameters(args, 2, rank)
        skeletons.load(parameters, target / f"model{rank}-mp2.safetensors", strict=True)


# --- the language of the recipes ---


def test_members_that_are_left_out_are_not_counted(source: Source, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text((FAMILIES_FOLDER / "deepseek-v3.toml").read_text() + 'n_mtp_layers = "target.m"\n')
    for keep_mtp, number in ((False, 0), (True, 1)):
        plan = plan_conversion(Job(source("deepseek-v3"), 1, recipe=str(mine), keep_mtp=keep_mtp))
        assert json.loads(make_run_config(plan))["n_mtp_layers"] == number


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('expert_dtype        = ["target.packed"]', "expert_dtype        = []"),
        ('expert_dtype        = ["target.packed"]', 'expert_dtype        = ["target.packed", 1, 2]'),
        ("stays = true", 'stays = "yes"'),
    ],
)
def test_a_faulty_entry_is_refused(old: str, new: str) -> None:
    text = (FAMILIES_FOLDER / "deepseek-v41.toml").read_text()
    assert old in text
    with pytest.raises(Refused) as error:
        parse_recipe(text.replace(old, new), "mine.toml")
    (problem,) = error.value.problems
    assert problem.kind == "wrong-recipe"
    assert problem.subject.startswith("mine.toml")
