"""Refusals: their text fits a screen and begins with what to do; they survive the way between processes."""

import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest

from reshard.errors import COLUMNS, MOST_PROBLEMS, MOST_ROWS, Problem, Refused, describe_problems

ONE = Problem("missing-file", "model0-mp2.safetensors", "no such file", "1,024 bytes", "copy it there")
OTHER = Problem("wrong-shape", "norm.weight", "BF16 [3]", "BF16 [4]")


def count_rows(text: str) -> int:
    return sum(max(-(-len(line) // COLUMNS), 1) for line in text.split("\n"))


def test_a_refusal_survives_pickling_with_all_its_problems() -> None:
    refused = Refused([ONE, OTHER], "its `problems`")
    again = pickle.loads(pickle.dumps(refused))  # noqa: S301 - our own bytes
    assert type(again) is Refused
    assert again.problems == refused.problems == (ONE, OTHER)
    assert str(again) == str(refused)
    assert "norm.weight" not in repr(refused)


def test_the_hint_stands_before_the_details() -> None:
    assert describe_problems([ONE, OTHER]) == (
        "model0-mp2.safetensors: missing file\n"
        "  hint:     copy it there\n"
        "  found:    no such file\n"
        "  expected: 1,024 bytes\n"
        "norm.weight: wrong shape\n"
        "  found:    BF16 [3]\n"
        "  expected: BF16 [4]"
    )


def test_no_more_problems_are_held_than_anyone_reads() -> None:
    refused = Refused(replace(ONE, subject=f"{number}.safetensors") for number in range(MOST_PROBLEMS + 1))
    assert len(refused.problems) == MOST_PROBLEMS
    assert str(refused).split("\n") == [
        "0.safetensors: missing file",
        "  hint:     copy it there",
        "  found:    no such file; expected: 1,024 bytes",
        "  also:     " + ", ".join(f"{number}.safetensors" for number in range(1, 12)) + " and 99,988 more",
        "... in full: --json",
        f"only the first {MOST_PROBLEMS:,} problems were looked for",
    ]


def test_what_problems_share_is_written_once() -> None:
    same = replace(ONE, subject="model1-mp2.safetensors")
    third = replace(ONE, subject="model2-mp2.safetensors")
    other = replace(ONE, subject="model3-mp2.safetensors", expected="2,048 bytes")
    unlike = replace(other, subject="config.json", remedy="write one")
    assert describe_problems([ONE, unlike, same, other, third]) == (
        "model0-mp2.safetensors: missing file\n"
        "  hint:     copy it there\n"
        "  found:    no such file\n"
        "  expected: 1,024 bytes\n"
        "  also:     model1-mp2.safetensors\n"
        "            model2-mp2.safetensors\n"
        "model3-mp2.safetensors: missing file\n"
        "  found:    no such file\n"
        "  expected: 2,048 bytes\n"
        "config.json: missing file\n"
        "  hint:     write one\n"
        "  found:    no such file\n"
        "  expected: 2,048 bytes"
    )


def make_problems(kind: str, names: Sequence[str], layers: int, experts: int) -> list[Problem]:
    return [
        Problem(
            kind, f"layers.{layer}.experts.{expert}.{name}", f"in {layer}.safetensors", f"a rule for {name}", "mend"
        )
        for layer in range(layers)
        for expert in range(experts)
        for name in names
    ]


def test_names_that_differ_in_numbers_are_one_line_with_ranges() -> None:
    problems = make_problems("no-rule", ["w1", "w2"], 3, 256)
    del problems[2 * 5]  # layers.0.experts.5.w1
    assert describe_problems(problems) == (
        "layers.0.experts.{0-4,6-255}.w1: no rule (255 times)\n"
        "  hint:     mend\n"
        "  found:    in 0.safetensors\n"
        "  expected: a rule for w1\n"
        "layers.1-2.experts.0-255.w1: no rule (512 times)\n"
        "  found:    the first: in 1.safetensors\n"
        "  expected: a rule for w1\n"
        "layers.0-2.experts.0-255.w2: no rule (768 times)\n"
        "  found:    the first: in 0.safetensors\n"
        "  expected: a rule for w2"
    )


@pytest.mark.parametrize("subject", ["layers.0.w", "embed"])
def test_several_problems_of_one_thing_are_all_counted(subject: str) -> None:
    """Two ranks differ from the first in the same tensor: their numbers alone tell them apart."""
    problems = [
        Problem("replicas-differ", subject, f"other bytes in rank {rank}", "those of rank 0") for rank in (1, 2)
    ]
    text = describe_problems(problems)
    assert "other bytes in rank 1" in text
    assert "(2 times)" in text or "other bytes in rank 2" in text
    assert describe_problems([problems[0]] * 3).startswith(f"{subject}: replicas differ (3 times)\n")


@pytest.mark.parametrize(
    "change",
    [{"kind": "gap"}, {"remedy": "another"}, {"found": "F16, not F32"}, {"expected": "a rule for F16"}],
)
def test_problems_that_differ_in_more_than_numbers_stay_apart(change: dict[str, str]) -> None:
    first = Problem("no-rule", "layers.0.w", "F32, not F32", "a rule for F32", "mend")
    second = replace(first, subject="layers.1.w", **change)
    text = describe_problems([first, second])
    assert "layers.0.w: no rule\n" in text
    assert f"layers.1.w: {second.kind.replace('-', ' ')}\n" in text


def test_many_problems_fit_a_screen_and_every_kind_is_shown() -> None:
    kinds = ["no-rule", "wrong-shape", "missing-tensor"]
    problems = [one for kind in kinds for one in make_problems(kind, [f"w{number}" for number in range(50)], 3, 8)]
    text = describe_problems([*problems, ONE])
    assert count_rows(text) <= MOST_ROWS
    for kind in (*kinds, "missing-file"):
        assert f": {kind.replace('-', ' ')}" in text
    assert text.count("  hint:     mend\n") == 3
    assert text.endswith("\n... and more: 1,176 no-rule, 1,176 wrong-shape, 1,176 missing-tensor; all of them: --json")


def test_more_kinds_than_a_screen_has_room_for_lose_their_details() -> None:
    text = describe_problems([replace(OTHER, kind=f"kind-{number}", remedy="mend") for number in range(9)])
    assert count_rows(text) <= MOST_ROWS
    assert text.startswith("norm.weight: kind 0\n  hint:     mend\nnorm.weight: kind 1\n  hint:     mend\n")
    assert "norm.weight: kind 5\n" in text
    assert "found:" not in text
    assert text.endswith("\n... and more: 1 kind-6, 1 kind-7, 1 kind-8; all of them: --json")


def test_kinds_take_turns() -> None:
    many = [replace(ONE, subject=f"{number}.bin", found=f"{number} bytes") for number in range(90)]
    few = [replace(OTHER, subject=f"{number}.w", found=f"U{number}") for number in range(3)]
    text = describe_problems([*many, *few])
    assert (text.count(": missing file\n"), text.count(": wrong shape\n")) == (3, 3)
    assert text.endswith("\n... and more: 87 missing-file; all of them: --json")


def test_a_long_text_is_cut_only_where_there_is_no_room() -> None:
    long = replace(OTHER, found="x" * 300, remedy="a command " * 30)
    assert "x" * 300 in describe_problems([long])
    text = describe_problems([replace(long, subject=f"{number}.w", expected="y" * number) for number in range(20)])
    assert "x" * 181 not in text
    assert "x" * 180 + "... (300 characters)" in text
    assert "a command " * 30 in text  # a hint can be pasted


def test_a_name_of_a_thousand_numbers_is_taken_as_it_is() -> None:
    names = ["a" + ".0" * 5000, "a" + ".1" * 5000]
    text = describe_problems([replace(OTHER, subject=name) for name in names])
    assert text.startswith("a.0.0.")
    assert "a.1.1." in text


def test_in_python_the_rest_is_in_the_exception() -> None:
    many = [replace(ONE, subject=f"{number}.bin", found=f"{number} bytes") for number in range(90)]
    renamed = Refused(many).reworded(lambda text: text.replace("copy", "take"), "its `problems`")
    assert str(renamed).endswith("; all of them: its `problems`")
    assert len(renamed.problems) == 90
    assert renamed.problems[0].remedy == "take it there"
