"""Tensor names with numbered places, and the patterns of a recipe that they are matched with."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from operator import itemgetter
from typing import NamedTuple

from reshard.numbered_names import NUMBER, split_name
from reshard.recipe_types import Constant, Recipe, Rule


@dataclass(frozen=True, slots=True)
class Pattern:
    """A rule's left name, ready to match: its text with the numbers cut out, and what must stand in their places."""

    rule: int
    is_scale: bool
    key: str
    slots: tuple[str, ...]
    """For each number of the name: the letter of a placeholder, or the digits that must stand there."""
    takes_rest: bool
    right: str
    """A %-format for the name on the right."""
    order: tuple[int, ...]
    """Which number fills each place of `right`."""
    is_plain: bool
    """Whether that is all of them, one after the other."""

    def fits(self, key: str, numbers: Sequence[str]) -> bool:
        """Whether a name of that key and those numbers could be this pattern's, placeholders apart."""
        if self.takes_rest:
            return key.startswith(self.key) and len(numbers) >= len(self.slots)
        return key == self.key and len(numbers) == len(self.slots)

    def checked(self, letters: Container[str]) -> int:
        """The number of leading numbers that `accepts` looks at: it checks the placeholders of `letters`."""
        places = [place for place, slot in enumerate(self.slots, 1) if slot in letters or slot.isdigit()]
        return max(places, default=0)

    def accepts(self, numbers: Sequence[str], marked: Mapping[str, set[str]], before: Mapping[str, str]) -> bool:
        """Whether the numbers are the digits asked for, and on the right side of each marked placeholder.

        `marked` has the members of each placeholder that follows another; `before` leads from those before to it.
        """
        for slot, number in zip(self.slots, numbers, strict=False):
            if slot in marked:
                if number not in marked[slot]:
                    return False
            elif slot in before:
                if number in marked[before[slot]]:
                    return False
            elif slot.isdigit() and slot != number:
                return False
        return True

    def renamed(self, numbers: Sequence[tuple[str, ...]]) -> list[str]:
        """The name on the right for each filling of the slots."""
        if self.is_plain:
            return [self.right % filling for filling in numbers]
        return [self.right % tuple([filling[place] for place in self.order]) for filling in numbers]


class NameGroup(NamedTuple):
    """Names that differ only in their numbers."""

    places: list[int]
    """Their indices."""
    numbers: list[tuple[str, ...]]
    """The numbers of each."""


def group_names_by_key(names: Iterable[str]) -> dict[str, NameGroup]:
    """Groups names by what is left of them without their numbers, as `split_name` splits them.

    What stands before the last two components is split once for all names that have it: a model has 100,000 names.
    """
    groups: dict[str, NameGroup] = {}
    beginnings: dict[str, tuple[dict[str, NameGroup], tuple[str, ...]]] = {}
    groups_by_end: dict[str, dict[str, NameGroup]] = {}
    for place, name in enumerate(names):
        head = name.rsplit(".", 2)[0]
        tail = name[len(head) :]
        try:
            ends, filling = beginnings[head]
            places, numbers = ends[tail]
        except KeyError:
            if "#" in tail or NUMBER.search(tail):
                key, filling = split_name(name)
                places, numbers = groups.setdefault(key, NameGroup([], []))
            else:
                key, filling = split_name(head)
                ends = groups_by_end.setdefault(key, {})
                places, numbers = ends[tail] = groups.setdefault(key + tail, NameGroup([], []))
                beginnings[head] = ends, filling
        places.append(place)
        numbers.append(filling)
    return groups


def split_names(names: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Splits each name as `split_name` does, many of them faster."""
    groups = group_names_by_key(names).items()
    splits = [(place, key, numbers) for key, group in groups for place, numbers in zip(*group, strict=True)]
    return [split[1:] for split in sorted(splits, key=itemgetter(0))]


def make_patterns(number: int, rule: Rule, recipe: Recipe) -> Iterator[Pattern]:
    """The patterns of a rule: one, or two where a placeholder stands for a weight and for its block scale."""
    letter = find_scale_placeholder(rule, recipe)
    if not letter:
        yield make_pattern(number, rule.left, rule.right, is_scale=False)
        return
    placeholder, scale = f"{{{letter}}}", recipe.scales[letter]
    yield make_pattern(
        number, rule.left.replace(placeholder, WEIGHT), rule.right.replace(placeholder, WEIGHT), is_scale=False
    )
    # What is dequantised has no scale on the right.
    right = rule.right.replace(placeholder, scale.right) if placeholder in rule.right else ""
    yield make_pattern(number, rule.left.replace(placeholder, scale.left), right, is_scale=True)


@lru_cache(4096)  # every job makes those of each rule many times over
def make_pattern(number: int, left: str, right: str, *, is_scale: bool) -> Pattern:
    takes_rest = left.endswith(f"{{{REST}}}")
    text = left.removesuffix(f"{{{REST}}}").removesuffix(".")
    components = text.split(".")
    slots = tuple(
        part.strip("{}") for part in components if PLACEHOLDER.fullmatch(part) or NUMBER.fullmatch("." + part)
    )
    parts = (part.replace("#", r"\#") for part in components)
    key = ".".join("#" if PLACEHOLDER.fullmatch(part) or NUMBER.fullmatch("." + part) else part for part in parts)
    order = tuple(slots.index(name) for name in PLACEHOLDER.findall(right))
    right_format = PLACEHOLDER.sub("%s", right.replace("%", "%%"))
    is_plain = not takes_rest and order == tuple(range(len(slots)))
    full_key = key + "." if takes_rest else key
    return Pattern(number, is_scale, full_key, slots, takes_rest, right_format, order, is_plain)


def list_slots(rule: Rule, recipe: Recipe) -> tuple[str, ...]:
    """The filling of each numbered place of the rule's left name: the name of a placeholder, or digits."""
    return next(make_patterns(0, rule, recipe)).slots


def find_later_members(
    names: Iterable[tuple[str, tuple[str, ...]]], recipe: Recipe
) -> tuple[dict[str, set[str]], dict[str, str]]:
    """The members of each placeholder that follows another, told by the marker; the later placeholder by the earlier.

    `names` are those of the left side, as `split_name` gives them.
    """
    placeholders = [placeholder for placeholder in recipe.placeholders.values() if placeholder.after]
    known = list(names)
    marked = {}
    for placeholder in placeholders:
        marker = make_pattern(0, placeholder.marker, "", is_scale=False)
        place = marker.slots.index(placeholder.name)
        marked[placeholder.name] = {numbers[place] for key, numbers in known if marker.fits(key, numbers)}
    before = {
        earlier.name: placeholder.name
        for placeholder in placeholders
        for earlier in recipe.placeholders.values()
        if placeholder.after in (earlier.name, earlier.within, earlier.some_of)
    }
    return marked, before


def fill_pattern(pattern: str, numbers: Mapping[str, int]) -> str:
    """Fills a pattern with numbers; the placeholder of a weight and its block scale becomes the weight."""
    return PLACEHOLDER.sub(lambda placeholder: str(numbers.get(placeholder[1], WEIGHT)), pattern)


def list_present_constants(recipe: Recipe, scaled: Container[str]) -> list[Constant]:
    """Lists the constants of rank files in which some weights have the block scales of the placeholders `scaled`."""
    return [constant for constant in recipe.constants if not constant.scale or constant.scale in scaled]


def list_constant_names(constant: Constant, members: Mapping[str, set[int]]) -> list[str]:
    """Lists the names of a constant: one for each member of its placeholders."""
    letters = PLACEHOLDER.findall(constant.right)
    chosen = product(*(sorted(members[letter]) for letter in letters))
    return [fill_pattern(constant.right, dict(zip(letters, numbers, strict=True))) for numbers in chosen]


PLACEHOLDER = re.compile(r"\{([^{}]*)\}")

REST = "*"
"""The placeholder at the end of a drop rule that stands for the rest of the name: it drops what no other rule knows."""

WEIGHT = "weight"


def find_scale_placeholder(rule: Rule, recipe: Recipe) -> str:
    """The placeholder in a rule's left name that stands for a weight or its block scale; empty if none does."""
    return next((letter for letter in PLACEHOLDER.findall(rule.left) if letter in recipe.scales), "")
