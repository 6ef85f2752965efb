"""Begins a finished target again (`--restart --yes`): the files that are removed for it, as the manifests name them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reshard.errors import Problem, Refused, refuse
from reshard.execution.journal import has_partial_files
from reshard.execution.staging import STAGING, find_staged_files
from reshard.formats.huggingface import is_safetensors_name
from reshard.formats.manifest import list_rank_files
from reshard.formats.part_manifests import Manifests, choose_of_one_conversion, is_part_name
from reshard.formats.target_names import JOURNAL, MANIFEST, PARTIAL, list_names
from reshard.planning.plan import Plan
from reshard.target.state import TargetState
from reshard.text import format_count, format_list, format_size
from reshard.verification.checksums import find_damaged_side_files

MOST_NAMED = 20
"""So many files are named; the number and the size of all is told too."""


def choose_files_to_remove(
    folder: Path, plan: Plan, manifests: Manifests, same: Mapping[str, Mapping[str, Any]], *, yes: bool
) -> tuple[str, ...]:
    """Chooses the finished files that a restart removes. Without `yes` those are chosen that it would remove, so that
    somebody can be asked; but where a run has not ended, only what that run has begun is thrown away, and none removed.
    """
    if yes or not same or not has_partial_files(folder):
        return tuple(list_files_to_remove(folder, plan, manifests, same))
    return ()


def list_files_to_remove(
    folder: Path, plan: Plan, manifests: Manifests, same: Mapping[str, Mapping[str, Any]]
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
    staged = [f"{STAGING}/{name}" for one in chosen.values() for name in find_staged_files(folder, one)]
    names = [*sorted({*staged}), *sorted(files), *sorted(sides - files), *own]
    yield from (name for name in names if (folder / name).is_file())


def list_files_beside(state: TargetState) -> set[str]:
    """Lists the files that a restart leaves beside what it writes: those of other people, if no name of theirs is
    written and they are no tensor files. None if finished files are not removed.
    """
    if not state.removed:
        return set()
    written = {MANIFEST, JOURNAL, *state.sides, *(file.name for file in state.plan.files)}
    written |= {name + PARTIAL for name in written}
    return {name for name in list_names(state.folder) if name not in written and not is_safetensors_name(name)}


def check_removed_files(state: TargetState) -> Iterator[Problem]:
    """Reports files that a restart would remove, and then has to read: through links, or as another tokenizer."""
    names = {(state.folder / name).resolve(): name for name in state.removed}
    source = [state.plan.source.folder / file.name for file in state.plan.source.files]
    read = [*source, *(side.origin for side in state.sides.values())]
    for path in (path for path in read if isinstance(path, Path)):
        if name := names.get(path.resolve()):
            found, expected = f"read as {path}", "files of the target that nothing is made of"
            yield Problem("target-inside-source", str(state.folder / name), found, expected, "another target")


def leave_out_files(manifest: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    """Leaves rank files out of a manifest; empty if no other is left."""
    files = [entry for entry in manifest.get("files", ()) if entry["name"] not in names]
    return {**manifest, "files": files} if files else {}


def refuse_to_remove(state: TargetState) -> Refused:
    """Makes the refusal of a restart that would remove finished files, with their names and their size; and with those
    that a person may have changed.
    """
    folder, names = state.folder, state.removed
    changed = [entry["name"] for entry in find_damaged_side_files(folder, state.manifests.main)]
    changed = [name for name in changed if name in names]
    size = sum((folder / name).stat().st_size for name in names)
    count = f"{format_count(len(names), 'files')}, {size:,} bytes ({format_size(size)})"
    found = f"finished; --restart would remove {count}: {format_list(names, MOST_NAMED)}"
    if changed:
        found += f"; of these, changed since they were written: {format_list(changed)}"
    remedy = "add --yes to remove them and write the target anew; if a file is damaged, reshard repair writes only that"
    return refuse("finished-target", str(folder), found, "--yes, or a target that is not finished", remedy)
