"""The bytes that a plan reads of its source: less than the whole where only some ranks are written."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from reshard.casts.shapes import compute_unpadded_shape, count_strip_rows, takes_strips
from reshard.formats.safetensors import BITS
from reshard.planning.copies import LARGEST_GAP, Copies, Integers
from reshard.types import Cast, Checkpoint, Tensor

TIMES_READ = {
    "quantize": (2, 0),
    "quantize-ue8m0": (2, 0),
    "fp4-to-fp8": (1, 2),
    "fp4-to-fp8-scale": (0, 1),
    "nvfp4-scale": (0, 1),
    "nvfp4-factor": (0, 1),
}
"""Operation of a cast -> how often it reads its weight and its scale, where that is not once each."""


class Reads(NamedTuple):
    """How much a plan reads, in bytes; headers and samples of the files come on top."""

    size: int
    """All of it."""
    replicas: int
    """What is read only to compare it with the same tensor of another rank."""


def measure_reads(checkpoint: Checkpoint, casts: Sequence[Cast], copies: Copies) -> Reads:
    """Measures from above how much copies read: each part of a file once, with the short gaps between."""
    needed = measure_ranges(copies, checkpoint.parts + len(casts))
    files = len(checkpoint.files)
    used = dict(enumerate(needed.tolist()))
    read = sum(needed[:files].tolist())

    def add_input(tensor: Tensor, size: float) -> None:
        nonlocal read
        if tensor.file < files:
            read += size
        else:
            used[tensor.file] += size

    for place, cast in enumerate(casts, checkpoint.parts):
        # Padding is read from nowhere.
        size = prod(compute_unpadded_shape(cast)) * BITS[cast.result.dtype] // 8
        share = min(1, used[place] / size) if size else 0
        weight, scale = TIMES_READ.get(cast.operation, (1, 1))
        if cast.packed and takes_strips(cast):  # all codes are read for each strip
            weight = scale = -(-cast.packed.result.shape[-2] // count_strip_rows(cast.packed))
        add_input(cast.weight, weight * cast.weight.size * share)
        for beside in cast.list_inputs()[1:]:
            add_input(beside, scale * beside.size * share)
    replicas = 0.0
    # The parts of a join may lie in joins before it.
    for place, join in reversed([*enumerate(checkpoint.joins, files)]):
        share = used[place] / join.result.size if join.result.size else 0
        for copy in (copy for part in join.parts for copy in part):
            add_input(copy, share * copy.size)
        replicas += share * sum(copy.size for part in join.parts for copy in part[1:])
    return Reads(round(read), round(replicas))


def measure_ranges(copies: Copies, files: int) -> Integers:
    """Measures the union of the byte ranges that copies read of each file, join and cast: int64 of shape [files].
    Columns of a matrix are read with what lies between them, and so are gaps of up to LARGEST_GAP bytes.
    """
    order = np.lexsort((copies.source_offset, copies.source_file))
    file, start = copies.source_file[order], copies.source_offset[order]
    end = start + (copies.rows[order] - 1) * copies.pitch[order] + copies.run[order]
    # One behind the other, so far apart that no gap between two files is short.
    room = int(end.max(initial=0)) + LARGEST_GAP + 1
    start, end = start + file * room, np.maximum.accumulate(end + file * room)
    is_new = np.ones(len(start), np.bool_)
    is_new[1:] = start[1:] - end[:-1] > LARGEST_GAP
    firsts = np.flatnonzero(is_new)
    lasts = np.append(firsts[1:], len(end))[: len(firsts)] - 1
    sizes = np.zeros(files, np.int64)
    np.add.at(sizes, file[firsts], end[lasts] - start[firsts])
    return sizes
