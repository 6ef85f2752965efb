"""The file names of slices in safetensors, as torch's distributed checkpoints have them, and the numbers in these."""

import re
from collections.abc import Iterator, Sequence
from itertools import islice

from reshard.errors import Problem
from reshard.text import format_count, format_list, format_numbers
from reshard.types import Note

SLICE_NAME = re.compile(r"shard-(\d{1,9})-model-(\d{1,9})-of-(\d{1,9})\.safetensors")
"""The number of the process that wrote the file, from 1 on; the number of the file, and how many there are."""

MOST_FILES = 1_000_000
"""Of one process. A hostile name may claim more."""

COPY_FILE_AGAIN = "copy the file again from where the checkpoint was saved"


def name_slices(ranks: int) -> list[str]:
    """Names the files of some ranks as torch does: it counts processes from 1 on, and each has one file."""
    return [f"shard-{rank + 1:05}-model-00001-of-00001.safetensors" for rank in range(ranks)]


def is_sliced_folder(names: Sequence[str]) -> bool:
    """Whether all safetensors files of a folder are slices by their names. Whole tensors beside them come first."""
    return bool(names) and all(map(SLICE_NAME.fullmatch, names))


def parse_shard_numbers(names: Sequence[str]) -> list[tuple[int, int, int]]:
    """Of each name: the number of its process, the number of the file, and how many files there are."""
    found = map(SLICE_NAME.fullmatch, names)
    return [(int(match[1]), int(match[2]), int(match[3])) for match in found if match]


def check_shard_numbers(names: Sequence[str]) -> Iterator[Problem]:
    """Yields the files that the numbers in the names call for. How many processes there were, no name tells."""
    numbers = parse_shard_numbers(names)
    totals = sorted({total for _, _, total in numbers})
    if len(totals) > 1:
        found = f"files of {format_list(map(str, totals))} in one folder"
        yield Problem("mixed-files", names[-1], found, "files of one save", "move those of the other save elsewhere")
        return
    (total,) = totals
    shards, files = {shard for shard, _, _ in numbers}, {file for _, file, _ in numbers}
    remedy = f"{COPY_FILE_AGAIN}; or, if that process wrote nothing, number the shards without a gap"
    for shard in find_absent(shards, max(shards)):
        found = f"no such file; there are shards {format_numbers(shards)}"
        yield Problem("missing-file", f"shard-{shard:05}-model-*-of-{total:05}.safetensors", found,
                      f"shards 1-{max(shards)}, by the names", remedy)  # fmt: skip
    for file in find_absent(files, min(total, MOST_FILES)):
        found = f"no such file of any shard; there are {format_numbers(files)}"
        yield Problem("missing-file", f"shard-*-model-{file:05}-of-{total:05}.safetensors", found,
                      f"files 1-{total}, by the names", COPY_FILE_AGAIN)  # fmt: skip


def find_absent(numbers: set[int], last: int) -> list[int]:
    """The first numbers from 1 to `last` that are not there; a few more than there are."""
    most = 10 * len(numbers) + 10
    return list(islice((number for number in range(1, last + 1) if number not in numbers), most))


def note_shard_numbers(names: Sequence[str]) -> Iterator[Note]:
    """Notes what the names leave open: whether a last shard is missing, and files that some shards do not have."""
    numbers = parse_shard_numbers(names)
    shards = {shard for shard, _, _ in numbers}
    yield Note("numbering", f"{format_count(len(shards), 'shards')} are read; no file tells how many were saved")
    absent = len(shards) * numbers[0][2] - len(numbers)
    if absent > 0:
        have = {(shard, file) for shard, file, _ in numbers}
        every = ((shard, file) for shard in sorted(shards) for file in range(1, numbers[0][2] + 1))
        first = [f"shard {shard} of file {file}" for shard, file in islice((p for p in every if p not in have), 3)]
        text = f"files that are not there: {absent:,}, which is right if nothing was saved in them"
        yield Note("numbering", f"{text}: {', '.join(first)}{' ...' if absent > len(first) else ''}")
