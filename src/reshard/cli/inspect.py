"""Runs the commands `inspect` and `recipes`."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from reshard.cli.bars import FileParts, format_bars, make_label
from reshard.cli.outcome import PROVEN
from reshard.cli.terminal import print_json
from reshard.errors import Refused, require_none
from reshard.formats.remote_names import require_path, restore_address
from reshard.inspection.contents import Content, inspect_path
from reshard.inspection.recipe_fit import check_fit
from reshard.inspection.tensor_list import ListedTensor, read_tensor_list
from reshard.pages.contents_page import format_contents_page
from reshard.pages.page_file import check_page_path, describe_page_file, name_page, write_page
from reshard.recipes.formulas import describe_unknown_keys
from reshard.recipes.recipe import describe_recipe, list_packaged_recipes, load_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.stacked_experts import read_under_hub_names
from reshard.text import escape, format_count, format_table


def run_inspect(options: argparse.Namespace) -> int:
    """Runs `inspect`. Returns the exit code. Raises Refused."""
    require_none(check_page_path(options.html, (options.path, options.config)) if options.html else ())
    content = inspect_path(
        options.path,
        options.recipe,
        options.tensors,
        ignore_extra_files=options.ignore_extra_files,
        config=options.config,
    )
    if options.html:
        write_page(options.html, format_contents_page(content, read_drawn_tensors(content, options)))
    if options.json:
        status = "unfinished" if content.unfinished or not content.files else "finished"
        notes, page = [note._asdict() for note in content.notes], describe_page_file(options.html)
        print_json({"status": status, **asdict(content), "notes": notes, **page})
    else:
        parts = [FileParts(make_label(file.name), file.dtypes) for file in content.by_file]
        bars = format_bars(parts) if content.listed is None else ()
        print("\n".join([str(content), *bars, *map(escape, name_page(options.html))]))
    return PROVEN


def read_drawn_tensors(content: Content, options: argparse.Namespace) -> Sequence[ListedTensor]:
    """Reads all tensors, for a page; none where there is no finished file, or where files are missing without which
    tensors are not whole. Raises Refused for anything else: a file may have changed since the content was read.
    """
    try:
        return read_tensor_list(require_path(options.path), options.recipe) if content.files else ()
    except Refused as refused:
        if any(problem.kind != "missing-file" for problem in refused.problems):
            raise
        return ()


def run_recipes(options: argparse.Namespace) -> int:
    """Runs `recipes list`, `show` or `check`. Returns the exit code. Raises Refused."""
    if options.action == "show":
        return show_recipe(options.recipe, as_json=options.json)
    if options.action == "check":
        return check_recipe(options.recipe, options.source, as_json=options.json)
    return list_recipes(as_json=options.json)


def list_recipes(*, as_json: bool) -> int:
    """Prints the packaged recipes, each with the models that it was checked against. Returns the exit code."""
    recipes = list_packaged_recipes()
    if as_json:
        print_json([describe_recipe(recipe) for recipe in recipes])
    else:
        width = max(len(recipe.name) for recipe in recipes)
        for recipe in recipes:
            chosen = f"; chosen with --for {recipe.engine}, or by its name" if recipe.engine else ""
            chosen = "; chosen by its name" if recipe.by_name else chosen
            print(f"{recipe.name:{width}}  {recipe.about}{chosen}")
            print(f"{'':{width}}  checked against: {recipe.checked}")
    return PROVEN


def show_recipe(name: str, *, as_json: bool) -> int:
    """Prints a recipe, as its TOML text or as JSON. Returns the exit code. Raises Refused."""
    recipe = load_recipe(name)
    if as_json:
        print_json(describe_recipe(recipe))
    else:
        text = Path(recipe.origin).read_text(encoding="utf-8").rstrip("\n")
        print("\n".join(map(escape, text.split("\n"))))
    return PROVEN


def name_recipe_argument(text: str) -> str:
    """A text with the words for the recipe that `recipes check` has: it takes it as an argument, and no option."""
    text = re.sub(r"with --recipe(?: FILE)?", "as RECIPE", text)
    return text.replace("--recipe", "RECIPE").replace("--ignore-extra-files", "--ignore-extra-files of convert")


def check_recipe(name: str, source: Path, *, as_json: bool) -> int:
    """Checks that a recipe fits a checkpoint: each tensor is covered by one rule and agrees with the config, none is
    missing. Returns the exit code. Raises Refused if it does not fit.
    """
    try:
        recipe = load_recipe(name)
        fit = check_fit(read_under_hub_names(read_checkpoint(require_path(source)), [recipe]), recipe)
    except Refused as refused:
        raise refused.reworded(name_recipe_argument) from None
    if as_json:
        told = {"tensors": fit.tensors, "counts": fit.counts, "not_in_config": fit.unknown_keys, "packed": fit.packed}
        print_json({"status": "fits", **told})
    else:
        rows = [(counted, f"{count:,}") for counted, count in fit.counts.items()]
        lines = [f"{name} fits {restore_address(source)}: {fit.tensors:,} tensors, each under one rule"]
        lines += format_table(("", "found"), rows).split("\n")
        lines += [describe_unknown_keys(fit.unknown_keys)] if fit.unknown_keys else []
        packed = f"note: {format_count(fit.packed, 'packed weights')} count as BF16, as with --cast bf16"
        lines += [packed] if fit.packed else []
        print("\n".join(map(escape, lines)))
    return PROVEN
