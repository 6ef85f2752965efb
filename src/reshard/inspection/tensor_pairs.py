"""Pairs: two paths -> the tensors that are to be compared with each other. Reads headers; no tensor's data.

Tensors are paired by name. Rank files are read as the checkpoint that they make up, under the names that it had; in any
other folder, and in a single file, names stand for themselves.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from math import prod
from pathlib import Path
from typing import NamedTuple

from reshard.casts.shapes import scale_shape, unpack_shape
from reshard.errors import Problem, require_none
from reshard.formats.folder import read_checkpoint
from reshard.formats.huggingface import read_file
from reshard.recipes.patterns import WEIGHT
from reshard.recipes.recipe import recipes_to_try
from reshard.sources.rank_names import holds_rank_files
from reshard.sources.source import read_source
from reshard.types import COMPARE, BlockScale, Cast, Checkpoint, Recipe, Tensor


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to be compared, and how it is read."""

    only: Sequence[str] = ()
    """Patterns of names, as a shell has them; none: all."""
    recipe: str | None = None
    """For both sides; by default each tells itself."""
    dequantize: bool = False
    """Compare a block-scaled weight with one of another dtype by what both are in BF16."""
    ignore_extra_files: bool = False
    replicas: str = COMPARE
    """Of what several ranks hold: `compare` all, which must be equal, or take the `first`."""


class Side(NamedTuple):
    """One of the two checkpoints."""

    checkpoint: Checkpoint
    recipe: str
    """By which rank files were read; empty for what is no rank files."""
    scalings: tuple[BlockScale, ...]
    """How its weights may be scaled: each is told by the names and shapes of weight and scale."""


class Pair(NamedTuple):
    """Two tensors of one name and of as many bytes; a cast stands for its result."""

    name: str
    a: Tensor | Cast
    b: Tensor | Cast
    dtype: str
    """What the bytes are taken for."""


@dataclass(frozen=True, slots=True)
class KindDifference:
    """A tensor whose dtype or shape is another."""

    name: str
    a: str
    b: str
    """Such as `BF16 [7168, 2048]`."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """What becomes of the names of both sides."""

    pairs: tuple[Pair, ...]
    dequantized: int
    """So many of the pairs are of weights that are dequantised first."""
    kinds: tuple[KindDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def read_side(path: Path, choice: Choice) -> Side:
    """A checkpoint in whichever layout lies there. Raises Refused."""
    recipes = recipes_to_try(choice.recipe)
    if holds_rank_files(path, choice.recipe):
        found = read_source(
            path,
            choice.recipe,
            ignore_extra_files=choice.ignore_extra_files,
            replicas=choice.replicas,
        )
        return Side(found.checkpoint, found.recipe.name, scalings_of([found.recipe]))
    if path.is_dir():
        checkpoint = read_checkpoint(path, ignore_extra_files=choice.ignore_extra_files)
    else:
        checkpoint = read_file(path)
    return Side(checkpoint, "", scalings_of(recipes))


def scalings_of(recipes: Iterable[Recipe]) -> tuple[BlockScale, ...]:
    return tuple(dict.fromkeys(scaling for recipe in recipes for scaling in recipe.scales.values()))


def pair_up(a: Side, b: Side, choice: Choice) -> Pairing:
    """Pairs the tensors of two sides. Raises Refused for a pattern that no name fits."""
    names = chosen([*a.checkpoint.tensors, *b.checkpoint.tensors], choice.only)
    made = dequantized_pairs(names, a, b) if choice.dequantize else []
    known = {pair.name for pair in made}
    left, right = (
        {name: tensors[name] for name in names if name in tensors and name not in used}
        for tensors, used in (
            (a.checkpoint.tensors, known | scales_in(pair.a for pair in made)),
            (b.checkpoint.tensors, known | scales_in(pair.b for pair in made)),
        )
    )
    pairs, kinds = list(made), []
    for name, one in left.items():
        other = right.get(name)
        if other is None:
            continue
        if (one.dtype, one.shape) == (other.dtype, other.shape):
            pairs.append(Pair(name, one, other, dtype_of(one, a, b)))
        else:
            kinds.append(KindDifference(name, kind_text(one), kind_text(other)))
    return Pairing(tuple(pairs), len(made), tuple(kinds), lacking(left, right), lacking(right, left))


def lacking(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names on one side that the other has not."""
    return tuple(name for name in here if name not in there)


def chosen(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that fit a pattern, each once, in their order."""
    every = list(dict.fromkeys(names))
    if not patterns:
        return every
    fitting = [{name for name in every if fits(name)} for fits in (re.compile(translate(p)).match for p in patterns)]
    require_none(
        Problem("wrong-option", f"--only {pattern}", "no tensor of either side", "a pattern that fits some")
        for pattern, found in zip(patterns, fitting, strict=True)
        if not found
    )
    wanted = set[str]().union(*fitting)
    return [name for name in every if name in wanted]


def kind_text(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def dtype_of(tensor: Tensor, a: Side, b: Side) -> str:
    """What the bytes of a tensor of both sides are taken for: F4 lies in checkpoints as I8, two values in a byte."""
    is_packed = tensor.dtype == "I8" and (dequantizing(tensor.name, a) or dequantizing(tensor.name, b))
    return "F4" if is_packed else tensor.dtype


def dequantized_pairs(names: Iterable[str], a: Side, b: Side) -> list[Pair]:
    """The weights of other kinds on both sides that can both be had in BF16, in one shape."""
    found = []
    for name in names:
        one, other = a.checkpoint.tensors.get(name), b.checkpoint.tensors.get(name)
        if one is None or other is None or (one.dtype, one.shape) == (other.dtype, other.shape):
            continue
        left, right = as_bf16(one, a), as_bf16(other, b)
        if left and right and result_of(left).shape == result_of(right).shape:
            found.append(Pair(name, left, right, "BF16"))
    return found


def as_bf16(tensor: Tensor, side: Side) -> Tensor | Cast | None:
    """A tensor in BF16: as it is, or by its block scale."""
    return tensor if tensor.dtype == "BF16" else dequantizing(tensor.name, side)


def result_of(operand: Tensor | Cast) -> Tensor:
    return operand.result if isinstance(operand, Cast) else operand


def scales_in(operands: Iterable[Tensor | Cast]) -> set[str]:
    """The names of the scales that casts use up."""
    return {operand.scale.name for operand in operands if isinstance(operand, Cast) and operand.scale}


def dequantizing(name: str, side: Side) -> Cast | None:
    """The cast of a block-scaled weight to BF16; None if it is none, or if its scale does not fit it."""
    tensors = side.checkpoint.tensors
    weight = tensors.get(name)
    if weight is None or not name.endswith(WEIGHT) or len(weight.shape) != 2:
        return None
    for scaling in side.scalings:
        scale = tensors.get(name.removesuffix(WEIGHT) + scaling.left)
        block = block_of(weight, scale, scaling) if scale else None
        if block:
            shape = unpack_shape(weight)
            result = Tensor(name, "BF16", shape, weight.file, weight.offset, prod(shape) * 2)
            return Cast("dequantize", weight, scale, block, result)
    return None


def block_of(weight: Tensor, scale: Tensor, scaling: BlockScale) -> tuple[int, int] | None:
    """The block of a scale, in elements; None if weight and scale are not as such a scaling has them."""
    if weight.dtype == "I8" and scaling.packed and scale.dtype == "F8_E8M0":
        block = scaling.block
    elif weight.dtype == "F8_E4M3" and scale.dtype in ("F32", "BF16", "F8_E8M0"):
        block = scaling.fp8_block if scaling.packed else scaling.block
    else:
        return None
    return block if scale.shape == scale_shape(unpack_shape(weight), block) else None
