"""Runs the command `diff`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from reshard import api
from reshard.cli.outcome import PROBLEMS, PROVEN
from reshard.cli.painting import GREEN, RED, paint
from reshard.cli.progress import show_progress
from reshard.cli.terminal import print_json
from reshard.errors import Refused, require_none
from reshard.inspection.diff_groups import GroupDifference
from reshard.inspection.diff_report import DiffReport, ValueDifference, describe_verdict, format_share
from reshard.inspection.value_sums import OverallDistance, Unusual
from reshard.pages.diff_page import format_diff_page
from reshard.pages.page_file import check_page_path, describe_page_file, name_page, write_page
from reshard.planning.plan import describe_notes
from reshard.text import escape, format_count, format_size, format_table, shorten_name

MOST_GROUPS = 8
"""At most so many lines of a summary by layer or module: with all of it, a screen."""

RARE_COLUMNS = ("NaN in A", "NaN in B", "infinite")
"""Columns that are left out where all that is shown of them is 0. The rows with other numbers come first."""

VALUES_HEADING = ("other values", "dtype", "differ", "rel norm", "cosine", "rmse", "max abs", "max rel", *RARE_COLUMNS)

CODED = "*"
"""Behind a dtype whose elements are no numbers without their block scales."""


def run_diff(options: argparse.Namespace) -> int:
    """Runs `diff`. Returns the exit code: PROVEN if both sides are equal. Raises Refused."""
    require_none(check_page_path(options.html, (options.a, options.b, options.config)) if options.html else ())
    with show_progress("diff", options) as progress:
        report = api.diff(
            options.a,
            options.b,
            only=options.only,
            recipe=options.recipe,
            dequantize=options.dequantize,
            replicas=options.replicas,
            ignore_extra_files=options.ignore_extra_files,
            config=options.config,
            on=options.on,
            progress=progress,
        )
    try:
        if options.html:
            write_page(options.html, format_diff_page(report))
    except Refused:
        if not options.json:
            print_difference(report, options, None)  # it may be the work of hours
        raise
    print_difference(report, options, options.html)
    return PROVEN if report.is_same else PROBLEMS


def print_difference(report: DiffReport, options: argparse.Namespace, page: Path | None) -> None:
    """Prints a report as text or JSON, and where its page was written."""
    if options.json:
        print_json({**describe_diff_facts(report), **describe_page_file(page)})
    elif not (options.quiet and report.is_same):
        lines = [describe_verdict(report)] if options.quiet else describe_diff(report, options.show)
        text = "\n".join(map(escape, [*lines, *name_page(page)]))
        print(paint(text, GREEN if report.is_same else RED, sys.stdout))


def describe_diff_facts(report: DiffReport) -> dict[str, Any]:
    """Describes a report as JSON values, without the names of all tensors that are equal."""
    facts = asdict(replace(report, equal=()))
    del facts["equal"]
    notes = [note._asdict() for note in report.notes]
    return {"status": "same" if report.is_same else "differs", **facts, "notes": notes}


def describe_diff(report: DiffReport, most: int) -> Iterator[str]:
    """Describes a report: the verdict, a summary, then tables of the differences with at most `most` rows each."""
    yield describe_verdict(report)
    for side, path, recipe in zip("AB", (report.a, report.b), report.recipes, strict=True):
        yield f"{side}: {path}, {f'rank files by the recipe {recipe}' if recipe else 'by its own names'}"
    yield from describe_notes(report.notes)
    yield f"compared {report.compared:,} bytes of each ({format_size(report.compared)})"
    if report.dequantized:
        yield f"dequantized {format_count(report.dequantized, 'tensors')}"
    if report.rounded:
        yield f"rounded {format_count(report.rounded, 'tensors')} to BF16"
    yield ""
    counts = [(kind, f"{count:,}") for kind, count in report.counts.items()]
    yield from format_table(("", "tensors"), counts).split("\n")
    few = min(most, MOST_GROUPS)
    yield from list_groups("by layer", report.layers, report.different, few)
    yield from list_groups("by module, # is a number", report.modules, report.different, few)
    rows = [format_value_difference(found) for found in report.values[:most]]
    yield from list_rows(VALUES_HEADING, rows, len(report.values))
    if any(found.is_coded for found in report.values[:most]):
        yield f"{CODED} codes of block-scaled weights, as they are stored: not their numbers. In the tables above, too"
    kinds = [(shorten_name(kind.name), kind.a, kind.b) for kind in report.kinds[:most]]
    yield from list_rows(("other dtype or shape", "A", "B"), kinds, len(report.kinds))
    for side, names in (("A", report.only_a), ("B", report.only_b)):
        yield from list_rows((f"only in {side}",), [(shorten_name(name),) for name in names[:most]], len(names))


def list_groups(title: str, groups: Sequence[GroupDifference], different: int, most: int) -> Iterator[str]:
    """Lists the groups that differ as a table; nothing where it would be no shorter than a table of tensors."""
    differing = [group for group in groups if not group.is_same]
    if len(differing) >= different:
        return
    rows = [
        (
            shorten_name(group.name) or "in no layer",
            f"{group.tensors:,}",
            f"{group.different:,}",
            f"{group.unpaired:,}",
            *format_overall(group.overall),
            *format_unusual(group.unusual),
        )
        for group in differing[:most]
    ]
    heading = (title, "tensors", "other values", "unpaired", "rel norm", "cosine", "rmse", *RARE_COLUMNS)
    yield from list_rows(heading, rows, len(differing))
    if same := len(groups) - len(differing):
        yield f"{same:,} more without a difference"


def list_rows(heading: Sequence[str], rows: Sequence[Sequence[str]], count: int) -> Iterator[str]:
    """Lists rows as a table, and the number of rows left out. `count` is the number of all rows; 0 gives no line."""
    if not count:
        return
    shown = [n for n, name in enumerate(heading) if name not in RARE_COLUMNS or any(row[n] != "0" for row in rows)]
    yield ""
    yield from format_table([heading[n] for n in shown], [[row[n] for n in shown] for row in rows]).split("\n")
    if count > len(rows):
        yield f"... and {count - len(rows):,} more; --json lists them all"


def format_value_difference(difference: ValueDifference) -> Sequence[str]:
    """Formats one tensor with other values as a row of the table."""
    apart = difference.apart
    return (
        shorten_name(difference.name),
        difference.dtype + (CODED if difference.is_coded else ""),
        format_share(apart.different / difference.elements),
        *format_overall(difference.overall),
        format_number(apart.max_absolute),
        format_number(apart.max_relative),
        *format_unusual(apart.unusual),
    )


def format_unusual(unusual: Unusual) -> Sequence[str]:
    """Formats the numbers of NaNs and infinities as the cells of RARE_COLUMNS."""
    return tuple(f"{count:,}" for count in (*unusual.nans, unusual.infinite))


def format_overall(overall: OverallDistance) -> Sequence[str]:
    """Formats relative norm, cosine and root mean square error as three cells."""
    relative = "-" if overall.relative_norm is None else format_share(overall.relative_norm)
    cosine = "-" if overall.cosine is None else f"{overall.cosine:.6f}"
    return relative, cosine, format_number(overall.rmse)


def format_number(value: float | None) -> str:
    """Formats a number with three digits; `-` for None."""
    return "-" if value is None else f"{value:.3g}"
