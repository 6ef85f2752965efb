"""Lays out every target file to the byte: names, headers, offsets, and the copies that fill it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from json.encoder import encode_basestring
from math import prod

import numpy as np
from numpy.typing import NDArray

from reshard.formats.renaming import Renaming, rename_tensors
from reshard.formats.safetensors import BITS, DTYPE_RANK, format_entry_end, format_header
from reshard.formats.slice_names import name_slices
from reshard.planning.copies import Copies, Integers, join_copies
from reshard.planning.shards import Cut, Series
from reshard.planning.slices import SlicePlaces
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import has_ranks
from reshard.types import RANKS, SLICED, WHOLE, Cast, Layout, OriginalFile, Tensor

EVERY_RANK = -1
"""The rank of a piece that goes into the file of every rank."""

WHOLE_NAME = "model.safetensors"
"""File name of a checkpoint in one file: loaders find it without an index."""

WHOLE_METADATA = '"__metadata__":{"format":"pt"}'
"""Metadata of a file in the original layout: without it, transformers refuses the file."""

LEAST_HEADER = len(WHOLE_METADATA) + 8 + 2 + 8
"""Size of a header without entries, in bytes: length, braces and padding for alignment included."""

MOST_OFFSETS = 32
"""Largest size of the two offsets of a header entry, in bytes: two numbers of 13 digits and their punctuation."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """The tensors of the target, and the parts of those that are fused, in the order in which safetensors stores them.
    The columns have equal lengths.
    """

    names: Sequence[str]
    """Names in the target."""
    tensors: Sequence[Tensor]
    """The inputs: source tensors, or results of joins and casts."""
    cut: Integers
    """Index into `cuts`: a model has 100,000 tensors but only about 50 different cuts."""
    cuts: Sequence[Cut]
    rank: Integers
    """The rank, or the number of the file, that each piece is assigned to; or EVERY_RANK."""
    is_first: NDArray[np.bool_]
    """Whether a tensor begins with each piece: with all but the later parts of fused tensors."""
    fused: Mapping[int, tuple[int, ...]]
    """Index of the first piece of each fused tensor -> the shape of the tensor in a file, in elements."""


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A file to be written: its header to the byte, and the place of each tensor."""

    name: str
    rank: int
    """Its rank; in the original layout the number of the file, from 0 on."""
    header: bytes
    """The eight bytes of its length included."""
    size: int
    """In bytes, header included."""
    pieces: Integers
    """Of each tensor its first piece, as an index into the pieces of the plan, in the order of the file."""
    ends: Integers
    """End of each tensor, in bytes from the start of the file."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The pieces as int64 columns of shape [pieces], so that file layout and copies are computed for all at once."""

    source_file: Integers
    """Index of the source file; joins and casts are numbered behind the files."""
    source_offset: Integers
    """In bytes from the start of the file."""
    rank: Integers
    """As in `Pieces`."""
    rows: Integers
    """Number of rows."""
    pitch: Integers
    """Size of a row in the source, in bytes."""
    run: Integers
    """Bytes of each row that one rank gets."""
    repeat: Integers
    """Number of consecutive ranks that get the same part."""


def order_pieces(series: Sequence[Series]) -> Pieces:
    """Orders the tensors of all series as safetensors does: by dtype, then by name; the parts of one behind each
    other.
    """
    by_dtype: dict[str, list[tuple[str, int, int, Tensor, int]]] = {}
    for number, one in enumerate(series):
        count = len(one.names)
        ranks = one.ranks.tolist() if one.ranks is not None else [EVERY_RANK] * count
        parts = one.parts.tolist() if one.parts is not None else [0] * count
        rows = zip(one.names, parts, [number] * count, one.tensors, ranks, strict=True)
        by_dtype.setdefault(one.tensors[0].dtype, []).extend(rows)
    dtypes = sorted(by_dtype, key=DTYPE_RANK.__getitem__, reverse=True)
    names, _, numbers, tensors, ranks = zip(*(row for dtype in dtypes for row in sorted(by_dtype[dtype])), strict=True)
    cut, cuts = np.array(numbers, np.int64), [one.cut for one in series]
    is_first, fused = np.ones(len(names), np.bool_), dict[int, tuple[int, ...]]()
    rank = np.array(ranks, np.int64)
    places = np.flatnonzero(np.array([one.parts is not None for one in series])[cut])  # parts of fused tensors
    if len(places):
        fused = find_fused_shapes(series, names, cut, rank, places)
        is_first[places] = False
        is_first[list(fused)] = True
    return Pieces(names, tensors, cut, cuts, rank, is_first, fused)


def find_fused_shapes(
    series: Sequence[Series], names: Sequence[str], cut: Integers, rank: Integers, places: Integers
) -> dict[int, tuple[int, ...]]:
    """Finds the shape of each fused tensor, or of the slice of it in a file, in elements, by the index of its first
    piece. `cut` has the index of the series of each piece, `rank` its rank, `places` the pieces that are parts. Those
    of a tensor follow one another; all have the same dimensions but the first.
    """
    owners = [(names[place], rank[place]) for place in places.tolist()]
    starts = [at for at, owner in enumerate(owners) if not at or owner != owners[at - 1]]
    rows = np.array([prod(one.cut.shape[:1]) for one in series], np.int64)[cut[places]]
    parts = np.diff(starts, append=len(places)).tolist()
    found = {}
    for place, total, count in zip(places[starts].tolist(), np.add.reduceat(rows, starts).tolist(), parts, strict=True):
        one = series[cut[place]]
        members, rest = count // one.of_member if one.of_member else 0, one.cut.shape[1:]
        found[place] = (members, total // members, *rest) if members else (total, *rest)
    return found


def make_columns(pieces: Pieces) -> Columns:
    """Makes the columns of the pieces."""
    table = np.array([(cut.rows, cut.pitch, cut.run, cut.repeat) for cut in pieces.cuts], np.int64).reshape(-1, 4)
    file = np.array([tensor.file for tensor in pieces.tensors], np.int64)
    offset = np.array([tensor.offset for tensor in pieces.tensors], np.int64)
    return Columns(file, offset, pieces.rank, *np.ascontiguousarray(table[pieces.cut].T))


def lay_out_files(
    recipe: Recipe, layout: Layout, pieces: Pieces, forms: Sequence[OriginalFile] = ()
) -> tuple[tuple[TargetFile, ...], Copies]:
    """Lays out every target file to the byte, and makes the copies that fill it. `forms` are the original files to
    restore, one for each target file; empty if there are none.
    """
    columns = make_columns(pieces)
    texts, kinds = write_entries(pieces), list(find_first_of_each(pieces))
    slices = SlicePlaces() if layout.to == SLICED else None
    is_uneven = slices is not None or any(cut.uneven for cut in pieces.cuts)
    holders = np.array([cut.count_ranks() for cut in pieces.cuts], np.int64)[pieces.cut]
    files, parts = [], []
    names = [form.name for form in forms] or name_files(recipe, layout, pieces)
    for rank, name in enumerate(names):
        chosen = np.flatnonzero(((columns.rank == EVERY_RANK) & (rank < holders)) | (columns.rank == rank))
        form = forms[rank] if forms and has_form(pieces, chosen, forms[rank]) else None
        if form:
            places = {name: place for place, name in enumerate(form.tensors)}
            chosen = chosen[np.argsort([places[pieces.names[piece]] for piece in chosen.tolist()])]
        part = 0 if layout.to == WHOLE else rank  # a tensor in the second of whole files is still the whole tensor
        sizes = measure_parts(pieces.cuts, kinds, part)[pieces.cut[chosen]]
        begins, is_first = np.cumsum(sizes) - sizes, pieces.is_first[chosen]
        firsts, starts = chosen[is_first], begins[is_first]
        ends = np.append(starts[1:], sizes.sum())[: len(starts)]
        shapes = rewrite_entries(texts, pieces, firsts, part) if is_uneven else []
        metadata = write_metadata(recipe, layout, rank)
        if slices:
            metadata = [slices.write(rank, [pieces.names[piece] for piece in firsts.tolist()], shapes)]
        bounds = zip(firsts.tolist(), starts.tolist(), ends.tolist(), strict=True)
        entries = [f"{texts[piece]}{begin},{end}]}}" for piece, begin, end in bounds]
        header = form.header if form else format_header([*metadata, *entries])
        size = len(header) + int(sizes.sum())
        files.append(TargetFile(name, rank, header, size, firsts, ends + len(header)))
        parts.append(make_copies(columns, chosen, rank, part, begins + len(header)))
    return tuple(files), join_copies(parts)


def rewrite_entries(texts: list[str], pieces: Pieces, firsts: Integers, rank: int) -> list[tuple[int, ...]]:
    """Writes the header entries of the parts of a rank, in the place of those of the rank before. Returns the shapes
    of the parts, in elements.
    """
    shapes = list(list_shapes(pieces, firsts, rank))
    for piece, shape in zip(firsts.tolist(), shapes, strict=True):
        texts[piece] = write_entry(pieces, piece, shape)
    return shapes


def measure_parts(cuts: Sequence[Cut], kinds: Iterable[tuple[Tensor, int]], rank: int) -> Integers:
    """Measures the part of a rank by dtype and shape, for each cut, in bytes. What the copies bring is measured by
    their runs, so that the proof of the plan sees if the two differ. `kinds` has a tensor of each cut.
    """
    sizes = [prod(cuts[cut].compute_part_shape(rank)) * BITS[tensor.dtype] // 8 for tensor, cut in kinds]
    return np.array(sizes, np.int64)


def list_shapes(pieces: Pieces, firsts: Integers, rank: int) -> Iterator[tuple[int, ...]]:
    """Lists the shapes, in elements, that tensors have in the file of a rank; `firsts` are their first pieces."""
    shapes = [cut.compute_part_shape(rank) for cut in pieces.cuts]
    for piece, cut in zip(firsts.tolist(), pieces.cut[firsts].tolist(), strict=True):
        yield pieces.fused.get(piece, shapes[cut])


def write_metadata(recipe: Recipe, layout: Layout, rank: int) -> list[str]:
    """Writes the metadata entry of a header: of whole files the format; in rank files rank, ranks and recipe, if the
    recipe asks for them. Empty without metadata.
    """
    if layout.to != RANKS or not has_ranks(recipe):
        return [WHOLE_METADATA]
    if not recipe.describes:
        return []
    facts = {"format": "pt", "rank": str(rank), "ranks": str(layout.ranks), "recipe": recipe.name}
    return [f'"__metadata__":{json.dumps(facts, separators=(",", ":"), ensure_ascii=False)}']


def has_form(pieces: Pieces, chosen: Integers, form: OriginalFile) -> bool:
    """Whether the pieces are exactly the tensors of an original file."""
    found = {
        pieces.names[piece]: (pieces.tensors[piece].dtype, pieces.cuts[cut].shape)
        for piece, cut in zip(chosen.tolist(), pieces.cut[chosen].tolist(), strict=True)
    }
    return found == {name: (tensor.dtype, tensor.shape) for name, tensor in form.tensors.items()}


def restore_forms(
    pieces: Pieces, forms: Sequence[OriginalFile], renaming: Renaming = ()
) -> tuple[Pieces, list[OriginalFile]] | None:
    """Assigns each piece to its original file. Returns the pieces, and the original files that still have tensors; None
    if a piece was in no original file.

    `renaming` led from the names in the original files to those of the pieces. The pieces get the original names back
    if all files come out as they were, byte for byte; else all keep the names of the recipe.
    """
    renamed = [replace(form, tensors=rename_tensors(form.tensors, renaming)) for form in forms] if renaming else forms
    places = {name: number for number, form in enumerate(renamed) for name in form.tensors}
    if not forms or not set(pieces.names) <= places.keys():
        return None
    numbers = np.array([places[name] for name in pieces.names], np.int64)
    kept, rank = np.unique(numbers, return_inverse=True)
    assigned = replace(pieces, rank=rank.reshape(-1))
    if not renaming:
        return assigned, [forms[number] for number in kept.tolist()]
    is_unique = len(places) == sum(len(form.tensors) for form in forms)  # anyone can write a manifest
    if (
        is_unique
        and len(kept) == len(forms)
        and all(has_form(pieces, np.flatnonzero(numbers == number), form) for number, form in enumerate(renamed))
    ):
        return replace(assigned, names=list_original_names(pieces, forms, renamed)), list(forms)
    return assigned, [replace(renamed[number], header=b"", tensors={}) for number in kept.tolist()]


def list_original_names(
    pieces: Pieces, forms: Sequence[OriginalFile], renamed: Sequence[OriginalFile]
) -> Sequence[str]:
    """Lists the names of the pieces in the original files. `renamed` are the same files under the pieces' names."""
    pairs = zip(forms, renamed, strict=True)
    originals = {new: old for form, other in pairs for old, new in zip(form.tensors, other.tensors, strict=True)}
    return [originals[name] for name in pieces.names]


def write_entries(pieces: Pieces) -> list[str]:
    """Writes the header entry of each tensor, up to its offsets, at the place of its first piece."""
    ends = [format_entry_end(tensor.dtype, pieces.cuts[cut].shape) for tensor, cut in find_first_of_each(pieces)]
    names = map(encode_basestring, pieces.names)
    texts = [name + ends[cut] for name, cut in zip(names, pieces.cut.tolist(), strict=True)]
    for piece, shape in pieces.fused.items():
        texts[piece] = write_entry(pieces, piece, shape)
    return texts


def write_entry(pieces: Pieces, piece: int, shape: tuple[int, ...]) -> str:
    """Writes the header entry of a tensor of some shape, up to its offsets, by its first piece."""
    return encode_basestring(pieces.names[piece]) + format_entry_end(pieces.tensors[piece].dtype, shape)


def find_first_of_each(pieces: Pieces) -> Iterator[tuple[Tensor, int]]:
    """Finds the first tensor of each cut; yields the tensor and the index of the cut."""
    cuts, places = np.unique(pieces.cut, return_index=True)
    for cut, place in zip(cuts.tolist(), places.tolist(), strict=True):
        yield pieces.tensors[place], cut


def name_files(recipe: Recipe, layout: Layout, pieces: Pieces) -> Iterable[str]:
    """Names the target files: by the pattern of the recipe, or as Hugging Face names them."""
    if layout.to != WHOLE:
        return name_rank_files(recipe, layout)
    count = int(pieces.rank.max()) + 1
    if count == 1:
        return [WHOLE_NAME]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def name_rank_files(recipe: Recipe, layout: Layout) -> list[str]:
    """Names the file of each rank; of a recipe without ranks its one file."""
    if layout.to == SLICED:
        return name_slices(layout.ranks)
    return [recipe.files.format(rank=rank, ranks=layout.ranks) for rank in range(layout.ranks)]


def measure_runs(columns: Columns, chosen: Integers, part: int) -> Integers:
    """Measures the bytes that one rank gets of each row of the chosen pieces: of uneven parts, what is left for it."""
    run = columns.run[chosen]
    return np.clip(columns.pitch[chosen] - part // columns.repeat[chosen] * run, 0, run)


def make_copies(columns: Columns, chosen: Integers, file: int, part: int, target_offset: Integers) -> Copies:
    """Makes the copies of one file: of each piece the part of one rank. `target_offset` is in bytes.

    Contiguous rows become one run; empty tensors have no copy.
    """
    rows, pitch = columns.rows[chosen], columns.pitch[chosen]
    source_offset = columns.source_offset[chosen] + part // columns.repeat[chosen] * columns.run[chosen]
    run = measure_runs(columns, chosen, part)
    run = np.where(run == pitch, run * rows, run)
    rows = np.where(run >= pitch, 1, rows)
    pitch = np.where(rows == 1, run, pitch)
    full = run * rows > 0
    target_file = np.full(len(chosen), file)
    table = (columns.source_file[chosen], source_offset, pitch, run, rows, target_file, target_offset)
    return Copies(*(column[full] for column in table))


def assign_to_files(pieces: Pieces, casts: Sequence[Cast], parts: int, places: Mapping[str, int], most: int) -> Pieces:
    """Assigns each piece to one file, in the order of the source, so that no file exceeds `most` bytes.

    A larger piece gets a file of its own. `parts` is the number of the first cast. `places` maps the name of a source
    tensor to its place in the order; a computed tensor has the place of its weight.
    """
    # The header of a file is not known before its tensors are: reserve room for the longest offsets.
    entries = [len(text.encode()) + MOST_OFFSETS for text in write_entries(pieces)]
    made = [casts[tensor.file - parts] if tensor.file >= parts else None for tensor in pieces.tensors]
    weights = [
        tensor if cast is None else cast.result if cast.packed else cast.weight
        for cast, tensor in zip(made, pieces.tensors, strict=True)
    ]
    file, filled = 0, 0
    rank = np.zeros(len(weights), np.int64)
    for place in np.argsort([places[weight.name] for weight in weights], kind="stable").tolist():
        size = pieces.tensors[place].size + entries[place]
        if filled and filled + size > most - LEAST_HEADER:
            file, filled = file + 1, 0
        filled += size
        rank[place] = file
    return replace(pieces, rank=rank)
