"""The rank tensors that vLLM's `sharded_state` needs, from a Hugging Face checkpoint, by plain torch.

Written from the weight loaders of vLLM 0.32 (`model_executor/layers/linear.py`, `vocab_parallel_embedding.py`,
`fused_moe`), which cut, join and stack a checkpoint as a model is loaded. It knows no recipe and no plan.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_models import write_model
from torch import Tensor

Tensors = Mapping[str, Tensor]

LIST = Path(__file__).parents[1] / "engines" / "vllm_tensors.json"
"""What vLLM's models have, by `list_vllm_tensors.py`."""

VOCABULARY_ROWS = 64
"""vLLM widens the vocabulary to a multiple of this (`DEFAULT_VOCAB_PADDING_SIZE`)."""

LARGE_HEADS: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "vocab_size": 100,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
"""Heads of 64, the smallest that vLLM's attention on CPUs takes; 100 tokens, which vLLM widens to 128."""

EXPERTS: Mapping[str, Any] = {"moe_intermediate_size": 64, "num_experts": 12, "num_experts_per_tok": 3}
"""Experts 2 to 9 come before 10 by number only."""

WIDE: Mapping[str, Any] = {"hidden_size": 256}
"""vLLM's Qwen2 takes the size of a head from the hidden size, not from `head_dim`."""

CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama-tied", {}),
    "llama-biased": ("llama-biased", {}),
    "mistral": ("mistral", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {**WIDE, "num_key_value_heads": 1}),
    "qwen2-tied": ("qwen2", {**WIDE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-moe": ("qwen3-moe", {**EXPERTS, "num_key_value_heads": 1}),
    "mixtral": ("mixtral", {}),
}
"""Models of `small_models` with other sizes: some with fewer key heads than ranks, some with tied embeddings."""


def write_case(folder: Path, name: str) -> None:
    """Writes the checkpoint of a case, BF16."""
    model, changes = CASES[name]
    write_model(folder, model, **{**LARGE_HEADS, **changes})


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
        made |= {key: tensor for key, tensor in own.items() if key.endswith("norm.weight")}
        found |= {prefix + key: tensor for key, tensor in made.items()}
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
    heads = config["num_key_value_heads"]
    found = {"self_attn.o_proj.weight": own["self_attn.o_proj.weight"].chunk(ranks, 1)[rank]}
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in own:
            query, key, value = (own[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
            parts = [query.chunk(ranks)[rank], *(take_heads(tensor, heads, rank, ranks) for tensor in (key, value))]
            found[f"self_attn.qkv_proj.{kind}"] = torch.cat(parts)
    if "self_attn.o_proj.bias" in own:
        found["self_attn.o_proj.bias"] = own["self_attn.o_proj.bias"]
    for name in ("k", "v", "q", "prob"):
        found[f"self_attn.attn._{name}_scale"] = torch.tensor(1.0)
    return found


def take_heads(tensor: Tensor, heads: int, rank: int, ranks: int) -> Tensor:
    """A rank's heads; one that several ranks have, where there are fewer heads than ranks."""
    return tensor.chunk(heads)[rank * heads // ranks] if heads < ranks else tensor.chunk(ranks)[rank]


def make_feed_forward(own: Tensors, rank: int, ranks: int) -> dict[str, Tensor]:
    """Of a dense layer gate and up in one tensor; of a layer of experts all experts, each of them cut.

    The runner of Qwen3's experts has the router too, and vLLM keeps the smaller of two names; Mixtral's has it not.
    """
    if "mlp.gate.weight" in own:
        experts = take_experts(own, "mlp.experts", ("gate_proj", "up_proj", "down_proj"), rank, ranks)
        return {**name_experts("mlp.experts", experts), "mlp.experts.gate.weight": own["mlp.gate.weight"]}
    if "block_sparse_moe.gate.weight" in own:
        experts = take_experts(own, "block_sparse_moe.experts", ("w1", "w3", "w2"), rank, ranks)
        made = name_experts("block_sparse_moe.experts", experts)
        return {**made, "block_sparse_moe.gate.weight": own["block_sparse_moe.gate.weight"]}
    found = {"mlp.down_proj.weight": own["mlp.down_proj.weight"].chunk(ranks, 1)[rank]}
    for kind in ("weight", "bias"):
        if f"mlp.gate_proj.{kind}" in own:
            parts = [own[f"mlp.{name}_proj.{kind}"].chunk(ranks)[rank] for name in ("gate", "up")]
            found[f"mlp.gate_up_proj.{kind}"] = torch.cat(parts)
    if "mlp.down_proj.bias" in own:
        found["mlp.down_proj.bias"] = own["mlp.down_proj.bias"]
    return found


def take_experts(own: Tensors, prefix: str, names: tuple[str, str, str], rank: int, ranks: int) -> list[list[Tensor]]:
    """Of every expert the rank's part of gate, up and down."""
    count = sum(key.startswith(prefix) and key.endswith(f".{names[0]}.weight") for key in own)
    return [
        [
            own[f"{prefix}.{number}.{name}.weight"].chunk(ranks, at)[rank]
            for name, at in zip(names, (0, 0, 1), strict=True)
        ]
        for number in range(count)
    ]


def name_experts(prefix: str, experts: list[list[Tensor]]) -> dict[str, Tensor]:
    """Every expert's gate above its up, and every expert's down, stacked."""
    return {
        f"{prefix}.routed_experts.w13_weight": torch.stack([torch.cat([gate, up]) for gate, up, _ in experts]),
        f"{prefix}.routed_experts.w2_weight": torch.stack([down for _, _, down in experts]),
    }
