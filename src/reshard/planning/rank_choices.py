"""The numbers of ranks that a source can be cut for, and the largest rank of each: without a plan, in a moment."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from reshard.errors import refuse, require_none
from reshard.planning.constants import make_constants
from reshard.planning.copies import Integers
from reshard.planning.fused_parts import cut_outcomes
from reshard.planning.options import AS_STORED, check_options
from reshard.planning.plan import Plan
from reshard.planning.planner import (
    check_outcomes,
    group_kept_weights,
    keep_named,
    list_fused_rules,
    make_plan,
    require_kept,
)
from reshard.planning.rank_checks import try_ranks
from reshard.planning.shards import cut_for_ranks
from reshard.planning.transforms import Outcome, Terms, raise_config, transform_weights
from reshard.recipe_types import Recipe
from reshard.recipes.patterns import list_slots
from reshard.recipes.recipe import has_ranks
from reshard.sources.block_scales import WeightGroup
from reshard.sources.match import Matched
from reshard.sources.source import Source
from reshard.text import format_list
from reshard.types import MOST_RANKS, RANKS, SLICED, Cast, Checkpoint, Layout

GPUS = ((80, "A100, H100"), (96, "H20"), (141, "H200"), (180, "B200"), (192, "MI300X"))
"""Memory of GPUs as it is sold, in GB, with the names of some."""

MOST_TRIED = 256
"""The numbers of ranks from 1 to this one are tried."""


@dataclass(frozen=True, slots=True)
class RankChoice:
    """A number of ranks that works."""

    ranks: int
    needs_pad: bool
    """Whether it works with `--pad` only."""
    tensors: int
    """Of the largest rank."""
    size: int
    """Of the tensors of the largest rank, in bytes. The header of its file comes on top."""


def list_rank_choices(source: Source, layout: Layout, only: Sequence[str] = ()) -> tuple[RankChoice, ...]:
    """Lists the numbers of ranks up to MOST_TRIED that work. The number of ranks in `layout` does not matter.

    Raises Refused if not even one rank would do.
    """
    recipe, layout = source.recipe, replace(layout, ranks=1)
    require_none(check_options(recipe, layout, None))
    layout = replace(layout, expert_dtype="") if layout.expert_dtype == AS_STORED else layout
    checkpoint, matched, config = source.checkpoint, source.matched, source.checkpoint.config or {}
    kinds = group_kept_weights(source, layout)
    if layout.pad:
        raise_config(checkpoint.config, kinds, recipe, layout)
    if only:
        checkpoint, matched = keep_named(checkpoint, matched, only, fused=list_fused_rules(recipe, layout))
        kinds = require_kept(matched, source, layout)
    plain, casts = replace(layout, pad=False), list[Cast]()
    terms = Terms(recipe, plain, None, checkpoint.parts, config, checkpoint.packed)
    outcomes = [transform_weights(kind, terms, casts) for kind in kinds]
    require_none(check_outcomes(outcomes, casts, terms, matched))
    members = [list_members(kind, recipe) for kind in kinds]
    beside = measure_beside(outcomes, terms, matched, checkpoint)
    found = []
    for ranks in range(1, MOST_TRIED + 1):
        tried = replace(plain, ranks=ranks)
        without = try_ranks(kinds, config, recipe, tried, matched)
        padded = replace(tried, pad=True)
        use_pad = layout.pad or not without
        firsts = try_ranks(kinds, config, recipe, padded, matched) if use_pad and recipe.padded else without
        if firsts:
            terms = Terms(recipe, tried, None, 0, config)
            tensors, size = measure_largest_rank(firsts, members, terms, matched.counts)
            found.append(RankChoice(ranks, not without, tensors + beside[0], size + beside[1]))
    return tuple(found)


def measure_beside(
    outcomes: Sequence[Outcome], terms: Terms, matched: Matched, checkpoint: Checkpoint
) -> tuple[int, int]:
    """Measures, in tensors and bytes, what every rank has beside the weights: the constants, and fewer tensors where
    weights are fused. Raises Refused for parts of fused tensors that do not fit together.
    """
    constants = [] if "only" in checkpoint.subset else [*make_constants(terms, matched, outcomes, [])]
    tensors = sum(len(one.names) for one in constants)
    if list_fused_rules(terms.recipe, terms.layout):
        series = cut_outcomes(outcomes, terms, matched.counts)
        names = Counter(chain.from_iterable(one.names for one in series if one.parts is not None))
        tensors += len(names) - names.total()
    return tensors, sum(len(one.names) * one.cut.run for one in constants)


def list_members(kind: WeightGroup, recipe: Recipe) -> tuple[int, Integers | None]:
    """The number of weights in a group; and where each is assigned to one rank, the numbers of their experts."""
    name = kind.rule.split.placeholder
    if not name:
        return len(kind.weights), None
    place = list_slots(kind.rule, recipe).index(name)
    return len(kind.weights), np.array([int(numbers[place]) for numbers in kind.numbers], np.int64)


def measure_largest_rank(
    firsts: Sequence[Outcome],
    members: Sequence[tuple[int, Integers | None]],
    terms: Terms,
    counts: Mapping[str, int],
) -> tuple[int, int]:
    """Measures the largest rank: its tensors and their bytes. `firsts` are the first weights of the groups."""
    ranks = terms.layout.ranks
    tensors, sizes = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    for outcome, (count, experts) in zip(firsts, members, strict=True):
        held: int | Integers = count
        if experts is not None:
            held = np.bincount(experts // (counts[outcome.kind.rule.split.placeholder] // ranks), minlength=ranks)
        for series in cut_for_ranks(outcome, terms, counts):
            tensors += held
            sizes += held * (series.cut.rows * series.cut.run)
    largest = int(np.argmax(sizes))
    return int(tensors[largest]), int(sizes[largest])


def plan_for_ranks(
    source: Source, layout: Layout, *, ranks: Sequence[int] | None = None, only: Sequence[str] = ()
) -> Plan:
    """Makes a plan as `make_plan` does. Raises Refused also without a number of ranks, with those that work."""
    if layout.to == RANKS and not has_ranks(source.recipe):
        if ranks is not None:
            found, expected = f"for {source.recipe.name}", "no ranks: it is whole files, which nothing cuts"
            raise refuse("wrong-option", "--ranks", found, expected, "leave it out")
        layout = replace(layout, ranks=layout.ranks or 1)
    if layout.to == SLICED and not layout.ranks:
        raise refuse("wrong-option", "--to dcp", "no number of ranks", f"one from 1 to {MOST_RANKS}", "add --ranks N")
    if layout.to == RANKS and not layout.ranks:
        choices = list_rank_choices(source, layout, only)
        numbers = format_list(name_ranks(choices, layout), 30) or "none that works"
        remedy = "--mp N; the command reshard plan SOURCE shows how large each makes the ranks"
        raise refuse("wrong-option", "--mp", "no number of ranks", f"one of {numbers}; or --to hf", remedy)
    return make_plan(source, layout, ranks=ranks, only=only)


def name_ranks(choices: Sequence[RankChoice], layout: Layout) -> Iterator[str]:
    """The numbers of ranks that work, those that need padding with that word."""
    for choice in choices:
        yield f"{choice.ranks} (--pad)" if choice.needs_pad and not layout.pad else f"{choice.ranks}"
