"""Packed weights made by hand: codes and scales drawn, packed word by word as each library does it, and dequantized by
torch as each library does it. Independent of the package.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

RANDOM = np.random.default_rng(26)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""As compressed-tensors and transformers have it; ModelOpt's has plus zero at 8."""

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}

Integers = NDArray[np.int64]


class Stored(NamedTuple):
    """A packed weight as it lies in files, and what its library makes of it."""

    tensors: Mapping[str, torch.Tensor]
    """By the end of their names."""
    result: torch.Tensor
    """BF16."""


def draw_codes(bits: int, *shape: int) -> Integers:
    """Every code, in an order that nobody knows."""
    size = int(np.prod(shape))
    codes = np.concatenate([np.arange(1 << bits), RANDOM.integers(0, 1 << bits, size)])[:size]
    return RANDOM.permutation(codes).reshape(shape)


def draw_scales(dtype: str, *shape: int) -> torch.Tensor:
    """Scales of many sizes, some negative, and of each that is none or is too large."""
    values = torch.from_numpy(np.exp2(RANDOM.uniform(-12, 4, shape)) * RANDOM.choice([1, 1, 1, -1], shape))
    odd = torch.tensor([float("nan"), float("inf"), 6e4, 1e-8, 0.0])
    flat = values.reshape(-1)
    flat[: min(5, flat.numel() // 4)] = odd[: flat.numel() // 4]
    flat = flat[torch.from_numpy(RANDOM.permutation(flat.numel()))]
    return flat.reshape(shape).float().to(TORCH_DTYPES[dtype])


def pack_words(codes: Integers, bits: int, axis: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """Words of 32 bits, each with as many codes along an axis as it holds, the first in its low end: code `order[i]`
    of them at place i.
    """
    per_word = 32 // bits
    codes = np.moveaxis(codes, axis, -1)
    room = -(-codes.shape[-1] // per_word) * per_word
    padded = np.zeros((*codes.shape[:-1], room), np.int64)
    padded[..., : codes.shape[-1]] = codes
    words = np.zeros((*codes.shape[:-1], room // per_word), np.int64)
    for place in range(per_word):
        words |= padded[..., (order or range(per_word))[place] :: per_word] << (place * bits)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis).astype(np.uint32).view(np.int32)))


def pack_bytes(codes: Integers) -> torch.Tensor:
    """Two codes of four bits in a byte, the first in its low half."""
    return torch.from_numpy((codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8))


def make_integers(
    rows: int, columns: int, bits: int, dtype: str, group: int = 0, *, has_zeros: bool, has_order: bool = False
) -> Stored:
    """compressed-tensors, pack-quantized: (code - zero) * scale in the dtype of the scales. No group: one a row."""
    groups = columns // group if group else 1
    codes, scales = draw_codes(bits, rows, columns), draw_scales(dtype, rows, groups)
    zeros = draw_codes(bits, rows, groups) if has_zeros else np.full((rows, groups), 1 << (bits - 1))
    order = RANDOM.permutation(np.arange(columns) // (group or columns)) if has_order else None
    which = torch.from_numpy(order if has_order else np.arange(columns) // (group or columns))
    offset = 1 << (bits - 1)
    signed = torch.from_numpy(codes - offset).to(torch.int8).to(scales.dtype)
    shift = torch.from_numpy(zeros - offset).to(torch.int8).to(scales.dtype)
    made = (signed - shift[:, which]) * scales[:, which]
    tensors = {"weight_packed": pack_words(codes, bits, 1), "weight_scale": scales}
    tensors |= {"weight_shape": torch.tensor([rows, columns])}
    tensors |= {"weight_zero_point": pack_words(zeros, bits, 0)} if has_zeros else {}
    tensors |= {"weight_g_idx": which.to(torch.int32)} if has_order else {}
    return Stored(tensors, made.to(torch.bfloat16))


def make_nvfp4(rows: int, columns: int, *, divides: bool) -> Stored:
    """NVFP4 of ModelOpt, or of compressed-tensors, which divides: in float32."""
    codes = draw_codes(4, rows, columns)
    scales = draw_scales("F8_E4M3", rows, columns // 16)
    # With these the order of the operations shows, though all is rounded to BF16.
    factor = torch.tensor([658.7380981445312]) if divides else torch.tensor(0.4496527314186096 / 1024)
    values = E2M1[torch.from_numpy(codes)] + (0.0 if not divides else -0.0)  # which makes plus zero of minus zero
    each = scales.float() / factor if divides else scales.float() * factor
    made = (values.reshape(rows, -1, 16) * each.unsqueeze(-1)).reshape(rows, columns).to(torch.bfloat16)
    names = ("weight_packed", "weight_global_scale") if divides else ("weight", "weight_scale_2")
    tensors = {names[0]: pack_bytes(codes), "weight_scale": scales, names[1]: factor}
    return Stored({**tensors, "input_global_scale" if divides else "input_scale": torch.ones(1)}, made)


def draw_powers(*shape: int) -> torch.Tensor:
    """E8M0: all but the two ends, for which see `make_experts`."""
    return torch.from_numpy(RANDOM.integers(1, 255, shape).astype(np.uint8))


def make_experts(experts: int, outer: int, inner: int) -> Stored:
    """Experts of gpt-oss, as transformers dequantizes them: torch.ldexp in BF16, then transposed. Of a scale of 255,
    which transformers takes for 2^128, the OCP says that it is none.
    """
    codes, scales = draw_codes(4, experts, outer, inner), draw_powers(experts, outer, inner // 32)
    scales.view(-1)[:2] = torch.tensor([0, 255], dtype=torch.uint8)
    values = E2M1.bfloat16()[torch.from_numpy(codes)].reshape(experts, outer, -1, 32)
    made = torch.ldexp(values, (scales.int() - 127).unsqueeze(-1)).to(torch.bfloat16)
    made = torch.where((scales == 255).unsqueeze(-1), torch.nan, made)
    blocks = pack_bytes(codes).reshape(experts, outer, inner // 32, 16)
    result = made.reshape(experts, outer, inner).transpose(1, 2).contiguous()
    return Stored({"_blocks": blocks, "_scales": scales}, result)


def make_mxfp4(rows: int, columns: int) -> Stored:
    """Rows in MXFP4, of compressed-tensors: code * scale in BF16."""
    codes, scales = draw_codes(4, rows, columns), draw_powers(rows, columns // 32)
    powers = 2.0 ** (scales.int() - 127).to(torch.bfloat16)
    values = E2M1.bfloat16()[torch.from_numpy(codes)].reshape(rows, -1, 32)
    return Stored(
        {"weight_packed": pack_bytes(codes), "weight_scale": scales},
        (values * powers.unsqueeze(-1)).reshape(rows, columns),
    )


def make_fp8(rows: int, columns: int, dtype: str, *, each_row: bool) -> Stored:
    """FP8 with a scale for each row, or one: code * scale in the dtype of the scales."""
    codes = torch.from_numpy(draw_codes(8, rows, columns).astype(np.uint8)).view(torch.float8_e4m3fn)
    scales = draw_scales(dtype, rows, 1) if each_row else torch.tensor([0.0123]).to(TORCH_DTYPES[dtype])
    made = (codes.to(scales.dtype) * scales).to(torch.bfloat16)
    return Stored({"weight": codes, "weight_scale": scales, "input_scale": torch.ones(1)}, made)


def make_awq(rows: int, columns: int, dtype: str, group: int) -> Stored:
    """AutoAWQ, gemm: words along the rows of the result, in their own order."""
    codes, zeros = draw_codes(4, columns, rows), draw_codes(4, columns // group, rows)
    scales = draw_scales(dtype, columns // group, rows)
    difference = torch.from_numpy(codes).to(torch.int8) - torch.from_numpy(zeros).to(torch.int8).repeat_interleave(
        group, dim=0
    )
    made = (difference * scales.repeat_interleave(group, dim=0)).to(torch.bfloat16)
    words = {"qweight": pack_words(codes, 4, 1, AWQ_ORDER), "qzeros": pack_words(zeros, 4, 1, AWQ_ORDER)}
    return Stored({**words, "scales": scales}, made.T.contiguous())


def make_gptq(
    rows: int, columns: int, bits: int, dtype: str, group: int, *, is_v2: bool, has_order: bool = True
) -> Stored:
    """GPTQModel: words along the columns of the result; with an order, as `desc_act` makes it."""
    groups = -(-columns // group)
    codes, zeros = draw_codes(bits, columns, rows), draw_codes(bits, groups, rows)
    scales = draw_scales(dtype, groups, rows)
    order = RANDOM.permutation(np.arange(columns) // group) if has_order else np.arange(columns) // group
    which = torch.from_numpy(order)
    difference = torch.from_numpy(codes).to(torch.int16) - torch.from_numpy(zeros).to(torch.int16)[which]
    made = (scales[which] * difference).to(torch.bfloat16)
    words = pack_words(zeros, bits, 1).numpy().view(np.uint32)
    if not is_v2:  # as convert_gptq_v2_to_v1_format does it: word by word, with borrows
        words = words - np.uint32(0x11111111 if bits == 4 else 0x01010101)
    qzeros = torch.from_numpy(words.view(np.int32))
    tensors = {"qweight": pack_words(codes, bits, 0), "qzeros": qzeros, "scales": scales}
    return Stored({**tensors, **({"g_idx": which.to(torch.int32)} if has_order else {})}, made.T.contiguous())


def save_packed(path: Path, weights: Mapping[str, Stored], others: Mapping[str, torch.Tensor] | None = None) -> None:
    """Writes packed weights into one file, by the names of their modules (of experts, of the weights)."""
    tensors = {
        f"{module}{'' if end.startswith('_') else '.'}{end}": tensor.contiguous()
        for module, stored in weights.items()
        for end, tensor in stored.tensors.items()
    }
    save_file({**tensors, **(others or {})}, path)
