"""The checksums of a rank file in the manifest: byte ranges, back to back from offset 0, as `SIZE HASH SIZE HASH`."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from reshard.formats.json_input import MAX_HEADER_SIZE
from reshard.formats.safetensors import LENGTH_SIZE

LARGEST_RANGE = MAX_HEADER_SIZE + LENGTH_SIZE
"""In bytes: each range is read whole. The first is the header; the others are smaller by far."""

SIZE, DIGEST = re.compile("[0-9]{1,9}"), re.compile("[0-9a-f]{32}")


class CheckedRange(NamedTuple):
    """A byte range of a rank file, and its checksum."""

    offset: int
    """In bytes from the start of the file."""
    size: int
    """In bytes."""
    digest: str
    """XXH3-128 of the bytes as they were written, in hexadecimal."""

    @property
    def stop(self) -> int:
        """The offset behind the last byte."""
        return self.offset + self.size


def parse_ranges(text: str) -> tuple[CheckedRange, ...]:
    """Parses the ranges of a file, at least one. Raises ValueError if the text is not as reshard writes it."""
    words = text.split(" ")
    ranges, offset = [], 0
    for size, digest in zip(words[::2], words[1::2], strict=True):
        if not (SIZE.fullmatch(size) and int(size) <= LARGEST_RANGE and DIGEST.fullmatch(digest)):
            raise ValueError(f"{size} {digest} is no size of at most {LARGEST_RANGE} and checksum")
        ranges.append(CheckedRange(offset, int(size), digest))
        offset += int(size)
    return tuple(ranges)


def pick_ranges(text: str) -> Iterator[CheckedRange]:
    """Picks the first range, the one in the middle and the last, of a text that `parse_ranges` has accepted before: a
    model of 671B parameters has 300,000 ranges.
    """
    words = text.split(" ")
    sizes = list(map(int, words[::2]))
    for place in sorted({0, len(sizes) // 2, len(sizes) - 1}):
        yield CheckedRange(sum(sizes[:place]), sizes[place], words[2 * place + 1])
