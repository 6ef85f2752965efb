"""Every target file to the byte: headers, offsets, and the copies that fill it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from json.encoder import encode_basestring

import numpy as np

from reshard.formats.safetensors import DTYPE_RANK, entry_end, header_bytes
from reshard.planning.copies import Copies, Integers, joined
from reshard.planning.shards import Cut, Series
from reshard.types import RANKS, Cast, Form, Layout, Recipe, Tensor

EVERY_RANK = -1

WHOLE_NAME = "model.safetensors"
"""Of a checkpoint in one file: loaders find it without an index."""

WHOLE_METADATA = '"__metadata__":{"format":"pt"}'
"""Without it, transformers refuses a file."""

LEAST_HEADER = len(WHOLE_METADATA) + 8 + 2 + 8
"""In bytes: with its length, its braces and what aligns it."""

MOST_OFFSETS = 32
"""In bytes: two numbers of 13 digits, and what stands around them."""


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


def lay_out(
    recipe: Recipe, layout: Layout, pieces: Pieces, forms: Sequence[Form] = ()
) -> tuple[tuple[TargetFile, ...], Copies]:
    """Every target file to the byte, and the copies that fill it behind its header; `forms` are those of the files."""
    columns = columns_of(pieces)
    texts = entry_texts(pieces)
    files, parts = [], []
    names = [form.name for form in forms] or file_names(recipe, layout, pieces)
    for rank, name in enumerate(names):
        chosen = np.flatnonzero((columns.rank == EVERY_RANK) | (columns.rank == rank))
        form = forms[rank] if forms and has_form(pieces, chosen, forms[rank]) else None
        if form:
            places = {name: place for place, name in enumerate(form.tensors)}
            chosen = chosen[np.argsort([places[pieces.names[piece]] for piece in chosen.tolist()])]
        sizes = (columns.run * columns.rows)[chosen]
        ends = np.cumsum(sizes)
        bounds = zip(chosen.tolist(), (ends - sizes).tolist(), ends.tolist(), strict=True)
        entries = [f"{texts[piece]}{begin},{end}]}}" for piece, begin, end in bounds]
        header = form.header if form else header_bytes([*metadata(recipe, layout, rank), *entries])
        size = len(header) + int(sizes.sum())
        files.append(TargetFile(name, rank, header, size, chosen, ends + len(header)))
        part = rank if layout.to == RANKS else 0  # a tensor in the second of whole files is still the whole tensor
        parts.append(copies_of(columns, chosen, rank, part, ends - sizes + len(header)))
    return tuple(files), joined(parts)


def metadata(recipe: Recipe, layout: Layout, rank: int) -> list[str]:
    """What a file says of itself: in whole files their format, in rank files what a recipe wants them to say."""
    if layout.to != RANKS:
        return [WHOLE_METADATA]
    if not recipe.describes:
        return []
    facts = {"format": "pt", "rank": str(rank), "ranks": str(layout.ranks), "recipe": recipe.name}
    return [f'"__metadata__":{json.dumps(facts, separators=(",", ":"), ensure_ascii=False)}']


def has_form(pieces: Pieces, chosen: Integers, form: Form) -> bool:
    """Whether the pieces are just the tensors that a file once had."""
    found = {
        pieces.names[piece]: (pieces.tensors[piece].dtype, pieces.cuts[cut].shape)
        for piece, cut in zip(chosen.tolist(), pieces.cut[chosen].tolist(), strict=True)
    }
    return found == {name: (tensor.dtype, tensor.shape) for name, tensor in form.tensors.items()}


def formed(pieces: Pieces, forms: Sequence[Form]) -> tuple[Pieces, list[Form]] | None:
    """The pieces, each in the file where it once was, and the forms of the files that still have any; None if a piece
    was in none.
    """
    places = {name: number for number, form in enumerate(forms) for name in form.tensors}
    if not forms or not set(pieces.names) <= places.keys():
        return None
    numbers = np.array([places[name] for name in pieces.names], np.int64)
    kept, rank = np.unique(numbers, return_inverse=True)
    return replace(pieces, rank=rank.reshape(-1)), [forms[number] for number in kept.tolist()]


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
        return [WHOLE_NAME]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def copies_of(columns: Columns, chosen: Integers, file: int, part: int, target_offset: Integers) -> Copies:
    """The copies of one file's pieces, of each the part of one rank.

    Rows that lie back to back become one run; empty tensors have no copy.
    """
    rows, pitch, run = columns.rows[chosen], columns.pitch[chosen], columns.run[chosen]
    source_offset = columns.source_offset[chosen] + part // columns.repeat[chosen] * run
    run = np.where(run == pitch, run * rows, run)
    rows = np.where(run >= pitch, 1, rows)
    pitch = np.where(rows == 1, run, pitch)
    full = run * rows > 0
    target_file = np.full(len(chosen), file)
    table = (columns.source_file[chosen], source_offset, pitch, run, rows, target_file, target_offset)
    return Copies(*(column[full] for column in table))


def dealt_to_files(pieces: Pieces, casts: Sequence[Cast], parts: int, places: Mapping[str, int], most: int) -> Pieces:
    """The pieces, each in one file, in the order of the source; a file ends before it grows beyond `most` bytes.

    A piece that is larger has a file of its own. `parts` is where casts are numbered from, `places` says by name where
    in the order a tensor of the source has its place; what is computed has that of its weight.
    """
    # Before the files are known, their headers are not: offsets may have so many digits more.
    entries = [len(text.encode()) + MOST_OFFSETS for text in entry_texts(pieces)]
    weights = [casts[tensor.file - parts].weight if tensor.file >= parts else tensor for tensor in pieces.tensors]
    file, held = 0, 0
    rank = np.zeros(len(weights), np.int64)
    for place in np.argsort([places[weight.name] for weight in weights], kind="stable").tolist():
        size = pieces.tensors[place].size + entries[place]
        if held and held + size > most - LEAST_HEADER:
            file, held = file + 1, 0
        held += size
        rank[place] = file
    return replace(pieces, rank=rank)
