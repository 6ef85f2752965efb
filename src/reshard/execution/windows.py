"""Groups the copies of a plan into windows: byte ranges of the source, each read once and written to many places.

Pure: opens no file. The source is read in windows of a few MiB, each once, whatever the number of ranks. A window is
written in groups: pieces that lie back to back in a target file are one write. A group of one contiguous piece is
written from where it was read; the pieces of any other (small tensors, columns of a matrix) are first gathered:

    window of the source     | norm | scale | w w w w w w w w |       one read
                                |       |      |
    groups, rank 0           | norm | scale |  | w w w w w w w w |    two writes
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.casts.shapes import flatten_to_matrix, takes_strips
from reshard.formats.safetensors import BITS
from reshard.planning.copies import LARGEST_GAP, Copies, Integers
from reshard.types import Cast, Join

WINDOW_SIZE = 4 << 20
"""In bytes. Small enough to stay in the processor's cache between the read and the write."""

FILES_TOGETHER = 1000
"""At most so many small source files are grouped at once."""

NO_BANDS: Mapping[int, int] = {}

NONE_IN_ORDER: frozenset[int] = frozenset()


class Piece(NamedTuple):
    """`rows` runs of `run` bytes in a window, their starts `pitch` bytes apart, from byte `start` of the window on."""

    start: int
    pitch: int
    run: int
    rows: int


class Group(NamedTuple):
    """Pieces that lie back to back in a target file."""

    target_file: int
    target_offset: int
    size: int
    """In bytes."""
    pieces: list[Piece]


class Window(NamedTuple):
    """A byte range of a source file, with the groups that are written from it."""

    source_file: int
    offset: int
    """In bytes from the start of the file."""
    size: int
    """In bytes."""
    groups: list[Group]


@dataclass(frozen=True, slots=True)
class PieceTable:
    """Pieces in columns. `window` is the number of each one's window; pieces of different `cell`s are never one write.

    The cells of a target file depend on that file alone. So its groups, which are the ranges with a checksum, are the
    same whichever other ranks are written along with it.
    """

    window: Integers
    cell: Integers
    base: Integers
    """In bytes, where the source file of each piece begins: see `Batch`."""
    grid: Integers
    """In bytes: no window crosses a multiple of it, counted from the base."""
    source_offset: Integers
    pitch: Integers
    run: Integers
    rows: Integers
    target_file: Integers
    target_offset: Integers

    def pick(self, index: Integers | NDArray[np.bool_]) -> "PieceTable":
        """The pieces at some indices, or where a mask is true."""
        return PieceTable(*(getattr(self, name)[index] for name in PieceTable.__slots__))

    @property
    def ends(self) -> Integers:
        """Source offset behind the last byte of each piece."""
        return self.source_offset + (self.rows - 1) * self.pitch + self.run


class Batch(NamedTuple):
    """Pieces of several source files, laid one behind the other so far apart that no window has bytes of two."""

    pieces: PieceTable
    """In the order of window, target file and target offset."""
    bases: Integers
    """In bytes, where each file begins."""
    files: Integers
    """Their numbers."""


def make_windows(
    copies: Copies,
    size: int = WINDOW_SIZE,
    bands: Mapping[int, int] = NO_BANDS,
    in_order: Collection[int] = NONE_IN_ORDER,
) -> Iterator[Window]:
    """The windows of all copies, source file by source file, each of at most `size` bytes.

    `bands` has, for joins and casts, how many bytes are best made together: their windows end at multiples of it. Up to
    FILES_TOGETHER of them, which are small, are grouped at once.

    Neighbours in the order write to different files as far as possible, for two writers of one file wait for each
    other; but the windows of each of `in_order`, which are casts, follow their offsets. Every byte that is copied lies
    in exactly one window, except columns of rows longer than a window.
    """
    for batch in make_batches(copies, size, bands, in_order):
        for window in build_windows(batch.pieces, is_in_order=int(batch.files[0]) in in_order):
            place = int(np.searchsorted(batch.bases, window.offset, side="right")) - 1
            yield window._replace(source_file=int(batch.files[place]), offset=window.offset - int(batch.bases[place]))


def make_batches(
    copies: Copies, size: int, bands: Mapping[int, int], in_order: Collection[int] = NONE_IN_ORDER
) -> Iterator[Batch]:
    """The pieces of all windows, as `make_windows` has them: those of one source file, or of several small ones."""
    merged = merge_copies(copies)
    order = np.lexsort((merged.source_offset, merged.source_file))
    files = merged.source_file[order]
    bounds = np.flatnonzero(np.diff(files, prepend=-1, append=-1)).tolist()
    batch: list[tuple[int, int, int]] = []
    for begin, end in pairwise(bounds):
        file = int(files[begin])
        grid = max(size // bands[file], 1) * bands[file] if file in bands else size
        is_alone = file in in_order or (bool(batch) and int(files[batch[0][0]]) in in_order)
        if batch and (file not in bands or is_alone or len(batch) == FILES_TOGETHER):
            yield make_batch(merged, order, batch, size)
            batch = []
        batch.append((begin, end, grid))
    if batch:
        yield make_batch(merged, order, batch, size)


def make_batch(copies: Copies, order: Integers, batch: Sequence[tuple[int, int, int]], size: int) -> Batch:
    """The pieces of several source files. `batch` has begin and end of the copies of each in `order`, and its grid."""
    chosen = order[batch[0][0] : batch[-1][1]]
    counts = [end - begin for begin, end, _ in batch]
    starts = np.array([begin - batch[0][0] for begin, _, _ in batch])
    reach = copies.source_offset[chosen] + (copies.rows[chosen] - 1) * copies.pitch[chosen] + copies.run[chosen]
    room = np.maximum.reduceat(reach, starts) + LARGEST_GAP + 1
    bases = np.cumsum(room) - room
    base = np.repeat(bases, counts)
    zeros = np.zeros(len(chosen), np.int64)
    table = PieceTable(
        zeros,
        zeros,
        base,
        np.repeat([grid for _, _, grid in batch], counts),
        base + copies.source_offset[chosen],
        copies.pitch[chosen],
        copies.run[chosen],
        copies.rows[chosen],
        copies.target_file[chosen],
        copies.target_offset[chosen],
    )
    return Batch(cut_into_windows(table, size), bases, copies.source_file[chosen[starts]])


def merge_copies(copies: Copies) -> Copies:
    """Merges copies that follow each other both in the source and in the target; in the order of the target."""
    order = np.lexsort((copies.target_offset, copies.target_file))
    columns = {name: getattr(copies, name)[order] for name in Copies.__slots__}
    start, run, rows = columns["source_offset"], columns["run"], columns["rows"]
    follows = np.zeros(len(order), np.bool_)
    follows[1:] = (
        (start[1:] == start[:-1] + run[:-1])
        & (np.diff(columns["source_file"]) == 0)
        & (np.diff(columns["target_file"]) == 0)
        & (rows[1:] == 1)
        & (rows[:-1] == 1)
    )
    firsts = np.flatnonzero(~follows)
    total = np.add.reduceat(run, firsts) if len(firsts) else run
    merged = {name: column[firsts] for name, column in columns.items()}
    merged["run"] = np.where(merged["rows"] == 1, total, merged["run"])
    merged["pitch"] = np.where(merged["rows"] == 1, total, merged["pitch"])
    return Copies(**merged)


def cut_into_windows(table: PieceTable, size: int) -> PieceTable:
    """Cuts pieces, which come in the order of their source offset, into windows; in the order of these."""
    is_flat = table.rows == 1
    is_wide = ~is_flat & (table.pitch > size)
    flat = [table.pick(is_flat), split_rows(table.pick(is_wide))]
    runs = number_run_windows(split_at_grid(concatenate_tables(flat)))
    bands = number_band_windows(table.pick(~is_flat & ~is_wide), int(runs.window.max(initial=-1)) + 1)
    pieces = concatenate_tables([runs, bands])
    return pieces.pick(np.lexsort((pieces.target_offset, pieces.target_file, pieces.window)))


def concatenate_tables(tables: list[PieceTable]) -> PieceTable:
    """One table of several."""
    return PieceTable(*(np.concatenate([getattr(table, name) for table in tables]) for name in PieceTable.__slots__))


def expand_counts(parts: Integers) -> tuple[Integers, Integers]:
    """For rows split into `parts` parts each: for every part the index of its row, and its index within the row."""
    index = np.repeat(np.arange(len(parts)), parts)
    return index, np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)


def split_rows(table: PieceTable) -> PieceTable:
    """Makes each row of each piece a piece of its own."""
    index, row = expand_counts(table.rows)
    piece = table.pick(index)
    return replace(
        piece,
        source_offset=piece.source_offset + row * piece.pitch,
        pitch=piece.run,
        rows=np.ones(len(row), np.int64),
        target_offset=piece.target_offset + row * piece.run,
    )


def split_at_grid(table: PieceTable) -> PieceTable:
    """Cuts contiguous pieces where the source offset, counted from the base, is a multiple of the grid."""
    first = (table.source_offset - table.base) // table.grid
    index, place = expand_counts((table.ends - table.base - 1) // table.grid - first + 1)
    piece, cell = table.pick(index), first[index] + place
    start = np.maximum(piece.source_offset, piece.base + cell * piece.grid)
    run = np.minimum(piece.ends, piece.base + (cell + 1) * piece.grid) - start
    target_offset = piece.target_offset + start - piece.source_offset
    return replace(piece, window=cell, cell=cell, source_offset=start, pitch=run, run=run, target_offset=target_offset)


def number_run_windows(table: PieceTable) -> PieceTable:
    """Numbers the windows of contiguous pieces: a new one at each multiple of the grid and behind each long gap."""
    by_file = table.pick(np.lexsort((table.source_offset, table.target_file)))
    starts_cell = find_long_gaps(by_file.cell, by_file.source_offset, by_file.ends)
    starts_cell[1:] |= np.diff(by_file.target_file) != 0
    table = replace(by_file, cell=np.cumsum(starts_cell))
    table = table.pick(np.argsort(table.source_offset, kind="stable"))
    starts_window = find_long_gaps(table.window, table.source_offset, np.maximum.accumulate(table.ends))
    return replace(table, window=np.cumsum(starts_window) - 1)


def find_long_gaps(grid: Integers, starts: Integers, reached: Integers) -> NDArray[np.bool_]:
    """Whether each piece begins a new cell of the grid, or comes behind a gap of more than LARGEST_GAP bytes."""
    is_first = np.ones(len(starts), np.bool_)
    is_first[1:] = (np.diff(grid) != 0) | (starts[1:] - reached[:-1] > LARGEST_GAP)
    return is_first


def number_band_windows(table: PieceTable, first: int) -> PieceTable:
    """Cuts rectangles into bands of as many rows as fit a window. Column shards of one matrix share their windows."""
    starts_matrix = np.ones(len(table.rows), np.bool_)
    step = np.diff(table.source_offset)
    starts_matrix[1:] = (
        (np.diff(table.pitch) != 0) | (np.diff(table.rows) != 0) | ((step != table.run[:-1]) & (step != 0))
    )
    height = np.maximum(table.grid // table.pitch, 1)
    index, place = expand_counts(-(-table.rows // height))
    piece, row = table.pick(index), np.asarray(place * height[index], np.int64)
    keys = np.stack([np.cumsum(starts_matrix)[index], place])
    window = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1) if len(place) else place
    return replace(
        piece,
        window=first + window,
        cell=place,
        source_offset=piece.source_offset + row * piece.pitch,
        rows=np.minimum(height[index], piece.rows - row),
        target_offset=piece.target_offset + row * piece.run,
    )


def build_windows(pieces: PieceTable, *, is_in_order: bool = False) -> Iterator[Window]:
    """Builds windows from pieces in the order of window, target file and target offset. `source_file` is 0 in all."""
    sizes = pieces.run * pieces.rows
    is_first = np.diff(pieces.window, prepend=-1) != 0
    bounds = np.flatnonzero(is_first)
    offsets = np.minimum.reduceat(pieces.source_offset, bounds)
    ends = np.maximum.reduceat(pieces.ends, bounds)
    starts_group = is_first.copy()
    starts_group[1:] |= (np.diff(pieces.target_file) != 0) | (np.diff(pieces.cell) != 0)
    starts_group[1:] |= pieces.target_offset[1:] != (pieces.target_offset + sizes)[:-1]
    groups = np.flatnonzero(starts_group)
    group_sizes = np.add.reduceat(sizes, groups).tolist()
    group_ends = [*groups[1:].tolist(), len(sizes)]
    group_bounds = [*np.searchsorted(groups, bounds).tolist(), len(groups)]
    starts = pieces.source_offset - np.repeat(offsets, np.diff(bounds, append=len(sizes)))
    columns = (column.tolist() for column in (starts, pieces.pitch, pieces.run, pieces.rows))
    table = list(map(Piece._make, zip(*columns, strict=True)))
    files, places = pieces.target_file[groups].tolist(), pieces.target_offset[groups].tolist()
    begins = groups.tolist()
    turns = np.argsort(offsets) if is_in_order else interleave_target_files(pieces, sizes, bounds, offsets)
    for window in turns.tolist():
        chosen = range(group_bounds[window], group_bounds[window + 1])
        found = [Group(files[g], places[g], group_sizes[g], table[begins[g] : group_ends[g]]) for g in chosen]
        turn = window % len(found)
        offset = int(offsets[window])
        yield Window(0, offset, int(ends[window]) - offset, found[turn:] + found[:turn])


def interleave_target_files(pieces: PieceTable, sizes: Integers, bounds: Integers, offsets: Integers) -> Integers:
    """Orders the windows so that neighbours write mainly to different target files; returns their numbers."""
    total = np.add.reduceat(sizes, bounds)
    by_size = np.lexsort((sizes, pieces.window))
    largest = by_size[[*(bounds[1:] - 1), len(sizes) - 1]]
    number = np.argsort(np.argsort(offsets))
    # A window that goes to many files equally has no owner: it is counted to each file in turn.
    ranks = int(pieces.target_file.max()) + 1
    owner = np.where(sizes[largest] * 2 >= total, pieces.target_file[largest], number % ranks)
    by_owner = np.lexsort((number, owner))
    firsts = np.diff(owner[by_owner], prepend=-1) != 0
    place = np.arange(len(bounds))
    turn = np.empty(len(bounds), np.int64)
    turn[by_owner] = place - np.maximum.accumulate(np.where(firsts, place, 0))
    return np.lexsort((owner, turn))


def choose_bands(made: Sequence[Join | Cast], files: int, most: int) -> dict[int, int]:
    """For joins and casts, by file number: how many bytes are best made together, at most `most`.

    Whole rows, and whole rows of blocks if they fit, so that every input byte is read once.
    """
    found = {}
    for place, cast in enumerate(made):
        if isinstance(cast, Join):
            row = cast.result.size // cast.rows
            found[files + place] = row if cast.rows > 1 and 0 < row <= most else most
            continue
        rows, columns = flatten_to_matrix(cast.result.shape)
        row = columns * BITS[cast.result.dtype] // 8
        height = max(cast.block[0], cast.new_block[0]) if not cast.is_scale and cast.operation != "pad" else 1
        if 0 < row <= most and rows:
            found[files + place] = row * height if row * height <= most else row
    return found


def list_in_order(made: Sequence[Join | Cast], files: int) -> frozenset[int]:
    """Lists the casts, by file number, whose windows must follow one another: those that take strips out of codes."""
    return frozenset(files + place for place, one in enumerate(made) if isinstance(one, Cast) and takes_strips(one))
