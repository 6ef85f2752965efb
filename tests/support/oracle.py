"""A slow, obvious converter that the tests compare with; it imports nothing of the package under test.

It reads every tensor into memory, looks each whole name up in the table below, and cuts with torch.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

# Every weight that a checkpoint may hold, with each number written as #; the dimension that is cut, or None.
NAMES: dict[str, tuple[str, int | None]] = {
    "model.embed_tokens.weight": ("embed.weight", 0),
    "lm_head.weight": ("head.weight", 0),
    "model.norm.weight": ("norm.weight", None),
    "model.layers.#.input_layernorm.weight": ("layers.#.attn_norm.weight", None),
    "model.layers.#.post_attention_layernorm.weight": ("layers.#.ffn_norm.weight", None),
    "model.layers.#.self_attn.q_proj.weight": ("layers.#.attn.wq.weight", 0),
    "model.layers.#.self_attn.q_a_proj.weight": ("layers.#.attn.wq_a.weight", None),
    "model.layers.#.self_attn.q_a_layernorm.weight": ("layers.#.attn.q_norm.weight", None),
    "model.layers.#.self_attn.q_b_proj.weight": ("layers.#.attn.wq_b.weight", 0),
    "model.layers.#.self_attn.kv_a_proj_with_mqa.weight": ("layers.#.attn.wkv_a.weight", None),
    "model.layers.#.self_attn.kv_a_layernorm.weight": ("layers.#.attn.kv_norm.weight", None),
    "model.layers.#.self_attn.kv_b_proj.weight": ("layers.#.attn.wkv_b.weight", 0),
    "model.layers.#.self_attn.o_proj.weight": ("layers.#.attn.wo.weight", 1),
    "model.layers.#.mlp.gate_proj.weight": ("layers.#.ffn.w1.weight", 0),
    "model.layers.#.mlp.down_proj.weight": ("layers.#.ffn.w2.weight", 1),
    "model.layers.#.mlp.up_proj.weight": ("layers.#.ffn.w3.weight", 0),
    "model.layers.#.mlp.gate.weight": ("layers.#.ffn.gate.weight", None),
    "model.layers.#.mlp.gate.e_score_correction_bias": ("layers.#.ffn.gate.bias", None),
    "model.layers.#.mlp.shared_experts.gate_proj.weight": ("layers.#.ffn.shared_experts.w1.weight", 0),
    "model.layers.#.mlp.shared_experts.down_proj.weight": ("layers.#.ffn.shared_experts.w2.weight", 1),
    "model.layers.#.mlp.shared_experts.up_proj.weight": ("layers.#.ffn.shared_experts.w3.weight", 0),
    # Routed experts are dealt whole, so no dimension is cut.
    "model.layers.#.mlp.experts.#.gate_proj.weight": ("layers.#.ffn.experts.#.w1.weight", None),
    "model.layers.#.mlp.experts.#.down_proj.weight": ("layers.#.ffn.experts.#.w2.weight", None),
    "model.layers.#.mlp.experts.#.up_proj.weight": ("layers.#.ffn.experts.#.w3.weight", None),
}


def convert(source: Path, target: Path, ranks: int, *, mtp_layers: Collection[int] = ()) -> None:
    """Write `model{rank}-mp{ranks}.safetensors` for each rank, and the tokenizer files, into `target`."""
    tensors = load_tensors(source, mtp_layers)
    block = block_size(source)
    target.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        share = dict(rank_tensors(tensors, ranks, rank, block))
        save_file(share, target / f"model{rank}-mp{ranks}.safetensors")
    for file_name in visible_files(source, "*token*"):
        shutil.copyfile(source / file_name, target / file_name)


def load_tensors(source: Path, dropped_layers: Collection[int]) -> dict[str, Tensor]:
    """Return every tensor of every file in the folder, except those of the dropped layers."""
    tensors: dict[str, Tensor] = {}
    for file_name in visible_files(source, "*.safetensors"):
        tensors.update(load_file(source / file_name))
    for layer in dropped_layers:
        tensors = {name: tensors[name] for name in tensors if not name.startswith(f"model.layers.{layer}.")}
    return tensors


def visible_files(folder: Path, pattern: str) -> list[str]:
    """Return the names that match, without hidden ones, which `Path.glob` alone would also give."""
    return [path.name for path in folder.glob(pattern) if not path.name.startswith(".")]


def block_size(source: Path, default: int = 128) -> int:
    """Return the width of the square blocks that share one scale, `default` when config.json does not say."""
    rows, columns = read_config(source).get("quantization_config", {}).get("weight_block_size", (default, default))
    if rows != columns:
        raise ValueError(f"blocks of {rows}x{columns} are not square")
    return int(rows)


def read_config(source: Path) -> dict[str, Any]:
    """Return the fields of config.json, none when there is no such file."""
    path = source / "config.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def rank_tensors(
    tensors: dict[str, Tensor],
    ranks: int,
    rank: int,
    block: int,
    names: Mapping[str, tuple[str, int | None]] = NAMES,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the new name and this rank's share of each tensor that the rank holds."""
    experts = count_experts(tensors)
    if experts % ranks != 0:
        raise ValueError(f"{experts} experts cannot be dealt to {ranks} ranks")
    for name, tensor in tensors.items():
        expert = expert_number(name)
        if expert is not None and expert // (experts // ranks) != rank:
            continue
        new_name, dimension = look_up(name, names)
        if dimension is None or ranks == 1:
            yield new_name, tensor
        elif name.endswith(".weight_scale_inv"):
            local = tensors[weight_name(name)].size(dimension) // ranks
            yield new_name, cut_scale(tensor, dimension, local, rank, block)
        else:
            yield new_name, cut_weight(tensor, dimension, ranks, rank)


def count_experts(tensors: dict[str, Tensor]) -> int:
    """Return the number of routed experts of one layer; they are numbered from 0."""
    numbers = {expert_number(name) for name in tensors}
    return len(numbers - {None})


def expert_number(name: str) -> int | None:
    """Return the number of the routed expert that a tensor belongs to."""
    found = re.search(r"\.mlp\.experts\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def weight_name(scale_name: str) -> str:
    """Return the name of the weight that a block scale belongs to."""
    return scale_name.removesuffix("_scale_inv")


def look_up(name: str, names: Mapping[str, tuple[str, int | None]] = NAMES) -> tuple[str, int | None]:
    """Return the new name of a tensor and the dimension that is cut; a scale follows its weight."""
    if name.endswith(".weight_scale_inv"):
        new_name, dimension = look_up(weight_name(name), names)
        return new_name.removesuffix(".weight") + ".scale", dimension
    new_name, dimension = names[re.sub(r"\.\d+\.", ".#.", name)]
    for number in re.findall(r"\.(\d+)\.", name):
        new_name = new_name.replace("#", number, 1)
    return new_name, dimension


def cut_weight(weight: Tensor, dimension: int, ranks: int, rank: int) -> Tensor:
    """Return the rank's equal share of a weight."""
    if weight.size(dimension) % ranks != 0:
        raise ValueError(f"dimension {dimension} of {tuple(weight.shape)} cannot be cut into {ranks}")
    local = weight.size(dimension) // ranks
    return weight.narrow(dimension, rank * local, local).contiguous()


def cut_scale(scale: Tensor, dimension: int, local: int, rank: int, block: int) -> Tensor:
    """Return the scales of a rank whose share of the weight is `local` long on the cut dimension."""
    if local % block == 0:
        return scale.narrow(dimension, rank * local // block, local // block).contiguous()
    if local < block and block % local == 0:
        return scale.narrow(dimension, rank * local // block, 1).contiguous()
    raise ValueError(f"a share of {local} straddles blocks of {block}")
