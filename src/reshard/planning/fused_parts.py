"""The parts of fused tensors: each is cut for the ranks as any tensor is, and numbered; parts that cannot be one tensor
are refused.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from reshard.errors import Problem, require_none
from reshard.planning.shards import Series, cut_for_ranks
from reshard.planning.transforms import Outcome, Terms
from reshard.recipe_types import Recipe
from reshard.recipes.fusions import Fusion, list_fusions
from reshard.recipes.patterns import list_slots
from reshard.sources.block_scales import WeightGroup
from reshard.text import format_list
from reshard.types import Layout


def cut_outcomes(outcomes: Iterable[Outcome], terms: Terms, counts: Mapping[str, int]) -> list[Series]:
    """Cuts all weight groups for the ranks, and numbers the parts of fused tensors. Raises Refused for parts that
    cannot be one tensor.
    """
    fusions = {number: fusion for fusion in list_fusions(terms.recipe) for number in fusion.rules}
    series: list[Series] = []
    for outcome in outcomes:
        fusion, made = fusions.get(outcome.kind.number), cut_for_ranks(outcome, terms, counts)
        series += [number_parts(one, outcome.kind, fusion, terms.recipe) for one in made] if fusion else made
    if fusions:
        require_none(check_part_forms(series, terms.recipe, terms.layout))
    return series


def number_parts(series: Series, kind: WeightGroup, fusion: Fusion, recipe: Recipe) -> Series:
    """Numbers the parts of fused tensors: the rows of the recipe in their order, in a stack for each member again."""
    parts = np.full(len(series.names), fusion.rules.index(kind.number), np.int64)
    if not fusion.stacked:
        return replace(series, parts=parts)
    place = list_slots(kind.rule, recipe).index(fusion.stacked)
    parts += len(fusion.rules) * np.array([int(numbers[place]) for numbers in kind.numbers], np.int64)
    return replace(series, parts=parts, of_member=len(fusion.rules))


def check_part_counts(kinds: Sequence[WeightGroup], recipe: Recipe, counts: Mapping[str, int]) -> Iterator[Problem]:
    """Reports each fused tensor that lacks parts: those of rows whose tensors may be missing."""
    for fusion in list_fusions(recipe):
        names: dict[int, Counter[str]] = {number: Counter() for number in fusion.rules}
        for kind in kinds:
            if kind.number in names:
                names[kind.number].update(kind.names)
        members = counts[fusion.stacked] if fusion.stacked else 1
        for name in dict.fromkeys(chain.from_iterable(names.values())):
            lacking = [recipe.rules[at].left for at in fusion.rules if names[at][name] != members]
            if lacking:
                found = f"{sum(each[name] for each in names.values()):,} of its {len(fusion.rules) * members:,} parts"
                expected = f"all of them; it lacks some of {format_list(lacking)}"
                yield Problem("missing-tensor", name, found, expected, "is a file missing from the checkpoint?")


def check_part_forms(series: Sequence[Series], recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """Reports parts of a fused tensor that differ in their dtype, or in more than the first dimension; and those that
    differ in that too, though the recipe says the same of them: members of a stack, gate and up.
    """
    remedy = "--cast bf16, if that makes them alike" if layout.cast != "bf16" else "is the checkpoint a mixture?"
    first: dict[str, tuple[Series, int]] = {}
    shapes: dict[tuple[str, str, str], tuple[int, ...]] = {}
    for one in series:
        for place, name in enumerate(one.names if one.parts is not None else ()):
            other, at = first.setdefault(name, (one, place))
            tensor, known = one.tensors[place], other.tensors[at]
            if tensor.dtype != known.dtype:
                expected = f"{known.dtype}, as {known.name}: both are parts of {name}"
                yield Problem("wrong-dtype", tensor.name, tensor.dtype, expected, remedy)
                continue
            # Without a config, rank files are taken apart by what the recipe says of each part: alike is as long.
            rule = recipe.rules[one.number]
            shape = shapes.setdefault((name, rule.split.text, rule.shape), one.cut.shape)
            if not one.cut.shape or shape != one.cut.shape or shape[1:] != other.cut.shape[1:]:
                wanted = ", ".join(map(str, shape if shape[1:] == other.cut.shape[1:] else ("?", *other.cut.shape[1:])))
                found, expected = f"shape {list(one.cut.shape)} in a rank", f"[{wanted}], for a part of {name}"
                yield Problem("wrong-shape", tensor.name, found, expected, "is config.json another model's?")
