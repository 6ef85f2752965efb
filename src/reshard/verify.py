"""Stage 5: files -> Report. The only re-reader; it shares nothing with the planner.

The planner goes from the source's names to the ranks' and computes byte offsets. This goes the other way: it takes what
lies in the rank files, finds each tensor's name in the source by the recipe read from right to left, says in rows and
columns which box of the source the rank should hold, and has every byte of that box compared.

What every rank holds is compared with the source in every rank, so that replicas are equal if nothing differs.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from reshard.bands import Part, Whole
from reshard.boxes import box
from reshard.compare import Comparison, Side, compare
from reshard.disk import CACHED, ways_to_read
from reshard.errors import Problem, Refused, refuse
from reshard.names import Pattern, later_members, patterns_of, slots_of, split_name
from reshard.read import SUFFIX, read_header
from reshard.types import MOST_RANKS, Advance, Checkpoint, File, Recipe, Rule, Tensor


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared, and where it differs."""

    ranks: int
    """How many ranks the target is cut for."""
    files: int
    """Of so many of them the files were compared."""
    tensors: int
    size: int
    """In bytes of the target; with a source, headers left out."""
    compared: int
    """In bytes: so many of them were compared."""
    is_sampled: bool
    """Whether a sample was asked for."""
    problems: tuple[Problem, ...]
    subset: Mapping[str, Any] = field(default_factory=dict)
    """What of a larger checkpoint the target holds, by its manifest; empty if that says nothing of it."""


class RankFile(NamedTuple):
    """One file of the target, as it stands."""

    rank: int
    file: File
    tensors: Sequence[Tensor]


def verify_target(
    target: Path,
    source: Checkpoint,
    recipe: Recipe,
    advance: Advance = lambda _: None,
    only: Collection[int] | None = None,
    sample: Fraction | None = None,
) -> Report:
    """Compares every byte of every rank file in the folder `target`, or of the ranks `only`, with the source.

    With a `sample`, about that share of the bytes is compared: blocks spread evenly over every tensor, and always the
    two ends of each tensor of each rank file. Names, dtypes and shapes are looked at in full all the same.

    Every difference is a problem of the report. Raises Refused if there is nothing that could be compared, or a file
    cannot be read.
    """
    names, extra = rank_files(target, recipe)
    ranks, wanted = len(names), range(len(names)) if only is None else only
    if unknown := sorted(set(wanted) - set(range(ranks))):
        raise refuse("unknown-rank", "--ranks", f"rank {unknown[0]}", f"ranks from 0 to {ranks - 1}")
    files, problems = read_rank_files(target, {rank: names[rank] for rank in wanted})
    problems += [Problem("extra-file", name, f"a file beside those of {ranks} ranks", "none") for name in extra]
    known, held = backwards(recipe, source), dict[str, Whole]()
    for file in files:
        advance(file.file.header_size)
        problems.extend(hold(file, ranks, source, recipe, known, held))
    problems.extend(absent_problems(held, [file.rank for file in files], ranks, source, recipe))
    comparison = compare(map(of_right_size, held.values()), *sides(target, files, source), advance, sample)
    problems.extend(difference_problems(held, names, comparison))
    tensors = [tensor for file in files for tensor in file.tensors]
    size = sum(tensor.size for tensor in tensors)
    return Report(
        ranks, len(files), len(tensors), size, comparison.size, sample is not None, tuple(problems), source.subset
    )


def sides(target: Path, files: Sequence[RankFile], source: Checkpoint) -> tuple[Side, Side]:
    """The files of the source and of the target, and how to read them."""
    source_paths = {number: source.folder / file.name for number, file in enumerate(source.files)}
    target_paths = {file.rank: target / file.file.name for file in files}
    size = sum(file.size for file in source.files) + sum(file.file.size for file in files)
    return side_of(source_paths, size), side_of(target_paths, size)


def side_of(paths: Mapping[int, Path], size: int) -> Side:
    return Side(paths, ways_to_read(next(iter(paths.values())), size) if paths else CACHED)


def of_right_size(whole: Whole) -> Whole:
    """Without the parts that have not the size of their box: they are known to be wrong."""
    fitting = [part for part in whole.parts if part.tensor.size == len(part.rows) * len(part.columns)]
    return whole._replace(parts=fitting)


def difference_problems(held: Mapping[str, Whole], names: Sequence[str], comparison: Comparison) -> Iterator[Problem]:
    """The tensors whose bytes are not those of their box."""
    for name, whole in held.items():
        for part in whole.parts:
            if found := comparison.differences.get((part.rank, part.tensor.name)):
                subject = f"{names[part.rank]}: {part.tensor.name}"
                text = (
                    f"{found.count:,} other bytes than in the source, "
                    f"first in byte {found.first:,} of the tensor, last in byte {found.last:,}"
                )
                yield Problem("differs", subject, text, f"those of {name}", "convert again")


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


class Backwards(NamedTuple):
    """A recipe read from right to left, for one source."""

    rules: Sequence[Rule]
    patterns: Mapping[str, Sequence[Pattern]]
    """By their key."""
    marked: Mapping[str, set[str]]
    before: Mapping[str, str]


def hold(
    file: RankFile, ranks: int, source: Checkpoint, recipe: Recipe, known: Backwards, held: dict[str, Whole]
) -> Iterator[Problem]:
    """Adds each tensor of a rank file to `held`, by its name in the source; yields those that do not belong there."""
    for tensor in file.tensors:
        key, numbers = split_name(tensor.name)
        subject = f"{file.file.name}: {tensor.name}"
        fitting = [pattern for pattern in known.patterns.get(key, ()) if pattern.fits(key, numbers)]
        fitting = [pattern for pattern in fitting if pattern.accepts(numbers, known.marked, known.before)]
        name = fitting[0].right % tuple(numbers[place] for place in fitting[0].order) if len(fitting) == 1 else None
        if name is None or name not in source.tensors:
            found = "no rule of the recipe" if name is None else f"no {name} in the source"
            yield Problem("extra-tensor", subject, found, "only what comes from the source", "convert again")
            continue
        rule = known.rules[fitting[0].rule]
        origin = source.tensors[name]
        wanted = box(origin, source, rule.split, recipe, ranks, file.rank)
        if wanted is None:
            yield Problem("wrong-shape", subject, f"{list(origin.shape)} in the source", f"{rule.split} to cut")
            continue
        whole = held.setdefault(name, Whole(origin, wanted.width, []))
        whole.parts.append(Part(file.rank, tensor, wanted.rows, wanted.columns))
        size = len(wanted.rows) * len(wanted.columns)
        if tensor.dtype != origin.dtype or tensor.shape != wanted.shape or tensor.size != size:
            found, expected = f"{tensor.dtype} {list(tensor.shape)}", f"{origin.dtype} {list(wanted.shape)}"
            yield Problem("wrong-shape", subject, found, expected, "convert again")


def backwards(recipe: Recipe, source: Checkpoint) -> Backwards:
    scales = {letter: replace(scale, left=scale.right, right=scale.left) for letter, scale in recipe.scales.items()}
    turned = replace(
        recipe, scales=scales, rules=tuple(replace(rule, left=rule.right, right=rule.left) for rule in recipe.rules)
    )
    patterns: dict[str, list[Pattern]] = {}
    for number, rule in enumerate(turned.rules):
        for pattern in patterns_of(number, rule, turned) if rule.relation == "same" else ():
            patterns.setdefault(pattern.key, []).append(pattern)
    return Backwards(turned.rules, patterns, *later_members(map(split_name, source.tensors), recipe))


def absent_problems(
    held: Mapping[str, Whole], looked_at: Collection[int], ranks: int, source: Checkpoint, recipe: Recipe
) -> Iterator[Problem]:
    """Tensors of the source that one of the ranks `looked_at` lacks, or has though it should not."""
    for name, wanted in holders(source, recipe, ranks).items():
        expected = sorted(set(wanted) & set(looked_at))
        found = sorted(part.rank for part in held[name].parts) if name in held else []
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
