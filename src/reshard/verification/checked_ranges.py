"""Reads files again in batches of ranges, many at a time, and compares each range with its checksum."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from threading import Lock
from typing import NamedTuple

from xxhash import xxh3_128_hexdigest

from reshard.formats.ranges import CheckedRange
from reshard.formats.share_assignment import assign_to_shares
from reshard.paths import AnyPath, RemotePath
from reshard.storage.counting import count_progress, spread_evenly
from reshard.storage.local import PAGE, allocate_aligned
from reshard.storage.opened import OpenFile, advise_scattered_reads, open_file, read_range
from reshard.storage.page_cache import choose_reading_threads, choose_ways_to_read
from reshard.storage.resources import run_in_threads
from reshard.types import Advance, Progress, Share
from reshard.verification.chunks import sample_evenly
from reshard.verification.manifest_files import ManifestFile

AUDIT_READ_SIZE = 2 << 20
"""In bytes: adjacent ranges are read together up to this size; a larger range is read by itself."""

STORE_READ_SIZE = 8 << 20
"""The same where files lie in a store: each read is a request, whose answer takes a while to begin."""


class RangeBatch(NamedTuple):
    """Adjacent ranges of a file that are read at once."""

    entry: ManifestFile
    ranges: tuple[CheckedRange, ...]


ChangedRanges = Mapping[str, Sequence[CheckedRange]]
"""By the name of a file: the ranges with another checksum, by offset."""


def compare_files(
    folder: AnyPath,
    entries: Sequence[ManifestFile],
    progress: Progress | None = None,
    sample: Fraction | None = None,
    share: Share | None = None,
) -> tuple[ChangedRanges, int]:
    """Compares files that have their size with their checksums. Returns, by file name, the ranges that differ; and the
    number of bytes that were compared, which a `sample` makes fewer, and a `share` of the whole work.
    """
    most = STORE_READ_SIZE if isinstance(folder, RemotePath) else AUDIT_READ_SIZE
    batches = [batch for entry in entries for batch in split_into_batches(entry, sample, most)]
    size, compared = sum(entry.size for entry in entries), measure_batches(batches)
    if share:
        own = assign_to_shares([measure_batches([batch]) for batch in batches], share.shares)[share.number]
        batches = [batches[number] for number in own]
        size, compared = size * measure_batches(batches) // max(compared, 1), measure_batches(batches)
    with count_progress(progress, size) as advance:
        told = spread_evenly(advance, compared, size)  # bytes that a sample leaves out count as done
        return find_changed_ranges(folder, entries, batches, told, is_sampled=sample is not None), compared


def measure_batches(batches: Iterable[RangeBatch]) -> int:
    """The bytes of all ranges."""
    return sum(checked.size for batch in batches for checked in batch.ranges)


def split_into_batches(entry: ManifestFile, sample: Fraction | None, most: int) -> Iterator[RangeBatch]:
    """All ranges of a file, or those of a sample, in batches of at most `most` bytes."""
    numbers = range(len(entry.ranges))
    chosen = numbers if sample is None else sorted({0, numbers[-1], *sample_evenly(entry.name, len(numbers), sample)})
    batch: list[CheckedRange] = []
    for checked in (entry.ranges[number] for number in chosen):
        if batch and (checked.stop - batch[0].offset > most or checked.offset != batch[-1].stop):
            yield RangeBatch(entry, tuple(batch))
            batch = []
        batch.append(checked)
    yield RangeBatch(entry, tuple(batch))


def find_changed_ranges(
    target: AnyPath,
    entries: Sequence[ManifestFile],
    batches: Sequence[RangeBatch],
    advance: Advance,
    *,
    is_sampled: bool,
) -> dict[str, list[CheckedRange]]:
    """By file name: the ranges whose bytes have another checksum, by offset. Reads with several threads."""
    wrong: dict[str, list[CheckedRange]] = {entry.name: [] for entry in entries}
    if not batches:
        return wrong
    ways = choose_ways_to_read(target / entries[0].name, measure_batches(batches))
    largest = max(batch.ranges[-1].stop - batch.ranges[0].offset for batch in batches)
    lock = Lock()
    with ExitStack() as stack:
        files = {entry.name: open_file(stack, target / entry.name, ways) for entry in entries}
        if is_sampled:
            advise_scattered_reads(files.values())

        def work(buffer: memoryview, batch: RangeBatch) -> None:
            found = check_batch(batch, files[batch.entry.name], buffer)
            with lock:
                wrong[batch.entry.name].extend(found)
            advance(batch.ranges[-1].stop - batch.ranges[0].offset)

        def make_worker() -> Callable[[RangeBatch], None]:
            return partial(work, allocate_aligned(largest + 2 * PAGE))

        run_in_threads(batches, make_worker, choose_reading_threads(ways, largest + 2 * PAGE))
    return {name: sorted(ranges) for name, ranges in wrong.items()}


def check_batch(batch: RangeBatch, file: OpenFile, buffer: memoryview) -> list[CheckedRange]:
    """The ranges of a batch whose bytes have another checksum."""
    start = batch.ranges[0].offset
    data = read_range(file, start, batch.ranges[-1].stop - start, buffer)
    return [
        checked
        for checked in batch.ranges
        if xxh3_128_hexdigest(data[checked.offset - start : checked.stop - start]) != checked.digest
    ]
