"""Takes the fused tensors of a target apart: finds of which source tensor each byte of them should be.

    layers.0.qkv of rank 1:   | q rows 4..8 | k rows 2..4 | v rows 2..4 |     parts, back to back

The order of the parts is that of the recipe's rows; in a stack, of the members by number first. How long each is
follows from the shapes in the source.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import NamedTuple

from reshard.errors import Problem
from reshard.recipe_types import Recipe
from reshard.recipes.fusions import Fusion, list_fusions
from reshard.recipes.patterns import fill_pattern, find_scale_placeholder
from reshard.text import format_list
from reshard.types import Checkpoint
from reshard.verification.chunks import TargetPart
from reshard.verification.expected import SourcePlace, TargetTensor, WeightUnit
from reshard.verification.expected_ranks import SourceRow
from reshard.verification.provenance import Provenance, WantedPart, infer_wanted_parts, join_shapes
from reshard.verification.target_folder import CONVERT_AGAIN_HINT, TargetFolder, TargetHeader

MOST_GAPS = 1000
"""So many members that a stack lacks are named. A name with a wrong number may leave a billion out."""


class FusedTensor(NamedTuple):
    """A fused tensor that the source makes, and its block scale if it can have one."""

    weight: str
    """Its name in the target."""
    scale: str
    """The name of its block scale in the target; empty if its rows have none."""
    places: Sequence[SourcePlace]
    """Its parts, in their order."""
    members: int
    """The number of members that are stacked; 0 if nothing is."""
    lacking: Sequence[str]
    """Names of parts that the source lacks."""


class FusedUnit(NamedTuple):
    """A fused tensor and its block scale, if any, as one rank has them."""

    fused: FusedTensor
    rank: int
    weight: TargetTensor | None
    scale: TargetTensor | None

    def list_units(self) -> list[WeightUnit]:
        """Its parts that the source has, each with the whole tensors of the target that hold it."""
        lacking = set(self.fused.lacking)
        places = [place for place in self.fused.places if place.weight not in lacking]
        return [WeightUnit(place, self.rank, self.weight, self.scale) for place in places]


def list_fused_tensors(source: Checkpoint, rows: Mapping[str, SourceRow], recipe: Recipe) -> list[FusedTensor]:
    """Lists the fused tensors that the source makes."""
    fusions = list_fusions(recipe)
    by_rule = {number: fusion for fusion in fusions for number in fusion.rules}
    found: dict[tuple[Fusion, tuple[tuple[str, int], ...]], set[int]] = {}
    for pattern, numbers in rows.values():
        fusion = by_rule.get(pattern.rule) if pattern else None
        if pattern is None or fusion is None:
            continue
        filling = {slot: int(number) for slot, number in zip(pattern.slots, numbers, strict=True) if slot.isalpha()}
        member = filling.pop(fusion.stacked, 0)
        found.setdefault((fusion, tuple(sorted(filling.items()))), set()).add(member)
    is_part = bool(source.subset)
    return [
        make_fused_tensor(fusion, dict(filling), members, source, recipe, is_part=is_part)
        for (fusion, filling), members in found.items()
    ]


def make_fused_tensor(
    fusion: Fusion,
    filling: Mapping[str, int],
    members: set[int],
    source: Checkpoint,
    recipe: Recipe,
    *,
    is_part: bool,
) -> FusedTensor:
    """Makes a fused tensor of the members in the source; of a whole checkpoint they count from 0 without a gap."""
    gaps = (member for member in range(max(members)) if member not in members)
    wanted = sorted({*members, *islice(gaps, MOST_GAPS)} if fusion.stacked and not is_part else members)
    places = [
        make_place(number, {**filling, fusion.stacked: member}, recipe) for member in wanted for number in fusion.rules
    ]
    letter = find_scale_placeholder(recipe.rules[fusion.rules[0]], recipe)
    scale = fusion.right.replace(f"{{{letter}}}", recipe.scales[letter].right) if letter else ""
    return FusedTensor(
        fill_pattern(fusion.right, filling),
        fill_pattern(scale, filling),
        places,
        len(wanted) if fusion.stacked else 0,
        [place.weight for place in places if place.weight not in source.tensors],
    )


def make_place(number: int, filling: Mapping[str, int], recipe: Recipe) -> SourcePlace:
    """The place of a part: the names of its weight and of its scale in the source."""
    rule = recipe.rules[number]
    letter = find_scale_placeholder(rule, recipe)
    scaling = recipe.scales.get(letter)
    scale = fill_pattern(rule.left.replace(f"{{{letter}}}", scaling.left), filling) if scaling else ""
    return SourcePlace(rule, scaling, fill_pattern(rule.left, filling), scale, is_scale=False)


def name_parts(fused: Iterable[FusedTensor]) -> dict[str, str]:
    """By the name in the source of each part, or of its scale: the name of the fused tensor."""
    names: dict[str, str] = {}
    for one in fused:
        for place in one.places:
            names[place.weight] = one.weight
            if one.scale:
                names[place.scale] = one.scale
    return names


def take_fused_tensors(
    files: Iterable[TargetHeader], fused: Iterable[FusedTensor], folder: TargetFolder
) -> tuple[list[FusedUnit], list[TargetHeader]]:
    """Takes the fused tensors out of the headers. Returns them, weights paired with their scales, and the rest."""
    known = {name: (one, name == one.scale) for one in fused for name in (one.weight, one.scale) if name}
    units: dict[tuple[str, int], FusedUnit] = {}
    rest = []
    for file in files:
        others = []
        for tensor in file.tensors:
            if tensor.name not in known:
                others.append(tensor)
                continue
            one, is_scale = known[tensor.name]
            seen, rank = TargetTensor(file.number, tensor), folder.find_rank(file.number)
            key = one.weight, rank
            unit = units.get(key, FusedUnit(one, rank, None, None))
            units[key] = unit._replace(scale=seen) if is_scale else unit._replace(weight=seen)
        rest.append(file._replace(tensors=others))
    return list(units.values()), rest


def check_repeated_tensors(files: Iterable[TargetHeader], fused: Iterable[FusedTensor]) -> Iterator[Problem]:
    """Reports fused tensors that stand in two files of a folder whose files are one rank together."""
    known = {name for one in fused for name in (one.weight, one.scale) if name}
    first: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            other = first.setdefault(tensor.name, file.file.name)
            if tensor.name in known and other != file.file.name:
                subject, found = f"{file.file.name}: {tensor.name}", f"in {other} too"
                yield Problem("tensor-twice", subject, found, "one file", CONVERT_AGAIN_HINT)


def trace_fused_units(trace: Provenance, units: Sequence[FusedUnit]) -> Iterator[Problem]:
    """Traces the parts of fused tensors to the source. Yields problems of dtypes and shapes, and the names of parts
    that the source lacks.
    """
    for name, fused in {name: unit.fused.weight for unit in units for name in unit.fused.lacking}.items():
        remedy = "is it the source that the target was made from, and whole?"
        yield Problem("missing-tensor", name, "not in the source", f"a part of {fused}", remedy)
    for unit in units:
        yield from trace_fused_unit(trace, unit)


def trace_fused_unit(trace: Provenance, unit: FusedUnit) -> Iterator[Problem]:
    """Infers how the parts of a fused tensor were converted and adds them to `trace`. Yields problems of dtypes and
    shapes; of a kind only the first, for the others say the same of other parts.
    """
    problems: dict[tuple[str, str], Problem] = {}
    wanted: list[WantedPart] = []
    for part in unit.list_units():
        found, parts = infer_wanted_parts(trace, part)
        for problem in found:
            problems.setdefault((problem.kind, problem.subject), problem)
        wanted.extend(parts)
    yield from problems.values()
    if unit.fused.lacking:
        return
    for seen in (unit.weight, unit.scale):
        parts = [part for part in wanted if part.seen is seen]
        if seen and len(parts) == len(unit.fused.places):
            yield from check_whole_blocks(trace, parts, len(parts) // (unit.fused.members or 1))
            yield from add_fused_parts(trace, seen, parts, unit.fused.members)


def add_fused_parts(
    trace: Provenance, seen: TargetTensor, wanted: Sequence[WantedPart], members: int
) -> Iterator[Problem]:
    """Adds the parts of a fused tensor, one behind the other, if its size is right. Yields a problem if its dtype,
    shape or size is wrong.
    """
    tensor, dtypes = seen.tensor, {part.dtype for part in wanted}
    sizes = [[len(box.rows) * len(box.columns) for box in part.boxes] for part in wanted]
    size = sum(map(sum, sizes))
    shape = compute_fused_shape([join_shapes(part.boxes) for part in wanted], members)
    if shape is None or dtypes != {tensor.dtype} or tensor.shape != shape or tensor.size != size:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        yield Problem("wrong-shape", trace.subject(seen), found, describe_parts(wanted, shape), CONVERT_AGAIN_HINT)
    if tensor.size != size:
        return
    skips = accumulate((one for part in sizes for one in part), initial=0)
    for part in wanted:
        for box in part.boxes:
            part.parts.append(TargetPart(seen.number, tensor, box.rows, box.columns, next(skips), part.origin))


def compute_fused_shape(shapes: Sequence[tuple[int, ...]], members: int) -> tuple[int, ...] | None:
    """The shape of parts that lie behind each other along the first dimension; with `members`, in a new dimension of
    as many. None if they do not fit.
    """
    if not all(shapes) or len({shape[1:] for shape in shapes}) > 1:
        return None
    lengths = [shape[0] for shape in shapes]
    if not members:
        return sum(lengths), *shapes[0][1:]
    step = len(lengths) // members
    sums = {sum(lengths[start : start + step]) for start in range(0, len(lengths), step)}
    return (members, sums.pop(), *shapes[0][1:]) if len(sums) == 1 else None


def describe_parts(wanted: Sequence[WantedPart], shape: tuple[int, ...] | None) -> str:
    """The dtype and shape that parts have together; if they do not fit, those of each."""
    dtypes = {part.dtype for part in wanted}
    if shape is not None and len(dtypes) == 1:
        return f"{dtypes.pop()} {list(shape)}"
    each = format_list(f"{part.origin} {part.dtype} {list(join_shapes(part.boxes))}" for part in wanted)
    return f"parts of one dtype that fit together, as these are not: {each}"


def check_whole_blocks(trace: Provenance, wanted: Sequence[WantedPart], step: int) -> Iterator[Problem]:
    """Reports a part that ends inside a block of its scale, if a part of the same member follows: two parts would share
    a block of the fused tensor. A member has `step` parts.
    """
    for number, part in enumerate(wanted, 1):
        rows = join_shapes(part.boxes)[:1]
        if number % step and rows and rows[0] % part.block:
            found = f"{rows[0]} rows of {part.origin}"
            expected = f"whole blocks of {part.block} rows, for the next part has scales of its own"
            yield Problem("wrong-shape", trace.subject(part.seen), found, expected, CONVERT_AGAIN_HINT)
            return
