"""Packed weights that are dequantized, cut into the tiles that are compared at once. Opens no file.

A tile is a box of the result. Some packings lie turned: a row of the result is a column of words or bytes of what is
stored. Their tiles are larger, so that what is read at once is not a few bytes.
"""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from math import ceil, prod
from typing import NamedTuple

from reshard.types import Packed
from reshard.verification.chunks import (
    SAMPLE_BAND_SIZE,
    TILE_SIZE,
    Margin,
    TargetPart,
    sample_evenly,
    split_padding,
)
from reshard.verification.packed_values import EXPERT_GROUP, WORD_BITS

TURNED_TILE_SIZE = 8 << 20
"""In elements, of a tile of a packing that lies turned."""

LEAST_ROWS, LEAST_SAMPLE_ROWS = 1024, 128
"""Of a tile of words that lie turned, and of one of a sample: with 4 bits, 512 and 64 bytes are read at once."""

TURNED = ("awq", "gptq", "gptq-v2", "mxfp4-experts")

BF16_SIZE = 2
"""In bytes, of an element of the result."""


class UnpackedWeight(NamedTuple):
    """A packed weight that is dequantized to BF16, and the parts of the result that ranks hold."""

    packed: Packed
    leading: int
    """So many first dimensions of the result make the rows of the parts."""
    parts: list[TargetPart]

    @property
    def height(self) -> int:
        """The number of rows, as the parts count them."""
        return prod(self.packed.result.shape[: self.leading])

    @property
    def width(self) -> int:
        """Bytes of such a row."""
        return prod(self.packed.result.shape[self.leading :]) * BF16_SIZE


class UnpackedTile(NamedTuple):
    """A box of the result of a packed weight, all of whose dimensions but the last make its rows."""

    whole: UnpackedWeight
    rows: range
    columns: range
    """In elements."""


class TileGrid(NamedTuple):
    """How the result of a packed weight is cut into tiles. No tile lies in two panels: of a stack, in two members."""

    shape: tuple[int, int]
    """Rows and columns of the result, in elements."""
    panel: int
    """In rows."""
    step: tuple[int, int]
    """Rows and columns of a tile."""

    @property
    def across(self) -> int:
        """The number of tiles side by side."""
        return ceil(self.shape[1] / self.step[1])

    @property
    def in_panel(self) -> int:
        """The number of tiles in a panel."""
        return ceil(self.panel / self.step[0]) * self.across

    def find_tile(self, row: int, column: int) -> int:
        """The number of the tile that has an element."""
        panel, inner = divmod(row, self.panel)
        return panel * self.in_panel + inner // self.step[0] * self.across + column // self.step[1]


def split_into_unpacked_tiles(whole: UnpackedWeight, share: Fraction | None) -> Iterator[UnpackedTile]:
    """Splits the result of a packed weight into tiles, in order. With a share, a fraction: small tiles, about this
    share of them, and those at both ends of each part.
    """
    if 0 in whole.packed.result.shape:
        return
    grid = make_tile_grid(whole.packed, is_sample=share is not None)
    count = grid.shape[0] // grid.panel * grid.in_panel
    numbers: Iterable[int] = range(count)
    if share is not None:
        ends = {number for part in whole.parts for number in find_end_tiles(whole, part, grid)}
        numbers = sorted(ends.union(sample_evenly(whole.packed.result.name, count, share)))
    for number in numbers:
        panel, inner = divmod(number, grid.in_panel)
        row, column = inner // grid.across * grid.step[0], inner % grid.across * grid.step[1]
        rows = range(panel * grid.panel + row, panel * grid.panel + min(row + grid.step[0], grid.panel))
        yield UnpackedTile(whole, rows, range(column, min(column + grid.step[1], grid.shape[1])))


def make_tile_grid(packed: Packed, *, is_sample: bool) -> TileGrid:
    """Chooses the tiles of a packed weight: whole rows; only of words that lie turned a part of long rows."""
    *leading, columns = packed.result.shape
    panel = leading[-1] if len(leading) > 1 else prod(leading)
    size = SAMPLE_BAND_SIZE if is_sample else TURNED_TILE_SIZE if packed.packing in TURNED else TILE_SIZE
    step = max(1, size // columns), columns
    if packed.packing == "mxfp4-experts":
        step = max(1, size // columns // EXPERT_GROUP) * EXPERT_GROUP, columns
    elif packed.packing in TURNED:
        least = LEAST_SAMPLE_ROWS if is_sample else LEAST_ROWS
        wide = min(columns, size // least)
        step = max(least, size // wide // WORD_BITS * WORD_BITS), wide
    return TileGrid((prod(leading), columns), panel, step)


def find_end_tiles(whole: UnpackedWeight, part: TargetPart, grid: TileGrid) -> Iterator[int]:
    """The numbers of the tiles that have the first and the last element of a part, unless these are padding."""
    for row, column in ((part.rows.start, part.columns.start), (part.rows.stop - 1, part.columns.stop - 1)):
        if row < whole.height and column < whole.width:
            place = row * whole.width + column
            yield grid.find_tile(place // BF16_SIZE // grid.shape[1], place // BF16_SIZE % grid.shape[1])


def split_unpacked_padding(whole: UnpackedWeight, share: Fraction | None) -> Iterator[Margin]:
    """Splits what parts hold beyond the result into margins, of zeros."""
    for part in whole.parts:
        yield from split_padding(part, whole.height, whole.width, bytes(1), share)


def find_tile_box(tile: UnpackedTile) -> tuple[range, range]:
    """The rows and columns of a tile as parts count them, the columns in bytes. Where a row of the parts is many of the
    result, a tile has whole rows and lies in one row of the parts.
    """
    width = tile.whole.packed.result.shape[-1] * BF16_SIZE
    together = tile.whole.width // width
    if together == 1:
        return tile.rows, range(tile.columns.start * BF16_SIZE, tile.columns.stop * BF16_SIZE)
    row, inner = divmod(tile.rows.start, together)
    return range(row, row + 1), range(inner * width, (inner + len(tile.rows)) * width)
