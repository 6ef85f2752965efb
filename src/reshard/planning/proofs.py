"""Proves a plan: every target byte is written exactly once, and every byte of a kept source tensor is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from reshard.formats.tensor_uses import TensorUse
from reshard.planning.copies import Copies, Integers, WrongPlan
from reshard.planning.shards import Series
from reshard.recipe_types import Recipe, Rule
from reshard.sources.block_scales import is_kept
from reshard.sources.match import Matched
from reshard.types import Cast, Checkpoint, Layout, Tensor


@dataclass(frozen=True, slots=True)
class Usage:
    """How often source tensors are used; int64 columns of shape [tensors]."""

    least: Integers
    """Number of uses of the part of a tensor that is used least often."""
    most: Integers
    """Number of uses of the part of a tensor that is used most often."""


def require_tiling(copies: Copies, begins: Sequence[int], ends: Sequence[int]) -> None:
    """Proves that exactly one copy writes each byte of each target file from its `begins` to its `ends`, in bytes.
    Raises WrongPlan.
    """
    order = np.lexsort((copies.target_offset, copies.target_file))
    file, start = copies.target_file[order], copies.target_offset[order]
    end = start + copies.sizes[order]
    is_first = np.diff(file, prepend=-1) != 0
    is_last = np.diff(file, append=-1) != 0
    expected = np.where(is_first, np.asarray(begins, np.int64)[file], np.concatenate([[0], end[:-1]]))
    filled = {number for number, (begin, stop) in enumerate(zip(begins, ends, strict=True)) if stop > begin}
    if set(file[is_first].tolist()) != filled:
        raise WrongPlan("some target files have no copy at all, or copies that they should not have")
    if wrong := np.flatnonzero(start != expected).tolist():
        raise WrongPlan(f"target file {file[wrong[0]]}: gap or overlap at byte {start[wrong[0]]}")
    if wrong := np.flatnonzero(is_last & (end != np.asarray(ends, np.int64)[file])).tolist():
        raise WrongPlan(f"target file {file[wrong[0]]}: the last copy ends at byte {end[wrong[0]]}")


def require_coverage(copies: Copies, used: Sequence[Tensor], sizes: Sequence[int]) -> Usage:
    """Proves that copies read every byte of each `used` tensor, and no byte of others. Raises WrongPlan.

    `sizes` are the sizes of the source files, joins and casts, in bytes. Returns the number of uses; 0 for empty
    tensors.
    """
    bases = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
    begins = bases[[tensor.file for tensor in used]] + np.array([tensor.offset for tensor in used], np.int64)
    lengths = np.array([tensor.size for tensor in used], np.int64)
    starts = bases[copies.source_file] + copies.source_offset
    order = np.lexsort((copies.rows, copies.run, starts))
    columns = np.stack([starts[order], copies.run[order], copies.rows[order], copies.pitch[order]])
    is_new = np.concatenate([[True], np.any(np.diff(columns, axis=1) != 0, axis=0)])[: columns.shape[1]]
    places = np.flatnonzero(is_new)
    times = np.diff(places, append=columns.shape[1])
    start, run, rows, pitch = columns[:, places]

    full = np.flatnonzero(lengths > 0)
    full = full[np.argsort(begins[full])]
    owner = full[np.searchsorted(begins[full], start, side="right") - 1] if len(full) else np.empty(0, np.int64)
    alike = (np.diff(rows) == 0) & ((rows[1:] == 1) | (np.diff(pitch) == 0))
    if np.any(~alike & (np.diff(owner) == 0)):
        raise WrongPlan("a source tensor is read in rows of different lengths")
    require_rows_tiled(owner, start, run, np.where(rows > 1, pitch, lengths[owner]), begins)
    if np.any(np.where(rows > 1, pitch * rows, lengths[owner]) != lengths[owner]):
        raise WrongPlan("a copy of rows that are not the tensor's")
    read = np.count_nonzero(np.diff(owner, prepend=-1))
    if read != len(full):
        raise WrongPlan(f"{len(full) - read} source tensors are not read")
    least, most = np.full(len(used), 2**62), np.zeros(len(used), np.int64)
    np.minimum.at(least, owner, times)
    np.maximum.at(most, owner, times)
    return Usage(np.where(lengths > 0, least, 0), most)


def require_rows_tiled(owner: Integers, start: Integers, run: Integers, row: Integers, begins: Integers) -> None:
    """Proves that the runs of each tensor, sorted by start, fill its row without gap or overlap. Raises WrongPlan.

    The row is the pitch, or the whole tensor if its copies are contiguous; all values are in bytes.
    """
    is_first = np.diff(owner, prepend=-1) != 0
    is_last = np.diff(owner, append=-1) != 0
    expected = np.where(is_first, begins[owner], np.concatenate([[0], (start + run)[:-1]]))
    if wrong := np.flatnonzero(start != expected).tolist():
        raise WrongPlan(f"source tensor {owner[wrong[0]]}: a part is read twice or not at all")
    if np.any(is_last & (start + run != begins[owner] + row)):
        raise WrongPlan("the last part of a source tensor is not read")


WORDS = {"pad": "padded", "dequantize": "dequantized"}
"""Operation of a cast -> the use of its inputs; `cast` for all other operations."""


def prove_coverage(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layout: Layout,
    matched: Matched,
    series: Sequence[Series],
    casts: Sequence[Cast],
    copies: Copies,
) -> tuple[TensorUse, ...]:
    """Proves that every source tensor is used as often as its rule says; returns the uses. Raises WrongPlan."""
    used = [tensor for one in series for tensor in one.tensors]
    sizes = [file.size for file in checkpoint.files]
    sizes += [join.result.size for join in checkpoint.joins] + [cast.result.size for cast in casts]
    usage = require_coverage(copies, used, sizes)
    counts = [len(one.tensors) for one in series]
    least = np.repeat([one.least for one in series], counts)
    most = np.repeat([one.most for one in series], counts)
    if np.any((usage.most > 0) & ((usage.least != least) | (usage.most != most))):
        raise WrongPlan("a part of a source tensor is used more or less often than its rule says")
    found: dict[tuple[str, str, str], dict[str, int]] = {}
    for use, number, tensors in find_uses(checkpoint, recipe, layout, matched, series, casts):
        key = use, *(find_reason(recipe.rules[number], recipe) if use == "dropped" else (recipe.rules[number].left, ""))
        found.setdefault(key, {}).update({tensor.name: tensor.size for tensor in tensors})
    if sum(map(len, found.values())) != len(checkpoint.tensors):
        raise WrongPlan("the rules do not cover every source tensor once")
    return tuple(TensorUse(*key, len(sizes), sum(sizes.values())) for key, sizes in found.items())


def find_reason(rule: Rule, recipe: Recipe) -> tuple[str, str]:
    """Finds the name of what a rule drops, and the reason."""
    asked = (
        place
        for place in recipe.placeholders.values()
        if place.optional and f"{{{place.name}}}" in rule.left + rule.only
    )
    place = next(asked, None)
    if place and (rule.optional or rule.left.endswith("{*}")):
        return place.counts, place.optional
    return rule.left, rule.split.text


def find_uses(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layout: Layout,
    matched: Matched,
    series: Sequence[Series],
    casts: Sequence[Cast],
) -> Iterator[tuple[str, int, Sequence[Tensor]]]:
    """Finds the uses of source tensors: yields the use, the index of the rule, and the tensors."""
    files = checkpoint.parts
    for one in series:
        if one.tensors[0].file < files:
            if checkpoint.packed and checkpoint.find_packed(checkpoint.tensors[one.tensors[0].name]):
                continue  # codes, which are told with their scales
            yield name_use(one, layout.ranks), one.number, one.tensors
            continue
        made = [casts[tensor.file - files] for tensor in one.tensors]
        if made[0].operation == "fill":
            continue  # made of nothing
        inputs = [tensor for cast in made for tensor in list_named_inputs(cast)]
        yield WORDS.get(made[0].operation, "cast"), one.number, inputs
    for family in matched.families:
        if not is_kept(recipe.rules[family.rule], layout):
            yield "dropped", family.rule, family.tensors


def list_named_inputs(cast: Cast) -> Sequence[Tensor]:
    """Lists the tensors of the checkpoint that a cast is computed from. What lies packed is one there, under its plain
    name, of the size of all its inputs.
    """
    inputs = cast.list_inputs()
    if not cast.packed:
        return inputs
    return [cast.packed.result._replace(size=sum(tensor.size for tensor in inputs))]


def name_use(series: Series, ranks: int) -> str:
    """Names the use of a series of source tensors that are not cast."""
    if series.tensors[0].size == 0:
        return "empty"
    if series.least == series.most == 1:
        return "once"
    return "replicated" if series.least == series.most == ranks else "shared"
