"""Finds what lies in a target and was not made by its conversion: another one, and files that nobody vouches for."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from reshard.errors import Problem
from reshard.execution.other_jobs import describe_other_job
from reshard.formats.manifest import list_rank_files
from reshard.formats.part_manifests import is_part_name, is_same_conversion, name_part_manifest
from reshard.formats.target_names import MANIFEST, STORE_RECORD, list_names
from reshard.planning.file_layout import name_rank_files
from reshard.recipes.recipe import has_ranks
from reshard.target.left_files import list_own_names
from reshard.target.manifest_writer import describe_conversion_job
from reshard.target.state import TargetState, describe_other
from reshard.text import format_count, format_list
from reshard.types import RANKS, SLICED


def check_vouched(state: TargetState, unknown: Mapping[int, str]) -> Iterator[Problem]:
    """Reports a finished conversion of another job, or the `unknown` rank files, by rank, that nobody vouches for."""
    if is_other_conversion(state):
        yield explain_other_conversion(state, state.manifests.main)
    elif unknown:
        yield make_unknown_problem(state, unknown)


def is_other_conversion(state: TargetState) -> bool:
    """Whether the target has a finished conversion of another job."""
    return bool(state.manifests.main) and not (state.known or state.removed)


def find_own_files(state: TargetState) -> tuple[set[str], dict[int, str]]:
    """Finds the files in a target that are of its conversion; and rank files, by rank, that no manifest vouches for."""
    ours, unknown = list_own_names(state.folder) | {*state.removed}, dict[int, str]()
    if state.known or not state.manifests.named:
        unknown = find_unknown_ranks(state, ours)
        if unknown or state.known:
            parts = {name for name in list_names(state.folder) if is_part_name(name)}
            ours |= {MANIFEST, STORE_RECORD, *state.sides, *unknown.values(), *parts, *state.same}
        ours |= list_rank_files(state.known) - {file.name for file in state.plan.files}
    return ours, unknown


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


def find_unknown_ranks(state: TargetState, ours: set[str]) -> dict[int, str]:
    """Finds the rank files that lie in the folder, though no manifest names them and no interrupted job left them."""
    recipe, layout = state.plan.recipe, state.plan.layout
    is_of_ranks = layout.to == SLICED or (layout.to == RANKS and has_ranks(recipe))
    names = dict(enumerate(name_rank_files(recipe, layout) if is_of_ranks else ()))
    known = ours | list_rank_files(state.known)
    return {rank: name for rank, name in names.items() if name not in known and (state.folder / name).exists()}


def make_unknown_problem(state: TargetState, names: Mapping[int, str]) -> Problem:
    """Makes the problem of rank files, by rank, that no manifest vouches for: nobody knows what made them."""
    found = f"{format_count(len(names), 'files')} that no manifest here names: {format_list(names.values())}"
    others = [f"{name} is {describe_other(state, name)}" for name in state.manifests.named if name not in state.same]
    remedy = f"copy {MANIFEST} of the folder that they were made in here as {name_part_manifest(names)}"
    remedy += "; or move them out of the folder: the same command then writes them"
    return Problem("no-manifest", str(state.folder), "; ".join([found, *others]), "the manifest of their part", remedy)
