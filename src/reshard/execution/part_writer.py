"""Puts the parts of target files together in memory, with the checksum of each of their groups."""

from typing import NamedTuple

from xxhash import xxh3_128_digest

from reshard.execution.journal import RECORD
from reshard.execution.parts import JOINED_READ, Part, PartRead
from reshard.execution.reader import (
    MEMORY_PER_THREAD,
    OpenFiles,
    WorkerBuffers,
    compute_range,
    gather_piece,
)
from reshard.execution.times import ARRANGING, READING, make_thread_clock
from reshard.execution.windows import WINDOW_SIZE, Piece
from reshard.storage.local import PAGE, allocate_aligned
from reshard.storage.opened import read_range, read_straight

ALIGNMENT = 8
"""In bytes: casts write whole elements."""


class FilledPart(NamedTuple):
    """A part that is ready to be put."""

    data: memoryview
    """Valid until the next part is filled by the same worker."""
    records: bytes
    """Of its groups, as a journal has them."""
    inexact: int
    """How many values of it a cast has rounded."""


class PartBuffers:
    """The memory of one worker: for a part, for what is read to be copied, and for joins and casts."""

    def __init__(self, largest: int, *, makes: bool, levels: int) -> None:
        self.part = allocate_aligned(largest)
        self.read = allocate_aligned(JOINED_READ + 2 * PAGE)
        self.compute = WorkerBuffers(makes=True, levels=levels) if makes else None
        self.clock = self.compute.clock if self.compute else make_thread_clock()


def measure_part_buffers(largest: int, *, computing: int, levels: int) -> int:
    """The memory of the buffers of one worker, in bytes, where no part is larger than `largest`, and joins and casts
    take `computing`.
    """
    more = MEMORY_PER_THREAD + computing + levels * WINDOW_SIZE
    return largest + JOINED_READ + 2 * PAGE + (more if computing else 0)


def fill_part(part: Part, header: bytes, files: OpenFiles, buffers: PartBuffers) -> FilledPart:
    """Reads and computes all bytes of a part. Raises Refused."""
    data, inexact = buffers.part[: part.size], 0
    buffers.clock.begin(ARRANGING)
    if not part.offset:
        data[: len(header)] = header
    for read in part.reads:
        inexact += fill_read(read, data, files, buffers)
    buffers.clock.begin(ARRANGING)
    records = bytearray()
    for offset, size in part.groups:
        begin = offset - part.offset
        records += RECORD.pack(offset, part.file, size, xxh3_128_digest(data[begin : begin + size]))
    return FilledPart(data, bytes(records), inexact)


def fill_read(read: PartRead, data: memoryview, files: OpenFiles, buffers: PartBuffers) -> int:
    """Reads or computes a byte range, and brings its bytes to their places in a part. Returns how many values are not
    exact.
    """
    inexact, place = 0, read.pieces[0].place
    out = data[place : place + read.size]  # if it is straight
    if read.source_file < len(files.sources):
        source = files.sources[read.source_file]
        buffers.clock.begin(READING)
        if read.is_straight:
            read_straight(source, read.offset, out, buffers.read)
            return 0
        found = read_range(source, read.offset, read.size, buffers.read)
    elif buffers.compute is None:
        raise TypeError("a plan that computes nothing has a computed tensor")
    else:
        is_straight = read.is_straight and place % ALIGNMENT == 0
        found = out if is_straight else buffers.read[: read.size]
        inexact = compute_range(read.source_file, read.offset, found, files, buffers.compute)
        if is_straight:
            return inexact
    buffers.clock.begin(ARRANGING)
    for piece in read.pieces:
        gather_piece(Piece(piece.start - read.offset, piece.pitch, piece.run, piece.rows), found, data, piece.place)
    return inexact
