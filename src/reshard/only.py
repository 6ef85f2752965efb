"""Chosen tensors: the part of a checkpoint whose names fit patterns. Pure: opens no file."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from reshard.errors import Problem, require_none
from reshard.match import Family, Matched
from reshard.subset_text import left_out
from reshard.types import Checkpoint


def only_named(checkpoint: Checkpoint, matched: Matched, patterns: Sequence[str]) -> tuple[Checkpoint, Matched]:
    """The tensors whose names fit a pattern, as a shell has them; with a weight goes its block scale, and with a scale
    its weight. Counts stay those of the whole. Raises Refused for each pattern that nothing fits.
    """
    used: set[str] = set()
    units = set()
    for family in matched.families:
        for tensor, numbers in zip(family.tensors, family.numbers, strict=True):
            if fitting := [pattern for pattern in patterns if fnmatchcase(tensor.name, pattern)]:
                units.add((family.rule, numbers))
                used.update(fitting)
    expected, remedy = "names of the source, such as 'model.layers.0.*'", "the index of the source has them"
    require_none(
        Problem("nothing-kept", "--only", f"no tensor fits {pattern!r}", expected, remedy)
        for pattern in patterns
        if pattern not in used
    )
    families = [chosen_of(family, units) for family in matched.families]
    kept = {tensor.name for family in families for tensor in family.tensors}
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name in kept}
    described = {**checkpoint.subset, "only": list(patterns)}
    described["left_out"] = left_out(checkpoint.tensors, tensors, described.get("left_out", {}))
    chosen = Matched(tuple(family for family in families if family.tensors), matched.counts)
    return replace(checkpoint, tensors=tensors, subset=described), chosen


def chosen_of(family: Family, units: set[tuple[int, tuple[str, ...]]]) -> Family:
    chosen = [place for place, numbers in enumerate(family.numbers) if (family.rule, numbers) in units]
    return family._replace(
        tensors=[family.tensors[place] for place in chosen],
        numbers=[family.numbers[place] for place in chosen],
        names=[family.names[place] for place in chosen],
    )
