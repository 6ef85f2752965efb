"""An index is parsed fast only where that cannot hide a fault."""

import json

import pytest

from reshard.formats.index import parse_index

USUAL = '{"metadata": {"total_size": 3}, "weight_map": {"a.b": "x", "é": "y"}}'


@pytest.mark.parametrize(
    "text",
    [
        USUAL,
        '{"weight_map": {"a": "x"}}',
        '{"weight_map": {}, "metadata": {}}',
        '{"weight_map": {"a": "x"}, "metadata": {"total_size": "3"}}',
        '{"weight_map": {"a": "x"}, "other": 1}',
        r'{"weight_map": {"\u0061": "x"}}',
        '{"weight_map": {"a": 1}}',
        "[1]",
    ],
)
def test_the_weight_map_is_what_json_gives(text: str) -> None:
    found, expected = parse_index(text.encode()), json.loads(text)
    assert found == expected if isinstance(expected, list) else found["weight_map"] == expected["weight_map"]


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"a": "x", "a": "y"}}',
        '{"weight_map": {"a": "x"}, "weight_map": {"a": "x"}}',
        '{"metadata": {"n": 1, "n": 2}, "weight_map": {"a": "x"}}',
        '{"metadata": {}, "metadata": {}, "weight_map": {"a": "x"}}',
        r'{"weight_map": {"a": "x", "\u0061": "y"}}',
    ],
)
def test_a_key_that_stands_twice_is_a_fault(text: str) -> None:
    with pytest.raises(ValueError, match="stands twice"):
        parse_index(text.encode())
