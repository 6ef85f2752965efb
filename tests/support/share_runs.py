"""Runs the shares of a job that only reads: one after the other, or in processes of their own."""

import multiprocessing
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

from reshard.execution.ray_shares import RunShares, list_share_tasks
from reshard.inspection.diff import diff_checkpoints
from reshard.inspection.diff_report import DiffReport
from reshard.inspection.diff_shares import DiffJob, diff_in_shares
from reshard.inspection.tensor_pairs import DiffChoice
from reshard.target.verified_shares import COMPARED_HERE, VerifyJob, compare_in_shares
from reshard.target.verified_target import verify_against_source
from reshard.verification.checksums import audit_target
from reshard.verification.report import Report

Calls = Sequence[Mapping[str, Any]]
Run = Callable[[Callable[..., Any], Calls], list[Any]]


def run_here(call: Callable[..., Any], tasks: Calls) -> list[Any]:
    """As another process would: what goes there and what comes back is sent as bytes. The last first."""
    found = [pickle.dumps(call(**send(task))) for task in reversed(tasks)]
    return [pickle.loads(one) for one in reversed(found)]  # noqa: S301


def send(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301


def run_in_processes(call: Callable[..., Any], tasks: Calls) -> list[Any]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(call, **task) for task in tasks]
        return [future.result() for future in futures]


def make_workers(count: int, run: Run = run_here) -> RunShares:
    """So many shares at most."""
    return lambda call, job, fingerprint, most: run(call, list_share_tasks(job, fingerprint, min(count, most)))


def verify_here(target: Path, source: Path | None, ranks: Any = None, sample: Fraction | None = None) -> Report:
    """By one process."""
    if source is None:
        return audit_target(target, None, sample, ranks)
    return verify_against_source(
        target, source, None, None, ranks, sample, None, COMPARED_HERE.traced, ignore_extra_files=False
    )


def verify_in_shares(
    target: Path,
    source: Path | None,
    count: int,
    ranks: Any = None,
    sample: Fraction | None = None,
    run: Run = run_here,
) -> Report:
    job = VerifyJob(str(target), str(source or ""), "", None, ranks, sample, ignore_extra_files=False)
    compare = compare_in_shares(job, make_workers(count, run))
    if source is None:
        return audit_target(target, None, sample, ranks, compare.entries)
    return verify_against_source(
        target, source, None, None, ranks, sample, None, compare.traced, ignore_extra_files=False
    )


def diff_here(a: Path, b: Path, choice: DiffChoice) -> DiffReport:
    """By one process."""
    return diff_checkpoints(a, b, choice)


def diff_shared(a: Path, b: Path, choice: DiffChoice, count: int, run: Run = run_here) -> DiffReport:
    return diff_in_shares(DiffJob(str(a), str(b), "", choice), a, b, make_workers(count, run))
