"""The order in which problems are shown: by layer and expert number, 2 before 10, whatever the order of the files."""

from collections.abc import Iterable, Sequence

from reshard.errors import Problem
from reshard.numbered_names import split_name


def sort_by_layer(names: Sequence[str]) -> list[int]:
    """Sorts names by their numbers; names of one layer keep their order. Returns the places of the names.

    Names that begin alike stay together, in the order of the first: the embedding, the layers, the last norm.
    """
    beginnings: dict[str, int] = {}
    keys = []
    for place, name in enumerate(names):
        key, numbers = split_name(name)
        beginning = beginnings.setdefault(key.partition("#")[0], len(beginnings))
        keys.append((beginning, [int(number) for number in numbers], place))
    return [place for _, _, place in sorted(keys)]


def sort_problems(problems: Iterable[Problem]) -> list[Problem]:
    """Sorts problems by the layer that their subject names. Problems of one kind stay together."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    return [group[place] for group in kinds.values() for place in sort_by_layer([one.subject for one in group])]
