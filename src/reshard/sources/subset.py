"""Narrows a checkpoint to some layers and experts. Opens no file.

The kept layers and experts are numbered from 0 on, so that the result is a whole, smaller model: tensor names have the
new numbers, tensors with one row for each expert keep only the rows of kept experts, and the config has the new counts.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reshard.errors import Problem, refuse, require_none
from reshard.formats.manifest import left_out
from reshard.recipes.formulas import parse_shape
from reshard.recipes.patterns import NUMBER, slots_of
from reshard.sources.match import Family, Matched, find_members
from reshard.sources.pruned_config import expert_problems, pruned_config, table_of
from reshard.sources.rank_files import runs_of
from reshard.text import numbers_text
from reshard.types import Checkpoint, Join, Placeholder, Recipe, Rule, Subset, Tensor

COUNTED = {"--layers": "layers", "--experts": "experts"}
"""Option -> the `counts` of the placeholder whose members it chooses."""

MEMBER = {"--layers": "layer", "--experts": "expert"}
"""Option -> the word for one member."""


@dataclass(frozen=True, slots=True)
class Choice:
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


def narrow(checkpoint: Checkpoint, recipe: Recipe, matched: Matched, subset: Subset) -> Checkpoint:
    """Narrows a checkpoint to the chosen layers and experts. Returns the checkpoint itself if all are chosen.

    Raises Refused with every reason why the choice is not possible.
    """
    if subset.layers is None and subset.experts is None:
        require_none(idle_problems(subset))
        return checkpoint
    families, members = matched.families, matched.members
    choices = [*choices_of(subset, recipe, members)]
    require_none(choice_problems(choices, renumber=subset.renumber))
    choices = [choice for choice in choices if len(choice.chosen) < len(choice.members)]
    if not choices:
        return checkpoint
    numbers = new_numbers(choices, recipe, members)
    kept = [kept_family(family, recipe, numbers) for family in families]
    left = find_members([family for family in kept if family.tensors], recipe)
    experts = next((choice for choice in choices if choice.option == "--experts"), None)
    problems = [*expert_problems(checkpoint.config, experts.placeholder.size, len(experts.chosen))] if experts else []
    tensors, joins = whole_rows(kept, recipe, experts, checkpoint, problems)
    layers = next((numbers[choice.placeholder.name] for choice in choices if choice.option == "--layers"), None)
    config = pruned_config(checkpoint.config, recipe, left, layers, problems)
    require_none(problems)
    described = description(choices, checkpoint, tensors)
    return replace(checkpoint, tensors=tensors, config=config, joins=joins, subset=described)


def idle_problems(subset: Subset) -> Iterator[Problem]:
    """Reports `--renumber` without `--layers` or `--experts`."""
    if subset.renumber:
        yield Problem("wrong-option", "--renumber", "no choice", "--layers or --experts", "leave it out")


def choices_of(subset: Subset, recipe: Recipe, members: Mapping[str, set[int]]) -> Iterator[Choice]:
    """Finds the placeholder of each option. Raises Refused if the recipe does not allow the choice."""
    for option, chosen in (("--layers", subset.layers), ("--experts", subset.experts)):
        if chosen is None:
            continue
        place = next((place for place in recipe.placeholders.values() if place.counts == COUNTED[option]), None)
        if place is None:
            expected = f"a recipe that counts {COUNTED[option]}; {recipe.name} does not"
            raise refuse("wrong-option", option, numbers_text(chosen), expected)
        if option == "--experts" and not place.size:
            raise refuse("wrong-option", option, numbers_text(chosen), f"a `size` for the experts in {recipe.name}")
        if option == "--experts" and not any(is_by_row(rule, place.size) for rule in recipe.rules):
            expected = f"a row of {recipe.name} whose shape begins with {place.size}: the router, which loses rows too"
            raise refuse("wrong-option", option, numbers_text(chosen), expected)
        yield Choice(option, place, tuple(sorted(set(chosen))), frozenset(members[place.name]))


def choice_problems(choices: Iterable[Choice], *, renumber: bool) -> Iterator[Problem]:
    """Reports numbers that do not exist, an empty choice, and choices that leave a gap without `--renumber`."""
    for option, place, chosen, members in ((one.option, one.placeholder, one.chosen, one.members) for one in choices):
        if unknown := set(chosen) - members:
            found = f"{MEMBER[option]} {numbers_text(unknown)}"
            yield Problem("unknown-number", option, found, f"{place.counts} {numbers_text(members)}")
        elif not chosen:
            yield Problem("nothing-kept", option, f"no {MEMBER[option]}", "at least one")
        elif chosen[-1] != len(chosen) - 1 and not renumber:
            found = f"{place.counts} {numbers_text(chosen)}"
            remedy = f"--renumber gives them the numbers {numbers_text(range(len(chosen)))}"
            yield Problem("needs-renumber", option, found, "0 and those that follow, without a gap", remedy)


def new_numbers(choices: Iterable[Choice], recipe: Recipe, members: Mapping[str, set[int]]) -> Numbers:
    """Assigns the new numbers of kept members. MTP layers are always kept; their numbers follow the last kept layer."""
    found: dict[str, dict[int, int]] = {}
    for choice in choices:
        new = {old: place for place, old in enumerate(choice.chosen)}
        for name, placeholder in recipe.placeholders.items():
            if base_of(placeholder, recipe) == choice.placeholder.name:
                found[name] = new
            elif placeholder.after == choice.placeholder.name:
                later = enumerate(sorted(members[name]), len(choice.chosen))
                found[name] = {old: place for place, old in later}
    return found


def base_of(place: Placeholder, recipe: Recipe) -> str:
    """Finds the name of the outermost placeholder that contains the members of this one."""
    for _ in recipe.placeholders:  # an untrusted recipe may lead in a circle
        place = recipe.placeholders.get(place.within or place.some_of, place)
    return place.name


def kept_family(family: Family, recipe: Recipe, numbers: Numbers) -> Family:
    """Keeps the chosen tensors of a family, with new names and numbers. `names` of the result are the old names."""
    slots = slots_of(recipe.rules[family.rule], recipe)
    places = [(place, numbers[slot]) for place, slot in enumerate(slots) if slot in numbers]
    if not places:
        return family._replace(names=[tensor.name for tensor in family.tensors])
    kept = Family(family.rule, family.is_scale, [], [], [])
    for tensor, filling in zip(family.tensors, family.numbers, strict=True):
        if all(int(filling[place]) in new for place, new in places):
            changed = list(filling)
            for place, new in places:
                changed[place] = str(new[int(filling[place])])
            kept.tensors.append(tensor._replace(name=renumbered(tensor.name, changed)))
            kept.numbers.append(tuple(changed))
            kept.names.append(tensor.name)
    return kept


def renumbered(name: str, numbers: Sequence[str]) -> str:
    """Replaces the numbers in a name: `layers.7.mlp`, (`2`,) -> `layers.2.mlp`."""
    pieces = NUMBER.split(name)
    pieces[1::2] = ["." + number for number in numbers]
    return "".join(pieces)


def whole_rows(
    families: Iterable[Family], recipe: Recipe, experts: Choice | None, checkpoint: Checkpoint, problems: list[Problem]
) -> tuple[dict[str, Tensor], tuple[Join, ...]]:
    """Cuts tensors with one row for each expert to the rows of the chosen experts. Returns all tensors by name, in
    their old order, and all joins. Appends to `problems` each tensor that cannot be cut.
    """
    tensors: dict[str, Tensor] = {}
    joins = [*checkpoint.joins]
    for family in families:
        rule, has_rows = recipe.rules[family.rule], False
        if experts and family.tensors:
            has_rows = is_by_row(rule, experts.placeholder.size)
            problems.extend(table_problems(family, rule, experts.placeholder.size))
        for tensor, old in zip(family.tensors, family.names, strict=True):
            found = tensor
            if has_rows and experts:
                if tensor.shape[:1] != (len(experts.members),) or tensor.size % len(experts.members):
                    expected = f"{len(experts.members)} rows, one for each expert"
                    problems.append(Problem("wrong-shape", tensor.name, f"shape {list(tensor.shape)}", expected))
                    continue
                found = rows_of(tensor, experts.chosen, checkpoint, joins)
            tensors[old] = found
    ordered = (tensors[name] for name in checkpoint.tensors if name in tensors)
    return {tensor.name: tensor for tensor in ordered}, tuple(joins)


def is_by_row(rule: Rule, size: str) -> bool:
    """Whether the tensors of a rule have one row for each expert; `size` is the formula for the number of experts."""
    return bool(rule.shape) and parse_shape(rule.shape)[1][:1] == [size]


def table_problems(family: Family, rule: Rule, size: str) -> Iterator[Problem]:
    """Reports tensors that need all experts: tables of expert numbers, or experts in a later dimension."""
    formulas = parse_shape(rule.shape)[1] if rule.shape and rule.relation != "drop" else []
    if table_of(size) in formulas:
        found, remedy = "a table that names experts by their numbers", "choose --layers without such a table"
        yield from (
            Problem("needs-all-experts", tensor.name, found, "all experts", remedy) for tensor in family.tensors
        )
    elif any(re.search(rf"(?<![\w.]){re.escape(size)}(?![\w.])", formula) for formula in formulas[1:]):
        found = f"{rule.shape}, by the recipe"
        yield from (Problem("needs-all-experts", tensor.name, found, "all experts") for tensor in family.tensors)


def rows_of(tensor: Tensor, chosen: Sequence[int], checkpoint: Checkpoint, joins: list[Join]) -> Tensor:
    """Takes some rows of a tensor: one byte range of it, or a new join (appended to `joins`) of several."""
    width = tensor.size // tensor.shape[0]
    shape, size = (len(chosen), *tensor.shape[1:]), len(chosen) * width
    if tensor.file < len(checkpoint.files) and chosen[-1] - chosen[0] == len(chosen) - 1:
        return tensor._replace(shape=shape, offset=tensor.offset + chosen[0] * width, size=size)
    parts = tuple(part for first, count in runs(chosen) for part in stretches(tensor, first, count, checkpoint))
    result = tensor._replace(shape=shape, file=len(checkpoint.files) + len(joins), offset=0, size=size)
    joins.append(Join(1, parts, result))
    return result


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Finds runs of consecutive numbers: the first number and the length of each run."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((number, 1))
    return found


def stretches(tensor: Tensor, first: int, count: int, checkpoint: Checkpoint) -> Iterator[tuple[Tensor, ...]]:
    """Takes `count` consecutive rows of a tensor, as parts of a join. If the tensor is a join, cuts its parts.

    Raises Refused for a join of columns: its rows are not contiguous.
    """
    width, place = tensor.size // tensor.shape[0], tensor.file - len(checkpoint.files)
    parts = checkpoint.joins[place].parts if place >= 0 else ((tensor,),)
    if place >= 0 and checkpoint.joins[place].rows != 1 and len(parts) > 1:
        found = "its columns are cut for ranks"
        raise refuse("needs-all-experts", tensor.name, found, "rows in one piece", "--to hf first, then choose")
    for run in runs_of([part[0].size for part in parts], first * width, count * width, tensor.size):
        shape = (run.size // width, *tensor.shape[1:])
        yield tuple(
            copy._replace(shape=shape, offset=copy.offset + run.begin, size=run.size) for copy in parts[run.part]
        )


def description(choices: Iterable[Choice], checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describes a subset for the manifest, as JSON values."""
    found: dict[str, Any] = {
        choice.placeholder.counts: {"kept": list(choice.chosen), "of": len(choice.members)} for choice in choices
    }
    found["left_out"] = left_out(checkpoint.tensors, tensors, {})
    return {**found, "source": checkpoint.subset} if checkpoint.subset else found
