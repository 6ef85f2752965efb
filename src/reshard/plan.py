"""Stage 3: Checkpoint + Recipe + Layout -> Plan. Pure: opens no file; what it returns can be printed and proven."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from reshard.copies import Copies, Integers, WrongPlan, joined, require_coverage, require_tiling
from reshard.cut import (
    DIMENSION,
    MOST_RANKS,
    Cut,
    Limit,
    cut_scale,
    cut_weight,
    scale_problems,
    weight_problems,
    working_ranks,
)
from reshard.errors import Problem, refuse, require_none
from reshard.header import entry_text, header_bytes, order_key
from reshard.match import Match, Matched, match
from reshard.names import slots_of
from reshard.types import Checkpoint, Layout, Recipe, Rule, Tensor

EVERY_RANK = -1


class Piece(NamedTuple):
    """A kept tensor, how it is cut, and the one rank that holds it, or EVERY_RANK."""

    match: Match
    cut: Cut
    rank: int


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A file to be written: its header to the byte, and where each of its tensors lies."""

    name: str
    rank: int
    header: bytes
    size: int
    """In bytes, header included."""
    pieces: Integers
    """Indices into the pieces of the plan, in the order of the file."""
    ends: Integers
    """Where each of them ends, in bytes from the start of the file."""


@dataclass(frozen=True, slots=True)
class Share:
    """What became of the source tensors of one rule: proven from the copies, it adds up to the whole source."""

    use: str
    """`once`, `replicated` (to every rank), `shared` (by some ranks), `empty`, or `dropped`."""
    rule: Rule
    tensors: int
    size: int
    """In bytes of the source."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a conversion will do."""

    source: Checkpoint
    recipe: Recipe
    layout: Layout
    counts: dict[str, int]
    """How many members each hole of the recipe has."""
    pieces: tuple[Piece, ...]
    files: tuple[TargetFile, ...]
    copies: Copies
    """Their `target_file` is an index into `files`."""
    coverage: tuple[Share, ...]

    @property
    def size(self) -> int:
        """Of all files to be written, in bytes."""
        return sum(file.size for file in self.files)

    def tensors(self, index: int) -> Iterator[Tensor]:
        """The tensors of one target file, in their order."""
        file = self.files[index]
        start = len(file.header)
        for piece, end in zip(file.pieces.tolist(), file.ends.tolist(), strict=True):
            found = self.pieces[piece]
            yield Tensor(found.match.right, found.match.tensor.dtype, found.cut.shape, index, start, end - start)
            start = end


def make_plan(checkpoint: Checkpoint, recipe: Recipe, layout: Layout) -> Plan:
    """The plan of a conversion, proven to tile every target file and to cover the source.

    Raises Refused if recipe, checkpoint and layout do not fit, with every reason and the numbers of ranks that work.
    """
    matched = match(checkpoint, recipe)
    pieces = cut_all(checkpoint, recipe, layout, matched)
    files, copies = lay_out(recipe, layout, pieces, columns_of(pieces))
    require_tiling(copies, [len(file.header) for file in files], [file.size for file in files])
    coverage = cover(checkpoint, recipe, layout, matched, copies)
    return Plan(checkpoint, recipe, layout, dict(matched.counts), pieces, files, copies, coverage)


def only_ranks(plan: Plan, ranks: Sequence[int]) -> Plan:
    """The part of a plan that writes the files of some ranks. Raises Refused for ranks that the plan has not."""
    if unknown := sorted(set(ranks) - set(range(plan.layout.ranks))):
        found = f"rank {unknown[0]}"
        raise refuse("unknown-rank", "--ranks", found, f"ranks from 0 to {plan.layout.ranks - 1}")
    files = tuple(file for file in plan.files if file.rank in ranks)
    new_index = np.full(len(plan.files), -1)
    new_index[[file.rank for file in files]] = np.arange(len(files))
    chosen = new_index[plan.copies.target_file] >= 0
    columns = {name: getattr(plan.copies, name)[chosen] for name in Copies.__slots__}
    columns["target_file"] = new_index[columns["target_file"]]
    return replace(plan, files=files, copies=Copies(**columns))


def cut_all(checkpoint: Checkpoint, recipe: Recipe, layout: Layout, matched: Matched) -> tuple[Piece, ...]:
    """Every kept tensor with its cut, in the order in which safetensors lays tensors out. Raises Refused."""
    units = pair(matched)
    require_none(pairing_problems(recipe, units))
    require_none(ranks_problems(checkpoint, recipe, layout, matched, units))
    deals = dealing(recipe, layout, matched)
    cuts: dict[tuple[object, ...], Cut] = {}
    pieces = []
    for found in matched.kept:
        weight = units[found.rule, found.numbers][0]
        key = (found.rule, found.is_scale, found.tensor.dtype, found.tensor.shape, weight.shape)
        cut = cuts.get(key)
        if cut is None:
            cut = cuts[key] = cut_match(recipe, layout, found, weight)
        place, members = deals.get(found.rule, (None, 1))
        rank = EVERY_RANK if place is None else int(found.numbers[place]) // members
        pieces.append(Piece(found, cut, rank))
    pieces.sort(key=lambda piece: order_key(piece.match.right, piece.match.tensor.dtype))
    return tuple(pieces)


Units = dict[tuple[int, tuple[str, ...]], tuple[Tensor, Tensor | None]]
"""By rule and numbers: a weight and its block scale, if it has one. They are cut together."""


def pair(matched: Matched) -> Units:
    """Each kept weight with its block scale. A scale without a weight stands in the weight's place; `pairing_problems`
    refuses it.
    """
    scales = {(found.rule, found.numbers): found.tensor for found in matched.kept if found.is_scale}
    units: Units = {key: (scale, scale) for key, scale in scales.items()}
    for found in matched.kept:
        if not found.is_scale:
            key = (found.rule, found.numbers)
            units[key] = (found.tensor, scales.get(key))
    return units


def pairing_problems(recipe: Recipe, units: Units) -> Iterator[Problem]:
    """FP8 weights without a scale, scales without an FP8 weight, and scales of a wrong shape."""
    remedy = "is a file missing from the checkpoint?"
    for weight, scale in units.values():
        is_fp8 = weight.dtype.startswith("F8_")
        if weight is scale:
            yield Problem("scale-without-weight", weight.name, "a block scale without its weight", "both", remedy)
        elif is_fp8 and scale is None:
            yield Problem("weight-without-scale", weight.name, f"{weight.dtype} without a block scale", "both", remedy)
        elif scale is not None and not is_fp8:
            found = f"a block scale for a weight of {weight.dtype}"
            yield Problem("scale-without-weight", scale.name, found, "an FP8 weight", "is the checkpoint a mixture?")
        elif scale is not None and recipe.scale:
            yield from scale_problems(scale, weight, recipe.scale.block)


def ranks_problems(
    checkpoint: Checkpoint, recipe: Recipe, layout: Layout, matched: Matched, units: Units
) -> Iterator[Problem]:
    """Everything that the number of ranks does not suit, with the numbers that suit all."""
    if not 1 <= layout.ranks <= MOST_RANKS:
        yield Problem("wrong-ranks", "--mp", f"{layout.ranks} ranks", f"1 to {MOST_RANKS}")
        return
    limits = set()
    problems = []
    for subject, length in counted_lengths(checkpoint, recipe, matched):
        limits.add(Limit(length))
        if length % layout.ranks:
            found = f"{length} for {layout.ranks} ranks"
            problems.append(Problem("not-divisible", subject, found, f"a multiple of {layout.ranks}"))
    for (number, _), (weight, scale) in units.items():
        split = recipe.rules[number].split
        block = recipe.scale.block if recipe.scale and scale else 1
        problems.extend(weight_problems(weight, split, layout.ranks, block))
        if split in DIMENSION and len(weight.shape) > DIMENSION[split]:
            limits.add(Limit(weight.shape[DIMENSION[split]], block))
    if problems:
        remedy = f"--mp with one of {working_ranks(limits)}"
        yield from (replace(problem, remedy=remedy) for problem in problems)


def counted_lengths(checkpoint: Checkpoint, recipe: Recipe, matched: Matched) -> Iterator[tuple[str, int]]:
    """What the ranks must divide besides dimensions: the members dealt to them, and config values such as heads."""
    for letter in sorted({rule.split.removeprefix("by ") for rule in recipe.rules if rule.split.startswith("by ")}):
        if matched.counts[letter]:
            yield recipe.holes[letter].counts, matched.counts[letter]
    for key in recipe.ranks_divide:
        value = (checkpoint.config or {}).get(key)
        if type(value) is int and value > 0:
            yield key, value


def cut_match(recipe: Recipe, layout: Layout, found: Match, weight: Tensor) -> Cut:
    split = recipe.rules[found.rule].split
    if found.is_scale and recipe.scale:
        return cut_scale(found.tensor, weight, split, layout.ranks, recipe.scale.block)
    return cut_weight(found.tensor, split, layout.ranks)


def dealing(recipe: Recipe, layout: Layout, matched: Matched) -> dict[int, tuple[int, int]]:
    """By rule that deals its tensors to ranks: which number of a match is dealt, and how many members a rank gets."""
    return {
        number: (slots_of(rule).index(rule.split[-1]), matched.counts[rule.split[-1]] // layout.ranks)
        for number, rule in enumerate(recipe.rules)
        if rule.split.startswith("by ")
    }


@dataclass(frozen=True, slots=True)
class Columns:
    """The pieces as columns: what the layout of the files and the copies are computed from, all at once."""

    source_file: Integers
    source_offset: Integers
    rows: Integers
    pitch: Integers
    run: Integers
    repeat: Integers
    rank: Integers


def columns_of(pieces: Sequence[Piece]) -> Columns:
    rows = (
        (tensor.file, tensor.offset, cut.rows, cut.pitch, cut.run, cut.repeat, rank)
        for (tensor, *_), cut, rank in pieces
    )
    table = np.fromiter((value for row in rows for value in row), np.int64, 7 * len(pieces))
    return Columns(*np.ascontiguousarray(table.reshape(-1, 7).T))


def lay_out(
    recipe: Recipe, layout: Layout, pieces: Sequence[Piece], columns: Columns
) -> tuple[tuple[TargetFile, ...], Copies]:
    """Every target file to the byte, and the copies that fill it behind its header."""
    texts = [entry_text(match.right, match.tensor.dtype, cut.shape) for match, cut, _ in pieces]
    files, parts = [], []
    for rank in range(layout.ranks):
        chosen = np.flatnonzero((columns.rank == EVERY_RANK) | (columns.rank == rank))
        sizes = (columns.run * columns.rows)[chosen]
        ends = np.cumsum(sizes)
        bounds = zip(chosen.tolist(), (ends - sizes).tolist(), ends.tolist(), strict=True)
        header = header_bytes(f"{texts[piece]}{begin},{end}]}}" for piece, begin, end in bounds)
        name = recipe.files.format(rank=rank, ranks=layout.ranks)
        size = len(header) + int(sizes.sum())
        files.append(TargetFile(name, rank, header, size, chosen, ends + len(header)))
        parts.append(copies_of(columns, chosen, rank, ends - sizes + len(header)))
    return tuple(files), joined(parts)


def copies_of(columns: Columns, chosen: Integers, rank: int, target_offset: Integers) -> Copies:
    """The copies of one rank's pieces. Rows that lie back to back become one run; empty tensors have no copy."""
    rows, pitch, run = columns.rows[chosen], columns.pitch[chosen], columns.run[chosen]
    source_offset = columns.source_offset[chosen] + rank // columns.repeat[chosen] * run
    run = np.where(run == pitch, run * rows, run)
    rows = np.where(run >= pitch, 1, rows)
    pitch = np.where(rows == 1, run, pitch)
    full = run * rows > 0
    target_file = np.full(len(chosen), rank)
    table = (columns.source_file[chosen], source_offset, pitch, run, rows, target_file, target_offset)
    return Copies(*(column[full] for column in table))


def cover(
    checkpoint: Checkpoint, recipe: Recipe, layout: Layout, matched: Matched, copies: Copies
) -> tuple[Share, ...]:
    """Proves that each kept tensor is used whole and no dropped one is touched, and says by rule how often."""
    used = [found.tensor for found in matched.kept]
    usage = require_coverage(copies, used, [file.size for file in checkpoint.files])
    uses = [
        use_of(least, most, layout.ranks) for least, most in zip(usage.least.tolist(), usage.most.tolist(), strict=True)
    ]
    shares: dict[tuple[str, int], list[int]] = {}
    rows = [*zip(uses, matched.kept, strict=True), *(("dropped", found) for found in matched.dropped)]
    for use, found in rows:
        share = shares.setdefault((use, found.rule), [0, 0])
        share[0] += 1
        share[1] += found.tensor.size
    if sum(tensors for tensors, _ in shares.values()) != len(checkpoint.tensors):
        raise WrongPlan("the rules do not cover every source tensor once")
    return tuple(Share(use, recipe.rules[rule], *share) for (use, rule), share in sorted(shares.items()))


def use_of(least: int, most: int, ranks: int) -> str:
    if most == 0:
        return "empty"
    if least == most == 1:
        return "once"
    return "replicated" if least == most == ranks else "shared"
