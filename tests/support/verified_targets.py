"""Targets compared with a checkpoint that is there already, by a recipe that the test names."""

from collections.abc import Collection
from fractions import Fraction
from pathlib import Path

from reshard.recipe_types import Recipe
from reshard.types import Advance, Checkpoint
from reshard.verification.report import Report
from reshard.verification.verify import trace_target, verify_traced


def verify_target(
    target: Path,
    source: Checkpoint,
    recipe: Recipe,
    advance: Advance = lambda _: None,
    ranks: Collection[int] | None = None,
    sample: Fraction | None = None,
) -> Report:
    traced = trace_target(target, source, recipe, ranks, stacked=None, packed=None, ignore_extra_files=False)
    return verify_traced(traced, advance, sample)
