"""Looks at the target folder before a job: which ranks are finished, and whether the rest can be written."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reshard.errors import Problem, refuse, require_none
from reshard.execution.execute import OtherFiles, rename_to_final
from reshard.execution.journal import Records, list_left_files, lock_journal
from reshard.execution.side_writer import SideFile, compute_side_checksum, write_side_files
from reshard.formats.manifest import list_rank_files, read_manifest
from reshard.formats.target_names import JOURNAL, MANIFEST, PARTIAL
from reshard.formats.unfinished_downloads import check_unfinished
from reshard.planning.plan import Plan
from reshard.planning.planner import keep_ranks
from reshard.target.manifest_writer import (
    describe_origin,
    find_finished_ranks,
    is_same_job,
    read_source_facts,
    write_manifest,
)
from reshard.target.side_files import collect_side_files, find_beside, list_names
from reshard.target.tokenizer import WORD, find_tokenizer, note_lacking
from reshard.text import format_size


def list_own_names(target: Path) -> set[str]:
    """Lists the files that an interrupted job may have left in its target, by its journal. Empty without a journal."""
    if not (target / JOURNAL).exists():
        return set()
    return {JOURNAL, *list_left_files(target)}


def check_folder(source: Path, target: Path, needed: int, ours: set[str]) -> Iterator[Problem]:
    """Checks that `needed` bytes can be written to the folder `target`. The folder need not exist; if it does, it may
    hold only files named in `ours`, and hidden ones: no file of ours has such a name, and macOS and git write them.
    """
    resolved, origin = target.resolve(), source.resolve()
    if resolved.is_relative_to(origin if origin.is_dir() else origin / "no folder"):
        yield Problem("target-inside-source", str(target), f"inside {source}", "a folder elsewhere", "another target")
        return
    if target.exists() and not target.is_dir():
        yield Problem("target-not-folder", str(target), "a file", "a folder, or no such name", "another target")
        return
    if names := [name for name in list_names(target) if name not in ours and not name.startswith(".")]:
        found = f"{len(names)} files: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        yield Problem("target-not-empty", str(target), found, "an empty folder, or none", "another target, or empty it")
    above = find_nearest_folder(target)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        yield Problem("no-permission", str(above), "not a folder that we may write to", "write permission", "")
        return
    longest = os.pathconf(above, "PC_NAME_MAX")
    if long := [part for part in target.parts if len(os.fsencode(part)) > longest]:
        yield Problem(
            "wrong-name", long[0], f"{len(os.fsencode(long[0]))} bytes", f"at most {longest}", "another target"
        )
    yield from check_space(target, needed, ours)


def check_space(target: Path, needed: int, ours: set[str]) -> Iterator[Problem]:
    """Checks that `needed` bytes fit on the disk of a target, in which the files named in `ours` are replaced."""
    above = find_nearest_folder(target)
    free = shutil.disk_usage(above).free + sum(measure_allocated(target / name) for name in ours)
    if free < needed:
        found = f"{free:,} bytes free ({format_size(free)})"
        expected = f"{needed:,} bytes ({format_size(needed)})"
        yield Problem("no-space", str(above), found, expected, "make room, another target, or fewer --ranks at a time")


def measure_allocated(path: Path) -> int:
    """Measures the disk space of a file, in bytes; 0 if it does not exist."""
    return path.stat().st_blocks * 512 if path.exists() else 0


def find_nearest_folder(path: Path) -> Path:
    """Finds the nearest existing path: the path itself, or one above it."""
    return next(above for above in (path.absolute(), *path.absolute().parents) if above.exists())


@dataclass(frozen=True, slots=True)
class TargetState:
    """A target folder at the start of a job, and the part of the plan that remains to be done."""

    folder: Path
    plan: Plan
    """The plan of the files that are not finished yet."""
    samples: Sequence[str]
    """For each source file: a checksum of samples of its data."""
    sides: Mapping[str, SideFile]
    """The side files, by name."""
    manifest: Mapping[str, Any]
    """The manifest in the folder; empty if there is none."""
    known: Mapping[str, Any]
    """The same manifest, if it is of this conversion (perhaps for other ranks); else empty."""
    origin: Mapping[str, Any]
    """The part of the new manifest that describes the source."""


def look_at_target(plan: Plan, folder: Path, tokenizer_path: Path | None = None) -> TargetState:
    """Finds the files of a plan that remain to be written; writes nothing. The tokenizer is that of `tokenizer_path`,
    or of the source. Raises Refused if they cannot be written.
    """
    tokenizer = find_tokenizer(tokenizer_path, plan.recipe)
    plan = replace(plan, notes=(*plan.notes, *note_lacking(tokenizer, plan.recipe, find_beside(plan).copied)))
    try:
        samples, headers = read_source_facts(plan)
        origin = describe_origin(plan, headers)
    except OSError as error:
        raise refuse("cannot-read", str(error.filename), error.strerror or str(error), "to read the source") from None
    manifest = read_manifest(folder)
    known = manifest if is_same_job(manifest, plan, samples) else {}
    sides = collect_side_files(plan, tokenizer)  # before finished ranks are left out: an index names all files
    require_none(check_unfinished(plan.source.folder, sides))
    if finished := find_finished_ranks(known, plan, folder):
        plan = keep_ranks(plan, [file.rank for file in plan.files if file.rank not in finished])
    state = TargetState(folder, plan, samples, sides, manifest, known, origin)
    require_none(check_state(state))
    return state


def check_state(state: TargetState) -> Iterator[Problem]:
    """Reports files that changed since this conversion wrote them; if there are none, reasons why the remaining files
    cannot be written.
    """
    found = [*check_side_files(state.known, state.sides), *check_damaged_files(state.known, state.plan, state.folder)]
    yield from found
    if not found and state.plan.files:
        yield from check_room(state)
    elif not found:
        yield from check_space(state.folder, sum(state.sides[name].size for name in list_lost_sides(state)), set())


def list_lost_sides(state: TargetState) -> list[str]:
    """Lists the side files that are not in the target."""
    return [name for name in state.sides if not (state.folder / name).exists()]


def describe_others(state: TargetState) -> OtherFiles:
    """Describes the manifest and the side files for `execute_plan`. The manifest gets its final name last."""

    def write(records: Records, checksums: Mapping[str, str]) -> bytes:
        sizes = {name: side.size for name, side in state.sides.items()}
        return write_manifest(state.plan, state.samples, sizes, checksums, records, state.known, state.origin)

    def require_same() -> None:
        if read_manifest(state.folder) != state.manifest:
            found = "another run has ended there just now"
            raise refuse("target-changed", str(state.folder), found, "none", "run it again")

    return OtherFiles(state.sides, write, require_same)


def check_side_files(known: Mapping[str, Any], sides: Mapping[str, SideFile]) -> Iterator[Problem]:
    """Reports side files whose content would differ from the manifest: a changed tokenizer or config of the source."""
    for entry in known.get("side_files", ()):
        side = sides.get(entry["name"])
        if side and (side.size != entry["size"] or compute_side_checksum(side) != entry["xxh3_128"]):
            found = "other content than when the target was made, in the source or by its config.json"
            remedy = "another target, or the source as it was"
            if WORD in entry["name"]:
                found = "another tokenizer than when the target was made"
                remedy = "another target, or the source and --tokenizer-path as they were"
            yield Problem("source-changed", entry["name"], found, "the same", remedy)


def check_damaged_files(known: Mapping[str, Any], plan: Plan, target: Path) -> Iterator[Problem]:
    """Reports finished files whose size differs from the manifest."""
    sizes = {entry["name"]: entry["size"] for entry in known.get("files", ())}
    for file in plan.files:
        path = target / file.name
        if file.name in sizes and path.exists():
            found, expected = f"{path.stat().st_size:,} bytes", f"{sizes[file.name]:,} bytes, as they were written"
            yield Problem("wrong-size", str(path), found, expected, "move the file away and run the same command again")


def mend_target(state: TargetState) -> list[str]:
    """Writes the side files that a finished target lacks, and returns their names.

    Raises Refused if side files are missing while other ranks are half written: that job must end first.
    """
    target = state.folder
    lost = list_lost_sides(state)
    if any(name.endswith(PARTIAL) for name in list_left_files(target)):
        if lost:
            found, remedy = "an unfinished conversion of other ranks", "run its command again, then this one"
            raise refuse("another-job", str(target / JOURNAL), found, "none", remedy)
    elif lost:
        with ExitStack() as stack:
            lock_journal(stack, target / JOURNAL)
            write_side_files(target, {name: state.sides[name] for name in lost})
            rename_to_final(target, lost)
    elif (target / JOURNAL).exists():  # left by a job that crashed after its last rename
        with ExitStack() as stack:
            lock_journal(stack, target / JOURNAL)
            (target / JOURNAL).unlink()
    return lost


def check_room(state: TargetState) -> Iterator[Problem]:
    """Checks that the remaining files can be written, and that the folder holds only files of this conversion (perhaps
    for other ranks).
    """
    ours = list_own_names(state.folder)
    if state.known:
        ours |= {MANIFEST, *state.sides, *list_rank_files(state.known)} - {file.name for file in state.plan.files}
    needed = state.plan.size + sum(side.size for side in state.sides.values())
    yield from check_folder(state.plan.path, state.folder, needed, ours)
