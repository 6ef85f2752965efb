"""The rank tensors that vLLM's `sharded_state` needs, from a Hugging Face checkpoint, by plain torch.

Written from the weight loaders of vLLM 0.32 (`model_executor/layers/linear.py`, `vocab_parallel_embedding.py`,
`fused_moe`, `models/deepseek_v2.py`, `models/gpt_oss.py`), which cut, join and stack a checkpoint as a model is loaded.
It knows no recipe and no plan.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm_models import SCALE

Tensors = Mapping[str, Tensor]

LIST = Path(__file__).parents[1] / "engines" / "vllm_tensors.json"
"""What vLLM's models have, by `list_vllm_tensors.py`."""

KINDS = ("weight", "bias", SCALE)
"""The tensors of a linear layer: the scales are cut as the weights are, by blocks."""

PACKED = "mlp.experts"
"""Where gpt-oss has its experts."""

VOCABULARY_ROWS = 64
"""vLLM widens the vocabulary to a multiple of this (`DEFAULT_VOCAB_PADDING_SIZE`)."""


def write_rank_files(source: Path, target: Path, ranks: int) -> None:
    """Writes every rank's file, and what a checkpoint has beside its weights."""
    target.mkdir()
    for rank in range(ranks):
        save_file(make_rank_tensors(source, rank, ranks), target / f"model-rank-{rank}-part-0.safetensors")
    for path in source.glob("*.json"):
        if not path.name.endswith(".index.json"):
            (target / path.name).write_bytes(path.read_bytes())


def make_rank_tensors(source: Path, rank: int, ranks: int) -> dict[str, Tensor]:
    """All tensors of one rank, by vLLM's names."""
    config = json.loads((source / "config.json").read_text())
    whole: dict[str, Tensor] = {}
    for path in source.glob("*.safetensors"):
        whole.update(load_file(path))
    found = dict(make_embeddings(whole, config, rank, ranks))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        own = {key.removeprefix(prefix): tensor for key, tensor in whole.items() if key.startswith(prefix)}
        made = {**make_attention(own, config, rank, ranks), **make_feed_forward(own, rank, ranks)}
        if f"{PACKED}.gate_up_proj_blocks" in own:
            made |= make_packed_experts(own, config["intermediate_size"], rank, ranks)
        norms = {key: tensor for key, tensor in own.items() if key.endswith("norm.weight")}
        made |= {key.replace("attn.q_a_", "attn.mla_attn.q_a_"): tensor for key, tensor in norms.items()}
        found |= {prefix + key: tensor for key, tensor in made.items()}
    if config["model_type"] == "gpt_oss":
        found = {key.replace(".self_attn.", ".attn."): tensor for key, tensor in found.items()}
        found["model.embedding.weight"] = found.pop("model.embed_tokens.weight")
    return {key: tensor.contiguous() for key, tensor in found.items()}


def make_embeddings(whole: Tensors, config: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Tensor]:
    """The two tables, or of a tied model the one under the name that vLLM keeps; and the last norm."""
    table = widen(whole["model.embed_tokens.weight"]).chunk(ranks)[rank]
    found = {"model.norm.weight": whole["model.norm.weight"]}
    if config["tie_word_embeddings"]:
        return {**found, "lm_head.weight": table}
    head = widen(whole["lm_head.weight"]).chunk(ranks)[rank]
    return {**found, "model.embed_tokens.weight": table, "lm_head.weight": head}


def widen(table: Tensor) -> Tensor:
    """Zeros behind the last row, up to a multiple of 64 rows."""
    rows = -(-len(table) // VOCABULARY_ROWS) * VOCABULARY_ROWS
    return torch.cat([table, table.new_zeros(rows - len(table), table.size(1))])


def make_attention(own: Tensors, config: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Tensor]:
    """One `qkv_proj`: the rank's query heads, key heads and value heads."""
    if "kv_lora_rank" in config:
        return make_latent_attention(own, rank, ranks)
    heads = config["num_key_value_heads"]
    found = {}
    for kind in KINDS:
        if f"self_attn.q_proj.{kind}" in own:
            query, key, value = (own[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
            parts = [query.chunk(ranks)[rank], *(take_heads(tensor, heads, rank, ranks) for tensor in (key, value))]
            found[f"self_attn.qkv_proj.{kind}"] = join(parts)
        if f"self_attn.o_proj.{kind}" in own:
            output = own[f"self_attn.o_proj.{kind}"]
            found[f"self_attn.o_proj.{kind}"] = output if kind == "bias" else output.chunk(ranks, 1)[rank]
    if "self_attn.sinks" in own:
        width = config["num_attention_heads"] // ranks
        found["self_attn.sinks"] = own["self_attn.sinks"].narrow(0, rank * width, width)
    for name in ("k", "v", "q", "prob"):
        found[f"self_attn.attn._{name}_scale"] = torch.tensor(1.0)
        if f"self_attn.o_proj.{SCALE}" in own:  # `Fp8KVCacheMethod`: not in the checkpoint
            found[f"self_attn.attn.{name}_scale"] = torch.tensor(-1.0, dtype=torch.bfloat16)
    return found


def take_heads(tensor: Tensor, heads: int, rank: int, ranks: int) -> Tensor:
    """A rank's heads; one that several ranks have, where there are fewer heads than ranks."""
    return tensor.chunk(heads)[rank * heads // ranks] if heads < ranks else tensor.chunk(ranks)[rank]


def make_latent_attention(own: Tensors, rank: int, ranks: int) -> dict[str, Tensor]:
    """DeepSeek's: what makes the latents is whole in every rank, the two of the query's model in one."""
    found = {}
    for kind in (kind for kind in KINDS if f"self_attn.o_proj.{kind}" in own):
        latent = own[f"self_attn.kv_a_proj_with_mqa.{kind}"]
        if f"self_attn.q_a_proj.{kind}" in own:
            query, name = own[f"self_attn.q_b_proj.{kind}"], "q_b_proj"
            found[f"self_attn.fused_qkv_a_proj.{kind}"] = join([own[f"self_attn.q_a_proj.{kind}"], latent])
        else:
            query, name = own[f"self_attn.q_proj.{kind}"], "q_proj"
            found[f"self_attn.kv_a_proj_with_mqa.{kind}"] = latent
        found[f"self_attn.mla_attn.{name}.{kind}"] = query.chunk(ranks)[rank]
        found[f"self_attn.kv_b_proj.{kind}"] = own[f"self_attn.kv_b_proj.{kind}"].chunk(ranks)[rank]
        found[f"self_attn.mla_attn.o_proj.{kind}"] = own[f"self_attn.o_proj.{kind}"].chunk(ranks, 1)[rank]
    for name in ("k", "v", "q", "prob"):
        found[f"self_attn.mla_attn.mla_attn._{name}_scale"] = torch.tensor(1.0)
    return found


def make_feed_forward(own: Tensors, rank: int, ranks: int) -> dict[str, Tensor]:
    """Of a dense layer gate and up in one tensor; of a layer of experts all experts, each of them cut.

    The runner of Qwen3's and DeepSeek's experts has the router too, and the shared experts, and vLLM keeps the smaller
    of two names; Mixtral's has it not.
    """
    if "mlp.gate.weight" in own:
        made = make_experts("mlp.experts", ("gate_proj", "up_proj", "down_proj"), own, rank, ranks)
        shared = make_units("mlp.shared_experts", "mlp.experts._shared_experts._layer", own, rank, ranks)
        router = {name: tensor for name, tensor in own.items() if name.startswith("mlp.gate.")}
        return {**made, **shared, **{name.replace("mlp.", "mlp.experts."): tensor for name, tensor in router.items()}}
    if "block_sparse_moe.gate.weight" in own:
        made = make_experts("block_sparse_moe.experts", ("w1", "w3", "w2"), own, rank, ranks)
        return {**made, "block_sparse_moe.gate.weight": own["block_sparse_moe.gate.weight"]}
    return make_units("mlp", "mlp", own, rank, ranks)


def make_packed_experts(own: Tensors, inner: int, rank: int, ranks: int) -> dict[str, Tensor]:
    """gpt-oss' experts in MXFP4, as `_load_weights_mxfp4` slices them, and its router. The last rank may have fewer."""
    most = -(-(inner // 32) // ranks) * 32
    start, end = rank * most, min((rank + 1) * most, inner)
    up, down = (own[f"{PACKED}.{name}_proj_blocks"] for name in ("gate_up", "down"))
    bias = own[f"{PACKED}.down_proj_bias"]
    made = {
        "w13_weight": up.view(len(up), 2 * inner, -1)[:, 2 * start : 2 * end],
        "w13_weight_scale": own[f"{PACKED}.gate_up_proj_scales"][:, 2 * start : 2 * end],
        "w13_bias": own[f"{PACKED}.gate_up_proj_bias"][:, 2 * start : 2 * end],
        "w2_weight": down.view(len(down), -1, inner // 2)[..., start // 2 : end // 2],
        "w2_weight_scale": own[f"{PACKED}.down_proj_scales"][..., start // 32 : end // 32],
        "w2_bias": bias.zero_() if rank else bias,
    }
    router = {name: tensor for name, tensor in own.items() if name.startswith("mlp.router.")}
    return {**{f"{PACKED}.routed_experts.{name}": tensor for name, tensor in made.items()}, **router}


def make_units(old: str, new: str, own: Tensors, rank: int, ranks: int) -> dict[str, Tensor]:
    """The rank's units of an MLP, if there is one of the name: gate above up."""
    found = {}
    for kind in KINDS:
        if f"{old}.gate_proj.{kind}" in own:
            parts = [own[f"{old}.{name}_proj.{kind}"].chunk(ranks)[rank] for name in ("gate", "up")]
            down = own[f"{old}.down_proj.{kind}"]
            found[f"{new}.gate_up_proj.{kind}"] = join(parts)
            found[f"{new}.down_proj.{kind}"] = down if kind == "bias" else down.chunk(ranks, 1)[rank]
    return found


def make_experts(prefix: str, names: tuple[str, str, str], own: Tensors, rank: int, ranks: int) -> dict[str, Tensor]:
    """Of every expert the rank's part of gate above that of up, and of down, stacked."""
    count = sum(key.startswith(prefix) and key.endswith(f".{names[0]}.weight") for key in own)
    found = {}
    for kind in (kind for kind in KINDS if f"{prefix}.0.{names[0]}.{kind}" in own):
        gates, ups, downs = ([own[f"{prefix}.{number}.{name}.{kind}"] for number in range(count)] for name in names)
        pairs = [join([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]]) for gate, up in zip(gates, ups, strict=True)]
        found[f"{prefix}.routed_experts.w13_{kind}"] = join([pair[None] for pair in pairs])
        found[f"{prefix}.routed_experts.w2_{kind}"] = join([down.chunk(ranks, 1)[rank][None] for down in downs])
    return found


def join(parts: list[Tensor]) -> Tensor:
    """One tensor behind the other; FP8 as bytes."""
    if parts[0].element_size() == 1:
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return torch.cat(parts)
