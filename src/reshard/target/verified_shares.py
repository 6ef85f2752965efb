"""A verification whose bytes are compared by several processes, perhaps on several machines, each a share of them.

What is found of names, shapes and side files is found here, as in a verification by one process; so both reports are
the same.
"""

from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

from reshard.execution.workers import Workers, run_shares
from reshard.formats.remote_names import read_location, require_path
from reshard.paths import AnyPath
from reshard.sources.verified_source import read_sides
from reshard.target.verified_target import trace_sides, verify_against_source
from reshard.types import Advance, Progress, Share
from reshard.verification.checked_ranges import ChangedRanges
from reshard.verification.checksums import audit_target, find_audited_files
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
from reshard.verification.verify import TracedTarget


class VerifyJob(NamedTuple):
    """What to verify, as it is sent to other processes: all paths are full ones, or addresses."""

    target: str
    source: str | None
    recipe: str | None
    config: str | None
    ranks: tuple[int, ...] | None
    sample: Fraction | None
    ignore_extra_files: bool


def verify_in_shares(job: VerifyJob, folder: AnyPath, source: AnyPath | None, workers: Workers) -> Report:
    """Verifies a target, the bytes in shares. Raises Refused."""
    if source is None:
        compare = partial(compare_entries_in_shares, job, workers)
        return audit_target(folder, None, job.sample, job.ranks, compare)
    return verify_against_source(
        folder,
        source,
        read_location(job.config),
        job.recipe,
        job.ranks,
        job.sample,
        None,
        ignore_extra_files=job.ignore_extra_files,
        compare=partial(compare_traced_in_shares, job, workers),
    )


def compare_traced_in_shares(
    job: VerifyJob, workers: Workers, traced: TracedTarget, _: Advance, __: Fraction | None
) -> Comparison:
    """Compares a target with its source. Raises Refused, also if a file changes meanwhile."""
    with ExitStack() as stack:
        for side in (traced.source, traced.target):  # they are looked at again when all have ended
            open_compared_files(stack, side, is_random=False)
        found = run_shares(workers, compare_job_share, job, identify_traced(traced), len(traced.things))
    return merge_comparisons(found)


def compare_entries_in_shares(
    job: VerifyJob, workers: Workers, _: AnyPath, entries: list[ManifestFile], __: Progress | None, ___: Fraction | None
) -> tuple[ChangedRanges, int]:
    """Compares files with their checksums. Raises Refused."""
    things = sum(len(entry.ranges) for entry in entries)
    wrong, compared = merge_changed_ranges(
        run_shares(workers, compare_job_share, job, identify_entries(entries), things)
    )
    return {entry.name: wrong.get(entry.name, ()) for entry in entries}, compared


def compare_job_share(job: VerifyJob, share: Share, progress: Progress | None = None) -> Any:
    """Compares a share of the bytes, in a process of its own. Returns what was found, to be merged. Raises Refused."""
    folder = require_path(job.target)
    if job.source is None:
        return compare_audited_share(find_audited_files(folder, job.ranks), share, job.sample, progress)
    sides = read_sides(
        folder,
        require_path(job.source),
        job.recipe,
        ignore_extra_files=job.ignore_extra_files,
        config_folder=read_location(job.config),
    )
    return compare_traced_share(trace_sides(sides, job.ranks), share, job.sample, progress)
