"""A large checkpoint to load from, and comparing and spoiling the tensors of rank files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reshard.synthetic import DEEPSEEK_V3

State = Mapping[str, torch.Tensor]

LARGE: dict[str, Any] = {
    **DEEPSEEK_V3,
    "first_k_dense_replace": 1,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 32,
    "num_attention_heads": 16,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 128,
    "vocab_size": 8192,
}
"""Experts of 512 KiB a matrix, larger than the gaps that are read over, and an embedding of two windows: 130 MB."""


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Torch does not view nothing as another dtype, nor a single element that has a stride."""
    if not tensor.numel():
        return torch.empty(0)
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def rank_file(folder: Path, rank: int, ranks: int) -> Path:
    return folder / f"model{rank}-mp{ranks}.safetensors"


def spoil(path: Path, name: str) -> None:
    """Flips a bit of a tensor."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + json.loads(data[8:start])[name]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
