"""Checks that a number of ranks suits every tensor, says in few lines where it does not, and lists those that do."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from reshard.errors import Problem, Refused
from reshard.planning.shards import Limit, find_limit
from reshard.planning.transforms import (
    Outcome,
    Terms,
    check_padding,
    is_paddable,
    raise_config,
    transform_weights,
)
from reshard.recipe_types import Recipe
from reshard.recipes.formulas import read_config_value
from reshard.recipes.fusions import FUSED
from reshard.recipes.patterns import PLACEHOLDER, WEIGHT, find_scale_placeholder, list_slots
from reshard.recipes.recipe import FAMILIES_FOLDER
from reshard.recipes.splits import HALVES, count_parts, measure_largest_part
from reshard.sources.block_scales import WeightGroup
from reshard.sources.match import Matched
from reshard.text import format_list, format_numbers
from reshard.types import MOST_RANKS, Layout

HEADS_EXPECTED = "a number in config.json that divides the ranks, or that they divide"


class Fault(NamedTuple):
    """One reason why the number of ranks does not suit."""

    kind: str
    """Of the problem."""
    amount: str
    """What cannot be cut, as in `576 rows`; empty if `found` says it."""
    unit: str
    """The second word of it; may be empty."""
    found: str
    expected: str
    remedy: str = ""
    """Empty: another number of ranks."""


def check_ranks(
    config: Mapping[str, Any], recipe: Recipe, layout: Layout, matched: Matched, outcomes: Sequence[Outcome]
) -> Iterator[Problem]:
    """Reports what the number of ranks does not suit, with the numbers of ranks that work. Weights of several layers,
    or several weights of one length, are one problem: a refusal fits a screen.
    """
    counted = [*find_count_faults(config, recipe, layout, matched)]
    cut = [(outcome.kind, fault) for outcome in outcomes if (fault := find_fault(outcome, layout, recipe))]
    if firm := [(kind, fault) for kind, fault in cut if fault.remedy]:
        counted, cut = [], firm  # no number of ranks would help
    faults = [fault for _, fault in (*counted, *cut)]
    if not faults:
        return
    remedy = ""
    # A tensor with too few dimensions cannot be cut for any number of ranks.
    if all(fault.kind != "wrong-shape" for fault in faults):
        remedy = f"--mp with one of {list_working_ranks(collect_limits(config, recipe, layout, matched, outcomes))}"
        kinds = [outcome.kind for outcome in outcomes]
        if not counted and may_pad([kind for kind, _ in cut], recipe, layout, config):
            remedy += ", or --pad" if try_ranks(kinds, config, recipe, replace(layout, pad=True), matched) else ""
    named = [*counted, *merge_names(cut, recipe)]
    # Those with the same reason behind each other: then it is printed once.
    by_reason: dict[tuple[str, ...], list[Problem]] = {}
    for name, fault in named:
        kind, amount, unit, *reason = fault
        length = f"{amount} {unit}".rstrip() + (" a rank" if kind == "straddles-blocks" else "")
        subject = f"{name} ({length})" if amount else name
        problem = Problem(kind, subject, fault.found, fault.expected, fault.remedy or remedy)
        by_reason.setdefault((kind, *reason), []).append(problem)
    for problems in by_reason.values():
        yield from problems


def find_count_faults(
    config: Mapping[str, Any], recipe: Recipe, layout: Layout, matched: Matched
) -> Iterator[tuple[str, Fault]]:
    """Finds the counts, such as experts, that the ranks do not divide, each with its name."""
    for name, length in list_counted_lengths(config, recipe, matched):
        if length % layout.ranks:
            expected = f"a multiple of {layout.ranks}"
            yield name, Fault("not-divisible", f"{length:,}", "", f"{layout.ranks} ranks", expected)


def find_fault(outcome: Outcome, layout: Layout, recipe: Recipe) -> Fault | None:
    """Finds the reason why the weights of a group, all alike, cannot be cut for the ranks; None if they can."""
    weight, split, units = outcome.weights[0], outcome.kind.rule.split, outcome.heads
    dimension, ranks = split.dimension, f"{layout.ranks} ranks"
    if units is None:
        # Another number of ranks would not help.
        remedy = f"copy the model's config.json beside the files, one with {split.heads_key}; or --config FOLDER"
        if Path(recipe.origin).parent != FAMILIES_FOLDER:
            remedy += f"; or give the right key in {recipe.origin}"
        return Fault("not-divisible", "", "", f"no {split.heads_key} for {ranks}", HEADS_EXPECTED, remedy)
    parts = count_parts(layout.ranks, units)
    if not parts:
        return Fault("not-divisible", f"{units}", split.heads_key, ranks, HEADS_EXPECTED)
    if fault := find_fused_fault(outcome, layout, recipe):
        return fault
    if dimension is None:
        return None
    if len(weight.shape) <= dimension:
        expected = f"at least {dimension + 1} dimensions, to be cut on {split}"
        return Fault("wrong-shape", "", "", f"shape {list(weight.shape)}", expected)
    length, halves, block = weight.shape[dimension], HALVES if split.is_packed else 1, outcome.block
    unit = f"in {split}" if split.text.startswith("dimension") else str(split)
    limit = find_limit(weight, outcome.kind.rule, block)
    if parts > 1 and units and length % units:
        return Fault("not-divisible", f"{length:,}", unit, ranks, f"a multiple of {units}")
    if split.step and limit and limit.bits % 8 == 0:
        return None if limit.allows(layout.ranks) else explain_uneven_fault(length, split.step, unit, layout.ranks)
    if parts > 1 and length % (parts * halves) and not split.step:
        return Fault("not-divisible", f"{length:,}", unit, ranks, f"a multiple of {parts * halves}")
    if limit and not limit._replace(block=1).allows(parts):
        expected = "rows that the ranks can share in whole bytes"
        return Fault("not-divisible", f"{weight.dtype} {list(weight.shape)}", "", ranks, expected)
    if limit and not limit.allows(parts):
        inside = " of each half" if halves > 1 else "" if limit.whole_blocks else ", or a part that lies inside one"
        expected = f"whole blocks of {block[dimension]}{inside}: two block scales have no common value"
        return Fault("straddles-blocks", f"{length // parts:,}", unit, ranks, expected)
    return None


def explain_uneven_fault(length: int, step: int, unit: str, ranks: int) -> Fault:
    """Explains that some ranks would get nothing of a length that is cut in blocks."""
    most = measure_largest_part(length, step, ranks)
    expected = "something for each rank"
    if length:
        expected += f": with {most:,} each, the first {-(-length // most)} ranks have all of it"
    return Fault("not-divisible", f"{length:,}", unit, f"{ranks} ranks", expected)


def find_fused_fault(outcome: Outcome, layout: Layout, recipe: Recipe) -> Fault | None:
    """Finds a last block of rows that is not whole, in a weight behind which another part of a fused tensor lies: its
    scales would not begin where its rows do, for any number of ranks.
    """
    kind, rows = outcome.kind, outcome.weights[0].shape[0] if outcome.weights[0].shape else 0
    rest = recipe.rules[kind.number + 1 :]
    is_last = not rest or rest[0].right != kind.rule.right
    if kind.rule.relation not in FUSED or not outcome.scales or is_last or rows % outcome.block[0] == 0:
        return None
    expected = f"whole blocks of {outcome.block[0]}: another part of {kind.rule.right} lies behind them"
    remedy = "another --cast, or none" if layout.cast else "--cast bf16, which needs no blocks"
    return Fault("straddles-blocks", "", "", f"{rows:,} rows", expected, remedy)


def merge_names(faults: Iterable[tuple[WeightGroup, Fault]], recipe: Recipe) -> Iterator[tuple[str, Fault]]:
    """Merges groups of weights with one fault and the same layers; yields their common name, such as
    `layers 0-2, mlp.gate_proj.weight, mlp.up_proj.weight`.
    """
    numbers: dict[tuple[str, Fault], dict[str, set[int]]] = {}
    for kind, fault in faults:
        name, things, members = describe_weights(kind, recipe)
        numbers.setdefault((name, fault), {}).setdefault(things, set()).update(members)
    names: dict[tuple[str, Fault], dict[str, list[str]]] = {}
    for (name, fault), places in numbers.items():
        where = " and ".join(
            f"{things.removesuffix('s') if len(members) == 1 else things} {format_numbers(members)}"
            for things, members in places.items()
            if things
        )
        names.setdefault((where, fault._replace(unit="")), {}).setdefault(fault.unit, []).append(name)
    for (where, fault), found in names.items():
        together = format_list((name for some in found.values() for name in some), 4)
        yield ", ".join(filter(None, (where, together))), fault._replace(unit=" or ".join(found))


def describe_weights(kind: WeightGroup, recipe: Recipe) -> tuple[str, str, set[int]]:
    """Describes the weights of a group: the part of their names behind the first number, what that number counts, and
    the numbers. Without a number: the whole name.
    """
    rule, scale = kind.rule, find_scale_placeholder(kind.rule, recipe)
    name = rule.left.replace(f"{{{scale}}}", WEIGHT) if scale else rule.left
    slots = list_slots(rule, recipe)
    if not slots or slots[0] not in recipe.placeholders:
        return name, "", set()
    tail = name.partition(f"{{{slots[0]}}}")[2].lstrip(".") or name
    return PLACEHOLDER.sub("*", tail), recipe.placeholders[slots[0]].counts, {int(each[0]) for each in kind.numbers}


def may_pad(kinds: Iterable[WeightGroup], recipe: Recipe, layout: Layout, config: Mapping[str, Any]) -> bool:
    """Whether padding could widen all of some weights that cannot be cut as they are."""
    return not layout.pad and all(is_paddable(kind, recipe, layout, config) for kind in kinds)


def try_ranks(
    kinds: Sequence[WeightGroup], config: Mapping[str, Any], recipe: Recipe, layout: Layout, matched: Matched
) -> tuple[Outcome, ...]:
    """The first weight of each group as the layout casts and pads it; empty if its number of ranks does not suit. Much
    cheaper than a plan.
    """
    firsts = [
        replace(
            kind,
            numbers=kind.numbers[:1],
            weights=kind.weights[:1],
            names=kind.names[:1],
            scales=kind.scales[:1],
            scale_names=kind.scale_names[:1],
        )
        for kind in kinds
    ]
    if next(find_count_faults(config, recipe, layout, matched), None):
        return ()
    try:
        padded = raise_config(config, firsts, recipe, layout) if layout.pad else None
        files = 1 + max(tensor.file for kind in firsts for tensor in (*kind.weights, *kind.scales))
        terms = Terms(recipe, layout, padded, files, padded or config)
        outcomes = tuple([transform_weights(kind, terms, []) for kind in firsts])
    except Refused:
        return ()
    suits = not any(check_padding(outcomes)) and not any(find_fault(one, layout, recipe) for one in outcomes)
    return outcomes if suits else ()


def collect_limits(
    config: Mapping[str, Any], recipe: Recipe, layout: Layout, matched: Matched, outcomes: Iterable[Outcome]
) -> set[Limit]:
    """Collects the conditions that counts and cuts set for the number of ranks."""
    limits = {Limit(length) for _, length in list_counted_lengths(config, recipe, matched)}
    for outcome in outcomes:
        # A length that was padded for this number of ranks says nothing about other numbers.
        rule = outcome.kind.rule
        is_for_ranks = rule.split.is_padded and not rule.split.multiple
        grows = is_for_ranks or (layout.pad and is_paddable(outcome.kind, recipe, layout, config))
        limit = find_limit(outcome.weights[0], rule, outcome.block, outcome.heads or 0)
        if limit and not grows and outcome.heads is not None:
            limits.add(limit)
    return limits


def list_working_ranks(limits: Iterable[Limit]) -> str:
    """Lists the numbers of ranks that every limit allows, as text: `1, 2, 4, 8, 16`. 1 is always among them."""
    distinct = set(limits)
    most = min([MOST_RANKS, *(limit.length for limit in distinct if limit.length and not limit.units)])
    return format_list((str(n) for n in range(1, most + 1) if all(limit.allows(n) for limit in distinct)), 30)


def list_counted_lengths(config: Mapping[str, Any], recipe: Recipe, matched: Matched) -> Iterator[tuple[str, int]]:
    """Lists the counts, besides dimensions, that the ranks must divide: members assigned to ranks, such as experts, and
    config values, such as heads. Yields the name and the count.
    """
    for name in sorted({rule.split.placeholder for rule in recipe.rules} - {""}):
        if matched.counts[name]:
            yield recipe.placeholders[name].counts, matched.counts[name]
    for key in recipe.ranks_divide:
        value = read_config_value(key, config)
        if type(value) is int and value > 0:
            yield key, value
