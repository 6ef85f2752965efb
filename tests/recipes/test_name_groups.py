"""Names are grouped by what is left of them without their numbers, whatever their form."""

from reshard.numbered_names import split_name
from reshard.recipes.patterns import group_names_by_key, split_names

NAMES = [
    "norm.weight",
    "layers.10.experts.2.w1.weight",
    "layers.2.experts.10.w1.weight",
    "layers.2.experts.10.w1.scale",
    "norm",
    "norm.3",
    "norm.3.5",
    "norm.3.5.weight",
    "layers.#.experts.1.w1.weight",
    "layers.1.w#.weight",
    "layers.1.w.#",
    "layers.01.w.weight",
    "layers.1.2.w",
    "layers.1.w.2",
    "layers.1.w.2.a.b",
    "layers.1\n.w.a",
    "",
    ".",
    "..3",
    "7",
    "7.7.7",
]


def test_every_name_is_split_as_if_it_stood_alone() -> None:
    assert split_names(NAMES) == [split_name(name) for name in NAMES]
    assert split_names(reversed(NAMES)) == [split_name(name) for name in reversed(NAMES)]


def test_groups_hold_the_place_and_the_numbers_of_each_name_in_their_order() -> None:
    groups = group_names_by_key(NAMES)
    expected: dict[str, tuple[list[int], list[tuple[str, ...]]]] = {}
    for place, name in enumerate(NAMES):
        key, numbers = split_name(name)
        places, members = expected.setdefault(key, ([], []))
        places.append(place)
        members.append(numbers)
    assert {key: tuple(group) for key, group in groups.items()} == expected
