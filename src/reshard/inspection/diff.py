"""Compares two checkpoints of any layouts tensor by tensor, and measures how far the values differ.

Tensors are compared by name: a tensor with another name on the other side is missing there. Configs, metadata and
tokenizers are not compared. Memory is the buffers of a few threads, whatever the size of the tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.casts.kernels import choose_recode
from reshard.casts.streaming import CastInputs, compute_cast
from reshard.errors import refuse
from reshard.execution.reader import SCALES_SIZE, OpenFiles, WorkerBuffers, make_reader
from reshard.execution.windows import WINDOW_SIZE
from reshard.inspection.tensor_pairs import (
    DiffChoice,
    DiffSide,
    KindDifference,
    Pairing,
    TensorPair,
    get_result,
    pair_up,
    read_diff_side,
)
from reshard.inspection.value_distance import ValueDistance, count_elements, measure_distance, merge_distances
from reshard.storage.counting import count_progress
from reshard.storage.local import CACHED, has_equal_bytes
from reshard.storage.page_cache import choose_reading_threads, choose_ways_to_read
from reshard.storage.resources import run_in_threads
from reshard.storage.unchanged import open_unchanged
from reshard.text import escape
from reshard.types import FIRST, Advance, Cast, Note, Progress, Tensor

DiffBytes = NDArray[np.uint8]

COMPARE_ALL = DiffChoice()


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """A tensor whose elements differ."""

    name: str
    dtype: str
    """The dtype of the compared elements: F4 for packed I8, BF16 for dequantized weights."""
    elements: int
    apart: ValueDistance


@dataclass(frozen=True, slots=True, repr=False)
class DiffReport:
    """The result of comparing two checkpoints: how many tensors are equal, and every difference."""

    a: str
    b: str
    """The paths."""
    recipes: tuple[str, str]
    """The recipe that the rank files of each side were read with; empty for other layouts."""
    same: int
    """The number of tensors that are equal, bit by bit."""
    compared: int
    """The bytes that were compared, of one side."""
    dequantized: int
    """The number of tensors that were dequantized to be compared, equal or not."""
    values: tuple[ValueDifference, ...]
    """The most different first: with NaNs and infinities, then by the largest relative difference."""
    kinds: tuple[KindDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    notes: tuple[Note, ...] = ()
    """What was left aside of a side, which is named first."""

    @property
    def is_same(self) -> bool:
        """Whether there is no difference at all."""
        return not (self.values or self.kinds or self.only_a or self.only_b)

    @property
    def counts(self) -> dict[str, int]:
        """The number of tensors that are equal, and of each kind of difference."""
        return {
            "the same": self.same,
            "other values": len(self.values),
            "other dtype or shape": len(self.kinds),
            "only in A": len(self.only_a),
            "only in B": len(self.only_b),
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items() if count)
        verdict = "same" if self.is_same else "differs"
        return escape(f"{self.a} and {self.b}: {verdict}: {counts or 'no tensors'}")

    __repr__ = __str__


def diff_checkpoints(
    a: Path, b: Path, choice: DiffChoice = COMPARE_ALL, progress: Progress | None = None
) -> DiffReport:
    """Compares two checkpoints, tensor by tensor and element by element.

    Raises Refused if one cannot be read or changes meanwhile, or if the replicas in its ranks differ.
    """
    sides = read_diff_side(a, choice), read_diff_side(b, choice)
    if choice.replicas == FIRST and not any(side.recipe for side in sides):
        raise refuse("wrong-option", "--replicas", "first", "rank files on a side", "leave it out")
    pairing = pair_up(*sides, choice)
    size = sum(get_result(pair.a).size for pair in pairing.pairs)
    with count_progress(progress, size) as advance:
        found = compare_pairs(pairing, sides, size, advance)
    values = [
        ValueDifference(pair.name, pair.dtype, count_elements(get_result(pair.a).size, pair.dtype), found[pair.name])
        for pair in pairing.pairs
        if pair.name in found
    ]
    values.sort(key=make_difference_key, reverse=True)
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
        tuple(
            Note(note.kind, f"{name}: {note.text}")
            for name, side in zip("AB", sides, strict=True)
            for note in side.checkpoint.notes
        ),
    )


def make_difference_key(difference: ValueDifference) -> tuple[bool, float, float]:
    """The sort key of a difference: larger is more different."""
    apart = difference.apart
    odd = apart.infinite > 0 or apart.nans != (0, 0)
    return odd, apart.max_relative or 0, apart.different / difference.elements


class PairRange(NamedTuple):
    """A byte range of a pair of tensors."""

    pair: TensorPair
    offset: int
    size: int


def compare_pairs(pairing: Pairing, sides: Sequence[DiffSide], size: int, advance: Advance) -> dict[str, ValueDistance]:
    """Compares all pairs, of `size` bytes on a side; returns the differences by name."""
    found: dict[str, ValueDistance] = {}
    lock = Lock()
    if pairing.dequantized:
        choose_recode()  # here, for it may import numba, and that from one thread only
    with ExitStack() as stack:
        files = [open_side(stack, side, 2 * size) for side in sides]

        def make_worker() -> Callable[[PairRange], None]:
            readers = [SideReader(side) for side in files]

            def work(piece: PairRange) -> None:
                apart = compare_pair_range(piece, readers)
                if apart:
                    with lock:
                        found[piece.pair.name] = merge_distances(found.get(piece.pair.name), apart)
                advance(piece.size)

            return work

        run_in_threads(
            split_pairs(pairing.pairs), make_worker, max(choose_reading_threads(side.ways) for side in files)
        )
    return found


def split_pairs(pairs: Sequence[TensorPair]) -> Iterator[PairRange]:
    """Splits all pairs into byte ranges of WINDOW_SIZE, in the order of the first side on disk."""
    for pair in sorted(pairs, key=lambda pair: get_first_position(pair.a)):
        size = get_result(pair.a).size
        for offset in range(0, size, WINDOW_SIZE):
            yield PairRange(pair, offset, min(WINDOW_SIZE, size - offset))


def get_first_position(operand: Tensor | Cast) -> tuple[int, int]:
    tensor = operand.weight if isinstance(operand, Cast) else operand
    return tensor.file, tensor.offset


def open_side(stack: ExitStack, side: DiffSide, size: int) -> OpenFiles:
    """Opens the files of a side for a job that reads `size` bytes."""
    folder, files = side.checkpoint.folder, side.checkpoint.files
    paths = [folder / file.name for file in files]
    ways = choose_ways_to_read(paths[0], size) if paths else CACHED
    descriptors = stack.enter_context(open_unchanged(folder, files, ways, is_source=False))
    return OpenFiles(descriptors, [str(path) for path in paths], (), ways, side.checkpoint.joins, allow_inexact=True)


class SideReader:
    """Reads tensors and casts of a side; one for each thread."""

    def __init__(self, files: OpenFiles) -> None:
        buffers = WorkerBuffers(makes=True)
        self._result = buffers.result
        self._read = make_reader(files, buffers.window, buffers.joined[:WINDOW_SIZE])
        scales = make_reader(files, buffers.scales, buffers.joined[WINDOW_SIZE : WINDOW_SIZE + SCALES_SIZE])
        self._inputs = CastInputs(self._read, scales, WINDOW_SIZE, SCALES_SIZE)

    def read(self, operand: Tensor | Cast, offset: int, size: int) -> DiffBytes:
        """Reads `size` bytes of a tensor or of the result of a cast; the next call overwrites them."""
        if isinstance(operand, Tensor):
            return np.frombuffer(self._read(operand, offset, size), np.uint8)
        compute_cast(operand, offset, self._result[:size], self._inputs)
        return np.frombuffer(self._result[:size], np.uint8)


def compare_pair_range(piece: PairRange, readers: Sequence[SideReader]) -> ValueDistance | None:
    """Measures how far the two sides of a byte range differ; None if they are equal."""
    pair, offset, size = piece
    one, other = readers[0].read(pair.a, offset, size), readers[1].read(pair.b, offset, size)
    if has_equal_bytes(one, other):
        return None
    return measure_distance(one, other, pair.dtype, count_elements(offset, pair.dtype))
