"""Rows of fused tensors and constants that a recipe may not have; each would give files that cannot be read back."""

import pytest

from reshard.errors import Refused
from reshard.recipes.recipe import has_ranks, parse_recipe

HEAD = """
name = "fused"
about = "fused tensors"
left = "one"
right = "other"
files = "part-{rank}.safetensors"
describes = true
placeholders.i = { counts = "layers" }
placeholders.e = { counts = "experts" }
placeholders.w = { counts = "other experts", within = "i" }
scales.p = { left = "weight_scale_inv", right = "scale", block = 4 }
"""

Q, K = '["concat", "a.{i}.q", "a.{i}.qk", "rows", "[n]"]', '["concat", "a.{i}.k", "a.{i}.qk", "rows", "[n]"]'
GATE = '["stack", "a.{i}.{e}.gate", "a.{i}.experts", "rows", "[n]"]'
NORM = '["same", "norm", "norm", "replicate", "[n]"]'
SCALED = '["stack", "a.{i}.{e}.down.{p}", "a.{i}.w2_{p}", "columns", "[m, n]"]'


def make_text(rows: tuple[str, ...], more: str = "") -> str:
    return HEAD + more + "\nrules = [\n" + ",\n".join(rows) + "\n]\n"


def test_what_is_right_is_read() -> None:
    constants = 'constants = [["a.{i}.scale", "F32 []", 1.0, "if {p}"], ["version", "F16 [2, 3]", -65504.0]]'
    recipe = parse_recipe(make_text((Q, K, GATE, NORM, SCALED), constants), "right.toml")
    assert [rule.relation for rule in recipe.rules] == ["concat", "concat", "stack", "same", "stack"]
    assert [(constant.shape, constant.scale) for constant in recipe.constants] == [((), "p"), ((2, 3), "")]


@pytest.mark.parametrize(
    ("rows", "more", "word"),
    [
        pytest.param((Q, NORM), "", "two rows or more", id="one concat"),
        pytest.param((Q, NORM, K), "", "behind each other", id="a row between"),
        pytest.param((Q, K.replace("concat", "stack")), "", "one relation", id="two relations"),
        pytest.param((Q, K.replace('"[n]"', '"[n]", "if bias"')), "", "one condition", id="a part that may be missing"),
        pytest.param((GATE.replace("{e}", "{w}"),), "", "counts from 0 by itself", id="members of a layer"),
        pytest.param((GATE.replace(".{e}", ""),), "", "one placeholder more", id="a stack of nothing"),
        pytest.param((Q, K.replace('"rows"', '"padded rows"')), "", "a split for a concat", id="padded parts"),
        pytest.param((GATE.replace('"rows"', '"by e"'),), "", "a split for a stack", id="assigned parts"),
        pytest.param((Q, K), 'padded = ["n"]', "their parts are not padded", id="padding of a size"),
        pytest.param((NORM,), 'constants = [["a.{i}.{e}", "F32 []", 1.0]]', "one placeholder", id="two placeholders"),
        pytest.param((NORM,), 'constants = [["a", "F32 []", nan]]', "a finite value", id="no number"),
        pytest.param((NORM,), 'constants = [["a", "F16 []", 65505.0]]', "a finite value", id="too large a number"),
        pytest.param((NORM,), 'constants = [["a", "F32 [9999999, 9999999]", 1.0]]', "elements", id="a huge constant"),
        pytest.param((NORM,), 'constants = [["a", "F32 [n]", 1.0]]', "a shape of numbers", id="a formula"),
        pytest.param((NORM,), 'constants = [["a", "I64 []", 1.0]]', "one of F32, BF16, F16", id="whole numbers"),
        pytest.param((NORM,), 'constants = [["a", "F32 []", 1]]', "a row of right name", id="no fraction"),
        pytest.param((NORM,), 'constants = [["a", "F32 []", 1.0, "if {i}"]]', "of a block scale", id="if a layer"),
        pytest.param((NORM,), 'constants = [["a", "F32 []", 1.0, "if n"]]', "of a block scale", id="if a key"),
        pytest.param((NORM,), 'constants = [["a", "F32 []", 1.0, 1]]', "of a block scale", id="if a number"),
        pytest.param((NORM,), 'constants = [["a", "F32 []", 1.0, "", ""]]', "a row of right name", id="five cells"),
        pytest.param((SCALED.replace("w2_{p}", "w2_{p}x"),), "", "between two dots", id="text behind a scale"),
        pytest.param(
            (SCALED.replace("down.{p}", "down_{p}"),), "", "between two dots", id="text before it on the left"
        ),
        pytest.param((SCALED.replace("w2_{p}", "w2_{p}.x"),), "", "at the end of a name", id="a scale in the middle"),
        pytest.param((GATE.replace("experts", "w_{i}"),), "", "between two dots", id="text before a number"),
        pytest.param((NORM,), 'engine = "Big Engine"', "a word of small letters", id="the name of an engine"),
    ],
)
def test_what_is_wrong_is_refused(rows: tuple[str, ...], more: str, word: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_recipe(make_text(rows, more), "wrong.toml")
    assert {problem.kind for problem in caught.value.problems} == {"wrong-recipe"}
    assert word in str(caught.value)


WHOLE = HEAD.replace("part-{rank}", "model").replace("describes = true\n", "")


def test_whole_files_under_other_names_are_read() -> None:
    recipe = parse_recipe(WHOLE + f"rules = [{GATE}, {NORM}]", "whole.toml")
    assert not has_ranks(recipe)
    assert has_ranks(parse_recipe(make_text((GATE, NORM)), "ranks.toml"))


@pytest.mark.parametrize(
    ("rows", "more", "word"),
    [
        (NORM, "", "'model.safetensors' without a fused tensor"),
        (GATE, 'constants = [["version", "F32 []", 1.0]]', "constants, with 'model.safetensors'"),
        (GATE, 'scales.s = { left = "scale", right = "scale", block = 4 }', "scales, with 'model.safetensors'"),
        (GATE, 'run.width = "n"', "run, with 'model.safetensors'"),
    ],
)
def test_whole_files_that_could_not_be_read_back_are_refused(rows: str, more: str, word: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_recipe(f"{WHOLE}{more}\nrules = [{rows}]", "whole.toml")
    assert [word in problem.found for problem in refused.value.problems] == [True]
