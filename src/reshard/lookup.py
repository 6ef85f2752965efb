"""The commands that look and do not plan. Apart from the others, so that they start without numpy."""

import argparse
from dataclasses import asdict
from pathlib import Path

from reshard.errors import printable, refuse
from reshard.inspect import content_text, counts_of, inspect_path
from reshard.output import PROVEN, print_json
from reshard.read import read_checkpoint
from reshard.recipe import load_recipe, packaged_recipes
from reshard.text import table


def run_inspect(options: argparse.Namespace) -> int:
    content = inspect_path(options.path)
    if options.json:
        print_json(asdict(content))
    else:
        print("\n".join(map(printable, content_text(content).split("\n"))))
    return PROVEN


def run_recipes(options: argparse.Namespace) -> int:
    if options.action == "list":
        return list_recipes(as_json=options.json)
    if not options.recipe:
        raise refuse(
            "wrong-option", f"recipes {options.action}", "no recipe", "a name or a file", "see reshard recipes"
        )
    if options.action == "show":
        return show_recipe(options.recipe, as_json=options.json)
    if not options.source:
        raise refuse("wrong-option", "recipes check", "no source", "a checkpoint to hold the recipe against")
    return check_recipe(options.recipe, options.source, as_json=options.json)


def list_recipes(*, as_json: bool) -> int:
    recipes = packaged_recipes()
    if as_json:
        print_json([asdict(recipe) for recipe in recipes])
    else:
        rows = [(recipe.name, recipe.about) for recipe in recipes]
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:{width}}  {about}" for name, about in rows))
    return PROVEN


def show_recipe(name: str, *, as_json: bool) -> int:
    recipe = load_recipe(name)
    if as_json:
        print_json(asdict(recipe))
    else:
        text = Path(recipe.origin).read_text(encoding="utf-8").rstrip("\n")
        print("\n".join(map(printable, text.split("\n"))))
    return PROVEN


def check_recipe(name: str, source: Path, *, as_json: bool) -> int:
    """Holds a recipe against a checkpoint: every tensor under one rule, none missing. Raises Refused otherwise."""
    checkpoint = read_checkpoint(source)
    counts = counts_of(checkpoint, load_recipe(name))
    if as_json:
        print_json({"status": "fits", "tensors": len(checkpoint.tensors), "counts": counts})
    else:
        rows = [(counted, f"{count:,}") for counted, count in counts.items()]
        lines = [f"{name} fits {source}: {len(checkpoint.tensors):,} tensors, each under one rule"]
        lines += table(("", "found"), rows).split("\n")
        print("\n".join(map(printable, lines)))
    return PROVEN
