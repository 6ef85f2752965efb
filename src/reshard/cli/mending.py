"""The commands that mend what `verify` has found: written out, so that they can be pasted into a shell."""

import argparse
import shlex
from collections.abc import Iterator, Sequence

from reshard.errors import Refused
from reshard.formats.part_manifests import format_join_command, is_of_whole_files, read_joined_manifest
from reshard.target.mending_hints import is_repairable
from reshard.text import escape, format_command_lines, format_runs
from reshard.verification.download import DownloadReport
from reshard.verification.verify import Report


def list_mending_commands(report: Report | DownloadReport, options: argparse.Namespace) -> Iterator[str]:
    """Lists the commands that mend what a report has found. They need the manifest; and the source, which stands there
    as SOURCE if it was not named.
    """
    kinds = {problem.kind for problem in report.problems}
    if isinstance(report, DownloadReport) or report.note or not kinds:
        return
    try:
        manifest = read_joined_manifest(options.target)
    except Refused:
        return
    if is_repairable(report, options.target, options.source):
        yield make_repair_command(options)
    if "missing-file" in kinds and manifest and not is_of_whole_files(manifest):
        entries = [entry for entry in manifest["files"] if options.ranks is None or entry["rank"] in options.ranks]
        here = [entry["rank"] for entry in entries if (options.target / entry["name"]).is_file()]
        if 0 < len(here) < len(entries):
            yield make_command("verify", options, ",".join(format_runs(here)))
    if "not-joined" in kinds:
        yield format_join_command(options.target, manifest)


def make_repair_command(options: argparse.Namespace) -> str:
    """Makes the command that repairs a target, with the options of the command that has found it damaged."""
    ranks = None if options.ranks is None else ",".join(format_runs(options.ranks))
    return make_command("repair", options, ranks, "SOURCE")


def make_command(name: str, options: argparse.Namespace, ranks: str | None, placeholder: str = "") -> str:
    """Makes a command for the same target, source and recipe."""
    source = placeholder if options.source is None else str(options.source)
    words = ["reshard", name, str(options.target), *(["--source", source] if source else [])]
    words += ["--recipe", options.recipe] if options.recipe else []
    words += ["--ranks", ranks] if ranks else []
    words += ["--ignore-extra-files"] if options.ignore_extra_files else []
    return shlex.join(words)


def describe_mending(commands: Sequence[str]) -> Iterator[str]:
    """Describes commands for a person, each below its title."""
    for command in commands:
        here = command.startswith("reshard verify ")
        source = "" if here or " SOURCE" not in command else " (SOURCE: what the target was made from)"
        title = "or, for the ranks that are here" if here else f"next{source}"
        yield from format_command_lines(title, escape(command))
