"""Every tensor of Qwen3-Next, Qwen3.5, Qwen3.6 and MiniMax-M2 as published, from their `config.json` alone.

Written from lists of the published tensors (names, shapes, dtypes, counts and sizes), which others made of the files.
It knows no recipe and no plan. Of the FP8 form of Qwen3.5 no list was seen; it is here as those who load it tell.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from families import Config, Family

from reshard.synthetic import TensorEntry, make_bf16_entry, write_tensors


def write_small_hybrid(folder: Path, name: str, *, files: int = 3, index: bool = True, **changes: Any) -> None:
    """Writes a small checkpoint of a family, with data, into a new folder. `changes` are keys of its text."""
    family = HYBRIDS[name]
    config = change_text(family.small, changes)
    write_tensors(folder, family.tensors(config), config, files, index=index)


def write_full_hybrid(folder: Path, name: str) -> None:
    """Writes the full checkpoint of a family as holes: true headers and sizes, every byte reads as zero."""
    family = HYBRIDS[name]
    write_tensors(folder, family.tensors(family.full), family.full, family.files, sparse=True)


def change_text(config: Config, changes: Config) -> Config:
    """A config with other values of its text, which some have in an object of its own."""
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], **changes}}
    return {**config, **changes}


def qwen3_next(config: Config) -> list[TensorEntry]:
    """All of it in BF16, but for FP8 weights; an MTP layer behind it, which has full attention."""
    found = [make_bf16_entry("model.embed_tokens.weight", config["vocab_size"], config["hidden_size"])]
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}"
        if (number + 1) % config["full_attention_interval"]:
            found += linear_attention(config, f"{prefix}.linear_attn", state="BF16")
        else:
            found += gated_attention(config, f"{prefix}.self_attn")
        found += [*two_norms(config, prefix), *many_experts(config, f"{prefix}.mlp")]
    found.append(make_bf16_entry("model.norm.weight", config["hidden_size"]))
    found.append(make_bf16_entry("lm_head.weight", config["vocab_size"], config["hidden_size"]))
    return [*found, *draft(config)]


def qwen35(config: Config) -> list[TensorEntry]:
    """Text, with an MTP layer, and a vision tower. The keys in `published` tell what no config of the hub does: the
    dtype of the states, and how experts lie, those of the MTP layer apart.
    """
    told = config["published"]
    text = {**config["text_config"], "quantization_config": config.get("quantization_config")}
    hidden, root = text["hidden_size"], "model.language_model"
    found = [make_bf16_entry(f"{root}.embed_tokens.weight", text["vocab_size"], hidden)]
    for number, kind in enumerate(text["layer_types"]):
        prefix = f"{root}.layers.{number}"
        if kind == "linear_attention":
            found += linear_attention(text, f"{prefix}.linear_attn", state=told["state"])
        else:
            found += gated_attention(text, f"{prefix}.self_attn")
        found += [*two_norms(text, prefix), *inner(text, f"{prefix}.mlp", is_stacked=told["stacked"])]
    found.append(make_bf16_entry(f"{root}.norm.weight", hidden))
    if not config["tie_word_embeddings"]:
        found.append(make_bf16_entry("lm_head.weight", text["vocab_size"], hidden))
    return [*found, *draft(text, is_stacked=told["stacked_draft"]), *vision(config["vision_config"])]


def minimax_m2(config: Config) -> list[TensorEntry]:
    """Its routers are F32, and their biases; norms of queries and keys are over all heads."""
    hidden, inner_size, width = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    found = [make_bf16_entry("model.embed_tokens.weight", config["vocab_size"], hidden)]
    for number in range(config["num_hidden_layers"]):
        prefix, count = f"model.layers.{number}", config["num_local_experts"]
        for word, rows, columns in (("q", query, hidden), ("k", key, hidden), ("v", key, hidden), ("o", hidden, query)):
            found += scaled(config, f"{prefix}.self_attn.{word}_proj", rows, columns)
        found.append(make_bf16_entry(f"{prefix}.self_attn.q_norm.weight", query))
        found.append(make_bf16_entry(f"{prefix}.self_attn.k_norm.weight", key))
        found += two_norms(config, prefix)
        found.append((f"{prefix}.block_sparse_moe.gate.weight", "F32", (count, hidden)))
        found.append((f"{prefix}.block_sparse_moe.e_score_correction_bias", "F32", (count,)))
        for expert in range(count):
            one = f"{prefix}.block_sparse_moe.experts.{expert}"
            found += scaled(config, f"{one}.w1", inner_size, hidden)
            found += scaled(config, f"{one}.w2", hidden, inner_size)
            found += scaled(config, f"{one}.w3", inner_size, hidden)
    found.append(make_bf16_entry("model.norm.weight", hidden))
    found.append(make_bf16_entry("lm_head.weight", config["vocab_size"], hidden))
    return found


def linear_attention(config: Config, prefix: str, *, state: str) -> Iterator[TensorEntry]:
    """Qwen3-Next has its projections in two tensors, Qwen3.5 in four; the small ones are never FP8."""
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    if config["model_type"] == "qwen3_next":
        yield from scaled(config, f"{prefix}.in_proj_qkvz", 2 * keys + 2 * values, hidden)
        yield make_bf16_entry(f"{prefix}.in_proj_ba.weight", 2 * heads, hidden)
    else:
        yield from scaled(config, f"{prefix}.in_proj_qkv", 2 * keys + values, hidden)
        yield from scaled(config, f"{prefix}.in_proj_z", values, hidden)
        yield make_bf16_entry(f"{prefix}.in_proj_a.weight", heads, hidden)
        yield make_bf16_entry(f"{prefix}.in_proj_b.weight", heads, hidden)
    yield make_bf16_entry(f"{prefix}.conv1d.weight", 2 * keys + values, 1, config["linear_conv_kernel_dim"])
    yield f"{prefix}.A_log", state, (heads,)
    yield make_bf16_entry(f"{prefix}.dt_bias", heads)
    yield f"{prefix}.norm.weight", state, (config["linear_value_head_dim"],)
    yield from scaled(config, f"{prefix}.out_proj", hidden, values)


def gated_attention(config: Config, prefix: str) -> Iterator[TensorEntry]:
    """A query head has as many channels again for its gate."""
    hidden, width = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    for word, rows, columns in (("q", 2 * query, hidden), ("k", key, hidden), ("v", key, hidden), ("o", hidden, query)):
        yield from scaled(config, f"{prefix}.{word}_proj", rows, columns)
    yield make_bf16_entry(f"{prefix}.q_norm.weight", width)
    yield make_bf16_entry(f"{prefix}.k_norm.weight", width)


def two_norms(config: Config, prefix: str) -> Iterator[TensorEntry]:
    yield make_bf16_entry(f"{prefix}.input_layernorm.weight", config["hidden_size"])
    yield make_bf16_entry(f"{prefix}.post_attention_layernorm.weight", config["hidden_size"])


def inner(config: Config, prefix: str, *, is_stacked: bool) -> Iterator[TensorEntry]:
    """The feed-forward part of a layer: experts where the config has some."""
    if "num_experts" in config:
        return many_experts(config, prefix, is_stacked=is_stacked)
    return feed_forward(config, prefix, config["intermediate_size"])


def feed_forward(config: Config, prefix: str, width: int) -> Iterator[TensorEntry]:
    yield from scaled(config, f"{prefix}.gate_proj", width, config["hidden_size"])
    yield from scaled(config, f"{prefix}.up_proj", width, config["hidden_size"])
    yield from scaled(config, f"{prefix}.down_proj", config["hidden_size"], width)


def many_experts(config: Config, prefix: str, *, is_stacked: bool = False) -> Iterator[TensorEntry]:
    count, width, hidden = config["num_experts"], config["moe_intermediate_size"], config["hidden_size"]
    yield make_bf16_entry(f"{prefix}.gate.weight", count, hidden)
    if is_stacked:
        yield make_bf16_entry(f"{prefix}.experts.gate_up_proj", count, 2 * width, hidden)
        yield make_bf16_entry(f"{prefix}.experts.down_proj", count, hidden, width)
    else:
        for expert in range(count):
            yield from feed_forward(config, f"{prefix}.experts.{expert}", width)
    yield from feed_forward(config, f"{prefix}.shared_expert", config["shared_expert_intermediate_size"])
    yield make_bf16_entry(f"{prefix}.shared_expert_gate.weight", 1, hidden)


def draft(config: Config, *, is_stacked: bool = False) -> Iterator[TensorEntry]:
    """The module `mtp`: a layer with full attention between what leads in and a norm."""
    hidden = config["hidden_size"]
    yield make_bf16_entry("mtp.fc.weight", hidden, 2 * hidden)
    yield from gated_attention(config, "mtp.layers.0.self_attn")
    yield from two_norms(config, "mtp.layers.0")
    yield from inner(config, "mtp.layers.0.mlp", is_stacked=is_stacked)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield make_bf16_entry(f"mtp.{name}.weight", hidden)


def vision(config: Config) -> Iterator[TensorEntry]:
    width, rows = config["hidden_size"], config["intermediate_size"]
    merged = width * config["spatial_merge_size"] ** 2
    patch = config["in_channels"], config["temporal_patch_size"], config["patch_size"], config["patch_size"]
    yield make_bf16_entry("model.visual.patch_embed.proj.weight", width, *patch)
    yield make_bf16_entry("model.visual.patch_embed.proj.bias", width)
    yield make_bf16_entry("model.visual.pos_embed.weight", config["num_position_embeddings"], width)
    for number in range(config["depth"]):
        prefix = f"model.visual.blocks.{number}"
        yield from layer_norm(f"{prefix}.norm1", width)
        yield from layer_norm(f"{prefix}.norm2", width)
        yield from biased(f"{prefix}.attn.qkv", 3 * width, width)
        yield from biased(f"{prefix}.attn.proj", width, width)
        yield from biased(f"{prefix}.mlp.linear_fc1", rows, width)
        yield from biased(f"{prefix}.mlp.linear_fc2", width, rows)
    yield from layer_norm("model.visual.merger.norm", width)
    yield from biased("model.visual.merger.linear_fc1", merged, merged)
    yield from biased("model.visual.merger.linear_fc2", config["out_hidden_size"], merged)


def layer_norm(prefix: str, width: int) -> Iterator[TensorEntry]:
    yield make_bf16_entry(f"{prefix}.weight", width)
    yield make_bf16_entry(f"{prefix}.bias", width)


def biased(prefix: str, rows: int, columns: int) -> Iterator[TensorEntry]:
    yield make_bf16_entry(f"{prefix}.weight", rows, columns)
    yield make_bf16_entry(f"{prefix}.bias", rows)


def scaled(config: Config, prefix: str, rows: int, columns: int) -> Iterator[TensorEntry]:
    """A weight: BF16, or FP8 with a scale for each block, F32 or, in Qwen3.5, BF16."""
    if not config.get("quantization_config"):
        yield make_bf16_entry(f"{prefix}.weight", rows, columns)
        return
    dtype = "BF16" if config["model_type"].startswith("qwen3_5") else "F32"
    yield f"{prefix}.weight", "F8_E4M3", (rows, columns)
    yield f"{prefix}.weight_scale_inv", dtype, (-(-rows // 128), -(-columns // 128))


# The configs: what the published ones say of shapes


def list_kinds(count: int) -> list[str]:
    """Every fourth layer has full attention."""
    return ["linear_attention" if (number + 1) % 4 else "full_attention" for number in range(count)]


def list_whole_modules(config: Config) -> list[str]:
    """What the published FP8 form of Qwen3-Next leaves as it is, in the config's own order."""
    found = ["lm_head"]
    for number in range(config["num_hidden_layers"]):
        is_linear = (number + 1) % config["full_attention_interval"]
        states = ("A_log", "conv1d", "dt_bias", "in_proj_ba", "norm") if is_linear else ()
        words = ["input_layernorm", *(f"linear_attn.{word}" for word in states), "mlp.gate", "mlp.shared_expert_gate"]
        words += ["post_attention_layernorm", *([] if is_linear else ["self_attn.k_norm", "self_attn.q_norm"])]
        found += [f"model.layers.{number}.{word}" for word in words]
    words = ["input_layernorm", "mlp.gate", "mlp.shared_expert_gate", "post_attention_layernorm"]
    found += ["mtp.fc", *(f"mtp.layers.0.{word}" for word in (*words, "self_attn.k_norm", "self_attn.q_norm"))]
    return [*found, "mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden"]


def quantize(config: Config, modules: list[str]) -> Config:
    blocks = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return {**config, "quantization_config": {**blocks, "modules_to_not_convert": modules}}


LINEAR: Config = {
    "full_attention_interval": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
}
NEXT: Config = {
    **LINEAR,
    "architectures": ["Qwen3NextForCausalLM"],
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
NEXT_FP8 = quantize(NEXT, list_whole_modules(NEXT))
SMALL_NEXT: Config = {
    "head_dim": 128,
    "hidden_size": 512,
    "linear_key_head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 64,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_experts": 12,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 12,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 320,
}
"""Layer 10 has linear attention, 11 full; for 1, 2 and 4 ranks."""


def make_qwen35(text: Config, eyes: Config, *, published: Config, is_tied: bool = False) -> Config:
    kind = "qwen3_5_moe" if "num_experts" in text else "qwen3_5"
    name = "Qwen3_5MoeForConditionalGeneration" if "num_experts" in text else "Qwen3_5ForConditionalGeneration"
    text = {**LINEAR, **text, "layer_types": list_kinds(text["num_hidden_layers"]), "model_type": f"{kind}_text"}
    text |= {"dtype": "bfloat16", "mtp_num_hidden_layers": 1, "tie_word_embeddings": is_tied, "vocab_size": 248320}
    own = {"in_channels": 3, "num_position_embeddings": 2304, "patch_size": 16, "spatial_merge_size": 2}
    eyes = {**own, "temporal_patch_size": 2, "model_type": f"{kind}_vision", **eyes}
    return {
        "architectures": [name],
        "model_type": kind,
        "published": published,
        "text_config": text,
        "tie_word_embeddings": is_tied,
        "vision_config": {**eyes, "out_hidden_size": text["hidden_size"]},
    }


EYES: Config = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16}
EARLY: Config = {"state": "F32", "stacked": True, "stacked_draft": False}
DENSE_27B = make_qwen35(
    {"hidden_size": 5120, "intermediate_size": 17408, "linear_num_value_heads": 48, "num_attention_heads": 24,
     "num_hidden_layers": 64, "num_key_value_heads": 4},
    EYES, published=EARLY,
)  # fmt: skip
DENSE_4B = make_qwen35(
    {"hidden_size": 2560, "intermediate_size": 9216, "num_attention_heads": 16, "num_hidden_layers": 32,
     "num_key_value_heads": 4},
    {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}, published=EARLY, is_tied=True,
)  # fmt: skip
DENSE_08B = make_qwen35(
    {"hidden_size": 1024, "intermediate_size": 3584, "linear_num_value_heads": 16, "num_attention_heads": 8,
     "num_hidden_layers": 24, "num_key_value_heads": 2},
    {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12}, published=EARLY, is_tied=True,
)  # fmt: skip
MOE_TEXT: Config = {
    "hidden_size": 2048, "moe_intermediate_size": 512, "num_attention_heads": 16, "num_experts": 256,
    "num_experts_per_tok": 8, "num_hidden_layers": 40, "num_key_value_heads": 2, "shared_expert_intermediate_size": 512,
}  # fmt: skip
MOE_35 = make_qwen35(MOE_TEXT, EYES, published=EARLY)
MOE_36 = make_qwen35(MOE_TEXT, EYES, published={"state": "BF16", "stacked": True, "stacked_draft": True})
SMALL_TEXT: Config = {
    **{key: value for key, value in SMALL_NEXT.items() if "experts" not in key and "intermediate" not in key},
    "intermediate_size": 512,
    "layer_types": list_kinds(12),
    "num_key_value_heads": 2,
}
SMALL_EYES: Config = {"depth": 11, "hidden_size": 48, "intermediate_size": 40, "num_heads": 4, "patch_size": 4}
SMALL_EXPERTS: Config = {key: SMALL_NEXT[key] for key in SMALL_NEXT if "experts" in key or "intermediate" in key}


def make_small(config: Config, *, is_moe: bool, **published: Any) -> Config:
    """The config of a small model that is published in the same form, or in another (`published`)."""
    text = {**config["text_config"], **SMALL_TEXT, **(SMALL_EXPERTS if is_moe else {})}
    eyes = {**config["vision_config"], **SMALL_EYES, "out_hidden_size": text["hidden_size"]}
    told = {**config["published"], **published}
    return {**config, "text_config": text, "vision_config": eyes, "published": told}


def list_fp8_exceptions(config: Config) -> list[str]:
    """What stays as it is in the FP8 form of Qwen3.5, by modules: it has no scale in `qwen35`."""
    names = [name.removesuffix(".weight") for name, dtype, _ in qwen35(config) if dtype != "F8_E4M3"]
    return [name for name in names if not name.endswith("_scale_inv")]


def make_fp8(config: Config) -> Config:
    """FP8, with a tensor for each expert."""
    form = {**config, "published": {**config["published"], "stacked": False, "stacked_draft": False}}
    return quantize(form, list_fp8_exceptions(quantize(form, [])))


MINIMAX: Config = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attn_type_list": [1] * 62,
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "model_type": "minimax_m2",
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "rotary_dim": 64,
    "tie_word_embeddings": False,
    "use_mtp": True,
    "num_mtp_modules": 3,
    "vocab_size": 200064,
}
MINIMAX_FP8 = quantize(MINIMAX, ["gate", "e_score_correction_bias", "lm_head"])
SMALL_MINIMAX: Config = {
    "attn_type_list": [1] * 11,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 11,
    "num_key_value_heads": 4,
    "num_local_experts": 12,
    "vocab_size": 320,
}
SMALL_NEXT_FP8 = quantize({**NEXT, **SMALL_NEXT}, list_whole_modules({**NEXT, **SMALL_NEXT}))
SMALL_MOE_35, SMALL_MOE_36 = (make_small(config, is_moe=True) for config in (MOE_35, MOE_36))
SMALL_27B = make_small(DENSE_27B, is_moe=False)

HYBRIDS: Mapping[str, Family] = {
    "qwen3-next": Family(qwen3_next, NEXT, {**NEXT, **SMALL_NEXT}, 41),
    "qwen3-next-fp8": Family(qwen3_next, NEXT_FP8, SMALL_NEXT_FP8, 8),
    "qwen3.5-27b": Family(qwen35, DENSE_27B, SMALL_27B, 11),
    "qwen3.5-27b-fp8": Family(qwen35, make_fp8(DENSE_27B), make_fp8(SMALL_27B), 11),
    "qwen3.5-4b": Family(qwen35, DENSE_4B, make_small(DENSE_4B, is_moe=False), 2),
    "qwen3.5-0.8b": Family(qwen35, DENSE_08B, make_small(DENSE_08B, is_moe=False), 1),
    "qwen3.5-35b-a3b": Family(qwen35, MOE_35, SMALL_MOE_35, 14),
    "qwen3.6-35b-a3b": Family(qwen35, MOE_36, SMALL_MOE_36, 26),
    "qwen3.5-35b-a3b-fp8": Family(qwen35, make_fp8(MOE_35), make_fp8(SMALL_MOE_35), 14),
    "minimax-m2.7": Family(minimax_m2, MINIMAX_FP8, {**MINIMAX_FP8, **SMALL_MINIMAX}, 125),
}
"""Counts, sizes, dtypes and files are published ones, but for those of Qwen3.5 in FP8."""
