"""Begins a finished target again (`--restart --yes`): the files that are removed for it, as the manifests name them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reshard.errors import Problem, Refused, refuse
from reshard.execution.staging import STAGING, find_staged_files
from reshard.execution.store_journal import list_job_names
from reshard.formats.huggingface import is_safetensors_name
from reshard.formats.manifest import list_rank_files
from reshard.formats.part_manifests import Manifests, choose_of_one_conversion, is_part_name
from reshard.formats.target_names import JOURNAL, LOCK, MANIFEST, PARTIAL, STORE_RECORD, list_names
from reshard.paths import AnyPath, RemotePath
from reshard.planning.plan import Plan
from reshard.storage.opened import measure_path
from reshard.target.left_files import has_left_files, read_job
from reshard.target.state import TargetState, compute_path_checksum, has_size
from reshard.text import format_count, format_list, format_size

MOST_NAMED = 20
"""So many files are named; the number and the size of all is told too."""


def choose_files_to_remove(
    folder: AnyPath, plan: Plan, manifests: Manifests, same: Mapping[str, Mapping[str, Any]], *, yes: bool
) -> tuple[str, ...]:
    """Chooses the finished files that a restart removes. Without `yes` those are chosen that it would remove, so that
    somebody can be asked; but where a run has not ended, only what that run has begun is thrown away, and none removed.
    """
    if yes or not same or not has_left_files(folder):
        return tuple(list_files_to_remove(folder, plan, manifests, same))
    return ()


def list_files_to_remove(
    folder: AnyPath, plan: Plan, manifests: Manifests, same: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Lists the finished files that a plan would write anew, and what is of no use without them. Of another conversion
    these are all its files. Only what a manifest names is listed; the manifests come last, so that after a crash they
    still name what is left.
    """
    planned = {file.name for file in plan.files}
    chosen = same or choose_of_one_conversion(manifests)
    if not manifests.main or (same and MANIFEST not in same):
        return  # parts of other conversions, or of several: what is whose is for a person to say
    files = {name for one in chosen.values() for name in list_rank_files(one)}
    if same and not files <= planned:
        yield from (name for name in sorted(files & planned) if (folder / name).is_file())
        return
    sides = {entry["name"] for one in chosen.values() for entry in one["side_files"]}
    own = [name for name in reversed([*chosen]) if name == MANIFEST or is_part_name(name)]
    staged = []
    if isinstance(folder, Path):  # in a store nothing is repaired
        staged = [f"{STAGING}/{name}" for one in chosen.values() for name in find_staged_files(folder, one)]
    names = [*sorted({*staged}), *sorted(files), *sorted(sides - files), STORE_RECORD, *own]
    yield from (name for name in names if (folder / name).is_file())


def check_begun_removal(state: TargetState) -> Iterator[Problem]:
    """Reports a restart of finished files in a store that has ended among its removals: what is left of them is neither
    finished nor to be gone on with.
    """
    if not isinstance(state.folder, RemotePath) or state.removed:
        return
    begun, known = list_job_names(read_job(state.folder), "files"), list_rank_files(state.known)
    planned = {file.name for file in state.plan.files}
    if planned & known and begun <= known and begun - planned:
        found = f"finished, but for {format_list(sorted(planned & known))}: --restart --yes has begun to remove it"
        remedy = "--restart --yes goes on with that; or another target"
        yield Problem("another-job", str(state.folder), found, "a target that is not being removed", remedy)


def list_files_beside(state: TargetState) -> set[str]:
    """Lists the files that a restart leaves beside what it writes: those of other people, if no name of theirs is
    written and they are no tensor files. None if finished files are not removed.
    """
    if not state.removed:
        return set()
    written = {MANIFEST, JOURNAL, LOCK, *state.sides, *(file.name for file in state.plan.files)}
    written |= {name + PARTIAL for name in written}
    return {name for name in list_names(state.folder) if name not in written and not is_safetensors_name(name)}


def check_removed_files(state: TargetState) -> Iterator[Problem]:
    """Reports files that a restart would remove, and then has to read: through links, or as another tokenizer."""
    names = {identify_path(state.folder / name): name for name in state.removed}
    source = [state.plan.source.folder / file.name for file in state.plan.source.files]
    read = [*source, *(side.origin for side in state.sides.values() if not isinstance(side.origin, bytes))]
    for path in read:
        if name := names.get(identify_path(path)):
            found, expected = f"read as {path}", "files of the target that nothing is made of"
            yield Problem("target-inside-source", str(state.folder / name), found, expected, "another target")


def identify_path(path: AnyPath) -> str:
    """The name of a file that two paths to it have alike: without links, or an address."""
    return str(path.resolve() if isinstance(path, Path) else path)


def leave_out_files(manifest: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """Leaves rank files out of a manifest; empty if no other is left."""
    files = [entry for entry in manifest.get("files", ()) if entry["name"] not in names]
    return {**manifest, "files": files} if files else {}


def refuse_to_remove(state: TargetState) -> Refused:
    """Makes the refusal of a restart that would remove finished files, with their names and their size; and with those
    that a person may have changed.
    """
    folder, names = state.folder, state.removed
    written = {entry["name"]: entry for entry in state.manifests.main.get("side_files", ()) if entry["name"] in names}
    changed = [name for name, entry in written.items() if not is_as_written(folder / name, entry)]
    size = sum(measure_path(folder / name) for name in names)
    count = f"{format_count(len(names), 'files')}, {size:,} bytes ({format_size(size)})"
    found = f"finished; --restart would remove {count}: {format_list(names, MOST_NAMED)}"
    if changed:
        found += f"; of these, changed since they were written: {format_list(changed)}"
    remedy = "add --yes to remove them and write the target anew"
    remedy += "; if a file is damaged, reshard repair writes only that" if isinstance(folder, Path) else ""
    return refuse("finished-target", str(folder), found, "--yes, or a target that is not finished", remedy)


def is_as_written(path: AnyPath, entry: Mapping[str, Any]) -> bool:
    """Whether a side file is as its entry in the manifest says."""
    return has_size(path, entry["size"]) and compute_path_checksum(path) == entry["xxh3_128"]
