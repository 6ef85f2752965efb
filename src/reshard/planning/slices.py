"""Slices of whole tensors for ranks, as torch's distributed checkpoints have them in safetensors.

Each tensor is cut along its first dimension as `torch.chunk` does it, and FSDP2 with it. A rank for which no row is
left has nothing of the tensor:

    10 rows, 4 ranks: 3, 3, 3, 1      5 rows, 4 ranks: 2, 2, 1, none      a scalar: rank 0
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reshard.errors import Problem, require_none
from reshard.formats.dcp_safetensors import SHARDING, VERSION
from reshard.formats.safetensors import BITS
from reshard.planning.copies import Integers
from reshard.planning.shards import MOST_FILES, Series, cut_nothing, cut_unevenly
from reshard.recipe_types import Recipe
from reshard.recipes.fusions import list_fusions
from reshard.recipes.recipe import has_ranks, list_packaged_recipes
from reshard.types import SLICED, Layout, Note


def slice_series(series: Sequence[Series], recipe: Recipe, ranks: int) -> list[Series]:
    """Cuts whole tensors into the slices of ranks. Raises Refused for fused tensors that are no stacks."""
    require_none(check_sliced_fusions(recipe))
    return [
        slice_tensors(one, ranks) if one.parts is None else slice_parts(one, one.parts // one.of_member, ranks)
        for one in series
    ]


def check_sliced_fusions(recipe: Recipe) -> Iterator[Problem]:
    """Reports the fused tensors of a recipe without ranks that are no stacks: a slice may begin inside a part.
    Constants too: no training has them.
    """
    if recipe.constants and not has_ranks(recipe):
        found, expected = f"for {recipe.name}, which has constants", "tensors of the source only"
        yield Problem("wrong-option", "--to dcp", found, expected, "leave --to dcp out")
    for fusion in list_fusions(recipe):
        if not (fusion.stacked or has_ranks(recipe)):
            found = f"for {recipe.name}, in which {fusion.right} is put together from {len(fusion.rules)} tensors"
            remedy = "leave --to dcp out; or without this recipe: slices under the names of the hub"
            yield Problem("wrong-option", "--to dcp", found, "tensors that are whole, or stacks", remedy)


def slice_tensors(series: Series, ranks: int) -> Series:
    """Cuts tensors along their first dimension. Scalars, and elements smaller than a byte, are whole in rank 0."""
    tensor, number = series.tensors[0], np.zeros(len(series.tensors), np.int64)
    if not tensor.shape or BITS[tensor.dtype] < 8:
        return replace(series, cut=cut_nothing(tensor, MOST_FILES), ranks=number, least=1, most=1)
    return replace(series, cut=cut_unevenly(tensor, 0, -(-tensor.shape[0] // ranks)), ranks=None, least=1, most=1)


def slice_parts(series: Series, members: Integers, ranks: int) -> Series:
    """Assigns the parts of stacked tensors to ranks by the numbers of their members, int64 of shape [tensors]: these
    are the first dimension of a stack.
    """
    numbers, places = np.unique(members, return_inverse=True)
    most = -(-len(numbers) // ranks)
    cut = cut_nothing(series.tensors[0], MOST_FILES)
    return replace(series, cut=cut, ranks=places.reshape(-1) // most, least=1, most=1)


UNREAD = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"})
"""Dtypes that the table of safetensors for torch lacks: torch's reader ends at them with a KeyError."""


def note_loader_names(
    recipe: Recipe, layout: Layout, config: Mapping[str, Any], scales: frozenset[str]
) -> Iterator[Note]:
    """Notes slices that transformers does not load: of a model that has other names in memory, and of a quantized one,
    by its config or the dtypes of its block `scales`.
    """
    if layout.to != SLICED:
        return
    if scales or (config.get("quantization_config") and layout.cast != "bf16"):
        read = f"torch's reader has no {', '.join(scales & UNREAD)}" if scales & UNREAD else "torch reads them"
        text = f"transformers refuses slices of a quantized model; {read}"
        yield Note("loader-quantized", f"{text}; --cast bf16 makes what both read" if recipe.scales else text)
    if has_ranks(recipe) and (engine := find_engine_with_names(recipe, config)):
        text = f"{engine} has other names in memory, with stacked experts, and loads slices under these only"
        yield Note("loader-names", f"{text}: --for {engine} writes them")


def find_engine_with_names(recipe: Recipe, config: Mapping[str, Any]) -> str:
    """Finds the engine whose whole files of a model have other names than those of the hub; empty if none is known."""
    model = config.get("model_type")
    models = [model] if isinstance(model, str) else recipe.model_types
    others = (one for one in list_packaged_recipes() if one.engine and not has_ranks(one))
    return next((one.engine for one in others if set(models) & set(one.model_types)), "")


class SlicePlaces:
    """Writes the places of the slices of one file after another, as torch's metadata have them. The files come in the
    order of their ranks, for the first slice of a tensor tells how far the next ones are apart.
    """

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, int, str]] = {}
        """By the name of a tensor: the rows of its first slice, between the texts before and behind its first row. A
        model has 100,000 tensors, and each rank writes them.
        """

    def write(self, rank: int, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> str:
        """Writes the metadata entry of a header. `shapes` are those of the slices, in elements."""
        places = []
        for name, shape in zip(names, shapes, strict=True):
            known = self.known.get(name)
            if known is None:
                texts = f'{json.dumps(name)}:{{"saved_offsets":[', f"{',0' * (len(shape) - 1)}]}}"
                known = self.known[name] = texts[0], next(iter(shape), 0), texts[1]
            before, step, behind = known
            places.append(f"{before}{rank * step if shape else ''}{behind}")
        said = {SHARDING: f"{{{','.join(places)}}}", VERSION: "1.0", "format": "pt"}
        return f'"__metadata__":{json.dumps(said, separators=(",", ":"))}'
