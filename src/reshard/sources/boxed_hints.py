"""Rewords refusals of distributed checkpoints: what lacks may be in a slice that no file tells of, or left aside."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from reshard.errors import Problem, Refused
from reshard.formats.slice_names import parse_shard_numbers
from reshard.formats.training_state import BESIDE_MODEL
from reshard.types import Checkpoint


@contextmanager
def explain_boxed(checkpoint: Checkpoint) -> Iterator[None]:
    """A context in which refusals say what may lack in a distributed checkpoint, before they blame its config."""
    try:
        yield
    except Refused as refused:
        if checkpoint.boxes is None:
            raise
        beside = [note.text for note in checkpoint.notes if note.kind == BESIDE_MODEL]
        last = suggest_last_shard(checkpoint)
        raise Refused(
            reword_boxed(problem, beside[0] if beside else "", last, has_config=bool(checkpoint.config))
            for problem in refused.problems
        ) from None


def suggest_last_shard(checkpoint: Checkpoint) -> str:
    """Suggests to look for the shards behind the last one; empty of a checkpoint whose metadata or manifest name all
    files.
    """
    if not any(note.kind == "numbering" for note in checkpoint.notes):
        return ""
    shards = [shard for shard, _, _ in parse_shard_numbers([file.name for file in checkpoint.files])]
    return f"is shard-{max(shards) + 1:05}-* missing? no file tells how many there are: compare with what was saved"


def reword_boxed(problem: Problem, beside: str, last: str, *, has_config: bool) -> Problem:
    """A problem with the hint that is true of boxes. `beside` tells of the tensors that were left aside, `last` of the
    shards that may be missing. With a config, that may be another model's.
    """
    if problem.kind == "missing-tensor" and beside:
        remedy = "is it one of those? weights are read from one mapping: save all of the model within that one"
        remedy = f"is the config another model's? else: {remedy}" if has_config else remedy
        return replace(problem, found=f"{problem.found}; {beside}", remedy=remedy)
    if problem.kind in ("missing-tensor", "wrong-shape") and last:
        return replace(problem, remedy=f"{last}; else {problem.remedy}" if problem.remedy else last)
    return problem
