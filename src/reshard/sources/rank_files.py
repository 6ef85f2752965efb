"""Assembles the headers of rank files into one Checkpoint of whole tensors, under their original names."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from reshard.errors import Problem, require_none
from reshard.formats.huggingface import FolderHeaders
from reshard.numbered_names import split_name
from reshard.recipe_types import BlockScale, Recipe
from reshard.recipes.formulas import compute_shape
from reshard.recipes.patterns import WEIGHT
from reshard.recipes.splits import HALVES, count_parts, measure_largest_part
from reshard.sources.held_shards import CollectedShards, ShardedTensor
from reshard.text import format_numbers
from reshard.types import COMPARE, FIRST, Checkpoint, Join, Tensor

AGAIN = "is a rank file missing, or from another conversion?"

Shape = tuple[int, ...]

Parts = tuple[tuple[Tensor, ...], ...]
"""The shards of a tensor in their order; for each shard its replicas, one from each rank that has it."""


def assemble_checkpoint(
    stored: FolderHeaders,
    collected: CollectedShards,
    recipe: Recipe,
    config: Mapping[str, Any] | None,
    shapes: Mapping[str, Sequence[int]] | None,
    *,
    replicas: str = COMPARE,
) -> Checkpoint:
    """Assembles the original checkpoint from the headers of all rank files, in the order of their ranks.

    The tensors are in the order of their names and numbers. `collected` has the shards by these names; `config` is the
    model's. `shapes` maps each padded tensor to its original shape, in elements; None if the manifest is lost. With
    `replicas` "first", only the first replica of a shard is used. Raises Refused with every tensor that no rule covers,
    that is not in the expected ranks, or whose shards differ in dtype or shape.
    """
    ranks, held = len(stored.files), collected.held
    require_none(check_collected(collected, ranks))
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
        told = compute_told_shape(found, together, recipe, config or {})
        shape = find_original_shape(found, together, told, shapes or {})
        knows = shapes is not None or bool(told or (ranks == 1 and not found.rule.split.multiple))
        problems.extend(check_shape(found, shape, together, knows=knows))
        tensors[name] = unpack_fp4(assemble_tensor(found, parts, shape, together, ranks, joins), found)
    require_none(problems)
    return Checkpoint(stored.folder, stored.files, tensors, config, tuple(joins))


def order_by_numbers(name: str) -> tuple[Any, ...]:
    """Makes a sort key of a name that compares numbers as numbers: layer 2 comes before layer 10."""
    key, numbers = split_name(name)
    pieces = key.split("#")
    return tuple((piece, int(number)) for piece, number in zip(pieces, (*numbers, "0"), strict=False))


def find_original_shape(
    found: ShardedTensor, together: Shape, told: Shape | None, shapes: Mapping[str, Sequence[int]]
) -> Shape:
    """Finds the original shape of a tensor: in the manifest, else the one that is told, else that of all parts. What
    rank 0 has is told without doubt.
    """
    if found.rule.split.is_first and told:
        return told
    return tuple(shapes.get(found.name, told or together))


def compute_told_shape(
    found: ShardedTensor, together: Shape, recipe: Recipe, config: Mapping[str, Any]
) -> Shape | None:
    """Computes the original shape of a padded tensor: if it is padded to a multiple, by recipe and config; if rank 0
    has all of it, from the shape of all ranks together. None of others, and if the config does not tell.
    """
    if found.rule.split.is_first and together:
        return (together[0] // len(found.by_rank), *together[1:])
    if not found.rule.split.multiple or not found.rule.shape or found.is_scale or not together:
        return None
    rows = next(iter(compute_shape(found.rule.shape, config, recipe.sizes)), None)
    return None if rows is None else (rows, *together[1:])


def check_collected(collected: CollectedShards, ranks: int) -> Iterator[Problem]:
    """Reports names that no rule knows, fused tensors that cannot be split, and tensors in other ranks than expected.
    Where tensors could not be split, their parts lack everywhere, which is not told again.
    """
    yield from (*collected.unsplit, *collected.unknown)
    if not collected.unsplit:
        yield from check_holders(collected.held.values(), ranks)


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
        kinds = {(one.dtype, hide_uneven(one.shape, found)): one for one in found.by_rank.values()}
        if len(kinds) > 1:
            text = " and ".join(f"{kinds[kind].dtype} {list(kinds[kind].shape)}" for kind in sorted(kinds))
            yield Problem("wrong-shape", found.name, text, "one dtype and shape in all ranks", AGAIN)
        elif found.rule.split.step and here == wanted:
            yield from check_uneven_parts(found)


def hide_uneven(shape: Shape, found: ShardedTensor) -> Shape:
    """Hides the length in which the parts of a tensor may differ."""
    dimension = found.rule.split.dimension
    if not found.rule.split.step or dimension is None or len(shape) <= dimension:
        return shape
    return (*shape[:dimension], 0, *shape[dimension + 1 :])


def check_uneven_parts(found: ShardedTensor) -> Iterator[Problem]:
    """Reports parts that do not have the lengths into which so many ranks cut all of them together."""
    split, ranks = found.rule.split, len(found.by_rank)
    shapes = [tensor.shape for _, tensor in sorted(found.by_rank.items())]
    if split.dimension is None or len(shapes[0]) <= split.dimension:
        return
    lengths = [shape[split.dimension] for shape in shapes]
    most = measure_largest_part(sum(lengths), split.step, ranks)
    wanted = [max(0, min(most, sum(lengths) - rank * most)) for rank in range(ranks)]
    if lengths != wanted or not all(lengths):
        here, there = (", ".join(map(str, some)) for some in (lengths, wanted))
        expected = f"{there}, and something in each: so they share {sum(lengths):,} by {split}"
        yield Problem("wrong-shape", found.name, f"parts of {here} in the ranks", expected, AGAIN)


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
        shape[dimension] = sum(part[0].shape[dimension] for part in parts)
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
    is_cut = len(found.by_rank) > 1 or found.rule.split.is_padded
    if dimension is not None and is_cut and len(together) <= dimension and not found.is_scale:
        expected = f"at least {dimension + 1} dimensions, cut on {found.rule.split}"
        yield Problem("wrong-shape", found.name, f"{list(together)} in a rank", expected, AGAIN)
        return
    if found.rule.split.is_padded and not knows:
        yield explain_unknown_padding(found, together)
        return
    # Padding is at the end of the cut dimension, and nowhere else.
    alike = len(shape) == len(together) and all(
        a == b or (place == dimension and a < b) for place, (a, b) in enumerate(zip(shape, together, strict=True))
    )
    multiple = found.rule.split.multiple
    if not alike or (multiple and together and together[0] != -(-shape[0] // multiple) * multiple):
        padded = f", padded to a multiple of {multiple} rows" if multiple else ""
        expected = f"{list(shape)}{padded}, by {'config.json' if multiple else 'reshard.json'}"
        yield Problem("wrong-shape", found.name, f"{list(together)} in all ranks", expected, AGAIN)


def explain_unknown_padding(found: ShardedTensor, together: Shape) -> Problem:
    """Explains that nothing tells how many rows of a tensor are padding."""
    text = f"{together[0]:,} rows, padding included"
    if found.rule.split.multiple:
        expected = f"a config.json that tells how many there were: {found.rule.shape}"
        return Problem("no-config", found.name, text, expected, "copy the model's config.json beside the rank files")
    remedy = "convert the model itself: only the manifest of reshard says it"
    return Problem("unknown-padding", found.name, text, "a manifest that says how many there were", remedy)


def assemble_tensor(
    found: ShardedTensor, parts: Parts, shape: Shape, together: Shape, files: int, joins: list[Join]
) -> Tensor:
    """Assembles the whole tensor. Appends a join if it has several parts; joins are numbered behind the files."""
    first, dimension = parts[0][0]._replace(name=found.name), found.rule.split.dimension
    size = prod(shape) * first.size // max(prod(first.shape), 1)
    if not size or (len(parts) == len(parts[0]) == 1 and shape == together):
        return first._replace(shape=shape, size=size)
    if found.rule.split.is_packed and len(parts) > 1:
        rows = HALVES
    else:
        rows = prod(shape[:dimension]) if dimension and len(shape) > dimension else 1
    whole = Tensor(found.name, first.dtype, shape, files + len(joins), 0, size)
    joins.append(Join(rows, parts, whole))
    return whole


def unpack_fp4(tensor: Tensor, found: ShardedTensor) -> Tensor:
    """Gives FP4 its dtype and shape in Hugging Face files: I8, two values a byte. Other tensors stay unchanged."""
    if tensor.dtype == "F4" and found.scaling and found.scaling.packed and tensor.shape:
        return tensor._replace(dtype="I8", shape=(*tensor.shape[:-1], tensor.shape[-1] // 2))
    return tensor


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
