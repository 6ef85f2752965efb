"""Diff: two checkpoints, in any layouts -> what of their tensors is the same, and how far the rest is apart.

Only tensors are compared, by name: one that has another name on the other side is missing there. Configs, metadata and
tokenizers are not looked at. Beside the buffers of a few threads no memory is taken, however large the tensors are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.casts.kernels import fastest_recode
from reshard.casts.streaming import Inputs, produce
from reshard.errors import refuse
from reshard.execution.reader import SCALES_SIZE, Buffers, Files, reader
from reshard.execution.windows import WINDOW_SIZE
from reshard.inspection.tensor_pairs import Choice, KindDifference, Pair, Pairing, Side, pair_up, read_side, result_of
from reshard.inspection.value_distance import Apart, elements_in, measure, merged
from reshard.storage.local import CACHED, is_equal
from reshard.storage.page_cache import reading_threads, ways_to_read
from reshard.storage.resources import count_progress, in_threads
from reshard.storage.unchanged import open_unchanged
from reshard.types import FIRST, Advance, Cast, Progress, Tensor

Bytes = NDArray[np.uint8]

ALL = Choice()


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """A tensor that has other elements on the other side."""

    name: str
    dtype: str
    """What its bytes are taken for: F4 where I8 packs it, BF16 where it was dequantised."""
    elements: int
    apart: Apart


@dataclass(frozen=True, slots=True)
class DiffReport:
    """What two checkpoints have in common, and what not."""

    a: str
    b: str
    """The paths."""
    recipes: tuple[str, str]
    """By which rank files were read; empty for what is no rank files."""
    same: int
    """So many tensors are the same, bit by bit."""
    compared: int
    """In bytes of one side."""
    dequantized: int
    """So many tensors were dequantised to be compared, be they the same or not."""
    values: tuple[ValueDifference, ...]
    """The most different first: those with NaNs and infinities, then by the relative difference."""
    kinds: tuple[KindDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether there is no difference at all."""
        return not (self.values or self.kinds or self.only_a or self.only_b)


def diff_checkpoints(a: Path, b: Path, choice: Choice = ALL, progress: Progress | None = None) -> DiffReport:
    """Compares two checkpoints, tensor by tensor and element by element.

    Raises Refused if one cannot be read or changes meanwhile, or if ranks of one hold different bytes of what should be
    the same in all.
    """
    sides = read_side(a, choice), read_side(b, choice)
    if choice.replicas == FIRST and not any(side.recipe for side in sides):
        raise refuse("wrong-option", "--replicas", "first", "rank files on a side", "leave it out")
    pairing = pair_up(*sides, choice)
    size = sum(result_of(pair.a).size for pair in pairing.pairs)
    found = compare_pairs(pairing, sides, size, count_progress(progress, size))
    values = [
        ValueDifference(pair.name, pair.dtype, elements_in(result_of(pair.a).size, pair.dtype), found[pair.name])
        for pair in pairing.pairs
        if pair.name in found
    ]
    values.sort(key=how_different, reverse=True)
    return DiffReport(
        str(a),
        str(b),
        (sides[0].recipe, sides[1].recipe),
        len(pairing.pairs) - len(values),
        size,
        pairing.dequantized,
        tuple(values),
        pairing.kinds,
        pairing.only_a,
        pairing.only_b,
    )


def how_different(difference: ValueDifference) -> tuple[bool, float, float]:
    """More is more different."""
    apart = difference.apart
    odd = apart.infinite > 0 or apart.nans != (0, 0)
    return odd, apart.max_relative or 0, apart.different / difference.elements


class Stretch(NamedTuple):
    """A part of a pair, in bytes."""

    pair: Pair
    offset: int
    size: int


def compare_pairs(pairing: Pairing, sides: Sequence[Side], size: int, advance: Advance) -> dict[str, Apart]:
    """Compares all pairs, of so many bytes on a side; returns by name how far those that differ are apart."""
    found: dict[str, Apart] = {}
    lock = Lock()
    if pairing.dequantized:
        fastest_recode()  # here, for it may import numba, and that from one thread only
    with ExitStack() as stack:
        files = [open_side(stack, side, 2 * size) for side in sides]

        def make_worker() -> Callable[[Stretch], None]:
            readers = [SideReader(side) for side in files]

            def work(stretch: Stretch) -> None:
                apart = compare_stretch(stretch, readers)
                if apart:
                    with lock:
                        found[stretch.pair.name] = merged(found.get(stretch.pair.name), apart)
                advance(stretch.size)

            return work

        in_threads(stretches(pairing.pairs), make_worker, max(reading_threads(side.ways) for side in files))
    return found


def stretches(pairs: Sequence[Pair]) -> Iterator[Stretch]:
    """All pairs in stretches of a window, in the order in which the first side has them on the disk."""
    for pair in sorted(pairs, key=lambda pair: place_of(pair.a)):
        size = result_of(pair.a).size
        for offset in range(0, size, WINDOW_SIZE):
            yield Stretch(pair, offset, min(WINDOW_SIZE, size - offset))


def place_of(operand: Tensor | Cast) -> tuple[int, int]:
    tensor = operand.weight if isinstance(operand, Cast) else operand
    return tensor.file, tensor.offset


def open_side(stack: ExitStack, side: Side, size: int) -> Files:
    """The files of a side, opened for a job of so many bytes."""
    folder, files = side.checkpoint.folder, side.checkpoint.files
    paths = [folder / file.name for file in files]
    ways = ways_to_read(paths[0], size) if paths else CACHED
    descriptors = stack.enter_context(open_unchanged(folder, files, ways, is_source=False))
    return Files(descriptors, [str(path) for path in paths], (), ways, side.checkpoint.joins, allow_inexact=True)


class SideReader:
    """What one thread reads a side with."""

    def __init__(self, files: Files) -> None:
        buffers = Buffers(makes=True)
        self._result = buffers.result
        self._read = reader(files, buffers.window, buffers.joined[:WINDOW_SIZE])
        scales = reader(files, buffers.scales, buffers.joined[WINDOW_SIZE : WINDOW_SIZE + SCALES_SIZE])
        self._inputs = Inputs(self._read, scales, WINDOW_SIZE, SCALES_SIZE)

    def read(self, operand: Tensor | Cast, offset: int, size: int) -> Bytes:
        """So many bytes of a tensor or of the result of a cast; overwritten by the next call."""
        if isinstance(operand, Tensor):
            return np.frombuffer(self._read(operand, offset, size), np.uint8)
        produce(operand, offset, self._result[:size], self._inputs)
        return np.frombuffer(self._result[:size], np.uint8)


def compare_stretch(stretch: Stretch, readers: Sequence[SideReader]) -> Apart | None:
    """How far the two sides of a stretch are apart; None if they are the same."""
    pair, offset, size = stretch
    one, other = readers[0].read(pair.a, offset, size), readers[1].read(pair.b, offset, size)
    if is_equal(one, other):
        return None
    return measure(one, other, pair.dtype, elements_in(offset, pair.dtype))
