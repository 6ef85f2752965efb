"""The words of the command that made a conversion, by the layout and the subset in its manifest or journal.

Anyone can write these files: whoever prints the words as a command quotes them.
"""

from collections.abc import Iterator
from typing import Any

from reshard.formats.json_input import is_text
from reshard.formats.manifest import COUNTS, is_subset, read_conversion_options
from reshard.text import format_runs
from reshard.types import SLICED, WHOLE


def list_layout_words(layout: Any) -> Iterator[str]:
    """Lists the options that choose a layout: `--mp`, `8`, `--cast`, `bf16`."""
    layout = layout if isinstance(layout, dict) else {}
    to, ranks = layout.get("to"), ("--mp", str(layout.get("ranks", "N")))
    yield from {WHOLE: ("--to", "hf"), SLICED: ("--to", "dcp", *ranks)}.get(to, ranks) if isinstance(to, str) else ranks
    for option, value in read_conversion_options({"layout": layout}).items():
        yield from (option, value) if value else (option,)
    if layout.get("file_size"):
        yield from ("--max-file-size", str(layout["file_size"]))


def list_named_recipe_words(recipe: Any) -> Iterator[str]:
    """Lists the option that chooses the recipe in a manifest, if no model chooses it by itself: it is for an engine, or
    must be named. Not `--for`: it would not find a recipe that was named for another model type.
    """
    is_named = isinstance(recipe, dict) and (recipe.get("engine") or recipe.get("by_name") is True)
    name = recipe.get("name") if is_named else ""
    yield from ("--recipe", name) if name and is_text(name) else ()


def list_subset_words(subset: Any) -> Iterator[str]:
    """Lists the options that choose a part of a checkpoint; none of an entry that is not as reshard writes it."""
    if not is_subset(subset):
        return
    kept = {key: subset[key]["kept"] for key in COUNTS if key in subset}
    for key, numbers in kept.items():
        yield from (f"--{key}", ",".join(format_runs(numbers)))
    if any(numbers != [*range(len(numbers))] for numbers in kept.values()):
        yield "--renumber"
    for pattern in subset.get("only", ()):
        yield from ("--only", pattern)
