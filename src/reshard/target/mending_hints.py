"""Rewords the hints of a verification to what mends its target: `reshard repair` where it can, or the right source."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from reshard.errors import Problem, Refused
from reshard.formats.part_manifests import read_joined_manifest
from reshard.paths import AnyPath
from reshard.target.repair_plan import has_sampled_bytes
from reshard.verification.report import Report
from reshard.verification.target_folder import (
    CONVERT_AGAIN_HINT,
    LOST_FILE_HINT,
    MISSING_FILE_HINT,
    PADDING,
    REPAIR_HINT,
    reword_for_store,
)

NOT_DAMAGE = {"contradiction", "extra-file", "extra-tensor", "not-joined", "wrong-value"}
"""Kinds of problems that no file written again would mend."""

OTHER_SOURCE_HINT = "give the --source that this was made from; or without --source the checksums are verified"

WRONG_PADDING_HINT = (
    "the source is damaged here, not the target: nothing reads it; make the rank files again from the whole checkpoint"
)


def reword_hints(report: Report, target: AnyPath, source: AnyPath, compared: AnyPath) -> Report:
    """Rewords the hints of a report by the manifest of its target: if it was made from another source, the files may be
    sound; else a repair writes them again. Without a manifest they stay as they are.
    `compared` is the folder that the report is of: that of the source, if it has the rank files.
    """
    if compared != target:
        report = replace(report, problems=tuple(map(reword_padding, report.problems)))
    manifest = read_manifest_for_repair(target) if report.problems else {}
    if not manifest:
        return report
    if report.note or not has_sampled_bytes(source, manifest):
        mended = [
            problem if problem.kind in ("missing-file", "wrong-value") else replace(problem, remedy=OTHER_SOURCE_HINT)
            for problem in report.problems
        ]
    else:
        mended = [
            replace(problem, remedy=replace_hints(problem.remedy)) if is_damage(problem) else problem
            for problem in report.problems
        ]
    return replace(report, problems=tuple(reword_for_store(target, mended)))


def reword_padding(problem: Problem) -> Problem:
    """Says of padding in rank files that are the source that no mending of the target changes it."""
    if not problem.expected.startswith(PADDING):
        return problem
    return replace(problem, kind="wrong-value", remedy=WRONG_PADDING_HINT)


def replace_hints(remedy: str) -> str:
    """Replaces the hints to convert again by those to repair."""
    return remedy.replace(CONVERT_AGAIN_HINT, REPAIR_HINT).replace(MISSING_FILE_HINT, LOST_FILE_HINT)


def is_damage(problem: Problem) -> bool:
    """Whether a file that is written again mends a problem, if the source is the right one."""
    return problem.kind not in NOT_DAMAGE


def is_repairable(report: Report, manifest: Mapping[str, Any], source: AnyPath | None) -> bool:
    """Whether `repair` mends what a report has found; not if the target was made from another source."""
    if report.note or not any(map(is_damage, report.problems)):
        return False
    return source is None or has_sampled_bytes(source, manifest)


def read_manifest_for_repair(target: AnyPath) -> dict[str, Any]:
    """The manifest of a target; empty if there is none, or none that can be read."""
    try:
        return read_joined_manifest(target)
    except Refused:
        return {}
