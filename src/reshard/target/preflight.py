"""Looks at the target folder before a job: which ranks are finished, and whether the rest can be written."""

import os
import shlex
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from reshard.errors import Problem, refuse, require_none
from reshard.execution.execute import OtherFiles, refuse_unwritable, rename_to_final
from reshard.execution.journal import has_partial_files, list_left_files, lock_journal
from reshard.execution.other_jobs import describe_other_job
from reshard.execution.records import Records
from reshard.execution.side_writer import write_side_files
from reshard.execution.staging import note_begun_repair
from reshard.formats.manifest import list_rank_files
from reshard.formats.part_manifests import is_part_name, is_same_conversion, join_manifests, read_manifests
from reshard.formats.target_names import JOURNAL, MANIFEST, PARTIAL, list_names
from reshard.formats.unfinished_downloads import check_unfinished
from reshard.paths import AnyPath
from reshard.planning.plan import Plan
from reshard.planning.planner import keep_ranks
from reshard.storage.counting import WorkCounter
from reshard.storage.local import write_durable
from reshard.target.manifest_writer import (
    describe_conversion_job,
    describe_origin,
    find_finished_ranks,
    read_source_facts,
    write_manifest,
)
from reshard.target.restart import (
    check_removed_files,
    choose_files_to_remove,
    leave_out_files,
    list_files_beside,
    refuse_to_remove,
)
from reshard.target.side_files import FoundFiles, collect_side_files, find_beside
from reshard.target.state import (
    TargetState,
    check_manifests,
    check_replaced_sides,
    check_side_files,
    check_written_files,
    find_unknown_ranks,
    list_lost_sides,
    make_unknown_problem,
    note_joined,
    require_same,
)
from reshard.target.tokenizer import find_tokenizer, note_lacking
from reshard.text import format_count, format_list, format_size
from reshard.types import RANKS, SLICED

MORE_ROOM = "make room, another target, or fewer --ranks at a time"


def list_own_names(target: Path) -> set[str]:
    """Lists the files that an interrupted job may have left in its target, by its journal. Empty without a journal."""
    if not (target / JOURNAL).exists():
        return set()
    parts = {name for name in list_names(target) if name.endswith(PARTIAL) and is_part_name(name)}
    return {JOURNAL, *list_left_files(target), *parts}


def check_folder(
    source: AnyPath,
    target: Path,
    needed: int,
    ours: set[str],
    present: Collection[str],
    remedy: str = "another target",
    room: str = MORE_ROOM,
) -> Iterator[Problem]:
    """Checks that `needed` bytes can be written to the folder `target`. The folder need not exist; if it does, it may
    hold only files named in `ours`, and hidden ones: no file of ours has such a name, and macOS and git write them.

    `present` has the names that were there before `ours` was found out: a run that has begun since then is met by its
    lock, and what it writes is not called a stranger's. `remedy` is for other files there, `room` for a full disk.
    """
    if isinstance(source, Path) and source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        yield Problem("target-inside-source", str(target), f"inside {source}", "a folder elsewhere", "another target")
        return
    if target.exists() and not target.is_dir():
        yield Problem("target-not-folder", str(target), "a file", "a folder, or no such name", "another target")
        return
    still = {*present}.intersection(list_names(target)) - ours
    if names := sorted(name for name in still if not name.startswith(".")):
        found = f"{format_count(len(names), 'files')}: {format_list(names, 4)}"
        yield Problem("target-not-empty", str(target), found, "an empty folder, or none", remedy)
    denied = [*check_permission(find_nearest_folder(target))]
    yield from denied
    if not denied:
        yield from check_name_lengths(target)
        yield from check_space(target, needed, ours, room)


def check_permission(folder: Path) -> Iterator[Problem]:
    """Checks that files and folders can be made in an existing folder."""
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        found, remedy = "not a folder that we may write to", "write permission, or another target"
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            found, remedy = "on a read-only file system", "have it mounted for writing, or another target"
        yield Problem("no-permission", str(folder), found, "a folder that we may write to", remedy)


def check_name_lengths(target: Path) -> Iterator[Problem]:
    """Checks that the file system allows names as long as those in a path."""
    longest = os.pathconf(find_nearest_folder(target), "PC_NAME_MAX")
    for part in target.parts:
        if len(os.fsencode(part)) > longest:
            yield Problem("wrong-name", part, f"{len(os.fsencode(part))} bytes", f"at most {longest}", "another target")


def check_space(target: Path, needed: int, ours: set[str], room: str = MORE_ROOM) -> Iterator[Problem]:
    """Checks that `needed` bytes fit on the disk of a target, in which the files named in `ours` are replaced."""
    above = find_nearest_folder(target)
    free = shutil.disk_usage(above).free + sum(measure_allocated(target / name) for name in ours)
    if free < needed:
        found = f"{free:,} bytes free ({format_size(free)})"
        expected = f"{needed:,} bytes ({format_size(needed)})"
        yield Problem("no-space", str(above), found, expected, room)


def measure_allocated(path: Path) -> int:
    """Measures the disk space that is free once a file is removed, in bytes: none of what a link points to, and of what
    has other names.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def find_nearest_folder(path: Path) -> Path:
    """Finds the nearest existing path: the path itself, or one above it."""
    return next(above for above in (path.absolute(), *path.absolute().parents) if above.exists())


def look_at_target(
    plan: Plan,
    folder: Path,
    tokenizer_path: AnyPath | None = None,
    beside: FoundFiles | None = None,
    *,
    restart: bool = False,
    yes: bool = False,
) -> TargetState:
    """Finds the files of a plan that remain to be written; writes nothing. The tokenizer is that of `tokenizer_path`,
    or of the source. The source is looked at again if what lies `beside` its tensors is not given. With `restart` and
    `yes`, finished files are to be written too. Raises Refused if they cannot be written.
    """
    beside = beside or find_beside(plan)
    tokenizer = find_tokenizer(tokenizer_path, plan.recipe)
    plan = replace(plan, notes=(*plan.notes, *note_lacking(tokenizer, plan.recipe, beside.copied)))
    try:
        samples, headers = read_source_facts(plan)
        origin = describe_origin(plan, headers)
    except OSError as error:
        raise refuse("cannot-read", str(error.filename), error.strerror or str(error), "to read the source") from None
    manifests = read_manifests(folder)
    wanted = describe_conversion_job(plan, samples)
    same = {name: one for name, one in manifests.named.items() if is_same_conversion(one, wanted)}
    removed = choose_files_to_remove(folder, plan, manifests, same, yes=yes) if restart else ()
    known = leave_out_files(join_manifests(same.values()), removed)
    same = same if known else {}
    sides = collect_side_files(plan, tokenizer, beside)  # before finished ranks are left out: an index names all files
    require_none(check_unfinished(plan.side_folder, sides))
    if finished := find_finished_ranks(known, plan, folder):
        plan = keep_ranks(plan, [file.rank for file in plan.files if file.rank not in finished])
    state = TargetState(folder, plan, samples, sides, manifests, same, known, origin, removed)
    if problems := [*check_state(state)]:
        require_same(state)  # what another run has brought in the meantime is nobody's fault
        require_none(problems)
    if removed and not yes:
        raise refuse_to_remove(state)  # last: who agrees must not be refused then for another reason
    notes = [note_joined(state)] if state.must_be_joined else []
    notes += [] if removed else note_begun_repair(folder)
    return replace(state, plan=replace(state.plan, notes=(*state.plan.notes, *notes)))


def check_state(state: TargetState) -> Iterator[Problem]:
    """Reports files that changed since this conversion wrote them; if there are none, reasons why the remaining files
    cannot be written.
    """
    has_work = bool(state.plan.files) or state.must_be_joined
    found = [*check_side_files(state.known, state.sides), *check_written_files(state), *check_manifests(state)]
    if not found and has_work:
        found += check_replaced_sides(state)
    found += check_removed_files(state)
    yield from found
    if not found and has_work:
        yield from check_room(state)
    elif not found:
        yield from check_space(state.folder, sum(state.sides[name].size for name in list_lost_sides(state)), set())


def describe_others(state: TargetState) -> OtherFiles:
    """Describes the manifest and the side files for `execute_plan`. The manifest gets its final name last."""

    def write(records: Records, checksums: Mapping[str, str]) -> bytes:
        sizes = {name: side.size for name, side in state.sides.items()}
        return write_manifest(state.plan, state.samples, sizes, checksums, records, state.known, state.origin)

    kept = list_rank_files(state.known) - {file.name for file in state.plan.files}
    kept |= {MANIFEST, *state.sides, *state.same} if kept else set()
    check = partial(require_same, state)
    return OtherFiles(state.sides, write, check, state.part, frozenset(kept), state.superseded, state.removed)


def mend_target(state: TargetState) -> list[str]:
    """Writes the side files and the manifest of its part that a finished target lacks, and returns their names; removes
    what a job that crashed after its last rename has left.

    Raises Refused if they cannot be written, or if side files are missing while other ranks are half written: that job
    must end first.
    """
    target, sides = state.folder, list_lost_sides(state)
    part = [state.part] if state.part and not (target / state.part).exists() else []
    if has_partial_files(target):
        if sides:
            found, remedy = "an unfinished conversion of other ranks", "run its command again, then this one"
            raise refuse("another-job", str(target / JOURNAL), found, "none", remedy)
        return []
    if not (sides or part or state.superseded or (target / JOURNAL).exists()):
        return []
    try:
        with ExitStack() as stack:
            lock_journal(stack, target / JOURNAL)
            require_same(state)
            if has_partial_files(target):
                raise refuse("target-changed", str(target), "another run has begun there", "none", "run it again")
            write_side_files(target, {name: state.sides[name] for name in sides}, WorkCounter(None, 0))
            for name in part:
                write_durable(target / (name + PARTIAL), (target / MANIFEST).read_bytes())
            rename_to_final(target, [*sides, *part], state.superseded)
    except OSError as error:
        raise refuse_unwritable(target, error) from None
    return [*sides, *part]


def check_room(state: TargetState) -> Iterator[Problem]:
    """Checks that the remaining files can be written, and that the folder holds only files of this conversion (perhaps
    for other ranks).
    """
    present = {*list_names(state.folder)} - list_files_beside(state)
    ours, planned = list_own_names(state.folder), {file.name for file in state.plan.files}
    ours |= set(state.removed)
    if state.manifests.main and not (state.known or state.removed):
        yield explain_other_conversion(state, state.manifests.main)
        return
    if state.known or not state.manifests.named:
        unknown = find_unknown_ranks(state, ours)
        if unknown:
            yield make_unknown_problem(state, unknown)
        if unknown or state.known:
            parts = {name for name in list_names(state.folder) if is_part_name(name)}
            ours |= {MANIFEST, *state.sides, *unknown.values(), *parts, *state.same}
        ours |= list_rank_files(state.known) - planned
    remedy = "move them out of the folder, or another target" if state.known else "another target"
    yield from check_folder(state.plan.path, state.folder, state.size, ours, present, remedy)


def explain_other_conversion(state: TargetState, manifest: Mapping[str, Any]) -> Problem:
    """Explains that the target has a finished conversion of another job, by its manifest, and how it may serve."""
    plan = state.plan
    wanted = describe_conversion_job(plan, state.samples)
    before, now = describe_other_job(manifest, wanted), describe_other_job(wanted, manifest, "of this source")
    remedy = "another target"
    layout = {**manifest.get("layout", {}), "ranks": plan.layout.ranks}
    is_whole = len(manifest.get("files", ())) == manifest.get("ranks")
    can_serve = plan.layout.to == RANKS or (plan.layout.to == SLICED and plan.keeps_names)
    if is_whole and is_same_conversion({**manifest, "layout": layout}, wanted) and can_serve:
        sliced = ["--to", SLICED] if plan.layout.to == SLICED else []
        command = shlex.join(["reshard", "convert", str(state.folder), "NEW", *sliced, "--mp", str(plan.layout.ranks)])
        remedy += f"; or {command} makes the ranks from these files, without the source"
    return Problem(
        "target-not-empty", str(state.folder), f"a finished conversion: {before}", f"this one: {now}", remedy
    )
