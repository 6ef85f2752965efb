"""Maps each target tensor to the source tensor, or the cast of one, that it is a slice of."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import NamedTuple

from reshard.errors import Problem
from reshard.formats.safetensors import BITS
from reshard.recipe_types import BlockScale
from reshard.recipes.fusions import FUSED
from reshard.types import Checkpoint, Tensor
from reshard.verification.chunks import CastWeight, KeptTensor, TargetPart
from reshard.verification.expected import (
    DEQUANTIZE,
    FLATTENED,
    FP4_TO_FP8,
    QUANTIZE,
    ROUND,
    SAME,
    InvertedRecipe,
    PaddedDimensions,
    TargetTensor,
    WeightUnit,
    choose_block_scaling,
    count_scale_blocks,
    count_split_heads,
    get_expected_dtypes,
    get_shape_in_elements,
    infer_conversion,
    may_be_rounded,
    parse_dimension_formulas,
)
from reshard.verification.expected_boxes import (
    ExpectedBox,
    compute_row_size,
    cover_with_blocks,
    find_leading_dimensions,
    find_part_of_rank,
    find_split_dimension,
    flatten_box,
    make_expected_box,
    split_dimension,
)
from reshard.verification.reference_casts import SCALE_ONE_BYTES
from reshard.verification.slices import Slices, split_part
from reshard.verification.target_folder import CONVERT_AGAIN_HINT, TargetFolder, TargetHeader
from reshard.verification.unpacked_weights import UnpackedWeight

PLAIN = ("F32 and F16",)
"""The kind of all tensors that a cast to BF16 rounds: all of them are rounded, or none."""


@dataclass(slots=True)
class Provenance:
    """Where each tensor of a target comes from in the source. Filled tensor by tensor."""

    source: Checkpoint
    folder: TargetFolder
    widening: PaddedDimensions
    is_power: bool = False
    """Whether the scales of quantized weights are powers of two."""
    kept: dict[str, KeptTensor] = field(default_factory=dict)
    """Source tensors whose bytes are kept, by their name in the source."""
    casts: dict[tuple[str, str], CastWeight] = field(default_factory=dict)
    """Source weights that are cast, by their name in the source and the conversion."""
    unpacked: dict[str, UnpackedWeight] = field(default_factory=dict)
    """Packed weights of the source, by the name that the source has them under."""
    present: defaultdict[str, dict[int, TargetTensor]] = field(default_factory=lambda: defaultdict(dict))
    """By the name in the source and by rank: the target tensor that holds a part of it, or of its cast."""
    slices: Slices = field(default_factory=dict)
    """Of a target of slices: by the name of each whole tensor, its slices; empty for any other target."""
    fused: Mapping[str, str] = field(default_factory=dict)
    """By the name in the source of each part of a fused tensor: the name of the fused tensor."""
    constants: list[Tensor] = field(default_factory=list)
    """The tensors of the target that are constants of the recipe."""
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

    def subject(self, seen: TargetTensor) -> str:
        """The name of a target tensor in problems."""
        return f"{self.folder.names[seen.number]}: {seen.tensor.name}"


def pair_weights_with_scales(
    files: Iterable[TargetHeader], known: InvertedRecipe, folder: TargetFolder
) -> tuple[list[WeightUnit], list[Problem]]:
    """Pairs the weights in all files with their block scales; the problems are unknown and repeated tensors."""
    units: dict[tuple[str, int], WeightUnit] = {}
    problems = []
    for file in files:
        rank = folder.find_rank(file.number)
        for tensor in file.tensors:
            place, seen = known.locate(tensor.name), TargetTensor(file.number, tensor)
            subject = f"{file.file.name}: {tensor.name}"
            if place is None:
                expected = "only what comes from the source"
                problems.append(Problem("extra-tensor", subject, "no rule of the recipe", expected, CONVERT_AGAIN_HINT))
                continue
            key = place.weight, rank
            unit = units.get(key, WeightUnit(place, rank, None, None))
            if first := unit.scale if place.is_scale else unit.weight:
                found = f"in {folder.names[first.number]} too"
                problems.append(Problem("tensor-twice", subject, found, "one file", CONVERT_AGAIN_HINT))
                continue
            units[key] = unit._replace(scale=seen) if place.is_scale else unit._replace(weight=seen)
    return list(units.values()), problems


class WantedPart(NamedTuple):
    """What a target tensor should hold of a source tensor or of its cast."""

    seen: TargetTensor
    dtype: str
    boxes: Sequence[ExpectedBox]
    """One behind the other."""
    parts: list[TargetPart]
    """Collects them."""
    origin: str
    """The name of the tensor in the source; of a new block scale, the one that it would have."""
    block: int = 1
    """Of a weight: so many rows share a value of its scale in the target."""


def trace_unit(trace: Provenance, unit: WeightUnit) -> Iterator[Problem]:
    """Infers how a unit was converted and adds it to `trace`; yields problems of its dtypes and shapes."""
    problems, wanted = infer_wanted_parts(trace, unit)
    yield from problems
    for part in wanted:
        yield from add_parts(trace, part)


def infer_wanted_parts(trace: Provenance, unit: WeightUnit) -> tuple[list[Problem], list[WantedPart]]:
    """Infers how a unit was converted, and notes it in `trace`. Returns what is wrong whatever the shapes are, and what
    its weight and its scale should hold.
    """
    weight, scale = trace.source.tensors.get(unit.place.weight), trace.source.tensors.get(unit.place.scale)
    if weight is None:
        pairs = ((unit.weight, unit.place.weight), (unit.scale, unit.place.scale))
        return [make_extra_tensor_problem(trace, seen, f"no {name} in the source") for seen, name in pairs if seen], []
    unit = unit._replace(place=unit.place._replace(scaling=choose_block_scaling(unit.place.scaling, weight)))
    packed = trace.source.find_packed(weight)
    conversion = DEQUANTIZE if packed else infer_conversion(unit, weight, scale, is_whole=trace.folder.is_whole)
    if trace.folder.is_share and unit.scale and not unit.weight and not packed:
        conversion = infer_by_scale(unit.scale.tensor, scale, conversion)
    dtypes = get_expected_dtypes(conversion, unit, weight, scale, is_whole=trace.folder.is_whole)
    if unit.weight:
        trace.present[weight.name][unit.rank] = unit.weight
    if scale and unit.scale:
        trace.present[scale.name][unit.rank] = unit.scale
    if scale and conversion == DEQUANTIZE:
        trace.used_scales.add((scale.name, unit.rank))
    is_free = trace.folder.is_whole or unit.place.rule is None or unit.place.rule.relation in (SAME, *FUSED)
    plain = may_be_rounded(unit.place.rule, unit.place.scaling, weight, scale)
    if unit.weight and (packed or plain or (unit.place.scaling and is_free)) and unit.weight.tensor.dtype == dtypes[0]:
        weight_kind = PLAIN if plain else (unit.place.scaling, weight.dtype, scale is None)
        weight_kind = (packed.packing,) if packed else weight_kind  # each of them, beside others that are BF16
        trace.conversions[weight_kind][conversion].append(trace.subject(unit.weight))
    problems = [*check_block_scale(trace, unit, scale, conversion), *check_cut(trace, unit, weight, dtypes[0])]
    is_cut_right = not any(problem.kind == "wrong-shape" for problem in problems)
    return problems, list(list_wanted_parts(trace, unit, (weight, scale), conversion, dtypes)) if is_cut_right else []


def infer_by_scale(seen: Tensor, scale: Tensor | None, conversion: str) -> str:
    """Infers how a weight was converted by its block scale alone: in a share, another one may have the weight."""
    if scale is None:
        return QUANTIZE
    return conversion if (seen.dtype, seen.shape) == (scale.dtype, scale.shape) else FP4_TO_FP8


def check_block_scale(trace: Provenance, unit: WeightUnit, scale: Tensor | None, conversion: str) -> Iterator[Problem]:
    """A block scale that should not be there, or one that is missing for a quantized weight."""
    if unit.scale and conversion == DEQUANTIZE:
        yield make_extra_tensor_problem(trace, unit.scale, "a block scale of a weight that is dequantized")
    elif unit.scale and conversion in (SAME, ROUND) and scale is None:
        yield make_extra_tensor_problem(trace, unit.scale, f"no {unit.place.scale} in the source")
    elif unit.weight and conversion == QUANTIZE and unit.scale is None and not trace.folder.is_share:
        yield Problem(
            "missing-tensor", trace.subject(unit.weight), "FP8 without a block scale", "both", CONVERT_AGAIN_HINT
        )


def make_extra_tensor_problem(trace: Provenance, seen: TargetTensor, found: str) -> Problem:
    return Problem("extra-tensor", trace.subject(seen), found, "only what comes from the source", CONVERT_AGAIN_HINT)


def find_cut(trace: Provenance, unit: WeightUnit) -> int | None:
    """The dimension of the weight of a unit that ranks share; None if each has all of it."""
    return find_split_dimension(unit.place.rule.split) if unit.place.rule and not trace.folder.is_whole else None


def find_target_shape(unit: WeightUnit, weight: Tensor, dtype: str) -> tuple[int, ...]:
    """The shape of a source weight in the elements of its dtype in the target."""
    return weight.shape if dtype == weight.dtype else get_shape_in_elements(weight, unit.place.scaling)


def check_cut(trace: Provenance, unit: WeightUnit, weight: Tensor, dtype: str) -> Iterator[Problem]:
    """A weight that has no such dimension as its rule cuts."""
    dimension, seen, rule = find_cut(trace, unit), unit.weight or unit.scale, unit.place.rule
    if rule and seen and dimension is not None and len(find_target_shape(unit, weight, dtype)) <= dimension:
        found, expected = f"{list(weight.shape)} in the source", f"{rule.split} to cut"
        yield Problem("wrong-shape", trace.subject(seen), found, expected)


def list_wanted_parts(
    trace: Provenance, unit: WeightUnit, origins: tuple[Tensor, Tensor | None], conversion: str, dtypes: tuple[str, str]
) -> Iterator[WantedPart]:
    """Computes what the weight and the scale of a unit should hold of source tensors, or of their casts."""
    weight, scale = origins
    rule, scaling, folder = unit.place.rule, unit.place.scaling, trace.folder
    dimension, shape = find_cut(trace, unit), find_target_shape(unit, weight, dtypes[0])
    parts, index = find_part_of_rank(folder.ranks, unit.rank, count_split_heads(rule, trace.widening.config))
    found_shape = unit.weight.tensor.shape if unit.weight else ()
    full = trace.widening.full_shape(rule, shape, found_shape, parts, is_whole=folder.is_whole)
    note_padded_lengths(trace, unit, shape, full)
    padded, is_kept = trace.widening.dimensions(rule), conversion == SAME
    leading = find_leading_dimensions(dimension, padded, len(full), is_kept=is_kept)
    lists = get_part_lists(trace, unit, origins, conversion, dtypes, leading)
    taken = split_dimension(rule.split, full[dimension], parts, index) if rule and dimension is not None else [range(0)]
    block = (1, 1)
    if scaling and dtypes[1]:
        block = scaling.fp8_block if conversion == FP4_TO_FP8 else scaling.block
    if unit.weight:
        wanted = [make_expected_box(full, BITS[dtypes[0]], dimension, part, leading) for part in taken]
        if rule and rule.relation == FLATTENED and not folder.is_whole:
            wanted = [flatten_box(box) for box in wanted]
        yield WantedPart(unit.weight, dtypes[0], wanted, lists[0], unit.place.weight, block[0])
    if unit.scale and dtypes[1] and scaling:
        blocks = scale.shape if scale and conversion == SAME and full == shape else count_scale_blocks(full, block)
        cut = dimension if dimension is not None and len(blocks) > dimension else None
        taken = [cover_with_blocks(part, block[cut]) for part in taken] if cut is not None else [range(0)]
        wanted = [make_expected_box(blocks, BITS[dtypes[1]], cut, part, leading) for part in taken]
        yield WantedPart(unit.scale, dtypes[1], wanted, lists[1], unit.place.scale)


def note_padded_lengths(trace: Provenance, unit: WeightUnit, shape: tuple[int, ...], full: tuple[int, ...]) -> None:
    rule = unit.place.rule
    if rule is None or unit.weight is None or trace.folder.is_whole:
        return
    for place in trace.widening.dimensions(rule):
        formula = parse_dimension_formulas(rule.shape)[place]
        trace.padded_lengths[formula, shape[place]][full[place]].append(trace.subject(unit.weight))


def get_part_lists(
    trace: Provenance,
    unit: WeightUnit,
    origins: tuple[Tensor, Tensor | None],
    conversion: str,
    dtypes: tuple[str, str],
    leading: int,
) -> tuple[list[TargetPart], list[TargetPart]]:
    """The lists that collect the parts of a weight and of its block scale."""
    weight, scale = origins
    if conversion == SAME:
        return tuple(  # type: ignore[return-value]
            trace.kept.setdefault(tensor.name, make_kept_tensor(tensor, leading, is_scale=tensor is scale)).parts
            if tensor
            else []
            for tensor in origins
        )
    if packed := trace.source.find_packed(weight):
        return trace.unpacked.setdefault(weight.name, UnpackedWeight(packed, leading, [])).parts, []
    name = f"{conversion}-ue8m0" if conversion == QUANTIZE and trace.is_power else conversion
    recast = trace.casts.get((weight.name, name))
    if recast is None:
        recast = make_cast_weight(name, origins, unit.place.scaling, dtypes, leading)
        trace.casts[weight.name, name] = recast
    return recast.parts


def make_kept_tensor(tensor: Tensor, leading: int, *, is_scale: bool) -> KeptTensor:
    fill = SCALE_ONE_BYTES.get(tensor.dtype, bytes(1)) if is_scale else bytes(1)
    return KeptTensor(tensor, compute_row_size(tensor.shape, BITS[tensor.dtype], leading), [], fill)


def make_cast_weight(
    conversion: str,
    origins: tuple[Tensor, Tensor | None],
    scaling: BlockScale | None,
    dtypes: tuple[str, str],
    leading: int,
) -> CastWeight:
    weight, scale = origins
    if scaling is None or conversion == ROUND:
        shape = prod(weight.shape[:leading]), prod(weight.shape[leading:])
        return CastWeight(conversion, weight, None, shape, (1, 1), (1, 1), dtypes, ([], []))
    rows, columns = get_shape_in_elements(weight, scaling)
    new = scaling.fp8_block if conversion == FP4_TO_FP8 else scaling.block if dtypes[1] else (1, 1)
    return CastWeight(conversion, weight, scale, (rows, columns), scaling.block, new, dtypes, ([], []))


def add_parts(trace: Provenance, wanted: WantedPart) -> Iterator[Problem]:
    """Adds the boxes that a target tensor should hold, one behind the other, if its size is right. Yields a problem if
    its dtype, shape or size is wrong.
    """
    tensor, dtype, shape = wanted.seen.tensor, wanted.dtype, join_shapes(wanted.boxes)
    sizes = [len(one.rows) * len(one.columns) for one in wanted.boxes]
    if tensor.dtype != dtype or tensor.shape != shape or tensor.size != sum(sizes):
        found, expected = f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} {list(shape)}"
        yield Problem("wrong-shape", trace.subject(wanted.seen), found, expected, CONVERT_AGAIN_HINT)
    if tensor.size == sum(sizes):
        for one, skip in zip(wanted.boxes, accumulate(sizes, initial=0), strict=False):
            wanted.parts.append(TargetPart(wanted.seen.number, tensor, one.rows, one.columns, skip))


def join_shapes(boxes: Sequence[ExpectedBox]) -> tuple[int, ...]:
    """The shape of boxes that lie behind each other along the first dimension."""
    shape = boxes[0].shape
    return (sum(one.shape[0] for one in boxes), *shape[1:]) if len(boxes) > 1 else shape


def spread_over_slices(trace: Provenance) -> None:
    """Deals out what each whole tensor should hold to its slices, in the place of the whole ones."""
    kept = [whole.parts for whole in trace.kept.values()]
    unpacked = [whole.parts for whole in trace.unpacked.values()]
    for parts in (*kept, *unpacked, *(several for recast in trace.casts.values() for several in recast.parts)):
        parts[:] = [one for part in parts for one in split_part(part, trace.slices)]
