"""Gathers byte ranges of a tensor that is stored in boxes from these boxes themselves: no join is read.

The bytes of a box lie in the tensor's own order. So the part of a range that is in a box is one range of the box: it is
read at once, and dealt out to the tensor's rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.errors import refuse
from reshard.formats.safetensors import BITS
from reshard.types import Tensor

StoredBox = tuple[Tensor, tuple[int, ...]]
"""A part of a tensor as it lies in a file, and its offsets in the tensor, in elements."""

BoxBytes = NDArray[np.uint8]

ReadBox = Callable[[Tensor, int, int], BoxBytes]
"""Reads bytes of a box: `(part, offset, size)`, in bytes. The next call may overwrite them."""


@dataclass(frozen=True, slots=True, eq=False)
class BoxedTensor:
    """A tensor that is stored in boxes. Compared by identity: to hash thousands of boxes takes as long as a read."""

    boxes: Sequence[StoredBox]
    size: int
    """Of the whole tensor, in bytes."""


class BoxRuns(NamedTuple):
    """A box as runs of bytes. Dimensions in which it is as long as the tensor are merged with the one before."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    """The last in bytes: a run."""
    pitches: tuple[int, ...]
    """Of a step in each dimension, in bytes of the tensor; of the last dimension 1."""
    first: int
    """Of its first byte, in bytes of the tensor."""

    end: int
    """Behind its last byte, in bytes of the tensor."""

    def count_before(self, place: int) -> int:
        """Counts the bytes of the box that lie before a byte of the tensor, by its row, plane and so on."""
        rest, before = place, 0
        for number, (offset, length, pitch) in enumerate(zip(self.offsets, self.lengths, self.pitches, strict=True)):
            step, rest = divmod(rest, pitch)
            inner = prod(self.lengths[number + 1 :])
            before += min(max(step - offset, 0), length) * inner
            if not offset <= step < offset + length:
                break
        return before


@lru_cache(maxsize=64)  # few are read at the same time, and all of a large model would take much memory
def arrange_boxes(tensor: BoxedTensor) -> list[tuple[Tensor, BoxRuns]]:
    """Arranges the boxes of a tensor, of equal ones the first. Raises Refused if they do not fill it: their bytes must
    be as many as its own, and no two of them overlap.
    """
    distinct = {(offsets, part.shape): part for part, offsets in reversed(tensor.boxes) if prod(part.shape)}
    parts = list(distinct.values())
    arranged = arrange_places(tuple(distinct), BITS[parts[0].dtype])
    held = sum(part.size for part in parts)
    if arranged.runs and arranged.size == held == tensor.size and len({part.dtype for part in parts}) == 1:
        return list(zip(parts, arranged.runs, strict=True))
    found = f"boxes of {held:,} bytes, in a tensor {list(arranged.shape)}"
    raise refuse("wrong-shape", parts[0].name, found, f"boxes that fill its {tensor.size:,} bytes, each once")


class ArrangedBoxes(NamedTuple):
    """Boxes in a tensor that ends where they end."""

    shape: tuple[int, ...]
    """Of the tensor, in elements."""
    size: int
    """Of all boxes, in bytes."""
    runs: Sequence[BoxRuns]
    """Empty if they do not fill it."""


@lru_cache(maxsize=1024)  # thousands of tensors are cut in few ways
def arrange_places(places: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], bits: int) -> ArrangedBoxes:
    """Arranges boxes, given as offsets and shape in elements of a number of bits."""
    begins = np.array([offsets for offsets, _ in places], np.int64)
    lengths = np.array([shape for _, shape in places], np.int64)
    shape = tuple((begins + lengths).max(axis=0).tolist())
    elements = sum(prod(shape) for _, shape in places)
    is_filled = elements == prod(shape) and begins.min(initial=0) >= 0 and not has_overlap(begins, begins + lengths)
    runs = [arrange_box(*place, shape, bits) for place in places] if is_filled else []
    return ArrangedBoxes(shape, elements * bits // 8, runs)


def has_overlap(begins: NDArray[np.int64], ends: NDArray[np.int64]) -> bool:
    """Whether two of some boxes, int64 of shape [boxes, dimensions], overlap. Each is held against those that begin in
    the first dimension where it has not ended yet.
    """
    if not begins.shape[1]:
        return len(begins) > 1
    order = np.argsort(begins[:, 0])
    begins, ends = begins[order], ends[order]
    stops = np.searchsorted(begins[:, 0], ends[:, 0])
    for number, stop in enumerate(stops.tolist()):
        others = slice(number + 1, stop)
        apart = (begins[others] >= ends[number]) | (ends[others] <= begins[number])
        if not np.all(np.any(apart, axis=1)):
            return True
    return False


def arrange_box(offsets: tuple[int, ...], box: tuple[int, ...], shape: tuple[int, ...], bits: int) -> BoxRuns:
    """Arranges a box in a tensor of `shape`, both in elements of a number of bits."""
    merged: list[list[int]] = []
    for offset, length, side in zip((0, *offsets), (1, *box), (1, *shape), strict=True):
        if merged and length == side:
            merged[-1] = [number * side for number in merged[-1]]
        else:
            merged.append([offset, length, side])
    merged[-1] = [number * bits // 8 for number in merged[-1]]
    starts, lengths, sides = map(tuple, zip(*merged, strict=True))
    pitches = tuple(prod(sides[number + 1 :]) for number in range(len(sides)))
    first = sum(start * pitch for start, pitch in zip(starts, pitches, strict=True))
    last = sum((length - 1) * pitch for length, pitch in zip(lengths, pitches, strict=True))
    return BoxRuns(starts, lengths, pitches, first, first + last + 1)


def gather_range(tensor: BoxedTensor, offset: int, size: int, read: ReadBox) -> BoxBytes:
    """Gathers `size` bytes of a tensor from byte `offset` of it on, into new memory. Raises Refused."""
    out = np.empty(size, np.uint8)
    for part, box in arrange_boxes(tensor):
        if box.first < offset + size and box.end > offset:
            begin, end = box.count_before(offset), box.count_before(offset + size)
            if begin < end:
                spread_bytes(box, begin, read(part, begin, end - begin), out, offset)
    return out


def spread_bytes(box: BoxRuns, begin: int, data: BoxBytes, out: BoxBytes, offset: int) -> None:
    """Spreads bytes of a box, from byte `begin` of it on, over the tensor's bytes from `offset` on, which are `out`.

    A plane at a time: runs with one pitch; the first and the last run may be parts.
    """
    run, plane, end = box.lengths[-1], prod(box.lengths[-2:]), begin + len(data)
    pitch = box.pitches[-2] if len(box.pitches) > 1 else run
    cuts = {begin, end, -(-begin // run) * run, end // run * run, *range(-(-begin // plane) * plane, end, plane)}
    for low, high in pairwise(sorted(cut for cut in cuts if begin <= cut <= end)):
        place = find_box_byte(box, low) - offset
        rows, width = max((high - low) // run, 1), min(high - low, run)
        target = np.ndarray((rows, width), np.uint8, out, place, (pitch, 1))  # which checks that it lies in `out`
        target[:] = data[low - begin : high - begin].reshape(rows, width)


def find_box_byte(box: BoxRuns, byte: int) -> int:
    """Finds where a byte of a box lies, in bytes of the tensor."""
    place, rest = box.first, byte
    for number, pitch in enumerate(box.pitches):
        step, rest = divmod(rest, prod(box.lengths[number + 1 :]))
        place += step * pitch
    return place
