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

    part: Tensor
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
def arrange_boxes(tensor: BoxedTensor) -> list[BoxRuns]:
    """Arranges the boxes of a tensor, of equal ones the first. Raises Refused if they do not fill it: their bytes must
    be as many as its own, and no two of them overlap.
    """
    boxes, size = tensor.boxes, tensor.size
    name, bits = boxes[0][0].name, BITS[boxes[0][0].dtype]
    distinct = {(offsets, part.shape): part for part, offsets in reversed(boxes) if prod(part.shape)}
    ends = [[a + b for a, b in zip(*place, strict=True)] for place in distinct]
    shape = tuple(map(max, zip(*ends, strict=True)))
    lowest = min((place for offsets, _ in distinct for place in offsets), default=0)
    whole = prod(shape) * bits // 8
    held = sum(part.size for part in distinct.values())
    if lowest < 0 or whole != size or held != size or len({part.dtype for part in distinct.values()}) > 1:
        found = f"boxes of {held:,} bytes, from {lowest} to {list(shape)}"
        raise refuse("wrong-shape", name, found, f"boxes that fill {size:,} bytes")
    begins = [offsets for offsets, _ in distinct]
    if overlaps(np.array(begins, np.int64), np.array(ends, np.int64)):
        raise refuse("overlap", name, "two boxes with the same elements", "each element once")
    return [arrange_box(part, offsets, shape, bits) for (offsets, _), part in distinct.items()]


def overlaps(begins: NDArray[np.int64], ends: NDArray[np.int64]) -> bool:
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


def arrange_box(part: Tensor, offsets: tuple[int, ...], shape: tuple[int, ...], bits: int) -> BoxRuns:
    """Arranges one box of a tensor of `shape`, whose elements have a number of bits."""
    merged: list[list[int]] = []
    for offset, length, side in zip((0, *offsets), (1, *part.shape), (1, *shape), strict=True):
        if merged and length == side:
            merged[-1] = [number * side for number in merged[-1]]
        else:
            merged.append([offset, length, side])
    merged[-1] = [number * bits // 8 for number in merged[-1]]
    starts, lengths, sides = map(tuple, zip(*merged, strict=True))
    pitches = tuple(prod(sides[number + 1 :]) for number in range(len(sides)))
    first = sum(start * pitch for start, pitch in zip(starts, pitches, strict=True))
    last = sum((length - 1) * pitch for length, pitch in zip(lengths, pitches, strict=True))
    return BoxRuns(part, starts, lengths, pitches, first, first + last + 1)


def gather_range(tensor: BoxedTensor, offset: int, size: int, read: ReadBox) -> BoxBytes:
    """Gathers `size` bytes of a tensor from byte `offset` of it on, into new memory. Raises Refused."""
    out = np.empty(size, np.uint8)
    for box in arrange_boxes(tensor):
        if box.first < offset + size and box.end > offset:
            begin, end = box.count_before(offset), box.count_before(offset + size)
            if begin < end:
                spread_bytes(box, begin, read(box.part, begin, end - begin), out, offset)
    return out


def spread_bytes(box: BoxRuns, begin: int, data: BoxBytes, out: BoxBytes, offset: int) -> None:
    """Spreads bytes of a box, from byte `begin` of it on, over the tensor's bytes from `offset` on, which are `out`.

    A plane at a time: runs with one pitch; the first and the last run may be parts.
    """
    run, plane, end = box.lengths[-1], prod(box.lengths[-2:]), begin + len(data)
    pitch = box.pitches[-2] if len(box.pitches) > 1 else run
    cuts = {begin, end, -(-begin // run) * run, end // run * run, *range(-(-begin // plane) * plane, end, plane)}
    for low, high in pairwise(sorted(cut for cut in cuts if begin <= cut <= end)):
        place = find_place(box, low) - offset
        rows, width = max((high - low) // run, 1), min(high - low, run)
        target = np.ndarray((rows, width), np.uint8, out, place, (pitch, 1))  # which checks that it lies in `out`
        target[:] = data[low - begin : high - begin].reshape(rows, width)


def find_place(box: BoxRuns, byte: int) -> int:
    """Finds where a byte of a box lies, in bytes of the tensor."""
    place, rest = box.first, byte
    for number, pitch in enumerate(box.pitches):
        step, rest = divmod(rest, prod(box.lengths[number + 1 :]))
        place += step * pitch
    return place
