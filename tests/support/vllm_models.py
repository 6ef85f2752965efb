"""Small models for vLLM: the checkpoints that the lists, the converter and the runs of `tests/engines` are of.

Heads, widths and latents have sizes that vLLM's kernels on CPUs take. Those in FP8 have whole blocks of 128 at 4 ranks;
of what no rank cuts, the last block is not whole. The experts of gpt-oss have seven blocks of 32 inner channels: at 2
ranks four and three, at 4 ranks two each and one.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from made_once import make_once
from safetensors.torch import load_file, save_file
from small_models import write_model
from torch import Tensor

Config = Mapping[str, Any]

BLOCK = 128

SCALE = "weight_scale_inv"

LARGE_HEADS: Config = {
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

EXPERTS: Config = {"moe_intermediate_size": 64, "num_experts": 12, "num_experts_per_tok": 3}
"""Experts 2 to 9 come before 10 by number only."""

WIDE: Config = {"hidden_size": 256}
"""vLLM's Qwen2 takes the size of a head from the hidden size, not from `head_dim`."""

YARN: Config = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 2.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 64,
}
"""vLLM's gpt-oss knows no other rotary embedding."""

WHOLE_BLOCKS: Config = {"hidden_size": 192, "intermediate_size": 512, "head_dim": 128}

MODELS: Mapping[str, tuple[str, Config]] = {
    "llama": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama-tied", {}),
    "llama-biased": ("llama-biased", {}),
    "mistral": ("mistral", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {**WIDE, "num_key_value_heads": 1}),
    "qwen2-tied": ("qwen2", {**WIDE, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-fp8": ("qwen3", WHOLE_BLOCKS),
    "qwen3-moe": ("qwen3-moe", {**EXPERTS, "num_key_value_heads": 1}),
    "qwen3-moe-fp8": ("qwen3-moe", {**EXPERTS, **WHOLE_BLOCKS, "moe_intermediate_size": 512}),
    "mixtral": ("mixtral", {}),
    "gpt-oss": ("gpt-oss", {"num_key_value_heads": 4, "intermediate_size": 224, "rope_parameters": YARN}),
}
"""Models of `small_models` with other sizes: some with fewer key heads than ranks, some with tied embeddings."""

LATENT: Config = {
    "vocab_size": 100,
    "hidden_size": 192,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""The one size of the latent that vLLM takes on CPUs: 512 and 64 are four and a half blocks."""

V2: Config = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "softmax"}

V3: Config = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 2,
    "num_nextn_predict_layers": 1,
}

LATENT_BLOCKS: Config = {
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "moe_intermediate_size": 512,
}

DEEPSEEK: Mapping[str, Config] = {
    "deepseek-v2-lite": {**LATENT, **V2, "topk_method": "greedy", "q_lora_rank": None},
    "deepseek-v2": {**LATENT, **V2, "topk_method": "group_limited_greedy", "n_group": 2},
    "deepseek-v3": {**LATENT, **V3},
    "deepseek-v3-fp8": {**LATENT, **V3, **LATENT_BLOCKS},
}
"""Configs of DeepSeek's models, as those of its repositories are written."""

CASES = (*MODELS, *DEEPSEEK)

MXFP4 = "gpt-oss"
"""The case whose experts are packed, two values in a byte: 32 in a row share a scale."""

QUANTIZATION: Config = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
}

SCALE_DTYPES = {"qwen3-fp8": torch.bfloat16, "qwen3-moe-fp8": torch.float32, "deepseek-v3-fp8": torch.float32}
"""By case in FP8: the dtype of the scales. Published are both."""

KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj", "shared_head")
"""Parts of the names of weights that no FP8 checkpoint quantizes."""


@make_once
def write_case(folder: Path, /, name: str) -> None:
    """Writes the checkpoint of a case: BF16, FP8 with block scales, or MXFP4."""
    if name in MODELS:
        model, changes = MODELS[name]
        write_model(folder, model, **{**LARGE_HEADS, **changes})
    else:
        tensors = dict(make_deepseek(DEEPSEEK[name]))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(DEEPSEEK[name], indent=2))
        (folder / "tokenizer.json").write_text("{}")
    if name in SCALE_DTYPES:
        quantize_checkpoint(folder, SCALE_DTYPES[name])
    if name == MXFP4:
        pack_experts(folder)


def pack_experts(folder: Path) -> None:
    """Puts random MXFP4 experts in the place of those in BF16, as OpenAI's checkpoints have them; and random biases."""
    tensors = read_and_remove(folder)
    random = torch.Generator().manual_seed(11)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, before, after = tensors.pop(name).shape
        shape = experts, after, before // 32
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=random, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(117, 124, shape, generator=random, dtype=torch.uint8)
    for name in [name for name in tensors if "experts." in name and name.endswith("_bias")]:
        tensors[name] = (torch.randn(tensors[name].shape, generator=random) * 0.1).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    exempt = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quantization_config": {"modules_to_not_convert": exempt, "quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps({**config, **quantization}, indent=2))


def read_and_remove(folder: Path) -> dict[str, Tensor]:
    """Reads all tensors of a checkpoint and removes their files."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return tensors


def quantize_checkpoint(folder: Path, scale_dtype: torch.dtype) -> None:
    """Quantizes the weights of a checkpoint to FP8, in one file. Qwen's configs name the routers, DeepSeek's do not:
    vLLM's model knows.
    """
    tensors = read_and_remove(folder)
    made = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and name.endswith(".weight") and not any(part in name for part in KEPT):
            made[name], scale = quantize(tensor)
            made[name.removesuffix("weight") + SCALE] = scale.to(scale_dtype)
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    routers = [name.removesuffix(".weight") for name in sorted(tensors) if name.endswith(".mlp.gate.weight")]
    exempt = {"modules_to_not_convert": ["lm_head", *routers]} if config["model_type"] == "qwen3_moe" else {}
    quantization = {"quantization_config": {**QUANTIZATION, **exempt}}
    (folder / "config.json").write_text(json.dumps({**config, **quantization}, indent=2))


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 codes, and the scale of each block: its largest magnitude becomes 448."""
    rows, columns = (-(-length // BLOCK) for length in weight.shape)
    wide = torch.zeros(rows * BLOCK, columns * BLOCK)
    wide[: weight.size(0), : weight.size(1)] = weight.float()
    blocks = wide.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).view(rows * BLOCK, columns * BLOCK)
    return codes[: weight.size(0), : weight.size(1)].to(torch.float8_e4m3fn).contiguous(), scale


def make_deepseek(config: Config) -> Iterator[tuple[str, Tensor]]:
    """Random tensors by DeepSeek's names. A model that drafts has a layer more, with a table and a head of its own."""
    random = torch.Generator().manual_seed(7)
    hidden, vocabulary, layers = (config[key] for key in ("hidden_size", "vocab_size", "num_hidden_layers"))

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=random) * 0.1
        return (values + 1 if len(shape) == 1 else values).bfloat16()

    yield "model.embed_tokens.weight", draw(vocabulary, hidden)
    yield "model.norm.weight", draw(hidden)
    yield "lm_head.weight", draw(vocabulary, hidden)
    for layer in range(layers + config.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer}"
        for name, shape in list_shapes(config, is_dense=layer < config["first_k_dense_replace"]):
            yield f"{prefix}.{name}.weight", draw(*shape)
        if config["topk_method"] == "noaux_tc" and layer >= config["first_k_dense_replace"]:
            yield f"{prefix}.mlp.gate.e_score_correction_bias", draw(config["n_routed_experts"]).float()
        if layer >= layers:
            for name in ("embed_tokens", "shared_head.head"):
                yield f"{prefix}.{name}.weight", draw(vocabulary, hidden)
            for name in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{prefix}.{name}.weight", draw(hidden)
            yield f"{prefix}.eh_proj.weight", draw(hidden, 2 * hidden)


def list_shapes(config: Config, *, is_dense: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name within the layer and shape of each weight of a layer."""
    hidden, heads, query, latent = (
        config[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    plain, turned, value = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    yield "input_layernorm", (hidden,)
    yield "post_attention_layernorm", (hidden,)
    if query:
        yield "self_attn.q_a_proj", (query, hidden)
        yield "self_attn.q_a_layernorm", (query,)
        yield "self_attn.q_b_proj", (heads * (plain + turned), query)
    else:
        yield "self_attn.q_proj", (heads * (plain + turned), hidden)
    yield "self_attn.kv_a_proj_with_mqa", (latent + turned, hidden)
    yield "self_attn.kv_a_layernorm", (latent,)
    yield "self_attn.kv_b_proj", (heads * (plain + value), latent)
    yield "self_attn.o_proj", (hidden, heads * value)
    inner, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    widths = {"mlp": config["intermediate_size"]}
    if not is_dense:
        yield "mlp.gate", (experts, hidden)
        widths = {f"mlp.experts.{number}": inner for number in range(experts)}
        widths["mlp.shared_experts"] = inner * config["n_shared_experts"]
    for name, width in widths.items():
        yield f"{name}.gate_proj", (width, hidden)
        yield f"{name}.up_proj", (width, hidden)
        yield f"{name}.down_proj", (hidden, width)
