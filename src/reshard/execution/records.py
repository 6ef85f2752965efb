"""The records of a journal as an array: the byte ranges that are durable, with their checksums."""

import numpy as np
from numpy.typing import NDArray

RECORD_TYPE = np.dtype([("offset", "<u8"), ("file", "<u4"), ("size", "<u4"), ("digest", "V16")])
"""As RECORD of the journal has it."""

Records = NDArray[np.void]
"""Of RECORD_TYPE."""


def parse_records(data: bytes) -> Records:
    """Parses records and sorts them by file and offset."""
    records = np.frombuffer(data, RECORD_TYPE)
    return records[np.lexsort((records["offset"], records["file"]))]
