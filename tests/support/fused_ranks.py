"""An invented model with everything that fused rank files have, and its rank files, written by numpy alone.

Three layers; 12 experts, so that 10 sorts before 2; two key heads for four ranks; FP8 weights with a scale for each
block of 4 x 4; a vocabulary of 30 that is padded to a multiple of 8; two constants. Every value is random bits.
Nothing of the package under test is imported.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CONFIG: Mapping[str, Any] = {
    "model_type": "fused-test",
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts": 12,
    "moe_intermediate_size": 16,
}

BLOCK, MULTIPLE = 4, 8

RECIPE = """
name = "fused-test"
about = "a test"
left = "huggingface"
right = "test-engine"
engine = "test"
files = "part-{rank}.safetensors"
describes = true
carry = ["config.json"]
model_types = ["fused-test"]
ranks_divide = ["num_attention_heads"]
placeholders.i = { counts = "layers", size = "num_hidden_layers" }
placeholders.e = { counts = "experts", size = "num_experts" }
scales.s = { left = "weight_scale_inv", right = "weight_scale", block = 4 }
sizes.q = "num_attention_heads * head_dim"
sizes.kv = "num_key_value_heads * head_dim"
sizes.inner = "moe_intermediate_size"
constants = [["layers.{i}.attn.k_scale", "F32 []", 1.0], ["layers.{i}.attn.half", "BF16 [3]", 0.5]]
rules = [
["same", "embed.weight", "embed.weight", "rows padded to 8", "[vocab_size, hidden_size]"],
["same", "layers.{i}.norm.weight", "layers.{i}.norm.weight", "replicate", "[hidden_size]"],
["concat", "layers.{i}.q.{s}", "layers.{i}.qkv.{s}", "rows", "[q, hidden_size]"],
["concat", "layers.{i}.k.{s}", "layers.{i}.qkv.{s}", "rows of num_key_value_heads", "[kv, hidden_size]"],
["concat", "layers.{i}.v.{s}", "layers.{i}.qkv.{s}", "rows of num_key_value_heads", "[kv, hidden_size]"],
["concat", "layers.{i}.q.bias", "layers.{i}.qkv.bias", "rows", "[q]"],
["concat", "layers.{i}.k.bias", "layers.{i}.qkv.bias", "rows of num_key_value_heads", "[kv]"],
["concat", "layers.{i}.v.bias", "layers.{i}.qkv.bias", "rows of num_key_value_heads", "[kv]"],
["same", "layers.{i}.o.{s}", "layers.{i}.o.{s}", "columns", "[hidden_size, q]"],
["same", "layers.{i}.router.weight", "layers.{i}.gate.weight", "replicate", "[num_experts, hidden_size]"],
["stack", "layers.{i}.experts.{e}.gate.{s}", "layers.{i}.w13.{s}", "rows", "[inner, hidden_size]"],
["stack", "layers.{i}.experts.{e}.up.{s}", "layers.{i}.w13.{s}", "rows", "[inner, hidden_size]"],
["stack", "layers.{i}.experts.{e}.down.{s}", "layers.{i}.w2.{s}", "columns", "[hidden_size, inner]"],
]
"""


class Stored(NamedTuple):
    """A tensor as a file has it: numpy has no FP8 and no BF16."""

    dtype: str
    array: Array


Tensors = dict[str, Stored]


def make_model(config: Mapping[str, Any] = CONFIG) -> Tensors:
    """The tensors of the original checkpoint."""
    random = np.random.default_rng(7)
    wide, inner = config["hidden_size"], config["moe_intermediate_size"]
    heads, key_heads, head = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    found: Tensors = {}

    def add(name: str, dtype: str, *shape: int) -> None:
        kind = {"BF16": np.uint16, "F8_E4M3": np.uint8, "F32": np.uint32}[dtype]
        # Below 0x7f: random bits of FP8 that are no NaN.
        found[name] = Stored(dtype, random.integers(0, 0x7F, shape, kind))

    def add_scaled(name: str, rows: int, columns: int) -> None:
        add(f"{name}.weight", "F8_E4M3", rows, columns)
        add(f"{name}.weight_scale_inv", "F32", -(-rows // BLOCK), -(-columns // BLOCK))

    add("embed.weight", "BF16", config["vocab_size"], wide)
    for layer in range(config["num_hidden_layers"]):
        add(f"layers.{layer}.norm.weight", "BF16", wide)
        add(f"layers.{layer}.router.weight", "BF16", config["num_experts"], wide)
        for name, rows in (("q", heads * head), ("k", key_heads * head), ("v", key_heads * head)):
            add_scaled(f"layers.{layer}.{name}", rows, wide)
            add(f"layers.{layer}.{name}.bias", "BF16", rows)
        add_scaled(f"layers.{layer}.o", wide, heads * head)
        for expert in range(config["num_experts"]):
            add_scaled(f"layers.{layer}.experts.{expert}.gate", inner, wide)
            add_scaled(f"layers.{layer}.experts.{expert}.up", inner, wide)
            add_scaled(f"layers.{layer}.experts.{expert}.down", wide, inner)
    return found


def cut_for_rank(model: Tensors, rank: int, ranks: int, config: Mapping[str, Any] = CONFIG) -> Tensors:
    """The tensors of a rank file."""
    key_heads = config["num_key_value_heads"]
    key_parts = min(ranks, key_heads)

    def rows(name: str) -> Array:
        return np.asarray(np.split(model[name].array, ranks)[rank])

    def heads(name: str) -> Array:
        return np.asarray(np.split(model[name].array, key_parts)[rank * key_parts // ranks])

    def columns(name: str) -> Array:
        return np.asarray(np.split(model[name].array, ranks, axis=1)[rank])

    table = model["embed.weight"].array
    padding = np.zeros((-len(table) % MULTIPLE, table.shape[1]), table.dtype)
    found = {"embed.weight": Stored("BF16", np.split(np.concatenate([table, padding]), ranks)[rank])}
    experts = range(config["num_experts"])
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}"
        found[f"{at}.norm.weight"] = model[f"{at}.norm.weight"]
        found[f"{at}.gate.weight"] = model[f"{at}.router.weight"]
        found[f"{at}.attn.k_scale"] = Stored("F32", np.array(1, np.float32))
        found[f"{at}.attn.half"] = Stored("BF16", np.array([0x3F00] * 3, np.uint16))
        for old, new, dtype in (
            ("weight", "weight", "F8_E4M3"),
            ("weight_scale_inv", "weight_scale", "F32"),
            ("bias", "bias", "BF16"),
        ):
            parts = [rows(f"{at}.q.{old}"), heads(f"{at}.k.{old}"), heads(f"{at}.v.{old}")]
            found[f"{at}.qkv.{new}"] = Stored(dtype, np.concatenate(parts))
            if old == "bias":
                continue
            found[f"{at}.o.{new}"] = Stored(dtype, columns(f"{at}.o.{old}"))
            pairs = [
                np.concatenate([rows(f"{at}.experts.{e}.gate.{old}"), rows(f"{at}.experts.{e}.up.{old}")])
                for e in experts
            ]
            found[f"{at}.w13.{new}"] = Stored(dtype, np.stack(pairs))
            found[f"{at}.w2.{new}"] = Stored(
                dtype, np.stack([columns(f"{at}.experts.{e}.down.{old}") for e in experts])
            )
    return found


def save(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, begin + array.nbytes]}
        begin += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(one.array.tobytes() for one in tensors.values()))


def read(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """The tensors of a safetensors file: name -> dtype, shape, bytes."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def list_bytes(tensors: Tensors) -> dict[str, tuple[str, list[int], bytes]]:
    """The same of tensors that are not in a file."""
    return {name: (dtype, list(array.shape), array.tobytes()) for name, (dtype, array) in tensors.items()}


def write_ranks(
    folder: Path, ranks: int, *, describes: bool = True, change: Callable[[int, Tensors], None] | None = None
) -> Path:
    """Writes the rank files and their config; `change` damages the tensors of a rank before. Returns the folder."""
    folder.mkdir()
    model = make_model()
    for rank in range(ranks):
        tensors = cut_for_rank(model, rank, ranks)
        if change:
            change(rank, tensors)
        said = {"format": "pt", "rank": str(rank), "ranks": str(ranks), "recipe": "fused-test"}
        save(folder / f"part-{rank}.safetensors", tensors, said if describes else None)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_whole(folder: Path) -> Path:
    """Writes the original checkpoint. Returns the folder."""
    folder.mkdir()
    save(folder / "model.safetensors", make_model())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
