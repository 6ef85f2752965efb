"""Refusals: their text, and that they survive the way between processes."""

import pickle

from reshard.errors import MOST_PROBLEMS, MOST_SHOWN_PER_KIND, Problem, Refused, describe_problems

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
    assert len(lines) == 4 * MOST_SHOWN_PER_KIND + 2
    assert lines[-2:] == [
        f"... and {MOST_PROBLEMS - MOST_SHOWN_PER_KIND:,} more of this kind (missing-file); --json lists them all",
        f"only the first {MOST_PROBLEMS:,} problems were looked for",
    ]
