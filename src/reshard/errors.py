"""Problem and Refused: every refusal of this package, and its wording for a person."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from inspect import signature
from itertools import islice
from typing import Any, ParamSpec, TypeVar

from reshard.text import escape_and_clip

MOST_SHOWN_PER_KIND = 10
"""So many problems of a kind are printed, and the rest is counted: the whole message fits a screen."""

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
        super().__init__(describe_problems(self.problems))

    def __reduce__(self) -> tuple[type["Refused"], tuple[tuple[Problem, ...]], dict[str, Any]]:
        """Pickles the problems and the message: by itself, an exception keeps only the message."""
        return Refused, (self.problems,), {"args": self.args}

    def reworded(self, rename: Callable[[str], str]) -> "Refused":
        """The same refusal with other names for options. Names of files and tensors stay as they are."""
        return Refused(reword_problem(problem, rename) for problem in self.problems)


def reword_problem(problem: Problem, rename: Callable[[str], str]) -> Problem:
    """A problem with other names for options."""
    is_option = problem.subject.startswith("--")
    return replace(
        problem,
        subject=rename(problem.subject) if is_option else problem.subject,
        found=rename(problem.found) if is_option else problem.found,
        expected=rename(problem.expected),
        remedy=rename(problem.remedy),
    )


def refuse(kind: str, subject: str, found: str, expected: str, remedy: str = "") -> Refused:
    """Makes a Refused of a single problem; the caller raises it."""
    return Refused([Problem(kind, subject, found, expected, remedy)])


def require_none(problems: Iterable[Problem]) -> None:
    """Raises Refused with all problems, if there is any."""
    if found := tuple(islice(problems, MOST_PROBLEMS)):
        raise Refused(found)


def describe_problems(problems: Iterable[Problem]) -> str:
    """The text of all problems for a person: at most MOST_SHOWN_PER_KIND of each kind, the rest as a count."""
    groups = group_by_kind(problems)
    lines = [line for group in groups.values() for line in describe_problem_kind(group)]
    if sum(map(len, groups.values())) >= MOST_PROBLEMS:
        lines.append(f"only the first {MOST_PROBLEMS:,} problems were looked for")
    return "\n".join(lines)


def summarize_problems(problems: Iterable[Problem]) -> dict[str, Any]:
    """The same as JSON values: `problems`, at most MOST_SHOWN_PER_KIND of each kind, and `more`, where there are more:
    kind -> how many. A file that lacks half a model has 50,000 problems, and nobody reads 32 MB.
    """
    groups = group_by_kind(problems)
    shown = [asdict(problem) for group in groups.values() for problem in group[:MOST_SHOWN_PER_KIND]]
    counts = {kind: len(group) - MOST_SHOWN_PER_KIND for kind, group in groups.items()}
    return {"problems": shown, "more": {kind: count for kind, count in counts.items() if count > 0}}


def group_by_kind(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    """Groups problems by their kind; the kinds in the order of their first problem."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.kind, []).append(problem)
    return groups


def describe_problem_kind(group: Sequence[Problem]) -> Iterator[str]:
    """Describes problems of one kind. What several of them share, one behind the other, is written once below them."""
    shown = group[:MOST_SHOWN_PER_KIND]
    for problem, following in zip(shown, [*shown[1:], None], strict=True):
        yield f"{escape_and_clip(problem.subject)}: {problem.kind.replace('-', ' ')}"
        if following and replace(following, subject=problem.subject) == problem:
            continue
        yield f"  found:    {escape_and_clip(problem.found)}"
        yield f"  expected: {escape_and_clip(problem.expected)}"
        if problem.remedy and not (following and following.remedy == problem.remedy):
            yield f"  hint:     {escape_and_clip(problem.remedy)}"
    if len(group) > MOST_SHOWN_PER_KIND:
        more = len(group) - MOST_SHOWN_PER_KIND
        yield f"... and {more:,} more of this kind ({group[0].kind})"


Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)(?: (hf|bf16|fp8(?:-ue8m0)?|first|keep|FILE|N)\b)?")
"""An option in a message, with its value if that stands behind it."""

FLAGS = ("allow_inexact", "download", "dry_run", "ignore_extra_files", "pad", "renumber", "restart", "yes")
"""The options without a value."""


def refuse_in_python(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """The same function for callers in Python: its refusals say `rank=4` and `to="hf"`, not `--ranks` and `--to hf`."""
    rename = partial(OPTION.sub, partial(name_argument, parameters=frozenset(signature(function).parameters)))

    @wraps(function)
    def refusing(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
        try:
            return function(*args, **kwargs)
        except Refused as refused:
            raise refused.reworded(rename) from None

    return refusing


def name_argument(option: re.Match[str], parameters: frozenset[str]) -> str:
    """The keyword argument of an option: `--to hf` -> `to="hf"`, `--pad` -> `pad=True`, `--max-memory` -> `max_memory`.

    An argument for one thing has the singular of the option's name: `rank` of `reshard.load`.
    """
    name, value = option[1].replace("-", "_"), option[2]
    if name == "mtp":
        return "keep_mtp=True" if value else "keep_mtp"
    if name not in parameters and name.removesuffix("s") in parameters:
        name = name.removesuffix("s")
    if value:
        return f"{name}={value}" if value in ("FILE", "N") else f'{name}="{value}"'
    return f"{name}=True" if name in FLAGS else name
