"""Formulas of recipes: what they come to, what the config leaves open, and what is no formula."""

from collections.abc import Mapping
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.recipes.formulas import (
    LONGEST_FORMULA,
    MOST_STEPS,
    UnknownKey,
    compute_formula,
    compute_shape,
    parse_formula,
    parse_shape,
    takes_too_long,
)

CONFIG: Mapping[str, Any] = {
    "heads": 128,
    "nope": 128,
    "rope": 64,
    "odd": 7,
    "zero": 0,
    "nothing": None,
    "text": "fp8",
    "half": 0.5,
    "yes": True,
    "list": [1, 2],
    "inner": {"factor": 40, "many": [0, 0, 0], "deeper": {"still": 3}, "nothing": None},
}
SIZES = {"qk": "heads * (nope + rope)", "twice": "2 * qk", "left": "right + 1", "right": "left + 1", "odd": "odd + 1"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("heads", 128),
        ("unknown or 'word'", "word"),
        ("heads or 'word'", 128),
        (" heads ", 128),
        ("nope + rope", 192),
        ("nope - rope - 4", 60),
        ("heads * nope + rope", 128 * 128 + 64),
        ("heads * (nope + rope)", 128 * 192),
        ("heads // odd", 128 // 8),
        ("rope // 10", 6),
        ("ceil(rope / 10)", 7),
        ("ceil(heads / rope)", 2),
        ("ceil((heads + 1) / rope) * 2", 6),
        ("inner.factor", 40),
        ("len(list)", 2),
        ("unknown or len(list)", 2),
        ("3 * (unknown or inner.unknown or 4) - 1", 11),
        ("len(list) or unknown", 2),
        ("len(list) - 3 * (len(inner.many) + 1)", -10),
        ("inner.deeper.still * 2", 6),
        # Names for other formulas. A name that is its own key means the key.
        ("qk", 128 * 192),
        ("twice + 1", 2 * 128 * 192 + 1),
        ("odd", 8),
        # A key alone may be anything.
        ("text", "fp8"),
        ("half", 0.5),
        ("yes", True),
        ("list", [1, 2]),
        ("zero", 0),
    ],
)
def test_a_formula_comes_to(text: str, value: object) -> None:
    found = compute_formula(text, CONFIG, SIZES)
    assert found == value
    assert type(found) is type(value)


@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_ceil_rounds_up(number: int, divisor: int) -> None:
    config = {"a": number, "b": divisor}
    assert compute_formula("ceil(a / b)", config, {}) == ceil(number / divisor)
    assert compute_formula("a // b", config, {}) == number // divisor


@pytest.mark.parametrize(
    "text",
    [
        "unknown",
        "nothing",
        "inner.unknown",
        "inner.nothing",
        "unknown.factor",
        "heads.factor",
        "list.factor",
        "heads + unknown",
        "unknown * 0",
        # Not a whole number.
        "text + 1",
        "half * 2",
        "yes + 1",
        "list * 2",
        "inner * 2",
        "len(unknown)",
        "unknown or inner.unknown",
        "len(text)",
        "len(inner)",
        "len(heads)",
        "len(inner.unknown)",
        # By nothing.
        "heads // zero",
        "ceil(heads / zero)",
        "heads // (rope - 64)",
        # In a circle.
        "left",
    ],
)
def test_what_the_config_does_not_tell_is_unknown(text: str) -> None:
    with pytest.raises(UnknownKey):
        compute_formula(text, CONFIG, SIZES)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a b",
        "'word'",
        "'word' + a",
        "a or 'word'",
        "a +",
        "(a",
        "a / b",
        "a % b",
        "a ** b",
        "a @ b",
        "-a",
        "+a",
        "not a",
        "a and b",
        "a < b",
        "a if b else c",
        "1.5",
        "'text'",
        "True",
        "None",
        "...",
        "a[0]",
        "[a]",
        "(a, b)",
        "{a}",
        "lambda: a",
        "a := 3",
        "a = 3",
        "f(a)",
        "min(a / b)",
        "ceil(a)",
        "ceil(a // b)",
        "ceil(a / b, c)",
        "ceil(a / b, key=c)",
        "ceil(ceil / )",
        "ceil(f(a) / b)",
        "ceil(a / f(b))",
        "math.ceil(a / b)",
        "len(a + b)",
        "a or f(b)",
        "len(3)",
        "len(len(a))",
        "len()",
        "len(a, b)",
        "len(*a)",
        "len(a[0])",
        "?",
        "__import__('os').system('true')",
        "open('x').read",
        "(a + b.c[0]).d",
        "a\nb",
        "a\0b",
        "a # b\n+",
        "(" * 150 + "a" + ")" * 150,
        "a" + " + a" * LONGEST_FORMULA,
        "9" * (LONGEST_FORMULA + 1),
    ],
)
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_formula(text)


@pytest.mark.parametrize("text", ["a or 'word'", "a or b + 1 or 'two-words'", "a.b or 'fp8_e4m3'"])
def test_the_last_choice_of_a_run_value_may_be_a_word(text: str) -> None:
    parse_formula(text, is_run=True)
    with pytest.raises(ValueError, match="is no number"):
        parse_formula(text)


@pytest.mark.parametrize(
    "text",
    ["'word'", "'word' or a", "a or 'one' or 'other'", "a or ''", "a or 'two words'", "a or 'a\\nb'", "a or b'word'",
     "2 * (a or 'word')", "(a or 'word') + 1", "a or (b or 'word')", "a or ['word']", "a or {b}", "len(a or 'word')"],
)  # fmt: skip
def test_a_word_stands_nowhere_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_formula(text, is_run=True)


def test_a_formula_has_so_many_steps_with_all_the_sizes_that_it_names() -> None:
    chain = {f"a{number}": f"a{number + 1}" for number in range(MOST_STEPS - 1)}
    assert not takes_too_long("a0", chain)
    assert compute_formula("a0", {f"a{MOST_STEPS - 1}": 3}, chain) == 3
    assert takes_too_long("a0", {"before": "a0", **chain, f"a{MOST_STEPS - 1}": "key"})
    # In a circle, and by the name of its own key, it comes to an end.
    assert not takes_too_long("left", SIZES)
    assert not takes_too_long("odd", SIZES)
    wide = {"a": " + ".join(["b"] * 10), "b": " + ".join(["c"] * 7)}
    assert not takes_too_long("a", {**wide, "c": "d"})
    assert takes_too_long("a", {**wide, "c": "d + 1"})


@pytest.mark.parametrize(
    ("text", "dtype", "formulas"),
    [
        ("[]", "", []),
        ("[ ]", "", []),
        ("[a]", "", ["a"]),
        ("[a, 2 * b]", "", ["a", "2 * b"]),
        ("I64 [ceil(a / b), inner.factor]", "I64", ["ceil(a / b)", "inner.factor"]),
        ("F8_E8M0 [a]", "F8_E8M0", ["a"]),
        ("[?, a]", "", ["?", "a"]),
    ],
)
def test_a_shape_is_a_dtype_and_formulas(text: str, dtype: str, formulas: list[str]) -> None:
    assert parse_shape(text) == (dtype, formulas)


@pytest.mark.parametrize(
    "text",
    ["", "a", "a, b", "[a", "a]", "[[a]]", "[a] ", " [a]", "I64[a]", "I64  [a]", "I64 F32 [a]", "[a,]", "[,a]",
     "[a,,b]", "[a b]", "[a; b]", "[a][b]", "[*]", "[? + 1]", "[??]", "I-64 [a]"],
)  # fmt: skip
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_shape(text)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("[]", []),
        ("[heads, nope + rope]", [128, 192]),
        ("I64 [qk]", [128 * 192]),
        ("[?, heads, ?]", [None, 128, None]),
        # Each size by itself.
        ("[unknown, heads]", [None, 128]),
        ("[heads, text]", [128, None]),
        ("[half, yes]", [None, None]),
    ],
)
def test_a_shape_has_the_sizes_that_the_config_tells(text: str, sizes: list[int | None]) -> None:
    assert compute_shape(text, CONFIG, SIZES) == sizes
