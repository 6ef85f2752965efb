"""Tiny checkpoints of random bits in the layout that is published, made from the skeletons of their models."""

import json
import re
from pathlib import Path
from typing import Any

import oracle
import oracle_families
import torch
from safetensors.torch import load_file, save_file
from skeletons import BF16, E8M0, F8, F32, FP4, I32, Parameters
from torch import Tensor

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

V3: dict[str, Any] = {
    "vocab_size": 32,
    "dim": 160,
    "inter_dim": 512,
    "moe_inter_dim": 128,
    "n_layers": 2,
    "n_dense_layers": 1,
    "n_heads": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "q_lora_rank": 40,
    "kv_lora_rank": 130,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "dtype": "fp8",
    "index_n_heads": 4,
    "index_head_dim": 32,
}
V4: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 128,
    "moe_inter_dim": 128,
    "n_layers": 4,
    "n_hash_layers": 1,
    "n_mtp_layers": 1,
    "n_heads": 8,
    "n_routed_experts": 16,
    "n_activated_experts": 6,
    "q_lora_rank": 128,
    "head_dim": 128,
    "o_groups": 8,
    "o_lora_rank": 128,
    "compress_ratios": [0, 4, 128, 4, 0],
    "index_n_heads": 8,
    "index_head_dim": 32,
    "hc_mult": 4,
    "expert_dtype": "fp4",
}
V4_0731 = V4 | {
    "n_mtp_layers": 3,
    "compress_ratios": [0, 4, 128, 4, 0, 0, 0],
    "dspark_markov_rank": 24,
    "dspark_target_layer_ids": [1, 2, 3],
}
VISION = {
    "vision_n_layers": 2,
    "vision_dim": 12,
    "vision_inter_dim": 20,
    "vision_patch_size": 2,
    "vision_downsample_ratio": 2,
}
V41 = (
    V4_0731
    | VISION
    | {
        "dim": 160,
        "moe_inter_dim": 96,
        "dspark_n_routed_experts": 8,
        "compress_ratios": [0, 2, 2, 1, 0, 0, 0],
        "kv_source_layers": [1, 3],
        "index_source_layers": [1, 2, 3],
        "engram_layer_ids": [1],
        "engram_num_embeddings": [13],
        "engram_head_dim": 64,
        "engram_n_heads": 2,
        "engram_max_ngram_size": 3,
    }
)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return values of every kind that the dtype holds but NaN; scales are powers of two near one, or any F32."""
    if dtype == F8:
        codes = torch.randint(0, 0x7F, shape) + 0x80 * torch.randint(0, 2, shape)
        return codes.to(torch.uint8).view(F8)
    if dtype == E8M0:
        return torch.randint(120, 134, shape).to(torch.uint8).view(E8M0)
    if dtype == FP4:
        return torch.randint(-128, 128, shape).to(torch.int8)
    if dtype == I32:
        return torch.randint(0, 16, shape)
    return torch.randn(shape).to(dtype)


def write_v3(folder: Path, parameters: Parameters, **config: object) -> None:
    """Write the parameters of the V3 line under the names of Hugging Face; what V3 and V3.2 have in BF16 is BF16."""
    names = {**oracle.NAMES, **oracle_families.INDEXER}
    old_names = {new: old for old, (new, _) in names.items()}
    tensors = {}
    for new, (shape, dtype) in parameters.items():
        is_wide = dtype == F32 and new.endswith(("norm.weight", "head.weight", "weights_proj.weight"))
        tensors[old_name(new, old_names)] = random_tensor(shape, BF16 if is_wide else dtype)
    write(folder, tensors, num_hidden_layers=V3["n_layers"], **config)


def old_name(new: str, old_names: dict[str, str]) -> str:
    """Return the name at Hugging Face of a parameter of the model."""
    if new.endswith(".scale"):
        return old_name(new.removesuffix("scale") + "weight", old_names) + "_scale_inv"
    old = old_names[re.sub(r"\.\d+\.", ".#.", new)]
    for number in re.findall(r"\.(\d+)\.", new):
        old = old.replace("#", number, 1)
    return old


def write_v4(folder: Path, parameters: Parameters, block: int) -> None:
    """Write the parameters of the V4 line in the dtypes of the release: FP4 as I8, `wo_a` in F8, norms in BF16."""
    narrow = ("norm.weight", "norm1.weight", "norm2.weight", "head.weight", "proj.weight", "markov_w2.weight")
    compressor = ("wkv.weight", "wgate.weight")
    tensors = {}
    for name, (shape, dtype) in parameters.items():
        if name.endswith(".attn.wo_a.weight"):
            tensors[name] = random_tensor(shape, F8)
            scale_shape = tuple(-(-size // block) for size in shape)
            tensors[name.removesuffix("weight") + "scale"] = random_tensor(scale_shape, E8M0)
        else:
            tensors[name] = random_tensor(shape, BF16 if dtype == F32 and name.endswith(narrow + compressor) else dtype)
    write(folder, tensors, quantization_config={"weight_block_size": [block, block]})


def write(folder: Path, tensors: dict[str, Tensor], **config: object) -> None:
    """Write tensors in two files, so that some scales lie in another than their weights, and the side files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    for number in range(2):
        part = {name: tensors[name] for name in names[number::2]}
        save_file(part, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        (folder / name).write_text(json.dumps({"name": name}))


def read(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_ranks(folder: Path, ranks: int) -> list[dict[str, Tensor]]:
    """Return the tensors of each rank."""
    return [load_file(folder / f"model{rank}-mp{ranks}.safetensors") for rank in range(ranks)]


def is_same(left: Tensor, right: Tensor) -> bool:
    """Compare bits, since small dtypes have no equality."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
