"""Looks at the target folder before a job: which ranks are finished, and whether the rest can be written."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from reshard.errors import Problem, refuse, require_none
from reshard.execution.execute import OtherFiles, rename_to_final
from reshard.execution.journal import Records, list_left_files, lock_journal
from reshard.execution.side_writer import SideFile, compute_side_checksum, write_side_files
from reshard.formats.downloads import check_unfinished
from reshard.formats.manifest import list_rank_files
from reshard.formats.part_manifests import (
    Manifests,
    format_conversion_options,
    is_part_name,
    join_manifests,
    name_part_manifest,
    read_manifests,
)
from reshard.formats.target_names import JOURNAL, MANIFEST, PARTIAL
from reshard.planning.plan import Plan
from reshard.planning.planner import keep_ranks
from reshard.sources.source import find_changed_range
from reshard.storage.local import write_durable
from reshard.target.manifest_writer import (
    describe_origin,
    find_different_keys,
    find_finished_ranks,
    is_same_job,
    read_source_facts,
    write_manifest,
)
from reshard.target.side_files import collect_side_files, list_names
from reshard.target.tokenizer import WORD, find_tokenizer, note_lacking
from reshard.text import format_count, format_list, format_numbers, format_size
from reshard.types import RANKS, Note


def list_own_names(target: Path) -> set[str]:
    """Lists the files that an interrupted job may have left in its target, by its journal. Empty without a journal."""
    if not (target / JOURNAL).exists():
        return set()
    parts = {name for name in list_names(target) if name.endswith(PARTIAL) and is_part_name(name)}
    return {JOURNAL, *list_left_files(target), *parts}


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
        yield Problem("target-not-empty", str(target), found, "an empty folder, or none", "another target")
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
    manifests: Manifests
    """All manifests in the folder."""
    same: Mapping[str, Mapping[str, Any]]
    """Those of this conversion (perhaps for other ranks), by file name."""
    known: Mapping[str, Any]
    """The same joined into one; empty if there is none."""
    origin: Mapping[str, Any]
    """The part of the new manifest that describes the source."""

    @property
    def named(self) -> set[str]:
        """The rank files that the manifest of the whole folder names already."""
        return list_rank_files(self.same.get(MANIFEST, {}))

    @property
    def must_be_joined(self) -> bool:
        """Whether parts that were made apart lie here: `reshard.json` does not name all files that are known."""
        return not list_rank_files(self.known) <= self.named

    @property
    def part(self) -> str:
        """The other name of the manifest after the run, if that does not name all ranks; else empty."""
        ranks = {file.rank for file in self.plan.files} | {entry["rank"] for entry in self.known.get("files", ())}
        is_part = self.plan.layout.to == RANKS and len(ranks) < self.plan.layout.ranks
        return name_part_manifest(ranks) if is_part else ""

    @property
    def superseded(self) -> tuple[str, ...]:
        """Manifests of parts, under the names that we gave them, that the manifest after the run replaces; and those that
        an interrupted run has not finished.
        """
        begun = [name for name in list_names(self.folder) if name.endswith(PARTIAL)]
        names = [name for name in (*self.same, *begun) if is_part_name(name)]
        return tuple(name for name in names if name.removesuffix(PARTIAL) != self.part)


def look_at_target(plan: Plan, folder: Path, tokenizer_path: Path | None = None) -> TargetState:
    """Finds the files of a plan that remain to be written; writes nothing. The tokenizer is that of `tokenizer_path`,
    or of the source. Raises Refused if they cannot be written.
    """
    tokenizer = find_tokenizer(tokenizer_path, plan.recipe)
    plan = replace(plan, notes=(*plan.notes, *note_lacking(tokenizer, plan.recipe)))
    try:
        samples, headers = read_source_facts(plan)
        origin = describe_origin(plan, headers)
    except OSError as error:
        raise refuse("cannot-read", str(error.filename), error.strerror or str(error), "to read the source") from None
    manifests = read_manifests(folder)
    same = {name: one for name, one in manifests.named.items() if is_same_job(one, plan, samples)}
    known = join_manifests(same.values())
    sides = collect_side_files(plan, tokenizer)  # before finished ranks are left out: an index names all files
    require_none(check_unfinished(plan.source.folder, sides))
    if finished := find_finished_ranks(known, plan, folder):
        plan = keep_ranks(plan, [file.rank for file in plan.files if file.rank not in finished])
    state = TargetState(folder, plan, samples, sides, manifests, same, known, origin)
    require_none(check_state(state))
    if state.must_be_joined:
        state = replace(state, plan=replace(state.plan, notes=(*state.plan.notes, note_joined(state))))
    return state


def note_joined(state: TargetState) -> Note:
    """Notes which parts are joined, by the manifests that name them."""
    parts, known = [], state.named
    for name, one in state.same.items():
        if added := [entry["rank"] for entry in one["files"] if entry["name"] not in known]:
            parts.append(f"ranks {format_numbers(added)} of {name}")
        known |= list_rank_files(one)
    return Note("joined", f"parts that were made apart are joined into {MANIFEST}: {format_list(parts)}")


def check_state(state: TargetState) -> Iterator[Problem]:
    """Reports files that changed since this conversion wrote them; if there are none, reasons why the remaining files
    cannot be written.
    """
    found = [*check_side_files(state.known, state.sides), *check_written_files(state), *check_manifests(state)]
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

    kept = list_rank_files(state.known) - {file.name for file in state.plan.files}
    kept |= {MANIFEST, *state.sides, *state.same} if kept else set()
    check = partial(require_same, state)
    return OtherFiles(state.sides, write, check, state.part, frozenset(kept), state.superseded)


def require_same(state: TargetState) -> None:
    """Raises Refused if the manifests in the target are not those that were looked at."""
    if read_manifests(state.folder) != state.manifests:
        found = "another run has ended there just now"
        raise refuse("target-changed", str(state.folder), found, "none", "run it again")


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


def check_written_files(state: TargetState) -> Iterator[Problem]:
    """Reports finished files whose size differs from the manifest. Of files that were made apart, and that are now to
    be named by `reshard.json`, three byte ranges are compared too: the header, one in the middle and the last.
    """
    planned = {file.name for file in state.plan.files}
    remedy = "copy it here again, or move it out of the folder, and run the same command again"
    for entry in state.known.get("files", ()):
        path, is_adopted = state.folder / entry["name"], entry["name"] not in state.named
        if not path.exists() or not (is_adopted or entry["name"] in planned):
            continue
        if (size := path.stat().st_size) != entry["size"]:
            found, expected = f"{size:,} bytes", f"{entry['size']:,} bytes, as they were written"
            yield Problem("wrong-size", str(path), found, expected, remedy)
        elif is_adopted and (changed := find_changed_range(path, entry["ranges"])):
            subject = f"{path}: bytes {changed.offset:,} to {changed.stop:,}"
            expected = "those of the manifest of its part"
            yield Problem("wrong-checksum", subject, "other bytes than were written", expected, remedy)


def check_manifests(state: TargetState) -> Iterator[Problem]:
    """Reports a `reshard.json` of another conversion where the manifests of parts are of this one, and manifests of
    parts that are damaged.
    """
    remedy = "move it out of the folder, and run the same command again"
    if state.known and state.manifests.main and MANIFEST not in state.same:
        expected = f"that of {format_list(state.same)}"
        yield Problem("another-job", str(state.folder / MANIFEST), describe_other(state), expected, remedy)
    for name in state.manifests.damaged:
        expected = "what reshard has written"
        hint = f"copy it here again from the folder of its part; or {remedy}"
        yield Problem("wrong-manifest", str(state.folder / name), "damaged or changed", expected, hint)


def describe_other(state: TargetState, name: str = MANIFEST) -> str:
    """Describes in what the conversion of a manifest differs from this one."""
    manifest = state.manifests.named[name]
    keys = find_different_keys(manifest, state.plan, state.samples)
    words = {**OTHER_JOB, "layout": f"made with {format_conversion_options(manifest)}"}
    return f"of another conversion: {format_list(words[key] for key in keys)}"


OTHER_JOB = {
    "reshard": "another version of reshard",
    "recipe": "another recipe",
    "source": "another source",
    "subset": "other layers, experts or tensors",
    "source_samples": "other data in the source",
}
"""What differs between two conversions, by the keys whose values differ in their manifests."""


def mend_target(state: TargetState) -> list[str]:
    """Writes the side files and the manifest of its part that a finished target lacks, and returns their names; removes
    what a job that crashed after its last rename has left.

    Raises Refused if side files are missing while other ranks are half written: that job must end first.
    """
    target, sides = state.folder, list_lost_sides(state)
    part = [state.part] if state.part and not (target / state.part).exists() else []
    if any(name.endswith(PARTIAL) for name in list_left_files(target)):
        if sides:
            found, remedy = "an unfinished conversion of other ranks", "run its command again, then this one"
            raise refuse("another-job", str(target / JOURNAL), found, "none", remedy)
        return []
    if sides or part or state.superseded or (target / JOURNAL).exists():
        with ExitStack() as stack:
            lock_journal(stack, target / JOURNAL)
            require_same(state)
            write_side_files(target, {name: state.sides[name] for name in sides})
            for name in part:
                write_durable(target / (name + PARTIAL), (target / MANIFEST).read_bytes())
            rename_to_final(target, [*sides, *part], state.superseded)
    return [*sides, *part]


def check_room(state: TargetState) -> Iterator[Problem]:
    """Checks that the remaining files can be written, and that the folder holds only files of this conversion (perhaps
    for other ranks).
    """
    ours, planned = list_own_names(state.folder), {file.name for file in state.plan.files}
    if state.manifests.main and not state.known:
        expected, remedy = "an empty folder, none, or one of the same conversion", "another target"
        yield Problem("target-not-empty", str(state.folder / MANIFEST), describe_other(state), expected, remedy)
        return
    if state.known or not state.manifests.named:
        unknown = find_unknown_ranks(state, ours)
        if unknown:
            yield make_unknown_problem(state, unknown)
        if unknown or state.known:
            parts = {name for name in list_names(state.folder) if is_part_name(name)}
            ours |= {MANIFEST, *state.sides, *unknown.values(), *parts, *state.same}
        ours |= list_rank_files(state.known) - planned
    needed = state.plan.size + sum(side.size for side in state.sides.values())
    yield from check_folder(state.plan.path, state.folder, needed, ours)


def find_unknown_ranks(state: TargetState, ours: set[str]) -> dict[int, str]:
    """Finds the rank files that lie in the folder, though no manifest names them and no interrupted job left them."""
    layout = state.plan.layout
    ranks = range(layout.ranks if layout.to == RANKS else 0)
    names = {rank: state.plan.recipe.files.format(rank=rank, ranks=layout.ranks) for rank in ranks}
    known = ours | list_rank_files(state.known)
    return {rank: name for rank, name in names.items() if name not in known and (state.folder / name).exists()}


def make_unknown_problem(state: TargetState, names: Mapping[int, str]) -> Problem:
    """Makes the problem of rank files, by rank, that no manifest vouches for: nobody knows what made them."""
    found = f"{format_count(len(names), 'files')} that no manifest here names: {format_list(names.values())}"
    others = [f"{name} is {describe_other(state, name)}" for name in state.manifests.named if name not in state.same]
    remedy = f"copy {MANIFEST} of the folder that they were made in here as {name_part_manifest(names)}"
    remedy += "; or move them out of the folder: the same command then writes them"
    return Problem("no-manifest", str(state.folder), "; ".join([found, *others]), "the manifest of their part", remedy)
