"""The command `verify`."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from reshard.api import as_chosen, require_its_recipe, require_same_subset, with_note
from reshard.cli.terminal import PROBLEMS, PROVEN, print_json, progress
from reshard.errors import refuse
from reshard.formats.huggingface import read_checkpoint
from reshard.formats.manifest import subset_of
from reshard.formats.target_names import MANIFEST
from reshard.planning.plan import Job, recipe_for
from reshard.recipes.recipe import recipes_to_try
from reshard.sources.match import match
from reshard.sources.source import RankNames, ranks_at, read_source
from reshard.verification.checksums import audit_target
from reshard.verification.target_folder import require_folder
from reshard.verification.verify import Report, describe_report, verify_target


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


def say_report(report: Report, target: Path, source: Path, *, as_json: bool) -> int:
    """Prints what was compared; the exit code says whether a difference was found."""
    if as_json:
        proven = "sampled" if report.is_sampled else "proven"
        print_json({"status": "differs" if report.problems else proven, **asdict(report)})
    else:
        print(describe_report(report, target, source))
    return PROBLEMS if report.problems else PROVEN
