"""Small random models of the families with tensor parallelism, written by transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from made_once import make_once

HEAVY: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
"""Two key heads for four ranks: each is held by two."""

EXPERTS: Mapping[str, Any] = {"moe_intermediate_size": 20, "num_experts_per_tok": 3}

LINEAR: Mapping[str, Any] = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
"""Every fourth layer has full attention."""

MANY: Mapping[str, Any] = {**EXPERTS, "shared_expert_intermediate_size": 24, "num_experts": 12}

VISION: Mapping[str, Any] = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 48,
    "patch_size": 4,
}

MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3-moe": ("Qwen3MoeConfig", {**EXPERTS, "num_experts": 12, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 12, "num_experts_per_tok": 3}),
    "glm4-moe": ("Glm4MoeConfig", {**EXPERTS, "n_routed_experts": 12, "n_shared_experts": 2, "use_qk_norm": True,
                                   "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 12}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 12, "num_experts_per_tok": 3,
                                 "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    "qwen3-next": ("Qwen3NextConfig", {**LINEAR, **MANY}),
    "qwen35": ("Qwen3_5Config", {**LINEAR, "vision_config": VISION}),
    "qwen35-tied": ("Qwen3_5Config", {**LINEAR, "vision_config": VISION, "tie_word_embeddings": True}),
    "qwen35-moe": ("Qwen3_5MoeConfig", {**LINEAR, **MANY, "vision_config": VISION}),
    "minimax-m2": ("MiniMaxM2Config", {"num_key_value_heads": 4, "num_local_experts": 12, "num_experts_per_tok": 3}),
}  # fmt: skip


def choose_kind(config: Any) -> Any:
    """The class of transformers that makes a model of a config: for text, or for images and text."""
    has_vision = hasattr(config, "vision_config")
    return transformers.AutoModelForImageTextToText if has_vision else transformers.AutoModelForCausalLM


def from_config(config: Any, **options: Any) -> Any:
    """A random model."""
    return choose_kind(config).from_config(config, **options)


def make_config(word: str, values: Mapping[str, Any]) -> Any:
    """A config of transformers; one with a vision tower has the values of the text in an object of their own."""
    if "vision_config" not in values:
        return getattr(transformers, word)(**values)
    text = {key: value for key, value in values.items() if key != "vision_config"}
    tied = values.get("tie_word_embeddings", False)
    return getattr(transformers, word)(
        text_config=text, vision_config=dict(values["vision_config"]), tie_word_embeddings=tied
    )


@make_once
def write_model(folder: Path, /, name: str, *, dtype: str = "float32", **changes: Any) -> None:
    """A random model, as transformers writes it, in several files; biases and norms are random too."""
    word, own = MODELS[name]
    config = make_config(word, {**HEAVY, **own, **changes})
    torch.manual_seed(5)
    model = from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in [*model.parameters(), *(buffer for key, buffer in model.named_buffers() if "score" in key)]:
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) * 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text("{}")
