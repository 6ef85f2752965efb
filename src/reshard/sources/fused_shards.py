"""Splits the fused tensors of rank files into the shards that they were made of, under their original names.

A part of a fused tensor is a shard like any other: it has a dtype, a shape, and a byte range of a file. What the
headers do not tell, the number of rows of each part, is computed from the config, by the shapes of the recipe.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from reshard.errors import refuse
from reshard.recipe_types import BlockScale, Recipe, Rule
from reshard.recipes.formulas import compute_shape, count_heads, parse_shape
from reshard.recipes.fusions import Fusion, list_fusions
from reshard.recipes.patterns import PLACEHOLDER, WEIGHT, Pattern, find_scale_placeholder, make_pattern
from reshard.recipes.splits import ROWS, count_parts
from reshard.text import format_list
from reshard.types import Tensor

BESIDE = "copy the model's config.json beside the rank files"

ANOTHER = "is config.json another model's?"

DAMAGED = "is the file damaged, or of another model?"

OTHERS = "is a rank file missing, or from another conversion, or config.json another model's?"


class FusedPattern(NamedTuple):
    """A fused tensor of a recipe, or its block scale, as it stands in rank files."""

    name: str
    """Name pattern in the rank files."""
    pattern: Pattern
    """The same, ready to match."""
    fusion: Fusion
    lefts: tuple[str, ...]
    """Of each part: the name pattern in the original files."""
    scaling: BlockScale | None
    """Of a block scale: how it scales; None for other tensors."""


class PartShard(NamedTuple):
    """The shard of an original tensor, as a part of a fused one."""

    rule: int
    """Index of its row in the recipe."""
    name: str
    """In the original files."""
    shard: Tensor


def list_fused_patterns(recipe: Recipe) -> list[FusedPattern]:
    """Lists the fused tensors of a recipe, those of block scales by themselves."""
    found = []
    for fusion in list_fusions(recipe):
        first = recipe.rules[fusion.rules[0]]
        letter = find_scale_placeholder(first, recipe)
        words = {WEIGHT: WEIGHT, recipe.scales[letter].left: recipe.scales[letter].right} if letter else {"": ""}
        for left, right in words.items():
            own = fusion.right.replace(f"{{{letter}}}", right)
            lefts = tuple(recipe.rules[number].left.replace(f"{{{letter}}}", left) for number in fusion.rules)
            is_scale = left not in ("", WEIGHT)
            pattern = make_pattern(fusion.rules[0], own, own, is_scale=is_scale)
            found.append(FusedPattern(own, pattern, fusion, lefts, recipe.scales[letter] if is_scale else None))
    return found


def split_fused(
    tensor: Tensor, fused: FusedPattern, numbers: Sequence[str], rows: Sequence[int]
) -> Iterator[PartShard]:
    """Splits a fused tensor into its parts, in their order. `numbers` fill the placeholders of its name; `rows` are
    those of each part, of one member.
    """
    members = tensor.shape[0] if fused.fusion.stacked else 1
    rest = tensor.shape[2 if fused.fusion.stacked else 1 :]
    row_size = tensor.size // (members * sum(rows))
    filling = dict(zip(fused.pattern.slots, numbers, strict=True))
    forms = [(PLACEHOLDER.sub("%s", left.replace("%", "%%")), PLACEHOLDER.findall(left)) for left in fused.lefts]
    begin = tensor.offset
    for member in range(members):
        filling[fused.fusion.stacked] = str(member)
        for rule, (form, letters), count in zip(fused.fusion.rules, forms, rows, strict=True):
            name = form % tuple([filling[letter] for letter in letters])
            size = count * row_size
            shard = Tensor(tensor.name, tensor.dtype, (count, *rest), tensor.file, begin, size)
            yield PartShard(rule, name, shard)
            begin += size


def spread_rows(
    tensor: Tensor, fused: FusedPattern, recipe: Recipe, config: Mapping[str, Any], ranks: int, *, file: str
) -> tuple[int, ...]:
    """Spreads the rows of a fused tensor over its parts: as the config tells, else equally among parts that the recipe
    describes alike. Raises Refused if neither gives all its rows exactly; `file` is its file's name.
    """
    place, at = f"{file}: {tensor.name}", 1 if fused.fusion.stacked else 0
    if len(tensor.shape) <= at or not tensor.size or tensor.size % prod(tensor.shape[: at + 1]):
        expected, remedy = ("whole rows of each member", DAMAGED) if at else ("whole rows", OTHERS)
        raise refuse("wrong-shape", place, f"{tensor.dtype} {list(tensor.shape)}", expected, remedy)
    total, rules = tensor.shape[at], [recipe.rules[number] for number in fused.fusion.rules]
    told = [[count_part_rows(rule, recipe, config, ranks, side) for rule in rules] for side in list_sides(fused)]
    for counts in told:
        known = [count for count in counts if count is not None and count > 0]
        if len(known) == len(rules) and sum(known) == total:
            return tuple(known)
    is_told = None not in told[0]
    are_alike = len({(rule.split.text, rule.shape) for rule in rules}) == 1
    if are_alike and total % len(rules) == 0 and not is_told:
        return (total // len(rules),) * len(rules)
    if untold := [rule.left for rule in rules if not rule.shape or parse_shape(rule.shape)[1][:1] in ([], ["?"])]:
        found = f"no number of rows for {format_list(untold)}"
        raise refuse("wrong-recipe", fused.name, found, "a shape in each of its rows", "give it to them in the recipe")
    if not is_told and not are_alike:
        lacking = [rule for rule, count in zip(rules, told[0], strict=True) if count is None]
        keys = dict.fromkeys(key for rule in lacking for key in (rule.split.heads_key, rule.shape) if key)
        expected = f"a config.json that tells the rows of each part: {format_list(keys)}"
        raise refuse("no-config", fused.name, "not known how many rows are whose", expected, BESIDE)
    parts = (f"{count or 'as many'} of {left}" for count, left in zip(told[0], shorten_names(fused.lefts), strict=True))
    expected = f"by config.json and the recipe: {', '.join(parts)}"
    expected, remedy = (f"in each of {ranks} ranks, {expected}", OTHERS) if ranks > 1 else (expected, ANOTHER)
    raise refuse("wrong-shape", place, f"{total} rows, of {list(tensor.shape)}", expected, remedy)


def shorten_names(lefts: Sequence[str]) -> Iterator[str]:
    """Shortens name patterns to what follows the last number."""
    return (left.rpartition("}.")[2] for left in lefts)


def list_sides(fused: FusedPattern) -> list[int]:
    """Lists the numbers of rows of a weight, in elements, that may share a row of its block scales: packed FP4 that was
    cast to FP8 has the block of FP8. 1 for a weight.
    """
    if fused.scaling is None:
        return [1]
    blocks = [fused.scaling.block, fused.scaling.fp8_block] if fused.scaling.packed else [fused.scaling.block]
    return [block[ROWS] for block in blocks]


def count_part_rows(rule: Rule, recipe: Recipe, config: Mapping[str, Any], ranks: int, side: int) -> int | None:
    """Counts the rows of a tensor that each rank has, as blocks of `side` rows; None if the config does not tell.
    Raises Refused if the ranks cannot share them.
    """
    shape = compute_shape(rule.shape, config, recipe.sizes) if rule.shape else []
    rows, heads = next(iter(shape), None), count_heads(rule, config)
    if rows is None or heads is None:
        return None
    parts = count_parts(ranks, heads) if rule.split.dimension == ROWS else 1
    if not parts or rows % parts:
        things = f"{heads} {rule.split.heads_key}" if heads else f"{rows} rows"
        expected = f"one of the numbers to divide the other: {things} and {ranks} ranks"
        raise refuse("not-divisible", rule.left, f"{ranks} ranks", expected, OTHERS)
    return -(-(rows // parts) // side)


class RowShares:
    """The rows of the parts of fused tensors, computed once for all layers that are alike."""

    def __init__(self, recipe: Recipe, config: Mapping[str, Any], files: Sequence[str], ranks: int) -> None:
        self.recipe, self.config, self.files, self.ranks = recipe, config, files, ranks
        self.known: dict[tuple[Any, ...], tuple[int, ...]] = {}

    def split(self, tensor: Tensor, fused: FusedPattern, numbers: Sequence[str]) -> Iterator[PartShard]:
        """Splits a fused tensor into its parts. Raises Refused if they do not make it up exactly."""
        key = (fused.pattern, tensor.dtype, tensor.shape)
        if key not in self.known:
            self.known[key] = spread_rows(
                tensor, fused, self.recipe, self.config, self.ranks, file=self.files[tensor.file]
            )
        return split_fused(tensor, fused, numbers, self.known[key])
