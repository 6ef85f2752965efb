"""Names with ranges in the place of their numbers: they stand for exactly the names that were given."""

import random
from itertools import product

import pytest

from reshard.numbered_names import cover_numbers, fill_ranges, format_range, split_name


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((7,), "7"), ((0, 1, 2), "0-2"), ((0, 2, 3, 9), "{0,2-3,9}"), (range(0, 12, 2), "{0,2,4,6,...}")],
)
def test_a_range_is_short(numbers: tuple[int, ...], text: str) -> None:
    assert format_range(numbers) == text


def test_a_line_break_behind_a_number_belongs_to_the_name() -> None:
    assert split_name("a.3\n") == ("a.3\n", ())


def test_ranges_fill_the_numbered_components_only() -> None:
    assert split_name("h2.3.experts.10.w1") == ("h2.#.experts.#.w1", ("3", "10"))
    assert fill_ranges("h2.3.experts.10.w1", [(0, 1, 2), (4, 6)]) == "h2.0-2.experts.{4,6}.w1"
    assert fill_ranges("no.number", []) == "no.number"


def test_a_whole_grid_is_one_block_and_a_hole_makes_two() -> None:
    grid = set(product(range(61), range(256)))
    assert cover_numbers(sorted(grid)) == [(tuple(range(61)), tuple(range(256)))]
    blocks = cover_numbers(sorted(grid - {(3, 7)}))
    assert [(format_range(layers), format_range(experts)) for layers, experts in blocks] == [
        ("{0-2,4-60}", "0-255"),
        ("3", "{0-6,8-255}"),
    ]


@pytest.mark.parametrize("places", [1, 2, 3, 4])
def test_blocks_have_every_combination_exactly_once(places: int) -> None:
    chance = random.Random(places)
    for _ in range(50):
        members = {tuple(chance.randrange(4) for _ in range(places)) for _ in range(chance.randrange(1, 40))}
        covered = [numbers for block in cover_numbers(members) for numbers in product(*block)]
        assert sorted(covered) == sorted(members)
