"""Verifies a target against its source: re-reads both and compares every byte. Shares no code with the planner.

The planner goes from source names to target names and computes byte offsets. `verify` goes the other way. It takes
each tensor of the target and finds its source name with the inverted recipe. It infers from dtype and shape whether the
bytes were kept, cast or padded. It computes the box (rows, columns) of the source tensor, or of its cast, that the rank
should hold, and compares every byte of this box.

Replicas are compared with the source in every rank: if nothing differs, they are equal.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from reshard.errors import Problem, describe_problems, refuse
from reshard.formats.manifest import list_subset_lines
from reshard.paths import AnyPath, is_same_folder
from reshard.recipe_types import Recipe
from reshard.text import escape, format_count
from reshard.types import Advance, Checkpoint
from reshard.verification.chunks import CastWeight, KeptTensor
from reshard.verification.compare import Comparison, compare_parts
from reshard.verification.compared_files import make_compared_files
from reshard.verification.constants import check_filled_constants, list_expected_constants, take_constants
from reshard.verification.differences import check_differences, list_target_tensors
from reshard.verification.expected import (
    CONVERSION_TEXTS,
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
from reshard.verification.power_scales import has_power_of_two_scales
from reshard.verification.provenance import (
    Provenance,
    check_mixtures,
    pair_weights_with_scales,
    spread_over_slices,
    trace_unit,
)
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
    check_index_and_config,
    choose_files,
    list_target_files,
    read_target_headers,
)


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """The result of verifying a target: how much was compared, and every difference."""

    ranks: int
    """The number of ranks that the target is split for; 1 for whole files."""
    files: int
    """The number of tensor files that were compared."""
    tensors: int
    size: int
    """The bytes of the target; with a source, without headers."""
    compared: int
    """The bytes that were compared: all of `size`, or those of a sample."""
    is_sampled: bool
    """Whether only a sample was compared."""
    problems: tuple[Problem, ...]
    inexact: int = 0
    """The number of FP4 values that were rounded, because FP8 has no equal value under the scale of their block."""
    is_whole: bool = False
    """Whether the target has whole files, not rank files."""
    subset: Mapping[str, Any] = field(default_factory=dict)
    """The part of a larger checkpoint that the target holds, as in the manifest; empty if it is no subset."""
    note: str = ""
    """A possible explanation of the problems; without any, that parts are not joined yet."""
    casts: Mapping[str, int] = field(default_factory=dict)
    """By cast, such as `dequantize`: the number of tensors, weights and new scales, that were compared with what it
    makes of the source; `fill`: the constants of the recipe. All others were compared with the source itself."""
    target: str = ""
    """Where the target lies; on the hub with its commit."""
    is_unread: bool = False
    """Whether nothing was read: the sizes and ETags that a store lists were compared with those of the upload."""

    @property
    def is_proven(self) -> bool:
        """Whether every byte was compared and none differs. A sample proves nothing of the bytes between; ETags nothing
        but that nobody has uploaded anything else.
        """
        return not (self.problems or self.is_sampled or self.is_unread)

    @property
    def verdict(self) -> str:
        """`proven`, `sampled`, `unchanged`, or the number of problems."""
        if self.problems:
            return format_count(len(self.problems), "problems")
        if self.is_unread:
            return "unchanged"
        return "sampled" if self.is_sampled else "proven"

    def __str__(self) -> str:
        text = "\n".join([self.verdict, *format_report_lines(self)])
        return text.replace("the --source", "the source")

    __repr__ = __str__


def describe_report(report: Report, source: Path | str) -> str:
    """The text of a report for a person; `source` is the checkpoint or the manifest that it was compared with."""
    against = f" against {source}" if not (report.problems or report.is_unread) else ""
    return "\n".join([escape(f"{report.target}: {report.verdict}{against}"), *format_report_lines(report)])


def format_report_lines(report: Report) -> Iterator[str]:
    """The lines below the verdict: the problems, or how much was compared."""
    sample = f"sampled: {report.compared:,} of {report.size:,} bytes"
    if report.problems:
        yield from [report.note] if report.note else []
        yield describe_problems(report.problems)
        yield from [sample] if report.is_sampled else []
        yield from ["compared sizes and ETags; not read"] if report.is_unread else []
    else:
        result = f"{sample}, no difference" if report.is_sampled else f"{report.size:,} bytes"
        result += "" if report.is_sampled or report.casts else ", all equal"
        result = f"{report.size:,} bytes by their sizes and ETags; not read" if report.is_unread else result
        ranks = f"{report.files} of {report.ranks} rank files"
        files = format_count(report.files, "whole files") if report.is_whole else ranks
        yield f"{files}, {format_count(report.tensors, 'tensors')}, {result}"
        if report.casts:
            equal = report.tensors - sum(report.casts.values())
            yield f"{format_count(equal, 'tensors')} equal to the source"
            counted = ", counted in each rank file" if report.ranks > 1 else ""
            for cast, count in report.casts.items():
                said = "as the recipe says" if cast == FILL else "as the cast should give"
                yield f"{format_count(count, 'tensors')} {said}: {describe_cast(cast)}{counted}"
        if report.inexact:
            values = format_count(report.inexact, "values")
            yield f"rounded: {values} that the new dtype does not have, each to the nearest"
        yield from [escape(f"note: {report.note}")] if report.note else []
    yield from map(escape, list_subset_lines(report.subset))


def verify_target(
    target: AnyPath,
    source: Checkpoint,
    recipe: Recipe,
    advance: Advance = lambda _: None,
    ranks: Collection[int] | None = None,
    sample: Fraction | None = None,
    *,
    stacked: StackedSource | None = None,
    ignore_extra_files: bool = False,
) -> Report:
    """Compares every byte of every tensor file in the folder `target`, or of the `ranks` given, with the source.

    With a `sample`, a fraction such as 1/100, only about that share of the bytes is compared: blocks spread evenly over
    every tensor, and always both ends of each tensor of each rank file. Names, dtypes and shapes are checked in full.

    Every difference is a problem of the report. Of a source with stacked experts (`stacked`) it is also proven from
    where its tensors are read. Raises Refused if there is nothing to compare, or if a file cannot be
    read or changes meanwhile.
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
    numbered = {file.number: file.file for file in files}
    advance(sum(file.header_size for file in numbered.values()))
    trace = Provenance(source, folder, PaddedDimensions(recipe, source.config or {}, {}))
    problems.extend(check_stacked_source(stacked) if stacked else ())
    if sliced:
        trace.slices = sliced.slices
        trace.folder = folder._replace(names={**folder.names, folder.ranks: ALL_SLICES})
    if not (sliced and sliced.problems):  # else nearly every tensor would differ
        problems.extend(trace_target(trace, target, sliced.whole if sliced else files, recipe))
    if sliced:
        spread_over_slices(trace)
    things: list[KeptTensor | CastWeight] = [*trace.kept.values(), *trace.casts.values()]
    comparison = compare_parts(things, *make_compared_files(target, numbered, source), advance, sample)
    if trace.constants:
        advance(sum(tensor.size for tensor in trace.constants))
    problems.extend(check_differences(trace, comparison))
    return make_report(trace, files, comparison, problems, is_sampled=sample is not None)


def make_report(
    trace: Provenance,
    files: Sequence[TargetHeader],
    comparison: Comparison,
    problems: Sequence[Problem],
    *,
    is_sampled: bool,
) -> Report:
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
    for (_, cast), recast in trace.casts.items():
        for rank, name, _ in list_target_tensors((*recast.parts[0], *recast.parts[1])):
            made.setdefault((rank, name), cast)
    counts = dict(Counter(made.values()))
    return {**counts, FILL: len(trace.constants)} if trace.constants else counts


def describe_cast(cast: str) -> str:
    """Describes a cast of `Report.casts` for a person."""
    power = ", with powers of two as scales" if cast.endswith("-ue8m0") else ""
    return CONVERSION_TEXTS[cast.removesuffix("-ue8m0")] + power


def trace_target(
    trace: Provenance, target: AnyPath, files: Sequence[TargetHeader], recipe: Recipe
) -> Iterator[Problem]:
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
    units, problems = pair_weights_with_scales(others, known, folder)
    probed = [*units, *(unit for one in fused_units for unit in one.list_units()[:1])]
    trace.is_power = has_power_of_two_scales(target, probed, trace)
    yield from problems
    for unit in units:
        yield from trace_unit(trace, unit)
    yield from trace_fused_units(trace, fused_units)
    looked_at = {folder.find_rank(file.number) for file in files}
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
