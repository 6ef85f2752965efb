"""Coverage: proves from the copies and casts that each kept tensor is used whole and no dropped one is touched."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from reshard.copies import Copies, WrongPlan, require_coverage
from reshard.match import Matched
from reshard.results import Series
from reshard.types import Cast, Checkpoint, Layout, Recipe, Rule, Tensor
from reshard.units import is_kept

WORDS = {"pad": "padded", "dequantize": "dequantized"}
"""What is said of the tensors that a cast uses; `cast` of all others."""


@dataclass(frozen=True, slots=True)
class Share:
    """What became of the source tensors of one rule, or left out for one reason: it adds up to the whole source."""

    use: str
    """`once`, `replicated` (to every rank), `shared` (by some ranks), `dequantized`, `cast`, `padded`, `empty`, or
    `dropped`."""
    what: str
    """The rule's left name; or what is left out as a whole, such as `MTP layers`."""
    reason: str
    """Why it is dropped; empty for all others."""
    tensors: int
    size: int
    """In bytes of the source."""


def cover(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layout: Layout,
    matched: Matched,
    series: Sequence[Series],
    casts: Sequence[Cast],
    copies: Copies,
) -> tuple[Share, ...]:
    """Says by rule how often each tensor of the source is used. Raises WrongPlan if that is not as the rules say."""
    used = [tensor for one in series for tensor in one.tensors]
    sizes = [file.size for file in checkpoint.files]
    sizes += [join.result.size for join in checkpoint.joins] + [cast.result.size for cast in casts]
    usage = require_coverage(copies, used, sizes)
    counts = [len(one.tensors) for one in series]
    least = np.repeat([one.least for one in series], counts)
    most = np.repeat([one.most for one in series], counts)
    if np.any((usage.most > 0) & ((usage.least != least) | (usage.most != most))):
        raise WrongPlan("a part of a source tensor is used more or less often than its rule says")
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    for use, number, tensors in uses(checkpoint, recipe, layout, matched, series, casts):
        key = use, *(reason_of(recipe.rules[number], recipe) if use == "dropped" else (recipe.rules[number].left, ""))
        found.setdefault(key, {}).update({tensor.name: tensor.size for tensor in tensors})
    if sum(map(len, found.values())) != len(checkpoint.tensors):
        raise WrongPlan("the rules do not cover every source tensor once")
    return tuple(Share(*key, len(sizes), sum(sizes.values())) for key, sizes in found.items())


def reason_of(rule: Rule, recipe: Recipe) -> tuple[str, str]:
    """What is dropped by a rule, and why."""
    hole = next((hole for hole in recipe.holes.values() if hole.optional and f"{{{hole.name}}}" in rule.left), None)
    if hole and (rule.optional or rule.left.endswith("{*}")):
        return hole.counts, hole.optional
    return rule.left, rule.split


def uses(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layout: Layout,
    matched: Matched,
    series: Sequence[Series],
    casts: Sequence[Cast],
) -> Iterator[tuple[str, int, Sequence[Tensor]]]:
    """How tensors of the source are used, with the number of their rule."""
    files = checkpoint.parts
    for one in series:
        if one.tensors[0].file < files:
            yield use_of(one, layout.ranks), one.number, one.tensors
            continue
        made = [casts[tensor.file - files] for tensor in one.tensors]
        inputs = [tensor for cast in made for tensor in (cast.weight, cast.scale) if tensor]
        yield WORDS.get(made[0].operation, "cast"), one.number, inputs
    for family in matched.families:
        if not is_kept(recipe.rules[family.rule], layout):
            yield "dropped", family.rule, family.tensors


def use_of(series: Series, ranks: int) -> str:
    if series.tensors[0].size == 0:
        return "empty"
    if series.least == series.most == 1:
        return "once"
    return "replicated" if series.least == series.most == ranks else "shared"
