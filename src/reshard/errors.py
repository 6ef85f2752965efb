"""Problem and Refused: every refusal of this package, and its wording for a person."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from inspect import signature
from itertools import islice, product
from math import ceil
from typing import ParamSpec, TypeVar

from reshard.numbered_names import cover_numbers, fill_ranges, split_name
from reshard.text import LONGEST_SHOWN, escape_and_clip, hide_secrets

MOST_ROWS, COLUMNS = 14, 100
"""A message fits a screen: so many rows of so many columns, below the line that says `refused`."""

LONGEST_DETAIL = 180
"""In characters, of a detail where there is not room for everything."""

MOST_NUMBERS = 6
"""In a name that is merged with others: hostile names have thousands."""

LONE_NUMBER = re.compile(r"(?<![A-Za-z\d])\d[\d,]*")
"""A number that is no part of a word such as F16."""

MOST_EXPLAINED = 10
"""Of so many problems of a kind the cause is looked for where that takes time."""

MOST_PROBLEMS = 100_000
"""The search for problems stops here: a few megabytes of header can claim a billion tensors that do not exist."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: the name of the thing at fault, what was found, what was expected, and a hint how to go on. Nothing
    secret in an address is kept.
    """

    kind: str
    """A stable word for machines and tests, such as `missing-file`."""
    subject: str
    """The thing at fault: a file, a tensor, a line of a recipe, an option."""
    found: str
    expected: str
    remedy: str = ""
    """The hint; empty if there is none."""

    def __post_init__(self) -> None:
        for name in ("subject", "found", "expected", "remedy"):
            object.__setattr__(self, name, hide_secrets(getattr(self, name)))


class Refused(Exception):
    """The job is refused. `problems` has every problem that was found, not only the first, up to MOST_PROBLEMS."""

    def __init__(self, problems: Iterable[Problem], everything: str = "--json") -> None:
        self.problems = tuple(islice(problems, MOST_PROBLEMS))
        super().__init__(self.problems, everything)

    def __str__(self) -> str:
        return describe_problems(*self.args)

    def __repr__(self) -> str:
        return f"Refused({self.problems[:1]!r}, and {len(self.problems) - 1:,} more)"

    def reworded(self, rename: Callable[[str], str], everything: str = "--json") -> "Refused":
        """The same refusal with other names for options. Names of files and tensors stay as they are."""
        return Refused((reword_problem(problem, rename) for problem in self.problems), everything)


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


def describe_problems(problems: Sequence[Problem], everything: str = "--json") -> str:
    """The text of problems for a person: what to do before the details, and all of it on one screen.

    If there is too much, details are shortened, and each kind shows about as many groups as the others. `everything`
    says where to find what is left out.
    """
    kinds = group_problems(problems)
    names = sum(len(group.subjects) for groups in kinds.values() for group in groups)
    lines = describe_kinds(kinds, describe_details, LONGEST_SHOWN) if names < MOST_ROWS else []
    if not lines or count_rows(lines) > MOST_ROWS:
        lines = describe_some(kinds, everything)
    if len(problems) >= MOST_PROBLEMS:
        lines.append(f"only the first {MOST_PROBLEMS:,} problems were looked for")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class ProblemGroup:
    """Problems of one kind that differ in nothing but the thing at fault."""

    shared: Problem
    """The first of them."""
    subjects: list[tuple[str, int]]
    """The things at fault, with ranges in the place of numbers, and the number of problems that each stands for."""


ProblemKinds = Mapping[str, Sequence[ProblemGroup]]
"""The groups of each kind."""


def group_problems(problems: Iterable[Problem]) -> ProblemKinds:
    """Groups problems by kind. Kinds, hints of a kind and groups of a hint are in the order of their first problem."""
    kinds: dict[str, dict[str, dict[tuple[str, str], ProblemGroup]]] = {}
    for subject, count, shared in merge_subjects(problems):
        groups = kinds.setdefault(shared.kind, {}).setdefault(shared.remedy, {})
        group = groups.setdefault((shared.found, shared.expected), ProblemGroup(shared, []))
        group.subjects.append((subject, count))
    return {kind: [group for groups in hints.values() for group in groups.values()] for kind, hints in kinds.items()}


def merge_subjects(problems: Iterable[Problem]) -> Iterator[tuple[str, int, Problem]]:
    """Merges problems whose subjects differ only in numbered components, and whose details differ only in numbers.

    Yields the subject with ranges, the number of problems, and the first of them: where their details differ, these say
    that they are those of the first. Several problems of one thing are all counted.
    """
    mask = cache(partial(LONE_NUMBER.sub, "#"))
    merged: dict[tuple[str, ...], dict[tuple[int, ...], list[Problem]]] = {}
    for problem in problems:
        pattern, numbers = split_name(problem.subject)
        details = (problem.found, problem.expected)
        if 0 < len(numbers) <= MOST_NUMBERS:
            details = (mask(problem.found), mask(problem.expected))
        else:
            pattern, numbers = problem.subject, ()
        key = (problem.kind, problem.remedy, pattern, *details)
        merged.setdefault(key, {}).setdefault(tuple(map(int, numbers)), []).append(problem)
    for members in merged.values():
        for block in cover_numbers(members) if () not in members else [()]:
            found = [problem for numbers in product(*block) for problem in members[numbers]]
            subject = fill_ranges(found[0].subject, block) if block else found[0].subject
            yield subject, len(found), combine_details(found)


def combine_details(problems: Sequence[Problem]) -> Problem:
    """The first of some problems; where their details differ, they are called those of the first."""
    first = problems[0]
    found = first.found if all(one.found == first.found for one in problems) else f"the first: {first.found}"
    same = all(one.expected == first.expected for one in problems)
    return replace(first, found=found, expected=first.expected if same else f"the first: {first.expected}")


Describe = Callable[[ProblemGroup], Iterator[str]]
"""Describes the details of a group, in lines."""


def describe_kinds(kinds: ProblemKinds, describe: Describe, longest: int = LONGEST_DETAIL) -> list[str]:
    """Describes groups: the fault, the hint where it is another than before, and the details."""
    lines = []
    for kind, groups in kinds.items():
        hint = ""
        for group in groups:
            subject, count = group.subjects[0]
            lines.append(f"{escape_and_clip(subject, longest)}: {kind.replace('-', ' ')}{describe_count(count)}")
            if group.shared.remedy != hint:
                hint = group.shared.remedy
                lines.append(f"  hint:     {escape_and_clip(hint)}")
            lines += describe(group)
    return lines


def describe_details(group: ProblemGroup) -> Iterator[str]:
    """Describes what was found and expected, and the other things with the same fault, one a line."""
    yield f"  found:    {escape_and_clip(group.shared.found)}"
    yield f"  expected: {escape_and_clip(group.shared.expected)}"
    for place, (subject, count) in enumerate(group.subjects[1:]):
        yield f"  {'' if place else 'also:':9} {escape_and_clip(subject)}{describe_count(count)}"


def describe_briefly(group: ProblemGroup) -> Iterator[str]:
    """Describes the same in few lines: found and expected together if they are short, long texts cut."""
    found, expected = (escape_and_clip(text, LONGEST_DETAIL) for text in (group.shared.found, group.shared.expected))
    together = f"  found:    {found}; expected: {expected}"
    yield from [together] if len(together) <= COLUMNS else [f"  found:    {found}", f"  expected: {expected}"]
    yield from describe_alike(group)


def describe_alike(group: ProblemGroup) -> Iterator[str]:
    """Describes the other things with the same fault on one line: those that have room, and how many more there are."""
    others = group.subjects[1:]
    names: list[str] = []
    for subject, count in others[:MOST_ROWS]:
        name = f"{escape_and_clip(subject, LONGEST_DETAIL)}{describe_count(count)}"
        if names and len(", ".join([*names, name])) > LONGEST_DETAIL:
            break
        names.append(name)
    if others:
        more = len(others) - len(names)
        yield f"  also:     {', '.join(names)}{f' and {more:,} more' if more else ''}"


def describe_count(count: int) -> str:
    """Describes the number of problems that one name with ranges stands for; nothing for one."""
    return f" ({count:,} times)" if count > 1 else ""


def describe_some(kinds: ProblemKinds, everything: str) -> list[str]:
    """Describes as many groups as fit a screen, and counts the others. Where not even one of each kind fits, faults and
    hints stand without details.
    """
    for describe in (describe_briefly, describe_alike):
        shown = choose_groups(kinds, describe)
        lines = describe_kinds(shown, describe)
        if len(shown) == len(kinds):
            break
    rest = {kind: count_problems(groups) - count_problems(shown.get(kind, ())) for kind, groups in kinds.items()}
    counts = ", ".join(f"{count:,} {kind}" for kind, count in rest.items() if count)
    # Where every problem is there, only details were shortened.
    lines.append(f"... and more: {counts}; all of them: {everything}" if counts else f"... in full: {everything}")
    return lines


def choose_groups(kinds: ProblemKinds, describe: Describe) -> ProblemKinds:
    """Chooses the groups that fit a screen with a line below them: in turns one of each kind."""
    shown: dict[str, list[ProblemGroup]] = {}
    for turn in range(MOST_ROWS):
        for kind, groups in kinds.items():
            if len(groups) <= turn or len(shown.get(kind, ())) < turn:
                continue
            more = {**shown, kind: [*shown.get(kind, ()), groups[turn]]}
            if not shown or count_rows(describe_kinds(more, describe)) < MOST_ROWS:
                shown = more
    return shown


def count_problems(groups: Iterable[ProblemGroup]) -> int:
    """The number of problems in some groups."""
    return sum(count for group in groups for _, count in group.subjects)


def count_rows(lines: Iterable[str]) -> int:
    """The number of rows that lines take on a terminal."""
    return sum(ceil(max(len(line), 1) / COLUMNS) for line in lines)


Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

OPTION = re.compile(
    r"\b(?:reshard (?:convert|plan|verify|inspect|diff|repair|recipes)|(?:hf|modelscope) download) [^;]*"
    r"|(?<![\w-])--([a-z][a-z-]*)"
    r"(?: (hf|dcp|bf16|fp8(?:-ue8m0)?|nvfp4|first|keep|FILE|N|(?<=--for )[a-z][a-z0-9-]*)\b)?"
)
"""A command in a message, which stays as it is; or an option, with its value if that stands behind it."""

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
            raise refused.reworded(rename, "its `problems`") from None

    return refusing


def name_argument(option: re.Match[str], parameters: frozenset[str]) -> str:
    """The keyword argument of an option: `--to hf` -> `to="hf"`, `--pad` -> `pad=True`, `--max-memory` -> `max_memory`.

    An argument for one thing has the singular of the option's name: `rank` of `reshard.load`.
    """
    if option[1] is None:
        return option[0]
    name, value = option[1].replace("-", "_"), option[2]
    name = "for_engine" if name == "for" else name  # `for` is a word of the language
    if name == "mtp":
        return "keep_mtp=True" if value else "keep_mtp"
    if name not in parameters and name.removesuffix("s") in parameters:
        name = name.removesuffix("s")
    if value:
        return f"{name}={value}" if value in ("FILE", "N") else f'{name}="{value}"'
    return f"{name}=True" if name in FLAGS else name
