"""Runs the command `diff` and prints its tables."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from reshard import api
from reshard.cli.terminal import PROBLEMS, PROVEN, print_json, show_progress
from reshard.inspection.diff import DiffReport, ValueDifference
from reshard.text import printable, size_text, table

LONGEST_NAME = 100
"""Of a tensor in a table, in characters."""


def run_diff(options: argparse.Namespace) -> int:
    """Runs `diff`. Returns the exit code: PROVEN if both sides are equal. Raises Refused."""
    with show_progress("diff") as progress:
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
        print_json({"status": "same" if report.is_same else "differs", **asdict(report)})
    else:
        print("\n".join(map(printable, diff_lines(report, options.show))))
    return PROVEN if report.is_same else PROBLEMS


def diff_lines(report: DiffReport, most: int) -> Iterator[str]:
    """Describes a report: a summary, then a table of each kind of difference with at most `most` rows."""
    for side, path, recipe in zip("AB", (report.a, report.b), report.recipes, strict=True):
        yield f"{side}: {path}, {f'rank files by the recipe {recipe}' if recipe else 'by its own names'}"
    yield f"compared {report.compared:,} bytes of each ({size_text(report.compared)})"
    if report.dequantized:
        yield f"dequantized {report.dequantized:,} tensors"
    yield ""
    rows = [(kind, f"{count:,}") for kind, count in report.counts.items()]
    yield from table(("", "tensors"), rows).split("\n")
    heading = ("other values", "dtype", "elements", "differ", "max abs", "max rel", "NaN in A", "in B", "infinite")
    yield from listing(heading, [value_row(difference) for difference in report.values[:most]], len(report.values))
    kinds = [(short(kind.name), kind.a, kind.b) for kind in report.kinds[:most]]
    yield from listing(("other dtype or shape", "A", "B"), kinds, len(report.kinds))
    for side, names in (("A", report.only_a), ("B", report.only_b)):
        yield from listing((f"only in {side}",), [(short(name),) for name in names[:most]], len(names))


def listing(heading: Sequence[str], rows: Sequence[Sequence[str]], count: int) -> Iterator[str]:
    """Lists rows as a table, and the number of rows left out. `count` is the number of all rows; 0 gives no line."""
    if not count:
        return
    yield ""
    yield from table(heading, rows).split("\n")
    if count > len(rows):
        yield f"... and {count - len(rows):,} more; --json lists them all"


def value_row(difference: ValueDifference) -> Sequence[str]:
    """Formats one tensor with other values as a row of the table."""
    apart = difference.apart
    return (
        short(difference.name),
        difference.dtype,
        f"{difference.elements:,}",
        f"{apart.different:,}",
        number(apart.max_absolute),
        number(apart.max_relative),
        f"{apart.nans[0]:,}",
        f"{apart.nans[1]:,}",
        f"{apart.infinite:,}",
    )


def number(value: float | None) -> str:
    """Formats a number with three digits; `-` for None."""
    return "-" if value is None else f"{value:.3g}"


def short(name: str) -> str:
    """Shortens a name for a table cell, and escapes it here already: a line break would end the row."""
    text = printable(name)
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}... ({len(name):,} characters)"
