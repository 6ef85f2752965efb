"""What is durable already is found again, whatever was asked before, and takes little memory."""

import random
import tracemalloc

from reshard.execution.journal import RECORD
from reshard.execution.records import WrittenGroups, parse_records

GROUPS_OF_V3 = 300_000
"""About so many does DeepSeek-V3 have, for 16 ranks."""


def make_records(groups: list[tuple[int, int]]) -> bytes:
    return b"".join(RECORD.pack(offset, file, 7, bytes(16)) for file, offset in groups)


def test_each_written_group_is_known_and_no_other() -> None:
    chosen = random.Random(4)
    large = (1 << 62) + 1
    every = [(file, base + 3 * place) for file in (0, 2, 3, 900) for base in (8, large) for place in range(50)]
    for count in (0, 1, 2, 100, len(every) - 1, len(every)):
        groups = chosen.sample(every, count)
        written = WrittenGroups(parse_records(make_records(groups)))
        assert {group for group in every if group in written} == set(groups)
        assert not any((file, offset + step) in written for file, offset in groups for step in (-1, 1))
        assert (1, 8) not in written
        assert written.files == {file for file, _ in groups}


def test_those_of_a_large_model_take_little_memory() -> None:
    """A set of pairs of numbers would take 50 MB, and a list to make it of as much again."""
    records = parse_records(make_records([(place % 16, 4096 * place) for place in range(GROUPS_OF_V3)]))
    tracemalloc.start()
    written = WrittenGroups(records)
    used, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (5, 4096 * 5) in written
    assert used < 9 * GROUPS_OF_V3
    assert most < 40 * GROUPS_OF_V3
