"""Where the tensors of a source with stacked experts lie: computed from its headers by the recipe, and compared with
where they were read from.

    mlp.experts.gate_up_proj:   | gate 0 | up 0 | gate 1 | up 1 | ...     each a tensor under the names of the hub
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from reshard.errors import Problem
from reshard.numbered_names import split_name
from reshard.recipe_types import Recipe
from reshard.recipes.formulas import compute_shape
from reshard.recipes.fusions import Fusion, list_fusions
from reshard.recipes.patterns import Pattern, fill_pattern, make_pattern
from reshard.types import Checkpoint, Tensor

REPORT = "a fault of reshard: please report it; diff compares the two by themselves"


class StackedSource(NamedTuple):
    """A source with stacked experts: as it lies there, and as it was read."""

    stored: Checkpoint
    recipe: Recipe
    """Its right side has the stored names."""
    read: Checkpoint
    """Under the names of the hub."""


class StackedName(NamedTuple):
    """The name of a tensor with stacked parts."""

    fusion: Fusion
    filling: Mapping[str, int]
    """Placeholder -> number, of those in the name."""


def check_stacked_source(source: StackedSource) -> Iterator[Problem]:
    """Reports each tensor that was read from another place than its own, or with another dtype or shape; and tensors
    that are not in the source.
    """
    stored, recipe, read = source
    expected: dict[str, Tensor] = {}
    patterns = list_stacked_patterns(recipe)
    names = {rule.right: rule.left for rule in recipe.rules if rule.relation == "same"}
    for tensor in stored.tensors.values():
        if stack := find_stacked_name(tensor.name, patterns):
            expected |= {part.name: part for part in list_stacked_parts(tensor, stack, recipe, stored.config or {})}
        else:
            name = name_on_left(tensor.name, names)
            expected[name] = tensor._replace(name=name)
    for name in dict.fromkeys((*expected, *read.tensors)):
        wanted, found = expected.get(name), read.tensors.get(name)
        if wanted != found:
            text = describe_place(found, read) if found else "not read"
            yield Problem("wrong-place", name, text, describe_place(wanted, stored) if wanted else "no tensor", REPORT)


def list_stacked_patterns(recipe: Recipe) -> list[tuple[Pattern, Fusion]]:
    """Lists the names of fused tensors, ready to match."""
    return [(make_pattern(0, one.right, one.right, is_scale=False), one) for one in list_fusions(recipe)]


def find_stacked_name(name: str, patterns: list[tuple[Pattern, Fusion]]) -> StackedName | None:
    """Finds the fused tensor of a name; None for others."""
    key, numbers = split_name(name)
    for pattern, fusion in patterns:
        if pattern.fits(key, numbers):
            filling = {slot: int(number) for slot, number in zip(pattern.slots, numbers, strict=True)}
            return StackedName(fusion, filling)
    return None


def name_on_left(name: str, names: Mapping[str, str]) -> str:
    """The name on the left of a tensor that is not fused; `names` leads from right patterns to left ones."""
    key, numbers = split_name(name)
    for right, left in names.items():
        pattern = make_pattern(0, right, right, is_scale=False)
        if pattern.fits(key, numbers):
            return fill_pattern(left, {slot: int(one) for slot, one in zip(pattern.slots, numbers, strict=True)})
    return name


def list_stacked_parts(
    tensor: Tensor, stack: StackedName, recipe: Recipe, config: Mapping[str, Any]
) -> Iterator[Tensor]:
    """Lists the parts of a fused tensor with their places: in a stack member by member, the rows of the recipe in each.
    A byte range is a share of that of the tensor: bytes of a row times its rows.
    """
    rules = [recipe.rules[number] for number in stack.fusion.rules]
    letter = stack.fusion.stacked
    members, rows, *rest = tensor.shape if letter else (1, *tensor.shape)
    told = [next(iter(compute_shape(rule.shape, config, recipe.sizes) if rule.shape else []), None) for rule in rules]
    lengths = [rows // len(rules) if length is None else length for length in told]
    for member in range(members):
        for place, (rule, length) in enumerate(zip(rules, lengths, strict=True)):
            first = member * rows + sum(lengths[:place])
            begin, end = (tensor.size * row // (members * rows) for row in (first, first + length))
            name = fill_pattern(rule.left, {**stack.filling, letter: member})
            yield Tensor(name, tensor.dtype, (length, *rest), tensor.file, tensor.offset + begin, end - begin)


def describe_place(tensor: Tensor, checkpoint: Checkpoint) -> str:
    """The kind of a tensor, and its byte range of a file."""
    file = checkpoint.files[tensor.file].name if tensor.file < len(checkpoint.files) else "several files"
    end = tensor.offset + tensor.size
    return f"{tensor.dtype} {list(tensor.shape)}, bytes {tensor.offset:,} to {end:,} of {file}"
