"""Problem and Refused: every refusal of this package, and its wording for a person."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from reshard.text import shown

SHOWN_PER_KIND = 10

MOST_PROBLEMS = 100_000
"""The search for problems stops here: a few megabytes of header can claim a billion tensors that do not exist."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: the name of the thing at fault, what was found, what was expected, and a hint how to go on."""

    kind: str
    """A stable word for machines and tests, such as `missing-file`."""
    subject: str
    """The thing at fault: a file, a tensor, a line of a recipe, an option."""
    found: str
    expected: str
    remedy: str = ""
    """The hint; empty if there is none."""


class Refused(Exception):
    """The job is refused. `problems` has every problem that was found, not only the first, up to MOST_PROBLEMS."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(islice(problems, MOST_PROBLEMS))
        super().__init__(describe(self.problems))

    def __reduce__(self) -> tuple[type["Refused"], tuple[tuple[Problem, ...]]]:
        """By its problems: an exception is pickled by its message, which does not make a Refused again."""
        return Refused, (self.problems,)


def refuse(kind: str, subject: str, found: str, expected: str, remedy: str = "") -> Refused:
    """Makes a Refused of a single problem; the caller raises it."""
    return Refused([Problem(kind, subject, found, expected, remedy)])


def require_none(problems: Iterable[Problem]) -> None:
    """Raises Refused with all problems, if there is any."""
    if found := tuple(islice(problems, MOST_PROBLEMS)):
        raise Refused(found)


def describe(problems: Iterable[Problem]) -> str:
    """The text of all problems for a person: at most SHOWN_PER_KIND of each kind in full, the rest as a count."""
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
            yield f"  hint:     {shown(problem.remedy)}"
    if len(group) > SHOWN_PER_KIND:
        more = len(group) - SHOWN_PER_KIND
        yield f"... and {more:,} more of this kind ({group[0].kind}); --json lists them all"
