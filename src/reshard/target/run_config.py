"""run_config.json, which the inference code of the ranks is started with, by the `run` keys of the recipe."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from reshard.planning.plan import Plan
from reshard.recipe_types import Recipe
from reshard.recipes.formulas import UnknownKey, add_old_keys, compute_formula
from reshard.target.config_files import cast_config
from reshard.types import RANKS

RUN_CONFIG = "run_config.json"
"""Not `config.json`: a tokenizer that is loaded from the folder would read it."""


def make_run_config(plan: Plan) -> str:
    """Makes the configuration that the inference code of the ranks is started with. Empty without a config, for chosen
    tensors (`--only`), and if the code cannot run the model.

    Formatted like the published ones: keys in the order of the recipe, four spaces, lists on one line, no last newline.
    """
    if plan.config is None or not plan.recipe.run or "only" in plan.source.subset or any(find_run_obstacles(plan)):
        return ""
    config = add_old_keys(cast_config(plan, plan.config))
    config["target"] = collect_target_facts(plan)
    found = {}
    for key, rule in plan.recipe.run.items():
        formula, *default = rule if isinstance(rule, list) else (rule, None)
        try:
            value = compute_formula(formula, config, plan.recipe.sizes)
        except UnknownKey:
            value = None
        # Without a value the key is left out, unless the recipe asks for null.
        if value not in (default and [None, *default]):
            found[key] = value
    lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def find_run_obstacles(plan: Plan) -> Iterator[str]:
    """Finds the reasons why the inference code cannot run the model: values that the code fixes and the config changes.

    Then no run configuration is written: with one, the code would run another model.
    """
    needs = plan.recipe.run_needs if plan.recipe.run and plan.layout.to == RANKS else ()
    config = add_old_keys(plan.config or {})
    for formula, *allowed in needs:
        try:
            value = compute_formula(formula, config, plan.recipe.sizes)
        except UnknownKey:
            continue
        values = [find_needed_value(one, config, plan.recipe) for one in allowed]
        if value not in values:
            wanted = " or ".join("none" if one is None else json.dumps(one) for one in values)
            yield f"{formula} is {json.dumps(value)}; the inference code has {wanted}"


def explain_no_run_config(plan: Plan) -> Iterator[str]:
    """Explains why there is no run configuration; no line if there is one."""
    yield from (f"no run_config.json: {reason}" for reason in find_run_obstacles(plan))


def find_needed_value(allowed: Any, config: Mapping[str, Any], recipe: Recipe) -> Any:
    """Finds a value that a recipe allows. After `=` it is the value of a formula; None if the config lacks its keys."""
    if not (isinstance(allowed, str) and allowed.startswith("=")):
        return allowed
    try:
        return compute_formula(allowed[1:], config, recipe.sizes)
    except UnknownKey:
        return None


def collect_target_facts(plan: Plan) -> dict[str, Any]:
    """Collects facts of the rank files for formulas: the number of members of each placeholder, by its name; `dtype`,
    the dtype of the weights; `packed`, the name of a packed dtype or None.
    """
    dtypes = {tensor.dtype for tensor in plan.pieces.tensors}
    weights = "fp8" if "F8_E4M3" in dtypes and plan.layout.cast != "bf16" else "bf16"
    placeholders = plan.recipe.placeholders.values()
    left_out = {place.name: 0 for place in placeholders if place.optional and not plan.layout.keep_optional}
    return {**plan.counts, **left_out, "dtype": weights, "packed": "fp4" if "F4" in dtypes else None}
