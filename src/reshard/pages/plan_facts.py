"""The numbers of a plan that its page shows: bytes by row and file, by kind and file, by source file; replicas."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from reshard.numbered_names import split_name
from reshard.pages.module_kinds import KINDS, find_module_kind, name_row, sort_rows
from reshard.planning.copies import Integers
from reshard.planning.plan import Plan
from reshard.types import PACKED, Checkpoint, Tensor

Sizes = Mapping[int, int]
"""Bytes by source file."""


class Replication(NamedTuple):
    """Tensors of one name, but for the numbers, that several files hold, whole or in part."""

    module: str
    """The name, with `#` for each number."""
    tensors: int
    """The number of tensors."""
    least: int
    """Number of files that hold the same bytes, where they are fewest."""
    most: int
    size: int
    """Of these tensors, each byte counted once, in bytes."""
    extra: int
    """What the files hold of them beyond that, in bytes."""


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """The numbers of a plan. Tables are int64, with a column for each target file. Sizes are in bytes, without
    headers.
    """

    rows: Sequence[str]
    """The layers, and the names of what is in none, sorted."""
    kinds: Sequence[frozenset[str]]
    """Of each row the names of its tensors within it: rows of the same names should have the same sizes."""
    cells: Integers
    """By row and file."""
    tensors: Integers
    """Tensors by row and file."""
    parts: Integers
    """By kind, as in KINDS, and file."""
    links: Integers
    """By source file and target file: bytes of the target that come from there."""
    made: Integers
    """By file: the bytes that are computed, or made of one value."""
    joined: Integers
    """By file: the bytes that are put together from several tensors of a file each, and not computed."""
    replications: Sequence[Replication]
    """The most costly first."""
    replicated: Integers
    """By file: the bytes that another file has too."""

    @property
    def sizes(self) -> Integers:
        """Of the tensors of each file, in bytes."""
        total: Integers = self.cells.sum(axis=0)
        return total


def collect_facts(plan: Plan) -> PlanFacts:
    """Collects the numbers of a plan."""
    names = {piece: plan.pieces.names[piece] for piece in list_pieces(plan)}
    row_names = {piece: name_row(name) for piece, name in names.items()}
    rows = sort_rows(set(row_names.values()))
    places = {row: place for place, row in enumerate(rows)}
    within: list[set[str]] = [set() for _ in rows]
    table = np.zeros((len(plan.pieces.names), 2), np.int64)
    for piece, name in names.items():
        module, row = split_name(name)[0], places[row_names[piece]]
        within[row].add(module)
        table[piece] = row, KINDS.index(find_module_kind(module))
    cells, tensors, parts = (np.zeros((size, len(plan.files)), np.int64) for size in (len(rows), len(rows), len(KINDS)))
    for number, file in enumerate(plan.files):
        sizes = np.diff(file.ends, prepend=len(file.header))
        of_row, of_kind = table[file.pieces].T
        np.add.at(cells[:, number], of_row, sizes)
        np.add.at(tensors[:, number], of_row, 1)
        np.add.at(parts[:, number], of_kind, sizes)
    replications, replicated = find_replications(plan)
    made, joined = (add_by_file(plan, chosen) for chosen in find_made(plan))
    return PlanFacts(
        rows,
        [*map(frozenset, within)],
        cells,
        tensors,
        parts,
        measure_links(plan),
        made,
        joined,
        replications,
        replicated,
    )


def list_pieces(plan: Plan) -> Iterator[int]:
    """Lists the first pieces of the tensors in the files, each once, as indices into the pieces of the plan."""
    chosen = np.zeros(len(plan.pieces.names), np.bool_)
    for file in plan.files:
        chosen[file.pieces] = True
    yield from np.flatnonzero(chosen).tolist()


def count_target_dtypes(plan: Plan) -> dict[str, list[int]]:
    """Counts the tensors of all files, and their bytes, by dtype."""
    names = sorted({tensor.dtype for tensor in plan.pieces.tensors})
    places = {name: place for place, name in enumerate(names)}
    of_piece = np.array([places[tensor.dtype] for tensor in plan.pieces.tensors], np.int64)
    table = np.zeros((len(names), 2), np.int64)
    for file in plan.files:
        sizes = np.diff(file.ends, prepend=len(file.header))
        np.add.at(table, of_piece[file.pieces], np.stack([np.ones_like(sizes), sizes], axis=1))
    return {name: row for name, row in zip(names, table.tolist(), strict=True) if row[0]}


def add_by_file(plan: Plan, chosen: Integers) -> Integers:
    """Adds up the sizes of some copies by target file. `chosen` are their indices."""
    total = np.zeros(len(plan.files), np.int64)
    np.add.at(total, plan.copies.target_file[chosen], plan.copies.sizes[chosen])
    return total


def find_made(plan: Plan) -> tuple[Integers, Integers]:
    """Finds the copies of casts, and those of joins, as indices."""
    files, file = len(plan.source.files), plan.copies.source_file
    return np.flatnonzero(file >= plan.source.parts), np.flatnonzero((file >= files) & (file < plan.source.parts))


def measure_links(plan: Plan) -> Integers:
    """Finds how many bytes of each target file come from each source file: int64 of shape [source files, files].

    A computed tensor comes from where its weight lies. One that is put together comes from the files of its parts, in
    proportion to their sizes; of equal replicas, from the first.
    """
    files, copies = len(plan.source.files), plan.copies
    pairs, where = np.unique(copies.source_file * len(plan.files) + copies.target_file, return_inverse=True)
    sizes = np.zeros(len(pairs), np.int64)
    np.add.at(sizes, where.reshape(-1), copies.sizes)
    links = np.zeros((files, len(plan.files)), np.int64)
    origins: dict[int, Sizes] = {}
    for pair, size in zip(pairs.tolist(), sizes.tolist(), strict=True):
        source, target = divmod(pair, len(plan.files))
        for file, share in split_size(size, trace_file(plan, source, origins)):
            links[file, target] += share
    return links


def trace_file(plan: Plan, number: int, known: dict[int, Sizes]) -> Sizes:
    """Traces a file, a join or a cast to the source files that it lies in. Empty for what is made of nothing."""
    files, source = len(plan.source.files), plan.source
    if number < files:
        return {number: 1}
    if number not in known:
        if number >= source.parts:
            cast = plan.casts[number - source.parts]
            tensors = [] if cast.operation == "fill" else [find_stored(cast.weight, source)]
        else:
            tensors = [copies[0] for copies in source.joins[number - files].parts]
        total = Counter[int]()
        for tensor in tensors:
            total.update(dict(split_size(tensor.size, trace_file(plan, tensor.file, known))))
        known[number] = total
    return known[number]


def find_stored(tensor: Tensor, source: Checkpoint) -> Tensor:
    """Finds the tensor that is stored: of a packed weight its codes."""
    return source.packed[tensor.file - PACKED].codes if tensor.file >= PACKED else tensor


def split_size(size: int, weights: Sizes) -> Iterator[tuple[int, int]]:
    """Shares a size out by weights, so that all shares together are the size; nothing where there is no weight."""
    total, before, done = sum(weights.values()), 0, 0
    for key, weight in weights.items():
        before += weight
        share = size * before // total - done if total else 0
        done += share
        yield key, share


def find_replications(plan: Plan) -> tuple[list[Replication], Integers]:
    """Finds what several files hold: each run of bytes that more than one copy reads. Also returns the bytes of each
    file that another file has too.
    """
    copies, chosen = plan.copies, find_shared_starts(plan)
    columns = [copies.source_offset, copies.source_file, copies.run, copies.rows, copies.pitch]
    order = chosen[np.lexsort([column[chosen] for column in columns])]
    is_first = np.ones(len(order), np.bool_)
    is_first[1:] = np.any([np.diff(column[order]) != 0 for column in columns], axis=0)
    firsts, times = order[is_first], np.diff(np.flatnonzero(is_first), append=len(order))
    several = order[np.repeat(times, times) > 1]
    firsts, times = firsts[times > 1], times[times > 1]
    found: dict[str, list[tuple[str, int, int]]] = {}
    for (module, name), count, size in zip(
        name_modules(plan, firsts), times.tolist(), copies.sizes[firsts].tolist(), strict=True
    ):
        found.setdefault(module, []).append((name, count, size))
    replications = [
        Replication(
            module,
            len({name for name, _, _ in parts}),
            min(count for _, count, _ in parts),
            max(count for _, count, _ in parts),
            sum(size for _, _, size in parts),
            sum((count - 1) * size for _, count, size in parts),
        )
        for module, parts in found.items()
    ]
    replications.sort(key=lambda one: (-one.extra, one.module))
    return replications, add_by_file(plan, several)


def find_shared_starts(plan: Plan) -> Integers:
    """Finds the copies that begin to read where another one does, as indices: of most plans a small part, so that only
    this part is sorted by all that a copy is.
    """
    copies = plan.copies
    starts = copies.source_file * (int(copies.source_offset.max(initial=0)) + 1) + copies.source_offset
    ordered = np.sort(starts)
    shared = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    return np.flatnonzero(np.isin(starts, shared))


def name_modules(plan: Plan, chosen: Integers) -> list[tuple[str, str]]:
    """Finds the target tensor of some copies: its name with `#` for numbers, and its name."""
    found: list[tuple[str, str]] = [("", "")] * len(chosen)
    target, offset = plan.copies.target_file[chosen], plan.copies.target_offset[chosen]
    for number, file in enumerate(plan.files):
        places = np.flatnonzero(target == number)
        pieces = file.pieces[np.searchsorted(file.ends, offset[places], side="right")]
        for place, piece in zip(places.tolist(), pieces.tolist(), strict=True):
            name = plan.pieces.names[piece]
            found[place] = split_name(name)[0], name
    return found
