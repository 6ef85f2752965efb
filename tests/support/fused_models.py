"""Tiny checkpoints whose rank files are fused, a recipe for them, and an oracle: numpy concatenates, stacks and splits.

The sizes are odd where no block needs even ones: 12 experts, so that 10 and 11 come behind 2 only by their numbers; and
fewer key heads than ranks. Layer 1 has a fused tensor of no elements.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save, save_file
from torch import Tensor

RECIPE = """
name = "fused"
about = "a layout whose tensors are fused"
left = "huggingface"
right = "fused"
model_types = ["fused"]
files = "part-{rank}.safetensors"
carry = ["config.json"]
describes = true
ranks_divide = ["num_attention_heads"]
placeholders.i = { counts = "layers", size = "num_hidden_layers" }
placeholders.e = { counts = "experts", size = "num_experts" }
scales.s = { left = "weight_scale_inv", right = "weight_scale_inv", block = 4 }
sizes.q = "num_attention_heads * head_dim"
sizes.kv = "num_key_value_heads * head_dim"
constants = [
["model.layers.{i}.attn.k_scale", "F32 []", 1.0],
["model.layers.{i}.attn.sinks", "BF16 [2, 3]", 0.3],
["model.version", "F16 [3]", -2.5],
]
rules = [
["same", "model.embed.weight", "model.embed.weight", "rows padded to 8", "[vocab_size, hidden_size]"],
["same", "model.norm.weight", "model.norm.weight", "replicate", "[hidden_size]"],
["concat", "model.layers.{i}.q.{s}", "model.layers.{i}.qkv.{s}", "rows", "[q, hidden_size]"],
["concat", "model.layers.{i}.k.{s}", "model.layers.{i}.qkv.{s}", "rows of num_key_value_heads", "[kv, hidden_size]"],
["concat", "model.layers.{i}.v.{s}", "model.layers.{i}.qkv.{s}", "rows of num_key_value_heads", "[kv, hidden_size]"],
["concat", "model.layers.{i}.q.bias", "model.layers.{i}.qkv.bias", "rows", "[q]", "maybe"],
["concat", "model.layers.{i}.k.bias", "model.layers.{i}.qkv.bias", "rows of num_key_value_heads", "[kv]", "maybe"],
["concat", "model.layers.{i}.v.bias", "model.layers.{i}.qkv.bias", "rows of num_key_value_heads", "[kv]", "maybe"],
["same", "model.layers.{i}.o.{s}", "model.layers.{i}.o.{s}", "columns", "[hidden_size, q]"],
["concat", "model.layers.{i}.a.extra", "model.layers.{i}.extra", "replicate", "[?, 5]"],
["concat", "model.layers.{i}.b.extra", "model.layers.{i}.extra", "replicate", "[?, 4 + 1]"],
["same", "model.layers.{i}.mlp.router", "model.layers.{i}.mlp.router", "replicate", "[num_experts, hidden_size]"],
["stack", "model.layers.{i}.mlp.{e}.gate.{s}", "model.layers.{i}.mlp.w13.{s}", "rows", "[inner_size, hidden_size]"],
["stack", "model.layers.{i}.mlp.{e}.up.{s}", "model.layers.{i}.mlp.w13.{s}", "rows", "[inner_size, hidden_size]"],
["stack", "model.layers.{i}.mlp.{e}.down.{s}", "model.layers.{i}.mlp.w2_{s}", "columns", "[hidden_size, inner_size]"],
["stack", "model.layers.{i}.mlp.{e}.down.bias", "model.layers.{i}.mlp.w2_bias", "replicate", "[hidden_size]"],
]
"""

CONFIG: dict[str, Any] = {
    "model_type": "fused",
    "vocab_size": 13,
    "num_hidden_layers": 2,
    "num_experts": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "hidden_size": 7,
    "inner_size": 20,
}

FP8 = {"head_dim": 4, "hidden_size": 10, "inner_size": 16}
"""Sizes of the model in FP8: rows and columns that are cut are whole blocks, others end inside one."""

SCALE = "weight_scale_inv"

Shapes = dict[str, tuple[int, ...]]
Change = Callable[[dict[str, Tensor]], object]


def list_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the shape of every tensor that is no block scale."""
    hidden, inner, head = config["hidden_size"], config["inner_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    found: Shapes = {"model.embed.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in (f"model.layers.{i}" for i in range(config["num_hidden_layers"])):
        found |= {f"{layer}.{word}.weight": (rows, hidden) for word, rows in (("q", q), ("k", kv), ("v", kv))}
        found |= {f"{layer}.{word}.bias": (rows,) for word, rows in (("q", q), ("k", kv), ("v", kv))}
        found |= {f"{layer}.o.weight": (hidden, q), f"{layer}.mlp.router": (config["num_experts"], hidden)}
        found |= {f"{layer}.a.extra": (0, 5), f"{layer}.b.extra": (3 if layer.endswith("0") else 0, 5)}
        for expert in (f"{layer}.mlp.{e}" for e in range(config["num_experts"])):
            found |= {f"{expert}.gate.weight": (inner, hidden), f"{expert}.up.weight": (inner, hidden)}
            found |= {f"{expert}.down.weight": (hidden, inner), f"{expert}.down.bias": (hidden,)}
    return found


def is_scaled(name: str) -> bool:
    return name.endswith(".weight") and "layers" in name


def make_tensors(config: Mapping[str, Any], block: tuple[int, int] | None) -> dict[str, Tensor]:
    """Return random tensors: BF16, or FP8 with F32 scales of blocks; biases are F32."""
    torch.manual_seed(7)
    found: dict[str, Tensor] = {}
    for name, shape in list_shapes(config).items():
        if block and is_scaled(name):
            codes = torch.randint(0, 0x7F, shape) + 0x80 * torch.randint(0, 2, shape)
            found[name] = codes.to(torch.uint8).view(torch.float8_e4m3fn)
            blocks = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
            found[name.removesuffix("weight") + SCALE] = torch.rand(blocks) + 0.5
        else:
            found[name] = torch.randn(shape).to(torch.float32 if name.endswith("bias") else torch.bfloat16)
    return found


def write_source(folder: Path, /, change: Change | None = None, *, block: tuple[int, int] | None = None) -> Path:
    """Write such a checkpoint, in two files with an index, after `change` has changed its tensors; and `fused.toml`,
    its recipe, beside the folder. Return the path of the recipe. With `block`, the checkpoint is in FP8.
    """
    config = {**CONFIG, **(FP8 | {"quantization_config": {"weight_block_size": list(block)}} if block else {})}
    tensors = make_tensors(config, block)
    if change:
        change(tensors)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    halves = {"model-00001-of-00002.safetensors": 0, "model-00002-of-00002.safetensors": 1}
    weight_map: dict[str, str] = {}
    for file, half in halves.items():
        some = {name: tensors[name] for place, name in enumerate(tensors) if place % 3 // 2 == half}
        save_file(some, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    recipe = folder.parent / "fused.toml"
    recipe.write_text(RECIPE.replace("block = 4", f"block = {list(block or (4, 4))}"))
    return recipe


# --- the oracle ---


Array = NDArray[Any]


def make_rank(tensors: Mapping[str, Tensor], config: Mapping[str, Any], ranks: int, rank: int) -> dict[str, Tensor]:
    """Return the tensors of a rank."""
    bits = {name: tensor.view(getattr(torch, f"uint{8 * tensor.itemsize}")).numpy() for name, tensor in tensors.items()}
    parts, experts = min(ranks, config["num_key_value_heads"]), range(config["num_experts"])

    def rows(name: str) -> Any:
        return np.split(bits[name], ranks)[rank]

    def heads(name: str) -> Any:
        return np.split(bits[name], parts)[rank * parts // ranks]

    def columns(name: str) -> Any:
        return np.split(bits[name], ranks, axis=1)[rank]

    embed = np.pad(bits["model.embed.weight"], ((0, -len(bits["model.embed.weight"]) % 8), (0, 0)))
    found: dict[str, Array] = {"model.norm.weight": bits["model.norm.weight"]}
    found["model.embed.weight"] = np.split(embed, ranks)[rank]
    dtypes = {name: tensors[name].dtype for name in found}
    for layer in (f"model.layers.{i}" for i in range(config["num_hidden_layers"])):
        for word in ("weight", SCALE, "bias"):
            if f"{layer}.q.{word}" in tensors:
                qkv = [rows(f"{layer}.q.{word}"), heads(f"{layer}.k.{word}"), heads(f"{layer}.v.{word}")]
                found[f"{layer}.qkv.{word}"] = np.concatenate(qkv)
                dtypes[f"{layer}.qkv.{word}"] = tensors[f"{layer}.q.{word}"].dtype
        for word in ("weight", SCALE) if f"{layer}.q.{SCALE}" in tensors else ("weight",):
            found[f"{layer}.o.{word}"] = columns(f"{layer}.o.{word}")
            pairs = [(f"{layer}.mlp.{e}.gate.{word}", f"{layer}.mlp.{e}.up.{word}") for e in experts]
            found[f"{layer}.mlp.w13.{word}"] = np.stack([np.concatenate([rows(g), rows(u)]) for g, u in pairs])
            found[f"{layer}.mlp.w2_{word}"] = np.stack([columns(f"{layer}.mlp.{e}.down.{word}") for e in experts])
            made = ("o.", "mlp.w13.", "mlp.w2_")
            dtypes |= {f"{layer}.{name}{word}": tensors[f"{layer}.o.{word}"].dtype for name in made}
        found[f"{layer}.mlp.w2_bias"] = np.stack([bits[f"{layer}.mlp.{e}.down.bias"] for e in experts])
        found[f"{layer}.mlp.router"] = bits[f"{layer}.mlp.router"]
        found[f"{layer}.extra"] = np.concatenate([bits[f"{layer}.a.extra"], bits[f"{layer}.b.extra"]])
        dtypes[f"{layer}.mlp.w2_bias"] = tensors[f"{layer}.mlp.0.down.bias"].dtype
        dtypes |= {f"{layer}.mlp.router": torch.bfloat16, f"{layer}.extra": torch.bfloat16}
    result = {name: torch.from_numpy(array.copy()).view(dtypes[name]) for name, array in found.items()}
    return {**result, **make_constants(config)}


def make_constants(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that the recipe makes of nothing."""
    found = {"model.version": torch.full((3,), -2.5, dtype=torch.float16)}
    for i in range(config["num_hidden_layers"]):
        found[f"model.layers.{i}.attn.k_scale"] = torch.tensor(1.0)
        found[f"model.layers.{i}.attn.sinks"] = torch.full((2, 3), 0.3).bfloat16()
    return found


def split_file(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a file, without its metadata, and its data."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return header, content[start:]


def assert_file(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Hold a file against what the safetensors package makes of the expected tensors: each entry and each byte."""
    header, data = split_file(path.read_bytes())
    wanted, bytes_wanted = split_file(save(dict(expected)))
    assert header == wanted
    assert data == bytes_wanted
