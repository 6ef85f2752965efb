"""Small random models with experts, as transformers itself writes them: under the names of the hub, and stacked as in
memory. Imports nothing of reshard.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from made_once import make_once
from safetensors.torch import load_file
from small_models import LINEAR, VISION, choose_kind, from_config, make_config
from torch import Tensor

WIDTHS: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}

HEADS: Mapping[str, Any] = {"num_key_value_heads": 4, "head_dim": 6}

LATENT: Mapping[str, Any] = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 8,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
}

HYBRID: Mapping[str, Any] = {
    **LINEAR,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
}

STACKED_MODELS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "mixtral": ("MixtralConfig", "num_local_experts", HEADS),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "num_experts",
        {**HEADS, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    ),
    "glm4-moe": (
        "Glm4MoeConfig",
        "n_routed_experts",
        {
            **HEADS,
            "moe_intermediate_size": 24,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 12,
        },
    ),
    "deepseek-v2": ("DeepseekV2Config", "n_routed_experts", {**LATENT, "q_lora_rank": None}),
    "deepseek-v3": ("DeepseekV3Config", "n_routed_experts", {**LATENT, "q_lora_rank": 24}),
    "qwen3-next": ("Qwen3NextConfig", "num_experts", HYBRID),
    "qwen35-moe": ("Qwen3_5MoeConfig", "num_experts", {**HYBRID, "vision_config": {**VISION, "depth": 1}}),
    "minimax-m2": ("MiniMaxM2Config", "num_local_experts", HEADS),
}
"""By recipe: the class of the config, its key with the number of experts, and other keys."""


@make_once
def write_stacked_model(folder: Path, /, name: str, experts: int = 10, dtype: str = "bfloat16") -> None:
    """Writes a model four times: `hub` and `stacked` in one file each, `hub-parts` and `stacked-parts` in several."""
    word, key, own = STACKED_MODELS[name]
    config = make_config(word, {**WIDTHS, **own, key: experts})
    torch.manual_seed(7)
    model = from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in [*model.parameters(), *(buffer for at, buffer in model.named_buffers() if "score" in at)]:
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter) * 0.5)
    model.to(getattr(torch, dtype))
    for words, options in {"": {}, "-parts": {"max_shard_size": "60KB"}}.items():
        model.save_pretrained(folder / f"hub{words}", **options)
        model.save_pretrained(folder / f"stacked{words}", save_original_format=False, **options)
    (folder / "hub" / "tokenizer.json").write_text("{}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_tensors(a: Path, b: Path) -> None:
    """Both folders have the same tensors, bit for bit."""
    one, other = read_tensors(a), read_tensors(b)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def compute_logits(folder: Path) -> Tensor:
    """The logits of a prompt; every tensor of the model must be in the folder, and no other."""
    kind = choose_kind(transformers.AutoConfig.from_pretrained(folder))
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    with torch.no_grad():
        logits: Tensor = model(torch.arange(1, 12)[None]).logits
    return logits
