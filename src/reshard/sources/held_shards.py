"""Groups the shards of rank files by the names of the original tensors; splits fused ones, and sets constants apart."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from reshard.errors import Problem, Refused, refuse
from reshard.formats.huggingface import FolderHeaders
from reshard.recipe_types import BlockScale, Recipe, Rule
from reshard.recipes.alternatives import list_rules
from reshard.recipes.flattening import FLATTEN, read_last_length
from reshard.recipes.formulas import count_heads
from reshard.recipes.fusions import FUSED
from reshard.recipes.patterns import (
    WEIGHT,
    Pattern,
    find_later_members,
    find_scale_placeholder,
    make_pattern,
    make_patterns,
    split_names,
)
from reshard.sources.fused_shards import DAMAGED, FusedPattern, PartShard, RowShares, list_fused_patterns
from reshard.sources.match import suggest_rule
from reshard.types import Tensor


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


class FoundConstant(NamedTuple):
    """A tensor in a rank file that a recipe makes of nothing."""

    constant: int
    """Index into the constants of the recipe."""
    tensor: Tensor


class CollectedShards(NamedTuple):
    """All tensors of the rank files, by what they are."""

    held: dict[str, ShardedTensor]
    """By original name."""
    constants: list[FoundConstant]
    unknown: list[Problem]
    """A problem for each tensor that no rule, or more than one, covers."""
    unsplit: list[Problem]
    """Problems of fused tensors that cannot be split into their parts."""


class RankPatterns(NamedTuple):
    """The names of a recipe's rank files, ready to match."""

    by_key: Mapping[str, Sequence[Pattern]]
    """All of them, by what is left of a name without its numbers."""
    fused: Mapping[Pattern, FusedPattern]
    constants: Mapping[Pattern, int]
    """Pattern -> index into the constants of the recipe."""


def collect_rank_patterns(recipe: Recipe, turned: Recipe, config: Mapping[str, Any]) -> RankPatterns:
    """Collects the patterns of a recipe's right side; `turned` is the recipe with its sides exchanged."""
    rules = [(number, rule) for number, rule in list_rules(turned, config) if rule.relation not in ("drop", *FUSED)]
    plain = [pattern for number, rule in rules for pattern in make_patterns(number, rule, turned)]
    fused = {one.pattern: one for one in list_fused_patterns(recipe)}
    # Behind the rules: a pattern of a rule never equals one of a constant.
    names = [constant.right for constant in recipe.constants]
    constants = {
        make_pattern(len(recipe.rules) + place, name, name, is_scale=False): place for place, name in enumerate(names)
    }
    by_key: dict[str, list[Pattern]] = {}
    for pattern in (*plain, *fused, *constants):
        by_key.setdefault(pattern.key, []).append(pattern)
    return RankPatterns(by_key, fused, constants)


def collect_shards(stored: FolderHeaders, recipe: Recipe, config: Mapping[str, Any]) -> CollectedShards:
    """Groups the shards of all ranks by their original names. A fused tensor counts as its parts."""
    turned = reverse_recipe(recipe)
    patterns = collect_rank_patterns(recipe, turned, config)
    names = split_names(tensor.name for tensor in stored.tensors)
    marked, before = find_later_members(names, turned)
    kinds = list_kinds(recipe, config)
    shares = RowShares(recipe, config, [file.name for file in stored.files], len(stored.files))
    found = CollectedShards({}, [], [], [])
    for tensor, (key, numbers) in zip(stored.tensors, names, strict=True):
        fitting = [pattern for pattern in patterns.by_key.get(key, ()) if pattern.fits(key, numbers)]
        fitting = [pattern for pattern in fitting if pattern.accepts(numbers, marked, before)]
        if len(fitting) != 1:
            subject = f"{stored.files[tensor.file].name}: {tensor.name}"
            found.unknown.append(explain_no_rule(subject, fitting, recipe))
        elif fitting[0] in patterns.constants:
            found.constants.append(FoundConstant(patterns.constants[fitting[0]], tensor))
        else:
            try:
                parts = list_part_shards(tensor, fitting[0], numbers, patterns, shares)
            except Refused as refused:
                found.unsplit.extend(refused.problems)
                continue
            for number, name, shard in parts:
                if name not in found.held:
                    kind = kinds[number, fitting[0].is_scale]
                    member = find_member(kind.rule, fitting[0], numbers)
                    found.held[name] = kind._replace(name=name, member=member, by_rank={})
                found.held[name].by_rank[shard.file] = shard
    # A fault of the config is told once for all layers.
    return found._replace(unsplit=list(dict.fromkeys(found.unsplit)))


def list_part_shards(
    tensor: Tensor, pattern: Pattern, numbers: tuple[str, ...], patterns: RankPatterns, shares: RowShares
) -> Iterable[PartShard]:
    """Lists the shards of original tensors in a tensor of a rank file: its parts, or itself if it is not fused. Raises
    Refused if the parts do not make it up exactly.
    """
    if fused := patterns.fused.get(pattern):
        return shares.split(tensor, fused, numbers)
    (name,) = pattern.renamed([numbers])
    rule = shares.recipe.rules[pattern.rule]
    shard = unflatten_shard(tensor, rule, shares.files[tensor.file]) if rule.relation == FLATTEN else tensor
    return [PartShard(pattern.rule, name, shard)]


def unflatten_shard(tensor: Tensor, rule: Rule, file: str) -> Tensor:
    """Makes two dimensions again of the last one of a flattened shard, as its row says. Raises Refused if it is no
    multiple.
    """
    last = read_last_length(rule)
    if not tensor.shape or tensor.shape[-1] % last:
        found, expected = f"{tensor.dtype} {list(tensor.shape)}", f"a multiple of {last} at the end, for {rule.shape}"
        raise refuse("wrong-shape", f"{file}: {tensor.name}", found, expected, DAMAGED)
    return tensor._replace(shape=(*tensor.shape[:-1], tensor.shape[-1] // last, last))


def list_kinds(recipe: Recipe, config: Mapping[str, Any]) -> dict[tuple[int, bool], ShardedTensor]:
    """Lists the facts that all tensors of a row share: index of the row, whether they are block scales -> facts."""
    found = {}
    for number, rule in enumerate(recipe.rules):
        scaling, heads = recipe.scales.get(find_scale_placeholder(rule, recipe)), count_heads(rule, config)
        for is_scale in (False, True):
            found[number, is_scale] = ShardedTensor("", rule, scaling, is_scale, -1, heads, {})
    return found


def find_member(rule: Rule, pattern: Pattern, numbers: Sequence[str]) -> int:
    """Finds the number of the expert of a tensor, where whole experts are assigned to ranks; else -1."""
    letter = rule.split.placeholder
    return int(numbers[pattern.slots.index(letter)]) if letter else -1


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


def explain_no_rule(subject: str, fitting: Sequence[Pattern], recipe: Recipe) -> Problem:
    """Explains why a tensor has not exactly one rule; `fitting` are the patterns that fit."""
    if fitting:
        rules = [recipe.rules[one.rule].left if one.rule < len(recipe.rules) else "a constant" for one in fitting]
        found = " and ".join(map(repr, rules))
        return Problem("two-rules", subject, found, "one rule", f"correct the recipe {recipe.origin}")
    expected = f"a name on the right of {recipe.name}"
    return Problem("no-rule", subject, "no rule knows it", expected, suggest_rule(recipe, "a row"))


def take_first_shards(held: Iterable[ShardedTensor]) -> dict[str, Tensor]:
    """Takes the first shard of each tensor; returns original name -> shard."""
    return {found.name: found.by_rank[min(found.by_rank)] for found in held}
