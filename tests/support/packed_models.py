"""Kimi checkpoints whose experts lie packed: Kimi-K2-Thinking and K2.5 in INT4, K3 in MXFP4.

Written from published lists of names, shapes and dtypes (the headers of K2.5, K2.7-Code and K3) and from the rules of
compressed-tensors, `pack-quantized` and `mxfp4-pack-quantized`. It knows no recipe and no plan. Small checkpoints have
random codes and scales, and beside them the BF16 weights that plain arithmetic in torch makes of these; full ones are
headers and holes.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from families import KIMI_K2, SMALL_V3
from safetensors.torch import save_file
from torch import Tensor

from reshard.synthetic import TensorEntry, list_tensors, make_bf16_entry, write_tensors

Config = Mapping[str, Any]

GROUP = 32
"""Columns that share a scale, in both formats."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the sixteen codes of FP4."""

PARTS = ("weight_packed", "weight_scale", "weight_shape")
"""What a packed weight consists of; MXFP4 has no shape."""

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class PackedModel:
    """A small checkpoint: its tensors as they lie, and the same as BF16 under the plain names."""

    config: Config
    stored: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]


@dataclass(frozen=True)
class PackedFamily:
    """`entries` lists the plain tensors of a config; those that `is_packed` names lie in `packing`."""

    entries: Callable[[Config], list[TensorEntry]]
    packing: str
    full: Config
    small: Config
    files: int

    def list_stored(self, config: Config) -> list[TensorEntry]:
        """The tensors as they lie, each packed weight in its parts."""
        return list(chain.from_iterable(pack_entry(entry, self.packing) for entry in self.entries(config)))


def make_packed_model(name: str, *, seed: int = 0, vision: bool = True) -> PackedModel:
    """Makes the small checkpoint of a family; without `vision`, as one that keeps the text model only."""
    family, random = PACKED_FAMILIES[name], torch.Generator().manual_seed(seed)
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    config = family.small if vision else {key: value for key, value in family.small.items() if key != "vision_config"}
    for entry in family.entries(config):
        weight = entry[0]
        if is_packed(entry):
            parts, plain[weight] = make_packed_weight(entry[2], family.packing, random)
            stored.update({f"{weight.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()})
        else:
            stored[weight] = plain[weight] = make_plain_tensor(entry, random)
    return PackedModel(config, stored, plain)


def write_packed_model(folder: Path, model: PackedModel, *, files: int = 3, index: bool = True) -> None:
    """Writes a checkpoint in `files` files. With more than one, scales and shapes lie in other files than the codes."""
    contents: list[dict[str, Tensor]] = [{} for _ in range(files)]
    for number, (name, tensor) in enumerate(model.stored.items()):
        part = PARTS.index(name.rsplit(".", 1)[1]) if name.endswith(PARTS) else number * files // len(model.stored)
        contents[part % files][name] = tensor.contiguous()
    write_files(folder, contents, model.config, index=index)


def write_plain_model(folder: Path, model: PackedModel, *, files: int = 3, index: bool = True) -> None:
    """Writes the same checkpoint with every weight in BF16, and a config that says nothing of quantization."""
    contents: list[dict[str, Tensor]] = [{} for _ in range(files)]
    for number, (name, tensor) in enumerate(model.plain.items()):
        contents[number * files // len(model.plain)][name] = tensor.contiguous()
    write_files(folder, contents, drop_quantization(model.config), index=index)


def write_files(folder: Path, contents: list[dict[str, Tensor]], config: Config, *, index: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    count = len(contents)
    names = [f"model-{number:05}-of-{count:06}.safetensors" for number in range(1, count + 1)]
    for name, content in zip(names if count > 1 else ["model.safetensors"], contents, strict=True):
        save_file(content, folder / name, metadata={"format": "pt"})
    if index and count > 1:
        places = {tensor: name for name, content in zip(names, contents, strict=True) for tensor in content}
        sizes = sum(tensor.numel() * tensor.element_size() for content in contents for tensor in content.values())
        text = json.dumps({"metadata": {"total_size": sizes}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_full_packed(folder: Path, name: str, *, plain: bool = False) -> None:
    """Writes the full checkpoint as holes: true headers and sizes. With `plain`, as it is when all weights are BF16."""
    family = PACKED_FAMILIES[name]
    entries = family.entries(family.full) if plain else family.list_stored(family.full)
    config = drop_quantization(family.full) if plain else family.full
    write_tensors(folder, entries, config, family.files, sparse=True)
    if not plain and family.packing == "integers":
        write_shapes(folder, {name: shape for name, _, shape in family.entries(family.full)})


def write_shapes(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Writes what is in `weight_shape` into files of holes: a reader looks at it. 4 KiB of disk for each."""
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            for name, entry in json.loads(file.read(length)).items():
                if name.endswith(".weight_shape"):
                    file.seek(8 + length + entry["data_offsets"][0])
                    file.write(struct.pack("<2i", *shapes[name.removesuffix("_shape")]))


def drop_quantization(config: Config) -> Config:
    """A config that says nothing of quantization, in its text config neither."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return {key: drop_quantization(value) if key == "text_config" else value for key, value in kept.items()}


# How a weight lies packed, and what it is


def is_packed(entry: TensorEntry) -> bool:
    """Routed experts lie packed, and nothing else."""
    return ".experts." in entry[0]


def pack_entry(entry: TensorEntry, packing: str) -> list[TensorEntry]:
    if not is_packed(entry):
        return [entry]
    prefix, (rows, columns) = entry[0].removesuffix("weight"), entry[2]
    if packing == "mxfp4":
        codes = f"{prefix}weight_packed", "U8", (rows, columns // 2)
        return [codes, (f"{prefix}weight_scale", "U8", (rows, columns // GROUP))]
    return [
        (f"{prefix}weight_packed", "I32", (rows, columns // 8)),
        (f"{prefix}weight_scale", "BF16", (rows, columns // GROUP)),
        (f"{prefix}weight_shape", "I32", (2,)),
    ]


def make_packed_weight(
    shape: tuple[int, ...], packing: str, random: torch.Generator
) -> tuple[dict[str, Tensor], Tensor]:
    """Random codes and scales of a weight [rows, columns]: its parts by name, and the weight in BF16."""
    rows, columns = shape
    codes = torch.randint(0, 16, shape, generator=random)
    if packing == "mxfp4":
        scales = torch.randint(100, 150, (rows, columns // GROUP), generator=random).to(torch.uint8)
        scales[0, 0] = 0  # the smallest, whose products are subnormal
        values = torch.tensor(E2M1)[codes] * torch.exp2(spread(scales.float()) - 127)
        pairs = codes.to(torch.uint8).view(rows, columns // 2, 2)
        packed = pairs[..., 0] | pairs[..., 1] << 4
        return {"weight_packed": packed, "weight_scale": scales}, values.to(torch.bfloat16)
    exponents = torch.randint(-14, 2, (rows, columns // GROUP), generator=random)
    factors = (torch.rand(rows, columns // GROUP, generator=random) + 1) * torch.exp2(exponents.float())
    scale = factors.to(torch.bfloat16)
    words = (codes.view(rows, columns // 8, 8) << torch.arange(0, 32, 4)).sum(-1)
    parts = {
        "weight_packed": torch.where(words < 2**31, words, words - 2**32).to(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor(shape, dtype=torch.int32),
    }
    return parts, (codes - 8).to(torch.bfloat16) * spread(scale)


def spread(scales: Tensor) -> Tensor:
    """The scale of each column."""
    return scales.repeat_interleave(GROUP, dim=1)


def make_plain_tensor(entry: TensorEntry, random: torch.Generator) -> Tensor:
    name, dtype, shape = entry
    values = torch.randn(shape, generator=random).to(DTYPES[dtype])
    if name.endswith(".A_log"):
        values[len(values) * 3 // 4 :] = 0  # the published ones have 96 heads, and zeros up to 128
    return values


# What the checkpoints hold


def list_k2_thinking(config: Config) -> list[TensorEntry]:
    """DeepSeek-V3's names."""
    bare = {key: value for key, value in config.items() if key != "quantization_config"}
    return list_tensors({**bare, "model_type": "deepseek_v3"})


def list_k25(config: Config) -> list[TensorEntry]:
    """The text model of K2-Thinking under a prefix, and a vision tower."""
    text = [(f"language_model.{name}", *others) for name, *others in list_k2_thinking(config["text_config"])]
    vision = config.get("vision_config")
    return [*text, *(chain(list_vision_k25(vision), list_projector_k25(vision)) if vision else ())]


def list_vision_k25(vision: Config) -> Iterator[TensorEntry]:
    width, inner = vision["vt_hidden_size"], vision["vt_intermediate_size"]
    shapes = {"mlp.fc0": (inner, width), "mlp.fc1": (width, inner), "wo": (width, width), "wqkv": (3 * width, width)}
    for number in range(vision["vt_num_hidden_layers"]):
        block = f"vision_tower.encoder.blocks.{number}"
        yield from list_norm(f"{block}.norm0", width)
        yield from list_norm(f"{block}.norm1", width)
        for module, (rows, columns) in shapes.items():
            yield from list_biased(f"{block}.{module}", rows, columns)
    yield from list_norm("vision_tower.encoder.final_layernorm", width)
    grid = vision["init_pos_emb_height"], vision["init_pos_emb_width"]
    yield make_bf16_entry("vision_tower.patch_embed.pos_emb.weight", *grid, width)
    yield from list_biased("vision_tower.patch_embed.proj", width, 3, vision["patch_size"], vision["patch_size"])


def list_projector_k25(vision: Config) -> Iterator[TensorEntry]:
    merged = vision["mm_hidden_size"] * vision["merge_kernel_size"][0] * vision["merge_kernel_size"][1]
    yield from list_norm("mm_projector.pre_norm", vision["mm_hidden_size"])
    yield from list_biased("mm_projector.proj.0", merged, merged)
    yield from list_biased("mm_projector.proj.2", vision["text_hidden_size"], merged)


def list_norm(prefix: str, width: int) -> Iterator[TensorEntry]:
    yield make_bf16_entry(f"{prefix}.bias", width)
    yield make_bf16_entry(f"{prefix}.weight", width)


def list_biased(prefix: str, *shape: int) -> Iterator[TensorEntry]:
    yield make_bf16_entry(f"{prefix}.bias", shape[0])
    yield make_bf16_entry(f"{prefix}.weight", *shape)


def list_k3(config: Config) -> list[TensorEntry]:
    """A text model of linear and full attention, experts in a latent space, and a vision tower without biases."""
    text, vision = config["text_config"], config.get("vision_config")
    prefix, hidden = "language_model.model", text["hidden_size"]
    return [
        make_bf16_entry("language_model.lm_head.weight", text["vocab_size"], hidden),
        make_bf16_entry(f"{prefix}.embed_tokens.weight", text["vocab_size"], hidden),
        *chain.from_iterable(list_layer_k3(text, number) for number in range(text["num_hidden_layers"])),
        make_bf16_entry(f"{prefix}.norm.weight", hidden),
        make_bf16_entry(f"{prefix}.output_attn_res_norm.weight", hidden),
        make_bf16_entry(f"{prefix}.output_attn_res_proj.weight", 1, hidden),
        *(list_vision_k3(vision) if vision else ()),
    ]


def list_layer_k3(text: Config, number: int) -> Iterator[TensorEntry]:
    prefix, hidden = f"language_model.model.layers.{number}", text["hidden_size"]
    for norm in ("input_layernorm", "post_attention_layernorm", "self_attention_res_norm", "mlp_res_norm"):
        yield make_bf16_entry(f"{prefix}.{norm}.weight", hidden)
    for projection in ("self_attention_res_proj", "mlp_res_proj"):
        yield make_bf16_entry(f"{prefix}.{projection}.weight", 1, hidden)
    # The lists in the config begin to count at 1.
    is_full = number + 1 in text["linear_attn_config"]["full_attn_layers"]
    yield from (list_mla_k3 if is_full else list_kda_k3)(text, f"{prefix}.self_attn")
    if number < text["first_k_dense_replace"]:
        yield from list_mlp_k3(f"{prefix}.mlp", text["intermediate_size"], hidden)
    else:
        yield from list_experts_k3(text, f"{prefix}.block_sparse_moe")


def list_mla_k3(text: Config, prefix: str) -> Iterator[TensorEntry]:
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    nope, rope, value = text["qk_nope_head_dim"], text["qk_rope_head_dim"], text["v_head_dim"]
    yield make_bf16_entry(f"{prefix}.q_a_proj.weight", text["q_lora_rank"], hidden)
    yield make_bf16_entry(f"{prefix}.q_a_layernorm.weight", text["q_lora_rank"])
    yield make_bf16_entry(f"{prefix}.q_b_proj.weight", heads * (nope + rope), text["q_lora_rank"])
    yield make_bf16_entry(f"{prefix}.kv_a_proj_with_mqa.weight", text["kv_lora_rank"] + rope, hidden)
    yield make_bf16_entry(f"{prefix}.kv_a_layernorm.weight", text["kv_lora_rank"])
    yield make_bf16_entry(f"{prefix}.kv_b_proj.weight", heads * (nope + value), text["kv_lora_rank"])
    yield make_bf16_entry(f"{prefix}.g_proj.weight", heads * value, hidden)
    yield make_bf16_entry(f"{prefix}.o_proj.weight", hidden, heads * value)


def list_kda_k3(text: Config, prefix: str) -> Iterator[TensorEntry]:
    linear, hidden = text["linear_attn_config"], text["hidden_size"]
    heads, head = linear["num_heads"], linear["head_dim"]
    width = heads * head
    yield f"{prefix}.A_log", "F32", (head,)
    yield f"{prefix}.dt_bias", "F32", (width,)
    yield f"{prefix}.o_norm.weight", "F32", (head,)
    for letter in "qkv":
        yield f"{prefix}.{letter}_conv1d.weight", "F32", (width, 1, linear["short_conv_kernel_size"])
        yield make_bf16_entry(f"{prefix}.{letter}_proj.weight", width, hidden)
    yield make_bf16_entry(f"{prefix}.f_a_proj.weight", head, hidden)
    yield make_bf16_entry(f"{prefix}.f_b_proj.weight", width, head)
    yield make_bf16_entry(f"{prefix}.b_proj.weight", heads, hidden)
    yield make_bf16_entry(f"{prefix}.g_proj.weight", width, hidden)
    yield make_bf16_entry(f"{prefix}.o_proj.weight", hidden, width)


def list_mlp_k3(prefix: str, inner: int, hidden: int) -> Iterator[TensorEntry]:
    yield make_bf16_entry(f"{prefix}.gate_proj.weight", inner, hidden)
    yield make_bf16_entry(f"{prefix}.up_proj.weight", inner, hidden)
    yield make_bf16_entry(f"{prefix}.down_proj.weight", hidden, inner)


def list_experts_k3(text: Config, prefix: str) -> Iterator[TensorEntry]:
    hidden, latent, inner = text["hidden_size"], text["routed_expert_hidden_size"], text["moe_intermediate_size"]
    for expert in range(text["num_experts"]):
        yield make_bf16_entry(f"{prefix}.experts.{expert}.w1.weight", inner, latent)
        yield make_bf16_entry(f"{prefix}.experts.{expert}.w2.weight", latent, inner)
        yield make_bf16_entry(f"{prefix}.experts.{expert}.w3.weight", inner, latent)
    yield f"{prefix}.gate.e_score_correction_bias", "F32", (text["num_experts"],)
    yield make_bf16_entry(f"{prefix}.gate.weight", text["num_experts"], hidden)
    yield make_bf16_entry(f"{prefix}.routed_expert_down_proj.weight", latent, hidden)
    yield make_bf16_entry(f"{prefix}.routed_expert_norm.weight", latent)
    yield make_bf16_entry(f"{prefix}.routed_expert_up_proj.weight", hidden, latent)
    yield from list_mlp_k3(f"{prefix}.shared_experts", inner * text["num_shared_experts"], hidden)


def list_vision_k3(vision: Config) -> Iterator[TensorEntry]:
    width, inner, heads = vision["vt_hidden_size"], vision["vt_intermediate_size"], vision["qkv_hidden_size"]
    merged = vision["mm_hidden_size"] * vision["merge_kernel_size"][0] * vision["merge_kernel_size"][1]
    yield make_bf16_entry("mm_projector.post_norm.weight", vision["text_hidden_size"])
    yield make_bf16_entry("mm_projector.proj.0.weight", merged, merged)
    yield make_bf16_entry("mm_projector.proj.2.weight", vision["text_hidden_size"], merged)
    for number in range(vision["vt_num_hidden_layers"]):
        block = f"vision_tower.encoder.blocks.{number}"
        yield make_bf16_entry(f"{block}.mlp.fc0.weight", inner, width)
        yield make_bf16_entry(f"{block}.mlp.fc1.weight", width, inner)
        yield make_bf16_entry(f"{block}.norm0.weight", width)
        yield make_bf16_entry(f"{block}.norm1.weight", width)
        yield make_bf16_entry(f"{block}.wo.weight", width, heads)
        yield make_bf16_entry(f"{block}.wqkv.weight", 3 * heads, width)
    yield make_bf16_entry("vision_tower.encoder.final_layernorm.weight", width)
    grid = vision["init_pos_emb_height"], vision["init_pos_emb_width"]
    yield make_bf16_entry("vision_tower.patch_embed.pos_emb.weight", *grid, width)
    yield make_bf16_entry("vision_tower.patch_embed.proj.weight", width, 3, vision["patch_size"], vision["patch_size"])


# The published configs, as far as names, shapes and a run configuration depend on them


def describe_packing(packing: str) -> Config:
    """The `quantization_config` of the published checkpoints."""
    ignored = ["re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
    weights: dict[str, Any] = {
        "actorder": None,
        "dynamic": False,
        "group_size": GROUP,
        "num_bits": 4,
        "observer": "minmax",
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    group: dict[str, Any] = {"input_activations": None, "output_activations": None, "targets": ["Linear"]}
    name = "pack-quantized"
    if packing == "mxfp4":
        name = group["format"] = "mxfp4-pack-quantized"
        weights |= {"scale_dtype": "torch.uint8", "type": "float"}
    return {
        "config_groups": {"group_0": {**group, "weights": weights}},
        "format": name,
        "ignore": [*ignored, "re:.*lm_head.*", "re:.*vision_tower.*", "re:.*mm_projector.*"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


K2_THINKING: Config = {
    **KIMI_K2,
    "max_position_embeddings": 262144,
    "quantization_config": describe_packing("integers"),
    "rms_norm_eps": 1e-05,
    "rope_scaling": {**KIMI_K2["rope_scaling"], "factor": 64},
}
K25: Config = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "dtype": "bfloat16",
    "media_placeholder_token_id": 163605,
    "model_type": "kimi_k25",
    "text_config": {
        **K2_THINKING,
        "rope_scaling": {**K2_THINKING["rope_scaling"], "beta_fast": 32},
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "init_pos_emb_height": 64,
        "init_pos_emb_time": 4,
        "init_pos_emb_width": 64,
        "merge_kernel_size": [2, 2],
        "mm_hidden_size": 1152,
        "mm_projector_type": "patchmerger",
        "patch_size": 14,
        "text_hidden_size": 7168,
        "vt_hidden_size": 1152,
        "vt_intermediate_size": 4304,
        "vt_num_attention_heads": 16,
        "vt_num_hidden_layers": 27,
    },
}
FULL_ATTENTION = [*range(4, 93, 4), 93]
K3: Config = {
    "architectures": ["KimiK3ForConditionalGeneration"],
    "dtype": "bfloat16",
    "media_placeholder_token_id": 163605,
    "model_type": "kimi_k3",
    "text_config": {
        "architectures": ["KimiLinearForCausalLM"],
        "attn_res_block_size": 12,
        "first_k_dense_replace": 1,
        "hidden_act": "situ",
        "hidden_size": 7168,
        "intermediate_size": 33792,
        "kv_lora_rank": 512,
        "latent_moe_use_norm": True,
        "linear_attn_config": {
            "full_attn_layers": FULL_ATTENTION,
            "gate_lower_bound": -5.0,
            "head_dim": 128,
            "kda_layers": [number for number in range(1, 94) if number not in FULL_ATTENTION],
            "num_heads": 96,
            "short_conv_kernel_size": 4,
            "use_full_rank_gate": True,
        },
        "mla_use_nope": True,
        "mla_use_output_gate": True,
        "model_type": "kimi_linear",
        "moe_intermediate_size": 3072,
        "moe_layer_freq": 1,
        "num_attention_heads": 96,
        "num_experts": 896,
        "num_experts_per_token": 16,
        "num_hidden_layers": 93,
        "num_key_value_heads": 96,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 2,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": describe_packing("mxfp4"),
        "rms_norm_eps": 1e-05,
        "routed_expert_hidden_size": 3584,
        "tie_word_embeddings": False,
        "v_head_dim": 128,
        "vocab_size": 163840,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "merge_kernel_size": [2, 2],
        "mm_hidden_size": 1024,
        "mm_projector_type": "patchmergerv2",
        "patch_size": 14,
        "qkv_hidden_size": 1536,
        "text_hidden_size": 7168,
        "vt_hidden_size": 1024,
        "vt_intermediate_size": 4096,
        "vt_num_attention_heads": 12,
        "vt_num_hidden_layers": 27,
    },
}

# Small ones: layers, experts and vision blocks of which 10 sorts before 2.

SMALL_TEXT: Config = {
    **SMALL_V3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "n_routed_experts": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "vocab_size": 128,
}
"""For 1, 2 and 4 ranks."""
SMALL_VISION: Config = {
    "init_pos_emb_height": 4,
    "init_pos_emb_width": 3,
    "mm_hidden_size": 16,
    "patch_size": 2,
    "text_hidden_size": 64,
    "vt_hidden_size": 16,
    "vt_intermediate_size": 24,
    "vt_num_attention_heads": 2,
    "vt_num_hidden_layers": 11,
}
SMALL_K25: Config = {
    **K25,
    "text_config": {**K25["text_config"], **SMALL_TEXT},
    "vision_config": {**K25["vision_config"], **SMALL_VISION},
}
SMALL_LINEAR: Config = {
    **K3["text_config"]["linear_attn_config"],
    "full_attn_layers": [4, 8, 11, 12],
    "head_dim": 8,
    "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10],
    "num_heads": 6,
}
SMALL_K3: Config = {
    **K3,
    "text_config": {
        **K3["text_config"],
        "hidden_size": 64,
        "intermediate_size": 80,
        "kv_lora_rank": 24,
        "linear_attn_config": SMALL_LINEAR,
        "moe_intermediate_size": 96,
        "num_attention_heads": 6,
        "num_experts": 12,
        "num_experts_per_token": 4,
        "num_hidden_layers": 12,
        "num_key_value_heads": 6,
        "q_lora_rank": 40,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "routed_expert_hidden_size": 32,
        "v_head_dim": 8,
        "vocab_size": 128,
    },
    "vision_config": {**K3["vision_config"], **SMALL_VISION, "qkv_hidden_size": 24},
}

PACKED_FAMILIES: Mapping[str, PackedFamily] = {
    "kimi-k2-thinking": PackedFamily(list_k2_thinking, "integers", K2_THINKING, {**K2_THINKING, **SMALL_TEXT}, 62),
    "kimi-k2.5": PackedFamily(list_k25, "integers", K25, SMALL_K25, 64),
    "kimi-k3": PackedFamily(list_k3, "mxfp4", K3, SMALL_K3, 96),
}
