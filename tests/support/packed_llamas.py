"""Small Llamas whose projections lie packed, as each library writes them, with the BF16 that the library makes of them.

Arithmetic is torch's, in the dtypes in which the libraries multiply. Each weight's parts lie in several
files. Sizes are odd where the format allows it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from made_once import make_once
from packed_weights import AWQ_ORDER, E2M1, pack_bytes, pack_words
from safetensors.torch import save_file

HIDDEN, INNER, VOCABULARY, LAYERS = 128, 320, 96, 11

CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
"""The parts of a weight, by the ends of their names behind that of the module; and its values in BF16."""


def list_shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes of the plain weights."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        shapes |= {f"{start}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        shapes |= {f"{start}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{start}self_attn.{name}_proj.weight": (HIDDEN // 2, HIDDEN) for name in "kv"}
        shapes |= {f"{start}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{start}mlp.down_proj.weight"] = HIDDEN, INNER
    return shapes


def pack_integers(
    shape: tuple[int, int],
    bits: int = 4,
    group: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    *,
    has_zeros: bool = False,
    is_in_order: bool = True,
) -> Packed:
    """compressed-tensors: the value is made in the dtype of the scale."""
    rows, columns = shape
    group = group or columns
    codes, scales = torch.randint(2**bits, shape), (torch.rand(rows, columns // group) * 0.01 + 0.001).to(dtype)
    groups = torch.arange(columns) // group
    parts = {
        ".weight_packed": pack_words(codes.numpy(), bits, 1),
        ".weight_scale": scales,
        ".weight_shape": torch.tensor([rows, columns]),
    }
    zeros = torch.full((rows, columns // group), 2 ** (bits - 1))
    if has_zeros:
        zeros = torch.randint(2**bits, zeros.shape)
        parts[".weight_zero_point"] = pack_words(zeros.numpy(), bits, 0)
    if not is_in_order:
        groups = groups[torch.randperm(columns)]
        parts[".weight_g_idx"] = groups.to(torch.int32)
    return parts, ((codes - zeros[:, groups]).to(dtype) * scales[:, groups]).to(torch.bfloat16)


def pack_awq(shape: tuple[int, int], group: int = 64) -> Packed:
    rows, columns = shape
    codes, zeros = torch.randint(16, shape), torch.randint(16, (rows, columns // group))
    scales = (torch.rand(rows, columns // group) * 0.01).half()

    groups = torch.arange(columns) // group
    words, zero_words = (pack_words(matrix.T.numpy(), 4, 1, AWQ_ORDER) for matrix in (codes, zeros))
    parts = {".qweight": words, ".qzeros": zero_words, ".scales": scales.T.contiguous()}
    return parts, ((codes - zeros[:, groups]).half() * scales[:, groups]).to(torch.bfloat16)


def pack_gptq(shape: tuple[int, int], bits: int = 4, *, is_v2: bool = False, is_in_order: bool = True) -> Packed:
    rows, columns = shape
    codes, zeros = torch.randint(2**bits, shape), torch.randint(1, 2**bits, (rows, columns // 64))
    scales, groups = (torch.rand(rows, columns // 64) * 0.01).half(), torch.arange(columns) // 64
    groups = groups if is_in_order else groups[torch.randperm(columns)]
    parts = {
        ".qweight": pack_words(codes.T.numpy(), bits, 0),
        ".qzeros": pack_words((zeros - int(not is_v2)).T.numpy(), bits, 1),
        ".scales": scales.T.contiguous(),
        ".g_idx": groups.to(torch.int32),
    }
    return parts, ((codes - zeros[:, groups]).half() * scales[:, groups]).to(torch.bfloat16)


def pack_nvfp4(shape: tuple[int, int], *, is_divided: bool) -> Packed:
    """ModelOpt multiplies by the scale of the whole weight, compressed-tensors divides by it."""
    rows, columns = shape
    codes = torch.randint(16, shape)
    scales = (torch.rand(rows, columns // 16) * 400).to(torch.float8_e4m3fn)
    factor = torch.tensor([3000.0 if is_divided else 0.0003])
    whole = scales.float() / factor if is_divided else scales.float() * factor
    # ModelOpt's table has no minus zero.
    numbers = E2M1[codes] if is_divided else E2M1[codes] + 0.0
    values = (numbers * whole.repeat_interleave(16, 1)).to(torch.bfloat16)
    if is_divided:
        parts = {".weight_packed": pack_bytes(codes.numpy()), ".weight_global_scale": factor}
        return {**parts, ".weight_scale": scales, ".input_global_scale": torch.ones(1)}, values
    parts = {".weight": pack_bytes(codes.numpy()), ".weight_scale_2": factor[0].clone()}
    return {**parts, ".weight_scale": scales, ".input_scale": torch.tensor(1.0)}, values


def pack_mxfp4(shape: tuple[int, int]) -> Packed:
    rows, columns = shape
    codes, scales = torch.randint(16, shape), torch.randint(100, 140, (rows, columns // 32))
    values = E2M1[codes] * torch.exp2(scales.float() - 127).repeat_interleave(32, 1)
    return {".weight_packed": pack_bytes(codes.numpy()), ".weight_scale": scales.to(torch.uint8)}, values.to(
        torch.bfloat16
    )


def pack_fp8(shape: tuple[int, int], *, has_rows: bool) -> Packed:
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(shape[0], 1) if has_rows else torch.rand(())
    parts = {".weight": weight, ".weight_scale": scale, ".input_scale": torch.ones(())}
    return parts, (weight.float() * scale).to(torch.bfloat16)


def describe_groups(form: str, **weights: Any) -> dict[str, Any]:
    """A config of compressed-tensors."""
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


class Kind(NamedTuple):
    """A packing, and what a config tells of it."""

    pack: Callable[[tuple[int, int]], Packed]
    config: Mapping[str, Any] | None


KINDS: Mapping[str, Kind] = {
    "int4": Kind(pack_integers, describe_groups("pack-quantized", num_bits=4, group_size=32, symmetric=True)),
    "int4-zeros": Kind(lambda shape: pack_integers(shape, group=64, has_zeros=True, is_in_order=False), None),
    "int8": Kind(
        lambda shape: pack_integers(shape, 8, 0, torch.float32),
        describe_groups("pack-quantized", num_bits=8, group_size=None, strategy="channel", symmetric=True),
    ),
    "int8-zeros": Kind(
        lambda shape: pack_integers(shape, 8, dtype=torch.float16, has_zeros=True),
        describe_groups("pack-quantized", num_bits=8, group_size=32, symmetric=False),
    ),
    "awq": Kind(pack_awq, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}),
    "gptq": Kind(
        lambda shape: pack_gptq(shape, is_in_order=False),
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": False},
    ),
    "gptq-v2": Kind(
        lambda shape: pack_gptq(shape, 8, is_v2=True),
        {"quant_method": "gptq", "bits": 8, "group_size": 64, "checkpoint_format": "gptq_v2"},
    ),
    "nvfp4": Kind(
        lambda shape: pack_nvfp4(shape, is_divided=False), {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    ),
    "nvfp4-divided": Kind(
        lambda shape: pack_nvfp4(shape, is_divided=True),
        describe_groups("nvfp4-pack-quantized", num_bits=4, group_size=16, type="float"),
    ),
    "mxfp4": Kind(pack_mxfp4, describe_groups("mxfp4-pack-quantized", num_bits=4, group_size=32, type="float")),
    "fp8": Kind(lambda shape: pack_fp8(shape, has_rows=False), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8-rows": Kind(
        lambda shape: pack_fp8(shape, has_rows=True),
        describe_groups("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
}


@make_once
def write_packed(folder: Path, /, kind: str, *, files: int = 3) -> None:
    """Writes a packed Llama into `folder/packed`, and the same in BF16 into `folder/plain`."""
    torch.manual_seed(3)
    pack, table = KINDS[kind]
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, shape in list_shapes().items():
        if len(shape) == 2 and "proj" in name:
            parts, plain[name] = pack((shape[0], shape[1]))
            stored |= {name.removesuffix(".weight") + end: part for end, part in parts.items()}
        else:
            stored[name] = plain[name] = torch.randn(shape).to(torch.bfloat16)
    write_files(folder / "packed", stored, files)
    write_files(folder / "plain", plain, 1)
    (folder / "plain" / "config.json").write_text(json.dumps(CONFIG))
    told = {**CONFIG, "quantization_config": table} if table else CONFIG
    (folder / "packed" / "config.json").write_text(json.dumps(told))
    (folder / "packed" / "quantize_config.json").write_text(json.dumps(table or {}))


def write_files(folder: Path, tensors: Mapping[str, torch.Tensor], files: int) -> None:
    """Writes tensors in turn into so many files, with an index; into `model.safetensors`, if it is one."""
    folder.mkdir(parents=True)
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        chosen = list(tensors)[number::files]
        save_file({key: tensors[key].contiguous() for key in chosen}, folder / name)
        places |= dict.fromkeys(chosen, name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
