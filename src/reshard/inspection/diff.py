"""Compares two checkpoints of any layouts tensor by tensor, and measures how far the values differ.

Tensors are compared by name: a tensor with another name on the other side is missing there. Where a prefix is all that
the names of one side differ in, they are changed. Configs, metadata and
tokenizers are not compared. Memory is the buffers of a few threads, whatever the size of the tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.casts.kernels import choose_recode
from reshard.casts.streaming import compute_cast
from reshard.errors import refuse
from reshard.execution.joins import count_join_levels
from reshard.execution.reader import MEMORY_TO_COMPUTE, OpenFiles, WorkerBuffers, make_cast_inputs
from reshard.execution.windows import WINDOW_SIZE
from reshard.inspection.diff_groups import group_differences, name_module
from reshard.inspection.diff_report import DiffReport, ValueDifference
from reshard.inspection.tensor_pairs import (
    BLOCK_SCALES,
    DiffChoice,
    DiffSide,
    Pairing,
    TensorPair,
    find_left_aside,
    get_result,
    pair_up,
    read_diff_side,
    rename_to_pair,
    unstack_to_pair,
)
from reshard.inspection.value_distance import RangeDistance, count_elements, measure_range, merge_ranges
from reshard.inspection.value_sums import ValueSums, compute_overall_rank, measure_overall
from reshard.numbered_names import name_layer
from reshard.paths import AnyPath
from reshard.storage.counting import WorkCounter
from reshard.storage.local import CACHED, has_equal_bytes
from reshard.storage.page_cache import choose_reading_threads, choose_ways_to_read
from reshard.storage.resources import run_in_threads
from reshard.storage.unchanged import open_unchanged
from reshard.text import format_count
from reshard.types import FIRST, Advance, Cast, Note, Progress, Tensor

DiffBytes = NDArray[np.uint8]

COMPARE_ALL = DiffChoice()


class PairedSides(NamedTuple):
    """Two checkpoints whose tensors are paired: all but the comparison of their bytes."""

    sides: tuple[DiffSide, DiffSide]
    pairing: Pairing
    notes: tuple[Note, ...]

    @property
    def size(self) -> int:
        """The bytes that are compared, of one side."""
        return sum(get_result(pair.a).size for pair in self.pairing.pairs)


ComparePairs = Callable[[PairedSides, Progress | None], Mapping[str, RangeDistance]]
"""Compares the paired tensors and returns the measures of each, by name. Raises Refused."""


def diff_checkpoints(
    a: AnyPath, b: AnyPath, choice: DiffChoice = COMPARE_ALL, progress: Progress | None = None
) -> DiffReport:
    """Compares two checkpoints, tensor by tensor and element by element.

    Raises Refused if one cannot be read or changes meanwhile, or if the replicas in its ranks differ.
    """
    return diff_paired(a, b, choice, progress, compare_pairs)


def diff_paired(
    a: AnyPath, b: AnyPath, choice: DiffChoice, progress: Progress | None, compare: ComparePairs
) -> DiffReport:
    """Compares two checkpoints; the bytes with `compare`. Raises Refused."""
    paired = pair_sides(a, b, choice)
    sides, pairing = paired.sides, paired.pairing
    compared = compare(paired, progress)
    found = {pair.name: compared[pair.name] for pair in pairing.pairs}
    values = list_value_differences(pairing.pairs, found)
    unpaired = [*(kind.name for kind in pairing.kinds), *pairing.only_a, *pairing.only_b]
    return DiffReport(
        str(a),
        str(b),
        (sides[0].recipe, sides[1].recipe),
        len(pairing.pairs) - len(values),
        paired.size,
        pairing.dequantized,
        pairing.rounded,
        values,
        pairing.kinds,
        pairing.only_a,
        pairing.only_b,
        group_differences(name_layer, found, unpaired),
        group_differences(name_module, found, unpaired),
        find_left_aside(sides, choice.only),
        tuple(name for name, measures in found.items() if not measures.apart),
        (*paired.notes, *note_scaled(pairing.scaled), *note_sides(sides)),
    )


def pair_sides(a: AnyPath, b: AnyPath, choice: DiffChoice) -> PairedSides:
    """Reads the headers of both sides, and pairs their tensors. Raises Refused."""
    one, other = read_diff_side(a, choice), read_diff_side(b, choice)
    if choice.replicas == FIRST and not any(side.recipe or side.checkpoint.boxes is not None for side in (one, other)):
        expected = "rank files or a distributed checkpoint on a side"
        raise refuse("wrong-option", "--replicas", "first", expected, "leave it out")
    if choice.config and not (one.checkpoint.beside or other.checkpoint.beside):
        given = f"{choice.config}, and no side that lacks a config"
        raise refuse("wrong-option", "--config", given, "a side without config.json beside its tensors", "leave it out")
    sides, notes = rename_to_pair(*unstack_to_pair(one, other))
    return PairedSides(sides, pair_up(*sides, choice), notes)


def note_scaled(count: int) -> Iterator[Note]:
    """Notes that weights are reported as of other dtypes whose numbers could be compared."""
    if count:
        verb, other = ("has", "its") if count == 1 else ("have", "their")
        found = f"{format_count(count, 'tensors')} {verb} block scales on a side, and another dtype on the other"
        yield Note(BLOCK_SCALES, f"{found}: --dequantize compares {other} numbers")


def note_sides(sides: Iterable[DiffSide]) -> Iterator[Note]:
    """The notes of both sides, each with the name of its side."""
    for name, side in zip("AB", sides, strict=True):
        yield from (Note(note.kind, f"{name}: {note.text}") for note in side.checkpoint.notes)


def list_value_differences(
    pairs: Iterable[TensorPair], found: Mapping[str, RangeDistance]
) -> tuple[ValueDifference, ...]:
    """Lists the tensors with other values, the most different first."""
    values = []
    for pair in pairs:
        apart, sums = found[pair.name]
        if apart:
            elements = count_elements(get_result(pair.a).size, pair.dtype)
            values.append(ValueDifference(pair.name, pair.dtype, elements, apart, measure_overall(sums), pair.is_coded))
    return tuple(sorted(values, key=make_difference_key, reverse=True))


def make_difference_key(difference: ValueDifference) -> tuple[bool, float, float]:
    """The sort key of a difference: larger is more different."""
    apart = difference.apart
    return apart.unusual.is_any, compute_overall_rank(difference.overall), apart.different / difference.elements


class PairRange(NamedTuple):
    """A byte range of a pair of tensors."""

    pair: TensorPair
    offset: int
    size: int
    is_equal: bool = False
    """Whether both sides are known to be equal there: then only side A is read, to measure the values of both."""


class Comparer:
    """Compares byte ranges of tensors, in several threads, and collects what is found of each tensor."""

    def __init__(self, files: Sequence[OpenFiles], pairs: Sequence[TensorPair]) -> None:
        self.found = {pair.name: RangeDistance(None, ValueSums()) for pair in pairs}
        self._files = files
        sides = ([pair.a for pair in pairs], [pair.b for pair in pairs])
        self._memory = sum(estimate_side_memory(*side) for side in zip(files, sides, strict=True))
        self._lock = Lock()
        self._equal: dict[str, list[int]] = {pair.name: [] for pair in pairs}

    def compare(self, pieces: Iterable[PairRange], advance: Advance) -> None:
        """Compares byte ranges. Equal ones are not measured, unless their tensor is known to differ elsewhere."""
        jobs = max(choose_reading_threads(side.ways, self._memory) for side in self._files)
        run_in_threads(iter(pieces), lambda: self._make_worker(advance), jobs)

    def list_unmeasured(self, pairs: Iterable[TensorPair]) -> list[PairRange]:
        """The equal byte ranges of tensors that differ elsewhere: the measures of the whole need their values too."""
        return [
            cut_range(pair, offset)._replace(is_equal=True)
            for pair in pairs
            if self.found[pair.name].apart
            for offset in self._equal[pair.name]
        ]

    def _make_worker(self, advance: Advance) -> Callable[[PairRange], None]:
        readers = [SideReader(side) for side in self._files]

        def work(piece: PairRange) -> None:
            name = piece.pair.name
            found = compare_pair_range(piece, readers, must_measure=self.found[name].apart is not None)
            with self._lock:
                if found:
                    self.found[name] = merge_ranges(self.found[name], found)
                else:
                    self._equal[name].append(piece.offset)
            advance(piece.size)

        return work


def compare_pairs(paired: PairedSides, progress: Progress | None) -> dict[str, RangeDistance]:
    """Compares all pairs; returns the measures by name. Raises Refused."""
    pairs, size = paired.pairing.pairs, paired.size
    if paired.pairing.dequantized or paired.pairing.rounded:
        choose_recode()  # here, for it may import numba, and that from one thread only
    counter = WorkCounter(progress, size)
    with ExitStack() as stack:
        comparer = Comparer([open_side(stack, side, 2 * size) for side in paired.sides], pairs)
        comparer.compare(split_pairs(pairs), counter.advance)
        if rest := comparer.list_unmeasured(pairs):
            counter.extend(sum(piece.size for piece in rest))
            comparer.compare(rest, counter.advance)
    counter.finish()
    return comparer.found


def split_pairs(pairs: Sequence[TensorPair]) -> Iterator[PairRange]:
    """Splits all pairs into byte ranges of WINDOW_SIZE, in the order of the first side on disk."""
    for pair in sort_pairs(pairs):
        for offset in range(0, get_result(pair.a).size, WINDOW_SIZE):
            yield cut_range(pair, offset)


def sort_pairs(pairs: Iterable[TensorPair]) -> list[TensorPair]:
    """Sorts pairs in the order of the first side on disk."""
    return sorted(pairs, key=lambda pair: get_first_position(pair.a))


def cut_range(pair: TensorPair, offset: int) -> PairRange:
    """The byte range of a window from `offset` on."""
    return PairRange(pair, offset, min(WINDOW_SIZE, get_result(pair.a).size - offset))


def get_first_position(operand: Tensor | Cast) -> tuple[int, int]:
    tensor = operand.weight if isinstance(operand, Cast) else operand
    return tensor.file, tensor.offset


def open_side(stack: ExitStack, side: DiffSide, size: int) -> OpenFiles:
    """Opens the files of a side for a job that reads `size` bytes."""
    folder, files = side.checkpoint.folder, side.checkpoint.files
    paths = [folder / file.name for file in files]
    ways = choose_ways_to_read(paths[0], size) if paths else CACHED
    readable = stack.enter_context(open_unchanged(folder, files, ways, is_source=False))
    joins = side.checkpoint.joins
    return OpenFiles(readable, (), ways, joins, allow_inexact=True, levels=count_join_levels(joins, len(files)))


def estimate_side_memory(files: OpenFiles, operands: Iterable[Tensor | Cast]) -> int:
    """The bytes of memory that a thread uses to read a side."""
    computes = bool(files.made) or any(isinstance(operand, Cast) for operand in operands)
    return (1 + files.levels) * WINDOW_SIZE + (MEMORY_TO_COMPUTE if computes else 0)


class SideReader:
    """Reads tensors and casts of a side; one for each thread."""

    def __init__(self, files: OpenFiles) -> None:
        buffers = WorkerBuffers(makes=True, levels=files.levels)
        self._result = buffers.result
        self._inputs = make_cast_inputs(files, buffers)

    def read(self, operand: Tensor | Cast, offset: int, size: int) -> DiffBytes:
        """Reads `size` bytes of a tensor or of the result of a cast; the next call overwrites them."""
        if isinstance(operand, Tensor):
            return np.frombuffer(self._inputs.weight(operand, offset, size), np.uint8)
        compute_cast(operand, offset, self._result[:size], self._inputs)
        return np.frombuffer(self._result[:size], np.uint8)


def compare_pair_range(piece: PairRange, readers: Sequence[SideReader], *, must_measure: bool) -> RangeDistance | None:
    """Measures how far the two sides of a byte range differ; None if they are equal and need not be measured."""
    pair, offset, size, is_equal = piece
    one = readers[0].read(pair.a, offset, size)
    other = one if is_equal else readers[1].read(pair.b, offset, size)
    if not must_measure and has_equal_bytes(one, other):
        return None
    return measure_range(one, other, pair.dtype, count_elements(offset, pair.dtype))
