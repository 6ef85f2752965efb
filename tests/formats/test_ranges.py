"""The text of the ranges of a file in a manifest: parsed into byte ranges, or refused."""

import pytest

from reshard.formats.ranges import LARGEST_RANGE, CheckedRange, parse_ranges

A, B = "0123456789abcdef" * 2, "f" * 32


def test_ranges_lie_back_to_back_from_the_start_of_the_file() -> None:
    assert parse_ranges(f"8 {A} 0 {B} 100 {B}") == (
        CheckedRange(0, 8, A),
        CheckedRange(8, 0, B),
        CheckedRange(8, 100, B),
    )
    assert [found.stop for found in parse_ranges(f"8 {A} 0 {B} 100 {B}")] == [8, 8, 108]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        f"8 {A} 9",
        f"8  {A}",
        f"8 {A} ",
        f"8 {A}\n",
        f"-8 {A}",
        f"8.0 {A}",
        f"٣ {A}",
        f"8 {A[:-1]}",
        f"8 {A}0",
        f"8 {A.upper()}",
        f"{LARGEST_RANGE + 1} {A}",
        f"{'9' * 5000} {A}",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no size of|zip"):
        parse_ranges(text)
