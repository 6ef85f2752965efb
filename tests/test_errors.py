"""Refusals: their text, and that they survive the way between processes."""

import pickle
from dataclasses import asdict, replace

from reshard.errors import (
    MOST_PROBLEMS,
    MOST_SHOWN_PER_KIND,
    Problem,
    Refused,
    describe_problems,
    summarize_problems,
)

ONE = Problem("missing-file", "model0-mp2.safetensors", "no such file", "1,024 bytes", "copy it there")
OTHER = Problem("wrong-shape", "norm.weight", "BF16 [3]", "BF16 [4]")


def test_a_refusal_survives_pickling_with_all_its_problems() -> None:
    refused = Refused([ONE, OTHER])
    again = pickle.loads(pickle.dumps(refused))  # noqa: S301 - our own bytes
    assert type(again) is Refused
    assert again.problems == refused.problems == (ONE, OTHER)
    assert str(again) == str(refused)


def test_the_text_has_a_hint_where_there_is_one() -> None:
    assert describe_problems([ONE, OTHER]) == (
        "model0-mp2.safetensors: missing file\n"
        "  found:    no such file\n"
        "  expected: 1,024 bytes\n"
        "  hint:     copy it there\n"
        "norm.weight: wrong shape\n"
        "  found:    BF16 [3]\n"
        "  expected: BF16 [4]"
    )


def test_no_more_problems_are_held_than_anyone_reads() -> None:
    refused = Refused(ONE for _ in range(MOST_PROBLEMS + 1))
    assert len(refused.problems) == MOST_PROBLEMS
    lines = str(refused).split("\n")
    assert len(lines) == MOST_SHOWN_PER_KIND + 3 + 2
    assert lines[-2:] == [
        f"... and {MOST_PROBLEMS - MOST_SHOWN_PER_KIND:,} more of this kind (missing-file)",
        f"only the first {MOST_PROBLEMS:,} problems were looked for",
    ]


def test_what_problems_share_is_written_once_below_them() -> None:
    same = replace(ONE, subject="model1-mp2.safetensors")
    other = replace(ONE, subject="model2-mp2.safetensors", expected="2,048 bytes")
    unlike = replace(other, subject="config.json", remedy="write one")
    assert describe_problems([ONE, same, other, unlike]) == (
        "model0-mp2.safetensors: missing file\n"
        "model1-mp2.safetensors: missing file\n"
        "  found:    no such file\n"
        "  expected: 1,024 bytes\n"
        "model2-mp2.safetensors: missing file\n"
        "  found:    no such file\n"
        "  expected: 2,048 bytes\n"
        "  hint:     copy it there\n"
        "config.json: missing file\n"
        "  found:    no such file\n"
        "  expected: 2,048 bytes\n"
        "  hint:     write one"
    )


def test_json_has_ten_of_a_kind_and_counts_the_rest() -> None:
    many = [replace(ONE, subject=f"{number}.safetensors") for number in range(MOST_SHOWN_PER_KIND + 3)]
    found = summarize_problems([OTHER, *many])
    assert found["problems"] == [asdict(problem) for problem in [OTHER, *many[:MOST_SHOWN_PER_KIND]]]
    assert found["more"] == {"missing-file": 3}
    assert summarize_problems([OTHER]) == {"problems": [asdict(OTHER)], "more": {}}
