"""The nouns that every stage shares: frozen values that open nothing. Imports only the standard library."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Advance = Callable[[int], None]
"""Told how many more bytes of a job are done; by several threads, if the job has them."""

MOST_RANKS = 4096
"""No model is cut for more; a larger number is a slip."""


class Tensor(NamedTuple):
    """One entry of a safetensors header: a tensor, or a rank's part of one, as it lies in its file.

    A named tuple, not a dataclass: a large model has 140,000 of them, and a tuple is made in a third of the time.
    """

    name: str
    dtype: str
    """As the format spells it, such as `BF16` or `F8_E4M3`."""
    shape: tuple[int, ...]
    """In elements, as the header says."""
    file: int
    """Index into the files of its checkpoint."""
    offset: int
    """In bytes from the start of the file."""
    size: int
    """In bytes."""


@dataclass(frozen=True, slots=True)
class File:
    """One safetensors file of a checkpoint."""

    name: str
    size: int
    """In bytes, header included."""
    header_size: int
    """In bytes, the eight of the length included: where the data begins."""
    header_hash: str
    """SHA-256 of those bytes, in hexadecimal."""
    modified: int
    """When it was last written to, in nanoseconds since 1970."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a set of files holds, known from their headers alone. Source and target are both this."""

    folder: Path
    files: tuple[File, ...]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    """The parsed `config.json`, if there is one."""


@dataclass(frozen=True, slots=True)
class Hole:
    """A numbered place in a recipe's names, such as the `i` of `model.layers.{i}.input_layernorm.weight`."""

    name: str
    counts: str
    """What it counts, in the plural: `layers`."""
    size: str = ""
    """The config key that says how many there are."""
    within: str = ""
    """Another hole: each member of that one is a member of exactly one hole within it."""
    after: str = ""
    """Another hole: the members of this one follow on from that one's last."""
    marker: str = ""
    """With `after`: the name that tells a member of this hole from one of that hole."""
    rows_of: str = ""
    """A tensor whose first dimension says how many there are."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a recipe: a relation between a name on the left and a name on the right."""

    relation: str
    """`same` or `drop`."""
    left: str
    right: str
    split: str
    """`replicate`, `rows`, `columns` or `by HOLE`; the reason of a `drop`."""
    only: str = ""
    """`if KEY` or `unless KEY`: a config key on which it depends whether the model has this tensor."""


@dataclass(frozen=True, slots=True)
class BlockScale:
    """How the weights of a recipe are scaled: one scale for each block x block elements of a weight."""

    left: str
    """What stands on the left in the place of `weight`."""
    right: str
    block: int
    """In elements, on rows and on columns."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A relation between two layouts of one model family, read from a TOML file."""

    name: str
    about: str
    left: str
    right: str
    files: str
    """The pattern of the right side's file names, with `{rank}` and `{ranks}`."""
    carry: tuple[str, ...]
    """Patterns of the side files that go along."""
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    ranks_divide: tuple[str, ...]
    """Config keys whose values the number of ranks must divide."""
    holes: Mapping[str, Hole]
    scale: BlockScale | None
    rules: tuple[Rule, ...]
    origin: str
    """The file it was read from."""
    text_hash: str
    """SHA-256 of that file, in hexadecimal."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the target is cut."""

    ranks: int
