"""The command `verify`: what is held against what, and what is said of it."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from reshard.audit import audit_target
from reshard.books import MANIFEST
from reshard.convert import Job, recipe_for
from reshard.errors import describe, printable, refuse
from reshard.found import require_folder
from reshard.match import match
from reshard.output import PROBLEMS, PROVEN, print_json
from reshard.progress import progress
from reshard.ranks import RankNames, ranks_at
from reshard.read import read_checkpoint
from reshard.recipe import recipes_to_try
from reshard.sources import known_manifest, read_source, subset_of
from reshard.subset import narrowed
from reshard.subset_text import asked_of, subset_lines, subset_text
from reshard.text import counted
from reshard.types import Checkpoint, File, Recipe
from reshard.verify import Report, verify_target


def run_verify(options: argparse.Namespace) -> int:
    require_folder(options.target)
    total = sum(path.stat().st_size for path in options.target.glob("*.safetensors") if path.is_file())
    if options.source is None:
        if options.ranks is not None or options.recipe:
            raise refuse("wrong-option", "--ranks and --recipe", "no --source", "both with --source only")
        with progress("verify", total) as advance:
            report = audit_target(options.target, advance, options.sample)
        return say_report(report, options.target, Path(MANIFEST), as_json=options.json)
    if names := ranks_at(options.source, recipes_to_try(options.recipe)):
        return verify_restored(options, names)
    source = read_checkpoint(options.source, ignore_extra_files=options.ignore_extra_files)
    recipe = recipe_for(Job(options.source, 1, options.recipe), source)
    require_its_recipe(options.target, recipe)
    match(source, recipe)  # a recipe that does not fit would find every tensor wrong
    source = as_chosen(source, recipe, options.source, options.target)
    with progress("verify", total) as advance:
        report = verify_target(options.target, source, recipe, advance, options.ranks, options.sample)
    report = with_note(report, options.target, source.files)
    return say_report(report, options.target, options.source, as_json=options.json)


def require_its_recipe(target: Path, recipe: Recipe) -> None:
    """By another recipe than the target was made with, every tensor would be wrong. Raises Refused."""
    made_with = known_manifest(target).get("recipe")
    name = made_with.get("name") if isinstance(made_with, dict) else recipe.name
    if name != recipe.name:
        found, remedy = f"made by the recipe {name}", "pass the file or the name of that recipe with --recipe"
        raise refuse("no-recipe", str(target), found, f"the recipe {recipe.name}, which the source wants", remedy)


def as_chosen(source: Checkpoint, recipe: Recipe, path: Path, target: Path) -> Checkpoint:
    """What of a source the target holds, by its manifest: all of it if that says nothing else, or is none."""
    before, now = subset_of(path), subset_of(target)
    if not now:
        return replace(source, subset=before)
    return narrowed(replace(source, subset=before), recipe, asked_of(before, now, str(target)))


def require_same_subset(source: Path, target: Path) -> None:
    """What was chosen of rank files cannot be held against all of them. Raises Refused."""
    if (now := subset_of(target)) != subset_of(source):
        remedy = "verify it without --source, by the checksums of its manifest"
        raise refuse(
            "incomplete-source", str(target), subset_text(now) or "a whole model", "what the ranks hold", remedy
        )


def verify_restored(options: argparse.Namespace, names: RankNames) -> int:
    """A checkpoint that was made of rank files, turned about: whether the rank files are cut from it.

    So it is as independent of how the parts were put together as any `verify`.
    """
    recipes = names.recipes
    if ranks_at(options.target, recipes):
        found, remedy = "rank files, as the target has them", "reshard diff; or hold both against the whole checkpoint"
        raise refuse("rank-files", "--source", found, "what the target was made from, whole", remedy)
    require_same_subset(options.source, options.target)
    source = read_checkpoint(options.target, ignore_extra_files=options.ignore_extra_files)
    source = replace(source, subset=subset_of(options.target))
    ranks = read_source(options.source, options.recipe)
    recipe = ranks.recipe
    match(source, recipe)
    total = sum(path.stat().st_size for path in options.source.glob("*.safetensors") if path.is_file())
    with progress("verify", total) as advance:
        report = verify_target(options.source, source, recipe, advance, options.ranks, options.sample)
    report = with_note(report, options.target, ranks.checkpoint.files)
    return say_report(report, options.target, options.source, as_json=options.json)


def with_note(report: Report, target: Path, files: Sequence[File]) -> Report:
    """Where there are problems: whether the manifest of a target says that it was made from other files than these."""
    known = known_manifest(target).get("source") if report.problems else None
    given = [{"name": file.name, "size": file.size, "header_sha256": file.header_hash} for file in files]
    if known is None or known == given:
        return report
    return replace(report, note=f"{MANIFEST} says that this was made from another checkpoint than the --source")


def say_report(report: Report, target: Path, source: Path, *, as_json: bool) -> int:
    """Prints what was compared; the exit code says whether a difference was found."""
    sample = f"sampled: {report.compared:,} of {report.size:,} bytes"
    if as_json:
        proven = "sampled" if report.is_sampled else "proven"
        print_json({"status": "differs" if report.problems else proven, **asdict(report)})
    elif report.problems:
        print(f"{printable(str(target))}: {counted(len(report.problems), 'problems')}")
        if report.note:
            print(report.note)
        print(describe(report.problems))
        if report.is_sampled:
            print(sample)
    else:
        print(printable(f"{target}: {'sampled' if report.is_sampled else 'proven'} against {source}"))
        result = f"{sample}, no difference" if report.is_sampled else f"{report.size:,} bytes, all equal"
        files = (
            counted(report.files, "whole files") if report.is_whole else f"{report.files} of {report.ranks} rank files"
        )
        print(f"{files}, {counted(report.tensors, 'tensors')}, {result}")
        if report.inexact:
            print(f"rounded: {counted(report.inexact, 'values')} that the new dtype does not have, each to the nearest")
    for line in subset_lines(report.subset) if not as_json else ():
        print(printable(line))
    return PROBLEMS if report.problems else PROVEN
