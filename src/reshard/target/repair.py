"""reshard.repair: writes the damaged files of a target again, from its source, and puts each in its place when proven.

The new files are written into a hidden folder inside the target, as a conversion of their own that resumes after an
interruption. Each is read back and compared with the checksums of the manifest; only then it replaces the damaged one,
by renaming. So the manifest decides what is right, and no file of the target is removed before its successor is whole.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import count
from os import PathLike
from pathlib import Path
from stat import S_IMODE

from reshard.errors import Problem, Refused, describe_problems, refuse, require_none
from reshard.execution.execute import OtherFiles, Settings, check_settings, execute_plan, refuse_unwritable
from reshard.execution.journal import TargetLock, lock_journal
from reshard.execution.staging import STAGING, find_staged_files, note_begun_repair, remove_staged_files
from reshard.formats.part_manifests import read_joined_manifest
from reshard.formats.remote_names import read_location, require_target
from reshard.formats.target_names import JOURNAL, LOCK_NAMES, MANIFEST, PARTIAL
from reshard.paths import AnyPath
from reshard.planning.options import sort_numbers
from reshard.planning.plan import describe_notes
from reshard.storage.counting import WorkCounter
from reshard.storage.local import remove_files, sync_folder
from reshard.target.repair_checks import check_places, check_repair_space, check_staging, is_folder
from reshard.target.repair_plan import CONVERT_ANEW, Damage, RepairPlan, plan_repair
from reshard.text import escape, format_count, format_list, format_size
from reshard.types import Note, Progress
from reshard.verification.checked_ranges import compare_files
from reshard.verification.checksums import (
    Audit,
    audit_files,
    find_damaged_files,
    find_damaged_side_files,
    list_audit_problems,
)
from reshard.verification.manifest_files import compute_file_checksum

Watch = Callable[[str], AbstractContextManager[Progress | None]]
"""Begins to watch a step of the work, by its title: `verify` or `repair`."""


@dataclass(frozen=True, slots=True)
class RepairReport:
    """The result of a repair."""

    target: Path
    damaged: tuple[str, ...]
    """Names of the files that were missing, or not as they were written."""
    repaired: tuple[str, ...]
    """Of these, the files that were written again and are proven."""
    size: int
    """Of the repaired files together, in bytes."""
    compared: int
    """Bytes of the target that were compared with the manifest, before the repair."""
    problems: tuple[Problem, ...]
    """What is still wrong with the target; with `dry_run`, what was found."""
    kept: tuple[str, ...] = ()
    """New names of the files beside the tensors that were replaced: a person may have changed them."""
    notes: tuple[Note, ...] = ()
    """What a repair that began earlier has left."""

    @property
    def is_proven(self) -> bool:
        """Whether every file that the manifest names is now as it was written."""
        return not self.problems

    def __str__(self) -> str:
        return "\n".join(describe_repair(self))

    __repr__ = __str__


def repair(
    target: str | PathLike[str],
    source: str | PathLike[str] | None = None,
    *,
    recipe: str | None = None,
    ranks: Iterable[int] | None = None,
    ignore_extra_files: bool = False,
    config: str | PathLike[str] | None = None,
    jobs: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RepairReport:
    """Compares a target with the checksums of its manifest, and writes the damaged and missing files again.

        report = reshard.repair("DeepSeek-V3-mp16", "DeepSeek-V3")
        assert report.is_proven, report

    A new file takes the place of a damaged one when it is whole and has the checksums of the manifest, not before.
    Files that are as they were written are not touched. An interrupted repair is resumed by the same call.

    Args:
        target: A folder that `convert` has written, with its manifest.
        source: The checkpoint or the rank files that it was made from; needed only if a file is damaged.
        recipe: A packaged recipe's name or a TOML file; by default the one that the manifest names.
        ranks: Repair the files of these ranks only, and the files beside them: the others need not lie there.
        ignore_extra_files: As for `convert`, if it was given then.
        config: As for `convert`, if it was given then.
        jobs: Threads; by default as many as processors and disk can use.
        dry_run: Compare, and write nothing.
        progress: Called as by `verify`; then as by `convert`, for the files that are written; then as by `verify`, for
            reading them back.

    Returns:
        A report, whose `repaired` has the names of the files that were replaced, and `problems` what is still wrong.

    Raises:
        Refused: The target has no manifest, or the source is not the one that it was made from. Then nothing of the
            target was changed.

    """
    settings = Settings(jobs, allow_inexact=True)  # the checksums tell whether the rounded values are the right ones
    require_none(check_settings(settings))
    chosen = sort_numbers("--ranks", ranks)
    if chosen == ():
        raise refuse("wrong-option", "--ranks", "no rank", "at least one, or leave it out")
    origin = read_location(source)
    beside = read_location(config)
    options = RepairOptions(origin, recipe, chosen, ignore_extra_files, beside, dry_run)
    return repair_target(require_target(target, is_written=False), options, settings, lambda _: nullcontext(progress))


@dataclass(frozen=True, slots=True)
class RepairOptions:
    """What to repair, and from what."""

    source: AnyPath | None
    recipe: str | None
    ranks: Sequence[int] | None
    ignore_extra_files: bool
    config: AnyPath | None
    dry_run: bool


def repair_target(target: Path, options: RepairOptions, settings: Settings, watch: Watch) -> RepairReport:
    """Repairs a target as `repair` does, in three steps: compare, write, read back. `watch` is told of each."""
    with watch("verify") as progress:
        audit = audit_repaired(target, options.ranks, progress)
    damage = find_damage(audit)
    if not damage.names or options.dry_run:
        if not options.dry_run:
            remove_left_repair(audit)
        problems = [*list_audit_problems(audit), *check_repair_space(audit, damage)]
        notes = tuple(note_begun_repair(target))
        return RepairReport(target, damage.names, (), 0, audit.compared, tuple(problems), notes=notes)
    if options.source is None:
        raise refuse_without_source(target, damage)
    work = plan_repair(
        target,
        audit.manifest,
        damage,
        options.source,
        options.recipe,
        ignore_extra=options.ignore_extra_files,
        config_folder=options.config,
    )
    require_none([*check_places(target, damage.names), *check_staging(audit, work)])
    with lock_target(audit) as lock:
        if not (target / STAGING / JOURNAL).exists():  # what a repair has left that ended while it read back
            remove_files(target / STAGING, find_staged_files(target, audit.manifest))
        write_staged_files(target / STAGING, work, settings, watch)
        with watch("verify") as progress:
            proven, problems = prove_staged_files(audit, damage, work, progress)
        lock.require_held()
        kept = replace_files(audit, proven, work.sides)
        size = sum((target / name).stat().st_size for name in proven)
    left = {name: ranges for name, ranges in audit.wrong.items() if name not in proven}
    after = replace(audit, full=[entry for entry in audit.full if entry.name in left], wrong=left)
    problems = [*problems, *work.problems, *list_audit_problems(after)]
    return RepairReport(target, damage.names, tuple(proven), size, audit.compared, tuple(problems), kept)


def audit_repaired(target: Path, ranks: Sequence[int] | None, progress: Progress | None) -> Audit[Path]:
    """Compares a target with its manifest. Raises Refused without one, with the ways that are left."""
    try:
        return audit_files(target, progress, None, ranks)
    except Refused as refused:
        if {problem.kind for problem in refused.problems} != {"no-manifest"}:
            raise
    found = f"no {MANIFEST}: nothing tells what its files should be"
    remedy = f"copy the {MANIFEST} of this target here from where it was copied from; {CONVERT_ANEW}"
    raise refuse("no-manifest", str(target), found, "a folder that reshard has written", remedy)


def remove_left_repair(audit: Audit[Path]) -> None:
    """Removes what an interrupted repair has left of files that are sound now. If it has begun others too, which were
    not compared, all of it stays: that repair can go on. So it does where it cannot be removed; a note tells.
    """
    names = {name.removesuffix(PARTIAL) for name in find_staged_files(audit.target, audit.manifest)}
    others = {entry.name for entry in audit.known} - {entry.name for entry in audit.entries}
    if is_folder(audit.target / STAGING) and names.isdisjoint(others):
        with suppress(Refused), lock_target(audit):
            remove_staged_files(audit.target, audit.manifest)


def find_damage(audit: Audit[Path]) -> Damage:
    """Finds what an audit has found damaged, and the side files that are. One that is as any of several parts says is
    not: of two tokenizers nobody knows the right one.
    """
    named = Counter(entry["name"] for entry in audit.manifest["side_files"])
    damaged = [*find_damaged_side_files(audit.target, audit.manifest)]
    named.subtract(entry["name"] for entry in damaged)
    sides = {entry["name"]: entry for entry in damaged if not named[entry["name"]]}
    return Damage(find_damaged_files(audit), [*sides.values()])


def refuse_without_source(target: Path, damage: Damage) -> Refused:
    """Makes the refusal of a repair that needs a source and has none."""
    found = f"none, and {describe_names(damage.names)} to be written again"
    expected = f"what {target} was made from: its {MANIFEST} records no path"
    return refuse("needs-source", "--source", found, expected, "the same command with --source SOURCE")


def describe_names(names: Sequence[str]) -> str:
    """Counts and names files: `2 files (config.json, model0-mp2.safetensors)`."""
    return f"{format_count(len(names), 'files')} ({format_list(names)})"


@contextmanager
def lock_target(audit: Audit[Path]) -> Iterator[TargetLock]:
    """A context in which no other process writes to a target. Raises Refused if one does, or has since it was read."""
    journal = audit.target / JOURNAL
    with ExitStack() as stack:
        try:
            lock = lock_journal(stack, journal)
            if read_joined_manifest(audit.target) != audit.manifest:
                found = "another run has ended there just now"
                raise refuse("target-changed", str(audit.target), found, "none", "run it again")
            # A lock there was left by a repair that had the one on the target, and has it no more.
            left = find_staged_files(audit.target, audit.manifest)
            remove_files(audit.target / STAGING, {*LOCK_NAMES}.intersection(left))
            try:
                yield lock
            finally:
                # Else it is that of an unfinished conversion of other ranks.
                if lock.is_held() and not journal.stat().st_size:
                    journal.unlink()
                with suppress(OSError):
                    (audit.target / STAGING).rmdir()  # empty, if nothing was durable yet
        except OSError as error:
            raise refuse_unwritable(audit.target, error) from None


def write_staged_files(staging: Path, work: RepairPlan, settings: Settings, watch: Watch) -> None:
    """Writes the new files into their folder; resumes if the same repair was interrupted. Raises Refused."""

    def execute(settings: Settings) -> None:
        others = OtherFiles(work.sides, lambda *_: b"{}\n", lambda: None)
        with watch("repair") as progress:
            execute_plan(work.plan, staging, others, WorkCounter(progress, work.plan.size, writes=True), settings)

    try:
        execute(settings)
    except Refused as refused:
        # What another repair has left, before this damage. Nothing there is of any other use.
        if not {problem.kind for problem in refused.problems} <= {"another-job", "damaged-journal"}:
            raise
        execute(replace(settings, restart=True))


def prove_staged_files(
    audit: Audit[Path], damage: Damage, work: RepairPlan, progress: Progress | None
) -> tuple[list[str], list[Problem]]:
    """Reads the new files and compares them with the manifest. Returns the names of those that are as it says, and
    problems of the others: the source gives other bytes than it gave.
    """
    staging = audit.target / STAGING
    wrong, _ = compare_files(staging, damage.files, progress)
    known = {entry["name"]: entry["xxh3_128"] for entry in damage.sides}
    proven = [name for name, ranges in wrong.items() if not ranges]
    proven += [name for name in work.sides if compute_file_checksum(staging / name) == known[name]]
    remedy = f"the source as it was; {CONVERT_ANEW}"
    expected = "those that it gave when the target was made, by the manifest"
    problems = []
    for name, ranges in wrong.items():
        if ranges:
            found = f"other bytes for {sum(checked.size for checked in ranges):,} bytes of {name}"
            problems.append(Problem("source-changed", str(work.plan.path), found, expected, remedy))
    return proven, problems


def replace_files(audit: Audit[Path], names: Sequence[str], sides: Collection[str]) -> tuple[str, ...]:
    """Puts proven files into their places, and removes what else is ours in the folder that they were written in.

    Side files that are replaced are kept under other names, which are returned.
    """
    target, staging = audit.target, audit.target / STAGING
    kept = {name: name_kept_file(target, name) for name in names if name in sides and (target / name).exists()}
    for name in names:
        if name in kept:
            (target / name).rename(target / kept[name])
        elif (target / name).exists():
            (staging / name).chmod(S_IMODE((target / name).stat().st_mode))
        (staging / name).rename(target / name)
    sync_folder(target)
    remove_staged_files(target, audit.manifest)
    return tuple(kept.values())


def name_kept_file(folder: Path, name: str) -> str:
    """Names a file that is replaced: `.config.json.before-repair`. Hidden, so that nobody takes it for one of the
    model's.
    """
    numbered = (f".{name}.before-repair{f'-{number}' if number > 1 else ''}" for number in count(1))
    return next(kept for kept in numbered if not os.path.lexists(folder / kept))


def describe_repair(report: RepairReport) -> Iterator[str]:
    """Describes the result of a repair for a person."""
    target = escape(str(report.target))
    if report.repaired:
        size = f"{report.size:,} bytes ({format_size(report.size)})"
        yield f"{target}: {format_count(len(report.repaired), 'files')} repaired, {size}"
        yield from (f"  {escape(name)}" for name in report.repaired)
        if report.kept:
            yield f"what they replaced beside the tensors is kept as {escape(format_list(report.kept))}"
        yield "each was read back and has the checksums of the manifest"
    elif report.damaged:
        yield f"{target}: {escape(describe_names(report.damaged))} damaged or missing; nothing was written"
    else:
        yield f"{target}: nothing to repair; {report.compared:,} bytes are as they were written"
    yield from map(escape, describe_notes(report.notes))
    if report.problems:
        yield describe_problems(report.problems)
