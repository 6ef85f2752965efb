"""The commands that mend what `verify` has found: written out, so that they can be pasted into a shell."""

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reshard.errors import Problem
from reshard.formats.part_manifests import format_join_command, is_of_slices, is_of_whole_files
from reshard.formats.remote_names import read_location, restore_address
from reshard.target.mending_hints import is_damage, is_repairable, read_manifest_for_repair
from reshard.text import escape, format_command_lines, format_count, format_runs, format_size
from reshard.verification.download import DownloadReport
from reshard.verification.report import Report

FOR_THESE = "next, for the ranks that are here"


class MendingStep(NamedTuple):
    """A command that mends a target, or proves the part of it that is here."""

    label: str
    command: str
    comment: str = ""
    """For a person, behind the command: what it writes."""


WITHOUT_SOURCE = {"source": None, "recipe": None, "config": None, "ignore_extra_files": False}
"""The options of a verification by the manifest."""


def list_mending_steps(report: Report | DownloadReport, options: argparse.Namespace) -> Iterator[MendingStep]:
    """Lists what to do about that which a report has found. It needs the manifest; and the source, which stands there
    as SOURCE if it was not named.

    Where only some ranks lie, the others are rightly elsewhere: first stands what concerns the ranks that are here.
    """
    if isinstance(report, DownloadReport) or report.note or not report.problems:
        return
    if manifest := read_manifest_for_repair(Path(options.target)):
        can_repair = is_repairable(report, manifest, read_location(options.source))
        yield from list_repair_steps(report.problems, manifest, options, can_repair=can_repair)
        if any(problem.kind == "not-joined" for problem in report.problems):
            yield MendingStep("next", format_join_command(options.target, manifest))


def list_repair_steps(
    problems: Sequence[Problem], manifest: Mapping[str, Any], options: argparse.Namespace, *, can_repair: bool
) -> Iterator[MendingStep]:
    """Lists how damaged and missing files are written again, and how the ranks that are here are verified."""
    chosen = [entry for entry in manifest["files"] if options.ranks is None or entry.get("rank") in options.ranks]
    here = [entry for entry in chosen if (options.target / entry["name"]).is_file()]
    named = {problem.subject.partition(":")[0] for problem in problems if is_damage(problem)}
    damaged = [entry["name"] for entry in here if entry["name"] in named]
    damaged += [entry["name"] for entry in manifest["side_files"] if entry["name"] in named]
    label = "next"
    if 0 < len(here) < len(chosen) and not is_of_whole_files(manifest):
        ranks = ",".join(format_runs(entry["rank"] for entry in here))
        label = "or, for all ranks"
        if not damaged:
            # Only all slices are what the source has: those of some ranks are held against the manifest.
            asked = argparse.Namespace(**{**vars(options), **WITHOUT_SOURCE}) if is_of_slices(manifest) else options
            yield MendingStep(FOR_THESE, make_command("verify", asked, ranks))
        elif can_repair:
            yield make_repair_step(options, manifest, damaged, FOR_THESE, ranks)
    if can_repair and any(map(is_damage, problems)):
        damaged += [entry["name"] for entry in chosen if entry not in here]
        yield make_repair_step(options, manifest, damaged, label)


def make_repair_step(
    options: argparse.Namespace, manifest: Mapping[str, Any], names: Sequence[str], label: str = "next", ranks: str = ""
) -> MendingStep:
    """Makes the command that repairs a target, with the options of the command that has found it damaged, and says how
    much it writes. `names` are those of the damaged and missing files.
    """
    if options.ranks is not None and not ranks:
        ranks = ",".join(format_runs(options.ranks))
    entries = {entry["name"]: entry["size"] for key in ("files", "side_files") for entry in manifest[key]}
    size = format_size(sum(entries.get(name, 0) for name in names))
    comment = f"writes {format_count(len(names), 'files')}, {size}" if names else ""
    title = label if options.source else f"{label} (SOURCE: what the target was made from)"
    return MendingStep(title, make_command("repair", options, ranks, "SOURCE"), comment)


def make_command(name: str, options: argparse.Namespace, ranks: str | None, placeholder: str = "") -> str:
    """Makes a command for the same target, source and recipe."""
    source = placeholder if options.source is None else restore_address(options.source)
    words = ["reshard", name, str(options.target), *(["--source", source] if source else [])]
    words += ["--recipe", options.recipe] if options.recipe else []
    words += ["--ranks", ranks] if ranks else []
    words += ["--config", restore_address(options.config)] if options.config else []
    words += ["--ignore-extra-files"] if options.ignore_extra_files else []
    return shlex.join(words)


def describe_mending(steps: Sequence[MendingStep]) -> Iterator[str]:
    """Describes commands for a person, each below its title. What stands behind # is a comment for a shell too."""
    for step in steps:
        comment = f"  # {step.comment}" if step.comment else ""
        yield from format_command_lines(step.label, escape(step.command) + comment)
