"""From the names in a target back to those of the source, by the recipe; and which ranks should hold what."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from reshard.names import Pattern, later_members, patterns_of, slots_of, split_name
from reshard.recipe import WEIGHT, scale_letter
from reshard.types import BlockScale, Checkpoint, Recipe, Rule


class Place(NamedTuple):
    """What a tensor of a target is, by its name."""

    rule: Rule | None
    """None in a whole file, where no rule need know a tensor."""
    scaling: BlockScale | None
    """How weights of this rule are scaled, if they are."""
    weight: str
    """The name in the source: of the tensor, or of the weight that this is the block scale of."""
    scale: str
    """The name in the source of the block scale, whether there is one or not; empty if there cannot be any."""
    is_scale: bool


class Backwards(NamedTuple):
    """A recipe, ready to tell what a tensor of the target is, for one source."""

    patterns: Mapping[str, Sequence[tuple[Pattern, Pattern, Pattern | None]]]
    """By their key: a pattern for names in the target; that of the weight, and of its scale, if it can have one."""
    rules: Sequence[Rule]
    scalings: Mapping[int, BlockScale]
    """By the number of the rule."""
    marked: Mapping[str, set[str]]
    before: Mapping[str, str]
    is_whole: bool

    def place(self, name: str) -> Place | None:
        """None if no rule knows the name, or more than one does."""
        key, numbers = split_name(name)
        fitting = [found for found in self.patterns.get(key, ()) if found[0].fits(key, numbers)]
        fitting = [found for found in fitting if found[0].accepts(numbers, self.marked, self.before)]
        if len(fitting) != 1:
            return Place(None, None, name, "", is_scale=False) if self.is_whole else None
        pattern, weight, scale = fitting[0]
        numbered = [numbers]
        return Place(
            self.rules[pattern.rule],
            self.scalings.get(pattern.rule),
            weight.renamed(numbered)[0],
            scale.renamed(numbered)[0] if scale else "",
            is_scale=pattern.is_scale,
        )


def backwards(recipe: Recipe, source: Checkpoint, *, is_whole: bool) -> Backwards:
    """With rank files from the right names to the left ones; with whole files from the left names to themselves."""
    scalings = {
        number: recipe.scales[letter]
        for number, rule in enumerate(recipe.rules)
        if (letter := scale_letter(rule, recipe))
    }
    patterns: dict[str, list[tuple[Pattern, Pattern, Pattern | None]]] = {}
    for number, rule in enumerate(recipe.rules):
        for triple in triples_of(number, rule, recipe, is_whole=is_whole) if rule.relation != "drop" else ():
            patterns.setdefault(triple[0].key, []).append(triple)
    members = later_members(map(split_name, source.tensors), recipe)
    return Backwards(patterns, recipe.rules, scalings, *members, is_whole)


def triples_of(
    number: int, rule: Rule, recipe: Recipe, *, is_whole: bool
) -> Iterator[tuple[Pattern, Pattern, Pattern | None]]:
    letter = scale_letter(rule, recipe)
    right = rule.left if is_whole else rule.right
    is_kept = f"{{{letter}}}" in right
    # What is dequantised has no scale on the right, but one on the left.
    left = right if is_kept or not letter else f"{right.removesuffix(WEIGHT)}{{{letter}}}"
    turned = replace(rule, left=left, right=rule.left)
    scales = {
        name: replace(scale, left=scale.left if is_whole else scale.right, right=scale.left)
        for name, scale in recipe.scales.items()
    }
    found = list(patterns_of(number, turned, replace(recipe, scales=scales)))
    scale = found[1] if len(found) > 1 else None
    for pattern in found if is_kept else found[:1]:
        yield pattern, found[0], scale


class Holders(NamedTuple):
    """The ranks that should hold a tensor of the source, or a part of it."""

    ranks: Collection[int]
    optional: str
    """Why it may be left out by all of them; empty if it may not."""


def holders(source: Checkpoint, recipe: Recipe, ranks: int) -> dict[str, Holders]:
    """By the name of each tensor of the source."""
    names = {name: split_name(name) for name in source.tensors}
    marked, before = later_members(names.values(), recipe)
    patterns = [pattern for number, rule in enumerate(recipe.rules) for pattern in patterns_of(number, rule, recipe)]
    found: dict[str, Holders] = {}
    dealt: dict[str, tuple[str, int, str]] = {}
    by_key: dict[tuple[str, int], list[Pattern]] = {}
    for name, (key, numbers) in names.items():
        fitting = by_key.get((key, len(numbers)))
        if fitting is None:
            # Those last that take what no other knows.
            fitting = [pattern for pattern in patterns if pattern.fits(key, numbers)]
            by_key[key, len(numbers)] = fitting = sorted(fitting, key=lambda pattern: pattern.takes_rest)
        pattern = next((pattern for pattern in fitting if pattern.accepts(numbers, marked, before)), None)
        rule = recipe.rules[pattern.rule] if pattern else None
        if pattern is None or rule is None:
            found[name] = Holders(range(ranks), "")
        elif rule.relation == "drop" or (rule.relation == "dequantize" and pattern.is_scale):
            found[name] = Holders((), "")
        elif rule.split.startswith("by "):
            letter = rule.split.removeprefix("by ")
            dealt[name] = letter, int(numbers[slots_of(rule, recipe).index(letter)]), rule.optional
        else:
            found[name] = Holders(range(ranks), rule.optional)
    members: dict[str, set[int]] = {}
    for letter, member, _ in dealt.values():
        members.setdefault(letter, set()).add(member)
    for name, (letter, member, optional) in dealt.items():
        found[name] = Holders((member * ranks // len(members[letter]),), optional)
    return found
