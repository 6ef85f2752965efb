"""Rows that join the last two dimensions, or cut in blocks: what they may not have, for it could not be read back."""

import pytest

from reshard.errors import Refused
from reshard.recipes.recipe import parse_recipe

HEAD = """
name = "flat"
about = "joined dimensions"
left = "one"
right = "other"
files = "rank{rank}-of-{ranks}.safetensors"
scales.p = { left = "weight_scale_inv", right = "weight_scale_inv", block = 4 }
"""


def make_row(relation: str = "flatten", split: str = "rows", shape: str = "U8 [n, ?, 16]", name: str = "a") -> str:
    return f'["{relation}", "box.{name}", "box.{name}", "{split}", "{shape}"],'


def parse(row: str, more: str = "") -> None:
    parse_recipe(f"{HEAD}{more}\nrules = [\n{row}\n]\n", "flat.toml")


@pytest.mark.parametrize("split", ["rows", "columns", "replicate", "dimension 1 in blocks of 64", "first rank"])
def test_what_is_right_is_read(split: str) -> None:
    parse(make_row(split=split))
    parse(make_row("same", split, ""))


@pytest.mark.parametrize(
    ("row", "word"),
    [
        pytest.param(make_row(shape=""), "that ends in a number", id="no shape"),
        pytest.param(make_row(shape="[16]"), "two dimensions or more", id="one dimension"),
        pytest.param(make_row(shape="[n, ?]"), "that ends in a number", id="any last length"),
        pytest.param(make_row(shape="[n, 2 * 8]"), "that ends in a number", id="a formula"),
        pytest.param(make_row(shape="[n, 0]"), "that ends in a number", id="an empty dimension"),
        pytest.param(make_row(shape="[n, 16"), "is not like [rows, columns]", id="no shape at all"),
        pytest.param(make_row(split="dimension 2"), "a cut before the last dimension", id="the last is cut"),
        pytest.param(make_row(name="{p}"), "has two dimensions on both sides", id="a block scale"),
        pytest.param(make_row("concat", "dimension 1 in blocks of 2"), "a split for a concat", id="parts in blocks"),
        pytest.param(make_row("concat", "first rank"), "a split for a concat", id="parts in the first rank"),
        pytest.param(
            make_row("same", "dimension 1 in blocks of 4", "", "{p}"), "split into equal parts", id="blocks and scales"
        ),
        pytest.param(make_row("same", "first rank", "", "{p}"), "split into equal parts", id="zeros and scales"),
        pytest.param(make_row(split="dimension 1 in blocks of 0"), "a split: ", id="blocks of nothing"),
        pytest.param(make_row(split="rows in blocks of 4"), "the same 'in blocks of' a number", id="no such split"),
    ],
)
def test_what_is_wrong_is_refused(row: str, word: str) -> None:
    with pytest.raises(Refused) as caught:
        parse(row)
    assert {problem.kind for problem in caught.value.problems} == {"wrong-recipe"}
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "row", [make_row(), make_row("same", "dimension 1 in blocks of 4"), make_row("same", "first rank")]
)
def test_no_keys_are_padded_beside_such_rows(row: str) -> None:
    with pytest.raises(Refused, match="no padded keys beside"):
        parse(row, 'padded = ["n"]')


def test_whole_files_have_no_joined_dimensions() -> None:
    stack = '["stack", "boxes.{e}.b", "boxes.b", "replicate", "[n, 4]"],'
    head = HEAD.replace("rank{rank}-of-{ranks}", "model").partition("scales.p")[0]
    head += 'placeholders.e = { counts = "boxes" }\n'
    assert parse_recipe(f"{head}rules = [\n{stack}\n]\n", "flat.toml")
    with pytest.raises(Refused, match="of whole files it is not read back"):
        parse_recipe(f"{head}rules = [\n{stack}\n{make_row(split='replicate')}\n]\n", "flat.toml")
