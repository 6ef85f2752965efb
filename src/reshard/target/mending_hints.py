"""Rewords the hints of a verification to what mends its target: `reshard repair` where it can, or the right source."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from reshard.errors import Refused
from reshard.formats.part_manifests import read_joined_manifest
from reshard.target.repair_plan import has_sampled_bytes
from reshard.verification.target_folder import CONVERT_AGAIN_HINT, LOST_FILE_HINT, MISSING_FILE_HINT, REPAIR_HINT
from reshard.verification.verify import Report

NOT_DAMAGE = {"contradiction", "extra-file", "extra-tensor", "not-joined"}
"""Kinds of problems that no file written again would mend."""

OTHER_SOURCE_HINT = "give the --source that this was made from; or without --source the checksums are verified"


def reword_hints(report: Report, target: Path, source: Path) -> Report:
    """Rewords the hints of a report by the manifest of its target: if it was made from another source, the files may be
    sound; else a repair writes them again. Without a manifest they stay as they are.
    """
    manifest = read_manifest_for_repair(target) if report.problems else {}
    if not manifest:
        return report
    if is_repairable(report, target, source):
        words = {CONVERT_AGAIN_HINT: REPAIR_HINT, MISSING_FILE_HINT: LOST_FILE_HINT}
        mended = [*report.problems]
        for before, after in words.items():
            mended = [replace(problem, remedy=problem.remedy.replace(before, after)) for problem in mended]
    elif report.note or not has_sampled_bytes(source, manifest):
        mended = [
            problem if problem.kind == "missing-file" else replace(problem, remedy=OTHER_SOURCE_HINT)
            for problem in report.problems
        ]
    else:
        return report
    return replace(report, problems=tuple(mended))


def is_repairable(report: Report, target: Path, source: Path | None) -> bool:
    """Whether `repair` mends what a report has found; not if the target was made from another source."""
    kinds = {problem.kind for problem in report.problems}
    if report.note or not kinds - NOT_DAMAGE:
        return False
    manifest = read_manifest_for_repair(target)
    return bool(manifest) and (source is None or has_sampled_bytes(source, manifest))


def read_manifest_for_repair(target: Path) -> dict[str, Any]:
    """The manifest of a target; empty if there is none, or none that can be read."""
    try:
        return read_joined_manifest(target)
    except Refused:
        return {}
