"""The output head of a model that is its embedding, and has no tensor of its own in the files.

In memory it has a name of its own, and a distributed checkpoint has all names of the model in memory: transformers
writes the table twice there, and refuses slices without the second one.
"""

from dataclasses import replace

from reshard.formats.manifest import Origin
from reshard.formats.renaming import rename_tensors
from reshard.recipe_types import Recipe
from reshard.recipes.alternatives import get_answer
from reshard.sources.completeness import MAYBE, TIED
from reshard.sources.match import Matched, match
from reshard.types import Checkpoint, Join, Note, Tensor

TIED_HEAD = "tied"
"""The kind of the note that a head was added."""


def repeat_tied_head(checkpoint: Checkpoint, recipe: Recipe, matched: Matched) -> tuple[Checkpoint, Matched]:
    """Adds the output head to a checkpoint whose model ties it to the embedding and that lacks it, as a join of that
    one part. Any other checkpoint is returned as it is.
    """
    found = find_tied_head(checkpoint, recipe, matched)
    if found is None:
        return checkpoint, matched
    name, table = found
    result = table._replace(name=name, file=checkpoint.parts, offset=0)
    text = f"{name} is written too, with the bytes of {table.name}: the model ties them, and has both in memory"
    more = replace(
        checkpoint,
        tensors={**checkpoint.tensors, name: result},
        joins=(*checkpoint.joins, Join(1, ((table,),), result)),
        notes=(*checkpoint.notes, Note(TIED_HEAD, text)),
    )
    return more, match(more, recipe)


def drop_tied_note(checkpoint: Checkpoint) -> Checkpoint:
    """Drops the note of an added head from a checkpoint that does not keep the head, whose join is the last one."""
    if all(note.kind != TIED_HEAD for note in checkpoint.notes):
        return checkpoint
    if checkpoint.joins[-1].result.name in checkpoint.tensors:
        return checkpoint
    return replace(checkpoint, notes=tuple(note for note in checkpoint.notes if note.kind != TIED_HEAD))


def add_tied_name(checkpoint: Checkpoint, recipe: Recipe, matched: Matched) -> Checkpoint:
    """A checkpoint that has the same bytes under the name of the head too, for a comparison."""
    found = find_tied_head(checkpoint, recipe, matched)
    if found is None:
        return checkpoint
    name, table = found
    return replace(checkpoint, tensors={**checkpoint.tensors, name: table._replace(name=name)})


def find_tied_head(checkpoint: Checkpoint, recipe: Recipe, matched: Matched) -> tuple[str, Tensor] | None:
    """Finds the name of an output head that a checkpoint lacks, and the embedding that it is by the config: by the
    recipe, the one tensor that has the same shape. None of a model that does not tie them, or that has a head.
    """
    filled = {family.rule for family in matched.families}
    for number in list_tied_rules(checkpoint, recipe):
        rule = recipe.rules[number]
        alike = [family for family in matched.families if recipe.rules[family.rule].shape == rule.shape]
        if number not in filled and [len(family.tensors) for family in alike] == [1]:
            return rule.left, alike[0].tensors[0]
    return None


def list_tied_rules(checkpoint: Checkpoint, recipe: Recipe) -> list[int]:
    """Lists the rows of output heads, by their indices, if the config ties them."""
    if not get_answer(TIED, checkpoint.config or {}):
        return []
    return [number for number, rule in enumerate(recipe.rules) if rule.only == f"{MAYBE} if {TIED}" and rule.shape]


def leave_out_tied_head(
    checkpoint: Checkpoint, recipe: Recipe, matched: Matched, origin: Origin
) -> tuple[Checkpoint, Matched]:
    """Leaves out the head that the files of the original did not have, if these are known: it was added to slices."""
    names = {name for form in origin.forms for name in rename_tensors(form.tensors, origin.renaming)}
    tied = list_tied_rules(checkpoint, recipe) if names else []
    heads = {tensor.name for family in matched.families if family.rule in tied for tensor in family.tensors} - names
    if not heads:
        return checkpoint, matched
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in heads}
    less = replace(checkpoint, tensors=kept)
    return less, match(less, recipe)
