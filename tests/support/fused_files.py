"""A tiny model with fused rank files, written by hand: cut, `cat` and `stack` of torch. Imports nothing of reshard."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from oracle_casts import dequantize
from safetensors.torch import save_file
from torch import Tensor

LAYERS, EXPERTS, HIDDEN, EXPERT_WIDTH, DENSE_WIDTH = 2, 12, 16, 16, 32
QUERY_HEADS, KV_HEADS, HEAD = 4, 2, 4
VOCABULARY, PADDED_VOCABULARY = 100, 128
BLOCK = 4
F8 = torch.float8_e4m3fn

CONFIG = {
    "model_type": "tiny_fused",
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "num_attention_heads": QUERY_HEADS,
    "num_key_value_heads": KV_HEADS,
}

RECIPE = """
name         = "tiny-fused"
about        = "a tiny model for an engine with fused tensors"
left         = "huggingface"
right        = "fused-engine"
files        = "model-rank-{rank}-part-0.safetensors"
describes    = true
engine       = "tiny"
model_types  = ["tiny_fused"]
ranks_divide = ["num_attention_heads"]

placeholders.i = { counts = "layers",  size = "num_hidden_layers" }
placeholders.e = { counts = "experts", size = "num_experts" }

scales.s = { left = "weight_scale_inv", right = "weight_scale_inv", block = 4 }

constants = [
["model.version", "BF16 [2]", 0.5],
["layers.{i}.attn._k_scale", "F32 []",   1.0],
["layers.{i}.attn._v_scale", "F16 []",   1.0],
]

rules = [
["same", "model.embed_tokens.weight", "model.embed_tokens.weight", "rows padded to 64"],
["same", "layers.{i}.norm.weight", "layers.{i}.norm.weight", "replicate"],
["concat", "layers.{i}.attn.q_proj.weight", "layers.{i}.attn.qkv_proj.weight", "rows"],
["concat", "layers.{i}.attn.k_proj.weight", "layers.{i}.attn.qkv_proj.weight", "rows of num_key_value_heads"],
["concat", "layers.{i}.attn.v_proj.weight", "layers.{i}.attn.qkv_proj.weight", "rows of num_key_value_heads"],
["concat", "layers.{i}.attn.q_proj.bias", "layers.{i}.attn.qkv_proj.bias", "rows", "", "maybe"],
["concat", "layers.{i}.attn.k_proj.bias", "layers.{i}.attn.qkv_proj.bias", "rows of num_key_value_heads", "", "maybe"],
["concat", "layers.{i}.attn.v_proj.bias", "layers.{i}.attn.qkv_proj.bias", "rows of num_key_value_heads", "", "maybe"],
["same", "layers.{i}.attn.o_proj.weight", "layers.{i}.attn.o_proj.weight", "columns"],
["concat", "layers.{i}.mlp.gate_proj.{s}", "layers.{i}.mlp.gate_up_proj.{s}", "rows"],
["concat", "layers.{i}.mlp.up_proj.{s}", "layers.{i}.mlp.gate_up_proj.{s}", "rows"],
["same", "layers.{i}.mlp.down_proj.{s}", "layers.{i}.mlp.down_proj.{s}", "columns"],
["stack", "layers.{i}.experts.{e}.gate_proj.{s}", "layers.{i}.experts.w13_{s}", "rows"],
["stack", "layers.{i}.experts.{e}.up_proj.{s}", "layers.{i}.experts.w13_{s}", "rows"],
["stack", "layers.{i}.experts.{e}.down_proj.{s}", "layers.{i}.experts.w2_{s}", "columns"],
]
"""

Tensors = dict[str, Tensor]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Return values that are finite in every dtype."""
    if dtype == F8:
        codes = torch.randint(0, 0x7F, shape, generator=random) + 0x80 * torch.randint(0, 2, shape, generator=random)
        return codes.to(torch.uint8).view(F8)
    return torch.randn(shape, generator=random).to(dtype)


def make_source(quantized: torch.dtype = F8, plain: torch.dtype = torch.bfloat16) -> Tensors:
    """Return the tensors of the checkpoint; weights of the dtype F8 have a scale for each block."""
    random = torch.Generator().manual_seed(15)
    tensors = {"model.embed_tokens.weight": random_bits((VOCABULARY, HIDDEN), plain, random)}

    def add(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = random_bits(shape, quantized, random)
        if quantized == F8:
            blocks = tuple(length // BLOCK for length in shape)
            tensors[f"{name}.weight_scale_inv"] = torch.rand(blocks, generator=random) + 0.1

    for layer in range(LAYERS):
        base = f"layers.{layer}"
        tensors[f"{base}.norm.weight"] = random_bits((HIDDEN,), plain, random)
        for kind, heads in (("q", QUERY_HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{base}.attn.{kind}_proj.weight"] = random_bits((heads * HEAD, HIDDEN), plain, random)
            tensors[f"{base}.attn.{kind}_proj.bias"] = random_bits((heads * HEAD,), plain, random)
        tensors[f"{base}.attn.o_proj.weight"] = random_bits((HIDDEN, QUERY_HEADS * HEAD), plain, random)
        for name, width in [("mlp", DENSE_WIDTH), *((f"experts.{e}", EXPERT_WIDTH) for e in range(EXPERTS))]:
            add(f"{base}.{name}.gate_proj", width, HIDDEN)
            add(f"{base}.{name}.up_proj", width, HIDDEN)
            add(f"{base}.{name}.down_proj", HIDDEN, width)
    return tensors


def write_source(folder: Path, tensors: Tensors) -> Path:
    """Write a checkpoint in two files, so that the parts of a fused tensor lie in both."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    for number in range(2):
        save_file(
            {name: tensors[name].contiguous() for name in names[number::2]}, folder / f"model-{number}.safetensors"
        )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder.parent / "tiny-fused.toml").write_text(RECIPE)
    return folder


def cast_all_to_bf16(tensors: Tensors) -> Tensors:
    """Return the tensors as `--cast bf16` makes them: dequantized, and F32 rounded."""
    return {
        name: dequantize(tensor, tensors[f"{name}_scale_inv"], BLOCK) if tensor.dtype == F8 else tensor.bfloat16()
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }


def quantize_all(tensors: Tensors) -> Tensors:
    """Return the tensors as `--cast fp8` makes them of BF16: the largest magnitude of each block becomes 448."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if "mlp" in name or "experts" in name:
            rows, columns = (length // BLOCK for length in tensor.shape)
            blocks = tensor.float().reshape(rows, BLOCK, columns, BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            result[name] = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(F8)
            result[f"{name}_scale_inv"] = scale
    return result


def concatenate(parts: list[Tensor]) -> Tensor:
    """Concatenate along dimension 0; dtypes of one byte as bytes, for torch has no `cat` of them everywhere."""
    if parts[0].element_size() == 1:
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts]).view(parts[0].dtype)
    return torch.cat(parts)


def stack(parts: list[Tensor]) -> Tensor:
    return concatenate([part[None] for part in parts])


def make_rank(left: Tensors, rank: int, ranks: int) -> Tensors:
    """Return the tensors of one rank, fused, with the constants."""

    def rows(name: str) -> Tensor:
        return left[name].chunk(ranks, 0)[rank]

    def columns(name: str) -> Tensor:
        return left[name].chunk(ranks, 1)[rank]

    def heads(name: str) -> Tensor:
        parts = left[name].chunk(min(KV_HEADS, ranks), 0)
        return parts[rank * len(parts) // ranks]

    embed = left["model.embed_tokens.weight"]
    margin = torch.zeros(PADDED_VOCABULARY - VOCABULARY, HIDDEN, dtype=embed.dtype)
    right = {
        "model.embed_tokens.weight": torch.cat([embed, margin]).chunk(ranks, 0)[rank],
        "model.version": torch.tensor([0.5, 0.5], dtype=torch.bfloat16),
    }
    words = ["weight", "weight_scale_inv"] if "layers.0.mlp.up_proj.weight_scale_inv" in left else ["weight"]
    for layer in range(LAYERS):
        base = f"layers.{layer}"
        right[f"{base}.norm.weight"] = left[f"{base}.norm.weight"]
        for word in ("weight", "bias"):
            q, k, v = (f"{base}.attn.{kind}_proj.{word}" for kind in "qkv")
            right[f"{base}.attn.qkv_proj.{word}"] = concatenate([rows(q), heads(k), heads(v)])
        right[f"{base}.attn.o_proj.weight"] = columns(f"{base}.attn.o_proj.weight")
        right[f"{base}.attn._k_scale"] = torch.tensor(1.0)
        right[f"{base}.attn._v_scale"] = torch.tensor(1.0, dtype=torch.float16)
        for word in words:
            gate, up = (rows(f"{base}.mlp.{kind}_proj.{word}") for kind in ("gate", "up"))
            right[f"{base}.mlp.gate_up_proj.{word}"] = concatenate([gate, up])
            right[f"{base}.mlp.down_proj.{word}"] = columns(f"{base}.mlp.down_proj.{word}")
            experts = [f"{base}.experts.{expert}" for expert in range(EXPERTS)]
            right[f"{base}.experts.w13_{word}"] = stack(
                [concatenate([rows(f"{one}.gate_proj.{word}"), rows(f"{one}.up_proj.{word}")]) for one in experts]
            )
            right[f"{base}.experts.w2_{word}"] = stack([columns(f"{one}.down_proj.{word}") for one in experts])
    return right


def name_rank_file(rank: int) -> str:
    return f"model-rank-{rank}-part-0.safetensors"


def describe(rank: int, ranks: int) -> dict[str, str]:
    """Return the metadata of a rank file as reshard writes it."""
    return {"format": "pt", "rank": str(rank), "ranks": str(ranks), "recipe": "tiny-fused"}


def write_rank(folder: Path, rank: int, tensors: Tensors, metadata: Mapping[str, str] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / name_rank_file(rank), metadata=dict(metadata) if metadata else None)


def write_ranks(folder: Path, left: Tensors, ranks: int, *, has_metadata: bool = True) -> Path:
    """Write the rank files of tensors that are cast already, with or without metadata."""
    for rank in range(ranks):
        write_rank(folder, rank, make_rank(left, rank, ranks), describe(rank, ranks) if has_metadata else None)
    return folder
