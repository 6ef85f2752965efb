"""The kernels of casts: pure functions on arrays, which open nothing and know nothing of plans.

Each works on a *box*, any rectangle of a matrix. A matrix is scaled by *blocks*, one scale for each; `block` is the
rows and columns of one. The caller gives the scales of exactly the blocks that the box touches, and the `phase`: the
row and column of the box's first element within its block. Where a box begins and ends changes no bit of the outcome.

Rows of `out` are contiguous; it may be a view of any bytes. Beside it a kernel needs a few MiB at most, however large
the box. The heavy calls run without the interpreter's lock.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.code_tables import (
    LEAST,
    MOST,
    NAN,
    Bytes,
    Floats,
    Words,
    fp4_products,
    fp4_tables,
    fp8_codes,
    products,
    products_of_powers,
    scales_as_float32,
)

TILE = 1 << 16
"""Elements that are worked on at once: their index fits the second-level cache of a core."""

BAND = 1 << 21
"""Elements whose small tables are made at once."""

SCALES = 1 << 16
"""Scales that are looked at at once."""

PAGES = 256
"""The most pages of a table, so that page and code together fit 16 bits."""

GROUP = 32
"""Columns of FP4 that share a scale."""

Pair = tuple[int, int]
"""Rows and columns."""

Recode = Callable[[NDArray[Any], NDArray[Any], Pair, Pair, NDArray[Any], NDArray[Any]], None]
"""Called with codes, pages, group, phase, table and out: see `casts.recode`."""


def fastest_recode() -> Recode:
    """What to hand to the casts that look up: compiled where numba is installed, numpy elsewhere; the same bits."""
    return compiled_recode() or recode


def recode(codes: Bytes, pages: Words, group: Pair, phase: Pair, table: NDArray[Any], out: NDArray[Any]) -> None:
    """Writes `table[page, code]` for every code of a box [rows, columns]; `table` is [at most 256 pages, 256].

    Codes share a page by groups: `pages` has one for each group that the box touches, `group` is the rows and columns
    of one, and `phase` where the box begins in its first.
    """
    flat = table.reshape(-1)
    short, long = np.empty(min(codes.size, TILE), np.uint16), np.empty(min(codes.size, TILE), np.intp)
    for box, firsts in tiles(codes.shape, pages << 8, group, phase, TILE):
        tile = codes[box]
        places, indices = short[: tile.size].reshape(tile.shape), long[: tile.size].reshape(tile.shape)
        np.add(tile, firsts, out=places)
        np.copyto(indices, places)  # take would do so itself, into fresh memory
        np.take(flat, indices, mode="clip", out=out[box])  # other modes copy what they write


def dequantize(codes: Bytes, scales: Floats, block: Pair, phase: Pair, out: Words, run: Recode = recode) -> None:
    """F8_E4M3 codes [rows, columns] times float32 block scales, as BF16 bit patterns [rows, columns].

    The float32 product is rounded to nearest even: infinite beyond the range, minus zero kept, subnormals exact. Every
    NaN, by code or by scale, becomes 0x7FC0. Slow where scales are not powers of two and blocks are small.
    """
    require_fit(codes.shape, scales, block, phase, out)
    for places, box, inner in areas(codes.shape, block, phase, SCALES):
        bits = scales[places].view(np.uint32)
        if np.any(bits & 0x807FFFFF):
            _dequantize_by_scale(codes[box], scales[places], block, inner, out[box], run)
        else:  # powers of two: one table has them all
            run(codes[box], (bits >> 23).astype(np.uint16), block, inner, products_of_powers(), out[box])


def _dequantize_by_scale(codes: Bytes, scales: Floats, block: Pair, phase: Pair, out: Words, run: Recode) -> None:
    """With a page of products for each scale."""
    for places, box, inner in areas(codes.shape, block, phase, PAGES):
        table = products(scales[places].ravel())
        pages = np.arange(len(table), dtype=np.uint16).reshape(scales[places].shape)
        run(codes[box], pages, block, inner, table, out[box])


def fp8_scales_of_fp4(group_scales: Bytes, block: Pair, phase: Pair = (0, 0)) -> Bytes:
    """The F8_E8M0 scale of each block [block rows, block columns], from those of its groups [rows, columns / 32].

    It is the largest of the block's, all of which must be given, divided by 64: 6, the largest FP4 value, becomes 384
    at most. NaN if one of the groups' is. Where the largest is below 2^-121 it is 2^-127, the least there is, and no
    value is lost by that.
    """
    groups, inner = (block[0], block[1] // GROUP), (phase[0], phase[1] // GROUP)
    largest = np.zeros(touched(group_scales.shape, groups, inner), np.uint8)
    largest_of_blocks(group_scales, groups, inner, largest)
    return np.where(largest == NAN, largest, np.maximum(largest, 6) - 6).astype(np.uint8)


def fp4_to_fp8(
    packed: Bytes, group_scales: Bytes, scales: Bytes, block: Pair, phase: Pair, out: Bytes, run: Recode = recode
) -> int:
    """E2M1 pairs [rows, columns / 2] as F8_E4M3 codes [rows, columns]; returns how many values are not exact.

    The even column is in the low nibble; `phase` is in columns. `group_scales` are F8_E8M0 for 1 x 32 values each,
    `scales` those of the new blocks. A value is exact if code times new scale is value times group scale. The others
    are rounded to nearest even and stop at 448, or 0x7F where a scale is NaN. Minus zero becomes zero, and zero stays
    zero whatever the numbers.
    """
    shape = (packed.shape[0], packed.shape[1] * 2)
    if phase[1] % 2 or block[1] % GROUP:
        raise ValueError(f"a box of FP4 begins at an even column, and its blocks are whole groups: {phase}, {block}")
    require_fit(shape, scales, block, phase, out)
    require_fit(shape, group_scales, (1, GROUP), (0, phase[1] % GROUP), out)
    group, start = (1, GROUP // 2), (0, phase[1] % GROUP // 2)
    inexact, (pairs, misses) = 0, fp4_tables()
    for rows in bands(shape, BAND):
        pages = _fp4_pages(group_scales[rows], scales, block, (phase[0] + rows.start, phase[1]))
        run(packed[rows], pages, group, start, pairs, out[rows].view(np.uint16))
        if misses[[pages.min(), pages.max()]].any():  # the pages without misses are in the middle
            missed = np.empty(packed[rows].shape, np.uint8)
            run(packed[rows], pages, group, start, misses, missed)
            inexact += int(missed.sum())
    return inexact


def largest_magnitudes(values: Words, block: Pair, phase: Pair, largest: Words) -> None:
    """Raises `largest` [block rows, block columns] to the largest magnitudes of BF16 values [rows, columns].

    Begin with zeros and give every box of a block in turn. Magnitudes are bit patterns without their sign: from 0x7F80
    on the block holds an infinity or NaN, which no scale can serve.
    """
    require_fit(values.shape, largest, block, phase, values)
    for rows in bands(values.shape, TILE):
        line, inner = divmod(rows.start + phase[0], block[0])
        magnitudes = np.bitwise_and(values[rows], 0x7FFF)
        largest_of_blocks(magnitudes, block, (inner, phase[1]), largest[line:])


def largest_of_blocks(values: NDArray[Any], block: Pair, phase: Pair, largest: NDArray[Any]) -> None:
    """Raises `largest`, which may have more rows than are touched, to the largest value of each block."""
    lines, places = touched(values.shape, block, phase)
    rows = np.maximum(np.arange(lines) * block[0] - phase[0], 0)
    columns = np.maximum(np.arange(places) * block[1] - phase[1], 0)
    of_rows = np.maximum.reduceat(values, columns, axis=1)  # columns first: the other order takes many times as long
    found = np.maximum.reduceat(of_rows, rows, axis=0)
    np.maximum(largest[: len(rows)], found, out=largest[: len(rows)])


def scales_of_magnitudes(largest: Words) -> Floats:
    """The float32 scales that bring the largest magnitudes to 448; 1 for a block of zeros, NaN for one not finite."""
    finite = np.where(largest < 0x7F80, largest, 0x7FC0)
    scales = scales_as_float32(finite.astype(np.uint16), "BF16") / np.float32(448)
    return np.where(largest == 0, np.float32(1), scales)


def rounded_up(scales: Floats) -> Bytes:
    """The least F8_E8M0 scales that are not below the given ones, which are positive and below 2^127, or NaN."""
    bits = scales.view(np.uint32)
    codes = np.where(bits <= 1 << 22, 0, (bits + 0x7FFFFF) >> 23)
    return np.where(np.isnan(scales), NAN, codes).astype(np.uint8)


def quantize(values: Words, scales: Floats, block: Pair, phase: Pair, out: Bytes) -> int:
    """BF16 values [rows, columns] over float32 scales, as F8_E4M3 codes; returns how many quotients are not finite.

    The float32 quotient is rounded to nearest even and stops at 448, infinities too; NaN is 0x7F. A count above zero
    means an infinity or NaN among the values, or a scale that is NaN, zero or far too small: refuse it.
    """
    require_fit(values.shape, scales, block, phase, out)
    bad = 0
    for box, divisors in tiles(values.shape, scales, block, phase, TILE):
        bits = np.left_shift(values[box], 16, dtype=np.uint32)
        quotients = bits.view(np.float32)
        with np.errstate(all="ignore"):
            np.divide(quotients, divisors, out=quotients)
        bad += bits.size - int(np.count_nonzero(np.isfinite(quotients)))
        # The upper half decides, once its last bit also tells whether anything followed it.
        bits |= (bits & 0xFFFF) + 0xFFFF
        bits >>= 16
        np.take(fp8_codes(), bits.astype(np.intp), mode="clip", out=out[box])
    return bad


def _fp4_pages(group_scales: Bytes, scales: Bytes, block: Pair, phase: Pair) -> Words:
    """The page of each group [rows, groups]: by how many powers of two its scale is above the new one."""
    lines = (np.arange(group_scales.shape[0]) + phase[0]) // block[0]
    places = (np.arange(group_scales.shape[1]) + phase[1] // GROUP) // (block[1] // GROUP)
    new = scales[:, places][lines]
    pages = np.subtract(group_scales, new, dtype=np.int16)
    np.clip(pages, LEAST, MOST, out=pages)
    pages -= LEAST
    if group_scales.max() == NAN or new.max() == NAN:
        pages[(group_scales == NAN) | (new == NAN)] = MOST + 1 - LEAST
    return pages.view(np.uint16)


def fp4_to_bf16(packed: Bytes, scales: Bytes, phase: Pair, out: Words, run: Recode = recode) -> None:
    """E2M1 pairs [rows, columns / 2] times F8_E8M0 scales of 1 x 32 values, as BF16 bit patterns; exact.

    `phase` is in columns, of which the first is even. A scale of NaN gives 0x7FC0.
    """
    require_fit((packed.shape[0], packed.shape[1] * 2), scales, (1, GROUP), phase, out)
    run(packed, scales.astype(np.uint16), (1, GROUP // 2), (0, phase[1] // 2), fp4_products(), out.view(np.uint32))


@cache
def compiled_recode() -> Recode | None:
    """The loop below, compiled at its first call; None without numba. The import alone takes a second or more."""
    try:
        import numba  # noqa: PLC0415 - only when a cast is really run
    except ImportError:
        return None
    compiled: Recode = numba.njit(nogil=True)(recode_each)
    return compiled


def recode_each(
    codes: NDArray[Any], pages: NDArray[Any], group: Pair, phase: Pair, table: NDArray[Any], out: NDArray[Any]
) -> None:
    """See `casts.recode`. Run as it stands, without numba, it is right too, and slow."""
    rows, columns = codes.shape
    for row in range(rows):
        line = (row + phase[0]) // group[0]
        start = 0
        for place in range(pages.shape[1]):
            stop = min(columns, (place + 1) * group[1] - phase[1])
            page = table[pages[line, place]]
            for column in range(start, stop):
                out[row, column] = page[codes[row, column]]
            start = stop


Box = tuple[slice, slice]
"""Rows and columns of a piece."""


def require_fit(shape: Pair, scales: NDArray[Any], block: Pair, phase: Pair, out: NDArray[Any]) -> None:
    """A lookup clips what it is given: wrong shapes would give wrong values."""
    expected = touched(shape, block, phase)
    if scales.shape != expected or out.shape != shape or not (0 <= phase[0] < block[0] and 0 <= phase[1] < block[1]):
        raise ValueError(f"a box {shape} at {phase} of {block} touches {expected}: {scales.shape} for {out.shape}")


def touched(shape: Pair, block: Pair, phase: Pair) -> Pair:
    """How many blocks a box touches."""
    return -(-(shape[0] + phase[0]) // block[0]), -(-(shape[1] + phase[1]) // block[1])


def bands(shape: Pair, most: int) -> Iterator[slice]:
    """Rows by rows, at most so many elements, but one row at least."""
    height = max(1, most // max(1, shape[1]))
    for row in range(0, shape[0], height):
        yield slice(row, min(row + height, shape[0]))


def tiles(
    shape: Pair, of_groups: NDArray[Any], group: Pair, phase: Pair, most: int
) -> Iterator[tuple[Box, NDArray[Any]]]:
    """Pieces of a box of at most so many elements, each with what `of_groups` has for it, until the next is asked for.

    That is spread over the elements, but one row or column will do where all rows or columns have the same.
    """
    for columns in _chunks(shape[1], group[1], phase[1], most):
        left, right = (columns.start + phase[1]) // group[1], (columns.stop - 1 + phase[1]) // group[1]
        skip, width = columns.start + phase[1] - left * group[1], columns.stop - columns.start
        here, room = of_groups[:, left : right + 1], np.empty(0, of_groups.dtype)
        for rows in bands((shape[0], width), most):
            lines = (np.arange(rows.start, rows.stop) + phase[0]) // group[0]
            spread = here[lines[:1] if lines[0] == lines[-1] else lines]
            if right > left:
                if len(room) < len(spread):
                    room = np.empty((len(spread), right - left + 1, group[1]), of_groups.dtype)
                np.copyto(room[: len(spread)], spread[:, :, None])
                spread = room[: len(spread)].reshape(len(spread), -1)[:, skip : skip + width]
            yield (rows, columns), spread


def _chunks(columns: int, group: int, phase: int, most: int) -> Iterator[slice]:
    """Columns by columns, at most so many: within one group, if the groups are wide for that, else across them."""
    step = group if group * 2 > min(columns, most) else columns
    for start in range(-phase if step == group else 0, columns, step):
        for piece in bands((min(start + step, columns) - max(start, 0), 1), most):
            yield slice(max(start, 0) + piece.start, max(start, 0) + piece.stop)


def areas(shape: Pair, block: Pair, phase: Pair, most: int) -> Iterator[tuple[Box, Box, Pair]]:
    """Pieces of a box of at most so many blocks: its blocks, its elements, and its phase."""
    lines, width = touched(shape, block, phase)
    height = max(1, most // max(1, width))
    for line in range(0, lines, height):
        rows, top = _stretch(line, height, block[0], phase[0], shape[0])
        for place in range(0, width, most):
            columns, left = _stretch(place, most, block[1], phase[1], shape[1])
            yield (slice(line, line + height), slice(place, place + most)), (rows, columns), (top, left)


def _stretch(first: int, count: int, size: int, phase: int, end: int) -> tuple[slice, int]:
    """Where so many blocks lie along one dimension of a box, and how much of the first is before it."""
    start = first * size - phase
    return slice(max(0, start), min(end, start + count * size)), max(0, -start)
