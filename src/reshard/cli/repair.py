"""Runs the command `repair`."""

import argparse
import sys
from dataclasses import asdict
from itertools import count
from typing import Any

from reshard.cli.mending import describe_mending, make_repair_step
from reshard.cli.outcome import PROBLEMS, PROVEN
from reshard.cli.painting import GREEN, RED, paint
from reshard.cli.progress import show_progress
from reshard.cli.terminal import print_json
from reshard.execution.execute import Settings
from reshard.formats.part_manifests import read_joined_manifest
from reshard.formats.remote_names import read_location, require_target
from reshard.target.repair import RepairOptions, RepairReport, describe_repair, repair_target


def run_repair(options: argparse.Namespace) -> int:
    """Runs `repair`. Returns the exit code. Raises Refused."""
    choice = RepairOptions(
        read_location(options.source),
        options.recipe,
        options.ranks,
        options.ignore_extra_files,
        read_location(options.config),
        dry_run=options.dry_run,
    )
    settings = Settings(options.jobs, allow_inexact=True)
    target, steps_seen = require_target(options.target, is_written=False), count()
    report = repair_target(
        target, choice, settings, lambda title: show_progress(title, options, is_first=not next(steps_seen))
    )
    steps = []
    if report.damaged and options.dry_run:
        steps = [make_repair_step(options, read_joined_manifest(target), report.damaged)]
    if options.json:
        print_json({**describe_repair_facts(report), "next": [step.command for step in steps]})
    elif report.problems or not options.quiet:
        text = "\n".join([*describe_repair(report), *describe_mending(steps)])
        print(paint(text, RED if report.problems else GREEN, sys.stdout))
    return PROBLEMS if report.problems else PROVEN


def describe_repair_facts(report: RepairReport) -> dict[str, Any]:
    """Describes the result of a repair as JSON values."""
    status = "differs" if report.problems else "repaired" if report.repaired else "proven"
    notes = [note._asdict() for note in report.notes]
    return {"status": status, **asdict(report), "target": str(report.target), "notes": notes}
