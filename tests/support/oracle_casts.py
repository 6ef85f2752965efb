"""Casts of quantized weights, written plainly for the tests to compare with; it imports nothing of the package.

A block scale serves a square of its weight; the scale of a FP4 weight serves 32 columns of one row.
"""

from pathlib import Path

import oracle
import torch
from torch import Tensor

# The value of each 4-bit code. Code 8 is minus zero, of which DeepSeek's script makes plus zero.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP4_GROUP = 32

# The tensors of tests are so small that threads wait for one another longer than they work.
torch.set_num_threads(1)


def dequantize(weight: Tensor, scale: Tensor, block: int) -> Tensor:
    """Return the BF16 weight: the float32 product of each code and the scale of its block, rounded once more."""
    rows, columns = weight.shape
    if tuple(scale.shape) != (-(-rows // block), -(-columns // block)):
        raise ValueError(f"scale {tuple(scale.shape)} does not fit weight {tuple(weight.shape)} in blocks of {block}")
    by_element = scale.float().repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (weight.float() * by_element[:rows, :columns]).bfloat16()


def cast_to_bf16(source: Path) -> dict[str, Tensor]:
    """Return a whole checkpoint under its own names, with every F8 weight as BF16 and without their scales.

    FP4 weights, which are I8 tensors, stay as they are and so do their scales. An engram table is an error.
    """
    tensors = oracle.load_tensors(source, ())
    block = oracle.block_size(source)
    result = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = result.pop(scale_name(name, tensors))
            result[name] = dequantize(tensor, scale, block)
    return result


def scale_name(weight_name: str, tensors: dict[str, Tensor]) -> str:
    """Return the name of the scale of a weight, in the spelling of V3 or in that of V4."""
    for name in (f"{weight_name}_scale_inv", weight_name.removesuffix(".weight") + ".scale"):
        if name in tensors:
            return name
    raise ValueError(f"{weight_name} has no scale")


def unpack_fp4(packed: Tensor) -> Tensor:
    """Return the float32 values [rows, columns] of an I8 tensor [rows, columns / 2]; the low half-byte comes first."""
    values = torch.tensor(FP4_VALUES)
    codes = packed.view(torch.uint8).int()
    result = torch.empty(packed.size(0), packed.size(1) * 2)
    result[:, 0::2] = values[codes % 16]
    result[:, 1::2] = values[codes // 16]
    return result


def fp4_to_fp8(packed: Tensor, scale: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the F8_E4M3 codes [rows, columns] and one E8M0 scale a block, as DeepSeek's script computes them.

    The new scale is a 64th of the block's largest, since 6 * 64 still fits E4M3. Products are exact unless a group's
    scale is less than the largest by 2^14; `is_exact_cast` tells.
    """
    values = unpack_fp4(packed)
    rows, columns = values.shape
    if rows % block != 0 or columns % block != 0:
        raise ValueError(f"{rows}x{columns} is not made of whole blocks of {block}")
    new_scale = torch.empty(rows // block, columns // block)
    for row in range(0, rows, block):
        for column in range(0, columns, block):
            square = (slice(row, row + block), slice(column, column + block))
            groups = scale[row : row + block, column // FP4_GROUP : (column + block) // FP4_GROUP].float()
            largest = groups.max()
            new_scale[row // block, column // block] = largest / 64
            values[square] *= (groups / (largest / 64)).repeat_interleave(FP4_GROUP, 1)
    return values.to(torch.float8_e4m3fn), new_scale.to(torch.float8_e8m0fnu)


def is_exact_cast(packed: Tensor, scale: Tensor, codes: Tensor, new_scale: Tensor) -> bool:
    """Say whether FP8 codes and scales stand for the very values of the FP4 ones, in float64."""
    block = codes.size(0) // new_scale.size(0)
    before = unpack_fp4(packed).double() * scale.double().repeat_interleave(FP4_GROUP, 1)
    after = codes.double() * new_scale.double().repeat_interleave(block, 0).repeat_interleave(block, 1)
    return torch.equal(before, after)
