"""Verifies a target against its source: re-reads both and compares every byte. Shares no code with the planner.

The planner goes from source names to target names and computes byte offsets. `verify` goes the other way. It takes
each tensor of the target and finds its source name with the inverted recipe. It infers from dtype and shape whether the
bytes were kept, cast or padded. It computes the box (rows, columns) of the source tensor, or of its cast, that the rank
should hold, and compares every byte of this box.

Replicas are compared with the source in every rank: if nothing differs, they are equal.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from reshard.errors import Problem, refuse
from reshard.paths import AnyPath, is_same_folder
from reshard.recipe_types import Recipe
from reshard.types import Advance, Checkpoint
from reshard.verification.compare import Compared, Comparison, compare_parts, list_parts
from reshard.verification.compared_files import ComparedFiles, make_compared_files
from reshard.verification.constants import check_filled_constants, list_expected_constants, take_constants
from reshard.verification.differences import check_differences, list_target_tensors
from reshard.verification.expected import (
    DEQUANTIZE,
    FILL,
    PaddedDimensions,
    invert_recipe,
)
from reshard.verification.expected_ranks import ExpectedRanks, find_expected_ranks, find_source_rows
from reshard.verification.fused_parts import (
    check_repeated_tensors,
    list_fused_tensors,
    name_parts,
    take_fused_tensors,
    trace_fused_units,
)
from reshard.verification.index_and_config import check_index_and_config
from reshard.verification.mixtures import check_mixtures
from reshard.verification.nvfp4_tensors import take_nvfp4_tensors
from reshard.verification.packed_source import PackedSource, check_packed_source
from reshard.verification.power_scales import has_power_of_two_scales
from reshard.verification.provenance import (
    Provenance,
    pair_weights_with_scales,
    spread_over_slices,
    trace_unit,
)
from reshard.verification.report import Report
from reshard.verification.share_files import check_share_files
from reshard.verification.slices import ALL_SLICES, read_sliced_target
from reshard.verification.stacked_source import StackedSource, check_stacked_source
from reshard.verification.swapped_files import (
    check_described_ranks,
    check_swapped_files,
    find_described_files,
    find_swapped_files,
)
from reshard.verification.target_folder import (
    CONVERT_AGAIN_HINT,
    TargetHeader,
    choose_files,
    list_target_files,
    read_target_headers,
)


class TracedTarget(NamedTuple):
    """A target whose tensors are traced to the source: all but the comparison of their bytes."""

    trace: Provenance
    files: Sequence[TargetHeader]
    problems: Sequence[Problem]
    source: ComparedFiles
    target: ComparedFiles

    @property
    def things(self) -> Sequence[Compared]:
        """What is to be compared."""
        return [*self.trace.kept.values(), *self.trace.casts.values(), *self.trace.unpacked.values()]


Compare = Callable[[TracedTarget, Advance, Fraction | None], Comparison]
"""Compares all bytes of a traced target, or a sample of them. Raises Refused."""


def compare_traced(traced: TracedTarget, advance: Advance, sample: Fraction | None) -> Comparison:
    """Compares all of a target in this process."""
    return compare_parts(traced.things, traced.source, traced.target, advance, sample)


def verify_traced(
    traced: TracedTarget, advance: Advance, sample: Fraction | None, compare: Compare = compare_traced
) -> Report:
    """Compares every byte of every tensor file of a traced target with the source, and makes the report, of which every
    difference is a problem.

    With a `sample`, a fraction such as 1/100, only about that share of the bytes is compared: blocks spread evenly over
    every tensor, and always both ends of each tensor of each rank file. Names, dtypes and shapes are checked in full.
    Raises Refused if a file cannot be read or changes meanwhile.
    """
    advance(sum(file.header_size for file in traced.target.files.values()))
    comparison = compare(traced, advance, sample)
    if traced.trace.constants:
        advance(sum(tensor.size for tensor in traced.trace.constants))
    return make_report(traced, comparison, is_sampled=sample is not None)


def trace_target(
    target: AnyPath,
    source: Checkpoint,
    recipe: Recipe,
    ranks: Collection[int] | None,
    *,
    stacked: StackedSource | None,
    packed: PackedSource | None,
    ignore_extra_files: bool,
) -> TracedTarget:
    """Traces each tensor of a target to the source, by the headers; of some `ranks` only, if they are given. Of a
    source with stacked experts (`stacked`) or packed weights (`packed`) it is also proven from where its tensors are
    read. Raises Refused if there is nothing to compare, or if a file cannot be read.
    """
    folder = list_target_files(target, recipe)
    if (folder.is_whole or folder.is_joint) and is_same_folder(target, source.folder):
        lacking = f"no file such as {recipe.files.format(rank='0', ranks='N')}, but the source itself"
        lacking = "the source itself" if folder.is_joint or folder.is_sliced else lacking
        raise refuse("empty-target", str(target), lacking, "what was made of it", "is it the right folder?")
    names = choose_files(folder, ranks)
    sliced = read_sliced_target(target, folder) if folder.is_sliced else None
    files, problems = (sliced.files, [*sliced.problems]) if sliced else read_target_headers(target, names)
    is_of_ranks = folder.is_sliced or not folder.is_joint
    extra = f"a file beside those of {folder.ranks} ranks" if is_of_ranks else "a file that is not read"
    problems += [Problem("extra-file", name, extra, "none") for name in folder.extra if not ignore_extra_files]
    trace = Provenance(source, folder, PaddedDimensions(recipe, source.config or {}, {}))
    problems.extend(check_stacked_source(stacked) if stacked else ())
    problems.extend(check_packed_source(packed) if packed else ())
    if sliced:
        trace.slices = sliced.slices
        trace.folder = folder._replace(names={**folder.names, folder.ranks: ALL_SLICES})
    if not (sliced and sliced.problems):  # else nearly every tensor would differ
        problems.extend(trace_files(trace, target, sliced.whole if sliced else files, recipe))
    if sliced:
        spread_over_slices(trace)
    sides = make_compared_files(target, {file.number: file.file for file in files}, source)
    return TracedTarget(trace, files, problems, *sides)


def make_report(traced: TracedTarget, comparison: Comparison, *, is_sampled: bool) -> Report:
    """Makes the report of a target whose bytes were compared."""
    trace, files, problems = traced.trace, traced.files, [*traced.problems]
    problems.extend(check_differences(trace, comparison))
    tensors = [tensor for file in files for tensor in file.tensors]
    return Report(
        ranks=trace.folder.ranks,
        files=len(files),
        tensors=len(tensors),
        size=sum(tensor.size for tensor in tensors),
        compared=comparison.size + sum(tensor.size for tensor in trace.constants),
        is_sampled=is_sampled,
        problems=tuple(problems),
        inexact=comparison.inexact,
        is_whole=(trace.folder.is_whole or trace.folder.is_joint) and not trace.folder.is_sliced,
        subset=trace.source.subset,
        casts=count_cast_tensors(trace),
    )


def count_cast_tensors(trace: Provenance) -> dict[str, int]:
    """By cast: the number of tensors of the target that it makes, those of each rank counted, a fused tensor once."""
    made: dict[tuple[int, str], str] = {}
    casts = [(cast, list_parts(recast)) for (_, cast), recast in trace.casts.items()]
    for cast, parts in (*casts, *((DEQUANTIZE, whole.parts) for whole in trace.unpacked.values())):
        for rank, name, _ in list_target_tensors(parts):
            made.setdefault((rank, name), cast)
    counts = dict(Counter(made.values()))
    return {**counts, FILL: len(trace.constants)} if trace.constants else counts


def trace_files(trace: Provenance, target: AnyPath, files: Sequence[TargetHeader], recipe: Recipe) -> Iterator[Problem]:
    """Traces each tensor of the files to the source; yields problems of names, dtypes and shapes."""
    folder = trace.folder
    known = invert_recipe(recipe, trace.source, is_whole=folder.is_whole)
    rows = {} if folder.is_whole else find_source_rows(trace.source, recipe)
    wanted = find_expected_ranks(rows, recipe, folder.ranks)
    described = [] if folder.is_whole else files
    swapped = {**find_swapped_files(files, known, wanted), **find_described_files(described, folder)}
    yield from check_described_ranks(described, folder)
    yield from check_swapped_files(folder, swapped)
    files = [file for file in files if file.number not in swapped]
    fused = list_fused_tensors(trace.source, rows, recipe)
    trace.fused = name_parts(fused)
    constants, others = ({}, files) if folder.is_whole else take_constants(files, recipe)
    yield from check_repeated_tensors(files, fused) if folder.is_joint else ()
    fused_units, others = take_fused_tensors(others, fused, folder)
    found, others = take_nvfp4_tensors(trace, others)
    units, problems = pair_weights_with_scales(others, known, folder)
    probed = [*units, *(unit for one in fused_units for unit in one.list_units()[:1])]
    trace.is_power = has_power_of_two_scales(target, probed, trace)
    yield from (*found, *problems)
    for unit in units:
        yield from trace_unit(trace, unit)
    yield from trace_fused_units(trace, fused_units)
    looked_at = {folder.find_rank(file.number) for file in files}
    if folder.is_share:
        yield from check_share_files(target, files)
        yield from check_mixtures(trace)
        return
    yield from check_missing_tensors(trace, looked_at, wanted)
    yield from check_mixtures(trace)
    if not folder.is_whole:
        trace.constants.extend(one.tensor for several in constants.values() for one in several)
        has_optional = keeps_optional(trace, looked_at, wanted)
        expected = list_expected_constants(rows.values(), recipe, probed, has_optional=has_optional)
        yield from check_filled_constants(target, constants, expected, looked_at, recipe)
    if folder.is_whole or folder.is_joint:
        conversions = {conversion for found in trace.conversions.values() for conversion in found}
        yield from check_index_and_config(
            target, files, trace.source.config, conversions, recipe, is_power=trace.is_power
        )


def keeps_optional(trace: Provenance, looked_at: set[int], wanted: Mapping[str, ExpectedRanks]) -> bool:
    """Whether the ranks have the tensors that are left out unless asked for: all or none, and the majority decides."""
    optional = [name for name in wanted if wanted[name].optional and set(wanted[name].ranks) & looked_at]
    return 2 * sum(name in trace.present for name in optional) > len(optional)


def check_missing_tensors(
    trace: Provenance, looked_at: set[int], wanted: Mapping[str, ExpectedRanks]
) -> Iterator[Problem]:
    """Source tensors that one of the ranks `looked_at` lacks, or has though it should not. The parts of a fused tensor
    are one problem, by its name.
    """
    if trace.folder.is_whole:
        for name in trace.source.tensors:
            if not trace.present.get(name) and (name, 0) not in trace.used_scales:
                yield Problem("missing-tensor", name, "in none of these files", "in one of them", CONVERT_AGAIN_HINT)
        return
    is_kept = keeps_optional(trace, looked_at, wanted)
    told: set[str] = set()
    for name, (ranks, reason) in wanted.items():
        present, subject = trace.present.get(name, {}), trace.fused.get(name, name)
        if subject in told:
            continue
        if reason and not is_kept:
            for seen in present.values():
                told.add(subject)
                yield Problem(
                    "extra-tensor", trace.subject(seen), f"a part of {name}", f"none: {reason}", CONVERT_AGAIN_HINT
                )
            continue
        expected = sorted(rank for rank in set(ranks) & looked_at if (name, rank) not in trace.used_scales)
        found = sorted(rank for rank in present if (name, rank) not in trace.used_scales)
        if expected and not found:
            told.add(subject)
            where = "in none of these rank files", f"in ranks {expected}"
            where = ("in none of these files", "in one of them") if trace.folder.is_joint else where
            yield Problem("missing-tensor", subject, *where, CONVERT_AGAIN_HINT)
        elif expected != found:
            told.add(subject)
            where = f"in ranks {found}", f"in ranks {expected}"
            kind, where = ("extra-tensor", ("there", "none")) if trace.folder.is_joint else ("wrong-ranks", where)
            yield Problem(kind, subject, *where, CONVERT_AGAIN_HINT)
