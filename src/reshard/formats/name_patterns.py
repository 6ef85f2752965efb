"""Finds the names that shell patterns fit; a pattern that fits none is refused, with one that does."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import translate
from itertools import takewhile
from shlex import quote

from reshard.errors import Problem, require_none
from reshard.numbered_names import split_name
from reshard.text import format_count, format_list

WILD = "*?["
"""Characters that stand for others in a pattern."""


def match_any(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that one of the shell patterns fits, in their order."""
    fits = [re.compile(translate(pattern)).match for pattern in patterns]
    return [name for name in names if any(fit(name) for fit in fits)]


def require_fitting(kind: str, option: str, patterns: Iterable[str], names: Iterable[str], found: str) -> None:
    """Raises Refused of a kind with each pattern of an option that fits no name; `found` says where there is none."""
    every = list(dict.fromkeys(names))
    require_none(
        Problem(kind, f"{option} {pattern}", found, *suggest_names(option, pattern, every))
        for pattern in patterns
        if not match_any(every, [pattern])
    )


def suggest_names(option: str, pattern: str, every: Sequence[str]) -> tuple[str, str]:
    """What was expected in the place of a pattern that fits no name, and what to do."""
    wider, nearer = f"*{pattern.strip('*')}*", correct_beginning(pattern, every)
    for other, expected in ((wider, "a pattern of whole names"), (nearer, "a pattern that fits some")):
        if count := len(match_any(every, [other])):
            return expected, f"{option} {quote(other)} fits {format_count(count, 'names')}"
    firsts: dict[str, str] = {}  # one of each kind of name: they are few
    for name in every:
        firsts.setdefault(split_name(name)[0], name)
    wanted = split_name(pattern)[0]
    near = [firsts[kind] for kind in get_close_matches(wanted, firsts, 3, 0.4)] or list(firsts.values())[:3]
    return f"a pattern that fits some, such as {format_list(near)}", "inspect --tensors lists all names"


def correct_beginning(pattern: str, names: Iterable[str]) -> str:
    """The pattern with its components before the first wildcard as the nearest name has them: `model.layers.*` for
    `model.layer.*`. As it is, if none is near.
    """
    components = pattern.split(".")
    fixed = [*takewhile(lambda component: not set(component) & set(WILD), components)]
    beginnings = dict.fromkeys(".".join(name.split(".")[: len(fixed)]) for name in names)
    near = get_close_matches(".".join(fixed), beginnings, 1)
    return ".".join([*near, *components[len(fixed) :]]) if near else pattern
