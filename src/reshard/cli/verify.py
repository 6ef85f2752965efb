"""Runs the command `verify`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from reshard import api
from reshard.cli.mending import MendingStep, describe_mending, list_mending_steps
from reshard.cli.outcome import PROBLEMS, PROVEN
from reshard.cli.painting import GREEN, RED, paint
from reshard.cli.progress import show_progress
from reshard.cli.terminal import print_json
from reshard.formats.remote_names import restore_address
from reshard.formats.target_names import MANIFEST
from reshard.verification.download import DownloadReport, describe_download
from reshard.verification.report import Report, describe_report


def run_verify(options: argparse.Namespace) -> int:
    """Runs `verify`. Returns the exit code. Raises Refused."""
    with show_progress("verify", options) as progress:
        report = api.verify(
            options.target,
            options.source,
            recipe=options.recipe,
            ranks=options.ranks,
            ignore_extra_files=options.ignore_extra_files,
            config=options.config,
            sample=options.sample,
            download=options.download,
            sums=options.sums,
            checksums_only=options.checksums_only,
            on=options.on,
            progress=progress,
        )
    if options.quiet and not options.json and not report.problems:
        return PROVEN
    steps = [*list_mending_steps(report, options)]
    source = restore_address(options.source or Path(MANIFEST))
    return print_report(report, options.target, source, steps, as_json=options.json)


def print_report(
    report: Report | DownloadReport, target: Path, source: str, steps: Sequence[MendingStep] = (), *, as_json: bool
) -> int:
    """Prints what was compared, and commands that mend what was found; the exit code says whether there was a
    difference.
    """
    if isinstance(report, DownloadReport):
        print_download_report(report, target, as_json=as_json)
    elif as_json:
        print_json(
            {
                "status": "differs" if report.problems else report.verdict,
                **asdict(report),
                "next": [step.command for step in steps],
            }
        )
    else:
        print_verdict("\n".join([describe_report(report, source), *describe_mending(steps)]), report)
    return PROBLEMS if report.problems else PROVEN


def print_download_report(report: DownloadReport, target: Path, *, as_json: bool) -> None:
    """Prints the result of checking a download."""
    if as_json:
        notes = [note._asdict() for note in report.notes]
        print_json({"status": "differs" if report.problems else "proven", **asdict(report), "notes": notes})
    else:
        print_verdict(describe_download(report, target), report)


def print_verdict(text: str, report: Report | DownloadReport) -> None:
    """Prints the text of a report, on a terminal with its first line in colour: red, green, or none for a sample."""
    if report.problems:
        text = paint(text, RED, sys.stdout)
    elif isinstance(report, DownloadReport) or report.is_proven:
        text = paint(text, GREEN, sys.stdout)
    print(text)
