"""Layout: every target file to the byte, and the copies that fill it behind its header. Arithmetic on sizes only."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from json.encoder import encode_basestring

import numpy as np

from reshard.copies import Copies, Integers, joined
from reshard.cut import Cut
from reshard.header import DTYPE_RANK, entry_end, header_bytes
from reshard.results import Series
from reshard.types import RANKS, Cast, Layout, Recipe, Tensor

EVERY_RANK = -1
WHOLE_METADATA = '"__metadata__":{"format":"pt"}'
"""Without it, transformers refuses a file."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """What the target holds, in the order in which safetensors lays tensors out; in columns of equal length."""

    names: Sequence[str]
    tensors: Sequence[Tensor]
    """Of the source, or results of casts."""
    cut: Integers
    """Index into `cuts`: a model has 100,000 tensors and some 50 ways to cut them."""
    cuts: Sequence[Cut]
    rank: Integers
    """The one rank, or file, that holds each; or EVERY_RANK."""


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A file to be written: its header to the byte, and where each of its tensors lies."""

    name: str
    rank: int
    """Or its number, where files are not by rank."""
    header: bytes
    size: int
    """In bytes, header included."""
    pieces: Integers
    """Indices into the pieces of the plan, in the order of the file."""
    ends: Integers
    """Where each of them ends, in bytes from the start of the file."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The pieces as numbers: what the layout of the files and the copies are computed from, all at once."""

    source_file: Integers
    source_offset: Integers
    rank: Integers
    rows: Integers
    pitch: Integers
    run: Integers
    repeat: Integers


def pieces_of(series: Sequence[Series]) -> Pieces:
    """All tensors of all series, dtype by dtype, sorted by their names."""
    by_dtype: dict[str, list[tuple[str, int, Tensor, int]]] = {}
    for number, one in enumerate(series):
        ranks = one.ranks.tolist() if one.ranks is not None else [EVERY_RANK] * len(one.names)
        rows = zip(one.names, [number] * len(one.names), one.tensors, ranks, strict=True)
        by_dtype.setdefault(one.tensors[0].dtype, []).extend(rows)
    dtypes = sorted(by_dtype, key=DTYPE_RANK.__getitem__, reverse=True)
    names, numbers, tensors, ranks = zip(*(row for dtype in dtypes for row in sorted(by_dtype[dtype])), strict=True)
    cuts = [one.cut for one in series]
    return Pieces(names, tensors, np.array(numbers, np.int64), cuts, np.array(ranks, np.int64))


def columns_of(pieces: Pieces) -> Columns:
    table = np.array([(cut.rows, cut.pitch, cut.run, cut.repeat) for cut in pieces.cuts], np.int64).reshape(-1, 4)
    file = np.array([tensor.file for tensor in pieces.tensors], np.int64)
    offset = np.array([tensor.offset for tensor in pieces.tensors], np.int64)
    return Columns(file, offset, pieces.rank, *np.ascontiguousarray(table[pieces.cut].T))


def lay_out(recipe: Recipe, layout: Layout, pieces: Pieces) -> tuple[tuple[TargetFile, ...], Copies]:
    """Every target file to the byte, and the copies that fill it behind its header."""
    columns = columns_of(pieces)
    texts = entry_texts(pieces)
    files, parts = [], []
    for rank, name in enumerate(file_names(recipe, layout, pieces)):
        chosen = np.flatnonzero((columns.rank == EVERY_RANK) | (columns.rank == rank))
        sizes = (columns.run * columns.rows)[chosen]
        ends = np.cumsum(sizes)
        bounds = zip(chosen.tolist(), (ends - sizes).tolist(), ends.tolist(), strict=True)
        entries = [f"{texts[piece]}{begin},{end}]}}" for piece, begin, end in bounds]
        header = header_bytes(entries if layout.to == RANKS else [WHOLE_METADATA, *entries])
        size = len(header) + int(sizes.sum())
        files.append(TargetFile(name, rank, header, size, chosen, ends + len(header)))
        part = rank if layout.to == RANKS else 0  # a tensor in the second of whole files is still the whole tensor
        parts.append(copies_of(columns, chosen, rank, part, ends - sizes + len(header)))
    return tuple(files), joined(parts)


def entry_texts(pieces: Pieces) -> list[str]:
    """The entry of each piece in a header, up to its offsets."""
    ends = [entry_end(tensor.dtype, pieces.cuts[cut].shape) for tensor, cut in first_of_each(pieces)]
    names = map(encode_basestring, pieces.names)
    return [name + ends[cut] for name, cut in zip(names, pieces.cut.tolist(), strict=True)]


def first_of_each(pieces: Pieces) -> Iterator[tuple[Tensor, int]]:
    """A tensor of each cut, in the order of the cuts."""
    cuts, places = np.unique(pieces.cut, return_index=True)
    for cut, place in zip(cuts.tolist(), places.tolist(), strict=True):
        yield pieces.tensors[place], cut


def file_names(recipe: Recipe, layout: Layout, pieces: Pieces) -> Iterable[str]:
    if layout.to == RANKS:
        return [recipe.files.format(rank=rank, ranks=layout.ranks) for rank in range(layout.ranks)]
    count = int(pieces.rank.max()) + 1
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def copies_of(columns: Columns, chosen: Integers, file: int, part: int, target_offset: Integers) -> Copies:
    """The copies of one file's pieces, of each the part of one rank. Rows that lie back to back become one run; empty tensors have no copy."""
    rows, pitch, run = columns.rows[chosen], columns.pitch[chosen], columns.run[chosen]
    source_offset = columns.source_offset[chosen] + part // columns.repeat[chosen] * run
    run = np.where(run == pitch, run * rows, run)
    rows = np.where(run >= pitch, 1, rows)
    pitch = np.where(rows == 1, run, pitch)
    full = run * rows > 0
    target_file = np.full(len(chosen), file)
    table = (columns.source_file[chosen], source_offset, pitch, run, rows, target_file, target_offset)
    return Copies(*(column[full] for column in table))


def dealt_to_files(pieces: Pieces, casts: Sequence[Cast], files: int, most: int) -> Pieces:
    """The pieces, each in one file, in the order of the source; a file ends before it grows beyond `most` bytes.

    `files` is the number of files of the source.
    """
    origins = [casts[tensor.file - files].weight if tensor.file >= files else tensor for tensor in pieces.tensors]
    order = np.lexsort(([origin.offset for origin in origins], [origin.file for origin in origins]))
    file, held = 0, 0
    rank = np.zeros(len(order), np.int64)
    for place in order.tolist():
        size = pieces.tensors[place].size
        if held and held + size > most:
            file, held = file + 1, 0
        held += size
        rank[place] = file
    return replace(pieces, rank=rank)
