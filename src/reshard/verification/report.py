"""The report of a verification, its verdict and its text for a person. Knows nothing of files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reshard.errors import Problem, describe_problems
from reshard.formats.manifest import list_subset_lines
from reshard.text import escape, format_count
from reshard.verification.expected import CONVERSION_TEXTS, FILL


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


def describe_cast(cast: str) -> str:
    """Describes a cast of `Report.casts` for a person."""
    power = ", with powers of two as scales" if cast.endswith("-ue8m0") else ""
    return CONVERSION_TEXTS[cast.removesuffix("-ue8m0")] + power
