"""Plans a repair: from the manifest of a target and its source, the plan of the files that are to be written again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from xxhash import xxh3_128_hexdigest

from reshard.errors import Problem, Refused, refuse, require_none
from reshard.execution.side_writer import SideFile, compute_side_checksum
from reshard.formats.boxed_folder import find_stored_files
from reshard.formats.huggingface import CONFIG, find_folder
from reshard.formats.manifest import COUNTS, read_subset
from reshard.formats.part_manifests import find_recipe_name
from reshard.formats.target_names import MANIFEST
from reshard.paths import AnyPath
from reshard.planning.plan import Plan
from reshard.planning.planner import keep_ranks, make_plan
from reshard.recipes.recipe import list_packaged_recipes
from reshard.sources.engine_choice import keeps_everything
from reshard.sources.source import read_source
from reshard.sources.verified_source import refuse_recipe
from reshard.storage.opened import open_regular_file
from reshard.target.manifest_writer import describe_plan, read_source_facts, sample_data
from reshard.target.side_files import collect_side_files
from reshard.text import format_count, format_list
from reshard.types import FIRST, Layout, Subset
from reshard.verification.manifest_files import ManifestFile

CONVERT_ANEW = "or convert into another folder"


@dataclass(frozen=True, slots=True)
class Damage:
    """The files of a target that are missing or not as they were written."""

    files: Sequence[ManifestFile]
    """Rank files, or whole files."""
    sides: Sequence[Mapping[str, Any]]
    """Side files, as entries of the manifest; each name once."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all of them."""
        return *(entry.name for entry in self.files), *(entry["name"] for entry in self.sides)


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """The part of a conversion that a repair does again."""

    plan: Plan
    """Of the damaged files only."""
    sides: Mapping[str, SideFile]
    """The damaged side files that the source gives as they were."""
    problems: Sequence[Problem]
    """Of those that it does not give as they were."""

    @property
    def size(self) -> int:
        """Of all files to be written, in bytes."""
        return self.plan.size + sum(side.size for side in self.sides.values())


def plan_repair(
    target: Path,
    manifest: Mapping[str, Any],
    damage: Damage,
    source: AnyPath,
    recipe: str | None,
    *,
    ignore_extra: bool,
    config_folder: AnyPath | None,
) -> RepairPlan:
    """Plans the files of a target that are damaged, with the options that its manifest names.

    Raises Refused if the source is not the one that it was made from, or if it gives files of another form today.
    """
    if config_folder is None and is_config_of_target_used(target, damage, source):
        config_folder = target
    plan = plan_as_before(target, manifest, source, recipe, ignore_extra=ignore_extra, config_folder=config_folder)
    require_none(check_same_source(target, manifest, plan, source))
    require_none(check_same_files(target, manifest, plan, damage.files))
    wanted = {entry.name for entry in damage.files}
    sides, problems = choose_sides(plan, damage.sides) if damage.sides else ({}, [])
    chosen = keep_ranks(plan, [file.rank for file in plan.files if file.name in wanted])
    return RepairPlan(chosen, sides, problems)


def is_config_of_target_used(target: Path, damage: Damage, source: AnyPath) -> bool:
    """Whether the config in a target, which is as it was written, stands in for the one that a source lacks. Not if
    other side files are damaged: the folder that had the config most likely has these too, and is to be named.
    """
    has_config = any((find_folder(source) / name).exists() for name in (CONFIG, MANIFEST))
    return not has_config and not damage.sides and (target / CONFIG).is_file()


def plan_as_before(
    target: Path,
    manifest: Mapping[str, Any],
    source: AnyPath,
    recipe: str | None,
    *,
    ignore_extra: bool,
    config_folder: AnyPath | None,
) -> Plan:
    """Plans the whole conversion that a manifest tells of. Raises Refused.

    The policies that the manifest does not name are the widest: what a file may hold is decided by its checksums.
    """
    layout = read_layout(target, manifest)
    subset = find_made_subset(read_subset(source), manifest.get("subset", {}))
    made_with = find_recipe_name(manifest)
    packaged = {known.name: known.origin for known in list_packaged_recipes()}
    if recipe is None and made_with not in packaged:
        raise refuse_recipe(target, made_with, "a packaged recipe")
    name = packaged[made_with] if recipe is None else recipe
    found = read_source(
        source,
        name,
        ignore_extra_files=ignore_extra,
        replicas=FIRST,
        subset=subset,
        keep_optional=layout.keep_optional or keeps_everything(layout, name, None),
        config_folder=config_folder,
        cast=layout.cast,
    )
    if found.recipe.name != made_with:
        raise refuse_recipe(target, made_with, f"the recipe {found.recipe.name}, as --recipe says")
    if problems := list(check_source_names(target, manifest, found.checkpoint.files, source)):
        raise Refused(problems)  # before the plan: another model may not suit the layout, which would tell nothing
    return make_plan(found, layout, only=subset.only)


def read_layout(target: Path, manifest: Mapping[str, Any]) -> Layout:
    """Reads the layout that a manifest tells of. Raises Refused for one that reshard does not write."""
    try:
        return msgspec.convert(manifest.get("layout"), Layout)
    except (ValueError, TypeError, RecursionError):
        expected = "a layout that this version knows"
        raise refuse(
            "wrong-manifest", str(target / MANIFEST), "another layout", expected, CONVERT_ANEW.removeprefix("or ")
        ) from None


def find_made_subset(source: Mapping[str, Any], target: Mapping[str, Any]) -> Subset:
    """Finds the choice that made a target of a source, which may be a subset itself; either is empty for all."""
    only = tuple(target.get("only", ()))
    if take_choices(source) == take_choices(target):
        return Subset(only=only)
    layers, experts = (tuple(target[key]["kept"]) if key in target else None for key in COUNTS)
    return Subset(layers, experts, renumber=layers is not None or experts is not None, only=only)


def take_choices(subset: Mapping[str, Any]) -> dict[str, Any]:
    """Takes the layers and experts out of a subset, without chosen names and counts."""
    return {key: value for key, value in subset.items() if key not in ("only", "left_out")}


def check_source_names(
    target: Path, manifest: Mapping[str, Any], files: Sequence[Any], source: AnyPath
) -> Iterator[Problem]:
    """Reports a source whose files have other names, sizes or headers than those that a target was made from."""
    known = manifest.get("source")
    given = [{"name": file.name, "size": file.size, "header_sha256": file.header_hash} for file in files]
    if known != given:
        others = [entry["name"] for entry in given if not isinstance(known, list) or entry not in known]
        found = f"{format_count(len(others), 'other files')}: {format_list(others)}" if others else "fewer files"
        yield make_source_problem(target, source, found)


def check_same_source(target: Path, manifest: Mapping[str, Any], plan: Plan, source: AnyPath) -> Iterator[Problem]:
    """Reports a source that has other bytes behind the same headers: samples of each file tell."""
    known = manifest.get("source_samples")
    try:
        samples, _ = read_source_facts(plan)
    except OSError as error:
        raise refuse("cannot-read", str(error.filename), error.strerror or str(error), "to read the source") from None
    if known != samples:
        before = known if isinstance(known, list) and len(known) == len(samples) else [""] * len(samples)
        pairs = zip(plan.source.files, before, samples, strict=True)
        changed = [file.name for file, old, new in pairs if old != new]
        found = f"other bytes, under the same headers, in {format_list(changed)}"
        yield make_source_problem(target, source, found)


def has_sampled_bytes(source: AnyPath, manifest: Mapping[str, Any]) -> bool:
    """Whether the files of a source have the names, headers and sampled bytes that a manifest tells of. A quick look:
    a plan is not made.
    """
    folder = source if source.is_dir() else source.parent
    try:
        files = find_stored_files(folder, [entry["name"] for entry in manifest["source"]])
        for file, entry, sample in zip(files, manifest["source"], manifest["source_samples"], strict=True):
            with open_regular_file(folder / file.name) as opened:
                if (file.size, file.header_hash, sample_data(opened, file)) != (
                    *(entry["size"], entry["header_sha256"]),
                    sample,
                ):
                    return False
    except (Refused, OSError, KeyError, TypeError, ValueError):
        return False
    return True


def make_source_problem(target: Path, source: AnyPath, found: str) -> Problem:
    """Makes the problem of a source that is not the one that a target was made from."""
    expected = f"the source that {target} was made from, as its {MANIFEST} describes it"
    return Problem("another-source", str(source), found, expected, f"name that one with --source; {CONVERT_ANEW}")


def check_same_files(
    target: Path, manifest: Mapping[str, Any], plan: Plan, damaged: Sequence[ManifestFile]
) -> Iterator[Problem]:
    """Reports damaged files that the plan does not have, or with another size or header: nothing would be proven."""
    planned = {file.name: file for file in plan.files}
    here = describe_plan(plan)
    version = manifest.get("reshard")
    for entry in damaged:
        file = planned.get(entry.name)
        if file and file.size == entry.size and xxh3_128_hexdigest(file.header) == entry.ranges[0].digest:
            continue
        found = "this conversion would write another file today"
        expected = f"as reshard {version} wrote it; this is reshard {here['reshard']}"
        same = [key for key in ("recipe", "subset", "layout") if manifest.get(key) != here.get(key)]
        expected += f", and {format_list(same)} differ" if same else ""
        remedy = f"repair it with reshard {version}; {CONVERT_ANEW}"
        yield Problem("another-job", f"{target / entry.name}", found, expected, remedy)


def choose_sides(plan: Plan, damaged: Sequence[Mapping[str, Any]]) -> tuple[dict[str, SideFile], list[Problem]]:
    """Chooses the side files that the source gives with the content that they had; the problems are of the others."""
    made, chosen, problems = collect_side_files(plan), {}, []
    for entry in damaged:
        side = made.get(entry["name"])
        if side and side.size == entry["size"] and compute_side_checksum(side) == entry["xxh3_128"]:
            chosen[entry["name"]] = side
            continue
        found = "other content in the source than when the target was made" if side else "not in the source"
        remedy = f"copy it to the target from where it is as it was; {CONVERT_ANEW}"
        remedy = remedy if side else f"name the folder that it came from with --config; or {remedy}"
        problems.append(Problem("source-changed", entry["name"], found, "the content that was written", remedy))
    return chosen, problems
