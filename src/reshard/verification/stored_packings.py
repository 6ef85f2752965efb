"""Finds packed weights by the names, dtypes and shapes of stored tensors, and by the quantization that a config tells
of. Opens no file, and shares no code with `sources`, which finds them for a conversion.

    X.weight_packed, X.weight_scale, ...   compressed-tensors      X.weight, X.weight_scale, ...   ModelOpt, FP8
    X.qweight, X.qzeros, X.scales, ...     AWQ, GPTQ               X_blocks, X_scales              experts in MXFP4
"""

import re
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

from reshard.formats.safetensors import BITS
from reshard.types import PACKED, Checkpoint, Packed, Tensor

Tensors = Mapping[str, Tensor]

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Config keys of most quantizers, of old compressed-tensors, and of MLX."""

WORD = 32
"""Bits of a word of integers."""

FLOATS = ("F32", "F16", "BF16")

FP4_GROUP, NVFP4_GROUP = 32, 16
"""Columns of MXFP4 and of NVFP4 that share a scale."""


def find_packed_weights(stored: Checkpoint) -> Iterator[Packed]:
    """Finds the packed weights of a checkpoint. Tensors whose partners are missing, or do not fit, are none."""
    table = find_quantization(stored.config or {})
    for name, codes in stored.tensors.items():
        for end, find in FINDERS.items():
            packed = find(name.removesuffix(end), codes, stored.tensors, table) if name.endswith(end) else None
            if packed:
                yield packed


def find_quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Finds what a config says of a quantization; empty if nothing."""
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, Mapping) else {}):
        for key in QUANTIZATION_KEYS:
            if isinstance(table := place.get(key), Mapping):
                return table
    return {}


def make_result(name: str, *shape: int) -> Tensor:
    """The weight as the model has it. Its file is not known here."""
    return Tensor(name, "BF16", shape, PACKED, 0, prod(shape) * BITS["BF16"] // 8)


def find_compressed_weight(module: str, codes: Tensor, tensors: Tensors, table: Mapping[str, Any]) -> Packed | None:
    """Finds a weight of compressed-tensors, by its `X.weight_packed`: integers in words, or FP4 in bytes."""
    scales, name = tensors.get(f"{module}.weight_scale"), f"{module}.weight"
    if scales is None or len(codes.shape) != 2:
        return None
    if codes.dtype == "U8":
        factor = tensors.get(f"{module}.weight_global_scale")
        return make_fp4_rows(name, codes, scales, "nvfp4-divided", factor)
    scheme = choose_integer_scheme(module, codes, scales, table) if codes.dtype == "I32" else None
    if scheme is None:
        return None
    bits, group, columns = scheme
    rows, is_one = codes.shape[0], scales.shape in ((), (1,))
    scales = scales._replace(shape=(1, 1)) if is_one else scales
    zeros, order = (tensors.get(f"{module}.{end}") for end in ("weight_zero_point", "weight_g_idx"))
    return Packed("integers", codes, scales, zeros, None, order, bits, group, make_result(name, rows, columns))


def make_fp4_rows(name: str, codes: Tensor, scales: Tensor, packing: str, factor: Tensor | None) -> Packed | None:
    """Makes a weight of FP4, two codes in a byte: NVFP4 (`packing`) with a factor, else MXFP4, with dtypes that tell
    what it is.
    """
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    result = make_result(name, rows, columns)
    if factor and scales.shape == (rows, -(-columns // NVFP4_GROUP)):
        return Packed(packing, codes, scales, None, factor, None, 4, NVFP4_GROUP, result)
    if not factor and scales.dtype == "U8" and scales.shape == (rows, -(-columns // FP4_GROUP)):
        told = codes._replace(dtype="I8"), scales._replace(dtype="F8_E8M0")
        return Packed("mxfp4", *told, None, None, None, 4, FP4_GROUP, result)
    return None


def choose_integer_scheme(
    module: str, codes: Tensor, scales: Tensor, table: Mapping[str, Any]
) -> tuple[int, int, int] | None:
    """Chooses bits, columns of a group, and columns of a weight of compressed-tensors: by the group of the config that
    names its module, else by one for modules of its class; only those that fit the shapes. None if none does.
    """
    groups = table.get("config_groups")
    listed = [one for one in groups.values() if isinstance(one, Mapping)] if isinstance(groups, Mapping) else []
    in_row = scales.shape[-1] if len(scales.shape) > 1 else 1
    listed = listed or [{"weights": {"num_bits": 4, "group_size": codes.shape[1] * 8 // max(1, in_row)}}]
    for one in sorted(listed, key=lambda one: not is_among_targets(module, one.get("targets"))):
        scheme = one.get("weights")
        told: Mapping[str, Any] = scheme if isinstance(scheme, Mapping) else {}
        bits, size = told.get("num_bits"), told.get("group_size")
        if bits not in (4, 8):
            continue
        columns = codes.shape[1] * WORD // bits
        if type(size) is int and size > 0 and told.get("strategy") in ("group", None):
            columns = in_row * size
        elif in_row == 1:
            size = columns
        if type(size) is int and in_row * size == columns and -(-columns * bits // WORD) == codes.shape[1]:
            return bits, size, columns
    return None


def is_among_targets(module: str, targets: Any) -> bool:
    """Whether targets of compressed-tensors name a module itself, or match it, and not by its class only."""
    named = [one for one in targets if isinstance(one, str)] if isinstance(targets, list) else []
    return any(re.match(one[3:], module) if one.startswith("re:") else one == module for one in named)


def find_scaled_weight(module: str, codes: Tensor, tensors: Tensors, _: Mapping[str, Any]) -> Packed | None:
    """Finds a weight with scales beside it, by its `X.weight`: NVFP4 of ModelOpt; FP8 with one scale, or one a row."""
    scales, name = tensors.get(f"{module}.weight_scale"), f"{module}.weight"
    if scales is None or len(codes.shape) != 2:
        return None
    if codes.dtype == "U8":
        return make_fp4_rows(name, codes, scales, "nvfp4", tensors.get(f"{module}.weight_scale_2"))
    rows, width = codes.shape
    is_one_a_row = scales.shape[1:] in ((), (1,)) and prod(scales.shape) in (1, rows)
    if codes.dtype == "F8_E4M3" and scales.dtype in FLOATS and is_one_a_row:
        column = scales._replace(shape=(prod(scales.shape), 1))
        return Packed("fp8", codes, column, None, None, None, 8, width, make_result(name, rows, width))
    return None


def find_turned_weight(module: str, codes: Tensor, tensors: Tensors, table: Mapping[str, Any]) -> Packed | None:
    """Finds a weight of AWQ or GPTQ, by its `X.qweight`. Words of AWQ go along the rows of the result, which its scales
    count one by one; those of GPTQ along the columns.
    """
    zeros, scales = (tensors.get(f"{module}.{end}") for end in ("qzeros", "scales"))
    if zeros is None or scales is None or len(codes.shape) != 2 or len(scales.shape) != 2 or not scales.size:
        return None
    groups, rows = scales.shape
    name = f"{module}.weight"
    order = tensors.get(f"{module}.g_idx")
    if codes.shape[1] * 8 == rows:
        columns = codes.shape[0]
        result = make_result(name, rows, columns)
        return Packed("awq", codes, scales, zeros, None, order, 4, columns // groups, result)
    said = table.get("bits")
    columns = prod(order.shape) if order else codes.shape[0] * WORD // said if said in (4, 8) else 0
    fitting = [bits for bits in (4, 8) if -(-columns * bits // WORD) == codes.shape[0]]
    if codes.shape[1] != rows or not fitting:
        return None
    size = table.get("group_size")
    is_told = type(size) is int and size > 0 and -(-columns // size) == groups
    kind = table.get("checkpoint_format") or table.get("format")
    return Packed(
        "gptq-v2" if kind == "gptq_v2" else "gptq",
        *(codes, scales, zeros, None, order),
        fitting[0],
        size if is_told and type(size) is int else -(-columns // groups),
        make_result(name, rows, columns),
    )


def find_expert_weights(name: str, codes: Tensor, tensors: Tensors, _: Mapping[str, Any]) -> Packed | None:
    """Finds the experts of a layer in MXFP4, by their `X_blocks` [experts, out, in / 32, 16]: each is transposed."""
    scales = tensors.get(f"{name}_scales")
    if scales is None or len(codes.shape) != 4 or (*scales.shape, FP4_GROUP // 2) != codes.shape:
        return None
    experts, outer, groups = scales.shape
    result = make_result(name, experts, groups * FP4_GROUP, outer)
    return Packed("mxfp4-experts", codes, scales, None, None, None, 4, FP4_GROUP, result)


Find = Callable[[str, Tensor, Tensors, Mapping[str, Any]], Packed | None]

FINDERS: Mapping[str, Find] = {
    ".weight_packed": find_compressed_weight,
    ".weight": find_scaled_weight,
    ".qweight": find_turned_weight,
    "_blocks": find_expert_weights,
}
"""By the end of the name of the codes of a weight, with what is found the rest of it."""
