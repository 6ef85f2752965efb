"""The stored bytes that a tile of a packed weight is made of: where they lie, how they are read, and the tile made of
them.
"""

from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.errors import refuse
from reshard.formats.safetensors import BITS
from reshard.types import Packed, Tensor
from reshard.verification.chunks import make_relative_slice
from reshard.verification.compared_files import OpenedFiles
from reshard.verification.packed_values import EXPERT_GROUP, WORD_BITS, PackedBytes, decode_packed_rows
from reshard.verification.reference_casts import CAST_CHUNK, TileBytes
from reshard.verification.unpacked_weights import (
    BF16_SIZE,
    TURNED,
    UnpackedTile,
    UnpackedWeight,
    split_into_unpacked_tiles,
)

WORD_SIZE = WORD_BITS // 8
"""In bytes."""


class InputBox(NamedTuple):
    """The bytes of a stored tensor that a tile needs."""

    tensor: Tensor
    pitch: int
    """Bytes of a row of the tensor: all of its dimensions but the last make the rows, of experts' codes but two."""
    rows: range
    columns: range
    """In bytes of a row."""


class InputBoxes(NamedTuple):
    """What a tile needs of each stored tensor of its weight, but of its order, of which it needs all."""

    codes: InputBox
    scales: InputBox
    zeros: InputBox | None
    factor: InputBox | None


def find_input_boxes(packed: Packed, rows: range, columns: range) -> InputBoxes:
    """Finds what a box of the result needs of each stored tensor."""
    factor = packed.factor and InputBox(packed.factor, packed.factor.size, range(1), range(packed.factor.size))
    if packed.packing == "mxfp4-experts":
        return find_expert_boxes(packed, rows, columns)
    if packed.packing in TURNED:
        return find_turned_boxes(packed, rows, columns)
    height = prod(packed.result.shape[:-1])
    codes, scales, zeros = packed.codes, packed.scales, packed.zeros
    one_scale = scales.size * 8 == BITS[scales.dtype]
    return InputBoxes(
        take_whole_rows(codes, rows, height),
        take_whole_rows(scales, range(1), 1) if one_scale else take_whole_rows(scales, rows, height),
        zeros and take_whole_rows(zeros, cover_with_words(rows, packed.bits), zeros.shape[0]),
        factor,
    )


def find_expert_boxes(packed: Packed, rows: range, columns: range) -> InputBoxes:
    """Finds what a box of the result [experts, in, out] needs of codes [experts, out, in / 32, 16] and scales. It lies
    in one expert.
    """
    *_, inner, outer = packed.result.shape
    expert, first = divmod(rows.start, inner)
    stored = range(expert * outer + columns.start, expert * outer + columns.stop)
    across = range(first // 2, (first + len(rows) + 1) // 2)
    groups = range(first // EXPERT_GROUP, -(-(first + len(rows)) // EXPERT_GROUP))
    return InputBoxes(
        InputBox(packed.codes, inner // 2, stored, across),
        InputBox(packed.scales, inner // EXPERT_GROUP, stored, groups),
        None,
        None,
    )


def find_turned_boxes(packed: Packed, rows: range, columns: range) -> InputBoxes:
    """Finds what a box of the result [out, in] needs of words and scales whose rows go along its columns."""
    words = cover_with_words(rows, packed.bits)
    words = range(words.start * WORD_SIZE, words.stop * WORD_SIZE)
    groups = range(columns.start // packed.group, -(-columns.stop // packed.group))
    groups = range(packed.scales.shape[0]) if packed.order else groups
    size = BITS[packed.scales.dtype] // 8
    take = partial(InputBox, packed.codes, packed.codes.shape[1] * WORD_SIZE)
    if packed.packing == "awq":
        codes = take(columns, words)
    else:
        codes = take(cover_with_words(columns, packed.bits), range(rows.start * WORD_SIZE, rows.stop * WORD_SIZE))
    across = range(rows.start * size, rows.stop * size)
    return InputBoxes(
        codes,
        InputBox(packed.scales, packed.scales.shape[1] * size, groups, across),
        packed.zeros and InputBox(packed.zeros, packed.zeros.shape[1] * WORD_SIZE, groups, words),
        None,
    )


def take_whole_rows(tensor: Tensor, rows: range, height: int) -> InputBox:
    """Some rows of a tensor that has `height` of them."""
    pitch = tensor.size // height
    return InputBox(tensor, pitch, rows, range(pitch))


def cover_with_words(codes: range, bits: int) -> range:
    """The words that have some codes of `bits` bits."""
    return range(codes.start * bits // WORD_BITS, -(-codes.stop * bits // WORD_BITS))


def measure_largest_tile(whole: UnpackedWeight) -> int:
    """The bytes of the largest buffer that a tile needs: for itself, or for what it needs of one stored tensor."""
    order = whole.packed.order.size if whole.packed.order else 0
    for tile in split_into_unpacked_tiles(whole, None):
        boxes = find_input_boxes(whole.packed, tile.rows, tile.columns)
        sizes = [len(box.rows) * len(box.columns) for box in boxes if box]
        return max(len(tile.rows) * len(tile.columns) * BF16_SIZE, order, *sizes)
    return 0


def read_unpacked_tile(files: OpenedFiles, tile: UnpackedTile, buffer: memoryview) -> TileBytes:
    """Reads what a tile is made of, and computes it: rows of bytes. Raises Refused."""
    packed = tile.whole.packed
    groups = read_order(files, packed, buffer)
    boxes = find_input_boxes(packed, tile.rows, tile.columns)
    # Copied: the buffer is needed for the codes.
    scales, zeros, factor = (read_input_box(files, box, buffer).copy() if box else None for box in boxes[1:])
    stored = [read_input_box(files, boxes.codes, buffer), scales, zeros, factor]
    made = np.empty((len(tile.rows), len(tile.columns)), np.uint16)
    least = WORD_BITS if packed.packing in TURNED else 1  # so that it begins with a word and a group
    step = max(1, CAST_CHUNK // len(tile.columns) // least) * least
    for first in range(tile.rows.start, tile.rows.stop, step):
        rows = range(first, min(first + step, tile.rows.stop))
        inner = find_input_boxes(packed, rows, tile.columns)
        codes, scales, zeros, factor = (cut_box_of_tile(*three) for three in zip(stored, inner, boxes, strict=True))
        chunk = decode_packed_rows(packed, rows, tile.columns, PackedBytes(codes, scales, zeros, factor, groups))
        made[make_relative_slice(rows, tile.rows)] = chunk
    return made.view(np.uint8)


def cut_box_of_tile(data: TileBytes | None, inner: InputBox | None, whole: InputBox | None) -> Any:
    """Cuts the bytes of a box out of those of a larger one; None of what the packing does not have."""
    if data is None or inner is None or whole is None:
        return None
    return data[make_relative_slice(inner.rows, whole.rows), make_relative_slice(inner.columns, whole.columns)]


def read_input_box(files: OpenedFiles, box: InputBox, buffer: memoryview) -> TileBytes:
    """Reads rows of bytes of a stored tensor. Raises Refused."""
    offset = box.tensor.offset + box.rows.start * box.pitch + box.columns.start
    return files.read_rows(box.tensor.file, offset, box.pitch, (len(box.rows), len(box.columns)), buffer)


def read_order(files: OpenedFiles, packed: Packed, buffer: memoryview) -> NDArray[Any] | None:
    """Reads the group of each column of a weight; None if they lie in order. Raises Refused, also for a group that
    there is not.
    """
    tensor = packed.order
    if tensor is None:
        return None
    data = files.read(tensor.file, tensor.offset, tensor.size, buffer)
    order = data.view(np.int64 if tensor.dtype == "I64" else np.int32).astype(np.intp)
    # -1: compressed-tensors has not set it.
    if packed.packing == "integers" and order.min(initial=0) < 0:
        return None
    groups = packed.scales.shape[0 if packed.packing in TURNED else -1]
    if order.min(initial=0) < 0 or order.max(initial=0) >= groups:
        found = f"groups {order.min()} to {order.max()}"
        raise refuse("wrong-value", tensor.name, found, f"0 to {groups - 1}: there are {groups} scales")
    return order
