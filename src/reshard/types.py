"""The types that every stage shares: frozen values, no file is opened."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from reshard.paths import AnyPath

Advance = Callable[[int], None]
"""Receives the number of bytes done since the last call. Several threads may call it at the same time."""

Progress = Callable[[int, int], None]
"""Receives the bytes done so far and the bytes of the whole job. One thread calls it at a time."""

MOST_RANKS = 4096
"""Largest number of ranks accepted. No model is cut for more: a larger number is a typing error."""


class Share(NamedTuple):
    """One of several parts of a conversion, each made by a process of its own, perhaps on a machine of its own."""

    number: int
    """From 0 on."""
    shares: int
    """The number of all."""
    fingerprint: str = ""
    """Of the conversion that it must be a part of; empty if nobody has told it."""

    def __str__(self) -> str:
        return f"{self.number}/{self.shares}"


# Not a dataclass: a large model has 140,000 of them, and a tuple is made in a third of the time.
class Tensor(NamedTuple):
    """One entry of a safetensors header: a tensor, or one rank's shard of it, and its place in a file."""

    name: str
    """As the header spells it."""
    dtype: str
    """As safetensors spells it, such as `BF16` or `F8_E4M3`."""
    shape: tuple[int, ...]
    """In elements, as the header gives it."""
    file: int
    """Index into the files of its checkpoint; behind them follow joins, then casts. See PACKED."""
    offset: int
    """Of its first byte, in bytes from the start of the file."""
    size: int
    """In bytes."""


PACKED = 1 << 40
"""The number of the file of packed weights begins here: far beyond all files, so that no plan can read one as it is."""


class Cast(NamedTuple):
    """A tensor computed from source tensors. A plan addresses it like a file, but it is not on disk."""

    operation: str
    """`pad`, `fill`, `round`, `dequantize`, `fp4-to-fp8`, `quantize` or `quantize-ue8m0`; the last three also with
    `-scale` behind, for the block scale; `nvfp4-scale` and `nvfp4-factor`, for codes that stay."""
    weight: Tensor
    """The input weight; of a `fill`, which reads nothing, the result itself."""
    scale: Tensor | None
    """The block scale of the input weight; None if it has none."""
    block: tuple[int, int]
    """Rows and columns of the weight, in elements, that share one value of `scale`, or of the scale that is made."""
    result: Tensor
    """The computed tensor. Its `file` is the number of files and joins plus the index of the cast. A shape larger than
    the computed one is padded: with zeros, in a block scale with ones."""
    new_block: tuple[int, int] = (1, 1)
    """Rows and columns, in elements, that share one value of the resulting scale, where they differ from `block`."""
    is_scale: bool = False
    """Whether the result is a block scale."""
    value: float = 0.0
    """Of a `fill`: every element of the result."""
    packed: "Packed | None" = None
    """How the weight lies, if it is one of `Checkpoint.packed`."""
    beside: "tuple[Packed, ...]" = ()
    """Of NVFP4: the weights that share one factor, this one among them."""

    def list_inputs(self) -> list[Tensor]:
        """Lists the tensors that it is computed from; of a `fill`, the result itself."""
        return self.packed.list_inputs() if self.packed else [one for one in (self.weight, self.scale) if one]


class Packed(NamedTuple):
    """A weight that lies packed: codes, and what turns them into numbers, each a tensor of a file."""

    packing: str
    """`integers`, `fp8`, `mxfp4`, `mxfp4-experts`, `nvfp4`, `nvfp4-divided`, `awq`, `gptq` or `gptq-v2`."""
    codes: Tensor
    scales: Tensor
    """One for each group of columns."""
    zeros: Tensor | None
    """The zero points; None where the packing has a fixed one, or none."""
    factor: Tensor | None
    """Of NVFP4: one F32 for the whole weight, by which the scales are multiplied, or divided."""
    order: Tensor | None
    """The group of each column; None if the groups lie in order."""
    bits: int
    """Of a code."""
    group: int
    """Columns of the result that share a scale, in elements; all of a row if it has one scale."""
    result: Tensor
    """The weight in BF16 [..., rows, columns]: out and in features of a linear layer. Its `file` is PACKED plus the
    index of this entry."""

    def list_inputs(self) -> list[Tensor]:
        """Lists the tensors that it is computed from."""
        return [one for one in (self.codes, self.scales, self.zeros, self.factor, self.order) if one]


class Join(NamedTuple):
    """A tensor assembled from parts in several files. A plan addresses it like a file, but it is not on disk."""

    rows: int
    """Number of rows. Each row concatenates one row of every part. 1: whole parts are concatenated."""
    parts: tuple[tuple[Tensor, ...], ...]
    """The parts in order, maybe of joins with lower numbers; for each its replicas, which must be equal."""
    result: Tensor
    """The whole tensor. Its `file` is the number of files of the checkpoint plus the index of the join; its `offset`
    is 0. It may be shorter than all parts together: the bytes behind its end are padding."""


@dataclass(frozen=True, slots=True)
class File:
    """One safetensors file of a checkpoint."""

    name: str
    """Within the folder of the checkpoint."""
    size: int
    """In bytes, header included."""
    header_size: int
    """In bytes, the eight bytes of its length included. The data begins here."""
    header_hash: str
    """SHA-256 of the header, the eight bytes of its length included, in hexadecimal."""
    version: int | str
    """Of a local file the time of the last write, in nanoseconds since 1970; of a file in a store what the store calls
    its version."""


class Note(NamedTuple):
    """One fact that a person should know about a job that is not refused: what was left aside, or changed unasked."""

    kind: str
    """A stable word for machines and tests, such as `left-aside`."""
    text: str
    """For a person: one line, in which lists of names are cut short."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder, known from the headers of its files alone. Source and target are both checkpoints."""

    folder: AnyPath
    """The folder of the files."""
    files: tuple[File, ...]
    """The safetensors files; a tensor's `file` is an index into them."""
    tensors: Mapping[str, Tensor]
    """Every tensor, by its name."""
    config: Mapping[str, Any] | None
    """The parsed `config.json`; None without one."""
    joins: tuple[Join, ...] = ()
    """The tensors that are assembled from several parts, and parts of these."""
    boxes: Mapping[int, Sequence[tuple[Tensor, tuple[int, ...]]]] | None = None
    """Of boxed checkpoints only: by the `file` of a join, the parts of it as they are stored, and their offsets."""
    beside: AnyPath | None = None
    """The folder of the config and the other side files, if they do not lie in `folder`."""
    subset: Mapping[str, Any] = field(default_factory=dict)
    """The selection from a larger checkpoint, as a manifest records it; empty for a whole checkpoint."""
    notes: tuple[Note, ...] = ()
    """What was left aside or changed while it was read."""
    unnamed: Mapping[str, str] = field(default_factory=dict)
    """Tensor name -> file of what the index does not name, or what only files left aside have; not among `tensors`."""
    may_be_extra: frozenset[str] = frozenset()
    """Names of files that `--ignore-extra-files` would leave out; empty if an index or `model.safetensors` decides."""
    packed: tuple[Packed, ...] = ()
    """Of a checkpoint whose weights are to be cast: those that lie packed, under their plain names."""

    def find_packed(self, tensor: Tensor) -> Packed | None:
        """Finds how a tensor lies packed; None if it does not."""
        return self.packed[tensor.file - PACKED] if tensor.file >= PACKED else None

    @property
    def parts(self) -> int:
        """Number of files and joins. Joins are numbered behind the files, casts from this number on."""
        return len(self.files) + len(self.joins)


@dataclass(frozen=True, slots=True)
class Subset:
    """The layers, experts and tensors to take from a checkpoint; by default all."""

    layers: tuple[int, ...] | None = None
    """Numbers of the layers to keep; None keeps all."""
    experts: tuple[int, ...] | None = None
    """Numbers of the experts to keep; None keeps all."""
    renumber: bool = False
    """Whether kept layers and experts are renumbered from 0 without gaps."""
    only: tuple[str, ...] = ()
    """Shell patterns of the original names of the tensors to write; empty writes all."""


EVERYTHING = Subset()
"""The whole checkpoint."""


COMPARE, FIRST = "compare", "first"
"""How replicas of a shard are read: COMPARE reads all, which must be equal; FIRST reads the first only."""

FILE_SIZE = 5 * 10**9
"""Default maximum size of a file in the original layout, in bytes."""

NVFP4 = "nvfp4"
"""The cast of packed MXFP4 to packed NVFP4: the codes stay, the scales get another form."""

RANKS, WHOLE, SLICED = "ranks", "hf", "dcp"
"""The layouts of a target: one file for each rank (right side of a recipe), the original layout (left side), or one
file for each rank with slices of whole tensors, as torch's distributed checkpoints have them.
"""


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a target: how tensors are split over ranks, cast and padded."""

    ranks: int
    """Number of ranks; 1 for WHOLE; 0 if it is not chosen yet."""
    to: str = RANKS
    """RANKS, WHOLE or SLICED."""
    cast: str = ""
    """`bf16` dequantizes or rounds to it; `fp8` and `fp8-ue8m0` quantize weights without scales; NVFP4 takes MXFP4;
    empty keeps all."""
    expert_dtype: str = ""
    """`fp8` casts packed FP4 experts to FP8; empty keeps them."""
    keep_optional: bool = False
    """Whether to keep the tensors that a recipe leaves out unless asked for: MTP layers."""
    pad: bool = False
    """Whether to raise the config keys that the recipe allows, until each rank gets whole blocks."""
    file_size: int | None = None
    """For WHOLE: maximum size of a file, in bytes. None: the original files, if a manifest has them; else FILE_SIZE."""


@dataclass(frozen=True, slots=True)
class OriginalFile:
    """One file of the original checkpoint, by its header. It is restored as it was, if its tensors are the same."""

    name: str
    """Of the file."""
    header: bytes
    """The eight bytes of its length included."""
    tensors: Mapping[str, Tensor]
    """Its tensors by name, in the order of their data."""
