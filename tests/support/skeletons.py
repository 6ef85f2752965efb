"""The parameters that DeepSeek's inference models allocate on one rank, from the fields of their `ModelArgs`.

A rank file is right when its names are these, its shapes equal, and its dtypes those or ones that `load_state_dict`
casts on the way. The dictionaries tell it for every family; `build_module` makes a module of one, so that the
loader of the models, `safetensors.torch.load_model`, can be asked itself. Nothing of the package is imported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model
from torch import nn

Args = Mapping[str, Any]
Parameters = dict[str, tuple[tuple[int, ...], torch.dtype]]  # the shape and dtype of each parameter by name

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
F8, E8M0, FP4 = torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2

# Pairs (in the file, in the model) that the official files rely on: norms, head, compressor; `tid2eid`.
CASTS = {(BF16, F32), (torch.int64, I32)}


def differences(parameters: Parameters, path: Path) -> list[str]:
    """Return what keeps a rank file from being exactly these parameters, one line each, nothing when it is."""
    tensors = load_file(path)
    found = [f"missing {name}" for name in sorted(parameters.keys() - tensors.keys())]
    found += [f"unexpected {name}" for name in sorted(tensors.keys() - parameters.keys())]
    for name in sorted(parameters.keys() & tensors.keys()):
        shape, dtype = parameters[name]
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            found.append(f"{name} is {tuple(tensor.shape)}, the model has {shape}")
        if tensor.dtype != dtype and (tensor.dtype, dtype) not in CASTS:
            found.append(f"{name} is {tensor.dtype}, the model has {dtype}")
    return found


def build_module(parameters: Parameters) -> nn.Module:
    """Return a module whose state has these names; the values are not set."""
    root = nn.Module()
    for name, (shape, dtype) in parameters.items():
        *parents, last = name.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(last, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
    return root


def load(parameters: Parameters, path: Path, *, strict: bool) -> nn.Module:
    """Load a rank file as `generate.py` does, which is strict except for V4 of April; the loader itself raises."""
    module = build_module(parameters)
    load_model(module, path, strict=strict)
    return module


# --- the layers ---


def plain(name: str, *shape: int, dtype: torch.dtype = BF16) -> Parameters:
    return {name: (shape, dtype)}


def linear(name: str, rows: int, columns: int, block: int, scale_dtype: torch.dtype) -> Parameters:
    """Return an F8 weight with its block scales; with block 0 a BF16 weight."""
    if block == 0:
        return plain(f"{name}.weight", rows, columns)
    weight = plain(f"{name}.weight", rows, columns, dtype=F8)
    return weight | plain(f"{name}.scale", -(-rows // block), -(-columns // block), dtype=scale_dtype)


def fp4_linear(name: str, rows: int, columns: int) -> Parameters:
    """Return a FP4 weight, two values a byte, and its scales of 32 columns."""
    weight = plain(f"{name}.weight", rows, columns // 2, dtype=FP4)
    return weight | plain(f"{name}.scale", rows, columns // 32, dtype=E8M0)


def local_experts(count: int, ranks: int, rank: int) -> range:
    return range(rank * count // ranks, (rank + 1) * count // ranks)


# --- V2, V3, V3.2 and what has their layers ---


def v3_parameters(args: Args, ranks: int, rank: int, *, gate_bias: bool | None = None) -> Parameters:
    """Return the parameters of V2 and V3. The model has `gate.bias` only when `dim` is 7168; `gate_bias` overrides."""
    return _v3(args, ranks, rank, BF16, BF16, gate_bias=gate_bias, with_indexer=False)


def v32_parameters(args: Args, ranks: int, rank: int, *, gate_bias: bool | None = None) -> Parameters:
    """Return the parameters of V3.2: norms and head in F32, and an indexer in every layer.

    As in the model.py whose indexer does not interleave its rotary embedding; before, `weights_proj` was BF16. A model
    that is changed for GLM-5.2 has none in the layers whose `indexer_types` is shared.
    """
    parameters = _v3(args, ranks, rank, F32, F32, gate_bias=gate_bias, with_indexer=True)
    shared = [f"layers.{n}.attn.indexer." for n, kind in enumerate(args.get("indexer_types", [])) if kind == "shared"]
    return {name: found for name, found in parameters.items() if not name.startswith(tuple(shared))}


def _v3(
    args: Args,
    ranks: int,
    rank: int,
    norm: torch.dtype,
    head: torch.dtype,
    *,
    gate_bias: bool | None,
    with_indexer: bool,
) -> Parameters:
    dim, vocabulary = args["dim"], args["vocab_size"] // ranks
    result = plain("embed.weight", vocabulary, dim) | plain("head.weight", vocabulary, dim, dtype=head)
    result |= plain("norm.weight", dim, dtype=norm)
    for layer in range(args["n_layers"]):
        name = f"layers.{layer}"
        result |= plain(f"{name}.attn_norm.weight", dim, dtype=norm) | plain(f"{name}.ffn_norm.weight", dim, dtype=norm)
        result |= _v3_attention(f"{name}.attn", args, ranks, norm)
        if with_indexer:
            result |= _v32_indexer(f"{name}.attn.indexer", args)
        if layer < args["n_dense_layers"]:
            result |= _v3_mlp(f"{name}.ffn", args, args["inter_dim"] // ranks)
        else:
            has_bias = dim == 7168 if gate_bias is None else gate_bias
            result |= _v3_experts(f"{name}.ffn", args, ranks, rank, has_bias=has_bias)
    return result


def _v3_linear(name: str, rows: int, columns: int, args: Args) -> Parameters:
    return linear(name, rows, columns, 128 if args["dtype"] == "fp8" else 0, F32)


def _v3_attention(name: str, args: Args, ranks: int, norm: torch.dtype) -> Parameters:
    heads, latent = args["n_heads"] // ranks, args["kv_lora_rank"]
    nope, rope, value = args["qk_nope_head_dim"], args["qk_rope_head_dim"], args["v_head_dim"]
    if args["q_lora_rank"] == 0:
        result = _v3_linear(f"{name}.wq", heads * (nope + rope), args["dim"], args)
    else:
        result = _v3_linear(f"{name}.wq_a", args["q_lora_rank"], args["dim"], args)
        result |= plain(f"{name}.q_norm.weight", args["q_lora_rank"], dtype=norm)
        result |= _v3_linear(f"{name}.wq_b", heads * (nope + rope), args["q_lora_rank"], args)
    result |= _v3_linear(f"{name}.wkv_a", latent + rope, args["dim"], args)
    result |= plain(f"{name}.kv_norm.weight", latent, dtype=norm)
    result |= _v3_linear(f"{name}.wkv_b", heads * (nope + value), latent, args)
    return result | _v3_linear(f"{name}.wo", args["dim"], heads * value, args)


def _v32_indexer(name: str, args: Args) -> Parameters:
    heads, width = args["index_n_heads"], args["index_head_dim"]
    result = _v3_linear(f"{name}.wq_b", heads * width, args["q_lora_rank"], args)
    result |= _v3_linear(f"{name}.wk", width, args["dim"], args)
    result |= plain(f"{name}.k_norm.weight", width, dtype=F32) | plain(f"{name}.k_norm.bias", width, dtype=F32)
    return result | plain(f"{name}.weights_proj.weight", heads, args["dim"], dtype=F32)


def _v3_mlp(name: str, args: Args, width: int) -> Parameters:
    result = _v3_linear(f"{name}.w1", width, args["dim"], args) | _v3_linear(f"{name}.w3", width, args["dim"], args)
    return result | _v3_linear(f"{name}.w2", args["dim"], width, args)


def _v3_experts(name: str, args: Args, ranks: int, rank: int, *, has_bias: bool) -> Parameters:
    experts, width = args["n_routed_experts"], args["moe_inter_dim"]
    result = plain(f"{name}.gate.weight", experts, args["dim"])
    if has_bias:
        result |= plain(f"{name}.gate.bias", experts, dtype=F32)
    for expert in local_experts(experts, ranks, rank):
        result |= _v3_mlp(f"{name}.experts.{expert}", args, width)
    return result | _v3_mlp(f"{name}.shared_experts", args, args["n_shared_experts"] * width // ranks)
