"""Pairs the tensors of two checkpoints by name, so that `diff` can compare them. Reads headers only.

Rank files are read as the whole checkpoint that they make up, under its names. In any other folder, and in a single
file, tensors keep the names in the files; unless those of one side become the other's once a prefix is changed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from reshard.casts.rounding import FLOAT_DTYPES
from reshard.casts.shapes import count_blocks, unpack_shape
from reshard.formats.huggingface import read_config, read_file
from reshard.formats.name_patterns import match_any, require_fitting
from reshard.formats.renaming import format_renaming, rename_tensors
from reshard.paths import AnyPath
from reshard.recipe_types import BlockScale, Recipe
from reshard.recipes.patterns import WEIGHT
from reshard.recipes.recipe import list_recipes_to_try
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.engine_choice import choose_for_engine
from reshard.sources.fitted_names import RENAMED
from reshard.sources.prefixes import find_partial_renaming_to, find_renaming_to
from reshard.sources.rank_names import holds_rank_files
from reshard.sources.source import read_source
from reshard.sources.stacked_experts import holds_stacks, read_under_hub_names
from reshard.types import COMPARE, Cast, Checkpoint, Note, Tensor

PARTIAL_PREFIX, BLOCK_SCALES = "prefix", "block-scales"
"""Kinds of notes: of a prefix that only some names have; of scaled weights compared with weights of another dtype."""


@dataclass(frozen=True, slots=True)
class DiffChoice:
    """The tensors to compare, and how to read them."""

    only: Sequence[str] = ()
    """Shell patterns of names; empty for all tensors."""
    recipe: str | None = None
    """The name or file of a recipe for both sides; by default each side is recognized by itself."""
    dequantize: bool = False
    """Compare a tensor with one of another dtype in BF16: block-scaled weights dequantized, F32 and F16 rounded."""
    ignore_extra_files: bool = False
    replicas: str = COMPARE
    """`compare`: the replicas of several ranks must be equal; `first`: only the replica of the first rank is read."""
    config: AnyPath | None = None
    """The folder of the config of a side that has none."""


class DiffSide(NamedTuple):
    """One of the two checkpoints."""

    checkpoint: Checkpoint
    recipe: str
    """The recipe that rank files were read with; empty if they are no rank files."""
    scalings: tuple[BlockScale, ...]
    """The block scalings that its weights may have; names and shapes of weight and scale tell which."""


class TensorPair(NamedTuple):
    """Two tensors of one name and equal size in bytes. A cast stands for its result."""

    name: str
    a: Tensor | Cast
    b: Tensor | Cast
    dtype: str
    """The dtype of the elements that are compared: F4 for packed I8, which has two elements in a byte."""
    is_coded: bool = False
    """Whether the elements are compared as codes, without the block scale that a side has for them."""


@dataclass(frozen=True, slots=True)
class KindDifference:
    """A tensor whose dtype or shape differs."""

    name: str
    a: str
    b: str
    """Such as `BF16 [7168, 2048]`."""


@dataclass(frozen=True, slots=True)
class LeftAside:
    """Tensors that stand in the files of a side, but not in its checkpoint: they are not compared."""

    side: str
    """`A` or `B`."""
    names: tuple[str, ...]
    reason: str
    """Such as `that its index does not name`."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """The names of both sides: paired, of different kinds, or on one side only."""

    pairs: tuple[TensorPair, ...]
    dequantized: int
    """The number of pairs of which a side is dequantized first."""
    rounded: int
    """The number of pairs of which a side is rounded first, and none dequantized."""
    scaled: int
    """The number of `kinds` that could be compared, once dequantized."""
    kinds: tuple[KindDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def read_diff_side(path: AnyPath, choice: DiffChoice) -> DiffSide:
    """Reads the headers of a checkpoint in either layout. Raises Refused."""
    recipes = choose_for_engine(list_recipes_to_try(choice.recipe), "", is_named=bool(choice.recipe))
    beside = choice.config if path.is_dir() and read_config(path) is None else None
    if holds_rank_files(path, choice.recipe):
        found = read_source(
            path,
            choice.recipe,
            ignore_extra_files=choice.ignore_extra_files,
            replicas=choice.replicas,
            config_folder=beside,
        )
        return DiffSide(found.checkpoint, found.recipe.name, list_block_scalings([found.recipe]))
    if path.is_dir():
        checkpoint = read_checkpoint(
            path, ignore_extra_files=choice.ignore_extra_files, replicas=choice.replicas, config_folder=beside
        )
    else:
        checkpoint = read_file(path)
    return DiffSide(checkpoint, "", list_block_scalings(recipes))


def list_block_scalings(recipes: Iterable[Recipe]) -> tuple[BlockScale, ...]:
    return tuple(dict.fromkeys(scaling for recipe in recipes for scaling in recipe.scales.values()))


def rename_to_pair(a: DiffSide, b: DiffSide) -> tuple[tuple[DiffSide, DiffSide], tuple[Note, ...]]:
    """Renames one side if its names are those of the other once a prefix is changed; the note says which."""
    for letter, side, other in (("A", a, b), ("B", b, a)):
        if renaming := find_renaming_to(side.checkpoint.tensors, other.checkpoint.tensors):
            note = Note(RENAMED, f"{letter}: {format_renaming(side.checkpoint.tensors, renaming)}")
            tensors = rename_tensors(side.checkpoint.tensors, renaming)
            renamed = side._replace(checkpoint=replace(side.checkpoint, tensors=tensors))
            return ((renamed, b) if side is a else (a, renamed)), (note,)
    return (a, b), tuple(note_partial_prefix("B", b, a)) or tuple(note_partial_prefix("A", a, b))


def unstack_to_pair(a: DiffSide, b: DiffSide) -> tuple[DiffSide, DiffSide]:
    """Takes the stacked experts of one side apart, if the other has them apart. Raises Refused if that cannot be done
    without doubt.
    """
    if holds_stacks(a.checkpoint) == holds_stacks(b.checkpoint):
        return a, b
    one, other = (side._replace(checkpoint=read_under_hub_names(side.checkpoint)) for side in (a, b))
    return one, other


def note_partial_prefix(letter: str, side: DiffSide, other: DiffSide) -> Iterator[Note]:
    """Notes that more names would be those of the other side without a prefix that only some have."""
    names, wanted = side.checkpoint.tensors, other.checkpoint.tensors
    renaming, more = find_partial_renaming_to(names, wanted) if names.keys() != wanted.keys() else ((), 0)
    if renaming:
        change = f"with a prefix changed ({format_renaming(names, renaming)})"
        text = f"the names are compared as they are; {change} {more:,} more would be names of the other side"
        yield Note(PARTIAL_PREFIX, f"{letter}: {text}")


def pair_up(a: DiffSide, b: DiffSide, choice: DiffChoice) -> Pairing:
    """Pairs the tensors of two sides. Raises Refused for a pattern that matches no name."""
    names = choose_names([*a.checkpoint.tensors, *b.checkpoint.tensors], choice.only)
    readable = pair_dequantized(names, a, b)
    made = readable if choice.dequantize else []
    known = {pair.name for pair in made}
    left, right = (
        {name: tensors[name] for name in names if name in tensors and name not in used}
        for tensors, used in (
            (a.checkpoint.tensors, known | list_used_scales(pair.a for pair in made)),
            (b.checkpoint.tensors, known | list_used_scales(pair.b for pair in made)),
        )
    )
    pairs, kinds = list(made), []
    for name, one in left.items():
        other = right.get(name)
        if other is None:
            continue
        if (one.dtype, one.shape) == (other.dtype, other.shape):
            is_coded = bool(find_dequantize_cast(name, a) or find_dequantize_cast(name, b))
            pairs.append(TensorPair(name, one, other, "F4" if is_coded and one.dtype == "I8" else one.dtype, is_coded))
        else:
            kinds.append(KindDifference(name, format_kind(one), format_kind(other)))
    dequantized = sum(map(is_dequantized, readable))
    counts = (dequantized, len(made) - dequantized, 0) if choice.dequantize else (0, 0, dequantized)
    return Pairing(
        tuple(pairs), *counts, tuple(kinds), list_lacking_names(left, right), list_lacking_names(right, left)
    )


def list_lacking_names(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names on one side that the other has not."""
    return tuple(name for name in here if name not in there)


def choose_names(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match a pattern, each once, in their order. Raises Refused for a pattern that matches none."""
    every = list(dict.fromkeys(names))
    require_fitting("wrong-option", "--only", patterns, every, "no tensor of either side")
    return match_any(every, patterns) if patterns else every


def find_left_aside(sides: Sequence[DiffSide], patterns: Sequence[str]) -> tuple[LeftAside, ...]:
    """Finds the tensors in the files of both sides that were left aside, of those that match a pattern."""
    found = []
    for letter, side in zip("AB", sides, strict=True):
        others = side.checkpoint.unnamed
        if names := match_any(others, patterns or ["*"]):
            read = {file.name for file in side.checkpoint.files}
            is_indexed = all(others[name] in read for name in names)
            reason = "that its index does not name" if is_indexed else "in files that were left aside"
            found.append(LeftAside(letter, tuple(names), reason))
    return tuple(found)


def format_kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def pair_dequantized(names: Iterable[str], a: DiffSide, b: DiffSide) -> list[TensorPair]:
    """Pairs of tensors of different kinds that both can be read as BF16, with the same shape. One of them is not only
    rounded: two long ones could differ and be rounded to the same.
    """
    found = []
    for name in names:
        one, other = a.checkpoint.tensors.get(name), b.checkpoint.tensors.get(name)
        if one is None or other is None or (one.dtype, one.shape) == (other.dtype, other.shape):
            continue
        left, right = read_as_bf16(one, a), read_as_bf16(other, b)
        if one.dtype in FLOAT_DTYPES and other.dtype in FLOAT_DTYPES:
            continue
        if left and right and get_result(left).shape == get_result(right).shape:
            found.append(TensorPair(name, left, right, "BF16"))
    return found


def is_dequantized(pair: TensorPair) -> bool:
    """Whether a side of a pair is dequantized; else it is only rounded."""
    return any(isinstance(side, Cast) and side.operation == "dequantize" for side in (pair.a, pair.b))


def read_as_bf16(tensor: Tensor, side: DiffSide) -> Tensor | Cast | None:
    """A tensor in BF16: as it is, rounded, or dequantized with its block scale; None if none of these."""
    if tensor.dtype in FLOAT_DTYPES:
        result = tensor._replace(dtype="BF16", size=prod(tensor.shape) * 2)
        return Cast("round", tensor, None, (1, 1), result)
    return tensor if tensor.dtype == "BF16" else find_dequantize_cast(tensor.name, side)


def get_result(operand: Tensor | Cast) -> Tensor:
    return operand.result if isinstance(operand, Cast) else operand


def list_used_scales(operands: Iterable[Tensor | Cast]) -> set[str]:
    """The names of the block scales that the casts need."""
    return {operand.scale.name for operand in operands if isinstance(operand, Cast) and operand.scale}


def find_dequantize_cast(name: str, side: DiffSide) -> Cast | None:
    """The cast of a block-scaled weight to BF16; None if it has no block scale that fits."""
    tensors = side.checkpoint.tensors
    weight = tensors.get(name)
    if weight is None or not name.endswith(WEIGHT) or len(weight.shape) != 2:
        return None
    for scaling in side.scalings:
        scale = tensors.get(name.removesuffix(WEIGHT) + scaling.left)
        block = find_scale_block(weight, scale, scaling) if scale else None
        if block:
            shape = unpack_shape(weight)
            result = Tensor(name, "BF16", shape, weight.file, weight.offset, prod(shape) * 2)
            return Cast("dequantize", weight, scale, block, result)
    return None


def find_scale_block(weight: Tensor, scale: Tensor, scaling: BlockScale) -> tuple[int, int] | None:
    """The block of a scale in elements; None if dtypes or shapes of weight and scale do not fit the scaling."""
    if weight.dtype == "I8" and scaling.packed and scale.dtype == "F8_E8M0":
        block = scaling.block
    elif weight.dtype == "F8_E4M3" and scale.dtype in ("F32", "BF16", "F8_E8M0"):
        block = scaling.fp8_block if scaling.packed else scaling.block
    else:
        return None
    return block if scale.shape == count_blocks(unpack_shape(weight), block) else None
