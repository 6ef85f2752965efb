"""The constants of a recipe: tensors of one value that only the rank files have. They are made of nothing."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import prod

from reshard.errors import Problem
from reshard.formats.safetensors import BITS
from reshard.planning.shards import Series, cut_nothing
from reshard.planning.transforms import Outcome, Terms
from reshard.recipes.patterns import find_scale_placeholder, list_constant_names, list_present_constants
from reshard.sources.block_scales import is_kept
from reshard.sources.completeness import collect_members
from reshard.sources.match import Matched
from reshard.types import Cast, Tensor

NO_RULE = -1
"""The index of the rule of a constant: it has none."""


def make_constants(terms: Terms, matched: Matched, outcomes: Iterable[Outcome], casts: list[Cast]) -> Iterator[Series]:
    """Makes the constants of the kept layers and experts, for every rank; those of quantized models if a weight of
    `outcomes` has block scales. Appends their casts.
    """
    recipe, ranks = terms.recipe, terms.layout.ranks
    scaled = {find_scale_placeholder(outcome.kind.rule, recipe) for outcome in outcomes if outcome.scales}
    present = matched.present if recipe.constants else {}
    kept = {number: numbers for number, numbers in present.items() if is_kept(recipe.rules[number], terms.layout)}
    members = collect_members(recipe, kept)
    for constant in list_present_constants(recipe, scaled):
        dtype, shape = constant.dtype, constant.shape
        size, first = prod(shape) * BITS[dtype] // 8, terms.files + len(casts)
        names = list_constant_names(constant, members)
        tensors = [Tensor(name, dtype, shape, first + place, 0, size) for place, name in enumerate(names)]
        casts += [Cast("fill", tensor, None, (1, 1), tensor, value=constant.value) for tensor in tensors]
        if tensors:
            yield Series(NO_RULE, names, tensors, cut_nothing(tensors[0], ranks), None, ranks, ranks)


def check_constants_apart(constants: Sequence[Series], series: Sequence[Series]) -> Iterator[Problem]:
    """Reports constants with the name of another tensor of the target."""
    taken = set(chain.from_iterable(one.names for one in series)) if constants else set()
    for one in constants:
        for name in one.names:
            if name in taken:
                found = "a constant with the name of a tensor"
                yield Problem("same-name", name, found, "a name for each", "mend the recipe")
            taken.add(name)
