"""A verification whose bytes are compared by several processes, perhaps on several machines, each a share of them.

What is wrong with names, shapes and side files is found by one process, which makes the report; so it is the same.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from reshard.execution.ray_shares import RunShares, open_workers
from reshard.formats.manifest import read_valid_manifest
from reshard.formats.part_manifests import describe_share_files
from reshard.formats.remote_names import read_location, require_path
from reshard.formats.share_names import find_share_of_folder
from reshard.paths import AnyPath
from reshard.recipes.recipe import make_full_recipe
from reshard.sources.verified_source import read_sides
from reshard.target.verified_target import trace_sides, verify_against_source
from reshard.types import Advance, Progress, Share
from reshard.verification.checked_ranges import ChangedRanges, compare_files
from reshard.verification.checksums import CompareEntries, audit_target, find_audited_files
from reshard.verification.compare import Comparison
from reshard.verification.compared_files import open_compared_files
from reshard.verification.compared_shares import (
    compare_audited_share,
    compare_traced_share,
    identify_entries,
    identify_traced,
    merge_changed_ranges,
    merge_comparisons,
)
from reshard.verification.manifest_files import ManifestFile
from reshard.verification.report import Report
from reshard.verification.verify import Compare, TracedTarget, compare_traced


class VerifyJob(NamedTuple):
    """What to verify. Sent to other processes, all paths are full ones, or addresses."""

    target: str
    source: str
    """Empty without: then checksums are compared."""
    config: str
    """Empty without."""
    recipe: str | None
    ranks: tuple[int, ...] | None
    sample: Fraction | None
    ignore_extra_files: bool


def verify_job(
    job: VerifyJob,
    folder: AnyPath,
    source: AnyPath | None,
    config_folder: AnyPath | None,
    on: str | None,
    progress: Progress | None,
) -> Report:
    """Verifies a target: the bytes in this process, or on the workers that `on` names. Raises Refused."""
    compare = COMPARED_HERE if on is None else compare_in_shares(job, open_workers(on, progress))
    told = progress if on is None else None
    if source is None:
        return note_share(audit_target(folder, told, job.sample, job.ranks, compare.entries), folder)
    report = verify_against_source(
        folder,
        source,
        config_folder,
        job.recipe,
        job.ranks,
        job.sample,
        told,
        compare.traced,
        ignore_extra_files=job.ignore_extra_files,
    )
    return note_share(report, folder)


def note_share(report: Report, folder: AnyPath) -> Report:
    """Adds to a report without problems that its target is a share, and what this has: it is no whole model."""
    share, manifest = find_share_of_folder(folder), read_valid_manifest(folder)
    if not share or not manifest or report.problems:
        return report
    return replace(report, note=f"share {share} alone, which has {describe_share_files(manifest)}")


class Comparing(NamedTuple):
    """What compares the bytes of a verification."""

    entries: CompareEntries
    """With checksums."""
    traced: Compare
    """With the source."""


COMPARED_HERE = Comparing(compare_files, compare_traced)
"""By this process."""


def compare_in_shares(job: VerifyJob, run: RunShares) -> Comparing:
    """What compares in shares, by other processes."""
    sent = job._replace(recipe=make_full_recipe(job.recipe))

    def compare_entries(
        folder: AnyPath, entries: Sequence[ManifestFile], _: Progress | None, sample: Fraction | None
    ) -> tuple[ChangedRanges, int]:
        things = sum(len(entry.ranges) for entry in entries)
        found = run(compare_job_share, sent, identify_entries(folder, entries), things)
        return merge_changed_ranges(entries, found, sample)

    def compare(traced: TracedTarget, _: Advance, sample: Fraction | None) -> Comparison:
        with ExitStack() as stack:
            for side in (traced.source, traced.target):  # they are looked at again when all have ended
                open_compared_files(stack, side, is_random=False)
            found = run(compare_job_share, sent, identify_traced(traced), len(traced.things))
        return merge_comparisons(traced, found, sample)

    return Comparing(compare_entries, compare)


def compare_job_share(job: VerifyJob, share: Share, progress: Progress | None = None) -> Any:
    """Compares a share of the bytes, in a process of its own. Returns what was found, to be merged. Raises Refused."""
    folder = require_path(job.target)
    if not job.source:
        return compare_audited_share(find_audited_files(folder, job.ranks), share, job.sample, progress)
    sides = read_sides(
        folder,
        require_path(job.source),
        job.recipe,
        ignore_extra_files=job.ignore_extra_files,
        config_folder=read_location(job.config or None),
    )
    return compare_traced_share(trace_sides(sides, job.ranks), share, job.sample, progress)
