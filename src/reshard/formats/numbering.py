"""The numbers in file names: `model-00002-of-00163` is one of 163. Finds the sets of a folder, and what they lack."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise

from reshard.errors import Problem
from reshard.formats.huggingface import INDEX, SUFFIX
from reshard.formats.json_input import DOWNLOAD_AGAIN
from reshard.text import format_list
from reshard.types import Note

COUNTED = re.compile(r"(.*?)([0-9]+)([-_. ]*of[-_. ]*([0-9]+).*)", re.IGNORECASE | re.DOTALL)
"""`model-00002-of-000163`, `model_1_of_61-fp8`: the text before the number, the number, the rest with the total."""

TRAILING = re.compile(r"(.*?)([0-9]+)()", re.DOTALL)
"""`layer_07`: a number at the end, without a total."""

MOST_NAMED = 1000
"""Up to this total every missing file is named. A hostile name may claim a billion files."""


@dataclass(frozen=True, slots=True)
class NumberedSet:
    """Files whose names differ in one number only."""

    before: str
    """The names up to the number."""
    behind: str
    """The names behind the number, without the suffix."""
    total: int | None
    """The number of files that the names claim; None for names without a total."""
    names: tuple[str, ...]
    digits: tuple[str, ...]
    """Of each name: the number as it is written."""

    @property
    def numbers(self) -> set[int]:
        """The numbers of the files that are there."""
        return set(map(int, self.digits))

    @property
    def bounds(self) -> tuple[int, int]:
        """The first and the last number that should be there: 1 to N; 0 to N-1 if there is a 0; 0 to N if both are."""
        present = self.numbers
        first = 0 if 0 in present else 1
        if self.total is None:
            return first, max(present)
        return first, self.total if first or self.total in present else self.total - 1

    @property
    def pattern(self) -> str:
        """The names, with `*` in the place of the number."""
        return f"{self.before}*{self.behind}{SUFFIX}"

    def name_file(self, number: int) -> str:
        """Names the file of a number, with zeros in front if the other names have them."""
        is_padded = any(text.startswith("0") and len(text) > 1 for text in self.digits)
        width = max(map(len, self.digits)) if is_padded else 1
        return f"{self.before}{number:0{width}}{self.behind}{SUFFIX}"


def find_numbered_sets(names: Iterable[str]) -> list[NumberedSet]:
    """Finds the numbered sets among file names. A single name without a total is no set: `qwen2` has one file."""
    groups: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for name in names:
        text = name.removesuffix(SUFFIX)
        if found := COUNTED.fullmatch(text):
            groups.setdefault((found[1], found[3], found[4]), []).append((name, found[2]))
        elif found := TRAILING.fullmatch(text):
            groups.setdefault((found[1], "", ""), []).append((name, found[2]))
    return [
        NumberedSet(before, behind, int(total) if total else None, *map(tuple, zip(*members, strict=True)))
        for (before, behind, total), members in groups.items()
        if total or len(members) > 1
    ]


def find_gaps(numbered: NumberedSet) -> list[range]:
    """Finds the numbers that a set lacks, as ranges: a total in a hostile name is never counted through.

    Names without a total are a count only if more numbers are there than lack: `step-1000` and `step-2000` are none.
    """
    first, last = numbered.bounds
    if numbered.total is None and last - first + 1 >= 2 * len(numbered.numbers):
        return []
    edges = [first - 1, *sorted(number for number in numbered.numbers if first <= number <= last), last + 1]
    return [range(low + 1, high) for low, high in pairwise(edges) if high - low > 1]


def count_most_named(numbered: NumberedSet) -> int:
    """The most missing files that are named, by the number of those that are there."""
    return 10 * len(numbered.names) + 10


def format_gaps(gaps: Sequence[range]) -> str:
    """Formats the missing numbers: `2, 5-7`."""
    return format_list(
        (str(gap.start) if gap.stop - gap.start == 1 else f"{gap.start}-{gap.stop - 1}" for gap in gaps), 12
    )


def check_numbering(names: Iterable[str], may_be_extra: frozenset[str] = frozenset()) -> Iterator[Problem]:
    """Without an index, `model-00002-of-00004.safetensors` still tells that there are four files.

    `may_be_extra` are the files that `--ignore-extra-files` would leave out: then what their set lacks is no fault.
    """
    for numbered in find_numbered_sets(names):
        gaps, (first, last) = find_gaps(numbered), numbered.bounds
        remedy = DOWNLOAD_AGAIN if numbered.total else f"{DOWNLOAD_AGAIN}; or, if the numbers are no count, rename them"
        if may_be_extra.issuperset(numbered.names):
            remedy += f"; or, if {numbered.pattern} is not part of the checkpoint: --ignore-extra-files leaves it out"
        most = None if last <= MOST_NAMED else count_most_named(numbered)
        for number in islice(chain.from_iterable(gaps), most):
            found = f"no such file; of the numbers {first}-{last} these are missing: {format_gaps(gaps)}"
            found += "; or 0, if they are counted from 0" if gaps == [range(last, last + 1)] and first else ""
            expected = f"{last - first + 1} files by their names"
            yield Problem("missing-file", numbered.name_file(number), found, expected, remedy)


def note_unnamed_numbers(names: Iterable[str]) -> Iterator[Note]:
    """Notes that an index names some files of a set only: it may be right, as it is where the MTP layers were cut."""
    for numbered in find_numbered_sets(names):
        gaps, (first, last) = find_gaps(numbered), numbered.bounds
        if gaps and numbered.total is not None:
            count = f"{len(numbered.numbers)} of the {last - first + 1} files"
            text = f"{INDEX} names {count} that {numbered.pattern} counts; not named: {format_gaps(gaps)}"
            yield Note("numbering", text)


def choose_numbered_set(names: Sequence[str]) -> NumberedSet | None:
    """Chooses the set that is the model, if no index and no `model.safetensors` tells: the only one that is called
    `model-*-of-*`, else the only one. None if there is none, or more.
    """
    found = find_numbered_sets(names)
    counted = [numbered for numbered in found if numbered.total is not None]
    named = [numbered for numbered in counted if re.fullmatch(r"model[-_.]?", numbered.before)]
    for sets in (named, counted, found):
        if sets:
            return sets[0] if len(sets) == 1 else None
    return None
