"""Kernels that compute packed weights in BF16, bit by bit as the library of each format does; pure functions on arrays.

Each works on a box, any rectangle of a matrix, and writes BF16 bit patterns. Rows of `out` are contiguous; it may be a
view of any bytes. A kernel needs a few MiB of memory of its own, however large the box. NaN is 0x7FC0.
"""

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.code_tables import (
    CodeArray,
    FloatArray,
    HalfArray,
    decode_scales,
    make_fp4_products,
    make_fp8_values,
)
from reshard.casts.kernels import (
    FP4_GROUP,
    Recode,
    RowsColumns,
    recode,
    require_fitting_shapes,
    split_rows_by_size,
)
from reshard.casts.packed_layouts import require_shape
from reshard.casts.packed_loops import compile_loop
from reshard.casts.rounding import round_finite, round_tile

TILE_ELEMENTS = 1 << 15
"""In elements, worked on at once: indices, products and their rounding fit the second-level cache of a core."""

BAND_ELEMENTS = 1 << 18
"""In elements: the scales of so many are decoded at once."""

SHORT_RUN = 8
"""In columns: for runs of one group shorter than this, scales are looked up column by column."""

NVFP4_GROUP = 16
"""In elements: columns of NVFP4 that share a scale."""

EXPERT_TILE = (256, 512)
"""Rows and columns that change places at once, within the second-level cache."""

GroupArray = NDArray[np.int32]

Multiply = Callable[[CodeArray, int, FloatArray, FloatArray, GroupArray, int, HalfArray], None]
"""Called with codes, bits, scales, zeros, groups, half and out: see `multiply_codes`."""


def choose_multiply() -> Multiply:
    """The function to pass as `run`: with compiled loops where numba is installed, else `multiply_codes`; of the same
    bits.
    """
    return multiply_codes if compile_loop(4, 0, is_ordered=True) is None else multiply_compiled


def dequantize_integers(
    codes: CodeArray,
    bits: int,
    scales: NDArray[Any],
    scale_dtype: str,
    zeros: CodeArray | None,
    groups: GroupArray,
    out: HalfArray,
    run: Multiply | None = None,
) -> None:
    """Computes (code - zero) * scale of codes [rows, columns * bits / 8] of 4 or 8 bits, into BF16 [rows, columns].

    The even column is in the low half of a byte. `groups` [columns] says which of the k scales of its row each column
    has, in any order. `scales` [rows, k] are BF16 or F16 bit patterns (uint16), or float32; `zeros` [rows, k] are
    uint8, or None if all are 2^(bits - 1).

    The product is rounded to the dtype of the scale, as libraries compute in it, and then, if that is not BF16, to
    BF16. So do compressed-tensors 0.20.1 (`dequantize`; pack-quantized), AutoAWQ 0.2.9 (`dequantize_gemm`) and
    GPTQModel 7.7.0 (`dequantize_weight`; its `convert_gptq_file` instead multiplies in float32). The difference of code
    and zero is exact in each dtype, and never minus zero.
    """
    columns, spare = out.shape[1], out.shape[1] * bits // 4 % 2
    require_shape(codes, (out.shape[0], -(-columns * bits // 8)))
    require_shape(scales, (out.shape[0], scales.shape[1]))
    if zeros is not None:
        require_shape(zeros, scales.shape)
    if groups.shape != (columns,) or (columns and not 0 <= groups.min() <= groups.max() < scales.shape[1]):
        raise ValueError(f"columns [{columns}] of groups {groups.shape} do not fit scales {scales.shape}")
    groups = np.ascontiguousarray(np.append(groups, groups[-1:]) if spare else groups, np.int32)
    for band in split_rows_by_size(out.shape, BAND_ELEMENTS):
        here, factors = out[band], decode_float_scales(scales[band], scale_dtype)
        shifts = np.full_like(factors, 1 << (bits - 1)) if zeros is None else zeros[band].astype(np.float32)
        whole = here if here.flags.c_contiguous and not spare else np.empty((len(here), columns + spare), np.uint16)
        half = choose_half(scales[band], scale_dtype)
        finite = np.isfinite(factors).all()  # else products may be NaN, which loops do not look for
        (run or multiply_codes if finite else multiply_codes)(codes[band], bits, factors, shifts, groups, half, whole)
        if whole is not here:
            here[:] = whole[:, :columns]


def multiply_compiled(
    codes: CodeArray, bits: int, scales: FloatArray, zeros: FloatArray, groups: GroupArray, half: int, out: HalfArray
) -> None:
    """Does what `multiply_codes` does, with compiled loops, for scales that are finite."""
    each = 8 // bits
    edges = find_edges(groups)
    is_ordered = len(edges) * SHORT_RUN <= len(groups) and not np.any(edges % each)
    loop = compile_loop(bits, half, is_ordered=is_ordered)
    if loop is None:
        raise ModuleNotFoundError("numba")
    places = np.ascontiguousarray(groups[edges[:-1]]) if is_ordered else groups
    loop(codes, zeros, scales, places, edges // each, out.view(np.uint32) if each == 2 else out)


def multiply_codes(
    codes: CodeArray, bits: int, scales: FloatArray, zeros: FloatArray, groups: GroupArray, half: int, out: HalfArray
) -> None:
    """Writes (code - zero) * scale of codes [rows, bytes], rounded to BF16, into contiguous `out`; an even number of
    columns if there are two in a byte.

    `groups` [columns] is as in `dequantize_integers`; `scales` and `zeros` [rows, k] are float32, `half` is as of
    `choose_half`.
    """
    each, shift = 8 // bits, zeros.flat[0] if zeros.size and zeros.min() == zeros.max() else np.float32(0)
    items, finite = make_numbers(bits, float(shift)), bool(np.isfinite(scales).all())
    most = min(TILE_ELEMENTS, out.size)
    indices, numbers, room = np.empty(most, np.intp), np.empty(most, np.float32), np.empty(most, np.uint32)
    for columns, length in split_by_runs(groups, each):
        width, places = columns.stop - columns.start, groups[columns][::length]
        for rows in split_rows_by_size((len(out), width), TILE_ELEMENTS):
            part, size = codes[rows, columns.start // each : columns.stop // each], (rows.stop - rows.start) * width
            np.copyto(indices[: part.size].reshape(part.shape), part)  # take would convert them itself, into new memory
            np.take(items, indices[: part.size], mode="clip", out=numbers[:size].view(items.dtype))
            products = numbers[:size].reshape(len(part), -1, length)
            with np.errstate(all="ignore"):
                if shift == 0:
                    products -= np.take(zeros[rows], places, axis=1)[:, :, None]
                products *= np.take(scales[rows], places, axis=1)[:, :, None]
                round_to_half(numbers[:size], half, room[:size])
            if finite:
                round_finite(numbers[:size].reshape(len(part), width), room[:size], out[rows, columns])
            else:
                round_tile(numbers[:size].reshape(len(part), width), out[rows, columns])


def choose_half(scales: NDArray[Any], dtype: str) -> int:
    """How products with these scales [rows, k] are rounded to float16 first: 0 not at all, 1 none of them is beyond
    its range, 2 some may be.
    """
    if dtype != "F16":
        return 0
    return 1 if (scales & 0x7FFF).max(initial=0) <= 0x5C00 else 2  # 256, of which 255 times are in the range


def round_to_half(products: FloatArray, half: int, room: NDArray[np.uint32]) -> None:
    """Rounds float32 products [elements] to float16 in place, to nearest even; `half` is as of `choose_half`. NaN stays
    NaN. `room` has as many elements.

    A product of an integer and a float16 is a multiple of 2^-24, the step of its subnormal numbers, so none of these is
    rounded.
    """
    if not half:
        return
    bits = products.view(np.uint32)
    np.right_shift(bits, 13, out=room)
    room &= 1
    room += 0xFFF
    bits += room
    bits &= 0xFFFFE000
    if half == 2:  # by where: copyto with a mask takes longer
        products[:] = np.where(np.abs(products) >= 2**16, np.copysign(np.float32(np.inf), products), products)


def decode_float_scales(scales: NDArray[Any], dtype: str) -> FloatArray:
    """BF16 or F16 bit patterns, or float32, as float32, exactly."""
    scales = np.ascontiguousarray(scales)
    if dtype != "F16":
        return decode_scales(scales, dtype)
    with np.errstate(invalid="ignore"):  # by a signalling NaN
        return scales.view(np.float16).astype(np.float32)


@cache
def make_numbers(bits: int, zero: float) -> NDArray[Any]:
    """For each byte [256]: the code of 8 bits, or the two of 4, the low half first, less `zero`. One float32, or two as
    one uint64.
    """
    codes = np.arange(256, dtype=np.float32)[:, None]
    numbers = codes if bits == 8 else np.hstack([codes % 16, codes // 16])
    items: NDArray[Any] = (numbers - np.float32(zero)).view(np.float32 if bits == 8 else np.uint64)[:, 0]
    return items


def find_edges(groups: GroupArray) -> NDArray[np.intp]:
    """Where runs of columns of one group begin, and where the last ends."""
    changes = np.flatnonzero(groups[1:] != groups[:-1]) + 1
    return np.concatenate([np.zeros(1, np.intp), changes, np.full(1, len(groups), np.intp)])


def split_by_runs(groups: GroupArray, each: int) -> Iterator[tuple[slice, int]]:
    """Splits columns into ranges of at most a tile in which every `length` columns share a group; gives both. `length`
    is 1 where groups lie in no order, or begin within a byte of `each` columns.
    """
    edges = find_edges(groups)
    runs = [(length, len(list(same))) for length, same in groupby(np.diff(edges).tolist())]
    if len(runs) > 3 or np.any(edges % each):  # else a part of a group, whole groups, a part of a group
        runs = [(1, len(groups))]
    start = 0
    for run, times in runs:
        stop, length = start + run * times, run if run <= TILE_ELEMENTS else 1
        for first in range(start, stop, TILE_ELEMENTS // length * length):
            yield slice(first, min(first + TILE_ELEMENTS // length * length, stop)), length
        start = stop


def dequantize_nvfp4(
    codes: CodeArray,
    scales: CodeArray,
    factor: float,
    phase: RowsColumns,
    out: HalfArray,
    run: Recode = recode,
    *,
    divides: bool,
) -> None:
    """Multiplies E2M1 pairs [rows, columns / 2] by F8_E4M3 scales of 1 x 16 values and the `factor` of the weight, into
    BF16 [rows, columns].

    The even column is in the low half of a byte; `phase` counts columns, and the first column of the box is even.
    Scale times factor is rounded to float32, then value times that, then to BF16. So does ModelOpt 0.47.0
    (`NVFP4QTensor.dequantize`), where code 8 is zero, not minus zero. compressed-tensors 0.20.1
    (nvfp4-pack-quantized) `divides` the scale by the factor instead, and has minus zero.
    """
    require_fitting_shapes((codes.shape[0], codes.shape[1] * 2), scales, (1, NVFP4_GROUP), phase, out)
    table = make_nvfp4_products(float(np.float32(factor)), divides=divides)
    places = phase[0], phase[1] // 2
    run(codes, scales.astype(np.uint16), (1, NVFP4_GROUP // 2), places, table, out.view(np.uint32))


@lru_cache(maxsize=8)
def make_nvfp4_products(factor: float, *, divides: bool) -> NDArray[np.uint32]:
    """The pairs of BF16 of every F8_E4M3 scale, as `multiply_pairs` has them."""
    with np.errstate(all="ignore"):
        scales = make_fp8_values() / np.float32(factor) if divides else make_fp8_values() * np.float32(factor)
    return multiply_pairs(scales, -0.0 if divides else 0.0)


def multiply_pairs(scales: FloatArray, minus_zero: float) -> NDArray[np.uint32]:
    """For each float32 scale and pair of E2M1 codes [256]: both products in BF16, as one uint32 with the even column in
    its lower half. `minus_zero` is what code 8 stands for.
    """
    sizes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([sizes, -sizes])
    values[8] = minus_zero
    halves = np.empty((len(scales), 16), np.uint16)
    with np.errstate(all="ignore"):
        round_tile(scales[:, None] * values, halves)
    codes = np.arange(256)
    return np.stack([halves[:, codes & 15], halves[:, codes >> 4]], axis=-1).view(np.uint32)[..., 0]


def dequantize_experts(codes: CodeArray, scales: CodeArray, out: HalfArray, run: Recode = recode) -> None:
    """Multiplies E2M1 pairs [rows, columns / 2] by F8_E8M0 scales [rows, columns / 32], into BF16 [columns, rows]: rows
    and columns change places.

    The even column is in the low half of a byte. All products are exact, but for those beyond BF16, which are infinite:
    as transformers 5.24 (`convert_moe_packed_tensors`) has them, for which however a scale of 255 is 2^128. Here it is
    NaN, as the OCP standard of MX formats says.
    """
    rows, columns = codes.shape[0], codes.shape[1] * 2
    require_shape(out, (columns, rows))
    require_shape(scales, (rows, columns // FP4_GROUP))
    products = make_fp4_products(keeps_minus_zero=True)
    for left in range(0, columns, EXPERT_TILE[1]):
        right = min(left + EXPERT_TILE[1], columns)
        for top in range(0, rows, EXPERT_TILE[0]):
            lines = slice(top, min(top + EXPERT_TILE[0], rows))
            part, pages = codes[lines, left // 2 : right // 2], scales[lines, left // FP4_GROUP : right // FP4_GROUP]
            pairs = np.empty(part.shape, np.uint32)
            run(part, pages.astype(np.uint16), (1, FP4_GROUP // 2), (0, 0), products, pairs)
            out[left:right, lines] = pairs.view(np.uint16).T
