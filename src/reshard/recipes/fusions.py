"""Fused tensors: those of the right side that are made of several tensors of the left side.

    concat    q_proj, k_proj, v_proj                       ->  qkv_proj: q, k, v
    stack     experts 0 and 1, each of gate_proj, up_proj  ->  w13: gate 0, up 0, gate 1, up 1

Each left tensor is cut for the rank by its own row first. The parts follow one another along the first dimension; a
stack begins with a new dimension, of the members. In both cases the bytes of the parts follow one another.
"""

from typing import NamedTuple

from reshard.recipe_types import Recipe
from reshard.recipes.patterns import PLACEHOLDER

FUSED = ("concat", "stack")
"""The relations of rows that make a fused tensor together."""


class Fusion(NamedTuple):
    """A fused tensor of a recipe."""

    right: str
    """Its name pattern."""
    rules: tuple[int, ...]
    """Indices of its rows in the recipe, in the order of their parts: of all parts, or of those of one member."""
    stacked: str
    """The placeholder whose members are stacked, one letter; empty for a `concat`."""


def list_fusions(recipe: Recipe) -> list[Fusion]:
    """Lists the fused tensors of a recipe, in the order of its rows."""
    rules: dict[str, list[int]] = {}
    for number, rule in enumerate(recipe.rules):
        if rule.relation in FUSED:
            rules.setdefault(rule.right, []).append(number)
    return [
        Fusion(right, tuple(numbers), find_stacked(recipe.rules[numbers[0]].left, right))
        for right, numbers in rules.items()
    ]


def find_stacked(left: str, right: str) -> str:
    """Finds the placeholder that only the left name has, one letter; empty if there is none."""
    names = PLACEHOLDER.findall(right)
    return next((name for name in PLACEHOLDER.findall(left) if name not in names), "")
