"""Gather: the headers of rank files -> one Checkpoint of whole tensors, under the names of the recipe's left side.

A tensor that every rank holds a part of becomes a join; one that a single rank holds stays where it is. So whatever can
be done with a checkpoint can be done with rank files. Opens no file itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from reshard.cut import HALVES, dimension_of
from reshard.errors import Problem, require_none
from reshard.match import OWN_RECIPE
from reshard.names import Pattern, later_members, patterns_of, split_names
from reshard.origin import Origin
from reshard.read import Stored
from reshard.recipe import scale_letter
from reshard.results import units_of
from reshard.types import BlockScale, Checkpoint, Join, Recipe, Rule, Tensor

AGAIN = "is a rank file missing, or from another conversion?"


class Held(NamedTuple):
    """A tensor of the left side, and what of it each rank holds."""

    name: str
    rule: Rule
    scaling: BlockScale | None
    is_scale: bool
    by_rank: dict[int, Tensor]


def gather(stored: Stored, recipe: Recipe, origin: Origin, *, first_replica: bool = False) -> Checkpoint:
    """The checkpoint that rank files make up; they must be all, in the order of their ranks.

    With `first_replica` only the first rank's copy of what several hold is looked at. Raises Refused with every tensor
    that no rule knows or that is not in the ranks that should hold it, or not alike in all.
    """
    ranks = len(stored.files)
    held, unknown = held_tensors(stored, recipe)
    require_none([*unknown_problems(unknown, stored, recipe), *holder_problems(held.values(), ranks)])
    tensors: dict[str, Tensor] = {}
    joins: list[Join] = []
    problems: list[Problem] = []
    for found in held.values():
        weight = held.get(weight_name(found))
        units = units_of(found.rule, origin.config or {})
        if units is None:
            key = found.rule.split.removeprefix("rows of ")
            problems.append(Problem("no-config", found.name, f"no {key} in a config.json", "one", "copy it there"))
        parts = parts_of(found, weight, ranks, units or 0, first_replica=first_replica)
        tensors[found.name] = whole_of(found, parts, ranks, origin, joins, problems)
    require_none(problems)
    return Checkpoint(stored.folder, stored.files, tensors, origin.config, tuple(joins))


def held_tensors(stored: Stored, recipe: Recipe) -> tuple[dict[str, Held], list[Tensor]]:
    """By name on the left: what each rank holds; and the tensors that no rule knows, or more than one."""
    turned = backwards(recipe)
    patterns: dict[str, list[Pattern]] = {}
    for number, rule in enumerate(turned.rules):
        for pattern in patterns_of(number, rule, turned) if rule.relation != "drop" else ():
            patterns.setdefault(pattern.key, []).append(pattern)
    names = split_names(tensor.name for tensor in stored.tensors)
    marked, before = later_members(names, turned)
    held: dict[str, Held] = {}
    unknown = []
    for tensor, (key, numbers) in zip(stored.tensors, names, strict=True):
        fitting = [pattern for pattern in patterns.get(key, ()) if pattern.fits(key, numbers)]
        fitting = [pattern for pattern in fitting if pattern.accepts(numbers, marked, before)]
        if len(fitting) != 1:
            unknown.append(tensor)
            continue
        (name,), rule = fitting[0].renamed([numbers]), recipe.rules[fitting[0].rule]
        scaling = recipe.scales.get(scale_letter(rule, recipe))
        found = held.setdefault(name, Held(name, rule, scaling, fitting[0].is_scale, {}))
        found.by_rank[tensor.file] = tensor
    return held, unknown


def backwards(recipe: Recipe) -> Recipe:
    """The recipe read from right to left. What was dequantised comes back under the name of its weight."""
    scales = {letter: replace(scale, left=scale.right, right=scale.left) for letter, scale in recipe.scales.items()}
    holes = {
        name: replace(hole, marker=right_name(hole.marker, recipe) if hole.marker else "")
        for name, hole in recipe.holes.items()
    }
    return replace(recipe, scales=scales, holes=holes, rules=tuple(turned(rule, recipe) for rule in recipe.rules))


def turned(rule: Rule, recipe: Recipe) -> Rule:
    letter = scale_letter(rule, recipe) if rule.relation == "dequantize" else ""
    left = rule.left.replace(f"{{{letter}}}", "weight") if letter else rule.left
    return replace(rule, left=rule.right, right=left)


def right_name(left: str, recipe: Recipe) -> str:
    """The name on the right of a rule's left name."""
    return next((rule.right for rule in recipe.rules if rule.left == left), left)


def unknown_problems(unknown: Sequence[Tensor], stored: Stored, recipe: Recipe) -> Iterator[Problem]:
    for tensor in unknown:
        subject = f"{stored.files[tensor.file].name}: {tensor.name}"
        expected = f"a name on the right of {recipe.name}"
        yield Problem("no-rule", subject, "no rule knows it", expected, f"another --recipe, or {OWN_RECIPE}")


def holder_problems(held: Sequence[Held] | Any, ranks: int) -> Iterator[Problem]:
    """Tensors that are not in the ranks that should hold them, or not of one dtype and shape in all of them."""
    for found in held:
        here = sorted(found.by_rank)
        if found.rule.split.startswith("by "):
            if len(here) > 1:
                yield Problem("wrong-ranks", found.name, f"in ranks {here}", "in one rank", AGAIN)
        elif len(here) != ranks:
            lacking = sorted(set(range(ranks)) - set(here))
            yield Problem("wrong-ranks", found.name, f"not in ranks {lacking}", "in every rank", AGAIN)
        kinds = {(tensor.dtype, tensor.shape) for tensor in found.by_rank.values()}
        if len(kinds) > 1:
            text = " and ".join(f"{dtype} {list(shape)}" for dtype, shape in sorted(kinds))
            yield Problem("wrong-shape", found.name, text, "one dtype and shape in all ranks", AGAIN)


def weight_name(found: Held) -> str:
    """Of the weight that a block scale belongs to."""
    return f"{found.name.removesuffix(found.scaling.left)}weight" if found.is_scale and found.scaling else ""


def parts_of(
    found: Held, weight: Held | None, ranks: int, units: int, *, first_replica: bool
) -> tuple[tuple[Tensor, ...], ...]:
    """The parts of a tensor in their order, and of each all that hold it."""
    copies = [found.by_rank[rank] for rank in sorted(found.by_rank)]
    dimension = dimension_of(found.rule.split)
    if dimension is None or (found.is_scale and len(copies[0].shape) <= dimension):
        times = len(copies)
    elif units and ranks > units:
        times = ranks // units
    elif found.is_scale and weight and found.scaling and ranks > 1:
        length = weight.by_rank[0].shape[dimension]
        side = block_of(found.scaling, weight.by_rank[0])[dimension]
        times = side // length if 0 < length < side else 1
    else:
        times = 1
    groups = [tuple(copies[first : first + times]) for first in range(0, len(copies), times)]
    return tuple(group[:1] if first_replica else group for group in groups)


def block_of(scaling: BlockScale, weight: Tensor) -> tuple[int, int]:
    """Packed weights that were cast to FP8 have the block of that."""
    return scaling.fp8_block if scaling.packed and weight.dtype == "F8_E4M3" else scaling.block


def whole_of(
    found: Held,
    parts: tuple[tuple[Tensor, ...], ...],
    ranks: int,
    origin: Origin,
    joins: list[Join],
    problems: list[Problem],
) -> Tensor:
    """The tensor in one piece; appends the join that it takes, if it takes one."""
    first, dimension = parts[0][0], dimension_of(found.rule.split) or 0
    shape = list(first.shape)
    if len(parts) > 1:
        shape[dimension] *= len(parts)
    before = list((origin.shapes or {}).get(found.name, shape))
    if len(before) != len(shape) or any(a > b for a, b in zip(before, shape, strict=True)):
        problems.append(
            Problem("wrong-shape", found.name, f"{shape} in all ranks", f"{before}, by the manifest", AGAIN)
        )
        before = shape
    if found.rule.split == "padded rows" and ranks > 1 and origin.shapes is None:
        expected = "a manifest that says how many there were"
        remedy = "convert the model itself; only our own manifests say it"
        problems.append(
            Problem("unknown-padding", found.name, f"{shape[0]:,} rows, padding included", expected, remedy)
        )
    size = first.size * len(parts) if before == shape else size_of(before, first)
    if len(parts) == 1 and len(parts[0]) == 1 and before == shape:
        return unpacked(first._replace(name=found.name), found)
    whole = Tensor(found.name, first.dtype, tuple(before), len_files(ranks) + len(joins), 0, size)
    rows = shape[0] if dimension else HALVES if found.rule.split == "packed rows" else 1
    joins.append(Join(rows, parts, whole))
    return unpacked(whole, found)


def len_files(ranks: int) -> int:
    """Joins are numbered behind the rank files."""
    return ranks


def size_of(shape: Sequence[int], like: Tensor) -> int:
    """In bytes, with the elements of another tensor."""
    elements = 1
    for length in like.shape:
        elements *= length
    wanted = 1
    for length in shape:
        wanted *= length
    return wanted * like.size // max(elements, 1)


def unpacked(tensor: Tensor, found: Held) -> Tensor:
    """F4 is I8 with two values a byte on the left."""
    if tensor.dtype == "F4" and found.scaling and found.scaling.packed:
        return tensor._replace(dtype="I8", shape=(*tensor.shape[:-1], tensor.shape[-1] // 2))
    return tensor
