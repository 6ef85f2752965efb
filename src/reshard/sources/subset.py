"""Narrows a checkpoint to some layers and experts. Opens no file.

The kept layers and experts are numbered from 0 on, so that the result is a whole, smaller model: tensor names have the
new numbers, tensors with one row for each expert keep only the rows of kept experts, and the config has the new counts.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reshard.errors import Problem, refuse, require_none
from reshard.formats.manifest import count_left_out
from reshard.numbered_names import NUMBER
from reshard.recipe_types import Placeholder, Recipe, Rule
from reshard.recipes.formulas import parse_shape
from reshard.recipes.patterns import list_slots
from reshard.sources.match import Family, Matched, find_members
from reshard.sources.pruned_config import check_experts, find_base, name_table, prune_config
from reshard.text import format_numbers
from reshard.types import Checkpoint, Join, Subset, Tensor

COUNTED = {"--layers": "layers", "--experts": "experts"}
"""Option -> the `counts` of the placeholder whose members it chooses."""

MEMBER = {"--layers": "layer", "--experts": "expert"}
"""Option -> the word for one member."""


@dataclass(frozen=True, slots=True)
class ChosenMembers:
    """The members of a placeholder that an option chooses."""

    option: str
    """`--layers` or `--experts`."""
    placeholder: Placeholder
    chosen: tuple[int, ...]
    """Their numbers, sorted."""
    members: frozenset[int]
    """The numbers of all members."""


Numbers = Mapping[str, Mapping[int, int]]
"""For each placeholder: old number -> new number of each kept member. A placeholder not listed keeps all members."""


def narrow_checkpoint(checkpoint: Checkpoint, recipe: Recipe, matched: Matched, subset: Subset) -> Checkpoint:
    """Narrows a checkpoint to the chosen layers and experts. Returns the checkpoint itself if all are chosen.

    Raises Refused with every reason why the choice is not possible.
    """
    if subset.layers is None and subset.experts is None:
        require_none(check_renumber(subset))
        return checkpoint
    families, members = matched.families, matched.members
    choices = [*read_choices(subset, recipe, members)]
    require_none(check_choices(choices, renumber=subset.renumber))
    choices = [choice for choice in choices if len(choice.chosen) < len(choice.members)]
    if not choices:
        return checkpoint
    numbers = assign_new_numbers(choices, recipe, members)
    kept = [keep_family(family, recipe, numbers) for family in families]
    left = find_members([family for family in kept if family.tensors], recipe)
    experts = next((choice for choice in choices if choice.option == "--experts"), None)
    problems = [*check_experts(checkpoint.config, experts.placeholder.size, len(experts.chosen))] if experts else []
    tensors, joins = keep_rows(kept, recipe, experts, checkpoint, problems)
    layers = next((numbers[choice.placeholder.name] for choice in choices if choice.option == "--layers"), None)
    config = prune_config(checkpoint.config, recipe, left, layers, problems)
    require_none(problems)
    described = describe_subset(choices, checkpoint, tensors)
    return replace(checkpoint, tensors=tensors, config=config, joins=joins, subset=described)


def check_renumber(subset: Subset) -> Iterator[Problem]:
    """Reports `--renumber` without `--layers` or `--experts`."""
    if subset.renumber:
        yield Problem("wrong-option", "--renumber", "no choice", "--layers or --experts", "leave it out")


def read_choices(subset: Subset, recipe: Recipe, members: Mapping[str, set[int]]) -> Iterator[ChosenMembers]:
    """Finds the placeholder of each option. Raises Refused if the recipe does not allow the choice."""
    for option, chosen in (("--layers", subset.layers), ("--experts", subset.experts)):
        if chosen is None:
            continue
        place = next((place for place in recipe.placeholders.values() if place.counts == COUNTED[option]), None)
        if place is None:
            expected = f"a recipe that counts {COUNTED[option]}; {recipe.name} does not"
            raise refuse("wrong-option", option, format_numbers(chosen), expected)
        if option == "--experts" and not place.size:
            raise refuse("wrong-option", option, format_numbers(chosen), f"a `size` for the experts in {recipe.name}")
        if option == "--experts" and not any(has_row_per_expert(rule, place.size) for rule in recipe.rules):
            expected = f"a row of {recipe.name} whose shape begins with {place.size}: the router, which loses rows too"
            raise refuse("wrong-option", option, format_numbers(chosen), expected)
        yield ChosenMembers(option, place, tuple(sorted(set(chosen))), frozenset(members[place.name]))


def check_choices(choices: Iterable[ChosenMembers], *, renumber: bool) -> Iterator[Problem]:
    """Reports numbers that do not exist, an empty choice, and choices that leave a gap without `--renumber`."""
    for option, place, chosen, members in ((one.option, one.placeholder, one.chosen, one.members) for one in choices):
        if unknown := set(chosen) - members:
            found = f"{MEMBER[option]} {format_numbers(unknown)}"
            yield Problem("unknown-number", option, found, f"{place.counts} {format_numbers(members)}")
        elif not chosen:
            yield Problem("nothing-kept", option, f"no {MEMBER[option]}", "at least one")
        elif chosen[-1] != len(chosen) - 1 and not renumber:
            found = f"{place.counts} {format_numbers(chosen)}"
            remedy = f"--renumber gives them the numbers {format_numbers(range(len(chosen)))}"
            yield Problem("needs-renumber", option, found, "0 and those that follow, without a gap", remedy)


def assign_new_numbers(choices: Iterable[ChosenMembers], recipe: Recipe, members: Mapping[str, set[int]]) -> Numbers:
    """Assigns the new numbers of kept members. MTP layers are always kept; their numbers follow the last kept layer."""
    found: dict[str, dict[int, int]] = {}
    for choice in choices:
        new = {old: place for place, old in enumerate(choice.chosen)}
        for name, placeholder in recipe.placeholders.items():
            if find_base(placeholder, recipe) == choice.placeholder.name:
                found[name] = new
            elif placeholder.after == choice.placeholder.name:
                later = enumerate(sorted(members[name]), len(choice.chosen))
                found[name] = {old: place for place, old in later}
    return found


def keep_family(family: Family, recipe: Recipe, numbers: Numbers) -> Family:
    """Keeps the chosen tensors of a family, with new names and numbers. `names` of the result are the old names."""
    slots = list_slots(recipe.rules[family.rule], recipe)
    places = [(place, numbers[slot]) for place, slot in enumerate(slots) if slot in numbers]
    if not places:
        return family._replace(names=[tensor.name for tensor in family.tensors])
    kept = Family(family.rule, family.is_scale, [], [], [])
    for tensor, filling in zip(family.tensors, family.numbers, strict=True):
        if all(int(filling[place]) in new for place, new in places):
            changed = list(filling)
            for place, new in places:
                changed[place] = str(new[int(filling[place])])
            kept.tensors.append(tensor._replace(name=renumber_name(tensor.name, changed)))
            kept.numbers.append(tuple(changed))
            kept.names.append(tensor.name)
    return kept


def renumber_name(name: str, numbers: Sequence[str]) -> str:
    """Replaces the numbers in a name: `layers.7.mlp`, (`2`,) -> `layers.2.mlp`."""
    pieces = NUMBER.split(name)
    pieces[1::2] = ["." + number for number in numbers]
    return "".join(pieces)


def keep_rows(
    families: Iterable[Family],
    recipe: Recipe,
    experts: ChosenMembers | None,
    checkpoint: Checkpoint,
    problems: list[Problem],
) -> tuple[dict[str, Tensor], tuple[Join, ...]]:
    """Cuts tensors with one row for each expert to the rows of the chosen experts. Returns all tensors by name, in
    their old order, and all joins. Appends to `problems` each tensor that cannot be cut.
    """
    tensors: dict[str, Tensor] = {}
    joins = [*checkpoint.joins]
    for family in families:
        rule, has_rows = recipe.rules[family.rule], False
        if experts and family.tensors:
            has_rows = has_row_per_expert(rule, experts.placeholder.size)
            problems.extend(check_tables(family, rule, experts.placeholder.size))
        for tensor, old in zip(family.tensors, family.names, strict=True):
            found = tensor
            if has_rows and experts:
                if tensor.shape[:1] != (len(experts.members),) or tensor.size % len(experts.members):
                    expected = f"{len(experts.members)} rows, one for each expert"
                    problems.append(Problem("wrong-shape", tensor.name, f"shape {list(tensor.shape)}", expected))
                    continue
                found = take_rows(tensor, experts.chosen, checkpoint, joins)
            tensors[old] = found
    ordered = (tensors[name] for name in checkpoint.tensors if name in tensors)
    return {tensor.name: tensor for tensor in ordered}, tuple(joins)


def has_row_per_expert(rule: Rule, size: str) -> bool:
    """Whether the tensors of a rule have one row for each expert; `size` is the formula for the number of experts."""
    return bool(rule.shape) and parse_shape(rule.shape)[1][:1] == [size]


def check_tables(family: Family, rule: Rule, size: str) -> Iterator[Problem]:
    """Reports tensors that need all experts: tables of expert numbers, or experts in a later dimension."""
    formulas = parse_shape(rule.shape)[1] if rule.shape and rule.relation != "drop" else []
    if name_table(size) in formulas:
        found, remedy = "a table that names experts by their numbers", "choose --layers without such a table"
        yield from (
            Problem("needs-all-experts", tensor.name, found, "all experts", remedy) for tensor in family.tensors
        )
    elif any(re.search(rf"(?<![\w.]){re.escape(size)}(?![\w.])", formula) for formula in formulas[1:]):
        found = f"{rule.shape}, by the recipe"
        yield from (Problem("needs-all-experts", tensor.name, found, "all experts") for tensor in family.tensors)


def take_rows(tensor: Tensor, chosen: Sequence[int], checkpoint: Checkpoint, joins: list[Join]) -> Tensor:
    """Takes some rows of a tensor: one byte range of it, or a new join (appended to `joins`) of several."""
    width = tensor.size // tensor.shape[0]

    def take(first: int, count: int) -> Tensor:
        shape = (count, *tensor.shape[1:])
        return tensor._replace(shape=shape, offset=tensor.offset + first * width, size=count * width)

    runs = find_runs(chosen)
    if len(runs) == 1:
        return take(*runs[0])
    shape, size = (len(chosen), *tensor.shape[1:]), len(chosen) * width
    result = tensor._replace(shape=shape, file=len(checkpoint.files) + len(joins), offset=0, size=size)
    joins.append(Join(1, tuple((take(*run),) for run in runs), result))
    return result


def find_runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Finds runs of consecutive numbers: the first number and the length of each run."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((number, 1))
    return found


def describe_subset(
    choices: Iterable[ChosenMembers], checkpoint: Checkpoint, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Describes a subset for the manifest, as JSON values."""
    found: dict[str, Any] = {
        choice.placeholder.counts: {"kept": list(choice.chosen), "of": len(choice.members)} for choice in choices
    }
    found["left_out"] = count_left_out(checkpoint.tensors, tensors, {})
    return {**found, "source": checkpoint.subset} if checkpoint.subset else found
