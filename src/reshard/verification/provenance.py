"""Maps each target tensor to the source tensor, or the cast of one, that it is a slice of."""

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
    """Where each tensor of a target comes from in the source. Filled tensor by tensor."""

    source: Checkpoint
    folder: Folder
    widening: Widening
    is_power: bool = False
    """Whether the scales of quantized weights are powers of two."""
    kept: dict[str, Whole] = field(default_factory=dict)
    """Source tensors whose bytes are kept, by their name in the source."""
    casts: dict[tuple[str, str], Recast] = field(default_factory=dict)
    """Source weights that are cast, by their name in the source and the conversion."""
    present: defaultdict[str, dict[int, Seen]] = field(default_factory=lambda: defaultdict(dict))
    """By the name in the source and by rank: the target tensor that holds a part of it, or of its cast."""
    used_scales: set[tuple[str, int]] = field(default_factory=set)
    """Names and ranks of block scales that the rank needs no more: it has their weights dequantized."""
    conversions: defaultdict[tuple[object, ...], defaultdict[str, list[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    """By kind of weight and by conversion: the tensors. Weights of one kind must all have been converted the same way.
    """
    padded_lengths: defaultdict[tuple[str, int], defaultdict[int, list[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    """By the formula of a dimension and its length in the source, then by its padded length: the tensors."""

    def subject(self, seen: Seen) -> str:
        """The name of a target tensor in problems."""
        return f"{self.folder.names[seen.number]}: {seen.tensor.name}"


def units_of(files: Iterable[Found], known: Backwards, names: Mapping[int, str]) -> tuple[list[Unit], list[Problem]]:
    """Pairs the weights in all files with their block scales; the problems are unknown and repeated tensors."""
    units: dict[tuple[str, int], Unit] = {}
    problems = []
    for file in files:
        rank = 0 if known.is_whole else file.number
        for tensor in file.tensors:
            place, seen = known.locate(tensor.name), Seen(file.number, tensor)
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


def hold(trace: Held, unit: Unit) -> Iterator[Problem]:
    """Infers how a unit was converted and adds it to `trace`; yields problems of its dtypes and shapes."""
    weight, scale = trace.source.tensors.get(unit.place.weight), trace.source.tensors.get(unit.place.scale)
    if weight is None:
        for seen, name in ((unit.weight, unit.place.weight), (unit.scale, unit.place.scale)):
            if seen:
                yield extra(trace, seen, f"no {name} in the source")
        return
    unit = unit._replace(place=unit.place._replace(scaling=scaling_of(unit.place.scaling, weight)))
    conversion = form_of(unit, weight, scale, is_whole=trace.folder.is_whole)
    dtypes = dtypes_of(conversion, unit, weight, scale, is_whole=trace.folder.is_whole)
    if unit.weight:
        trace.present[weight.name][unit.rank] = unit.weight
    if scale and unit.scale:
        trace.present[scale.name][unit.rank] = unit.scale
    if scale and conversion == DEQUANTIZE:
        trace.used_scales.add((scale.name, unit.rank))
    is_free = trace.folder.is_whole or unit.place.rule is None or unit.place.rule.relation == SAME
    if unit.weight and unit.place.scaling and is_free and unit.weight.tensor.dtype == dtypes[0]:
        weight_kind = unit.place.scaling, weight.dtype, scale is None
        trace.conversions[weight_kind][conversion].append(trace.subject(unit.weight))
    yield from scale_problems(trace, unit, scale, conversion)
    yield from hold_parts(trace, unit, (weight, scale), conversion, dtypes)


def scale_problems(trace: Held, unit: Unit, scale: Tensor | None, conversion: str) -> Iterator[Problem]:
    """A block scale that should not be there, or one that is missing for a quantized weight."""
    if unit.scale and conversion == DEQUANTIZE:
        yield extra(trace, unit.scale, "a block scale of a weight that is dequantized")
    elif unit.scale and conversion == SAME and scale is None:
        yield extra(trace, unit.scale, f"no {unit.place.scale} in the source")
    elif unit.weight and conversion == QUANTIZE and unit.scale is None:
        yield Problem("missing-tensor", trace.subject(unit.weight), "FP8 without a block scale", "both", AGAIN)


def extra(trace: Held, seen: Seen, found: str) -> Problem:
    return Problem("extra-tensor", trace.subject(seen), found, "only what comes from the source", AGAIN)


def hold_parts(
    trace: Held, unit: Unit, origins: tuple[Tensor, Tensor | None], conversion: str, dtypes: tuple[str, str]
) -> Iterator[Problem]:
    """Adds the weight and the scale of a unit as parts of source tensors, or of their casts."""
    weight, scale = origins
    rule, scaling, folder = unit.place.rule, unit.place.scaling, trace.folder
    dimension = dimension_of(rule.split) if rule and not folder.is_whole else None
    shape = weight.shape if dtypes[0] == weight.dtype else numbers_shape(weight, scaling)
    seen = unit.weight or unit.scale
    if rule and seen and dimension is not None and len(shape) <= dimension:
        found, expected = f"{list(weight.shape)} in the source", f"{rule.split} to cut"
        yield Problem("wrong-shape", trace.subject(seen), found, expected)
        return
    parts, index = part_of(folder.ranks, unit.rank, heads_of(rule, trace.widening.config))
    found_shape = unit.weight.tensor.shape if unit.weight else ()
    full = trace.widening.full_shape(rule, shape, found_shape, parts, is_whole=folder.is_whole)
    note_lengths(trace, unit, shape, full)
    flat = conversion == SAME and dimension != 1 and 1 not in trace.widening.dimensions(rule)
    lists = lists_of(trace, unit, origins, conversion, dtypes, flat=flat)
    taken = shares(rule.split, full[dimension], parts, index) if rule and dimension is not None else [range(0)]
    if unit.weight:
        wanted = [box(full, BITS[dtypes[0]], dimension, part, flat=flat) for part in taken]
        yield from hold_part(trace, unit.weight, dtypes[0], wanted, lists[0])
    if unit.scale and dtypes[1] and scaling:
        block = scaling.fp8_block if conversion == FP4_TO_FP8 else scaling.block
        blocks = scale.shape if scale and conversion == SAME and full == shape else in_blocks(full, block)
        cut = dimension if dimension is not None and len(blocks) > dimension else None
        taken = [touched(part, block[cut]) for part in taken] if cut is not None else [range(0)]
        wanted = [box(blocks, BITS[dtypes[1]], cut, part, flat=flat) for part in taken]
        yield from hold_part(trace, unit.scale, dtypes[1], wanted, lists[1])


def note_lengths(trace: Held, unit: Unit, shape: tuple[int, ...], full: tuple[int, ...]) -> None:
    rule = unit.place.rule
    if rule is None or unit.weight is None or trace.folder.is_whole:
        return
    for place in trace.widening.dimensions(rule):
        formula = formulas_of(rule.shape)[place]
        trace.padded_lengths[formula, shape[place]][full[place]].append(trace.subject(unit.weight))


def lists_of(
    trace: Held,
    unit: Unit,
    origins: tuple[Tensor, Tensor | None],
    conversion: str,
    dtypes: tuple[str, str],
    *,
    flat: bool,
) -> tuple[list[Part], list[Part]]:
    """The lists that collect the parts of a weight and of its block scale."""
    weight, scale = origins
    if conversion == SAME:
        return tuple(  # type: ignore[return-value]
            trace.kept.setdefault(tensor.name, whole_of(tensor, is_scale=tensor is scale, flat=flat)).parts
            if tensor
            else []
            for tensor in origins
        )
    if unit.place.scaling is None:
        raise ValueError(f"{weight.name} is {conversion} without block scales")
    name = f"{conversion}-ue8m0" if conversion == QUANTIZE and trace.is_power else conversion
    recast = trace.casts.get((weight.name, name))
    if recast is None:
        recast = recast_of(name, origins, unit.place.scaling, dtypes)
        trace.casts[weight.name, name] = recast
    return recast.parts


def whole_of(tensor: Tensor, *, is_scale: bool, flat: bool) -> Whole:
    fill = ONES.get(tensor.dtype, bytes(1)) if is_scale else bytes(1)
    return Whole(tensor, 1 if flat else row_size(tensor.shape, BITS[tensor.dtype]), [], fill)


def recast_of(
    conversion: str, origins: tuple[Tensor, Tensor | None], scaling: BlockScale, dtypes: tuple[str, str]
) -> Recast:
    weight, scale = origins
    rows, columns = numbers_shape(weight, scaling)
    new = scaling.fp8_block if conversion == FP4_TO_FP8 else scaling.block if dtypes[1] else (1, 1)
    return Recast(conversion, weight, scale, (rows, columns), scaling.block, new, dtypes, ([], []))


def hold_part(trace: Held, seen: Seen, dtype: str, wanted: Sequence[Box], parts: list[Part]) -> Iterator[Problem]:
    """Adds a target tensor that should hold the boxes `wanted`, one behind the other, if its size is right. Yields a
    problem if its dtype, shape or size is wrong.
    """
    tensor, shape = seen.tensor, wanted[0].shape
    sizes = [len(one.rows) * len(one.columns) for one in wanted]
    if len(wanted) > 1:
        shape = (sum(one.shape[0] for one in wanted), *shape[1:])
    if tensor.dtype != dtype or tensor.shape != shape or tensor.size != sum(sizes):
        found, expected = f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} {list(shape)}"
        yield Problem("wrong-shape", trace.subject(seen), found, expected, AGAIN)
    if tensor.size == sum(sizes):
        for one, skip in zip(wanted, accumulate(sizes, initial=0), strict=False):
            parts.append(Part(seen.number, tensor, one.rows, one.columns, skip))


def mixture_problems(trace: Held) -> Iterator[Problem]:
    """Weights that were converted in another way than most of their kind, and dimensions padded to another length."""
    for conversions in trace.conversions.values():
        usual = max(conversions, key=lambda conversion: len(conversions[conversion]))
        for conversion in conversions.keys() - {usual}:
            for subject in conversions[conversion]:
                yield Problem("mixture", subject, WORDS[conversion], f"{WORDS[usual]}, like most others", AGAIN)
    for (formula, length), found in trace.padded_lengths.items():
        usual_length = max(found, key=lambda padded: len(found[padded]))
        for other in sorted(found.keys() - {usual_length}):
            for subject in found[other]:
                expected = f"{usual_length}, like most others"
                yield Problem("mixture", subject, f"{formula} from {length} to {other}", expected, AGAIN)
