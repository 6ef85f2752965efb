"""Recipes: each packaged one reads in both directions and as a table; each fault is refused with its line."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from reshard.errors import Refused
from reshard.recipe import FOLDER, load_recipe, packaged_recipes, parse_recipe
from reshard.types import Recipe, Rule

PACKAGED = sorted(path.stem for path in FOLDER.glob("*.toml"))
V3 = (FOLDER / "deepseek-v3.toml").read_text(encoding="utf-8")
CELL = re.compile(r'"(?:[^"\\]|\\.)*"')
HOLE = re.compile(r"\{(.)\}")


def holes_of(pattern: str) -> list[str]:
    found: list[str] = HOLE.findall(pattern)
    return found


def filled(pattern: str, values: dict[str, str]) -> str:
    return HOLE.sub(lambda hole: values[hole[1]], pattern)


def name_pairs(recipe: Recipe, rule: Rule) -> list[tuple[str, str]]:
    """The names on both sides of a rule for a model of 4 layers, the first of them dense, and 3 experts."""
    members = {"i": "0123", "d": "0", "s": "123", "e": "012", "m": "4"}
    letters = [letter for letter in holes_of(rule.left) if letter != "p"]
    scale = recipe.scale
    ends = [("weight", "weight"), (scale.left, scale.right)] if scale and "{p}" in rule.left else [("", "")]
    return [
        (filled(rule.left, {**values, "p": left}), filled(rule.right, {**values, "p": right}))
        for numbers in product(*(members[letter] for letter in letters))
        for values in [dict(zip(letters, numbers, strict=True))]
        for left, right in ends
    ]


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_recipe_loads_under_the_name_of_its_file(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.origin == str(FOLDER / f"{name}.toml")
    assert recipe in packaged_recipes()


def test_the_folder_is_the_registry() -> None:
    assert [recipe.name for recipe in packaged_recipes()] == PACKAGED
    assert {"deepseek-v2", "deepseek-v3"} <= set(PACKAGED)


def test_no_model_has_two_recipes() -> None:
    for field in ("model_types", "architectures"):
        words = [word for recipe in packaged_recipes() for word in getattr(recipe, field)]
        assert words
        assert len(set(words)) == len(words)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_recipe_goes_both_ways(name: str) -> None:
    recipe = load_recipe(name)
    same = [rule for rule in recipe.rules if rule.relation == "same"]
    assert same
    for rule in same:
        assert sorted(holes_of(rule.left)) == sorted(holes_of(rule.right)), rule
    pairs = [pair for rule in same for pair in name_pairs(recipe, rule)]
    assert len({left for left, _ in pairs}) == len(pairs)
    assert len({right for _, right in pairs}) == len(pairs)


@pytest.mark.parametrize("name", PACKAGED)
def test_the_rows_of_a_packaged_recipe_stand_in_columns(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("[")]
    assert len(rows) == len(load_recipe(name).rules)
    starts = [[cell.start() for cell in CELL.finditer(row)] for row in rows]
    for column in range(5):
        assert len({row[column] for row in starts if len(row) > column}) == 1, f"column {column + 1}"


def test_an_own_file_works_like_a_packaged_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(V3, encoding="utf-8")
    assert load_recipe(str(path)) == replace(load_recipe("deepseek-v3"), origin=str(path))


def test_an_own_file_may_say_something_else(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = V3.replace('"deepseek-v3"', '"mine"').replace("block = 128", "block = 64").replace('["*token*"]', "[]")
    path.write_text(text, encoding="utf-8")
    packaged, mine = load_recipe("deepseek-v3"), load_recipe(str(path))
    assert (mine.name, mine.carry, mine.rules) == ("mine", (), packaged.rules)
    assert mine.scale is not None
    assert mine.scale.block == 64
    assert mine.text_hash != packaged.text_hash


def test_what_a_recipe_may_leave_out() -> None:
    text = """
    name = "least"
    about = "the least that a recipe may say"
    left = "one"
    right = "other"
    files = "{rank} of {ranks}.safetensors"
    rules = [["same", "a", "b", "replicate"]]
    """
    recipe = parse_recipe(text, "least.toml")
    assert recipe.rules == (Rule("same", "a", "b", "replicate"),)
    assert (recipe.holes, recipe.scale, recipe.carry, recipe.model_types) == ({}, None, (), ())


@pytest.mark.parametrize(
    ("name", "kind", "word"),
    [
        pytest.param("deepseek-v33", "unknown-recipe", "did you mean deepseek-v3?", id="nearly a name"),
        pytest.param("llama", "unknown-recipe", "one of deepseek-v2, deepseek-v3", id="another name"),
        pytest.param("no/such/recipe.toml", "unknown-recipe", "no/such/recipe.toml", id="no such file"),
        pytest.param(str(FOLDER), "unknown-recipe", "no such recipe", id="a folder"),
    ],
)
def test_an_unknown_recipe_is_refused(name: str, kind: str, word: str) -> None:
    with pytest.raises(Refused) as caught:
        load_recipe(name)
    assert [problem.kind for problem in caught.value.problems] == [kind]
    assert word in str(caught.value)


@pytest.mark.parametrize("content", [b"name = \xff", b"\xff\xfe"])
def test_a_recipe_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(content)
    with pytest.raises(Refused, match="utf-8") as caught:
        load_recipe(str(path))
    assert [problem.kind for problem in caught.value.problems] == ["cannot-read"]


def test_a_folder_that_is_named_like_a_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "folder.toml"
    path.mkdir()
    with pytest.raises(Refused, match="directory"):
        load_recipe(str(path))


def edited(old: str, new: str) -> tuple[str, int]:
    """The recipe of V3 with its one `old` replaced, and the line on which that stands."""
    assert V3.count(old) == 1, old
    return V3.replace(old, new), V3[: V3.index(old)].count("\n") + 1


FIRST_ROW = '"model.embed_tokens.weight",' + 32 * " " + '"embed.weight",' + 26 * " " + '"rows"'
NORM_ROW = '"model.norm.weight",' + 40 * " " + '"norm.weight",' + 27 * " " + '"replicate"'
EMBED = '["same", ' + FIRST_ROW + "]"
HOLE_D = 'holes.d = { counts = "dense layers",  size = "first_k_dense_replace", within = "i" }'
HOLE_M = 'holes.m = { counts = "MTP layers",    after = "i", marker = "model.layers.{m}.eh_proj.weight" }'
SCALE = 'scales.p = { left = "weight_scale_inv", right = "scale", block = 128 }'
FILES = '"model{rank}-mp{ranks}.safetensors"'

FAULTS = [
    # Not TOML.
    pytest.param('right         = "', "right         = ", "Invalid value", id="a quote missing"),
    pytest.param("holes.s =", "holes.d =", "Cannot overwrite", id="two holes of a name"),
    pytest.param("carry    ", "files    ", "Cannot overwrite", id="a key twice"),
    # Keys.
    pytest.param("carry    ", "carries  ", "carry", id="a misspelled key"),
    pytest.param("left          =", "wrong_key     =", "left", id="an unknown key"),
    pytest.param('about         = "DeepSeek-V3, R1, V3-0324, V3.1 for DeepSeek\'s inference code"', "about = 3",
                 "about: a string", id="a number as text"),
    pytest.param('"huggingface"', '""', "left: a string", id="an empty text"),
    pytest.param('["*token*"]', '"*token*"', "carry: a list of strings", id="a text as list"),
    pytest.param('["deepseek_v3"]', '["deepseek_v3", 3]', "model_types: a list of strings", id="a number in a list"),
    pytest.param(FILES, '"model{rank}.safetensors"', "{rank} and {ranks}", id="file names without the ranks"),
    pytest.param(FILES, '"model.safetensors"', "{rank} and {ranks}", id="one name for all files"),
    pytest.param(FILES, '"ranks/{rank}-{ranks}.safetensors"', "a file name", id="file names in a folder"),
    pytest.param(FILES, '"{rank}-{ranks}-{host}.safetensors"', "{rank} and {ranks}", id="an unknown part of a name"),
    pytest.param(FILES, '"model{rank}-mp{ranks}.safetensors{"', "a file name", id="a stray brace in the file names"),
    pytest.param(FILES, '"model{rank}-mp{ranks}\\u0000"', "a file name", id="a zero byte in the file names"),
    pytest.param('["*token*"]', '["/etc/host*"]', "carry", id="side files by an absolute path"),
    pytest.param('["*token*"]', '["../*"]', "carry", id="side files outside of the folder"),
    pytest.param('["*token*"]', '[""]', "carry", id="side files without a name"),
    pytest.param('["*token*"]', '["token**"]', "carry", id="side files with two stars in a name"),
    # The scale.
    pytest.param(SCALE, "scale = 128", "scale: a table", id="a number as scale"),
    pytest.param(SCALE, 'scale = { left = "weight_scale_inv", right = "scale" }', "block", id="a scale without block"),
    pytest.param("block = 128", "block = 0", "block: a whole number", id="a block of nothing"),
    pytest.param("block = 128", "block = 128.0", "block: a whole number", id="a block of a float"),
    pytest.param("block = 128", "block = true", "block: a whole number", id="a block of a boolean"),
    pytest.param('right = "scale"', "right = 1", "left and right: strings", id="a number as the name of a scale"),
    # The holes.
    pytest.param("holes.d =", "holes.dd =", "single lower-case letter", id="a hole of two letters"),
    pytest.param("holes.d =", "holes.D =", "single lower-case letter", id="a hole in upper case"),
    pytest.param("holes.d =", "holes.p =", "not 'p'", id="the hole that is taken"),
    pytest.param(HOLE_D, "holes.d = 3", "a table of strings", id="a number as hole"),
    pytest.param(HOLE_D, "holes.d = { counts = 3 }", "a table of strings", id="a number in a hole"),
    pytest.param(HOLE_D, 'holes.d = { within = "i" }', "what the hole counts", id="a hole that counts nothing"),
    pytest.param(HOLE_D, 'holes.d = { counts = "d", inside = "i" }', "inside", id="an unknown field of a hole"),
    pytest.param(HOLE_D, 'holes.d = { counts = "d", within = "z" }', "another hole", id="within no hole"),
    pytest.param(HOLE_D, 'holes.d = { counts = "d", within = "d" }', "another hole", id="within itself"),
    pytest.param(HOLE_M, 'holes.m = { counts = "m", after = "i" }', "after and marker", id="after without marker"),
    pytest.param(HOLE_M, 'holes.m = { counts = "m", after = "y", marker = "x.{m}" }', "another hole",
                 id="after no hole"),
    pytest.param("model.layers.{m}.eh_proj.weight", "model.layers.{i}.eh_proj.weight", "marker",
                 id="a marker of another hole"),
    pytest.param("model.layers.{m}.eh_proj.weight", "model.eh_proj.weight", "marker", id="a marker without a hole"),
    pytest.param('rows_of = "model.layers.{s}', 'rows_of = "model.layers.{z}', "rows_of", id="rows of an unknown hole"),
    # The rows.
    pytest.param(EMBED, "[" + FIRST_ROW + "]", "four or five strings", id="a row without relation"),
    pytest.param(EMBED, "[]", "four or five strings", id="an empty row"),
    pytest.param(EMBED, '["same", "a", "b", "rows", "if x", "y"]', "four or five strings", id="a row of six"),
    pytest.param(EMBED, '["same", "a", "b", 0]', "four or five strings", id="a number in a row"),
    pytest.param(EMBED, '"same"', "four or five strings", id="a text as row"),
    pytest.param('["same", ' + NORM_ROW, '["move", ' + NORM_ROW, "same or drop", id="an unknown relation"),
    pytest.param('["same", ' + NORM_ROW, '["drop", ' + NORM_ROW, "the reason", id="a drop that keeps"),
    pytest.param('"MTP layers: DeepSeek\'s inference code has no multi-token prediction"', '""', "the reason",
                 id="a drop without reason"),
    pytest.param(NORM_ROW, '"model.norm.weight", "norm.weight", "copy"', "a split", id="an unknown split"),
    pytest.param(NORM_ROW, '"model.norm.weight", "norm.weight", "by e"', "a split", id="dealt by a hole of no name"),
    pytest.param('"layers.{d}.ffn.w3.{p}",                 "rows"', '"layers.{d}.ffn.w3.{p}",                 "by p"',
                 "a split", id="dealt by weight and scale"),
    pytest.param(NORM_ROW, '"", "norm.weight", "replicate"', "the name on the left", id="no name on the left"),
    pytest.param(NORM_ROW, '"model.norm.weight", "norm.{i}.weight", "replicate"', "the same holes",
                 id="a hole on the right only"),
    pytest.param(NORM_ROW, '"model.{i}.norm", "norm", "replicate"', "the same holes", id="a hole on the left only"),
    pytest.param(NORM_ROW, '"model.{i}.norm", "norm.{s}", "replicate"', "the same holes", id="another hole"),
    pytest.param(NORM_ROW, '"model.{k}.norm", "norm.{k}", "replicate"', "{k}", id="an unknown hole"),
    pytest.param(NORM_ROW, '"model.{i}.{i}", "norm.{i}.{i}", "replicate"', "each hole once", id="a hole twice"),
    pytest.param(NORM_ROW, '"model.x{i}.norm", "norm.x{i}", "replicate"', "between two dots",
                 id="a hole that is part of a word"),
    pytest.param(NORM_ROW, '"model..norm", "norm", "replicate"', "between two dots", id="an empty component"),
    pytest.param(NORM_ROW, '"model.{*}", "norm.{*}", "replicate"', "{*}", id="the rest of a name in a same"),
    pytest.param('model.layers.{m}.{*}"', 'model.{*}.layers.{m}"', "{*} at the end only",
                 id="the rest of a name in the middle"),
    pytest.param(NORM_ROW, '"model.norm.weight", "norm.weight", "replicate", "when x"', "if KEY",
                 id="an unknown condition"),
    pytest.param(NORM_ROW, '"model.norm.weight", "norm.weight", "replicate", "if"', "if KEY", id="a condition cut off"),
    pytest.param(NORM_ROW, '"model.embed_tokens.weight", "norm.weight", "replicate"', "row 1", id="a left name twice"),
    pytest.param(NORM_ROW, '"model.norm.weight", "embed.weight", "replicate"', "row 1", id="a right name twice"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "word"), FAULTS)
def test_a_faulty_recipe_is_refused_with_its_line(old: str, new: str, word: str) -> None:
    text, line = edited(old, new)
    with pytest.raises(Refused) as caught:
        parse_recipe(text, "mine.toml")
    problems = [problem for problem in caught.value.problems if problem.subject == f"mine.toml:{line}"]
    assert problems, caught.value
    assert {problem.kind for problem in caught.value.problems} == {"wrong-recipe"}
    assert any(word in f"{problem.found} {problem.expected}" for problem in problems), caught.value


@pytest.mark.parametrize("key", ["name", "about", "left", "right", "files"])
def test_a_missing_key_is_named(key: str) -> None:
    text = re.sub(rf"^{key} +=", "# =", V3, flags=re.MULTILINE)
    with pytest.raises(Refused) as caught:
        parse_recipe(text, "mine.toml")
    assert [problem.kind for problem in caught.value.problems] == ["wrong-recipe"]
    assert f"{key}: a" in caught.value.problems[0].expected


@pytest.mark.parametrize("rows", ["", "rules = []\n", "rules = {}\n"])
def test_a_recipe_without_rows_is_refused(rows: str) -> None:
    with pytest.raises(Refused, match="a list of rows"):
        parse_recipe(V3[: V3.index("rules = [")] + rows, "mine.toml")


def test_an_unfinished_recipe_is_refused_at_its_end() -> None:
    text = V3[: V3.index('["same", "model.norm.weight"')]
    with pytest.raises(Refused) as caught:
        parse_recipe(text, "mine.toml")
    lines = text.count("\n")
    assert caught.value.problems[0].subject in {f"mine.toml:{lines}", f"mine.toml:{lines + 1}"}


def test_every_fault_is_named_with_its_line() -> None:
    text, first = edited(FIRST_ROW, '"model.embed_tokens.weight", "embed.weight", "by q"')
    old = NORM_ROW
    second = text[: text.index(old)].count("\n") + 1
    text = text.replace(old, '"model.norm.weight", "norm.{i}.weight", "sideways"')
    with pytest.raises(Refused) as caught:
        parse_recipe(text, "mine.toml")
    assert [problem.subject for problem in caught.value.problems] == [f"mine.toml:{first}", f"mine.toml:{second}"]


def test_a_row_may_span_lines_and_is_named_by_its_last() -> None:
    text, line = edited(NORM_ROW, '"model.norm.weight",\n"norm.weight",\n"sideways"')
    with pytest.raises(Refused) as caught:
        parse_recipe(text, "mine.toml")
    assert [problem.subject for problem in caught.value.problems] == [f"mine.toml:{line + 2}"]
