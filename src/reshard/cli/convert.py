"""The commands `convert`, `plan` and `deepseek`."""

import argparse
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from reshard.api import Result, convert_checkpoint
from reshard.cli.terminal import PROVEN, print_json, progress, table
from reshard.errors import counted, printable, refuse, size_text
from reshard.execution.execute import Settings, memory_per_job
from reshard.formats.manifest import Origin, subset_lines
from reshard.planning.plan import Job, Plan, plan_with_origin
from reshard.recipes.recipe import recipes_to_try
from reshard.sources.source import ranks_at
from reshard.target.folder import prepare
from reshard.target.manifest_writer import describe_plan, lost_lines
from reshard.target.side_files import run_obstacles
from reshard.types import RANKS, Subset


def run_convert(options: argparse.Namespace) -> int:
    if options.dry_run:
        work = prepare(job_of(options), options.target)
        if not work.plan.files and not options.json:
            print(printable(f"{options.target}: converted already; no tensor would be written"))
            return PROVEN
        return say_plan(work.plan, work.known_origin, options.source, as_json=options.json)
    settings = Settings(options.jobs, options.max_memory, options.cache, options.restart, options.allow_inexact)
    return convert(job_of(options), options.target, settings, as_json=options.json)


def run_deepseek(options: argparse.Namespace) -> int:
    job = Job(
        options.hf_ckpt_path,
        options.model_parallel,
        ignore_extra_files=options.ignore_extra_files,
        experts=options.n_experts,
    )
    return convert(job, options.save_path, Settings(), as_json=options.json)


def run_plan(options: argparse.Namespace) -> int:
    plan, origin = plan_with_origin(job_of(options))
    return say_plan(plan, origin, options.source, as_json=options.json)


def say_plan(plan: Plan, origin: Origin, source: Path, *, as_json: bool) -> int:
    if as_json:
        print_json(about(plan, origin))
    else:
        print("\n".join(map(printable, [*plan_lines(plan, source), *run_lines(plan), *lost_lines(plan, origin)])))
    return PROVEN


def about(plan: Plan, origin: Origin) -> dict[str, Any]:
    """A plan as JSON values, with what a target will lack."""
    return {
        **describe_plan(plan),
        "not_restored": [*lost_lines(plan, origin)],
        "no_run_config": [*run_obstacles(plan)],
    }


def job_of(options: argparse.Namespace) -> Job:
    if options.replicas == "first" and not ranks_at(options.source, recipes_to_try(options.recipe)):
        raise refuse("wrong-option", "--replicas", "first", "rank files as the source", "leave it out")
    if options.to == "ranks" and options.mp is None:
        raise refuse("wrong-option", "--mp", "no number of ranks", "one, or --to hf", "--mp N")
    return Job(
        options.source,
        options.mp if options.mp is not None else 1,
        options.recipe,
        options.ranks,
        options.ignore_extra_files,
        to=options.to,
        cast=options.cast,
        expert_dtype=options.expert_dtype,
        keep_optional=options.mtp == "keep",
        pad=options.pad,
        file_size=options.max_file_size,
        first_replica=options.replicas == "first",
        subset=Subset(chosen(options.layers), chosen(options.experts), options.renumber, tuple(options.only)),
    )


def chosen(numbers: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(numbers)


def convert(job: Job, target: Path, settings: Settings, *, as_json: bool) -> int:
    started = time.monotonic()
    result = convert_checkpoint(job, target, settings, partial(progress, "convert"))
    seconds = time.monotonic() - started
    if as_json:
        status = "converted" if result.done else "already-converted"
        facts = about(result.plan, result.origin)
        print_json({"status": status, "seconds": seconds, "done": done_of(result), **facts})
    else:
        print("\n".join(map(printable, converted_lines(result, job, target, seconds, settings.jobs))))
    return PROVEN


def done_of(result: Result) -> dict[str, object] | None:
    return asdict(result.done) if result.done else None


def jobs_text(jobs: int, asked: int | None) -> str:
    """Of so many as were asked for, if they were: only too little memory makes them fewer."""
    if asked is None or jobs >= asked:
        return counted(jobs, "jobs")
    return f"{jobs} of {counted(asked, 'jobs')} (--max-memory allows no more)"


def converted_lines(result: Result, job: Job, target: Path, seconds: float, jobs: int | None = None) -> Iterator[str]:
    plan, done = result.plan, result.done
    if result.mended:
        yield f"{target}: converted already; written again: {', '.join(result.mended)}"
    elif done is None:
        yield f"{target}: converted already; nothing was written"
    else:
        size = f"{plan.size:,} bytes ({size_text(plan.size)})"
        kind = "rank files" if plan.layout.to == RANKS else "files"
        yield f"{target}: {counted(len(plan.files), kind)}, {size} in {seconds:.1f} s"
        if done.resumed:
            yield f"resumed: {done.resumed:,} bytes had been written before"
        yield f"{jobs_text(done.jobs, jobs)}, read {done.ways.read}, written {done.ways.write}"
        if done.inexact:
            yield f"rounded: {counted(done.inexact, 'values')} that the new dtype does not have"
    yield from subset_lines(plan.source.subset)
    yield from cast_lines(plan)
    yield from dropped_lines(plan)
    yield from run_lines(plan)
    yield from lost_lines(plan, result.origin)
    yield f"next: {verify_command(job, target, result)}"


def verify_command(job: Job, target: Path, result: Result) -> str:
    """As it would be typed into a shell. What was made of rank files is held against them if they are cut from it."""
    words = ["reshard", "verify", str(target)]
    is_chosen = job.subset.only or (result.origin.is_of_ranks and result.plan.source.subset)
    if is_chosen or (result.origin.is_of_ranks and (result.plan.layout.to == RANKS or result.plan.casts)):
        return shlex.join(words)
    words += ["--source", str(job.source)]
    words += ["--recipe", job.recipe] if job.recipe else []
    words += ["--ranks", ",".join(map(str, job.only))] if job.only is not None else []
    words += ["--ignore-extra-files"] if job.ignore_extra_files else []
    return shlex.join(words)


def cast_lines(plan: Plan) -> Iterator[str]:
    """What was computed, and what it became."""
    results = Counter((cast.operation, cast.result.dtype) for cast in plan.casts)
    for (operation, dtype), count in results.items():
        yield f"{operation}: {counted(count, 'tensors')} of {dtype}"
    raised = {key: value for key, value in (plan.config or {}).items() if value != (plan.source.config or {}).get(key)}
    for key, value in raised.items():
        yield f"padded: {key} from {(plan.source.config or {})[key]} to {value}"


def run_lines(plan: Plan) -> Iterator[str]:
    yield from (f"no run_config.json: {reason}" for reason in run_obstacles(plan))


def dropped_lines(plan: Plan) -> Iterator[str]:
    for share in plan.coverage:
        if share.use == "dropped":
            yield f"dropped: {counted(share.tensors, 'tensors')}, {share.size:,} bytes: {share.what}: {share.reason}"


def plan_lines(plan: Plan, source: Path) -> Iterator[str]:
    """A table a rank, then what becomes of the source; both add up to the byte."""
    target = counted(plan.layout.ranks, "ranks") if plan.layout.to == RANKS else counted(len(plan.files), "whole files")
    yield f"{source} -> {target} by the recipe {plan.recipe.name}"
    yield from subset_lines(plan.source.subset)
    counts = {plan.recipe.placeholders[letter].counts: count for letter, count in plan.counts.items() if count}
    yield ", ".join(counted(count, things) for things, count in counts.items())
    yield ""
    rows = [(file.name, f"{len(file.pieces):,}", f"{file.size:,}", size_text(file.size)) for file in plan.files]
    pieces = sum(len(file.pieces) for file in plan.files)
    total = ("total", f"{pieces:,}", f"{plan.size:,}", size_text(plan.size))
    yield from table(("file", "tensors", "bytes", ""), [*rows, total]).splitlines()
    yield from cast_lines(plan)
    kept = sum(share.size for share in plan.coverage if share.use != "dropped")
    if again := sum(copy.size for join in plan.source.joins for part in join.parts for copy in part[1:]):
        yield f"reads at most {again:,} bytes more, to compare what several ranks hold (--replicas)"
    yield f"reads at most {kept:,} bytes, once; writes and needs {plan.size:,} bytes of disk ({size_text(plan.size)})"
    yield f"memory: {size_text(memory_per_job(plan))} of buffers a job (--jobs), at most 256 MiB (--max-memory)"
    yield ""
    yield from table(("source tensors", "tensors", "bytes", ""), [*use_rows(plan)]).splitlines()


USES = {
    "once": "used once",
    "replicated": "replicated to every rank",
    "shared": "shared by several ranks",
    "dequantized": "dequantized to BF16",
    "cast": "cast",
    "padded": "padded with zeros, scales with ones",
    "empty": "empty",
    "dropped": "dropped",
}


def use_rows(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    for use, words in USES.items():
        shares = [share for share in plan.coverage if share.use == use]
        if shares:
            size = sum(share.size for share in shares)
            yield words, f"{sum(share.tensors for share in shares):,}", f"{size:,}", size_text(size)
        if use not in ("once", "empty"):
            for share in shares:
                reason = f" ({share.reason})" if share.reason else ""
                yield f"  {share.what}{reason}", f"{share.tensors:,}", f"{share.size:,}", ""
    size = sum(share.size for share in plan.coverage)
    yield "total", f"{len(plan.source.tensors):,}", f"{size:,}", size_text(size)
