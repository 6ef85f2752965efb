"""Runs the commands `convert`, `plan` and `deepseek`."""

import argparse
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from reshard import api
from reshard.cli.bars import FileParts, format_bars, make_label
from reshard.cli.outcome import PROVEN
from reshard.cli.progress import show_progress
from reshard.cli.rank_choices import print_choices
from reshard.cli.terminal import print_json
from reshard.errors import Refused, require_none
from reshard.execution.execute import measure_memory_per_thread
from reshard.execution.journal import has_durable_bytes
from reshard.execution.times import RunResult
from reshard.formats.part_manifests import format_join_command, is_of_whole_files, read_joined_manifest
from reshard.formats.remote_names import is_address, make_full_path, restore_address
from reshard.formats.share_names import find_share_of_folder, list_share_folders
from reshard.formats.target_names import MANIFEST
from reshard.inspection.unfinished import describe_whole, read_unfinished
from reshard.pages.page_file import check_page_path, describe_page_file, name_page, write_page
from reshard.pages.plan_page import format_plan_page
from reshard.paths import RemotePath
from reshard.planning.plan import Plan, describe_coverage, describe_files, describe_notes
from reshard.planning.reads import measure_reads
from reshard.sources.engine_choice import takes_ranks
from reshard.target.conversion import Conversion, ShareRun, describe_conversion
from reshard.target.estimate import Estimate, describe_estimate, estimate_job
from reshard.target.manifest_writer import describe_lost, describe_plan
from reshard.target.next_steps import NextStep, list_next_steps
from reshard.target.places import StoredFolder, TargetPlace, get_folder, open_target
from reshard.target.ray_conversion import check_on
from reshard.target.run_config import explain_no_run_config, find_run_obstacles
from reshard.target.uploads import UploadPlan, describe_upload, plan_upload
from reshard.text import escape, format_command_lines, format_numbers, format_runs, format_size
from reshard.types import FIRST, RANKS, SLICED, WHOLE, Note

CHOICES = (
    *("mp", "to", "cast", "expert_dtype", "pad", "max_file_size", "replicas", "layers", "experts", "renumber"),
    *("only", "recipe", "for_engine", "ranks", "share", "ignore_extra_files", "config"),
)
"""Options that choose what to convert, and into which layout."""

OPTION = re.compile(r"(?<![\w-])--([a-z-]+)(?: (?:hf|dcp|bf16|fp8(?:-ue8m0)?|first|keep|FILE|N)\b)?")
"""An option in a message, with its value."""

WAYS = ("on", "jobs", "max_memory", "cache", "allow_inexact", "restart", "yes")
"""Options that change only how the job runs, not its result."""


def run_convert(options: argparse.Namespace) -> int:
    """Runs `convert`, or prints its plan with `--dry-run`. Returns the exit code. Raises Refused."""
    take_number_of_ranks(options)
    chosen = collect_options(options)
    if options.dry_run:
        return show_plan(options)
    ways = {name: getattr(options, name) for name in WAYS}
    with show_progress("convert", options) as progress, explain_interrupt(options.target):
        conversion = api.convert(options.source, options.target, **chosen, **ways, progress=progress)
    return print_conversion(conversion, options)


def run_deepseek(options: argparse.Namespace) -> int:
    """Runs `deepseek`: a conversion with the options of DeepSeek's scripts. Returns the exit code. Raises Refused, with
    hints for this command.
    """
    try:
        conversion = convert_for_deepseek(options)
    except Refused as refused:
        raise refused.reworded(partial(OPTION.sub, name_option_of_deepseek)) from None
    return print_conversion(conversion, options)


def name_option_of_deepseek(option: re.Match[str]) -> str:
    """The option of `deepseek` that does the same as one of `convert`; if there is none, says whose it is. A command
    stays as it is.
    """
    if option[1] is None:
        return option[0]
    name = option[1].replace("-", "_")
    if name == "mp":
        return "--model-parallel"
    is_other = name in {*CHOICES, *WAYS, "mtp"} - {
        "expert_dtype",
        "ignore_extra_files",
        "allow_inexact",
        "restart",
        "yes",
    }
    return f"{option[0]} (of reshard convert)" if is_other else option[0]


def convert_for_deepseek(options: argparse.Namespace) -> Conversion:
    """Converts with the options of DeepSeek's scripts. Raises Refused."""
    with show_progress("convert", options) as progress, explain_interrupt(options.save_path):
        return api.convert(
            options.hf_ckpt_path,
            options.save_path,
            options.model_parallel,
            expert_dtype=options.expert_dtype,
            n_experts=options.n_experts,
            tokenizer_path=options.tokenizer_path,
            ignore_extra_files=options.ignore_extra_files,
            allow_inexact=options.allow_inexact,
            restart=options.restart,
            yes=options.yes,
            progress=progress,
        )


def has_begun(target: Path) -> bool:
    """Whether a run, or a share, has left something in a target that the next one need not write again."""
    shares = [target / name for name in list_share_folders(target)]
    return any(map(has_durable_bytes, [target, *shares])) or any((one / MANIFEST).is_file() for one in shares)


@contextmanager
def explain_interrupt(target: Path) -> Iterator[None]:
    """Adds to an interrupt, where something was written, that the same command goes on from there."""
    try:
        yield
    except KeyboardInterrupt:
        way_on = "run the same command again to go on from there"
        if not is_address(target) and not has_begun(Path(target)):
            way_on = "nothing was written; run the same command again"
        raise KeyboardInterrupt(way_on) from None


def run_plan(options: argparse.Namespace) -> int:
    """Runs `plan`: prints what `convert` would write, or without a number of ranks those that work. Returns the exit
    code. Raises Refused.
    """
    take_number_of_ranks(options)
    checkpoints = (options.source, options.target, options.config)
    require_none(check_page_path(options.html, checkpoints) if options.html else ())
    if options.mp is None and options.to == RANKS and takes_ranks(options.recipe, options.for_engine):
        return print_choices(options)
    return show_plan(options)


def take_number_of_ranks(options: argparse.Namespace) -> None:
    """Takes `--ranks N` of `--to dcp` for the number of ranks, which nothing else says. Several stay, and are refused
    by the API.
    """
    if options.to == SLICED and options.mp is None and options.ranks is not None and len(options.ranks) == 1:
        (options.mp,), options.ranks = options.ranks, None


def show_plan(options: argparse.Namespace) -> int:
    """Makes a plan and prints it. Returns the exit code. Raises Refused."""
    on = getattr(options, "on", None)
    require_none(check_on(on, options.share))
    plan = api.plan(options.source, target=options.target, **collect_options(options))
    place = None if options.target is None else open_target(options.target)
    apart = [Note("on", f"--on {on}: the plan is that of one machine, and nothing was sent there")] if on else []
    noted = replace(plan, notes=(*plan.notes, *apart, *note_what_is_there(plan, place, options)))
    html = getattr(options, "html", None)
    if html:
        write_page(html, format_plan_page(noted))
    if not plan.files and not options.json:
        target = restore_address(options.target)
        lines = [f"{target}: converted already; no tensor would be written", *describe_notes(plan.notes)]
        print("\n".join(map(escape, [*lines, *name_page(html)])))
        return PROVEN
    return print_plan(noted, place, html, as_json=options.json)


def note_what_is_there(plan: Plan, place: TargetPlace | None, options: argparse.Namespace) -> Iterator[Note]:
    """Notes what a conversion would not write again: finished ranks, and the bytes of an unfinished run."""
    if place is None:
        return
    chosen = range(plan.layout.ranks) if options.ranks is None else options.ranks
    finished = {*chosen} - {file.rank for file in plan.files}
    if plan.layout.to != WHOLE and options.share is None and finished:
        yield Note("finished", f"finished there, not written again: ranks {format_numbers(finished)}")
    if (found := read_unfinished(get_folder(place))) and not getattr(options, "restart", False):
        size = f"{format_size(found.durable)} of {format_size(found.size)}"
        where = "on the disk" if isinstance(place, Path) else "in the store"
        yield Note(
            "unfinished",
            f"an unfinished run there has {size} {where}, {describe_whole(found)}; the same options go on with it",
        )


def collect_options(options: argparse.Namespace) -> dict[str, Any]:
    """Collects the options that choose what to convert, as keyword arguments of `reshard.convert`."""
    return {name: getattr(options, name) for name in CHOICES} | {"keep_mtp": options.mtp == "keep"}


def print_plan(plan: Plan, place: TargetPlace | None, html: Path | None, *, as_json: bool) -> int:
    """Prints a plan as tables or JSON; with a target on this machine an estimate of its time, with one in a store how
    it is uploaded; and where its page was written. Returns the exit code.
    """
    estimate = estimate_job(plan, place) if isinstance(place, Path) else None
    upload = plan_upload(plan, place.store) if isinstance(place, StoredFolder) and plan.files else None
    if as_json:
        facts: dict[str, Any] = {"upload": upload._asdict()} if upload else {}
        facts |= {} if estimate is None else {"estimate": {**asdict(estimate), "folder": str(estimate.folder)}}
        print_json({**describe_plan_facts(plan), **facts, **describe_page_file(html)})
    else:
        print("\n".join([format_plan(plan, estimate, upload), *map(escape, name_page(html))]))
    return PROVEN


def format_plan(plan: Plan, estimate: Estimate | None = None, upload: UploadPlan | None = None) -> str:
    """Formats a plan for people: its tables and notes, on a terminal also bars."""
    files = (FileParts(make_label(file.name), plan.measure_dtypes(place)) for place, file in enumerate(plan.files))
    work = map(escape, describe_work(plan, estimate, upload))
    told = *describe_coverage(plan), *describe_notes(plan.notes), *explain_no_run_config(plan), *describe_lost(plan)
    return "\n".join([*work, *format_bars(files), *map(escape, told)])


def describe_work(plan: Plan, estimate: Estimate | None, upload: UploadPlan | None) -> Iterator[str]:
    """Describes the files of a plan, the memory that each job takes, and the estimate or the upload if there is one."""
    yield from describe_files(plan, is_stored=upload is not None)
    if estimate:
        yield from describe_estimate(estimate, is_cast=plan.computes)
    if upload:
        yield describe_upload(upload)
    memory = format_size(upload.memory if upload else measure_memory_per_thread(plan))
    yield f"memory: {memory} of buffers a job (--jobs), at most 256 MiB (--max-memory)"


def describe_plan_facts(plan: Plan) -> dict[str, Any]:
    """Describes a plan as JSON values, with the tensors that cannot be restored and the reasons for no run config."""
    return {
        **describe_plan(plan),
        "reads": measure_reads(plan.source, plan.casts, plan.copies).size,
        "notes": [note._asdict() for note in plan.notes],
        "not_restored": [*describe_lost(plan)],
        "no_run_config": [*find_run_obstacles(plan)],
    }


def print_conversion(conversion: Conversion, options: argparse.Namespace) -> int:
    """Prints the summary of a conversion as text or JSON. Returns the exit code."""
    steps = collect_next_steps(conversion, options)
    if options.json:
        run = conversion.done
        ways = {"ways": {"read": run.ways.read, "write": run.ways.write}} if run else {}
        done = {**asdict(run), **ways, **describe_times_used(run)} if run else None
        facts = {
            "status": "converted" if run else "already-converted",
            "seconds": conversion.seconds,
            "planning": conversion.planning,
            "written": conversion.written,
            "rate": int(conversion.rate),
            "done": done,
            "shares": [{**share._asdict(), **describe_times_used(share)} for share in conversion.shares],
            "next": [step._asdict() for step in steps],
        }
        print_json({**facts, **describe_plan_facts(conversion.plan)})
    elif not options.quiet:
        lines = describe_conversion(conversion, getattr(options, "jobs", None))
        below = (line for step in steps for line in format_command_lines(step.text, step.command))
        print("\n".join(map(escape, [*lines, *below])))
    return PROVEN


def describe_times_used(run: RunResult | ShareRun) -> dict[str, Any]:
    """Describes where the time of a run went, as JSON values."""
    return {"stages": run.stages._asdict(), "threads": run.threads._asdict()}


def collect_next_steps(conversion: Conversion, options: argparse.Namespace) -> list[NextStep]:
    """Collects what is to be done with a target, with full paths: it is verified first. The tensors of a share
    in a store are not in its folder.
    """
    verify = NextStep("verify", "next", make_verify_command(conversion, options))
    if find_share_of_folder(conversion.target):
        steps = [*make_share_steps(conversion, options)]
        return [verify, *steps] if steps and not isinstance(conversion.target, RemotePath) else steps
    return [verify, *make_join_steps(conversion, options), *list_next_steps(conversion.plan, conversion.target)]


def make_join_steps(conversion: Conversion, options: argparse.Namespace) -> Iterator[NextStep]:
    """Makes the command that makes one target of all ranks, where only some were chosen; nothing where all are."""
    if getattr(options, "ranks", None) is None:
        return
    manifest, target = read_joined_manifest(conversion.target), conversion.target.absolute()
    if is_of_whole_files(manifest) or len(manifest["files"]) == manifest["ranks"]:
        return
    command = format_join_command(target, manifest, str(conversion.plan.path.absolute()))
    text = "when the other parts are copied into this folder"
    yield NextStep("join", text, " ".join([command, *map(shlex.quote, list_reading_words(options))]))


def make_share_steps(conversion: Conversion, options: argparse.Namespace) -> Iterator[NextStep]:
    """Makes the command that joins the shares: that of this one, without `--share`; nothing where it has no file."""
    manifest, source = read_joined_manifest(conversion.target), make_full_path(options.source)
    if not manifest:
        return
    words = ["--replicas", "first"] if options.replicas == FIRST else []
    words += ["--allow-inexact"] * options.allow_inexact
    words += ["--ranks", ",".join(format_runs(options.ranks))] if options.ranks is not None else []
    command = format_join_command(make_full_path(options.target), manifest, source)
    rest = map(shlex.quote, [*words, *list_reading_words(options)])
    yield NextStep("join", "when all shares are finished", " ".join([command, *rest]))


def list_reading_words(options: argparse.Namespace) -> list[str]:
    """The words that a command needs to read the same source, with full paths."""
    recipe = getattr(options, "recipe", None)
    words = ["--recipe", str(Path(recipe).absolute()) if Path(recipe).is_file() else recipe] if recipe else []
    config = getattr(options, "config", None)
    words += ["--config", make_full_path(config)] if config else []
    return words + ["--ignore-extra-files"] * bool(getattr(options, "ignore_extra_files", False))


def make_verify_command(conversion: Conversion, options: argparse.Namespace) -> str:
    """Makes the shell command that verifies a target, with full paths. A target restored from rank files is compared
    with them, unless tensors were chosen or cast: then its checksums are verified. So are those of some slices, and of
    a share made of rank files: only all together are what a source has.
    """
    plan, only = conversion.plan, getattr(options, "only", ())
    words = ["reshard", "verify", str(conversion.target.absolute())]
    is_of_ranks, share = plan.origin.is_of_ranks and not plan.origin.is_altered, find_share_of_folder(conversion.target)
    if share and (is_of_ranks or plan.layout.to == SLICED):
        return shlex.join(words)
    is_chosen = only or (is_of_ranks and plan.source.subset)
    if is_chosen or (is_of_ranks and (plan.layout.to == RANKS or plan.casts)):
        return shlex.join(words)
    ranks = None if share else getattr(options, "ranks", None)  # which of them a share has tells its manifest
    chosen = ["--ranks", ",".join(format_runs(ranks))] if ranks is not None else []
    if chosen and plan.layout.to == SLICED:
        return shlex.join([*words, *chosen])
    words += ["--source", str(plan.path.absolute()), *chosen]
    return shlex.join([*words, *list_reading_words(options)])
