"""Notes and problems that the manifests of a target add to the report of its verification against a source."""

from collections.abc import Sequence
from dataclasses import replace

from reshard.formats.manifest import read_valid_manifest
from reshard.formats.part_manifests import note_not_joined
from reshard.formats.target_names import MANIFEST
from reshard.paths import AnyPath
from reshard.types import File
from reshard.verification.checksums import check_manifest_side_files
from reshard.verification.report import Report


def add_side_files(report: Report, target: AnyPath) -> Report:
    """Adds to a report the side files, such as a tokenizer, that the manifest names and that are missing or changed."""
    told = [problem.subject for problem in report.problems]
    found = check_manifest_side_files(target, read_valid_manifest(target))
    added = [problem for problem in found if not any(name.startswith(problem.subject) for name in told)]
    return replace(report, problems=(*report.problems, *added))


def add_target_note(report: Report, target: AnyPath, source: AnyPath, files: Sequence[File]) -> Report:
    """Adds to a report that, where there are problems, the target was made from other files than these, by its
    manifest; where there are none, that its parts are not joined yet.
    """
    if not report.problems:
        return replace(report, note="; ".join(note.text for note in note_not_joined(target, str(source))))
    known = read_valid_manifest(target).get("source")
    given = [{"name": file.name, "size": file.size, "header_sha256": file.header_hash} for file in files]
    if known is None or known == given:
        return report
    return replace(report, note=f"{MANIFEST} says that this was made from another checkpoint than the --source")
