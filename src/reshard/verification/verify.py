"""Stage 5: files -> Report. The only re-reader; it shares nothing with the planner.

The planner goes from the source's names to the ranks' and computes byte offsets. This goes the other way: it takes what
lies in the target, finds each tensor's name in the source by the recipe read from right to left, tells by its dtype and
shape whether the bytes were kept, cast or padded, says in rows and columns which box of the source, or of what is made
of it, the rank should hold, and has every byte of that box compared.

What every rank holds is compared with the source in every rank, so that replicas are equal if nothing differs.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from reshard.errors import Problem, refuse
from reshard.storage.local import CACHED
from reshard.storage.page_cache import ways_to_read
from reshard.types import Advance, Checkpoint, File, Recipe
from reshard.verification.chunks import Part, Recast, Whole
from reshard.verification.compare import Comparison, Side, compare
from reshard.verification.expected import QUANTIZE, Backwards, Holders, Unit, Widening, backwards, form_of, holders
from reshard.verification.provenance import Held, hold, mixture_problems, units_of
from reshard.verification.reference_casts import powers_of_two
from reshard.verification.target_folder import AGAIN, Found, beside_problems, look_at, read_found

MOST_ASKED = 64
"""So many block scales tell whether they are all powers of two; and so many bytes of each."""

ASKED_SIZE = 64 << 10


@dataclass(frozen=True, slots=True)
class Report:
    """What was compared, and where it differs."""

    ranks: int
    """How many ranks the target is cut for; 1 for whole files."""
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
    inexact: int = 0
    """How many values of FP4 became the nearest of FP8, which has none that is equal under the scale of their block."""
    is_whole: bool = False
    """Whether the target has whole files, not rank files."""
    subset: Mapping[str, Any] = field(default_factory=dict)
    """What of a larger checkpoint the target holds, by its manifest; empty if that says nothing of it."""
    note: str = ""
    """What may explain the problems. It does not change what is compared."""


def verify_target(
    target: Path,
    source: Checkpoint,
    recipe: Recipe,
    advance: Advance = lambda _: None,
    only: Collection[int] | None = None,
    sample: Fraction | None = None,
) -> Report:
    """Compares every byte of every tensor file in the folder `target`, or of the ranks `only`, with the source.

    With a `sample`, about that share of the bytes is compared: blocks spread evenly over every tensor, and always the
    two ends of each tensor of each rank file. Names, dtypes and shapes are looked at in full all the same.

    Every difference is a problem of the report. Raises Refused if there is nothing that could be compared, or a file
    cannot be read or changes meanwhile.
    """
    folder = look_at(target, recipe)
    if folder.is_whole and target.resolve() == source.folder.resolve():
        lacking = f"no file such as {recipe.files.format(rank='0', ranks='N')}, but the source itself"
        raise refuse("empty-target", str(target), lacking, "what was made of it", "is it the right folder?")
    if unknown := sorted(set(only or ()) - set(range(folder.ranks))):
        raise refuse("unknown-rank", "--ranks", f"rank {unknown[0]}", f"ranks from 0 to {folder.ranks - 1}")
    is_part = only is not None and not folder.is_whole
    names = {number: name for number, name in folder.names.items() if not is_part or number in (only or ())}
    files, problems = read_found(target, names)
    extra = f"a file beside those of {folder.ranks} ranks"
    problems += [Problem("extra-file", name, extra, "none") for name in folder.extra]
    for file in files:
        advance(file.file.header_size)
    held = Held(source, folder, Widening(recipe, source.config or {}, {}))
    problems.extend(look_through(held, target, files, recipe))
    things: list[Whole | Recast] = [*held.wholes.values(), *held.recasts.values()]
    comparison = compare(things, *sides(target, files, source), advance, sample)
    problems.extend(difference_problems(held, comparison))
    return report_of(held, files, comparison, problems, is_sampled=sample is not None)


def report_of(
    held: Held, files: Sequence[Found], comparison: Comparison, problems: Sequence[Problem], *, is_sampled: bool
) -> Report:
    tensors = [tensor for file in files for tensor in file.tensors]
    return Report(
        ranks=held.folder.ranks,
        files=len(files),
        tensors=len(tensors),
        size=sum(tensor.size for tensor in tensors),
        compared=comparison.size,
        is_sampled=is_sampled,
        problems=tuple(problems),
        inexact=comparison.inexact,
        is_whole=held.folder.is_whole,
        subset=held.source.subset,
    )


def look_through(held: Held, target: Path, files: Sequence[Found], recipe: Recipe) -> Iterator[Problem]:
    """Finds out what each tensor of the files is; yields what is wrong by names, dtypes and shapes."""
    folder = held.folder
    known = backwards(recipe, held.source, is_whole=folder.is_whole)
    wanted = {} if folder.is_whole else holders(held.source, recipe, folder.ranks)
    swapped = swapped_files(files, known, wanted)
    yield from swapped_problems(held, swapped)
    files = [file for file in files if file.number not in swapped]
    units, problems = units_of(files, known, folder.names)
    held.is_power = is_power_of_two(target, units, held)
    yield from problems
    for unit in units:
        yield from hold(held, unit)
    looked_at = {file.number for file in files}
    yield from absent_problems(held, looked_at, wanted)
    yield from mixture_problems(held)
    if folder.is_whole:
        forms = {form for found in held.forms.values() for form in found}
        yield from beside_problems(target, files, held.source.config, forms, recipe, is_power=held.is_power)


def swapped_files(files: Sequence[Found], known: Backwards, wanted: Mapping[str, Holders]) -> dict[int, int]:
    """By the rank of each file that has just what is dealt to another rank, such as its experts: that other rank."""
    dealt: dict[int, set[str]] = {}
    for name, (ranks, optional) in wanted.items():
        if len(ranks) == 1 and not optional:
            dealt.setdefault(next(iter(ranks)), set()).add(name)
    every, found = set[str]().union(*dealt.values()), dict[int, int]()
    for file in files:
        places = [place for tensor in file.tensors if (place := known.place(tensor.name))]
        names = {name for place in places for name in (place.weight, place.scale)} & every
        if fitting := [rank for rank in dealt if rank != file.number and names == dealt[rank]]:
            found[file.number] = fitting[0]
    return found


def swapped_problems(held: Held, swapped: Mapping[int, int]) -> Iterator[Problem]:
    """A file under the name of another is not compared: nearly all in it would be wrong."""
    for number, rank in swapped.items():
        found = f"the header of {held.folder.names[rank]}"
        yield Problem("swapped-file", held.folder.names[number], found, "its own", "give the files their names back")


def sides(target: Path, files: Sequence[Found], source: Checkpoint) -> tuple[Side, Side]:
    """The files of the source and of the target, and how to read them."""
    size = sum(file.size for file in source.files) + sum(file.file.size for file in files)
    joined = {
        len(source.files) + place: [copies[0] for copies in join.parts] for place, join in enumerate(source.joins)
    }
    source_side = side_of(source.folder, dict(enumerate(source.files)), size)
    return replace(source_side, joined=joined), side_of(target, {file.number: file.file for file in files}, size)


def side_of(folder: Path, files: Mapping[int, File], size: int) -> Side:
    paths = [folder / file.name for file in files.values()]
    return Side(folder, files, ways_to_read(paths[0], size) if paths else CACHED)


def is_power_of_two(target: Path, units: Sequence[Unit], held: Held) -> bool:
    """Whether most block scales that were made by quantising are powers of two: then all should be."""
    tensors, folder = held.source.tensors, held.folder
    powers, others, asked = 0, 0, 0
    for unit in units:
        weight, scale = tensors.get(unit.place.weight), tensors.get(unit.place.scale)
        if asked == MOST_ASKED:
            break
        if not (weight and unit.scale and form_of(unit, weight, scale, is_whole=folder.is_whole) == QUANTIZE):
            continue
        seen = unit.scale
        with (target / folder.names[seen.number]).open("rb") as file:
            file.seek(seen.tensor.offset)
            data = np.frombuffer(file.read(min(seen.tensor.size // 4 * 4, ASKED_SIZE)), np.float32)
        asked += 1
        data = data[data != 1]  # such as those of zeros
        count = int(np.count_nonzero(powers_of_two(data)))
        powers, others = powers + count, others + len(data) - count
    return powers > others


def difference_problems(held: Held, comparison: Comparison) -> Iterator[Problem]:
    """The tensors whose bytes are not those of their box."""
    for whole in held.wholes.values():
        for key in keys_of(whole.parts):
            yield from difference_of(held, comparison, key, whole)
    for (name, form), recast in held.recasts.items():
        for key in keys_of((*recast.parts[0], *recast.parts[1])):
            yield from difference_of(held, comparison, key, f"what {form} makes of {name}")


def keys_of(parts: Iterable[Part]) -> Iterable[tuple[int, str]]:
    """By which differences are known: once for each tensor, of which there may be two parts."""
    return dict.fromkeys((part.rank, part.tensor.name) for part in parts)


def difference_of(held: Held, comparison: Comparison, key: tuple[int, str], origin: Whole | str) -> Iterator[Problem]:
    if found := comparison.differences.get(key):
        place = f"first in byte {found.first:,} of the tensor, last in byte {found.last:,}"
        where = "than in the source" if isinstance(origin, Whole) else "than are made of the source"
        expected = f"those of {origin.tensor.name}" if isinstance(origin, Whole) else origin
        subject = f"{held.folder.names[key[0]]}: {key[1]}"
        yield Problem("differs", subject, f"{found.count:,} other bytes {where}, {place}", expected, AGAIN)


def absent_problems(held: Held, looked_at: set[int], wanted: Mapping[str, Holders]) -> Iterator[Problem]:
    """Tensors of the source that one of the ranks `looked_at` lacks, or has though it should not."""
    if held.folder.is_whole:
        for name in held.source.tensors:
            if not held.present.get(name) and (name, 0) not in held.gone:
                yield Problem("missing-tensor", name, "in none of these files", "in one of them", AGAIN)
        return
    optional = [name for name in wanted if wanted[name].optional and set(wanted[name].ranks) & looked_at]
    # All of what is optional is kept, or none: what most of it tells holds for the rest.
    is_kept = 2 * sum(name in held.present for name in optional) > len(optional)
    for name, (ranks, reason) in wanted.items():
        present = held.present.get(name, {})
        if reason and not is_kept:
            for seen in present.values():
                yield Problem("extra-tensor", held.subject(seen), f"a part of {name}", f"none: {reason}", AGAIN)
            continue
        expected = sorted(rank for rank in set(ranks) & looked_at if (name, rank) not in held.gone)
        found = sorted(rank for rank in present if (name, rank) not in held.gone)
        if expected and not found:
            yield Problem("missing-tensor", name, "in none of these rank files", f"in ranks {expected}", AGAIN)
        elif expected != found:
            yield Problem("wrong-ranks", name, f"in ranks {found}", f"in ranks {expected}", AGAIN)
