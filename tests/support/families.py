"""Every tensor of the published checkpoints, from their `config.json` alone: full-size and small ones of each family.

Written from the published lists of names and shapes. It knows no recipe and no plan, so that they can be checked
against what stands here; `reshard.synthetic` lends it DeepSeek-V3 and the writing of files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from reshard.synthetic import DEEPSEEK_V3, TensorEntry, list_linear, list_tensors, make_bf16_entry, write_tensors

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """`tensors` lists a checkpoint from a config; `full` is the published one in `files` files, `small` a toy."""

    tensors: Callable[[Config], list[TensorEntry]]
    full: Config
    small: Config
    files: int


def write_small(folder: Path, name: str, *, files: int = 4, seed: int = 0, index: bool = True) -> None:
    """Writes the small checkpoint of a family, with data, into a new folder."""
    family = FAMILIES[name]
    write_tensors(folder, family.tensors(family.small), family.small, files, seed=seed, index=index)


def write_full(folder: Path, name: str) -> None:
    """Writes the full checkpoint of a family as holes: true headers and sizes, every byte reads as zero."""
    family = FAMILIES[name]
    write_tensors(folder, family.tensors(family.full), family.full, family.files, sparse=True)


# DeepSeek-V3 and those that are built like it


def deepseek_v3(config: Config) -> list[TensorEntry]:
    """V3, R1, V3-0324 and V3.1, which are one layout."""
    return list_tensors({**config, "model_type": "deepseek_v3"})


def deepseek_v32(config: Config, *, norms: str) -> list[TensorEntry]:
    """V3 with an indexer in every layer, the MTP layer too. No config tells that V3.2 keeps its norms in F32."""
    tensors = (
        (name, norms, shape) if name.endswith("norm.weight") else (name, dtype, shape)
        for name, dtype, shape in deepseek_v3(config)
    )
    return list(with_indexers(config, tensors, key_norm="F32"))


def glm_moe_dsa(config: Config) -> list[TensorEntry]:
    """V3.2 with BF16 norms, and an MTP layer without an embedding and a head of its own. GLM-5.2 has indexers in some
    layers only, and in the MTP layer.
    """
    first = f"model.layers.{config['num_hidden_layers']}"
    left_out = {f"{first}.embed_tokens.weight", f"{first}.shared_head.head.weight"}
    kept = (tensor for tensor in deepseek_v3(config) if tensor[0] not in left_out)
    kinds = config.get("indexer_types", [])
    without = tuple(f"model.layers.{layer}." for layer, kind in enumerate(kinds) if kind == "shared")
    with_all = with_indexers(config, kept, key_norm="BF16")
    return [tensor for tensor in with_all if ".indexer." not in tensor[0] or not tensor[0].startswith(without or "-")]


def kimi_k2(config: Config) -> list[TensorEntry]:
    """V3 without an MTP layer, and with the frequencies of the rotary embedding in every layer."""
    # 56 as published, half of hidden size by heads, though a head has but 64 rotated channels.
    frequencies = config["hidden_size"] // config["num_attention_heads"] // 2
    found = []
    for tensor in deepseek_v3(config):
        found.append(tensor)
        prefix, ending = split_at(tensor[0], "kv_a_layernorm.weight")
        if ending:
            found.append(make_bf16_entry(f"{prefix}rotary_emb.inv_freq", frequencies))
    return found


def with_indexers(config: Config, tensors: Iterable[TensorEntry], *, key_norm: str) -> Iterator[TensorEntry]:
    heads, width = config["index_n_heads"], config["index_head_dim"]
    for tensor in tensors:
        yield tensor
        prefix, ending = split_at(tensor[0], "kv_a_layernorm.weight")
        if ending:
            prefix += "indexer"
            yield from list_linear(config, f"{prefix}.wq_b", heads * width, config["q_lora_rank"])
            yield from list_linear(config, f"{prefix}.wk", width, config["hidden_size"])
            yield f"{prefix}.k_norm.weight", key_norm, (width,)
            yield f"{prefix}.k_norm.bias", key_norm, (width,)
            yield make_bf16_entry(f"{prefix}.weights_proj.weight", heads, config["hidden_size"])


def split_at(name: str, ending: str) -> tuple[str, str]:
    """The name without its ending, and the ending if it has it: ("a.b.", "c") for "a.b.c" and "c"."""
    return (name.removesuffix(ending), ending) if name.endswith("." + ending) else (name, "")


# DeepSeek-V4 and V4.1, whose published names are short ones of their own


def deepseek_v4(config: Config) -> list[TensorEntry]:
    """V4-Flash, V4-Pro; with the keys `dspark_*` also V4-Flash-0731 and V4-Pro-0813, which draft with three blocks, and
    with `vision_*` V4-Flash-Vision-Exp.
    """
    dim, layers = config["hidden_size"], config["num_hidden_layers"]
    drafts = mtp_v4 if "dspark_block_size" not in config else draft_v4
    return [
        make_bf16_entry("embed.weight", config["vocab_size"], dim),
        *chain.from_iterable(layer_v4(config, number) for number in range(layers)),
        make_bf16_entry("norm.weight", dim),
        make_bf16_entry("head.weight", config["vocab_size"], dim),
        *head_connections(config, "hc_head"),
        *chain.from_iterable(drafts(config, number) for number in range(draft_layers(config))),
        *vision_v4(config),
    ]


def deepseek_v41(config: Config) -> list[TensorEntry]:
    """V4.1-Flash: blocks of 32, two tables of n-grams, and if the config has them one draft head and eyes."""
    eyes = config.get("vision_config") or {"num_hidden_layers": 0}
    text = {**config["text_config"], "quantization_config": config["quantization_config"]}
    text["vision_n_layers"] = eyes["num_hidden_layers"]
    drafts = draft_layers(text) if text.get("dspark_block_size") else 0
    dim, layers = text["hidden_size"], text["num_hidden_layers"]
    return [
        make_bf16_entry("embed.weight", text["vocab_size"], dim),
        *chain.from_iterable(layer_v41(text, number) for number in range(layers)),
        make_bf16_entry("norm.weight", dim),
        make_bf16_entry("head.weight", text["vocab_size"], dim),
        *chain.from_iterable(draft_v41(text, number) for number in range(drafts)),
        *(vision(eyes, dim) if text["vision_n_layers"] else ()),
    ]


def draft_layers(config: Config) -> int:
    """`compress_ratios` goes on over the blocks that draft; `num_nextn_predict_layers` says 1 where there are 3."""
    return len(config["compress_ratios"]) - int(config["num_hidden_layers"])


def layer_v4(config: Config, number: int) -> Iterator[TensorEntry]:
    prefix, ratio = f"layers.{number}", config["compress_ratios"][number]
    yield from block(config, prefix)
    if ratio:
        yield from compressor(config, f"{prefix}.attn.compressor", ratio, config["head_dim"])
    if ratio == 4:
        yield from indexer_v4(config, f"{prefix}.attn.indexer", ratio)
    yield from experts(config, f"{prefix}.ffn", config["n_routed_experts"])
    if number < config["num_hash_layers"]:
        yield f"{prefix}.ffn.gate.tid2eid", "I64", (config["vocab_size"], config["num_experts_per_tok"])
    if number >= config["num_hash_layers"] or config.get("vision_n_layers"):
        yield from gate_biases(config, f"{prefix}.ffn.gate", config["n_routed_experts"])


def mtp_v4(config: Config, number: int) -> Iterator[TensorEntry]:
    """A block that sees the window only, between two projections and a head of its own."""
    prefix, dim = f"mtp.{number}", config["hidden_size"]
    yield from native(config, f"{prefix}.e_proj", dim, dim)
    yield from native(config, f"{prefix}.h_proj", dim, dim)
    yield make_bf16_entry(f"{prefix}.enorm.weight", dim)
    yield make_bf16_entry(f"{prefix}.hnorm.weight", dim)
    yield from block(config, prefix)
    yield from experts(config, f"{prefix}.ffn", config["n_routed_experts"])
    yield f"{prefix}.ffn.gate.bias", "F32", (config["n_routed_experts"],)
    yield make_bf16_entry(f"{prefix}.norm.weight", dim)
    yield from head_connections(config, f"{prefix}.hc_head")


def draft_v4(config: Config, number: int) -> Iterator[TensorEntry]:
    """Three blocks in a row: what leads in stands with the first, what leads out with the last."""
    prefix, last = f"mtp.{number}", number == draft_layers(config) - 1
    yield from draft_entrance(config, number)
    yield from block(config, prefix)
    yield from experts(config, f"{prefix}.ffn", config["n_routed_experts"])
    yield from gate_biases(config, f"{prefix}.ffn.gate", config["n_routed_experts"])
    if last:
        yield from draft_exit(config, prefix, "markov_w1", "markov_w2")
        yield from head_connections(config, f"{prefix}.hc_head")


def layer_v41(text: Config, number: int) -> Iterator[TensorEntry]:
    prefix, ratio = f"layers.{number}", text["compress_ratios"][number]
    yield from block(text, prefix)
    yield from shared_compression(text, f"{prefix}.attn", number, ratio)
    yield from experts(text, f"{prefix}.ffn", text["n_routed_experts"])
    yield from gate_biases(text, f"{prefix}.ffn.gate", text["n_routed_experts"])
    if number in text["engram_layer_ids"]:
        yield from engram(text, f"{prefix}.engram", text["engram_layer_ids"].index(number))


def draft_v41(text: Config, number: int) -> Iterator[TensorEntry]:
    """As in V4-Flash-0731, with fewer experts than the layers have and other names for the last two tables."""
    prefix, last = f"mtp.{number}", number == draft_layers(text) - 1
    yield from draft_entrance(text, number)
    yield from block(text, prefix)
    yield from experts(text, f"{prefix}.ffn", text["dspark_n_routed_experts"])
    yield from gate_biases(text, f"{prefix}.ffn.gate", text["dspark_n_routed_experts"])
    if last:
        yield from draft_exit(text, prefix, "embed", "head")


def draft_entrance(config: Config, number: int) -> Iterator[TensorEntry]:
    dim = config["hidden_size"]
    if number == 0:
        yield from native(config, "mtp.0.main_proj", dim, dim * len(config["dspark_target_layer_ids"]))
        yield make_bf16_entry("mtp.0.main_norm.weight", dim)


def draft_exit(config: Config, prefix: str, first: str, second: str) -> Iterator[TensorEntry]:
    dim, rank, vocabulary = config["hidden_size"], config["dspark_markov_rank"], config["vocab_size"]
    yield make_bf16_entry(f"{prefix}.norm.weight", dim)
    yield make_bf16_entry(f"{prefix}.confidence_head.proj.weight", 1, dim + rank)
    yield make_bf16_entry(f"{prefix}.markov_head.{first}.weight", vocabulary, rank)
    yield make_bf16_entry(f"{prefix}.markov_head.{second}.weight", vocabulary, rank)


def block(config: Config, prefix: str) -> Iterator[TensorEntry]:
    """What every layer has but its experts: attention, norms, and the connections around both halves."""
    dim = config["hidden_size"]
    yield from attention(config, f"{prefix}.attn")
    yield make_bf16_entry(f"{prefix}.attn_norm.weight", dim)
    yield make_bf16_entry(f"{prefix}.ffn_norm.weight", dim)
    streams = config["hc_mult"]
    rows = streams * (2 + streams)
    for half in ("attn", "ffn"):
        yield f"{prefix}.hc_{half}_fn", "F32", (rows, streams * dim)
        yield f"{prefix}.hc_{half}_base", "F32", (rows,)
        yield f"{prefix}.hc_{half}_scale", "F32", (3,)


def head_connections(config: Config, prefix: str) -> Iterator[TensorEntry]:
    streams = config["hc_mult"]
    yield f"{prefix}_fn", "F32", (streams, streams * config["hidden_size"])
    yield f"{prefix}_base", "F32", (streams,)
    yield f"{prefix}_scale", "F32", (1,)


def attention(config: Config, prefix: str) -> Iterator[TensorEntry]:
    """All heads share one key; the output goes through one small matrix for each group of heads."""
    dim, heads, head, rank = (config[key] for key in ("hidden_size", "num_attention_heads", "head_dim", "q_lora_rank"))
    groups, group_rank = config["o_groups"], config["o_lora_rank"]
    yield f"{prefix}.attn_sink", "F32", (heads,)
    yield from native(config, f"{prefix}.wq_a", rank, dim)
    yield make_bf16_entry(f"{prefix}.q_norm.weight", rank)
    yield from native(config, f"{prefix}.wq_b", heads * head, rank)
    yield from native(config, f"{prefix}.wkv", head, dim)
    yield make_bf16_entry(f"{prefix}.kv_norm.weight", head)
    yield from native(config, f"{prefix}.wo_a", groups * group_rank, heads * head // groups)
    yield from native(config, f"{prefix}.wo_b", dim, groups * group_rank)


def compressor(config: Config, prefix: str, ratio: int, width: int) -> Iterator[TensorEntry]:
    """At a ratio of 4 the windows overlap, so that there are two of everything."""
    rows = 2 * width if ratio == 4 else width
    yield f"{prefix}.ape", "F32", (ratio, rows)
    yield make_bf16_entry(f"{prefix}.wkv.weight", rows, config["hidden_size"])
    yield make_bf16_entry(f"{prefix}.wgate.weight", rows, config["hidden_size"])
    yield make_bf16_entry(f"{prefix}.norm.weight", width)


def indexer_v4(config: Config, prefix: str, ratio: int) -> Iterator[TensorEntry]:
    heads, width = config["index_n_heads"], config["index_head_dim"]
    yield from native(config, f"{prefix}.wq_b", heads * width, config["q_lora_rank"])
    yield make_bf16_entry(f"{prefix}.weights_proj.weight", heads, config["hidden_size"])
    yield from compressor(config, f"{prefix}.compressor", ratio, width)


def shared_compression(text: Config, prefix: str, number: int, ratio: int) -> Iterator[TensorEntry]:
    """Few layers compress, and the others read what they made: so few have these tensors, whatever their ratio."""
    dim, head, heads, width = (text[key] for key in ("hidden_size", "head_dim", "index_n_heads", "index_head_dim"))
    if number in text["kv_source_layer_ids"]:
        yield make_bf16_entry(f"{prefix}.compressor.wkv.weight", head, dim)
        if ratio > 1:
            yield make_bf16_entry(f"{prefix}.compressor.wgate.weight", head, dim)
        yield make_bf16_entry(f"{prefix}.compressor.norm.weight", head)
        yield make_bf16_entry(f"{prefix}.indexer.wk.weight", width, head)
        yield make_bf16_entry(f"{prefix}.indexer.k_norm.weight", width)
    if number in text["index_source_layer_ids"]:
        yield from native(text, f"{prefix}.indexer.wq_b", heads * width, text["q_lora_rank"])
        yield make_bf16_entry(f"{prefix}.indexer.weights_proj.weight", heads, dim)


def experts(config: Config, prefix: str, count: int) -> Iterator[TensorEntry]:
    dim, width = config["hidden_size"], config["moe_intermediate_size"]
    yield make_bf16_entry(f"{prefix}.gate.weight", count, dim)
    for expert in range(count):
        yield from packed(f"{prefix}.experts.{expert}.w1", width, dim)
        yield from packed(f"{prefix}.experts.{expert}.w2", dim, width)
        yield from packed(f"{prefix}.experts.{expert}.w3", width, dim)
    yield from native(config, f"{prefix}.shared_experts.w1", width, dim)
    yield from native(config, f"{prefix}.shared_experts.w2", dim, width)
    yield from native(config, f"{prefix}.shared_experts.w3", width, dim)


def gate_biases(text: Config, prefix: str, count: int) -> Iterator[TensorEntry]:
    """One for words, and one for what is seen."""
    yield f"{prefix}.bias", "F32", (count,)
    if text.get("vision_n_layers"):
        yield f"{prefix}.bias_vl", "F32", (count,)


def engram(text: Config, prefix: str, number: int) -> Iterator[TensorEntry]:
    """A table with a row for each n-gram and a scale for each 32 of a row, and what reads it."""
    dim, width, streams = text["hidden_size"], text["engram_head_dim"], text["hc_mult"]
    rows = text["engram_num_embeddings"][number]
    looked_up = (text["engram_max_ngram_size"] - 1) * text["engram_n_heads"] * width
    yield f"{prefix}.embed.weight", "F8_E4M3", (rows, width)
    yield f"{prefix}.embed.scale", "F8_E8M0", (rows, width // 32)
    yield from native(text, f"{prefix}.wkv", dim * (streams + 1), looked_up)
    yield make_bf16_entry(f"{prefix}.q_weight", streams, dim)
    yield make_bf16_entry(f"{prefix}.k_weight", streams, dim)


def vision(config: Config, dim: int) -> Iterator[TensorEntry]:
    """An encoder of images, the two layers that lead from it to a model `dim` wide, and three special embeddings."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    yield from biased("vision.patch_embed.proj", width, 3 * config["patch_size"] ** 2)
    for number in range(config["num_hidden_layers"]):
        prefix = f"vision.blocks.{number}"
        yield make_bf16_entry(f"{prefix}.norm1.weight", width)
        yield from biased(f"{prefix}.attn.wqkv", 3 * width, width)
        yield from biased(f"{prefix}.attn.wo", width, width)
        yield make_bf16_entry(f"{prefix}.norm2.weight", width)
        yield make_bf16_entry(f"{prefix}.mlp.w1.weight", 2 * inner, width)
        yield make_bf16_entry(f"{prefix}.mlp.w2.weight", width, inner)
    yield make_bf16_entry("vision.norm.weight", width)
    yield from biased("aligner.w1", dim, width * config["downsample_ratio"] ** 2)
    yield from biased("aligner.w2", dim, dim)
    for name in ("image_start", "image_end", "image_newline"):
        yield make_bf16_entry(name, dim)


def vision_v4(config: Config) -> Iterator[TensorEntry]:
    """As in V4.1, and one special embedding more; the config has flat keys with shorter words."""
    if config.get("vision_n_layers"):
        words = {"n_layers": "num_hidden_layers", "dim": "hidden_size", "inter_dim": "intermediate_size"}
        keys = {word: config[f"vision_{word}"] for word in (*words, "patch_size", "downsample_ratio")}
        yield from vision({words.get(word, word): value for word, value in keys.items()}, config["hidden_size"])
        yield make_bf16_entry("image_pad", config["hidden_size"])


def biased(prefix: str, rows: int, columns: int) -> Iterator[TensorEntry]:
    yield make_bf16_entry(f"{prefix}.weight", rows, columns)
    yield make_bf16_entry(f"{prefix}.bias", rows)


def native(config: Config, prefix: str, rows: int, columns: int) -> Iterator[TensorEntry]:
    """An FP8 weight with a power of two for each block, the last blocks smaller."""
    block_rows, block_columns = config["quantization_config"]["weight_block_size"]
    yield f"{prefix}.weight", "F8_E4M3", (rows, columns)
    yield f"{prefix}.scale", "F8_E8M0", (-(-rows // block_rows), -(-columns // block_columns))


def packed(prefix: str, rows: int, columns: int) -> Iterator[TensorEntry]:
    """An FP4 weight, two values a byte, with a power of two for each 32 of a row."""
    yield f"{prefix}.weight", "I8", (rows, columns // 2)
    yield f"{prefix}.scale", "F8_E8M0", (rows, columns // 32)


# The configs: what the published ones say of shapes, by its published names

FP8_BLOCKS: Config = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
V32: Config = {
    **{key: value for key, value in DEEPSEEK_V3.items() if key != "auto_map"},
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "model_type": "deepseek_v32",
    "quantization_config": FP8_BLOCKS,
}
KIMI_K2: Config = {
    **DEEPSEEK_V3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**DEEPSEEK_V3["rope_scaling"], "beta_fast": 1, "factor": 32},
    "rope_theta": 50000,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
GLM_5_1: Config = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "first_k_dense_replace": 3,
    "head_dim": 64,
    "hidden_size": 6144,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 2048,
    "indexer_rope_interleave": True,
    "intermediate_size": 12288,
    "kv_lora_rank": 512,
    "max_position_embeddings": 202752,
    "model_type": "glm_moe_dsa",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 78,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 256,
    "vocab_size": 154880,
}
GLM_5_1_FP8: Config = {**GLM_5_1, "quantization_config": DEEPSEEK_V3["quantization_config"]}
GLM_5_2: Config = {
    **GLM_5_1,
    "head_dim": 192,
    "index_share_for_mtp_iteration": True,
    "index_skip_topk_offset": 3,
    "index_topk_freq": 4,
    "index_topk_pattern": None,
    "indexer_types": ["full" if layer in {0, 1, 2, *range(6, 78, 4)} else "shared" for layer in range(78)],
    "max_position_embeddings": 1048576,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
}
GLM_5_2_FP8: Config = {**GLM_5_2, "quantization_config": GLM_5_1_FP8["quantization_config"]}
V4_FLASH: Config = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8_BLOCKS,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
}
V4_FLASH_0731: Config = {
    **V4_FLASH,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_markov_rank": 256,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
}
V4_PRO: Config = {
    **V4_FLASH,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
    "hidden_size": 7168,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
}
V4_FLASH_VISION: Config = {
    **V4_FLASH_0731,
    "num_nextn_predict_layers": 3,
    "rms_norm_eps": 1e-20,
    "vision_dim": 1024,
    "vision_downsample_ratio": 3,
    "vision_inter_dim": 2816,
    "vision_max_n_token": 384,
    "vision_max_wh_ratio": 8,
    "vision_min_pixels": 147456,
    "vision_n_heads": 16,
    "vision_n_layers": 32,
    "vision_patch_size": 14,
    "vision_rope_theta": 10000,
}
V4_PRO_0813: Config = {
    **V4_PRO,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_markov_rank": 512,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [58, 59, 60],
}
"""Its list of tensors was not seen: V4-Pro's, with what V4-Flash-0731 has more than V4-Flash."""
V41_FLASH: Config = {
    "architectures": ["DeepseekV41ForCausalLM"],
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "image_token_id": 129264,
    "model_type": "deepseek_v41",
    "pad_token_id": 2,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "expert_dtype": "fp4",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [32, 32],
    },
    "text_config": {
        "candidate_block_size": 8,
        "candidate_source_layer_id": 20,
        "candidate_topk_blocks": 2048,
        "compress_ratios": [0, 0, *[2] * 18, *[1] * 20, 0, 0, 0],
        "compress_rope_theta": 160000,
        "dspark_block_size": 5,
        "dspark_markov_rank": 256,
        "dspark_n_routed_experts": 128,
        "dspark_noise_token_id": 128799,
        "dspark_num_experts_per_tok": 3,
        "dspark_target_layer_ids": [37, 38, 39],
        "engram_compressed_vocab_size": 99092,
        "engram_head_dim": 256,
        "engram_layer_ids": [1, 14],
        "engram_max_ngram_size": 4,
        "engram_n_heads": 8,
        "engram_num_embeddings": [384006168, 384016682],
        "engram_pad_token_id": 2,
        "engram_vocab_size": 16000000,
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_size": 5120,
        "index_head_dim": 128,
        "index_n_heads": 32,
        "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36],
        "index_topk": 512,
        "kv_source_layer_ids": [2, 8, 14, 20],
        "max_position_embeddings": 1048576,
        "model_type": "deepseek_v41_text",
        "moe_intermediate_size": 2304,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 40,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 3,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "q_lora_rank": 1280,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-20,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "rope_type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "vocab_size": 129280,
    },
    "vision_config": {
        "downsample_ratio": 3,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "max_image_tokens": 1024,
        "max_wh_ratio": None,
        "min_pixels": 295936,
        "model_type": "deepseek_v41_vision",
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "rope_theta": 10000,
    },
}

# Small ones. 10 sorts before 2 wherever there are 11 of something: layers where they are cheap, experts always. What
# ranks cut ends on a block for as many of them as the docstring says, as it does in the published ones; what they do
# not cut ends inside a block where the layout allows it.

SMALL_V3: Config = {
    "first_k_dense_replace": 9,
    "hidden_size": 40,
    "intermediate_size": 1024,
    "kv_lora_rank": 24,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 16,
    "num_attention_heads": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 11,
    "num_key_value_heads": 16,
    "q_lora_rank": 24,
    "vocab_size": 272,
}
"""For 1, 2, 4 and 8 ranks."""
SMALL_V3_FOR_32: Config = {
    "first_k_dense_replace": 1,
    "hidden_size": 36,
    "kv_lora_rank": 16,
    "n_routed_experts": 32,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 24,
    "vocab_size": 288,
}
"""What is cut is as long as in V3, so that 32 ranks get 4.5 blocks of a dense layer and half of a shared expert's."""
SMALL_INDEXER: Config = {"index_head_dim": 48, "index_n_heads": 6}
SMALL_GLM: Config = {
    **SMALL_V3,
    **SMALL_INDEXER,
    "intermediate_size": 904,
    "moe_intermediate_size": 200,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
"""Without blocks, for 1, 2, 4 and 8 ranks."""
SMALL_GLM_5_2: Config = {
    "indexer_types": [*["full"] * 3, *["shared"] * 3, "full", *["shared"] * 3, "full"],
    "mlp_layer_types": ["dense"] * 9 + ["sparse"] * 2,
}
SMALL_V4: Config = {
    "head_dim": 32,
    "hidden_size": 128,
    "index_n_heads": 8,
    "moe_intermediate_size": 256,
    "q_lora_rank": 40,
    "qk_rope_head_dim": 16,
    "o_lora_rank": 128,
    "vocab_size": 272,
}
SMALL_FLASH: Config = {
    **SMALL_V4,
    "compress_ratios": [0, 0, *[4, 128] * 4, 4, 0],
    "n_routed_experts": 12,
    "num_attention_heads": 32,
    "num_hidden_layers": 11,
    "o_groups": 4,
}
"""For 1, 2 and 4 ranks."""
SMALL_FLASH_0731: Config = {
    **SMALL_V4,
    "compress_ratios": [0, 0, 4, 128, 4, 0, 0, 0],
    "dspark_markov_rank": 24,
    "dspark_target_layer_ids": [2, 3, 4],
    "n_routed_experts": 16,
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "o_groups": 8,
}
"""For 1, 2, 4 and 8 ranks."""
SMALL_FLASH_VISION: Config = {
    **SMALL_FLASH_0731,
    "vision_dim": 64,
    "vision_inter_dim": 88,
    "vision_n_heads": 4,
    "vision_n_layers": 11,
}
"""For 1, 2, 4 and 8 ranks."""
SMALL_PRO: Config = {
    **SMALL_V4,
    "compress_ratios": [128, 128, 4, 128, 4, 0],
    "index_n_heads": 16,
    "n_routed_experts": 16,
    "num_attention_heads": 64,
    "num_hidden_layers": 5,
    "o_groups": 16,
}
"""For 1, 2, 4, 8 and 16 ranks."""
SMALL_PRO_0813: Config = {
    **SMALL_PRO,
    "compress_ratios": [128, 128, 4, 128, 4, 0, 0, 0],
    "dspark_markov_rank": 24,
    "dspark_target_layer_ids": [2, 3, 4],
}
"""For 1, 2, 4, 8 and 16 ranks."""
SMALL_TEXT: Config = {
    "candidate_source_layer_id": 8,
    "compress_ratios": [0, 0, *[2] * 6, *[1] * 4, 0, 0, 0],
    "dspark_markov_rank": 24,
    "dspark_n_routed_experts": 8,
    "dspark_target_layer_ids": [9, 10, 11],
    "engram_head_dim": 64,
    "engram_layer_ids": [1, 10],
    "engram_n_heads": 2,
    "engram_num_embeddings": [1003, 1010],
    "head_dim": 48,
    "hidden_size": 160,
    "index_head_dim": 32,
    "index_n_heads": 8,
    "index_source_layer_ids": [2, 4, 8, 10],
    "kv_source_layer_ids": [2, 4, 8],
    "moe_intermediate_size": 96,
    "n_routed_experts": 16,
    "num_attention_heads": 16,
    "num_hidden_layers": 12,
    "o_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "vocab_size": 272,
}
"""For 1, 2, 4 and 8 ranks; more than one do not divide the rows of the first table, and 4 not those of the second."""
SMALL_V41: Config = {
    **V41_FLASH,
    "text_config": {**V41_FLASH["text_config"], **SMALL_TEXT},
    "vision_config": {
        **V41_FLASH["vision_config"],
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_attention_heads": 4,
        "num_hidden_layers": 11,
    },
}
FEW_V41: Config = {
    **SMALL_V41,
    "text_config": {**SMALL_V41["text_config"], "n_routed_experts": 8, "dspark_n_routed_experts": 4},
}
"""For 1, 2 and 4 ranks: two thirds of the tensors, where the number of experts is not what is tested."""

DEEPSEEK_V32 = partial(deepseek_v32, norms="F32")
DEEPSEEK_V32_EXP = partial(deepseek_v32, norms="BF16")
FAMILIES: Mapping[str, Family] = {
    "deepseek-v3": Family(deepseek_v3, DEEPSEEK_V3, {**DEEPSEEK_V3, **SMALL_V3}, 163),
    "deepseek-v3-for-32": Family(deepseek_v3, DEEPSEEK_V3, {**DEEPSEEK_V3, **SMALL_V3_FOR_32}, 163),
    "deepseek-v3.2-exp": Family(DEEPSEEK_V32_EXP, V32, {**V32, **SMALL_V3, **SMALL_INDEXER}, 163),
    "deepseek-v3.2": Family(DEEPSEEK_V32, V32, {**V32, **SMALL_V3, **SMALL_INDEXER}, 163),
    "kimi-k2": Family(kimi_k2, KIMI_K2, {**KIMI_K2, **SMALL_V3}, 61),
    "glm-5.1": Family(glm_moe_dsa, GLM_5_1, {**GLM_5_1, **SMALL_GLM}, 282),
    "glm-5.1-fp8": Family(glm_moe_dsa, GLM_5_1_FP8, {**GLM_5_1_FP8, **SMALL_V3, **SMALL_INDEXER}, 142),
    "glm-5.2": Family(glm_moe_dsa, GLM_5_2, {**GLM_5_2, **SMALL_GLM, **SMALL_GLM_5_2}, 282),
    "glm-5.2-fp8": Family(glm_moe_dsa, GLM_5_2_FP8, {**GLM_5_2_FP8, **SMALL_V3, **SMALL_INDEXER, **SMALL_GLM_5_2}, 141),
    "deepseek-v4-flash": Family(deepseek_v4, V4_FLASH, {**V4_FLASH, **SMALL_FLASH}, 46),
    "deepseek-v4-flash-0731": Family(deepseek_v4, V4_FLASH_0731, {**V4_FLASH_0731, **SMALL_FLASH_0731}, 48),
    "deepseek-v4-flash-vision": Family(deepseek_v4, V4_FLASH_VISION, {**V4_FLASH_VISION, **SMALL_FLASH_VISION}, 48),
    "deepseek-v4-pro": Family(deepseek_v4, V4_PRO, {**V4_PRO, **SMALL_PRO}, 64),
    "deepseek-v4-pro-0813": Family(deepseek_v4, V4_PRO_0813, {**V4_PRO_0813, **SMALL_PRO_0813}, 66),
    "deepseek-v4.1-flash": Family(deepseek_v41, V41_FLASH, SMALL_V41, 48),
}
