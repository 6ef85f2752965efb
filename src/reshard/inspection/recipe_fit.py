"""Whether a recipe fits a checkpoint; a recipe derived for one."""

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from reshard.errors import Problem, refuse, require_none
from reshard.formats.folder import read_checkpoint
from reshard.formats.huggingface import CONFIG, file_names
from reshard.formats.manifest import manifest_at
from reshard.recipes.derive import kept_of, model_of, recipe_text
from reshard.recipes.recipe import packaged_recipes, parse_recipe
from reshard.sources.block_scales import config_problems, kinds_of, pairing_problems
from reshard.sources.match import match
from reshard.sources.rank_names import find_foreign_recipe, find_rank_names
from reshard.types import Checkpoint, Layout

LAYER_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
"""How configs say how many layers there are."""


def derive_recipe(folder: Path) -> str:
    """A recipe for a checkpoint, by transformers' plans: that for expert parallelism where there is one, else that for
    tensor parallelism. Raises Refused with everything that cannot be derived.
    """
    require_source(folder)
    checkpoint = read_checkpoint(folder)
    if checkpoint.config is None:
        raise refuse("no-config", str(folder / CONFIG), "no such file", "the config of the model", "copy it there")
    require_layers(checkpoint, checkpoint.config)
    model = model_of(folder)
    problems: list[Problem] = []
    kept = list(kept_of(checkpoint, model, checkpoint.config, problems))
    require_none(problems)
    text = recipe_text(kept, model.about, checkpoint.config)
    require_fit(checkpoint, text)
    return text


def require_source(folder: Path) -> None:
    """It is a folder, and no rank files lie in it. Raises Refused."""
    if folder.is_file():
        raise refuse("no-source", str(folder), "a file", "the folder of a checkpoint", f"name {folder.parent}")
    recipes = packaged_recipes()
    if folder.is_dir() and (
        find_foreign_recipe(manifest_at(folder), recipes) or find_rank_names(folder, file_names(folder), recipes)
    ):
        expected, remedy = "a Hugging Face checkpoint", "name what they were cut from"
        raise refuse("rank-files", str(folder), "rank files", expected, remedy)


def require_layers(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """There are not more layers than tensors: to make a billion of them, even without weights, would take for ever."""
    most, tables = len(checkpoint.tensors), [config]
    while tables:
        table = tables.pop()
        for key in LAYER_KEYS:
            if isinstance(layers := table.get(key), int) and layers > most:
                raise refuse("contradiction", CONFIG, f"{key} of {layers:,}", f"at most {most:,}: as many as tensors")
        tables.extend(value for value in table.values() if isinstance(value, dict))


def require_fit(checkpoint: Checkpoint, text: str) -> None:
    """The derived recipe covers the checkpoint that it was derived from. Raises Refused."""
    recipe, layout = parse_recipe(text, "the derived recipe"), Layout(1)
    matched = match(checkpoint, recipe)
    kinds = kinds_of(matched, recipe, layout)
    problems = pairing_problems(matched, kinds, recipe, layout), config_problems(kinds, recipe, checkpoint.config)
    require_none(chain(*problems))
