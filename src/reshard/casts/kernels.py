"""Numpy kernels that dequantize, quantize and repack weights with block scales; pure functions on arrays.

Each kernel works on a *box*: any rectangle of a matrix. Each *block* of a matrix has one scale; `block` is its rows and
columns. The caller gives the scales of exactly the blocks that the box touches, and the `phase`: the row and column of
the box's first element within its block. The result does not depend on where boxes begin and end.

Rows of `out` are contiguous; it may be a view of any bytes. A kernel needs at most a few MiB of memory of its own,
however large the box. The heavy calls release the interpreter's lock.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.code_tables import (
    LEAST_EXPONENT,
    MOST_EXPONENT,
    NAN_SCALE,
    CodeArray,
    FloatArray,
    HalfArray,
    decode_scales,
    make_fp4_products,
    make_fp4_tables,
    make_fp8_codes,
    make_products_of_powers,
    multiply_fp8_values,
)

TILE_ELEMENTS = 1 << 16
"""In elements, worked on at once: their indices fit the second-level cache of a core."""

BAND_ELEMENTS = 1 << 21
"""In elements: the pages of so many are computed at once."""

SCALES_AT_ONCE = 1 << 16
"""In scales, worked on at once."""

MOST_PAGES = 256
"""At most so many pages in a table, so that page and code together fit 16 bits."""

FP4_GROUP = 32
"""In elements: columns of FP4 that share a scale."""

RowsColumns = tuple[int, int]
"""Rows and columns."""

Recode = Callable[[NDArray[Any], NDArray[Any], RowsColumns, RowsColumns, NDArray[Any], NDArray[Any]], None]
"""Called with codes, pages, group, phase, table and out: see `recode`."""


def choose_recode() -> Recode:
    """The function to pass as `run`: compiled where numba is installed, else `recode`; of the same bits."""
    return compile_recode() or recode


def recode(
    codes: CodeArray, pages: HalfArray, group: RowsColumns, phase: RowsColumns, table: NDArray[Any], out: NDArray[Any]
) -> None:
    """Writes `table[page, code]` for every code of a box [rows, columns]; `table` is [at most 256 pages, 256].

    The codes of a group share a page: `pages` has one for each group that the box touches, `group` is the rows and
    columns of a group, and `phase` the row and column of the box's first code in its group.
    """
    flat = table.reshape(-1)
    short, long = np.empty(min(codes.size, TILE_ELEMENTS), np.uint16), np.empty(min(codes.size, TILE_ELEMENTS), np.intp)
    for box, firsts in split_into_tiles(codes.shape, pages << 8, group, phase, TILE_ELEMENTS):
        tile = codes[box]
        places, indices = short[: tile.size].reshape(tile.shape), long[: tile.size].reshape(tile.shape)
        np.add(tile, firsts, out=places)
        np.copyto(indices, places)  # else take would convert them itself, into new memory
        np.take(flat, indices, mode="clip", out=out[box])  # other modes write into a copy of `out` first


def dequantize(
    codes: CodeArray, scales: FloatArray, block: RowsColumns, phase: RowsColumns, out: HalfArray, run: Recode = recode
) -> None:
    """Multiplies F8_E4M3 codes [rows, columns] by float32 block scales, into BF16 bit patterns [rows, columns].

    The float32 product is rounded to nearest even: beyond the range it is infinite; minus zero and subnormals are kept.
    A NaN of code or scale becomes 0x7FC0. Slow where scales are not powers of two and blocks are small.
    """
    require_fitting_shapes(codes.shape, scales, block, phase, out)
    for places, box, inner in split_by_blocks(codes.shape, block, phase, SCALES_AT_ONCE):
        bits = scales[places].view(np.uint32)
        if np.any(bits & 0x807FFFFF):
            _dequantize_by_scale(codes[box], scales[places], block, inner, out[box], run)
        else:  # powers of two: one table serves all of them
            run(codes[box], (bits >> 23).astype(np.uint16), block, inner, make_products_of_powers(), out[box])


def _dequantize_by_scale(
    codes: CodeArray, scales: FloatArray, block: RowsColumns, phase: RowsColumns, out: HalfArray, run: Recode
) -> None:
    """For scales of any value: looks up products in a table with one page a scale."""
    for places, box, inner in split_by_blocks(codes.shape, block, phase, MOST_PAGES):
        table = multiply_fp8_values(scales[places].ravel())
        pages = np.arange(len(table), dtype=np.uint16).reshape(scales[places].shape)
        run(codes[box], pages, block, inner, table, out[box])


def compute_fp8_scales(group_scales: CodeArray, block: RowsColumns, phase: RowsColumns = (0, 0)) -> CodeArray:
    """The F8_E8M0 scale of each FP8 block [block rows, block columns], from the scales of its FP4 groups
    [rows, columns / 32].

    It is the largest group scale of the block divided by 64, so that 6, the largest FP4 value, becomes 384 at most; all
    group scales of a block must be given. NaN if one of them is. A largest scale below 2^-121 gives 2^-127, the
    smallest scale, which loses no value.
    """
    groups, inner = (block[0], block[1] // FP4_GROUP), (phase[0], phase[1] // FP4_GROUP)
    largest = np.zeros(count_touched_blocks(group_scales.shape, groups, inner), np.uint8)
    raise_to_largest(group_scales, groups, inner, largest)
    return np.where(largest == NAN_SCALE, largest, np.maximum(largest, 6) - 6).astype(np.uint8)


def cast_fp4_to_fp8(
    packed: CodeArray,
    group_scales: CodeArray,
    scales: CodeArray,
    block: RowsColumns,
    phase: RowsColumns,
    out: CodeArray,
    run: Recode = recode,
) -> int:
    """Converts E2M1 pairs [rows, columns / 2] to F8_E4M3 codes [rows, columns]; returns how many values are not exact.

    The even column is in the low nibble; `phase` counts columns. `group_scales` are F8_E8M0, one for 1 x 32 values;
    `scales` are those of the new blocks. A value is exact if code times new scale equals value times group scale. The
    others are rounded to nearest even and saturate at 448; 0x7F where a scale is NaN. Minus zero becomes zero, and
    zero stays zero whatever the scales.
    """
    shape = (packed.shape[0], packed.shape[1] * 2)
    if phase[1] % 2 or block[1] % FP4_GROUP:
        raise ValueError(f"a box of FP4 begins at an even column, and its blocks are whole groups: {phase}, {block}")
    require_fitting_shapes(shape, scales, block, phase, out)
    require_fitting_shapes(shape, group_scales, (1, FP4_GROUP), (0, phase[1] % FP4_GROUP), out)
    group, start = (1, FP4_GROUP // 2), (0, phase[1] % FP4_GROUP // 2)
    inexact, (pairs, misses) = 0, make_fp4_tables()
    for rows in split_rows_by_size(shape, BAND_ELEMENTS):
        pages = _choose_fp4_pages(group_scales[rows], scales, block, (phase[0] + rows.start, phase[1]))
        run(packed[rows], pages, group, start, pairs, out[rows].view(np.uint16))
        if misses[[pages.min(), pages.max()]].any():  # the pages without inexact values are in the middle
            missed = np.empty(packed[rows].shape, np.uint8)
            run(packed[rows], pages, group, start, misses, missed)
            inexact += int(missed.sum())
    return inexact


def raise_to_magnitudes(values: HalfArray, block: RowsColumns, phase: RowsColumns, largest: HalfArray) -> None:
    """Raises `largest` [block rows, block columns] to the largest magnitudes of BF16 values [rows, columns].

    The caller begins with zeros and gives the boxes of a block one by one. A magnitude is the bit pattern without its
    sign; from 0x7F80 on the block has an infinity or NaN, for which there is no scale.
    """
    require_fitting_shapes(values.shape, largest, block, phase, values)
    for rows in split_rows_by_size(values.shape, TILE_ELEMENTS):
        line, inner = divmod(rows.start + phase[0], block[0])
        magnitudes = np.bitwise_and(values[rows], 0x7FFF)
        raise_to_largest(magnitudes, block, (inner, phase[1]), largest[line:])


def raise_to_largest(values: NDArray[Any], block: RowsColumns, phase: RowsColumns, largest: NDArray[Any]) -> None:
    """Raises `largest` to the largest value of each block; it may have more rows than the box touches."""
    lines, places = count_touched_blocks(values.shape, block, phase)
    rows = np.maximum(np.arange(lines) * block[0] - phase[0], 0)
    columns = np.maximum(np.arange(places) * block[1] - phase[1], 0)
    of_rows = np.maximum.reduceat(values, columns, axis=1)  # columns first: rows first takes many times as long
    found = np.maximum.reduceat(of_rows, rows, axis=0)
    np.maximum(largest[: len(rows)], found, out=largest[: len(rows)])


def compute_scales(largest: HalfArray) -> FloatArray:
    """The float32 scales that bring the largest magnitudes to 448; 1 for a block of zeros, NaN if it is not finite."""
    finite = np.where(largest < 0x7F80, largest, 0x7FC0)
    scales = decode_scales(finite.astype(np.uint16), "BF16") / np.float32(448)
    return np.where(largest == 0, np.float32(1), scales)


def round_up_scales(scales: FloatArray) -> CodeArray:
    """Rounds float32 scales up to powers of two, in F8_E8M0. They are positive and below 2^127, or NaN."""
    bits = scales.view(np.uint32)
    codes = np.where(bits <= 1 << 22, 0, (bits + 0x7FFFFF) >> 23)
    return np.where(np.isnan(scales), NAN_SCALE, codes).astype(np.uint8)


def quantize(values: HalfArray, scales: FloatArray, block: RowsColumns, phase: RowsColumns, out: CodeArray) -> int:
    """Divides BF16 values [rows, columns] by float32 scales, into F8_E4M3 codes; returns how many quotients are not
    finite.

    The float32 quotient is rounded to nearest even and saturates at 448, infinities too; NaN is 0x7F. A count above
    zero means that a value is infinite or NaN, or that a scale is NaN, zero or far too small: the caller must refuse.
    """
    require_fitting_shapes(values.shape, scales, block, phase, out)
    bad = 0
    for box, divisors in split_into_tiles(values.shape, scales, block, phase, TILE_ELEMENTS):
        bits = np.left_shift(values[box], 16, dtype=np.uint32)
        quotients = bits.view(np.float32)
        with np.errstate(all="ignore"):
            np.divide(quotients, divisors, out=quotients)
        bad += bits.size - int(np.count_nonzero(np.isfinite(quotients)))
        # The upper half alone gives the code, once its last bit is set where any lower bit is (round to odd).
        bits |= (bits & 0xFFFF) + 0xFFFF
        bits >>= 16
        np.take(make_fp8_codes(), bits.astype(np.intp), mode="clip", out=out[box])
    return bad


def _choose_fp4_pages(group_scales: CodeArray, scales: CodeArray, block: RowsColumns, phase: RowsColumns) -> HalfArray:
    """The page of each group [rows, groups]: how many powers of two its scale is above the new scale."""
    lines = (np.arange(group_scales.shape[0]) + phase[0]) // block[0]
    places = (np.arange(group_scales.shape[1]) + phase[1] // FP4_GROUP) // (block[1] // FP4_GROUP)
    new = scales[:, places][lines]
    pages = np.subtract(group_scales, new, dtype=np.int16)
    np.clip(pages, LEAST_EXPONENT, MOST_EXPONENT, out=pages)
    pages -= LEAST_EXPONENT
    if group_scales.max() == NAN_SCALE or new.max() == NAN_SCALE:
        pages[(group_scales == NAN_SCALE) | (new == NAN_SCALE)] = MOST_EXPONENT + 1 - LEAST_EXPONENT
    return pages.view(np.uint16)


def dequantize_fp4(
    packed: CodeArray,
    scales: CodeArray,
    phase: RowsColumns,
    out: HalfArray,
    run: Recode = recode,
    *,
    keeps_minus_zero: bool = False,
) -> None:
    """Multiplies E2M1 pairs [rows, columns / 2] by F8_E8M0 scales of 1 x 32 values, into BF16 bit patterns; exact.

    `phase` counts columns; the first column of the box is even. A scale of NaN gives 0x7FC0. Minus zero becomes zero,
    as in DeepSeek's script, unless it is kept, as by compressed-tensors.
    """
    require_fitting_shapes((packed.shape[0], packed.shape[1] * 2), scales, (1, FP4_GROUP), phase, out)
    table, group, inner = make_fp4_products(keeps_minus_zero=keeps_minus_zero), FP4_GROUP // 2, (0, phase[1] // 2)
    run(packed, scales.astype(np.uint16), (1, group), inner, table, out.view(np.uint32))


@cache
def compile_recode() -> Recode | None:
    """`recode_each`, compiled at its first call; None without numba, whose import alone takes a second or more."""
    try:
        import numba  # noqa: PLC0415 - only when a cast is really run
    except ImportError:
        return None
    compiled: Recode = numba.njit(nogil=True)(recode_each)
    return compiled


def recode_each(
    codes: NDArray[Any],
    pages: NDArray[Any],
    group: RowsColumns,
    phase: RowsColumns,
    table: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """Does what `recode` does, for numba to compile. Also correct without numba, but slow."""
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


BoxSlices = tuple[slice, slice]
"""Rows and columns of a box, as indices."""


def require_fitting_shapes(
    shape: RowsColumns, scales: NDArray[Any], block: RowsColumns, phase: RowsColumns, out: NDArray[Any]
) -> None:
    """Raises ValueError for shapes that do not fit: lookups clip indices, so the values would be wrong."""
    expected = count_touched_blocks(shape, block, phase)
    if scales.shape != expected or out.shape != shape or not (0 <= phase[0] < block[0] and 0 <= phase[1] < block[1]):
        raise ValueError(f"a box {shape} at {phase} of {block} touches {expected}: {scales.shape} for {out.shape}")


def count_touched_blocks(shape: RowsColumns, block: RowsColumns, phase: RowsColumns) -> RowsColumns:
    """Counts the rows and columns of blocks that a box touches."""
    return -(-(shape[0] + phase[0]) // block[0]), -(-(shape[1] + phase[1]) // block[1])


def split_rows_by_size(shape: RowsColumns, most: int) -> Iterator[slice]:
    """Splits a box into ranges of rows of at most `most` elements, but at least one row."""
    height = max(1, most // max(1, shape[1]))
    for row in range(0, shape[0], height):
        yield slice(row, min(row + height, shape[0]))


def split_into_tiles(
    shape: RowsColumns, of_groups: NDArray[Any], group: RowsColumns, phase: RowsColumns, most: int
) -> Iterator[tuple[BoxSlices, NDArray[Any]]]:
    """Splits a box into tiles of at most `most` elements, each with the values of its groups, one an element.

    The values may have a single row or column, to be broadcast. The next tile overwrites them.
    """
    for columns in _split_columns(shape[1], group[1], phase[1], most):
        left, right = (columns.start + phase[1]) // group[1], (columns.stop - 1 + phase[1]) // group[1]
        skip, width = columns.start + phase[1] - left * group[1], columns.stop - columns.start
        here, room = of_groups[:, left : right + 1], np.empty(0, of_groups.dtype)
        for rows in split_rows_by_size((shape[0], width), most):
            lines = (np.arange(rows.start, rows.stop) + phase[0]) // group[0]
            spread = here[lines[:1] if lines[0] == lines[-1] else lines]
            if right > left:
                if len(room) < len(spread):
                    room = np.empty((len(spread), right - left + 1, group[1]), of_groups.dtype)
                np.copyto(room[: len(spread)], spread[:, :, None])
                spread = room[: len(spread)].reshape(len(spread), -1)[:, skip : skip + width]
            yield (rows, columns), spread


def _split_columns(columns: int, group: int, phase: int, most: int) -> Iterator[slice]:
    """Splits columns into ranges of at most `most`: within single groups if these are wide, else across groups."""
    step = group if group * 2 > min(columns, most) else columns
    for start in range(-phase if step == group else 0, columns, step):
        for piece in split_rows_by_size((min(start + step, columns) - max(start, 0), 1), most):
            yield slice(max(start, 0) + piece.start, max(start, 0) + piece.stop)


def split_by_blocks(
    shape: RowsColumns, block: RowsColumns, phase: RowsColumns, most: int
) -> Iterator[tuple[BoxSlices, BoxSlices, RowsColumns]]:
    """Splits a box into pieces of at most `most` blocks; gives the blocks, the elements and the phase of each."""
    lines, width = count_touched_blocks(shape, block, phase)
    height = max(1, most // max(1, width))
    for line in range(0, lines, height):
        rows, top = _find_block_range(line, height, block[0], phase[0], shape[0])
        for place in range(0, width, most):
            columns, left = _find_block_range(place, most, block[1], phase[1], shape[1])
            yield (slice(line, line + height), slice(place, place + most)), (rows, columns), (top, left)


def _find_block_range(first: int, count: int, size: int, phase: int, end: int) -> tuple[slice, int]:
    """The range of `count` blocks along one dimension of a box, and how much of the first block lies before the box."""
    start = first * size - phase
    return slice(max(0, start), min(end, start + count * size)), max(0, -start)
