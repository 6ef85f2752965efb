"""The parameters that DeepSeek's inference models of the V4 line allocate on one rank; see `skeletons`.

The April models are loaded without `strict`, so that what a file lacks stays unset and only `differences` sees it;
those with vision are loaded strictly.
"""

import torch
from skeletons import BF16, E8M0, F8, F32, I32, Args, Parameters, fp4_linear, linear, local_experts, plain


def v4_parameters(args: Args, ranks: int, rank: int) -> Parameters:
    """Return the parameters of V4-Flash and V4-Pro of April 2026, with `n_mtp_layers` drafter blocks."""
    result = _v4_backbone(args, ranks, rank)
    for stage in range(args["n_mtp_layers"]):
        name, dim = f"mtp.{stage}", args["dim"]
        result |= _v4_block(name, args["n_layers"] + stage, args, ranks, rank)
        result |= linear(f"{name}.e_proj", dim, dim, 128, E8M0) | linear(f"{name}.h_proj", dim, dim, 128, E8M0)
        for norm in ("enorm", "hnorm", "norm"):
            result |= plain(f"{name}.{norm}.weight", dim, dtype=F32)
        result |= _hyper_head(f"{name}.", args)
    return result


def v4_0731_parameters(args: Args, ranks: int, rank: int) -> Parameters:
    """Return the parameters of V4-Flash-0731: drafter blocks without projections of their own, and its heads."""
    result = _v4_backbone(args, ranks, rank)
    if not args["n_mtp_layers"]:
        return result
    for stage in range(args["n_mtp_layers"]):
        result |= _v4_block(f"mtp.{stage}", args["n_layers"] + stage, args, ranks, rank)
    last = f"mtp.{args['n_mtp_layers'] - 1}"
    result |= _drafter_ends(last, args, 128, F32) | _hyper_head(f"{last}.", args)
    vocabulary, width = args["vocab_size"] // ranks, args["dspark_markov_rank"]
    result |= plain(f"{last}.markov_head.markov_w1.weight", vocabulary, width)
    return result | plain(f"{last}.markov_head.markov_w2.weight", vocabulary, width, dtype=F32)


def v4_vision_parameters(args: Args, ranks: int, rank: int) -> Parameters:
    """Return the parameters of V4-Flash-Vision-Exp: 0731, a vision tower, and two biases in every gate."""
    result = v4_0731_parameters(args, ranks, rank) | _vision(args) | plain("image_pad", args["dim"])
    for name in [name for name in result if name.endswith(".ffn.gate.weight")]:
        for bias in ("bias", "bias_vl"):
            result |= plain(f"{name.removesuffix('weight')}{bias}", args["n_routed_experts"], dtype=F32)
    return result


def v41_parameters(args: Args, ranks: int, rank: int) -> Parameters:
    """Return the parameters of V4.1-Flash: engram tables, and the drafter blocks and the vision tower if any."""
    dim, vocabulary = args["dim"], args["vocab_size"] // ranks
    result = plain("embed.weight", vocabulary, dim) | plain("head.weight", vocabulary, dim, dtype=F32)
    result |= plain("norm.weight", dim)
    if args["vision_n_layers"] > 0:
        result |= _vision(args)
    for layer in range(args["n_layers"]):
        result |= _v41_block(f"layers.{layer}", layer, args, ranks, rank)
    if not args["n_mtp_layers"]:
        return result
    for stage in range(args["n_mtp_layers"]):
        result |= _v41_block(f"mtp.{stage}", args["n_layers"] + stage, args, ranks, rank)
    last = f"mtp.{args['n_mtp_layers'] - 1}"
    result |= _drafter_ends(last, args, 32, BF16)
    result |= plain(f"{last}.markov_head.embed.weight", vocabulary, args["dspark_markov_rank"])
    return result | plain(f"{last}.markov_head.head.weight", vocabulary, args["dspark_markov_rank"], dtype=F32)


# --- parts of all ---


def _hyper_head(prefix: str, args: Args) -> Parameters:
    copies = args["hc_mult"]
    result = plain(f"{prefix}hc_head_fn", copies, copies * args["dim"], dtype=F32)
    return result | plain(f"{prefix}hc_head_base", copies, dtype=F32) | plain(f"{prefix}hc_head_scale", 1, dtype=F32)


def _hyper_connections(name: str, args: Args) -> Parameters:
    copies = args["hc_mult"]
    mixes = (2 + copies) * copies
    result: Parameters = {}
    for part in ("attn", "ffn"):
        result |= plain(f"{name}.hc_{part}_fn", mixes, copies * args["dim"], dtype=F32)
        result |= plain(f"{name}.hc_{part}_base", mixes, dtype=F32) | plain(f"{name}.hc_{part}_scale", 3, dtype=F32)
    return result


def _attention(name: str, args: Args, ranks: int, block: int, norm: torch.dtype) -> Parameters:
    """Return the part of the attention that V4 and V4.1 share."""
    dim, heads, width = args["dim"], args["n_heads"], args["head_dim"]
    groups, low_rank = args["o_groups"], args["o_lora_rank"]
    result = plain(f"{name}.attn_sink", heads // ranks, dtype=F32)
    result |= linear(f"{name}.wq_a", args["q_lora_rank"], dim, block, E8M0)
    result |= plain(f"{name}.q_norm.weight", args["q_lora_rank"], dtype=norm)
    result |= linear(f"{name}.wq_b", heads * width // ranks, args["q_lora_rank"], block, E8M0)
    result |= linear(f"{name}.wkv", width, dim, block, E8M0) | plain(f"{name}.kv_norm.weight", width, dtype=norm)
    result |= plain(f"{name}.wo_a.weight", groups * low_rank // ranks, heads * width // groups)
    return result | linear(f"{name}.wo_b", dim, groups * low_rank // ranks, block, E8M0)


def _experts(name: str, args: Args, held: range, block: int) -> Parameters:
    """Return the rank's routed experts and the shared one, which is whole."""
    dim, width = args["dim"], args["moe_inter_dim"]
    shapes = {"w1": (width, dim), "w2": (dim, width), "w3": (width, dim)}
    result: Parameters = {}
    for part, (rows, columns) in shapes.items():
        for expert in held:
            one = f"{name}.experts.{expert}.{part}"
            is_fp4 = args["expert_dtype"] == "fp4"
            result |= fp4_linear(one, rows, columns) if is_fp4 else linear(one, rows, columns, block, E8M0)
        result |= linear(f"{name}.shared_experts.{part}", rows, columns, block, E8M0)
    return result


def _drafter_ends(last: str, args: Args, block: int, norm: torch.dtype) -> Parameters:
    """Return what the first and the last drafter block have beside their layers and the bigram head."""
    dim = args["dim"]
    inputs = dim * len(args["dspark_target_layer_ids"])
    result = linear("mtp.0.main_proj", dim, inputs, block, E8M0) | plain("mtp.0.main_norm.weight", dim, dtype=norm)
    result |= plain(f"{last}.norm.weight", dim, dtype=norm)
    width = dim + args["dspark_markov_rank"]
    return result | plain(f"{last}.confidence_head.proj.weight", 1, width, dtype=F32)


# --- V4 ---


def _v4_backbone(args: Args, ranks: int, rank: int) -> Parameters:
    dim, vocabulary = args["dim"], args["vocab_size"] // ranks
    result = plain("embed.weight", vocabulary, dim) | plain("head.weight", vocabulary, dim, dtype=F32)
    result |= plain("norm.weight", dim, dtype=F32) | _hyper_head("", args)
    for layer in range(args["n_layers"]):
        result |= _v4_block(f"layers.{layer}", layer, args, ranks, rank)
    return result


def _v4_block(name: str, layer: int, args: Args, ranks: int, rank: int) -> Parameters:
    dim, experts, ratio = args["dim"], args["n_routed_experts"], args["compress_ratios"][layer]
    result = _hyper_connections(name, args) | _attention(f"{name}.attn", args, ranks, 128, F32)
    result |= plain(f"{name}.attn_norm.weight", dim, dtype=F32) | plain(f"{name}.ffn_norm.weight", dim, dtype=F32)
    if ratio:
        result |= _v4_compressor(f"{name}.attn.compressor", args["head_dim"], ratio, args)
    if ratio == 4:
        indexer, rows = f"{name}.attn.indexer", args["index_n_heads"] // ranks
        result |= linear(f"{indexer}.wq_b", rows * args["index_head_dim"], args["q_lora_rank"], 128, E8M0)
        result |= plain(f"{indexer}.weights_proj.weight", rows, dim)
        result |= _v4_compressor(f"{indexer}.compressor", args["index_head_dim"], ratio, args)
    result |= plain(f"{name}.ffn.gate.weight", experts, dim)
    if layer < args["n_hash_layers"]:
        result |= plain(f"{name}.ffn.gate.tid2eid", args["vocab_size"], args["n_activated_experts"], dtype=I32)
    else:
        result |= plain(f"{name}.ffn.gate.bias", experts, dtype=F32)
    return result | _experts(f"{name}.ffn", args, local_experts(experts, ranks, rank), 128)


def _v4_compressor(name: str, width: int, ratio: int, args: Args) -> Parameters:
    both = width * 2 if ratio == 4 else width  # windows of ratio 4 overlap
    result = plain(f"{name}.ape", ratio, both, dtype=F32) | plain(f"{name}.norm.weight", width, dtype=F32)
    result |= plain(f"{name}.wkv.weight", both, args["dim"], dtype=F32)
    return result | plain(f"{name}.wgate.weight", both, args["dim"], dtype=F32)


# --- V4.1 ---


def _v41_block(name: str, layer: int, args: Args, ranks: int, rank: int) -> Parameters:
    dim, is_drafter = args["dim"], layer >= args["n_layers"]
    experts = (args["dspark_n_routed_experts"] if is_drafter else 0) or args["n_routed_experts"]
    result = _hyper_connections(name, args) | _attention(f"{name}.attn", args, ranks, 32, BF16)
    result |= plain(f"{name}.attn_norm.weight", dim) | plain(f"{name}.ffn_norm.weight", dim)
    if not is_drafter:
        result |= _v41_sources(f"{name}.attn", layer, args, ranks) | _engram(f"{name}.engram", layer, args, ranks)
    result |= plain(f"{name}.ffn.gate.weight", experts, dim) | plain(f"{name}.ffn.gate.bias", experts, dtype=F32)
    if args["vision_n_layers"] > 0:
        result |= plain(f"{name}.ffn.gate.bias_vl", experts, dtype=F32)
    return result | _experts(f"{name}.ffn", args, local_experts(experts, ranks, rank), 32)


def _v41_sources(name: str, layer: int, args: Args, ranks: int) -> Parameters:
    """Return the compressor and the indexer, which only the layers have from which the others take."""
    width, index_width, dim = args["head_dim"], args["index_head_dim"], args["dim"]
    result: Parameters = {}
    if layer in args["kv_source_layers"]:
        dtype = F32 if args["compress_ratios"][layer] > 1 else BF16
        result |= plain(f"{name}.compressor.norm.weight", width)
        result |= plain(f"{name}.compressor.wkv.weight", width, dim, dtype=dtype)
        if args["compress_ratios"][layer] > 1:
            result |= plain(f"{name}.compressor.wgate.weight", width, dim, dtype=dtype)
    if layer in args["index_source_layers"]:
        rows = args["index_n_heads"] // ranks
        result |= linear(f"{name}.indexer.wq_b", rows * index_width, args["q_lora_rank"], 32, E8M0)
        result |= plain(f"{name}.indexer.weights_proj.weight", rows, dim)
        if layer in args["kv_source_layers"]:
            result |= plain(f"{name}.indexer.wk.weight", index_width, width)
            result |= plain(f"{name}.indexer.k_norm.weight", index_width)
    return result


def _engram(name: str, layer: int, args: Args, ranks: int) -> Parameters:
    """Return a hash table's rows on one rank, equal on all, and the projection of what is found."""
    if layer not in args["engram_layer_ids"]:
        return {}
    rows = -(-args["engram_num_embeddings"][args["engram_layer_ids"].index(layer)] // ranks)
    width, copies, dim = args["engram_head_dim"], args["hc_mult"], args["dim"]
    found = (args["engram_max_ngram_size"] - 1) * args["engram_n_heads"] * width
    result = plain(f"{name}.embed.weight", rows, width, dtype=F8)
    result |= plain(f"{name}.embed.scale", rows, width // 32, dtype=E8M0)
    result |= linear(f"{name}.wkv", dim * (copies + 1), found, 32, E8M0)
    return result | plain(f"{name}.q_weight", copies, dim) | plain(f"{name}.k_weight", copies, dim)


def _vision(args: Args) -> Parameters:
    """Return the vision tower, the aligner and the marks of an image's ends and lines: whole on every rank."""
    dim, width, inner = args["dim"], args["vision_dim"], args["vision_inter_dim"]
    result = _with_bias("vision.patch_embed.proj", width, 3 * args["vision_patch_size"] ** 2)
    for number in range(args["vision_n_layers"]):
        name = f"vision.blocks.{number}"
        result |= plain(f"{name}.norm1.weight", width, dtype=F32) | plain(f"{name}.norm2.weight", width, dtype=F32)
        result |= _with_bias(f"{name}.attn.wqkv", 3 * width, width) | _with_bias(f"{name}.attn.wo", width, width)
        result |= plain(f"{name}.mlp.w1.weight", 2 * inner, width) | plain(f"{name}.mlp.w2.weight", width, inner)
    result |= plain("vision.norm.weight", width, dtype=F32)
    result |= _with_bias("aligner.w1", dim, width * args["vision_downsample_ratio"] ** 2)
    for name in ("image_start", "image_end", "image_newline"):
        result |= plain(name, dim)
    return result | _with_bias("aligner.w2", dim, dim)


def _with_bias(name: str, rows: int, columns: int) -> Parameters:
    return plain(f"{name}.weight", rows, columns) | plain(f"{name}.bias", rows)
