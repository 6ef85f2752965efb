"""Runs the command `verify` and prints its report."""

import argparse
from dataclasses import asdict
from pathlib import Path

from reshard import api
from reshard.cli.terminal import PROBLEMS, PROVEN, print_json, show_progress
from reshard.errors import describe
from reshard.formats.manifest import subset_lines
from reshard.formats.target_names import MANIFEST
from reshard.text import counted, printable
from reshard.verification.verify import Report


def run_verify(options: argparse.Namespace) -> int:
    """Runs `verify`. Returns the exit code. Raises Refused."""
    with show_progress("verify") as progress:
        report = api.verify(
            options.target,
            options.source,
            recipe=options.recipe,
            ranks=options.ranks,
            ignore_extra_files=options.ignore_extra_files,
            sample=options.sample,
            progress=progress,
        )
    return say_report(report, options.target, options.source or Path(MANIFEST), as_json=options.json)


def say_report(report: Report, target: Path, source: Path, *, as_json: bool) -> int:
    """Prints a report. Returns the exit code: PROBLEMS if there is a difference, else PROVEN."""
    sample = f"sampled: {report.compared:,} of {report.size:,} bytes"
    if as_json:
        proven = "sampled" if report.is_sampled else "proven"
        print_json({"status": "differs" if report.problems else proven, **asdict(report)})
    elif report.problems:
        print(f"{printable(str(target))}: {counted(len(report.problems), 'problems')}")
        if report.note:
            print(report.note)
        print(describe(report.problems))
        if report.is_sampled:
            print(sample)
    else:
        print(printable(f"{target}: {'sampled' if report.is_sampled else 'proven'} against {source}"))
        result = f"{sample}, no difference" if report.is_sampled else f"{report.size:,} bytes, all equal"
        files = (
            counted(report.files, "whole files") if report.is_whole else f"{report.files} of {report.ranks} rank files"
        )
        print(f"{files}, {counted(report.tensors, 'tensors')}, {result}")
        if report.inexact:
            print(f"rounded: {counted(report.inexact, 'values')} that the new dtype does not have, each to the nearest")
    for line in subset_lines(report.subset) if not as_json else ():
        print(printable(line))
    return PROBLEMS if report.problems else PROVEN
