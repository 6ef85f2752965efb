"""Runs the command `diff`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from reshard import api
from reshard.cli.outcome import PROBLEMS, PROVEN
from reshard.cli.painting import GREEN, RED, paint
from reshard.cli.progress import show_progress
from reshard.cli.terminal import print_json
from reshard.inspection.diff import DiffReport, ValueDifference
from reshard.inspection.diff_groups import GroupDifference
from reshard.inspection.value_sums import OverallDistance
from reshard.planning.plan import describe_notes
from reshard.text import escape, format_count, format_size, format_table, shorten_name

MOST_GROUPS = 8
"""At most so many lines of a summary by layer or module: with all of it, a screen."""

VALUES_HEADING = (
    *("other values", "dtype", "differ", "rel norm", "cosine", "rmse", "max abs", "max rel"),
    *("NaN in A", "NaN in B", "infinite"),
)

RARE_COLUMNS = VALUES_HEADING[-3:]
"""Columns that are left out where all that is shown of them is 0. The rows with other numbers come first."""


def run_diff(options: argparse.Namespace) -> int:
    """Runs `diff`. Returns the exit code: PROVEN if both sides are equal. Raises Refused."""
    with show_progress("diff", options) as progress:
        report = api.diff(
            options.a,
            options.b,
            only=options.only,
            recipe=options.recipe,
            dequantize=options.dequantize,
            replicas=options.replicas,
            ignore_extra_files=options.ignore_extra_files,
            progress=progress,
        )
    if options.json:
        notes = [note._asdict() for note in report.notes]
        print_json({"status": "same" if report.is_same else "differs", **asdict(report), "notes": notes})
    elif not (options.quiet and report.is_same):
        text = "\n".join(map(escape, describe_diff(report, options.show)))
        print(paint(text, GREEN if report.is_same else RED, sys.stdout))
    return PROVEN if report.is_same else PROBLEMS


def describe_diff(report: DiffReport, most: int) -> Iterator[str]:
    """Describes a report: the verdict, a summary, then tables of the differences with at most `most` rows each."""
    yield describe_verdict(report)
    for side, path, recipe in zip("AB", (report.a, report.b), report.recipes, strict=True):
        yield f"{side}: {path}, {f'rank files by the recipe {recipe}' if recipe else 'by its own names'}"
    yield from describe_notes(report.notes)
    yield f"compared {report.compared:,} bytes of each ({format_size(report.compared)})"
    if report.dequantized:
        yield f"dequantized {report.dequantized:,} tensors"
    yield ""
    counts = [(kind, f"{count:,}") for kind, count in report.counts.items()]
    yield from format_table(("", "tensors"), counts).split("\n")
    few = min(most, MOST_GROUPS)
    yield from list_groups("by layer", report.layers, report.different, few)
    yield from list_groups("by module, # is a number", report.modules, report.different, few)
    rows = [format_value_difference(found) for found in report.values[:most]]
    yield from list_rows(VALUES_HEADING, rows, len(report.values))
    kinds = [(shorten_name(kind.name), kind.a, kind.b) for kind in report.kinds[:most]]
    yield from list_rows(("other dtype or shape", "A", "B"), kinds, len(report.kinds))
    for side, names in (("A", report.only_a), ("B", report.only_b)):
        yield from list_rows((f"only in {side}",), [(shorten_name(name),) for name in names[:most]], len(names))


def describe_verdict(report: DiffReport) -> str:
    """Describes a report in one line."""
    if report.is_same:
        return f"same: {format_count(report.same, 'tensors')}, equal bit by bit"
    total = report.same + report.different
    verb = "differs" if report.different == 1 else "differ"
    text = f"different: {report.different:,} of {format_count(total, 'tensors')} {verb}"
    if worst := report.worst:
        share = format_share(worst.overall.relative_norm or 0)
        text += f"; the largest relative norm of a difference is {share} in {shorten_name(worst.name)}"
    return text


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
        )
        for group in differing[:most]
    ]
    heading = (title, "tensors", "other values", "unpaired", "rel norm", "cosine", "rmse")
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
        difference.dtype,
        format_share(apart.different / difference.elements),
        *format_overall(difference.overall),
        format_number(apart.max_absolute),
        format_number(apart.max_relative),
        f"{apart.nans[0]:,}",
        f"{apart.nans[1]:,}",
        f"{apart.infinite:,}",
    )


def format_overall(overall: OverallDistance) -> Sequence[str]:
    """Formats relative norm, cosine and root mean square error as three cells."""
    relative = "-" if overall.relative_norm is None else format_share(overall.relative_norm)
    cosine = "-" if overall.cosine is None else f"{overall.cosine:.6f}"
    return relative, cosine, format_number(overall.rmse)


def format_share(share: float) -> str:
    """Formats a share as a percentage with two digits or more: `0.31 %`, `150 %`, `3e-06 %`."""
    return f"{100 * share:.3g} %" if share < 10 else f"{100 * share:.0f} %" if share < 1e4 else f"{share:.3g} times"


def format_number(value: float | None) -> str:
    """Formats a number with three digits; `-` for None."""
    return "-" if value is None else f"{value:.3g}"
