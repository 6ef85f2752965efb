"""Assembles the headers of rank files into one Checkpoint of whole tensors, under their original names."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from reshard.errors import Problem, require_none
from reshard.formats.huggingface import FolderHeaders
from reshard.numbered_names import split_name
from reshard.recipes.formulas import count_heads
from reshard.recipes.patterns import (
    WEIGHT,
    Pattern,
    find_later_members,
    find_scale_placeholder,
    make_patterns,
    split_names,
)
from reshard.recipes.splits import COLUMNS, HALVES, ROWS, count_parts
from reshard.sources.match import suggest_rule
from reshard.text import format_numbers
from reshard.types import COMPARE, FIRST, BlockScale, Checkpoint, Join, Recipe, Rule, Tensor

AGAIN = "is a rank file missing, or from another conversion?"

Shape = tuple[int, ...]


class ShardedTensor(NamedTuple):
    """A tensor of the original checkpoint, and the shard of it in each rank that has one."""

    name: str
    rule: Rule
    scaling: BlockScale | None
    is_scale: bool
    member: int
    """Number of the expert it belongs to, where whole experts are assigned to ranks; else -1."""
    heads: int | None
    """Number of heads that the rule's split counts: 0 if it counts none, None if the config does not tell."""
    by_rank: dict[int, Tensor]
    """Rank -> its shard, as it lies in the file of that rank."""


Parts = tuple[tuple[Tensor, ...], ...]
"""The shards of a tensor in their order; for each shard its replicas, one from each rank that has it."""


def assemble_checkpoint(
    stored: FolderHeaders,
    recipe: Recipe,
    config: Mapping[str, Any] | None,
    shapes: Mapping[str, Sequence[int]] | None,
    *,
    replicas: str = COMPARE,
) -> Checkpoint:
    """Assembles the original checkpoint from the headers of all rank files, in the order of their ranks.

    The tensors are in the order of their names and numbers. `config` is the model's. `shapes` maps each padded tensor
    to its original shape, in elements; None if the manifest is lost. With `replicas` "first", only the first replica of
    a shard is used. Raises Refused with every tensor that no rule covers, that is not in the expected ranks, or whose
    shards differ in dtype or shape.
    """
    ranks = len(stored.files)
    held, unknown = collect_shards(stored, recipe, config or {})
    require_none([*unknown, *check_holders(held.values(), ranks)])
    tensors: dict[str, Tensor] = {}
    joins: list[Join] = []
    problems: list[Problem] = []
    for name in sorted(held, key=order_by_numbers):
        found = held[name]
        problems.extend(check_torn(found))
        if found.member >= 0 and name not in (shapes or {}):  # the fast path: an expert is whole in one rank
            (tensor,) = found.by_rank.values()
            tensors[name] = unpack_fp4(tensor._replace(name=name), found)
            continue
        parts = split_into_parts(found, held.get(name_weight(found)), ranks, replicas=replicas)
        together = join_shape(found, parts)
        shape = tuple((shapes or {}).get(name, together))
        problems.extend(check_shape(found, shape, together, knows=ranks == 1 or shapes is not None))
        tensors[name] = unpack_fp4(assemble_tensor(found, parts, shape, together, ranks, joins), found)
    require_none(problems)
    return Checkpoint(stored.folder, stored.files, tensors, config, tuple(joins))


def order_by_numbers(name: str) -> tuple[Any, ...]:
    """Makes a sort key of a name that compares numbers as numbers: layer 2 comes before layer 10."""
    key, numbers = split_name(name)
    pieces = key.split("#")
    return tuple((piece, int(number)) for piece, number in zip(pieces, (*numbers, "0"), strict=False))


def collect_shards(
    stored: FolderHeaders, recipe: Recipe, config: Mapping[str, Any]
) -> tuple[dict[str, ShardedTensor], list[Problem]]:
    """Groups the shards of all ranks by their original names; also returns a problem for each tensor that no rule, or
    more than one, covers.
    """
    turned = reverse_recipe(recipe)
    patterns: dict[str, list[Pattern]] = {}
    for number, rule in enumerate(turned.rules):
        for pattern in make_patterns(number, rule, turned) if rule.relation != "drop" else ():
            patterns.setdefault(pattern.key, []).append(pattern)
    names = split_names(tensor.name for tensor in stored.tensors)
    marked, before = find_later_members(names, turned)
    kinds = {pattern: describe_pattern(pattern, recipe, config) for group in patterns.values() for pattern in group}
    held: dict[str, ShardedTensor] = {}
    problems = []
    for tensor, (key, numbers) in zip(stored.tensors, names, strict=True):
        fitting = [pattern for pattern in patterns.get(key, ()) if pattern.fits(key, numbers)]
        fitting = [pattern for pattern in fitting if pattern.accepts(numbers, marked, before)]
        if len(fitting) != 1:
            subject = f"{stored.files[tensor.file].name}: {tensor.name}"
            problems.append(explain_no_rule(subject, [recipe.rules[pattern.rule].left for pattern in fitting], recipe))
            continue
        (name,) = fitting[0].renamed([numbers])
        if name not in held:
            kind, place = kinds[fitting[0]]
            member = int(numbers[place]) if place is not None else -1
            held[name] = kind._replace(name=name, member=member, by_rank={})
        held[name].by_rank[tensor.file] = tensor
    return held, problems


def describe_pattern(pattern: Pattern, recipe: Recipe, config: Mapping[str, Any]) -> tuple[ShardedTensor, int | None]:
    """Collects the facts that all tensors of a pattern share. Also returns the index of the expert's number among their
    numbers, where whole experts are assigned to ranks; else None.
    """
    rule = recipe.rules[pattern.rule]
    name = rule.split.placeholder
    scaling = recipe.scales.get(find_scale_placeholder(rule, recipe))
    heads = count_heads(rule, config)
    return ShardedTensor("", rule, scaling, pattern.is_scale, -1, heads, {}), pattern.slots.index(
        name
    ) if name else None


def reverse_recipe(recipe: Recipe) -> Recipe:
    """Exchanges the sides of a recipe. A dequantized weight gets the name of the weight."""
    scales = {name: replace(scale, left=scale.right, right=scale.left) for name, scale in recipe.scales.items()}
    names = {name_as_weight(rule.left, recipe): name_as_weight(rule.right, recipe) for rule in recipe.rules}
    placeholders = {
        name: replace(place, marker=names.get(name_as_weight(place.marker, recipe), place.marker))
        for name, place in recipe.placeholders.items()
    }
    rules = tuple(reverse_rule(rule, recipe) for rule in recipe.rules)
    return replace(recipe, scales=scales, placeholders=placeholders, rules=rules)


def reverse_rule(rule: Rule, recipe: Recipe) -> Rule:
    """Exchanges the sides of a rule."""
    left = name_as_weight(rule.left, recipe) if rule.relation == "dequantize" else rule.left
    return replace(rule, left=rule.right, right=left)


def name_as_weight(name: str, recipe: Recipe) -> str:
    """Replaces the scale placeholder in a rule's name with `weight`."""
    for placeholder in recipe.scales:
        name = name.replace(f"{{{placeholder}}}", WEIGHT)
    return name


def explain_no_rule(subject: str, lefts: Sequence[str], recipe: Recipe) -> Problem:
    """Explains why a tensor has not exactly one rule; `lefts` are the left names of the rules that fit."""
    if lefts:
        found = " and ".join(map(repr, lefts))
        return Problem("two-rules", subject, found, "one rule", f"correct the recipe {recipe.origin}")
    expected = f"a name on the right of {recipe.name}"
    return Problem("no-rule", subject, "no rule knows it", expected, suggest_rule(recipe, "a row"))


def check_holders(held: Collection[ShardedTensor], ranks: int) -> Iterator[Problem]:
    """Checks that each tensor is in the expected ranks, with one dtype and shape in all of them."""
    assigned: dict[str, set[int]] = {}
    for found in held:
        assigned.setdefault(found.rule.split.placeholder, set()).add(found.member)
    for found in held:
        here = sorted(found.by_rank)
        members = len(assigned[found.rule.split.placeholder])
        if found.member >= 0:
            # A gap in the numbers is reported later, and alone.
            is_known = max(assigned[found.rule.split.placeholder]) == members - 1 and members % ranks == 0
            wanted = [found.member * ranks // members] if is_known else here[:1]
        else:
            wanted = list(range(ranks))
        if here != wanted:
            text = f"in ranks {format_numbers(here)}"
            yield Problem("wrong-ranks", found.name, text, f"in ranks {format_numbers(wanted)}", AGAIN)
        kinds = {(tensor.dtype, tensor.shape) for tensor in found.by_rank.values()}
        if len(kinds) > 1:
            text = " and ".join(f"{dtype} {list(shape)}" for dtype, shape in sorted(kinds))
            yield Problem("wrong-shape", found.name, text, "one dtype and shape in all ranks", AGAIN)


def name_weight(found: ShardedTensor) -> str:
    """Names the weight that a block scale belongs to; empty for other tensors."""
    return f"{found.name.removesuffix(found.scaling.left)}{WEIGHT}" if found.is_scale and found.scaling else ""


def split_into_parts(found: ShardedTensor, weight: ShardedTensor | None, ranks: int, *, replicas: str) -> Parts:
    """Splits the shards of all ranks into parts. Consecutive ranks with the same part are its replicas."""
    copies = [found.by_rank[rank] for rank in sorted(found.by_rank)]
    dimension, units = found.rule.split.dimension, found.heads
    if dimension is None or (found.is_scale and len(copies[0].shape) <= dimension):
        times = len(copies)
    else:
        times = ranks // units if units and ranks > units else 1
        if found.is_scale and weight and found.scaling and ranks > times and len(weight.by_rank[0].shape) > dimension:
            length = weight.by_rank[0].shape[dimension]
            side = find_block(found.scaling, weight.by_rank[0])[dimension]
            times *= side // length if 0 < length < side else 1
    groups = [tuple(copies[first : first + times]) for first in range(0, len(copies), times)]
    return tuple(group[:1] if replicas == FIRST else group for group in groups)


def find_block(scaling: BlockScale, weight: Tensor) -> tuple[int, int]:
    """Finds the block of a weight's scale, in elements: packed FP4 that was cast to FP8 has the block of FP8."""
    return scaling.fp8_block if scaling.packed and weight.dtype == "F8_E4M3" else scaling.block


def join_shape(found: ShardedTensor, parts: Parts) -> Shape:
    """Joins the shapes of all parts, padding included, in elements."""
    shape, dimension = list(parts[0][0].shape), found.rule.split.dimension
    if dimension is not None and len(parts) > 1 and len(shape) > dimension:
        shape[dimension] *= len(parts)
    return tuple(shape)


def check_torn(found: ShardedTensor) -> Iterator[Problem]:
    """Checks that no value is cut apart: FP4 rows are whole bytes, and packed rows are two equal halves."""
    for tensor in found.by_rank.values():
        if tensor.dtype == "F4" and found.scaling and found.scaling.packed and tensor.shape and tensor.shape[-1] % 2:
            yield Problem("wrong-shape", found.name, f"F4 {list(tensor.shape)}", "whole bytes in each row", AGAIN)
        if found.rule.split.is_packed and len(found.by_rank) > 1 and tensor.shape and tensor.shape[0] % HALVES:
            yield Problem("wrong-shape", found.name, f"{tensor.shape[0]} rows in a rank", "two halves alike", AGAIN)


def check_shape(found: ShardedTensor, shape: Shape, together: Shape, *, knows: bool) -> Iterator[Problem]:
    """Checks that the parts make up a tensor of `shape`. `together` is the shape of all parts, both in elements;
    `knows` says whether the original shape is known.
    """
    dimension, units = found.rule.split.dimension, found.heads
    if units is None:
        key = found.rule.split.heads_key
        yield Problem("no-config", found.name, f"no {key} in a config.json", "one", "copy it beside the rank files")
    elif not count_parts(len(found.by_rank), units):
        things = f"{units} {found.rule.split.heads_key}"
        expected = f"one of the numbers to divide the other: {things} and {len(found.by_rank)} ranks"
        yield Problem("not-divisible", found.name, f"{len(found.by_rank)} ranks", expected, "is config.json another's?")
    if dimension is not None and len(found.by_rank) > 1 and len(together) <= dimension and not found.is_scale:
        yield Problem("wrong-shape", found.name, f"{list(together)} in a rank", f"more dimensions, cut by {dimension}")
    if found.rule.split.is_padded and not knows:
        text, expected = f"{together[0]:,} rows, padding included", "a manifest that says how many there were"
        remedy = "convert the model itself: only the manifest of reshard says it"
        yield Problem("unknown-padding", found.name, text, expected, remedy)
    # Padding is at the end of the cut dimension, and nowhere else.
    alike = len(shape) == len(together) and all(
        a == b or (place == dimension and a < b) for place, (a, b) in enumerate(zip(shape, together, strict=True))
    )
    if not alike:
        yield Problem(
            "wrong-shape", found.name, f"{list(together)} in all ranks", f"{list(shape)}, by reshard.json", AGAIN
        )


def assemble_tensor(
    found: ShardedTensor, parts: Parts, shape: Shape, together: Shape, files: int, joins: list[Join]
) -> Tensor:
    """Assembles the whole tensor. Appends a join if it has several parts; joins are numbered behind the files."""
    first, dimension = parts[0][0]._replace(name=found.name), found.rule.split.dimension
    size = prod(shape) * first.size // max(prod(first.shape), 1)
    if not size or (len(parts) == len(parts[0]) == 1 and shape == together):
        return first._replace(shape=shape, size=size)
    if dimension == COLUMNS and len(shape) > COLUMNS:
        rows = shape[ROWS]
    else:
        rows = HALVES if found.rule.split.is_packed and len(parts) > 1 else 1
    whole = Tensor(found.name, first.dtype, shape, files + len(joins), 0, size)
    joins.append(Join(rows, parts, whole))
    return whole


def unpack_fp4(tensor: Tensor, found: ShardedTensor) -> Tensor:
    """Gives FP4 its dtype and shape in Hugging Face files: I8, two values a byte. Other tensors stay unchanged."""
    if tensor.dtype == "F4" and found.scaling and found.scaling.packed and tensor.shape:
        return tensor._replace(dtype="I8", shape=(*tensor.shape[:-1], tensor.shape[-1] // 2))
    return tensor


def take_first_shards(held: Iterable[ShardedTensor]) -> dict[str, Tensor]:
    """Takes the first shard of each tensor; returns original name -> shard."""
    return {found.name: found.by_rank[min(found.by_rank)] for found in held}


class PartRange(NamedTuple):
    """A byte range of one part, and its place in the requested byte range."""

    part: int
    """Index of the part."""
    begin: int
    """In bytes from the start of the part."""
    place: int
    """In bytes from the start of the requested range."""
    size: int
    """In bytes."""


def cut_part_ranges(sizes: Sequence[int], offset: int, size: int, most: int) -> Iterator[PartRange]:
    """Cuts a byte range of consecutive parts into byte ranges of single parts, each at most `most` bytes long.

    `sizes` are the sizes of the parts; all values are in bytes.
    """
    start = 0
    for part, length in enumerate(sizes):
        begin, end = max(offset, start), min(offset + size, start + length)
        for first in range(begin, end, most):
            yield PartRange(part, first - start, first - offset, min(most, end - first))
        start += length
