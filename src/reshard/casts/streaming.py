"""Computes any byte range of a cast tensor, reading only the input ranges it needs. Opens no file itself.

A result is a matrix; a byte range of it is the end of a row, whole rows and the beginning of a row. Each of these is
computed box by box, so that each box needs one read of the weight. Right of and below the computed values is padding:
zeros, or ones in a block scale.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.code_tables import NAN_SCALE, decode_scales
from reshard.casts.kernels import (
    cast_fp4_to_fp8,
    choose_recode,
    compute_fp8_scales,
    compute_scales,
    dequantize,
    dequantize_fp4,
    quantize,
    raise_to_magnitudes,
    round_up_scales,
)
from reshard.casts.nvfp4 import FACTOR, SCALE, compute_nvfp4_factor, compute_nvfp4_scales
from reshard.casts.rounding import FLOAT_DTYPES, round_constant, round_floats
from reshard.casts.shapes import compute_unpadded_shape, flatten_to_matrix, is_in_blocks, unpack_weight_shape
from reshard.casts.tensor_boxes import CastInputs, ElementBox, Read
from reshard.casts.unpacking import compute_unpacked
from reshard.errors import refuse
from reshard.formats.safetensors import BITS
from reshard.types import Cast, Tensor

CastArray = NDArray[Any]

SCALE_ONES = {"F32": b"\x00\x00\x80\x3f", "BF16": b"\x80\x3f", "F8_E8M0": b"\x7f"}
"""A scale of 1."""


def compute_cast(cast: Cast, offset: int, out: memoryview, inputs: CastInputs) -> int:
    """Writes the bytes of a cast's result from byte `offset` on into `out`; returns how many values are not exact.

    Raises Refused for a value that has no equivalent in the new dtype, such as an infinity.
    """
    width, size = flatten_to_matrix(cast.result.shape)[1], BITS[cast.result.dtype] // 8
    if cast.operation == "fill":
        np.frombuffer(out, np.uint8).reshape(-1, size)[:] = np.frombuffer(
            round_constant(cast.value, cast.result.dtype), np.uint8
        )
        return 0
    height, extent = compute_unpadded_shape(cast)
    inexact = 0
    for box, begin in split_range_into_boxes(offset // size, len(out) // size, width):
        view = np.frombuffer(out, np.uint8)[begin * size : (begin + measure_area(box)) * size]
        rows = view.reshape(box.bottom - box.top, -1)
        inner = ElementBox(
            box.top, box.left, max(box.top, min(box.bottom, height)), max(box.left, min(box.right, extent))
        )
        if inner != box:
            fill_padding(rows, cast)
        for piece in split_for_reads(inner, cast, inputs):
            part = rows[piece.top - box.top : piece.bottom - box.top]
            inexact += compute_box(
                cast, piece, part[:, (piece.left - box.left) * size : (piece.right - box.left) * size], inputs
            )
    return inexact


def measure_area(box: ElementBox) -> int:
    return (box.bottom - box.top) * (box.right - box.left)


def split_range_into_boxes(first: int, count: int, width: int) -> Iterator[tuple[ElementBox, int]]:
    """Splits a range of elements into boxes: the end of a row, whole rows, the beginning of a row. Gives each box with
    the index of its first element in the range; `width` is the number of columns.
    """
    begin, end = 0, first + count
    while begin < count:
        row, column = divmod(first + begin, width)
        if column or end - first - begin < width:
            box = ElementBox(row, column, row + 1, min(width, column + count - begin))
        else:
            box = ElementBox(row, 0, row + (count - begin) // width, width)
        yield box, begin
        begin += measure_area(box)


def fill_padding(rows: CastArray, cast: Cast) -> None:
    """Fills bytes [rows, bytes] with padding."""
    one = SCALE_ONES[cast.result.dtype] if cast.is_scale else bytes(1)
    rows.reshape(rows.shape[0], -1, len(one))[:] = np.frombuffer(one, np.uint8)


def split_for_reads(box: ElementBox, cast: Cast, inputs: CastInputs) -> Iterator[ElementBox]:
    """Splits a box so that each piece needs one read of the weight, and no read is larger than allowed."""
    if not measure_area(box):
        return
    if not is_in_blocks(cast) or cast.operation in (SCALE, FACTOR):
        yield box
        return
    if cast.is_scale and cast.operation != "pad":
        yield from (box._replace(top=row, bottom=row + 1) for row in range(box.top, box.bottom))
        return
    most = inputs.most
    if cast.scale:
        # An estimate from above: as if each row had scales of its own.
        most = min(most, inputs.most_scales * cast.block[1] * get_weight_bits(cast) // BITS[cast.scale.dtype])
    yield from split_box_by_size(box, flatten_to_matrix(unpack_weight_shape(cast))[1], get_weight_bits(cast), most)


def get_weight_bits(cast: Cast) -> int:
    """The size of an element of the weight in its file, in bits."""
    return 4 if cast.weight.dtype == "I8" and cast.operation != "pad" else BITS[cast.weight.dtype]


def split_box_by_size(box: ElementBox, width: int, bits: int, most: int) -> Iterator[ElementBox]:
    """Splits a box into ranges of rows of at most `most` bytes, or of parts of a row if one is longer.

    `width` is the length of a row in elements, `bits` the size of an element.
    """
    height = most * 8 // (width * bits)
    if height:
        for row in range(box.top, box.bottom, height):
            yield box._replace(top=row, bottom=min(row + height, box.bottom))
        return
    step = most * 8 // bits // 256 * 256
    for row in range(box.top, box.bottom):
        for column in range(box.left, box.right, step):
            yield ElementBox(row, column, row + 1, min(column + step, box.right))


def read_box(read: Read, tensor: Tensor, box: ElementBox, width: int, bits: int) -> CastArray:
    """Reads the bytes [rows, bytes] of a box of a tensor: several rows are read whole, a single row only in part."""
    if box.bottom - box.top == 1:
        begin, end = (box.top * width + box.left) * bits // 8, (box.top * width + box.right) * bits // 8
        return np.frombuffer(read(tensor, begin, end - begin), np.uint8).reshape(1, -1)
    pitch = width * bits // 8
    data = np.frombuffer(read(tensor, box.top * pitch, (box.bottom - box.top) * pitch), np.uint8)
    return data.reshape(-1, pitch)[:, box.left * bits // 8 : box.right * bits // 8]


def read_weight_box(cast: Cast, box: ElementBox, inputs: CastInputs) -> CastArray:
    """Reads the bytes [rows, bytes] of a box of the weight."""
    return read_box(
        inputs.weight, cast.weight, box, flatten_to_matrix(unpack_weight_shape(cast))[1], get_weight_bits(cast)
    )


def find_touched_blocks(box: ElementBox, block: tuple[int, int]) -> ElementBox:
    """The blocks that a box touches, as a box of the matrix of scales."""
    return ElementBox(box.top // block[0], box.left // block[1], -(-box.bottom // block[0]), -(-box.right // block[1]))


def find_phase(box: ElementBox, block: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the box's first element within its block."""
    return box.top % block[0], box.left % block[1]


def read_scale_box(cast: Cast, box: ElementBox, inputs: CastInputs) -> CastArray:
    """Reads a box of the scale [rows, columns], as bit patterns."""
    scale = cast.scale
    if scale is None:
        raise ValueError(f"{cast.operation} without a scale")
    bits = BITS[scale.dtype]
    data = read_box(inputs.scale, scale, box, flatten_to_matrix(scale.shape)[1], bits)
    return np.ascontiguousarray(data).view({8: np.uint8, 16: np.uint16, 32: np.uint32}[bits])


def compute_box(cast: Cast, box: ElementBox, out: CastArray, inputs: CastInputs) -> int:
    """Computes a box of a cast's result into bytes [rows, bytes]; returns how many values are not exact."""
    if cast.operation == "pad":
        out[:] = read_weight_box(cast, box, inputs)
        return 0
    if cast.operation == "round":
        values = read_weight_box(cast, box, inputs)
        round_floats(values.view(FLOAT_DTYPES[cast.weight.dtype]), out.view(np.uint16))
        return 0
    if not is_in_blocks(cast):
        compute_unpacked(cast, box, out.view(np.uint16), inputs)
        return 0
    if cast.operation == SCALE:
        compute_nvfp4_scales(cast, box, out, inputs)
        return 0
    if cast.operation == FACTOR:
        compute_nvfp4_factor(cast, out, inputs)
        return 0
    if cast.operation == "dequantize":
        return compute_dequantized(cast, box, out.view(np.uint16), inputs)
    if cast.operation == "fp4-to-fp8":
        return compute_fp8_of_fp4(cast, box, out, inputs)
    if cast.operation == "fp4-to-fp8-scale":
        out[:] = read_fp8_scales(cast, box, inputs)
        return 0
    if cast.is_scale:
        out.view(np.float32)[:] = read_quantize_scales(cast, box, inputs)
        return 0
    scales = read_quantize_scales(cast, find_touched_blocks(box, cast.block), inputs)
    values = read_weight_box(cast, box, inputs).view(np.uint16)
    quantize(values, scales, cast.block, find_phase(box, cast.block), out)
    return 0


def compute_dequantized(cast: Cast, box: ElementBox, out: CastArray, inputs: CastInputs) -> int:
    """Computes a box of a dequantized weight, as BF16 bit patterns [rows, columns]. Returns 0: rounding is expected."""
    blocks, phase = find_touched_blocks(box, cast.block), find_phase(box, cast.block)
    scales = read_scale_box(cast, blocks, inputs)
    if cast.weight.dtype == "I8":
        wide = box._replace(left=box.left - box.left % 2, right=box.right + box.right % 2)
        if wide != box:  # the box begins or ends within a byte, which has two columns
            both = np.empty((box.bottom - box.top, wide.right - wide.left), np.uint16)
            inexact = compute_dequantized(cast, wide, both, inputs)
            out[:] = both[:, box.left - wide.left :][:, : box.right - box.left]
            return inexact
        codes, keeps = read_weight_box(cast, box, inputs), cast.packed is not None
        dequantize_fp4(codes, scales, phase, out, choose_recode(), keeps_minus_zero=keeps)
        return 0
    values = decode_scales(scales, cast.scale.dtype if cast.scale else "")
    dequantize(read_weight_box(cast, box, inputs), values, cast.block, phase, out, choose_recode())
    return 0


def compute_fp8_of_fp4(cast: Cast, box: ElementBox, out: CastArray, inputs: CastInputs) -> int:
    """Computes a box of an FP4 weight in FP8, as codes [rows, columns]; returns how many values are not exact."""
    new = cast.new_block
    scales = read_fp8_scales(cast, find_touched_blocks(box, new), inputs)
    groups = read_scale_box(cast, find_touched_blocks(box, cast.block), inputs)
    packed = read_weight_box(cast, box, inputs)
    return cast_fp4_to_fp8(
        np.ascontiguousarray(packed), groups, scales, new, find_phase(box, new), out, choose_recode()
    )


def read_fp8_scales(cast: Cast, blocks: ElementBox, inputs: CastInputs) -> CastArray:
    """Computes the F8_E8M0 scales of FP8 blocks from the scales of the FP4 groups in them. Raises Refused for a NaN."""
    rows, columns = flatten_to_matrix(unpack_weight_shape(cast))
    new, old = cast.new_block, cast.block
    found = np.zeros((blocks.bottom - blocks.top, blocks.right - blocks.left), np.uint8)
    for line in range(blocks.top, blocks.bottom):
        top, bottom = line * new[0], min(rows, (line + 1) * new[0])
        step = max(1, inputs.most_scales // -(-columns // old[1]))
        for row in range(top, bottom, step):
            inside = ElementBox(row, blocks.left * new[1], min(bottom, row + step), min(columns, blocks.right * new[1]))
            groups = read_scale_box(cast, find_touched_blocks(inside, old), inputs)
            if np.any(groups == NAN_SCALE):
                raise refuse_not_finite(cast.scale or cast.weight)
            scales = compute_fp8_scales(groups, new, (row - top, 0))
            here = found[line - blocks.top : line - blocks.top + 1]
            np.maximum(here, scales, out=here)
    return found


def read_quantize_scales(cast: Cast, blocks: ElementBox, inputs: CastInputs) -> CastArray:
    """Computes the float32 scales of blocks from their largest magnitudes. Raises Refused for an infinity or NaN."""
    rows, columns = flatten_to_matrix(cast.weight.shape)
    block = cast.block
    largest = np.zeros((blocks.bottom - blocks.top, blocks.right - blocks.left), np.uint16)
    for line in range(blocks.top, blocks.bottom):
        inside = ElementBox(
            line * block[0],
            blocks.left * block[1],
            min(rows, (line + 1) * block[0]),
            min(columns, blocks.right * block[1]),
        )
        for piece in split_box_by_size(inside, columns, 16, inputs.most):
            values = read_weight_box(cast, piece, inputs).view(np.uint16)
            first = piece.left // block[1] - blocks.left
            touched = find_touched_blocks(piece, block)
            place = largest[line - blocks.top : line - blocks.top + 1, first : first + touched.right - touched.left]
            raise_to_magnitudes(values, block, find_phase(piece, block), place)
    if np.any(largest >= 0x7F80):
        raise refuse_not_finite(cast.weight)
    scales = compute_scales(largest)
    return decode_scales(round_up_scales(scales), "F8_E8M0") if "ue8m0" in cast.operation else scales


def refuse_not_finite(tensor: Tensor) -> Exception:
    """The refusal of a tensor with an infinity or NaN."""
    found = "a value that is infinite or no number"
    return refuse("not-finite", tensor.name, found, "finite numbers: FP8 has no other", "mend the checkpoint")
