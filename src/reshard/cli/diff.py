"""Runs the command `diff`."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from reshard import api
from reshard.cli.progress import show_progress
from reshard.cli.terminal import PROBLEMS, PROVEN, print_json
from reshard.inspection.diff import DiffReport, ValueDifference
from reshard.text import escape, format_size, format_table

LONGEST_NAME = 100
"""Of a tensor in a table, in characters."""


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
        print("\n".join(map(escape, describe_diff(report, options.show))))
    return PROVEN if report.is_same else PROBLEMS


def describe_diff(report: DiffReport, most: int) -> Iterator[str]:
    """Describes a report: a summary, then a table of each kind of difference with at most `most` rows."""
    for side, path, recipe in zip("AB", (report.a, report.b), report.recipes, strict=True):
        yield f"{side}: {path}, {f'rank files by the recipe {recipe}' if recipe else 'by its own names'}"
    yield f"compared {report.compared:,} bytes of each ({format_size(report.compared)})"
    if report.dequantized:
        yield f"dequantized {report.dequantized:,} tensors"
    yield from (f"note: {note.text}" for note in report.notes)
    yield ""
    rows = [(kind, f"{count:,}") for kind, count in report.counts.items()]
    yield from format_table(("", "tensors"), rows).split("\n")
    heading = ("other values", "dtype", "elements", "differ", "max abs", "max rel", "NaN in A", "in B", "infinite")
    yield from list_rows(
        heading, [format_value_difference(difference) for difference in report.values[:most]], len(report.values)
    )
    kinds = [(shorten_name(kind.name), kind.a, kind.b) for kind in report.kinds[:most]]
    yield from list_rows(("other dtype or shape", "A", "B"), kinds, len(report.kinds))
    for side, names in (("A", report.only_a), ("B", report.only_b)):
        yield from list_rows((f"only in {side}",), [(shorten_name(name),) for name in names[:most]], len(names))


def list_rows(heading: Sequence[str], rows: Sequence[Sequence[str]], count: int) -> Iterator[str]:
    """Lists rows as a table, and the number of rows left out. `count` is the number of all rows; 0 gives no line."""
    if not count:
        return
    yield ""
    yield from format_table(heading, rows).split("\n")
    if count > len(rows):
        yield f"... and {count - len(rows):,} more; --json lists them all"


def format_value_difference(difference: ValueDifference) -> Sequence[str]:
    """Formats one tensor with other values as a row of the table."""
    apart = difference.apart
    return (
        shorten_name(difference.name),
        difference.dtype,
        f"{difference.elements:,}",
        f"{apart.different:,}",
        format_number(apart.max_absolute),
        format_number(apart.max_relative),
        f"{apart.nans[0]:,}",
        f"{apart.nans[1]:,}",
        f"{apart.infinite:,}",
    )


def format_number(value: float | None) -> str:
    """Formats a number with three digits; `-` for None."""
    return "-" if value is None else f"{value:.3g}"


def shorten_name(name: str) -> str:
    """Shortens a name for a table cell, and escapes it here already: a line break would end the row."""
    text = escape(name)
    return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}... ({len(name):,} characters)"
