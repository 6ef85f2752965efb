"""What is refused, and how it is said. Imports nothing of ours."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

SHOWN_PER_KIND = 10

MOST_PROBLEMS = 100_000
"""A few megabytes of header can claim a billion tensors that are not there: beyond this no more are looked for."""

LONGEST = 2_000
"""In characters, of one field of a problem as it is shown to a person: a name may have millions."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: what is at fault by name, what was found there, what was expected, and the way out."""

    kind: str
    """A stable word for machines and tests, such as `missing-file`."""
    subject: str
    """The thing at fault: a file, a tensor, a line of a recipe, an option."""
    found: str
    expected: str
    remedy: str = ""


class Refused(Exception):
    """The job is refused. Holds every problem that was found, not only the first, but at most MOST_PROBLEMS."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(islice(problems, MOST_PROBLEMS))
        super().__init__(describe(self.problems))


def refuse(kind: str, subject: str, found: str, expected: str, remedy: str = "") -> Refused:
    """A refusal for a single problem, to be raised by the caller."""
    return Refused([Problem(kind, subject, found, expected, remedy)])


def require_none(problems: Iterable[Problem]) -> None:
    """Raises Refused if there is any problem."""
    if found := tuple(islice(problems, MOST_PROBLEMS)):
        raise Refused(found)


def describe(problems: Iterable[Problem]) -> str:
    """All problems as text for a person, at most SHOWN_PER_KIND of a kind in full and the rest counted."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.kind, []).append(problem)
    lines = [line for group in groups.values() for line in describe_group(group)]
    if sum(map(len, groups.values())) >= MOST_PROBLEMS:
        lines.append(f"only the first {MOST_PROBLEMS:,} problems were looked for")
    return "\n".join(lines)


def describe_group(group: list[Problem]) -> Iterable[str]:
    for problem in group[:SHOWN_PER_KIND]:
        yield f"{shown(problem.subject)}: {problem.kind.replace('-', ' ')}"
        yield f"  found:    {shown(problem.found)}"
        yield f"  expected: {shown(problem.expected)}"
        if problem.remedy:
            yield f"  way out:  {shown(problem.remedy)}"
    if len(group) > SHOWN_PER_KIND:
        more = len(group) - SHOWN_PER_KIND
        yield f"... and {more:,} more of this kind ({group[0].kind}); --json lists them all"


def printable(text: str) -> str:
    """The text with every control, format, private, unassigned and surrogate character escaped, and every odd space.

    Tensor and file names come from strangers: raw, they could move the cursor, recolour the terminal or hide text.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def shown(text: str) -> str:
    """The text, printable and of a bearable length."""
    return printable(text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)")


def listed(names: Iterable[str], most: int = 6) -> str:
    """`a, b, c and 12 more`: the first few names of a list, so that a message keeps its length."""
    shown = list(names)
    text = ", ".join(shown[:most])
    return f"{text} and {len(shown) - most:,} more" if len(shown) > most else text


def numbers_text(numbers: Iterable[int]) -> str:
    """`0-3, 7, 9-10`: a set of numbers, as short as it goes."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return listed((str(first) if first == last else f"{first}-{last}" for first, last in runs), 12) or "none"


UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def counted(count: int, things: str) -> str:
    """`2 files`, `1 file`: the number of things that are named in the plural with an `s`."""
    return f"{count:,} {things.removesuffix('s') if count == 1 else things}"


def size_text(size: int) -> str:
    """`40.18 GiB`, or `12 bytes`."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return counted(size, "bytes") if unit == 0 else f"{value:.2f} {UNITS[unit]}"
