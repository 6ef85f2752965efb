"""The target folder before a job: what of it is finished, and whether the rest can be written."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from reshard.errors import Problem, refuse, require_none
from reshard.execution.execute import OtherFiles, rename_to_final
from reshard.execution.journal import Records, list_left_files, lock_journal
from reshard.formats.manifest import list_rank_files, read_manifest
from reshard.formats.target_names import JOURNAL, MANIFEST, PARTIAL
from reshard.planning.plan import Plan
from reshard.planning.planner import keep_ranks
from reshard.storage.local import write_durable
from reshard.target.manifest_writer import (
    describe_origin,
    find_finished_ranks,
    is_same_job,
    read_source_facts,
    write_manifest,
)
from reshard.target.side_files import list_names, read_side_files
from reshard.text import format_size


def list_own_names(target: Path) -> set[str]:
    """What an interrupted job may have left in its target, by its journal; without a journal nothing is ours."""
    if not (target / JOURNAL).exists():
        return set()
    return {JOURNAL, *list_left_files(target)}


def check_folder(source: Path, target: Path, needed: int, ours: set[str]) -> Iterator[Problem]:
    """Why the `needed` bytes cannot be written to the folder `target`, which may or may not be there yet, and may hold
    files of `ours` but no others.
    """
    resolved, origin = target.resolve(), source.resolve()
    if resolved.is_relative_to(origin if origin.is_dir() else origin / "no folder"):
        yield Problem("target-inside-source", str(target), f"inside {source}", "a folder elsewhere", "another target")
        return
    if target.exists() and not target.is_dir():
        yield Problem("target-not-folder", str(target), "a file", "a folder, or no such name", "another target")
        return
    if names := [name for name in list_names(target) if name not in ours]:
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
    free = shutil.disk_usage(above).free + sum(measure_allocated(target / name) for name in ours)
    if free < needed:
        found = f"{free:,} bytes free ({format_size(free)})"
        expected = f"{needed:,} bytes ({format_size(needed)})"
        yield Problem("no-space", str(above), found, expected, "make room, another target, or fewer --ranks at a time")


def measure_allocated(path: Path) -> int:
    """What a file takes of the disk, in bytes."""
    return path.stat().st_blocks * 512 if path.exists() else 0


def find_nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest thing above it that exists."""
    return next(above for above in (path.absolute(), *path.absolute().parents) if above.exists())


@dataclass(frozen=True, slots=True)
class TargetState:
    """A target folder as it was looked at, and the part of a plan that is left to be done there."""

    folder: Path
    plan: Plan
    """Of the files that are not there yet."""
    samples: Sequence[str]
    """Of the data of each source file: a checksum."""
    sides: Mapping[str, bytes]
    """The files beside the tensors, by name."""
    manifest: Mapping[str, Any]
    """Of the target; empty if there is none."""
    known: Mapping[str, Any]
    """The same, if it is of this conversion for other ranks; else empty."""
    origin: Mapping[str, Any]
    """The part of the manifest that describes the source."""


def look_at_target(plan: Plan, folder: Path) -> TargetState:
    """Finds what is left to do in the target folder; writes nothing. Raises Refused if anything stands in the way."""
    try:
        samples, headers = read_source_facts(plan)
    except OSError as error:
        raise refuse("cannot-read", str(error.filename), error.strerror or str(error), "to read the source") from None
    manifest = read_manifest(folder)
    known = manifest if is_same_job(manifest, plan, samples) else {}
    sides = read_side_files(plan)  # of all files, for an index names all
    origin = describe_origin(plan, headers)
    if finished := find_finished_ranks(known, plan, folder):
        plan = keep_ranks(plan, [file.rank for file in plan.files if file.rank not in finished])
    state = TargetState(folder, plan, samples, sides, manifest, known, origin)
    require_none(check_state(state))
    return state


def check_state(state: TargetState) -> Iterator[Problem]:
    """Files that are not as this conversion left them; else, if there is something to write, why it cannot be."""
    found = [*check_side_files(state.known, state.sides), *check_damaged_files(state.known, state.plan, state.folder)]
    yield from found
    if not found and state.plan.files:
        yield from check_room(state)


def describe_others(state: TargetState) -> OtherFiles:
    """The files beside the tensor files, for `execute_plan`: the manifest gets its final name last."""

    def contents(records: Records) -> dict[str, bytes]:
        manifest = write_manifest(state.plan, state.samples, state.sides, records, state.known, state.origin)
        return {**state.sides, MANIFEST: manifest}

    def require_same() -> None:
        if read_manifest(state.folder) != state.manifest:
            found = "another run has ended there just now"
            raise refuse("target-changed", str(state.folder), found, "none", "run it again")

    return OtherFiles([*state.sides, MANIFEST], contents, require_same)


def check_side_files(known: Mapping[str, Any], sides: Mapping[str, bytes]) -> Iterator[Problem]:
    """What is no longer as it was when the target was made: a tokenizer, or the config that a file was made of."""
    for entry in known.get("side_files", ()):
        content = sides.get(entry["name"])
        if content is not None and xxh3_128_hexdigest(content) != entry["xxh3_128"]:
            found = "other content than when the target was made, in the source or by its config.json"
            yield Problem("source-changed", entry["name"], found, "the same", "another target, or the source as it was")


def check_damaged_files(known: Mapping[str, Any], plan: Plan, target: Path) -> Iterator[Problem]:
    """Files of the same job that have a final name and not the size that they were given."""
    sizes = {entry["name"]: entry["size"] for entry in known.get("files", ())}
    for file in plan.files:
        path = target / file.name
        if file.name in sizes and path.exists():
            found, expected = f"{path.stat().st_size:,} bytes", f"{sizes[file.name]:,} bytes, as they were written"
            yield Problem("wrong-size", str(path), found, expected, "remove the file and run the same command again")


def mend_target(state: TargetState) -> list[str]:
    """Writes the side files that a finished target lacks, and returns their names.

    Raises Refused if it lacks some while other ranks are half written there: their journal is not ours to end.
    """
    target = state.folder
    lost = [name for name in state.sides if not (target / name).exists()]
    if any(name.endswith(PARTIAL) for name in list_left_files(target)):
        if lost:
            found, remedy = "an unfinished conversion of other ranks", "run its command again, then this one"
            raise refuse("another-job", str(target / JOURNAL), found, "none", remedy)
    elif lost:
        with ExitStack() as stack:
            lock_journal(stack, target / JOURNAL)
            for name in lost:
                write_durable(target / (name + PARTIAL), state.sides[name])
            rename_to_final(target, lost)
    elif (target / JOURNAL).exists():  # of a job that a crash has ended behind its last rename
        with ExitStack() as stack:
            lock_journal(stack, target / JOURNAL)
            (target / JOURNAL).unlink()
    return lost


def check_room(state: TargetState) -> Iterator[Problem]:
    """A target that cannot be written to, or holds files that neither this conversion nor the same for other ranks put
    there.
    """
    ours = list_own_names(state.folder)
    if state.known:
        ours |= {MANIFEST, *state.sides, *list_rank_files(state.known)} - {file.name for file in state.plan.files}
    needed = state.plan.size + sum(map(len, state.sides.values()))
    yield from check_folder(state.plan.path, state.folder, needed, ours)
