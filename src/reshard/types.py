"""The nouns that every stage shares: frozen values that open nothing. Imports only the standard library."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Advance = Callable[[int], None]
"""Called with the number of bytes of a job that were done since the last call; from several threads at once."""

Progress = Callable[[int, int], None]
"""Told the bytes done and the bytes of the whole job, by one thread at a time."""

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


class Cast(NamedTuple):
    """A tensor computed from others of the source. A plan addresses it like a file, but it is not on disk."""

    operation: str
    """`pad`, `dequantize`, `fp4-to-fp8`, `fp4-to-fp8-scale`, `quantize` or `quantize-scale`."""
    weight: Tensor
    scale: Tensor | None
    block: tuple[int, int]
    """Rows and columns of the weight, in elements, that share a scale: of `scale`, or of the scale that is made."""
    result: Tensor
    """Its `file` is the number of files and joins of the source plus the index of the cast; its `offset` is 0. Where
    its shape is larger than the computed one, the rest is padding: zeros, or ones in a block scale."""
    new_block: tuple[int, int] = (1, 1)
    """The block of the resulting scale, where it differs from `block`."""
    is_scale: bool = False
    """Whether the result is a block scale."""


class Join(NamedTuple):
    """A tensor assembled from shards in rank files. A plan addresses it like a file, but it is not on disk."""

    rows: int
    """Each of so many rows is the concatenation of a row of every shard. 1: whole shards are concatenated."""
    parts: tuple[tuple[Tensor, ...], ...]
    """For each shard its replicas, which must be equal."""
    result: Tensor
    """Its `file` is the number of files of the checkpoint plus the index of the join; its `offset` is 0. It may be
    shorter than the shards together: the rest of them is padding."""


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
    joins: tuple[Join, ...] = ()
    """What of the tensors lies in parts."""
    subset: Mapping[str, Any] = field(default_factory=dict)
    """What of a larger checkpoint this is, as a manifest says it; empty if it is whole."""

    @property
    def parts(self) -> int:
        """How many files there are, and joins, which count as files: casts are numbered from here on."""
        return len(self.files) + len(self.joins)


@dataclass(frozen=True, slots=True)
class Subset:
    """What is chosen of a checkpoint; by default everything."""

    layers: tuple[int, ...] | None = None
    """Their numbers; None for all of them."""
    experts: tuple[int, ...] | None = None
    renumber: bool = False
    """Number what is left from 0 on, where it does not begin there or has gaps."""
    only: tuple[str, ...] = ()
    """Patterns of names on the left, as a shell has them, of the tensors to be written; empty for all."""


EVERYTHING = Subset()


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A numbered place in a recipe's names, such as the `i` of `model.layers.{i}.input_layernorm.weight`."""

    name: str
    counts: str
    """What it counts, in the plural: `layers`."""
    size: str = ""
    """A formula over the config that says how many there are."""
    within: str = ""
    """Another placeholder: each member of that one is a member of exactly one placeholder within it."""
    some_of: str = ""
    """Another placeholder: each member of this one is a member of that one too."""
    picked_by: str = ""
    """With `within` or `some_of`: the config key of a list that has a value for each member of that placeholder."""
    picked: tuple[int, ...] = ()
    """The values in that list that make a member of that placeholder one of this."""
    listed: str = ""
    """With `some_of`: the config key of a list of the members."""
    after: str = ""
    """Another placeholder: the members of this one follow on from that one's last."""
    marker: str = ""
    """With `after`: the name that tells a member of this placeholder from one of that placeholder."""
    like: str = ""
    """With `after`: the letters of placeholders. What the recipe says of their members, it says of these as well."""
    optional: str = ""
    """Why what is numbered by this placeholder is left out, unless it is asked for."""
    rows_of: str = ""
    """A tensor whose first dimension says how many there are."""


@dataclass(frozen=True, slots=True)
class Split:
    """How the ranks share a tensor, parsed from the text of a recipe."""

    text: str
    """As the recipe writes it: `replicate`, `rows`, `columns`, `padded rows`, `packed rows`, `rows of KEY`,
    `by LETTER`; the reason of a `drop`."""
    dimension: int | None = None
    """The dimension that is cut; None if every tensor stays whole."""
    placeholder: str = ""
    """Of `by LETTER`: each member of this placeholder, such as an expert, belongs to one rank."""
    heads_key: str = ""
    """Of `rows of KEY`: the config key that says how many heads the rows are of. A head is never cut."""
    is_padded: bool = False
    """Whether zeros follow the last row, so that every rank has as many."""
    is_packed: bool = False
    """Whether the rows are two tensors, one behind the other, each of which is cut by itself."""

    @property
    def is_replicated(self) -> bool:
        """Whether every rank has the whole tensor."""
        return self.dimension is None and not self.placeholder

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of a recipe: a relation between a name on the left and a name on the right."""

    relation: str
    """`same`, `dequantize` or `drop`."""
    left: str
    right: str
    split: Split
    """Cuts nothing if the relation is `drop`: its text is the reason."""
    shape: str = ""
    """Dtype, unless it is a float, and sizes of the tensor on the left, such as `I64 [vocab_size, 2 * heads]`."""
    only: str = ""
    """`if KEY` or `unless KEY`: a config key on which it depends whether the model has this tensor; `maybe` and
    `maybe if KEY`: it may be lacking, always or where the key says so."""
    optional: str = ""
    """Why the tensor is left out, unless the placeholder that numbers it is asked for; empty if it never is."""


@dataclass(frozen=True, slots=True)
class BlockScale:
    """How weights are scaled: one scale for each block of elements of a weight."""

    left: str
    """What stands on the left in the place of `weight`."""
    right: str
    block: tuple[int, int]
    """In elements, on rows and on columns."""
    packed: bool = False
    """Whether the weights are I8 with two elements of F4 in a byte. Blocks count elements."""
    fp8_block: tuple[int, int] = (1, 1)
    """With `packed`: the block once they are cast to FP8."""
    stays: bool = False
    """Whether weights scaled like this are never cast: their code reads them in no other way."""


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
    """Formulas over the config whose values the number of ranks must divide."""
    placeholders: Mapping[str, Placeholder]
    scales: Mapping[str, BlockScale]
    """By the letter of the placeholder that stands for a weight or its block scale."""
    sizes: Mapping[str, str]
    """Names for sizes that shapes speak of, by formulas over config keys."""
    padded: tuple[str, ...]
    """Config keys that may be raised, with zeros in the weights, so that whole blocks fall to each rank."""
    run: Mapping[str, Any]
    """The run configuration of the right side's code: by key a formula over the config; or a list of a formula and the
    value that need not be said, or of a formula alone whose lack of a value must be said."""
    run_needs: tuple[tuple[Any, ...], ...]
    """What that code has in itself: rows of a formula over the config and the values that it may come to, where the
    config tells it; one that begins with `=` is another formula. Without them there is no run configuration."""
    describes: bool
    """Whether the rank files say in their metadata what they are: rank, ranks and recipe."""
    checked: str
    """What the recipe was checked against, in words."""
    rules: tuple[Rule, ...]
    origin: str
    """The file it was read from."""
    text_hash: str
    """SHA-256 of that file, in hexadecimal."""


COMPARE, FIRST = "compare", "first"
"""The choice of replicas, which several ranks hold of one tensor: all are read and must be equal, or the first counts."""

FILE_SIZE = 5 * 10**9
"""In bytes, unless another size is asked for: whole files end before they grow beyond."""

RANKS, WHOLE = "ranks", "hf"
"""The two ways to lay out a target: a file a rank on the right side of a recipe, or the left side as it was."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the target is cut, and what becomes of its numbers."""

    ranks: int
    """1 for WHOLE."""
    to: str = RANKS
    cast: str = ""
    """What becomes of scaled weights: `bf16` dequantises them; `fp8` and `fp8-ue8m0` quantise those without scales."""
    expert_dtype: str = ""
    """`fp8` casts packed F4 to FP8."""
    keep_optional: bool = False
    """Keep what a recipe leaves out unless it is asked for: MTP layers."""
    pad: bool = False
    """Raise the config keys that the recipe allows to, until whole blocks fall to each rank."""
    file_size: int | None = None
    """For WHOLE: in bytes, a file ends before it grows beyond. None: the files that rank files once came from, else of
    FILE_SIZE."""


Read = Callable[[Tensor, int, int], memoryview]
"""So many bytes of a tensor, from a byte of it on. What it gives is overwritten by its next call."""


@dataclass(frozen=True, slots=True)
class Share:
    """What became of the source tensors of one rule, or left out for one reason: it adds up to the whole source."""

    use: str
    """`once`, `replicated` (to every rank), `shared` (by some ranks), `dequantized`, `cast`, `padded`, `empty`, or
    `dropped`."""
    what: str
    """The rule's left name; or what is left out as a whole, such as `MTP layers`."""
    reason: str
    """Why it is dropped; empty for all others."""
    tensors: int
    size: int
    """In bytes of the source."""


@dataclass(frozen=True, slots=True)
class Form:
    """A file as it once was: what is to be written again just so, if it holds the same tensors."""

    name: str
    header: bytes
    """The eight bytes of the length included."""
    tensors: Mapping[str, Tensor]
    """By name, in the order of their data."""
