"""The records of a journal as an array: the byte ranges that are durable, with their checksums."""

import numpy as np
from numpy.typing import NDArray

RECORD_TYPE = np.dtype([("offset", "<u8"), ("file", "<u4"), ("size", "<u4"), ("digest", "V16")])
"""As RECORD of the journal has it."""

Records = NDArray[np.void]
"""Of RECORD_TYPE."""


def parse_records(data: bytes | bytearray) -> Records:
    """Parses records and sorts them by file and offset. They are a copy of the data."""
    records = np.frombuffer(data, RECORD_TYPE)
    return records[np.lexsort((records["offset"], records["file"]))]


class WrittenGroups:
    """Tells which groups are durable already. A few bytes each: a large model has 300,000 of them."""

    def __init__(self, records: Records) -> None:
        """`records` are in the order of file and offset."""
        files, starts = np.unique(records["file"], return_index=True)
        offsets = np.split(records["offset"].astype(np.int64), starts[1:])
        self._offsets = dict(zip(files.tolist(), offsets, strict=True)) if len(files) else {}

    @property
    def files(self) -> set[int]:
        """The indices of the files that have any."""
        return set(self._offsets)

    def __contains__(self, group: tuple[int, int]) -> bool:
        """Whether a group is durable, by the index of its file and its offset there."""
        offsets = self._offsets.get(group[0])
        if offsets is None:
            return False
        place = int(offsets.searchsorted(np.int64(group[1])))
        return place < len(offsets) and int(offsets[place]) == group[1]
