"""Of which source tensor, or cast of one, each tensor of the target is a part."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from reshard.errors import Problem
from reshard.formats.safetensors import BITS
from reshard.types import BlockScale, Checkpoint, Tensor
from reshard.verification.chunks import Part, Recast, Whole
from reshard.verification.expected import (
    DEQUANTIZE,
    FP4_TO_FP8,
    QUANTIZE,
    SAME,
    WORDS,
    Backwards,
    Box,
    Seen,
    Unit,
    Widening,
    box,
    dimension_of,
    dtypes_of,
    form_of,
    formulas_of,
    heads_of,
    in_blocks,
    numbers_shape,
    part_of,
    row_size,
    scaling_of,
    shares,
    touched,
)
from reshard.verification.reference_casts import ONES
from reshard.verification.target_folder import AGAIN, Folder, Found


@dataclass(slots=True)
class Held:
    """What a target holds, as it is found out tensor by tensor."""

    source: Checkpoint
    folder: Folder
    widening: Widening
    is_power: bool = False
    """Whether what was quantised has powers of two as scales."""
    wholes: dict[str, Whole] = field(default_factory=dict)
    """By the name in the source."""
    recasts: dict[tuple[str, str], Recast] = field(default_factory=dict)
    """By the name of the weight in the source, and its form."""
    present: defaultdict[str, dict[int, Seen]] = field(default_factory=lambda: defaultdict(dict))
    """By the name in the source, and by rank: what is a part of it there, or of what is made of it."""
    gone: set[tuple[str, int]] = field(default_factory=set)
    """Block scales that a rank need not have, for their weights are dequantised there."""
    forms: defaultdict[tuple[object, ...], defaultdict[str, list[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    """By what must be treated alike, and by form: the tensors."""
    lengths: defaultdict[tuple[str, int], defaultdict[int, list[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    """By the formula of a dimension and its length in the source, and by its length with padding: the tensors."""

    def subject(self, seen: Seen) -> str:
        """How a problem names a tensor of the target."""
        return f"{self.folder.names[seen.number]}: {seen.tensor.name}"


def units_of(files: Iterable[Found], known: Backwards, names: Mapping[int, str]) -> tuple[list[Unit], list[Problem]]:
    """The tensors of all files, each weight with its block scale; and those that no rule knows, or that are twice."""
    units: dict[tuple[str, int], Unit] = {}
    problems = []
    for file in files:
        rank = 0 if known.is_whole else file.number
        for tensor in file.tensors:
            place, seen = known.place(tensor.name), Seen(file.number, tensor)
            subject = f"{file.file.name}: {tensor.name}"
            if place is None:
                expected = "only what comes from the source"
                problems.append(Problem("extra-tensor", subject, "no rule of the recipe", expected, AGAIN))
                continue
            key = place.weight, rank
            unit = units.get(key, Unit(place, rank, None, None))
            if first := unit.scale if place.is_scale else unit.weight:
                found = f"in {names[first.number]} too"
                problems.append(Problem("tensor-twice", subject, found, "one file", AGAIN))
                continue
            units[key] = unit._replace(scale=seen) if place.is_scale else unit._replace(weight=seen)
    return list(units.values()), problems


def hold(held: Held, unit: Unit) -> Iterator[Problem]:
    """Adds what a unit is to `held`; yields what is wrong with it by its dtypes and shapes."""
    weight, scale = held.source.tensors.get(unit.place.weight), held.source.tensors.get(unit.place.scale)
    if weight is None:
        for seen, name in ((unit.weight, unit.place.weight), (unit.scale, unit.place.scale)):
            if seen:
                yield extra(held, seen, f"no {name} in the source")
        return
    unit = unit._replace(place=unit.place._replace(scaling=scaling_of(unit.place.scaling, weight)))
    form = form_of(unit, weight, scale, is_whole=held.folder.is_whole)
    dtypes = dtypes_of(form, unit, weight, scale, is_whole=held.folder.is_whole)
    if unit.weight:
        held.present[weight.name][unit.rank] = unit.weight
    if scale and unit.scale:
        held.present[scale.name][unit.rank] = unit.scale
    if scale and form == DEQUANTIZE:
        held.gone.add((scale.name, unit.rank))
    is_free = held.folder.is_whole or unit.place.rule is None or unit.place.rule.relation == SAME
    if unit.weight and unit.place.scaling and is_free and unit.weight.tensor.dtype == dtypes[0]:
        alike = unit.place.scaling, weight.dtype, scale is None
        held.forms[alike][form].append(held.subject(unit.weight))
    yield from scale_problems(held, unit, scale, form)
    yield from hold_parts(held, unit, (weight, scale), form, dtypes)


def scale_problems(held: Held, unit: Unit, scale: Tensor | None, form: str) -> Iterator[Problem]:
    """A block scale that there should not be, or one that should have been made."""
    if unit.scale and form == DEQUANTIZE:
        yield extra(held, unit.scale, "a block scale of a weight that is dequantised")
    elif unit.scale and form == SAME and scale is None:
        yield extra(held, unit.scale, f"no {unit.place.scale} in the source")
    elif unit.weight and form == QUANTIZE and unit.scale is None:
        yield Problem("missing-tensor", held.subject(unit.weight), "FP8 without a block scale", "both", AGAIN)


def extra(held: Held, seen: Seen, found: str) -> Problem:
    return Problem("extra-tensor", held.subject(seen), found, "only what comes from the source", AGAIN)


def hold_parts(
    held: Held, unit: Unit, origins: tuple[Tensor, Tensor | None], form: str, dtypes: tuple[str, str]
) -> Iterator[Problem]:
    """Adds the parts that a unit is of the source's tensors, or of what is made of them."""
    weight, scale = origins
    rule, scaling, folder = unit.place.rule, unit.place.scaling, held.folder
    dimension = dimension_of(rule.split) if rule and not folder.is_whole else None
    shape = weight.shape if dtypes[0] == weight.dtype else numbers_shape(weight, scaling)
    seen = unit.weight or unit.scale
    if rule and seen and dimension is not None and len(shape) <= dimension:
        found, expected = f"{list(weight.shape)} in the source", f"{rule.split} to cut"
        yield Problem("wrong-shape", held.subject(seen), found, expected)
        return
    parts, index = part_of(folder.ranks, unit.rank, heads_of(rule, held.widening.config))
    found_shape = unit.weight.tensor.shape if unit.weight else ()
    full = held.widening.full_shape(rule, shape, found_shape, parts, is_whole=folder.is_whole)
    note_lengths(held, unit, shape, full)
    flat = form == SAME and dimension != 1 and 1 not in held.widening.dimensions(rule)
    lists = lists_of(held, unit, origins, form, dtypes, flat=flat)
    taken = shares(rule.split, full[dimension], parts, index) if rule and dimension is not None else [range(0)]
    if unit.weight:
        wanted = [box(full, BITS[dtypes[0]], dimension, stretch, flat=flat) for stretch in taken]
        yield from hold_part(held, unit.weight, dtypes[0], wanted, lists[0])
    if unit.scale and dtypes[1] and scaling:
        block = scaling.fp8_block if form == FP4_TO_FP8 else scaling.block
        blocks = scale.shape if scale and form == SAME and full == shape else in_blocks(full, block)
        cut = dimension if dimension is not None and len(blocks) > dimension else None
        taken = [touched(stretch, block[cut]) for stretch in taken] if cut is not None else [range(0)]
        wanted = [box(blocks, BITS[dtypes[1]], cut, stretch, flat=flat) for stretch in taken]
        yield from hold_part(held, unit.scale, dtypes[1], wanted, lists[1])


def note_lengths(held: Held, unit: Unit, shape: tuple[int, ...], full: tuple[int, ...]) -> None:
    rule = unit.place.rule
    if rule is None or unit.weight is None or held.folder.is_whole:
        return
    for place in held.widening.dimensions(rule):
        formula = formulas_of(rule.shape)[place]
        held.lengths[formula, shape[place]][full[place]].append(held.subject(unit.weight))


def lists_of(
    held: Held, unit: Unit, origins: tuple[Tensor, Tensor | None], form: str, dtypes: tuple[str, str], *, flat: bool
) -> tuple[list[Part], list[Part]]:
    """Where the parts of a weight and of its block scale are kept."""
    weight, scale = origins
    if form == SAME:
        return tuple(  # type: ignore[return-value]
            held.wholes.setdefault(tensor.name, whole_of(tensor, is_scale=tensor is scale, flat=flat)).parts
            if tensor
            else []
            for tensor in origins
        )
    if unit.place.scaling is None:
        raise ValueError(f"{weight.name} is {form} without block scales")
    name = f"{form}-ue8m0" if form == QUANTIZE and held.is_power else form
    recast = held.recasts.get((weight.name, name))
    if recast is None:
        recast = recast_of(name, origins, unit.place.scaling, dtypes)
        held.recasts[weight.name, name] = recast
    return recast.parts


def whole_of(tensor: Tensor, *, is_scale: bool, flat: bool) -> Whole:
    fill = ONES.get(tensor.dtype, bytes(1)) if is_scale else bytes(1)
    return Whole(tensor, 1 if flat else row_size(tensor.shape, BITS[tensor.dtype]), [], fill)


def recast_of(form: str, origins: tuple[Tensor, Tensor | None], scaling: BlockScale, dtypes: tuple[str, str]) -> Recast:
    weight, scale = origins
    rows, columns = numbers_shape(weight, scaling)
    new = scaling.fp8_block if form == FP4_TO_FP8 else scaling.block if dtypes[1] else (1, 1)
    return Recast(form, weight, scale, (rows, columns), scaling.block, new, dtypes, ([], []))


def hold_part(held: Held, seen: Seen, dtype: str, wanted: Sequence[Box], parts: list[Part]) -> Iterator[Problem]:
    """Adds a tensor of the target, if it has the size of its boxes, of which there are several where it holds them one
    behind the other; yields what is wrong with its dtype and shape.
    """
    tensor, shape = seen.tensor, wanted[0].shape
    sizes = [len(one.rows) * len(one.columns) for one in wanted]
    if len(wanted) > 1:
        shape = (sum(one.shape[0] for one in wanted), *shape[1:])
    if tensor.dtype != dtype or tensor.shape != shape or tensor.size != sum(sizes):
        found, expected = f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} {list(shape)}"
        yield Problem("wrong-shape", held.subject(seen), found, expected, AGAIN)
    if tensor.size == sum(sizes):
        for one, skip in zip(wanted, accumulate(sizes, initial=0), strict=False):
            parts.append(Part(seen.number, tensor, one.rows, one.columns, skip))


def mixture_problems(held: Held) -> Iterator[Problem]:
    """Weights that were treated otherwise than most of their like, and dimensions with another padding than most."""
    for forms in held.forms.values():
        usual = max(forms, key=lambda form: len(forms[form]))
        for form in forms.keys() - {usual}:
            for subject in forms[form]:
                yield Problem("mixture", subject, WORDS[form], f"{WORDS[usual]}, like most others", AGAIN)
    for (formula, length), found in held.lengths.items():
        usual_length = max(found, key=lambda padded: len(found[padded]))
        for other in sorted(found.keys() - {usual_length}):
            for subject in found[other]:
                expected = f"{usual_length}, like most others"
                yield Problem("mixture", subject, f"{formula} from {length} to {other}", expected, AGAIN)
