"""Numbers in the names of tensors: a name as a pattern, and many names as few, with ranges in the place of numbers."""

import re
from collections.abc import Iterable, Sequence

from reshard.text import format_runs

NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,8})(?=\.|\Z)")
"""A numbered component of a name. Only the canonical spelling: `layers.01` is not layer 1, and no rule knows it."""

MOST_RUNS = 4
"""So many runs of numbers are shown in the place of one number."""


def split_name(name: str) -> tuple[str, tuple[str, ...]]:
    r"""`layers.3.experts.10.w` -> (`layers.#.experts.#.w`, (`3`, `10`)). A `#` of the name itself becomes `\#`."""
    pieces = NUMBER.split(name.replace("#", r"\#") if "#" in name else name)
    return ".#".join(pieces[::2]), tuple(pieces[1::2])


def name_layer(name: str) -> str:
    """The beginning of a name up to its first number; empty if it has none."""
    found = NUMBER.search(name)
    return name[: found.end()] if found else ""


def cover_numbers(members: Iterable[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Covers tuples of one length by blocks, each tuple by one block. A block has for each place its numbers, sorted,
    and stands for all combinations of them.
    """
    rests: dict[int, set[tuple[int, ...]]] = {}
    for first, *rest in members:
        rests.setdefault(first, set()).add(tuple(rest))
    firsts: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first, found in rests.items():
        firsts.setdefault(frozenset(found), []).append(first)
    return [
        (tuple(sorted(numbers)), *block)
        for found, numbers in firsts.items()
        for block in (cover_numbers(sorted(found)) if () not in found else [()])
    ]


def fill_ranges(name: str, block: Sequence[Iterable[int]]) -> str:
    """Fills ranges in for the numbers of a name: `layers.0.experts.0.w` -> `layers.1-3.experts.{0,2-5}.w`."""
    ranges = iter(block)
    return NUMBER.sub(lambda _: f".{format_range(next(ranges))}", name)


def format_range(numbers: Iterable[int]) -> str:
    """Formats numbers for a name: `7`, `0-3`, or `{0,2-5,9}`; the first runs of them, if there are many."""
    runs = format_runs(numbers)
    if len(runs) == 1:
        return runs[0]
    return f"{{{','.join(runs[:MOST_RUNS])}{',...' if len(runs) > MOST_RUNS else ''}}}"
