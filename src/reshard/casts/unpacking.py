"""Computes any box of a weight that lies packed, reading only the input ranges it needs. Opens no file itself.

Where the codes lie in rows of the weight, the rows of a box are read piece by piece. Where they lie in columns, a strip
of rows is taken out of all columns at once, for strips are many windows long.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.kernels import choose_recode
from reshard.casts.packed_kernels import choose_multiply, dequantize_experts, dequantize_integers, dequantize_nvfp4
from reshard.casts.packed_layouts import (
    spread_awq,
    spread_gptq,
    spread_zeros_awq,
    spread_zeros_gptq,
    spread_zeros_integers,
)
from reshard.casts.shapes import ROWS_TOGETHER, STRIP_SIZE, count_strip_rows, flatten_to_matrix, takes_strips
from reshard.casts.strips import Strip
from reshard.casts.tensor_boxes import CastInputs, ElementBox, Read
from reshard.errors import refuse
from reshard.formats.safetensors import BITS
from reshard.types import Cast, Packed, Tensor

STRIP_MEMORY = 3 * STRIP_SIZE
"""In bytes, for each thread: a strip that is kept with its scales, and what making one takes."""

WORD_BITS = 32

IN_ORDER = -1
"""In an order of columns: it was not set, and the groups lie in order, as compressed-tensors has it."""

PATTERNS = {8: np.uint8, 16: np.uint16, 32: np.uint32}


def compute_unpacked(cast: Cast, box: ElementBox, out: NDArray[Any], inputs: CastInputs) -> None:
    """Computes a box of a weight that lies packed, as BF16 bit patterns [rows, columns]."""
    packed = cast.packed
    if packed is None:
        raise ValueError(f"{cast.result.name} does not lie packed")
    is_transposed = takes_strips(cast)
    pieces = split_at_strips(packed, box) if is_transposed else split_rows_for_reads(packed, box, inputs)
    compute = partial(compute_rows_of_strip, cast.result.file) if is_transposed else compute_rows
    columns = packed.result.shape[-1]
    for top, bottom in pieces:
        part = out[top - box.top : bottom - box.top]
        if (box.left, box.right) == (0, columns):
            compute(packed, top, bottom, part, inputs)
            continue
        rows = np.empty((bottom - top, columns), np.uint16)
        compute(packed, top, bottom, rows, inputs)
        part[:] = rows[:, box.left : box.right]


def split_rows_for_reads(packed: Packed, box: ElementBox, inputs: CastInputs) -> Iterator[tuple[int, int]]:
    """Splits a box into ranges of rows whose codes and scales are each read at once."""
    rows = max(1, flatten_to_matrix(packed.result.shape)[0])
    widest = max(1, packed.codes.size // rows), max(1, packed.scales.size // rows)
    height = max(1, min(inputs.most // widest[0], inputs.most_scales // widest[1]))
    yield from ((top, min(top + height, box.bottom)) for top in range(box.top, box.bottom, height))


def compute_rows(packed: Packed, top: int, bottom: int, out: NDArray[Any], inputs: CastInputs) -> None:
    """Computes whole rows of a weight whose codes lie in rows."""
    height, columns = flatten_to_matrix(packed.result.shape)
    scales = read_rows(inputs.scale, packed.scales, height, top, bottom).copy()
    if packed.packing == "integers":
        groups = find_group_of_columns(packed, inputs)
        zeros = read_zeros_of_rows(packed, top, bottom, inputs)
        codes = read_rows(inputs.weight, packed.codes, height, top, bottom).view(np.uint8)
        used = codes[:, : -(-columns * packed.bits // 8)]
        multiply(packed, used, scales, zeros, groups, out)
        return
    factor = read_factor(packed, inputs)
    codes = read_rows(inputs.weight, packed.codes, height, top, bottom)
    divides = packed.packing == "nvfp4-divided"
    dequantize_nvfp4(codes, scales, factor, (0, 0), out, choose_recode(), divides=divides)


def multiply(
    packed: Packed,
    codes: NDArray[Any],
    scales: NDArray[Any],
    zeros: NDArray[np.uint8] | None,
    groups: NDArray[np.int32],
    out: NDArray[Any],
) -> None:
    """Multiplies integers by scales, which are bit patterns."""
    dtype = packed.scales.dtype
    scales = scales.view(np.float32) if dtype == "F32" else scales
    dequantize_integers(codes, packed.bits, scales, dtype, zeros, groups, out, choose_multiply())


def read_rows(read: Read, tensor: Tensor, height: int, top: int, bottom: int) -> NDArray[Any]:
    """Reads rows of a tensor of `height` rows, as patterns [rows, elements]; a tensor with one row has it for all."""
    own = flatten_to_matrix(tensor.shape)[0]
    patterns = PATTERNS[BITS[tensor.dtype]]
    if own != height or tensor.size == 0:
        row = np.frombuffer(read(tensor, 0, tensor.size), patterns)
        return np.broadcast_to(row, (bottom - top, row.size))
    pitch = tensor.size // height
    return np.frombuffer(read(tensor, top * pitch, (bottom - top) * pitch), patterns).reshape(bottom - top, -1)


def read_zeros_of_rows(packed: Packed, top: int, bottom: int, inputs: CastInputs) -> NDArray[np.uint8] | None:
    """Reads the zero points of some rows, uint8 [rows, groups]: words of compressed-tensors hold several rows."""
    if packed.zeros is None:
        return None
    in_word = WORD_BITS // packed.bits
    first, last = top // in_word, -(-bottom // in_word)
    words = read_rows(inputs.scale, packed.zeros, packed.zeros.shape[0], first, last).view(np.int32)
    return spread_zeros_integers(words, packed.bits)[top - first * in_word :][: bottom - top]


def read_factor(packed: Packed, inputs: CastInputs) -> float:
    """Reads the F32 of a whole weight."""
    if packed.factor is None:
        raise ValueError(f"{packed.result.name} has no scale of the whole weight")
    return float(np.frombuffer(inputs.scale(packed.factor, 0, packed.factor.size), np.float32)[0])


def find_group_of_columns(packed: Packed, inputs: CastInputs) -> NDArray[np.int32]:
    """Finds the group of each column: int32 [columns]. Raises Refused for a group that has no scale."""
    in_order = (np.arange(packed.result.shape[-1], dtype=np.int32)) // packed.group
    if packed.order is None:
        return in_order
    integers = np.int64 if packed.order.dtype == "I64" else np.int32
    found: NDArray[Any] = np.frombuffer(inputs.scale(packed.order, 0, packed.order.size), integers)
    groups = in_order[-1] + 1
    if packed.packing == "integers" and np.any(found == IN_ORDER):
        return in_order
    if np.any((found < 0) | (found >= groups)):
        expected = f"numbers from 0 to {groups - 1}, of the groups of columns"
        raise refuse("wrong-value", packed.order.name, f"{found.min()} to {found.max()}", expected, "is it damaged?")
    return found.astype(np.int32)


def split_at_strips(packed: Packed, box: ElementBox) -> Iterator[tuple[int, int]]:
    """Splits the rows of a box where a strip, or an expert, ends."""
    rows, height = packed.result.shape[-2], count_strip_rows(packed)
    top = box.top
    while top < box.bottom:
        expert, row = divmod(top, rows)
        bottom = min(box.bottom, expert * rows + min(rows, (row // height + 1) * height))
        yield top, bottom
        top = bottom


def compute_rows_of_strip(
    number: int, packed: Packed, top: int, bottom: int, out: NDArray[Any], inputs: CastInputs
) -> None:
    """Computes whole rows of a weight whose codes lie in columns: rows of one strip. `number` is that of the cast."""
    rows, height = packed.result.shape[-2], count_strip_rows(packed)
    expert, row = divmod(top, rows)
    start = row // height * height
    make = partial(make_strip, packed, expert, start, min(rows, start + height), inputs)
    strip = inputs.strips.take((number, expert * rows + start), make)
    first, last = row - start, row - start + bottom - top
    if packed.packing != "mxfp4-experts":
        zeros = None if strip.zeros is None else strip.zeros[first:last]
        groups = find_group_of_columns(packed, inputs)
        multiply(packed, strip.codes[first:last], strip.scales[first:last], zeros, groups, out)
        return
    wide = slice(first // ROWS_TOGETHER, -(-last // ROWS_TOGETHER))
    part = strip.codes[:, wide.start * ROWS_TOGETHER // 2 : wide.stop * ROWS_TOGETHER // 2]
    made = np.empty((part.shape[1] * 2, part.shape[0]), np.uint16)
    dequantize_experts(part, strip.scales[:, wide], made, choose_recode())
    out[:] = made[first - wide.start * ROWS_TOGETHER :][: bottom - top]


def make_strip(packed: Packed, expert: int, start: int, stop: int, inputs: CastInputs) -> Strip:
    """Takes the rows from `start` to `stop` of a weight out of its codes."""
    if packed.packing == "mxfp4-experts":
        return make_strip_of_experts(packed, expert, start, stop, inputs)
    columns, height = packed.result.shape[-1], stop - start
    codes = np.empty((height, columns * packed.bits // 8), np.uint8)
    is_awq = packed.packing == "awq"
    # A row of words has one column of the weight (AWQ), or as many as fit a word (GPTQ).
    in_word = WORD_BITS // packed.bits
    pitch = slice(start // in_word, -(-stop // in_word)) if is_awq else slice(start, stop)
    for first, words in read_columns(packed.codes, pitch, inputs):
        size = len(words) * (packed.bits if is_awq else WORD_BITS) // 8
        place = first * (packed.bits if is_awq else WORD_BITS) // 8
        part = codes[:, place : place + size]
        spread_awq(words.view(np.int32), part) if is_awq else spread_gptq(words.view(np.int32), part)
    scales = np.empty((height, packed.scales.shape[0]), PATTERNS[BITS[packed.scales.dtype]])
    for first, part in read_columns(packed.scales, slice(start, stop), inputs):
        scales[:, first : first + len(part)] = part.T
    if packed.zeros is None:
        return Strip(codes, scales, None)
    of_words = slice(start // in_word, -(-stop // in_word))
    words = np.concatenate([part for _, part in read_columns(packed.zeros, of_words, inputs)]).view(np.int32)
    is_v2 = packed.packing == "gptq-v2"
    zeros = spread_zeros_awq(words) if is_awq else spread_zeros_gptq(words, packed.bits, is_v2=is_v2)
    return Strip(codes, scales, zeros[:height])


def make_strip_of_experts(packed: Packed, expert: int, start: int, stop: int, inputs: CastInputs) -> Strip:
    """Takes some columns of the codes of one expert, and of their scales: rows of its transposed weight."""
    experts, _, columns = packed.result.shape
    found = []
    for tensor, unit in ((packed.codes, 2), (packed.scales, ROWS_TOGETHER)):
        matrix = tensor._replace(dtype="U8", shape=(experts * columns, tensor.size // (experts * columns)))
        lines = range(expert * columns, (expert + 1) * columns)
        part = slice(start // unit, -(-stop // unit))
        found.append(np.concatenate([rows for _, rows in read_columns(matrix, part, inputs, lines)]))
    return Strip(found[0], found[1], None)


def read_columns(
    tensor: Tensor, part: slice, inputs: CastInputs, lines: range | None = None
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Reads some columns of a matrix, or of some lines of it, a band of rows at a time, each with its first row. Whole
    bands are read: reads of a few bytes each would take longer.
    """
    rows, width = flatten_to_matrix(tensor.shape)
    lines = lines or range(rows)
    patterns = PATTERNS[BITS[tensor.dtype]]
    pitch = max(1, width * BITS[tensor.dtype] // 8)
    height = max(2, inputs.most // pitch // 2 * 2)  # even: two columns of AWQ are one byte
    for top in range(lines.start, lines.stop, height):
        bottom = min(lines.stop, top + height)
        data = inputs.weight(tensor, top * pitch, (bottom - top) * pitch)
        yield top, np.frombuffer(data, patterns).reshape(bottom - top, width)[:, part].copy()
