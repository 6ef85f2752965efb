"""How packed weights and their zero points lie in the words of AutoAWQ, GPTQ and compressed-tensors, brought into rows.

Numpy functions that move bits and compute nothing. A word is 32 bits, its lowest bits first. A *row* is one of the
result: an output feature of a linear layer.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.code_tables import CodeArray

WordArray = NDArray[np.int32]

TILE_SIDE = 256
"""In words or bytes: a square of so many is transposed within the processor's cache."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""For each 4 bits of a word of AutoAWQ, lowest first: which of the word's eight rows they are of."""


def spread_awq(words: WordArray, out: CodeArray) -> None:
    """Spreads int32 words of AutoAWQ [columns, rows / 8] into codes [rows, columns / 2], the even column in the low
    half of a byte. A last column without a partner leaves the high half zero.

    AutoAWQ 0.2.9 packs eight rows of one column into a word, in the order 0 2 4 6 1 3 5 7 (`WQLinear_GEMM.from_linear`
    and `dequantize_gemm`).
    """
    columns, width = words.shape
    require_shape(out, (width * 8, -(-columns // 2)))
    for down, across in split_into_squares((out.shape[1], width)):
        halves = np.ascontiguousarray(words[2 * down.start : 2 * down.stop, across]).view(np.uint8)
        even, odd = halves[0::2], halves[1::2]
        if len(odd) < len(even):
            odd = np.concatenate([odd, np.zeros_like(even[:1])])
        for shift, pairs in enumerate(((even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0))):
            for byte in range(4):
                row = AWQ_ORDER[2 * byte + shift]
                out[8 * across.start + row : 8 * across.stop : 8, down] = pairs[:, byte::4].T


def spread_gptq(words: WordArray, out: CodeArray) -> None:
    """Spreads int32 words of GPTQ [words of a row, rows] into codes [rows, 4 bytes of each word].

    GPTQModel 7.7.0 packs eight columns of 4 bits, or four of 8 bits, of one row into a word, the first column lowest.
    So a word is four bytes of a row as they are: only rows and columns change places.
    """
    require_shape(out, (words.shape[1], words.shape[0] * 4))
    rows = out.view(np.int32)
    for down, across in split_into_squares(rows.shape):
        rows[down, across] = words[across, down].T


def spread_zeros_awq(words: WordArray) -> CodeArray:
    """The zero points [rows, groups] of AutoAWQ's words [groups, rows / 8], which have the order of `spread_awq`."""
    zeros = np.empty((*words.shape, 8), np.uint8)
    zeros[:, :, AWQ_ORDER] = split_words(words, 4)
    return np.ascontiguousarray(zeros.reshape(len(words), -1).T)


def spread_zeros_gptq(words: WordArray, bits: int, *, is_v2: bool) -> CodeArray:
    """The zero points [rows, groups] of GPTQ's words [groups, rows * bits / 32]; of its first format, one more than is
    stored.

    GPTQModel 7.7.0 adds 0x11111111 (or 0x01010101) to whole words (`convert_gptq_v1_to_v2_format_module`): the highest
    zero point and one is 0, and is carried into the next zero point of the word. It wrote such words by subtracting the
    same number, so that nothing is lost. Its `convert_gptq_file` carries nothing.
    """
    if not is_v2:
        one = sum(1 << shift for shift in range(0, 32, bits))
        words = (words.view(np.uint32) + np.uint32(one)).view(np.int32)
    return np.ascontiguousarray(split_words(words, bits).reshape(len(words), -1).T)


def spread_zeros_integers(words: WordArray, bits: int) -> CodeArray:
    """The zero points [rows, groups] of words of compressed-tensors [rows * bits / 32, groups]; the last rows may be
    filling.

    compressed-tensors 0.20.1 packs the zero points of one group along the rows (`pack_to_int32` with `packed_dim=0`),
    and adds 2^(bits - 1) to them as to the codes. So both are compared as they are stored.
    """
    return np.ascontiguousarray(np.moveaxis(split_words(words, bits), 1, 2)).reshape(-1, words.shape[1])


def split_words(words: WordArray, bits: int) -> CodeArray:
    """The codes of int32 words, lowest bits first: one dimension more, of 32 / `bits`."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (np.ascontiguousarray(words).view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.astype(np.uint8)


def require_shape(array: NDArray[Any], shape: tuple[int, int]) -> None:
    if array.shape != shape:
        raise ValueError(f"an array {shape} is needed, not {array.shape}")


def split_into_squares(shape: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Splits a matrix into squares that fit the processor's cache."""
    for row in range(0, shape[0], TILE_SIDE):
        for column in range(0, shape[1], TILE_SIDE):
            yield (
                slice(row, min(row + TILE_SIDE, shape[0])),
                slice(column, min(column + TILE_SIDE, shape[1])),
            )
