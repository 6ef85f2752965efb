"""Tells the weights of a training checkpoint from the state of the training beside them, by their names."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from reshard.formats.renaming import HEAD
from reshard.text import format_count, format_list
from reshard.types import Note

MODELS: Sequence[tuple[str, ...]] = (
    ("model",),
    ("app", "model"),
    ("state", "model"),
    ("state_dict",),
    ("model_state_dict",),
    ("model_state",),
    ("module",),
)
"""Keys of the mapping that holds the weights, where one holds them: `model` by accelerate, Lightning, torchtune and
most scripts; `app.model` by torch's tutorial; `state.model` by Composer. torchtitan and Megatron have none: their
weights stand beside the rest, and are told from it by STATES."""

STATES = re.compile(
    r"(?:(?:app|state|chained_\d+)\.)*"
    r"(?:optim|optimizers?|optim_state|optimizer_state|optim(?:izer)?_states?(?:_dict)?|optim(?:izer)?_\d+"
    r"|lr_schedulers?|schedulers?|opt_param_scheduler|dataloader|train_state|extra_state|rng|rng_state|rng_states"
    r"|(?:global_)?step|epoch|iteration)"
    r"(?:[./].*)?",
    re.DOTALL,
)
"""Names of tensors that are no weights: `optim.` by torch's tutorial, `optimizer.` by torchtitan, accelerate and
Megatron, `chained_0.optimizer.` by Megatron with several optimizers, `optimizer_0.` by Lightning, `optimizers.` by
Composer; schedulers, dataloaders, counters and random numbers as torchtitan and Megatron name them; counters as scripts
do."""


BESIDE_MODEL = "beside-model"
"""The kind of the note that tells of tensors beside the mapping of the model: they may be weights."""


def choose_weights(names: Sequence[str], paths: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """The names of the weights among tensors. `paths` are the keys of nested mappings that names were flattened from.

    Only a path shows a mapping: in a plain `model.norm.weight` beside `lm_head.weight`, `model` is part of the name. A
    head beside the mapping is a weight too, unless the mapping has one.
    """
    within = [name for name in names if is_within_model(paths.get(name, ()))]
    if not within:
        return [name for name in names if not STATES.fullmatch(name)]
    heads = [name for name in names if name.startswith(HEAD)]
    return within if any(f".{HEAD}" in name for name in within) else [*within, *heads]


def is_within_model(path: tuple[Any, ...]) -> bool:
    """Whether a tensor was in the mapping that holds the weights."""
    return any(len(path) > len(keys) and path[: len(keys)] == keys for keys in MODELS)


def note_training_state(names: Iterable[str], weights: Iterable[str], others: Sequence[str]) -> Iterator[Note]:
    """Notes the tensors that are no weights, and the entries that are no tensors."""
    taken = set(weights)
    left = [name for name in names if name not in taken]
    if known := [name for name in left if STATES.fullmatch(name)]:
        text = f"{format_count(len(known), 'tensors')} beside the weights, such as the state of an optimizer"
        yield Note("left-aside", f"left aside: {text}: {format_list(known, 3)}")
    if unknown := [name for name in left if not STATES.fullmatch(name)]:
        text = f"{format_count(len(unknown), 'tensors')} that may be weights, but are not in the mapping of the model"
        yield Note(BESIDE_MODEL, f"left aside: {text}: {format_list(unknown, 3)}")
    if others:
        count = "1 entry that is no tensor" if len(others) == 1 else f"{len(others):,} entries that are no tensors"
        yield Note("left-aside", f"left aside: {count}: {format_list(others, 3)}")
