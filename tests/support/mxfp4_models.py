"""Small Llamas in MXFP4, as compressed-tensors writes them, and what torch makes of them and of NVFP4.

Sizes are odd: of 72 columns, two and a quarter groups of MXFP4, four and a half of NVFP4.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import packed_llamas
import torch
from packed_llamas import write_files
from packed_weights import E2M1, pack_bytes
from safetensors.torch import load_file

HIDDEN, INNER, LAYERS = 72, 104, 3

ZERO = 127
"""The E8M0 code of 1."""

TABLE: Mapping[str, Any] = {
    "config_groups": {
        "group_0": {
            "format": "mxfp4-pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "scale_dtype": "torch.uint8",
                "strategy": "group",
                "symmetric": True,
                "type": "float",
                "zp_dtype": None,
            },
        }
    },
    "format": "mxfp4-pack-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}

CONFIG: Mapping[str, Any] = {
    **packed_llamas.CONFIG,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "vocab_size": 40,
}

Tensors = dict[str, torch.Tensor]

PARENTS = [f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in ("self_attn", "mlp")]
"""The modules that have weights beside each other."""


def list_modules(parent: str) -> dict[str, tuple[int, int]]:
    """The packed modules of a parent, with their shapes."""
    if parent.endswith("mlp"):
        shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    else:
        shapes = {name: (HIDDEN if name in "qo" else HIDDEN // 2, HIDDEN) for name in "qkvo"}
    return {f"{parent}.{name}_proj": shape for name, shape in shapes.items()}


def make_mxfp4_tensors(low: int = 110, high: int = 127) -> Tensors:
    """The tensors of a model; each weight has every scale from `low` to `high`, as E8M0 codes, and every code of FP4 in
    groups of most scales.
    """
    torch.manual_seed(low)
    tensors = {
        "model.embed_tokens.weight": torch.randn(40, HIDDEN).bfloat16(),
        "lm_head.weight": torch.randn(40, HIDDEN).bfloat16(),
        "model.norm.weight": torch.randn(HIDDEN).bfloat16(),
    }
    for layer in range(LAYERS):
        for name in ("input", "post_attention"):
            tensors[f"model.layers.{layer}.{name}_layernorm.weight"] = torch.randn(HIDDEN).bfloat16()
    for parent in PARENTS:
        for module, (rows, columns) in list_modules(parent).items():
            groups = rows * -(-columns // 32)
            scales = (torch.arange(groups) * 7 % (high - low + 1) + low)[torch.randperm(groups)]
            tensors[f"{module}.weight_packed"] = pack_bytes(torch.randint(16, (rows, columns)).numpy())
            tensors[f"{module}.weight_scale"] = scales.to(torch.uint8).reshape(rows, -1)
    return tensors


def write_model(folder: Path, tensors: Tensors, files: int = 1, table: Mapping[str, Any] | None = TABLE) -> Path:
    """Writes a checkpoint of so many files."""
    write_files(folder, tensors, files)
    told = {"quantization_config": table} if table else {}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **told}))
    (folder / "recipe.yaml").write_text("quant_stage: {}\n")
    return folder


def read_model(folder: Path) -> Tensors:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).long()


def make_values_of_mxfp4(tensors: Tensors, module: str) -> torch.Tensor:
    """Float32, as compressed-tensors multiplies; subnormal scales too."""
    codes, scales = unpack_codes(tensors[f"{module}.weight_packed"]), tensors[f"{module}.weight_scale"]
    powers = torch.ldexp(torch.ones(scales.shape), scales.int() - ZERO)
    return E2M1[codes] * powers.repeat_interleave(32, 1)[:, : codes.shape[1]]


def make_values_of_nvfp4(tensors: Tensors, module: str) -> torch.Tensor:
    """Float32, as compressed-tensors divides and multiplies."""
    codes, scales = unpack_codes(tensors[f"{module}.weight_packed"]), tensors[f"{module}.weight_scale"]
    whole = scales.float() / tensors[f"{module}.weight_global_scale"]
    return E2M1[codes] * whole.repeat_interleave(16, 1)[:, : codes.shape[1]]


def require_same_values(source: Tensors, target: Tensors) -> None:
    """Asserts that a target has the values of a source bit for bit, in the dtypes and shapes of compressed-tensors."""
    modules = [module for parent in PARENTS for module in list_modules(parent)]
    ends = (".weight_packed", ".weight_scale", ".weight_global_scale")
    plain = {name for name in source if not name.endswith(ends)}
    assert target.keys() == plain | {module + end for module in modules for end in ends}
    assert all(torch.equal(source[name], target[name]) for name in plain)
    for module in modules:
        packed, scale, factor = (target[module + end] for end in ends)
        rows, columns = len(packed), 2 * packed.shape[1]
        assert torch.equal(packed, source[f"{module}.weight_packed"]), module
        assert (scale.dtype, scale.shape) == (torch.float8_e4m3fn, (rows, -(-columns // 16)))
        assert (factor.dtype, factor.shape) == (torch.float32, (1,))
        one, other = make_values_of_mxfp4(source, module), make_values_of_nvfp4(target, module)
        assert torch.equal(one.view(torch.int32), other.view(torch.int32)), module
