"""Stage 3: Checkpoint + Recipe + Layout -> Plan. Pure: opens no file; what it returns can be printed and proven."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from json.encoder import encode_basestring
from typing import NamedTuple

import numpy as np

from reshard.copies import Copies, Integers, WrongPlan, joined, require_coverage, require_tiling
from reshard.cut import (
    DIMENSION,
    Cut,
    Limit,
    cut_scale,
    cut_weight,
    limit_of,
    scale_problems,
    weight_problems,
    working_ranks,
)
from reshard.errors import Problem, refuse, require_none
from reshard.header import DTYPE_RANK, entry_end, header_bytes
from reshard.match import Match, Matched, match
from reshard.names import slots_of
from reshard.types import MOST_RANKS, Checkpoint, Layout, Recipe, Rule, Tensor

EVERY_RANK = -1


class Piece(NamedTuple):
    """A kept tensor, how it is cut, and the one rank that holds it, or EVERY_RANK."""

    match: Match
    cut: int
    """Index into the cuts of the plan: a model has 100,000 tensors and some 50 ways to cut them."""
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
    cuts: tuple[Cut, ...]
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
            shape = self.cuts[found.cut].shape
            yield Tensor(found.match.right, found.match.tensor.dtype, shape, index, start, end - start)
            start = end


def make_plan(checkpoint: Checkpoint, recipe: Recipe, layout: Layout) -> Plan:
    """The plan of a conversion, proven to tile every target file and to cover the source.

    Raises Refused if recipe, checkpoint and layout do not fit, with every reason and the numbers of ranks that work.
    """
    matched = match(checkpoint, recipe)
    if not matched.kept:
        raise refuse(
            "nothing-kept", recipe.name, "every tensor is dropped", "at least one to convert", "another recipe"
        )
    kinds = kinds_of(matched)
    require_none(pairing_problems(recipe, matched, kinds))
    require_none(ranks_problems(checkpoint, recipe, layout, matched, kinds))
    pieces, cuts = cut_all(recipe, layout, matched, kinds)
    files, copies = lay_out(recipe, layout, pieces, cuts)
    require_tiling(copies, [len(file.header) for file in files], [file.size for file in files])
    coverage = cover(checkpoint, recipe, layout, matched, kinds, copies)
    return Plan(checkpoint, recipe, layout, dict(matched.counts), pieces, cuts, files, copies, coverage)


def only_ranks(plan: Plan, ranks: Sequence[int]) -> Plan:
    """The part of a plan that writes the files of some ranks. Raises Refused for ranks that the plan has not."""
    if unknown := sorted(set(ranks) - {file.rank for file in plan.files}):
        found = f"rank {unknown[0]}"
        raise refuse("unknown-rank", "--ranks", found, f"ranks from 0 to {plan.layout.ranks - 1}")
    files = tuple(file for file in plan.files if file.rank in ranks)
    new_index = np.full(len(plan.files), -1)
    new_index[[index for index, file in enumerate(plan.files) if file.rank in ranks]] = np.arange(len(files))
    chosen = new_index[plan.copies.target_file] >= 0
    columns = {name: getattr(plan.copies, name)[chosen] for name in Copies.__slots__}
    columns["target_file"] = new_index[columns["target_file"]]
    return replace(plan, files=files, copies=Copies(**columns))


class Unit(NamedTuple):
    """A weight and its block scale, if it has one. They are cut together."""

    weight: Match
    scale: Match | None


Kinds = list[list[Unit]]
"""The units, those of one rule, dtype and shape together: what can be said of one can be said of all of its kind."""


def kinds_of(matched: Matched) -> Kinds:
    scales = {(found.rule, found.numbers): found for found in matched.kept if found.is_scale}
    kinds: dict[tuple[object, ...], list[Unit]] = {}
    for found in matched.kept:
        if found.is_scale:
            continue
        tensor, scale = found.tensor, scales.get((found.rule, found.numbers))
        shape = scale.tensor.shape if scale else None
        key = (found.rule, tensor.dtype, tensor.shape, scale and scale.tensor.dtype, shape)
        kinds.setdefault(key, []).append(Unit(found, scale))
    return list(kinds.values())


def pairing_problems(recipe: Recipe, matched: Matched, kinds: Kinds) -> Iterator[Problem]:
    """FP8 weights without a scale, scales without an FP8 weight, and scales of a wrong shape."""
    remedy = "is a file missing from the checkpoint?"
    scales = sum(found.is_scale for found in matched.kept)
    if scales != sum(len(units) for units in kinds if units[0].scale):
        weights = {(found.rule, found.numbers) for found in matched.kept if not found.is_scale}
        for found in matched.kept:
            if found.is_scale and (found.rule, found.numbers) not in weights:
                subject = found.tensor.name
                yield Problem("scale-without-weight", subject, "a block scale without its weight", "both", remedy)
    for units in kinds:
        if next(unit_problems(recipe, units[0]), None):
            for unit in units:
                yield from unit_problems(recipe, unit)


def unit_problems(recipe: Recipe, unit: Unit) -> Iterator[Problem]:
    weight, scale = unit.weight.tensor, unit.scale and unit.scale.tensor
    if recipe.scale is None:
        return
    if weight.dtype.startswith("F8_"):
        if scale is None:
            remedy = "is a file missing from the checkpoint?"
            yield Problem("weight-without-scale", weight.name, f"{weight.dtype} without a block scale", "both", remedy)
        else:
            yield from scale_problems(scale, weight, recipe.scale.block)
    elif scale:
        found = f"a block scale for a weight of {weight.dtype}"
        yield Problem("scale-without-weight", scale.name, found, "an FP8 weight", "is the checkpoint a mixture?")


def ranks_problems(
    checkpoint: Checkpoint, recipe: Recipe, layout: Layout, matched: Matched, kinds: Kinds
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
    for units in kinds:
        (weight, *_), scale = units[0]
        split = recipe.rules[units[0].weight.rule].split
        block = recipe.scale.block if recipe.scale and scale else 1
        if limit := limit_of(weight, split, block):
            limits.add(limit)
        if next(weight_problems(weight, split, layout.ranks, block), None):
            for unit in units:
                problems.extend(weight_problems(unit.weight.tensor, split, layout.ranks, block))
    # A tensor of too few dimensions suits no number of ranks.
    works = all(problem.kind != "wrong-shape" for problem in problems)
    remedy = f"--mp with one of {working_ranks(limits)}" if works and problems else ""
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


def cut_all(
    recipe: Recipe, layout: Layout, matched: Matched, kinds: Kinds
) -> tuple[tuple[Piece, ...], tuple[Cut, ...]]:
    """Every kept tensor as a piece, in the order in which safetensors lays tensors out, and the cuts."""
    cuts: list[Cut] = []
    by_dtype: dict[str, list[tuple[str, Piece]]] = {}
    for units in kinds:
        weight, scale = units[0]
        rule = recipe.rules[weight.rule]
        rank_of = dealer(rule, layout, matched)
        number = len(cuts)
        cuts.append(cut_weight(weight.tensor, rule.split, layout.ranks))
        weights = by_dtype.setdefault(weight.tensor.dtype, [])
        weights.extend((unit.weight.right, Piece(unit.weight, number, rank_of(unit.weight.numbers))) for unit in units)
        if scale and recipe.scale:
            cuts.append(cut_scale(scale.tensor, weight.tensor, rule.split, layout.ranks, recipe.scale.block))
            matches = [unit.scale for unit in units if unit.scale]
            scales = by_dtype.setdefault(scale.tensor.dtype, [])
            scales.extend((found.right, Piece(found, number + 1, rank_of(found.numbers))) for found in matches)
    ordered = [sorted(by_dtype[dtype]) for dtype in sorted(by_dtype, key=DTYPE_RANK.__getitem__, reverse=True)]
    return tuple(piece for named in ordered for _, piece in named), tuple(cuts)


def dealer(rule: Rule, layout: Layout, matched: Matched) -> Callable[[tuple[str, ...]], int]:
    """From the numbers of a match, the one rank that gets it, or EVERY_RANK. Members are dealt in runs: experts 0-15 go
    to rank 0.
    """
    if not rule.split.startswith("by "):
        return lambda _: EVERY_RANK
    letter = rule.split.removeprefix("by ")
    place, members = slots_of(rule).index(letter), matched.counts[letter] // layout.ranks
    return lambda numbers: int(numbers[place]) // members


@dataclass(frozen=True, slots=True)
class Columns:
    """The pieces as columns: what the layout of the files and the copies are computed from, all at once."""

    source_file: Integers
    source_offset: Integers
    rank: Integers
    rows: Integers
    pitch: Integers
    run: Integers
    repeat: Integers


def columns_of(pieces: Sequence[Piece], cuts: Sequence[Cut]) -> Columns:
    table = np.array([(cut.rows, cut.pitch, cut.run, cut.repeat) for cut in cuts], np.int64).reshape(-1, 4)
    cut = np.array([piece.cut for piece in pieces], np.int64)
    file = np.array([piece.match.tensor.file for piece in pieces], np.int64)
    offset = np.array([piece.match.tensor.offset for piece in pieces], np.int64)
    rank = np.array([piece.rank for piece in pieces], np.int64)
    return Columns(file, offset, rank, *np.ascontiguousarray(table[cut].T))


def lay_out(
    recipe: Recipe, layout: Layout, pieces: Sequence[Piece], cuts: Sequence[Cut]
) -> tuple[tuple[TargetFile, ...], Copies]:
    """Every target file to the byte, and the copies that fill it behind its header."""
    columns = columns_of(pieces, cuts)
    kinds = [(piece.match.right, piece.match.tensor.dtype, piece.cut) for piece in pieces]
    ends_of = {(dtype, cut): entry_end(dtype, cuts[cut].shape) for dtype, cut in {kind[1:] for kind in kinds}}
    texts = [encode_basestring(name) + ends_of[dtype, cut] for name, dtype, cut in kinds]
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
    checkpoint: Checkpoint, recipe: Recipe, layout: Layout, matched: Matched, kinds: Kinds, copies: Copies
) -> tuple[Share, ...]:
    """Proves that each kept tensor is used whole and no dropped one is touched, and says by rule how often."""
    uses = [use for units in kinds for use in expected_uses(recipe, layout, units)]
    used = [found.tensor for use in uses for found in use.matches]
    usage = require_coverage(copies, used, [file.size for file in checkpoint.files])
    counts = [len(use.matches) for use in uses]
    least = np.repeat([use.least for use in uses], counts)
    most = np.repeat([use.most for use in uses], counts)
    if np.any((usage.most > 0) & ((usage.least != least) | (usage.most != most))):
        raise WrongPlan("a part of a source tensor is used more or less often than its rule says")
    if len(used) + len(matched.dropped) != len(checkpoint.tensors):
        raise WrongPlan("the rules do not cover every source tensor once")
    rows = [(use_of(use, layout.ranks), use.matches) for use in uses]
    rows += [("dropped", [found]) for found in matched.dropped]
    sizes: dict[tuple[str, int], list[int]] = {}
    for word, matches in rows:
        sizes.setdefault((word, matches[0].rule), []).extend([found.tensor.size for found in matches])
    return tuple(Share(use, recipe.rules[rule], len(found), sum(found)) for (use, rule), found in sorted(sizes.items()))


class Use(NamedTuple):
    """Tensors of one kind, and by how many ranks the part of each that is used least, and most, is to be used."""

    matches: list[Match]
    least: int
    most: int


def expected_uses(recipe: Recipe, layout: Layout, units: Sequence[Unit]) -> Iterator[Use]:
    """What the rule of some units of a kind says of their weights, and of their scales."""
    weight, scale = units[0]
    split = recipe.rules[weight.rule].split
    times = layout.ranks if split == "replicate" else 1
    yield Use([unit.weight for unit in units], times, times)
    if scale and recipe.scale:
        scales = [unit.scale for unit in units if unit.scale]
        if split not in DIMENSION:
            yield Use(scales, times, times)
            return
        cut = cut_scale(scale.tensor, weight.tensor, split, layout.ranks, recipe.scale.block)
        most = min(cut.repeat, layout.ranks)
        yield Use(scales, layout.ranks - most * (-(-layout.ranks // most) - 1), most)


def use_of(use: Use, ranks: int) -> str:
    if use.matches[0].tensor.size == 0:
        return "empty"
    if use.least == use.most == 1:
        return "once"
    return "replicated" if use.least == use.most == ranks else "shared"
