"""Reads checkpoints whose experts are stacked, as transformers 5 has them in memory, under the names of the hub.

A recipe without ranks relates both sides. A stacked tensor is taken apart without a copy: each expert becomes a tensor
of its own, with its dtype, shape and byte range of the same file.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from reshard.errors import Problem, Refused, require_none
from reshard.formats.huggingface import INDEX
from reshard.numbered_names import split_name
from reshard.recipe_types import Recipe
from reshard.recipes.formulas import parse_shape, read_config_value
from reshard.recipes.fusions import FUSED
from reshard.recipes.patterns import fill_pattern, find_later_members, make_pattern, make_patterns, split_names
from reshard.recipes.recipe import has_ranks, list_packaged_recipes
from reshard.sources.fitted_names import UNSTACKED, find_renaming, rename_checkpoint
from reshard.sources.fused_shards import FusedPattern, PartShard, RowShares, list_fused_patterns
from reshard.sources.held_shards import RankPatterns, collect_rank_patterns, reverse_recipe
from reshard.sources.match import match, match_names
from reshard.sources.prefixes import KnownNames, list_names_by_kind
from reshard.sources.quantization_config import CODES
from reshard.sources.recipe_choice import add_recipe, find_asked_recipes, has_model_name, measure_nearness
from reshard.text import format_count, format_list
from reshard.types import Checkpoint, Note, Tensor

MOST_PARTS = 1 << 18
"""Of all stacks of a checkpoint. A hostile header could name a billion of them; DeepSeek-V3 has 44,544."""

MOST_REASONS = 3
"""Problems of a recipe that are told beside those of others."""


OTHERS = " and others"


class Unstacked(NamedTuple):
    """A checkpoint with stacked experts, under both names."""

    stored: Checkpoint
    """As it lies in the files; without a prefix that only its names have."""
    recipe: Recipe
    """Relates the two: its right side has the stored names."""
    checkpoint: Checkpoint
    """Under the names of the hub, an expert a tensor."""


class Stacking(NamedTuple):
    """What may relate the stacked experts of a checkpoint to the names of the hub."""

    stored: Checkpoint
    """As it lies in the files; without a prefix that only its names have."""
    recipes: Sequence[Recipe]
    """Those with such names on their right side; empty if it has no stacked experts."""
    is_told: bool
    """Whether the config names their model."""


def unstack_checkpoint(checkpoint: Checkpoint, recipes: Sequence[Recipe] = ()) -> Unstacked | None:
    """Takes the stacked experts of a checkpoint apart; None if it has none that a recipe knows. `recipes` are tried
    beside the packaged ones.

    Raises Refused if they cannot be taken apart without doubt: they are quantized, other experts lie apart already, or
    there are more or fewer than the config says.
    """
    stored, fitting, is_told = find_stacking(checkpoint, recipes)
    if is_told:
        return Unstacked(stored, fitting[0], split_stacks(stored, fitting[0])) if fitting else None
    # Without a config, models of other forms have such names too: all must fit. Splitting takes time: first the names.
    for recipe in fitting:
        if has_other_names(stored, recipe):
            continue
        with suppress(Refused):
            found = split_stacks(stored, recipe)
            if measure_nearness(found, recipe)[:2] == (0, 0):
                return Unstacked(stored, recipe, found)
    return None


def has_other_names(stored: Checkpoint, recipe: Recipe) -> bool:
    """Whether a checkpoint has tensors that are neither on the right side of a recipe nor dropped by it."""
    _, others = match_names(stored, repeat_right_names(recipe))
    return bool(match_names(replace(stored, tensors={name: stored.tensors[name] for name in others}), recipe)[1])


def holds_stacks(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has names of stacked experts that a packaged recipe may know."""
    return bool(find_stacking(checkpoint, ()).recipes)


def find_stacking(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> Stacking:
    """Finds the recipes whose fused names a checkpoint has: a single one that was named and those for the model of its
    config; else those for the models of the named one; else all.
    """
    candidates = list_stacking_recipes(recipes)
    ends = {one.name.rpartition(".")[2] for recipe in candidates for one in list_fused_patterns(recipe)}
    if not any(name.rpartition(".")[2] in ends for name in checkpoint.tensors):  # a quick look: mostly there are none
        return Stacking(checkpoint, (), is_told=False)
    config = checkpoint.config or {}
    named = recipes if len(recipes) == 1 else ()
    asked = [recipe for recipe in named if not has_ranks(recipe)]
    asked += [recipe for recipe in find_asked_recipes(config, candidates) if recipe not in asked]
    models = {model for recipe in named for model in recipe.model_types}
    asked = asked or [recipe for recipe in candidates if models.intersection(recipe.model_types)]
    if not asked and has_model_name(config):
        return Stacking(checkpoint, (), is_told=True)  # of another model
    return Stacking(*find_stored_names(checkpoint, asked or candidates), is_told=bool(asked))


def read_under_hub_names(checkpoint: Checkpoint, recipes: Sequence[Recipe] = ()) -> Checkpoint:
    """A checkpoint with its stacked experts taken apart, if it has any. Raises Refused as `unstack_checkpoint`."""
    found = unstack_checkpoint(checkpoint, recipes)
    return found.checkpoint if found else checkpoint


def list_stacking_recipes(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Lists the recipes without ranks: of some recipes, and of the packaged ones."""
    known = {recipe.origin: recipe for recipe in (*recipes, *list_packaged_recipes()) if not has_ranks(recipe)}
    return list(known.values())


def find_stored_names(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> tuple[Checkpoint, list[Recipe]]:
    """Finds the recipes whose fused names a checkpoint has; with a prefix changed, if it has none as they are."""
    fitting, names = list_fitting_stacks(checkpoint, recipes), list_names_by_kind(checkpoint.tensors)
    if fitting or not names.is_searched:
        return checkpoint, fitting
    known = [KnownNames(repeat_right_names(recipe)) for recipe in recipes]
    renamed = rename_checkpoint(checkpoint, found) if (found := find_renaming(checkpoint, names, known)) else checkpoint
    fitting = list_fitting_stacks(renamed, recipes)
    return (renamed, fitting) if fitting else (checkpoint, [])


def list_fitting_stacks(checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> list[Recipe]:
    """Lists the recipes of which a checkpoint has a fused name."""
    keys = {key for key, _ in split_names(checkpoint.tensors)}
    return [recipe for recipe in recipes if keys & {one.pattern.key for one in list_fused_patterns(recipe)}]


def repeat_right_names(recipe: Recipe) -> Recipe:
    """A recipe with the right names on both sides, each in one row, to match them."""
    rules = {rule.right: rule for rule in recipe.rules if rule.relation != "drop"}
    same = tuple(replace(rule, relation="same", left=name) for name, rule in rules.items())
    return replace(reverse_recipe(recipe), rules=same)


def split_stacks(stored: Checkpoint, recipe: Recipe) -> Checkpoint:
    """Takes all fused tensors of a right side apart, and gives all tensors their names on the left. A tensor that the
    recipe does not know keeps its name. Raises Refused.
    """
    config = stored.config or {}
    patterns = collect_rank_patterns(recipe, reverse_recipe(recipe), config)
    names = split_names(stored.tensors)
    marked = find_later_members(names, reverse_recipe(recipe))
    places = name_places(stored)
    shares = RowShares(recipe, config, places, 1)
    require_none(check_mixture(stored, recipe, names, patterns))
    require_none(check_stacks_beside(stored, recipe, names, patterns))
    require_none(check_number_of_parts(stored, names, patterns))
    tensors: dict[str, Tensor] = {}
    count, problems, parts = 0, list[Problem](), list[PartShard]()
    for tensor, (key, numbers) in zip(stored.tensors.values(), names, strict=True):
        fitting = [one for one in patterns.by_key.get(key, ()) if one.fits(key, numbers)]
        fitting = [one for one in fitting if one.accepts(numbers, *marked)]
        if len(fitting) != 1:
            tensors[tensor.name] = tensor
        elif fused := patterns.fused.get(fitting[0]):
            count += 1
            try:
                require_none(check_stack(tensor, fused, recipe, config, f"{places[tensor.file]}: {tensor.name}"))
                split = list(shares.split(tensor, fused, numbers))
                tensors.update((name, part._replace(name=name)) for _, name, part in split)
                parts += split[: len(fused.fusion.rules)]  # of one member: the others are as long
            except Refused as refused:
                problems.extend(refused.problems)
        else:
            (name,) = fitting[0].renamed([numbers])
            tensors[name] = tensor._replace(name=name)
    require_none(dict.fromkeys(problems))
    require_none(check_lengths(parts, recipe))
    made = len(tensors) - (len(stored.tensors) - count)
    text = f"{format_count(count, 'stacked tensors')} of {recipe.engine or recipe.right} are read as {made:,}"
    note = Note(UNSTACKED, f"{text} under the hub's names")
    return replace(stored, tensors=tensors, notes=(*stored.notes, note))


def check_mixture(
    stored: Checkpoint, recipe: Recipe, names: Sequence[tuple[str, Sequence[str]]], patterns: RankPatterns
) -> Iterator[Problem]:
    """Reports names of the left side that the right side does not have: experts apart beside stacked ones; and what
    belongs to quantized stacks. Of layers of another kind, such as MTP, all experts may lie apart.
    """
    stacks = {one.key for one in patterns.fused}
    pairs = list(zip(stored.tensors, names, strict=True))
    present = {key for key, _ in names}
    kinds = {one.slots for one in patterns.fused if one.key in present}
    other_kinds = {
        number for one, fused in patterns.fused.items() if one.slots not in kinds for number in fused.fusion.rules
    }
    lefts = {
        pattern.key
        for number, rule in enumerate(recipe.rules)
        if number not in other_kinds
        and (rule.relation in FUSED or (rule.relation == "same" and rule.left != rule.right))
        for pattern in make_patterns(number, rule, recipe)
    }
    first = next(name for name, (key, _) in pairs if key in stacks)
    if apart := [name for name, (key, _) in pairs if key in lefts and key not in patterns.by_key]:
        found, folder = f"names of the hub, though experts are stacked, as in {first}", shlex.quote(str(stored.folder))
        remedy = (
            f"do two checkpoints lie in one folder? reshard inspect {folder} --tensors '*.experts.*' names the files"
        )
        yield Problem("fused-experts", format_list(apart, 3), found, "one of the two ways in all layers", remedy)
    others = [name for name, (key, _) in pairs if key not in stacks and key.startswith(tuple(stacks))]
    scales = [name for name in others if "scale" in name.rpartition(".")[2]]
    codes = [name for name, (key, _) in pairs if key in stacks and stored.tensors[name].dtype in CODES]
    if scales or codes:
        such = f"such as {(scales or codes)[0]}"
        found = f"quantized experts, stacked: {format_count(len({*scales, *codes}), 'tensors')} {such}"
        expected = "stacked experts of BF16, F16 or F32"
        remedy = "convert the checkpoint that was loaded: under the hub's names, FP8 with block scales is read"
        yield Problem("quantized", str(stored.folder), found, expected, remedy)


def check_stacks_beside(
    stored: Checkpoint, recipe: Recipe, names: Sequence[tuple[str, tuple[str, ...]]], patterns: RankPatterns
) -> Iterator[Problem]:
    """Reports each stacked tensor that lacks where another of its layer is there, by its own name, not by a hundred.
    Also stacks of a layer that have other numbers of members.
    """
    stacks = [one for one in patterns.fused.values() if one.fusion.stacked]
    needed = [one for one in stacks if not recipe.rules[one.fusion.rules[0]].only]
    for key, numbers in dict.fromkeys(names):
        for here in (one for one in stacks if one.pattern.fits(key, numbers)):
            filling = {slot: int(number) for slot, number in zip(here.pattern.slots, numbers, strict=True)}
            for other in (one for one in needed if one.pattern.slots == here.pattern.slots):
                name, beside = fill_pattern(other.name, filling), fill_pattern(here.name, filling)
                one, two = stored.tensors.get(name), stored.tensors[beside]
                if one is None:
                    yield make_missing_stack(stored, name, f"beside {beside}")
                elif len(one.shape) == len(two.shape) > 1 and one.shape[0] < two.shape[0]:
                    found, expected = f"{one.shape[0]:,} members", f"{two.shape[0]:,}, as {beside} has"
                    yield Problem("wrong-shape", name, found, expected, "are the stacks of two models?")


def make_missing_stack(stored: Checkpoint, name: str, expected: str) -> Problem:
    """Makes the problem of a stack that is not there, or that only the index does not name."""
    if file := stored.unnamed.get(name):
        remedy = f'add "{name}": "{file}" to the weight_map of the index'
        return Problem("not-in-index", name, f"in {file}, but not in {INDEX}", expected, remedy)
    return Problem("missing-tensor", name, "not in the checkpoint", expected, "is a file missing?")


def name_missing_stacks(unstacked: Unstacked, refused: Refused) -> Refused:
    """Gives missing experts of a checkpoint with stacks the names that its files would have: a stack is one problem."""
    patterns = [
        (make_pattern(0, left, left, is_scale=False), fused.name)
        for fused in list_fused_patterns(unstacked.recipe)
        for left in fused.lefts
    ]
    problems: dict[Problem, None] = {}
    for problem in refused.problems:
        key, numbers, said = *split_name(problem.subject), problem
        for pattern, right in patterns if problem.kind == "missing-tensor" else ():
            if pattern.fits(key, numbers):
                name = fill_pattern(right, dict(zip(pattern.slots, map(int, numbers), strict=True)))
                if name not in unstacked.stored.tensors:
                    said = make_missing_stack(unstacked.stored, name, "one in each layer of experts")
        problems[said] = None
    return Refused(problems)


def explain_stacks(
    checkpoint: Checkpoint, recipes: Sequence[Recipe], unstacked: Unstacked | None, refused: Refused
) -> Refused:
    """Explains a refusal by the stacked experts of a checkpoint. Of one without a config it adds why they were not
    taken apart: the first problems of the recipe that has the fewest, of those that know all names.
    """
    if unstacked:
        return name_missing_stacks(unstacked, refused)
    stored, fitting, is_told = find_stacking(checkpoint, recipes)
    reasons = list[list[Problem]]()
    for recipe in () if is_told else fitting:
        if not has_other_names(stored, recipe):
            try:
                match(split_stacks(stored, recipe), recipe)
            except Refused as other:
                reasons.append([*add_recipe(other.problems, f"by the recipe {recipe.name}")])
    return Refused([*refused.problems, *min(reasons, key=len, default=[])[:MOST_REASONS]])


def check_number_of_parts(
    stored: Checkpoint, names: Sequence[tuple[str, tuple[str, ...]]], patterns: RankPatterns
) -> Iterator[Problem]:
    """Reports more parts of all stacks together than any model has."""
    counts = {fused.pattern.key: len(fused.fusion.rules) for fused in patterns.fused.values() if fused.fusion.stacked}
    pairs = zip(names, stored.tensors.values(), strict=True)
    total = sum(counts.get(key, 0) * next(iter(tensor.shape), 0) for (key, _), tensor in pairs)
    if total > MOST_PARTS:
        found, expected = f"{total:,} tensors in stacks", f"at most {MOST_PARTS:,}"
        yield Problem("too-large", str(stored.folder), found, expected, "is it a model of this kind?")


def check_lengths(parts: Sequence[PartShard], recipe: Recipe) -> Iterator[Problem]:
    """Reports parts of stacks whose lengths contradict each other by the shapes of the recipe. Without a config nothing
    else tells a transposed stack from a model of other sizes.
    """
    known: dict[str, tuple[int, str]] = {}
    for number, name, part in parts:
        formulas = parse_shape(recipe.rules[number].shape)[1] if recipe.rules[number].shape else []
        for formula, length in zip(formulas, part.shape, strict=False):
            wanted, other = known.setdefault(formula, (length, name))
            if formula != "?" and length != wanted:
                found, expected = f"{formula} of {length:,}, by the stack {part.name}", f"{wanted:,}, as {other} has it"
                remedy = "are the stacks of two models, or transposed? only [experts, rows, columns] are read"
                yield Problem("wrong-shape", name, found, expected, remedy)
                return  # one is enough: all layers are alike


def name_places(stored: Checkpoint) -> list[str]:
    """Names the file of each number that tensors have: of joins, the file of their first part."""
    names = [file.name for file in stored.files]
    for join in stored.joins:
        names.append(f"{names[join.parts[0][0].file].removesuffix(OTHERS)}{OTHERS}")
    return names


def check_stack(
    tensor: Tensor, fused: FusedPattern, recipe: Recipe, config: Mapping[str, Any], name: str
) -> Iterator[Problem]:
    """Reports a stack of more or fewer members than the config tells."""
    place = recipe.placeholders.get(fused.fusion.stacked)
    if place is None or not tensor.shape:
        return
    told, count = read_config_value(place.size, config) if place.size else None, tensor.shape[0]
    if isinstance(told, int) and told != count:
        found, expected = f"{count:,} {place.counts}, of shape {list(tensor.shape)}", f"{told:,}, by config.json"
        remedy = f"is config.json another model's? it says {place.size}"
        yield Problem("wrong-shape", name, found, expected, remedy)
