"""Stage 5: files -> Report. The only re-reader; it shares nothing with the planner.

The planner goes from the source's names to the ranks' and computes byte offsets. This goes the other way: it takes what
lies in the rank files, finds each tensor's name in the source by the recipe read from right to left, says in rows and
columns which box of the source the rank should hold, and compares every byte of that box.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.disk import open_file
from reshard.errors import Problem, Refused, refuse
from reshard.header import BITS
from reshard.names import Pattern, later_members, patterns_of, slots_of, split_name
from reshard.read import SUFFIX, read_header
from reshard.types import MOST_RANKS, Advance, Checkpoint, File, Recipe, Rule, Tensor

BAND_SIZE = 8 << 20
"""In bytes: so much of a source tensor is compared at a time, or one row if that is more."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared, and where it differs."""

    ranks: int
    """How many ranks the target is cut for."""
    files: int
    """Of so many of them the files were compared."""
    tensors: int
    size: int
    """In bytes of the target, headers left out."""
    problems: tuple[Problem, ...]


class RankFile(NamedTuple):
    """One file of the target, as it stands."""

    rank: int
    file: File
    tensors: Sequence[Tensor]


class Held(NamedTuple):
    """A tensor of a rank file, the rule it falls under, and the box of the source tensor that it should be."""

    rank: int
    tensor: Tensor
    rule: Rule
    numbers: tuple[str, ...]
    rows: range
    columns: range
    """In bytes of a source row."""


def verify_target(
    target: Path,
    source: Checkpoint,
    recipe: Recipe,
    advance: Advance = lambda _: None,
    only: Collection[int] | None = None,
) -> Report:
    """Compares every byte of every rank file in the folder `target`, or of the ranks `only`, with the source.

    Every difference is a problem of the report. Raises Refused only if there is nothing that could be compared.
    """
    names, extra = rank_files(target, recipe)
    ranks, wanted = len(names), range(len(names)) if only is None else only
    if unknown := sorted(set(wanted) - set(range(ranks))):
        raise refuse("unknown-rank", "--ranks", f"rank {unknown[0]}", f"ranks from 0 to {ranks - 1}")
    files, problems = read_rank_files(target, {rank: names[rank] for rank in wanted})
    problems += [Problem("extra-file", name, f"a file beside those of {ranks} ranks", "none") for name in extra]
    held: dict[str, list[Held]] = {}
    for file in files:
        advance(file.file.header_size)
        problems.extend(hold(file, ranks, source, recipe, held))
    problems.extend(absent_problems(held, [file.rank for file in files], ranks, source, recipe))
    with ExitStack() as stack:
        source_files = [open_file(stack, source.folder / file.name, os.O_RDONLY) for file in source.files]
        target_files = {file.rank: open_file(stack, target / file.file.name, os.O_RDONLY) for file in files}
        for name, parts in held.items():
            tensor = source.tensors[name]
            for part, place in compare(source_files[tensor.file], tensor, target_files, parts, advance):
                subject = f"{names[part.rank]}: {part.tensor.name}"
                found = f"other bytes than in the source, first in byte {place:,} of the tensor"
                problems.append(Problem("differs", subject, found, f"those of {name}", "convert again"))
    tensors = [tensor for file in files for tensor in file.tensors]
    return Report(ranks, len(files), len(tensors), sum(tensor.size for tensor in tensors), tuple(problems))


def rank_files(target: Path, recipe: Recipe) -> tuple[list[str], list[str]]:
    """The names of the rank files that a folder should have, and those of others that it has. How many ranks there are
    is told by the names of most.
    """
    pattern = re.escape(recipe.files).replace(r"\{rank\}", r"(\d+)").replace(r"\{ranks\}", r"(\d+)")
    paths = sorted(target.iterdir()) if target.is_dir() else []
    fitting = {path.name: found for path in paths if (found := re.fullmatch(pattern, path.name))}
    if not fitting:
        lacking = f"no file such as {recipe.files.format(rank='0', ranks='N')}"
        raise refuse("empty-target", str(target), lacking, "a folder of rank files", "is it the right folder?")
    ranks = Counter(max(map(int, found.groups())) for found in fitting.values()).most_common(1)[0][0]
    if ranks > MOST_RANKS:
        raise refuse("wrong-ranks", next(iter(fitting)), f"{ranks} ranks", f"at most {MOST_RANKS}")
    names = [recipe.files.format(rank=rank, ranks=ranks) for rank in range(ranks)]
    known = set(names)
    return names, [
        path.name for path in paths if path.is_file() and path.name.endswith(SUFFIX) and path.name not in known
    ]


def read_rank_files(target: Path, names: Mapping[int, str]) -> tuple[list[RankFile], list[Problem]]:
    """The headers of the rank files that can be read, and what is wrong with the others."""
    files: list[RankFile] = []
    problems: list[Problem] = []
    for rank, name in names.items():
        try:
            files.append(RankFile(rank, *read_header(target / name, rank)))
        except Refused as refused:
            problems.extend(refused.problems)
    return files, problems


def hold(
    file: RankFile, ranks: int, source: Checkpoint, recipe: Recipe, held: dict[str, list[Held]]
) -> Iterator[Problem]:
    """Adds each tensor of a rank file to `held`, by its name in the source; yields those that do not belong there."""
    turned, patterns = backwards(recipe)
    marked, before = later_members(map(split_name, source.tensors), recipe)
    for tensor in file.tensors:
        key, numbers = split_name(tensor.name)
        subject = f"{file.file.name}: {tensor.name}"
        fitting = [pattern for pattern in patterns.get(key, ()) if pattern.fits(key, numbers)]
        fitting = [pattern for pattern in fitting if pattern.accepts(numbers, marked, before)]
        name = fitting[0].right % tuple(numbers[place] for place in fitting[0].order) if len(fitting) == 1 else None
        if name is None or name not in source.tensors:
            found = "no rule of the recipe" if name is None else f"no {name} in the source"
            yield Problem("extra-tensor", subject, found, "only what comes from the source", "convert again")
            continue
        rule = turned.rules[fitting[0].rule]
        origin, weight = source.tensors[name], source.tensors.get(weight_name(name, recipe))
        wanted = box(origin, weight, rule.split, recipe, ranks, file.rank)
        if wanted is None:
            yield Problem("wrong-shape", subject, f"{list(origin.shape)} in the source", f"{rule.split} to cut")
            continue
        held.setdefault(name, []).append(Held(file.rank, tensor, rule, numbers, wanted.rows, wanted.columns))
        if tensor.dtype != origin.dtype or tensor.shape != wanted.shape:
            found, expected = f"{tensor.dtype} {list(tensor.shape)}", f"{origin.dtype} {list(wanted.shape)}"
            yield Problem("wrong-shape", subject, found, expected, "convert again")


def backwards(recipe: Recipe) -> tuple[Recipe, dict[str, list[Pattern]]]:
    """The recipe read from right to left, and the patterns of its names by their key."""
    scales = {letter: replace(scale, left=scale.right, right=scale.left) for letter, scale in recipe.scales.items()}
    turned = replace(
        recipe, scales=scales, rules=tuple(replace(rule, left=rule.right, right=rule.left) for rule in recipe.rules)
    )
    patterns: dict[str, list[Pattern]] = {}
    for number, rule in enumerate(turned.rules):
        for pattern in patterns_of(number, rule, turned) if rule.relation == "same" else ():
            patterns.setdefault(pattern.key, []).append(pattern)
    return turned, patterns


def weight_name(name: str, recipe: Recipe) -> str:
    """The name of the weight that a block scale belongs to, or the empty string for what is no scale."""
    scale = next(iter(recipe.scales.values()), None)
    suffix = f".{scale.left}" if scale else ""
    return name.removesuffix(suffix) + ".weight" if suffix and name.endswith(suffix) else ""


class Box(NamedTuple):
    """The part of a source tensor that a rank should hold, with the tensor seen as rows of bytes: those of its first
    dimension if columns are cut, else each byte as a row.
    """

    shape: tuple[int, ...]
    rows: range
    columns: range
    """In bytes."""


def box(tensor: Tensor, weight: Tensor | None, split: str, recipe: Recipe, ranks: int, rank: int) -> Box | None:
    """What a rank should hold of a tensor, `weight` being that of a block scale; None if it cannot be so cut."""
    dimension = {"rows": 0, "columns": 1}.get(split)
    if dimension is None:
        return Box(tensor.shape, range(tensor.size), range(1))
    if len(tensor.shape) <= dimension:
        return None
    taken = part(tensor.shape[dimension], weight and weight.shape[dimension], recipe, ranks, rank)
    shape = (*tensor.shape[:dimension], len(taken), *tensor.shape[dimension + 1 :])
    # In bits, for an F4 is half a byte.
    step = prod(tensor.shape[dimension + 1 :]) * BITS[tensor.dtype]
    place = range(taken.start * step // 8, taken.stop * step // 8)
    return Box(shape, range(tensor.shape[0]), place) if dimension else Box(shape, place, range(1))


def part(length: int, weight_length: int | None, recipe: Recipe, ranks: int, rank: int) -> range:
    """Which rows or columns of `length` a rank holds; of a block scale, those of the blocks its weight touches."""
    scale = next(iter(recipe.scales.values()), None)
    if weight_length is None or scale is None:
        return range(rank * length // ranks, (rank + 1) * length // ranks)
    block = scale.block[0]
    return range(rank * weight_length // ranks // block, -(-((rank + 1) * weight_length // ranks) // block))


def absent_problems(
    held: Mapping[str, Sequence[Held]], looked_at: Collection[int], ranks: int, source: Checkpoint, recipe: Recipe
) -> Iterator[Problem]:
    """Tensors of the source that one of the ranks `looked_at` lacks, or has though it should not."""
    for name, wanted in holders(source, recipe, ranks).items():
        expected = sorted(set(wanted) & set(looked_at))
        found = sorted(part.rank for part in held.get(name, ()))
        if expected and not found:
            yield Problem(
                "missing-tensor", name, "in none of these rank files", f"in ranks {expected}", "convert again"
            )
        elif expected != found:
            yield Problem("wrong-ranks", name, f"in ranks {found}", f"in ranks {expected}", "convert again")


def holders(source: Checkpoint, recipe: Recipe, ranks: int) -> dict[str, Collection[int]]:
    """By the name of each tensor of the source: the ranks that should hold it or a part of it."""
    names = {name: split_name(name) for name in source.tensors}
    marked, before = later_members(names.values(), recipe)
    patterns = [pattern for number, rule in enumerate(recipe.rules) for pattern in patterns_of(number, rule, recipe)]
    found: dict[str, Collection[int]] = {}
    dealt: dict[str, tuple[str, int]] = {}
    by_key: dict[tuple[str, int], list[Pattern]] = {}
    for name, (key, numbers) in names.items():
        fitting = by_key.get((key, len(numbers)))
        if fitting is None:
            fitting = by_key[key, len(numbers)] = [pattern for pattern in patterns if pattern.fits(key, numbers)]
        rules = [recipe.rules[pattern.rule] for pattern in fitting if pattern.accepts(numbers, marked, before)]
        if rules and rules[0].split.startswith("by "):
            letter = rules[0].split.removeprefix("by ")
            dealt[name] = letter, int(numbers[slots_of(rules[0], recipe).index(letter)])
        else:
            found[name] = () if rules and rules[0].relation == "drop" else range(ranks)
    members: dict[str, set[int]] = {}
    for letter, member in dealt.values():
        members.setdefault(letter, set()).add(member)
    for name, (letter, member) in dealt.items():
        found[name] = (member * ranks // len(members[letter]),)
    return found


def compare(
    source: int, tensor: Tensor, targets: Mapping[int, int], parts: Sequence[Held], advance: Advance
) -> Iterator[tuple[Held, int]]:
    """The parts whose bytes are not those of their box, each with the first byte of it that differs. The source is read
    once for all parts.
    """
    height = tensor.shape[0] if parts[0].rule.split == "columns" else tensor.size
    width = tensor.size // height if height else 0
    wrong: set[int] = set()
    for first in range(0, height if width else 0, max(1, BAND_SIZE // max(width, 1))):
        band = range(first, min(height, first + max(1, BAND_SIZE // width)))
        data = read_bytes(source, tensor.offset + first * width, len(band) * width).reshape(len(band), width)
        for number, held in enumerate(parts):
            rows = range(max(band.start, held.rows.start), min(band.stop, held.rows.stop))
            if number in wrong or not rows:
                continue
            start = (rows.start - held.rows.start) * len(held.columns)
            size = len(rows) * len(held.columns)
            found = read_bytes(targets[held.rank], held.tensor.offset + start, min(size, held.tensor.size - start))
            wanted = data[rows.start - first : rows.stop - first, held.columns.start : held.columns.stop].reshape(-1)
            if not np.array_equal(found, wanted):
                wrong.add(number)
                yield held, start + first_difference(found, wanted)
            advance(size)


def first_difference(found: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> int:
    size = min(len(found), len(wanted))
    places = np.flatnonzero(found[:size] != wanted[:size])
    return int(places[0]) if len(places) else size


def read_bytes(descriptor: int, offset: int, size: int) -> NDArray[np.uint8]:
    """So many bytes of a file, fewer if it ends before."""
    data = np.empty(max(size, 0), np.uint8)
    view, done = data.data, 0
    while done < len(view) and (count := os.preadv(descriptor, [view[done:]], offset + done)):
        done += count
    return data[:done]
