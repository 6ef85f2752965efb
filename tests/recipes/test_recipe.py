"""Recipes: each packaged one reads in both directions and as a table; each fault is refused with its line."""

import json
import re
import tomllib
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from reshard.errors import Refused
from reshard.recipe_types import BlockScale, Recipe, Rule
from reshard.recipes.recipe import FAMILIES_FOLDER, list_packaged_recipes, load_recipe, parse_recipe
from reshard.recipes.splits import make_rule

PACKAGED = sorted(path.stem for path in FAMILIES_FOLDER.glob("*.toml"))
V3 = (FAMILIES_FOLDER / "deepseek-v3.toml").read_text(encoding="utf-8")
CELL = re.compile(r'"(?:[^"\\]|\\.)*"')
PLACEHOLDER = re.compile(r"\{(.)\}")


def placeholders_of(pattern: str) -> list[str]:
    found: list[str] = PLACEHOLDER.findall(pattern)
    return found


def filled(pattern: str, values: dict[str, str]) -> str:
    return PLACEHOLDER.sub(lambda placeholder: values[placeholder[1]], pattern)


MEMBERS = {"i": "0123", "d": "0", "s": "123", "h": "0", "g": "123", "e": "012", "m": "4"}


def name_pairs(recipe: Recipe, rule: Rule) -> list[tuple[str, str]]:
    """The names on both sides of a rule for a model of 4 layers, the first of another kind, and 3 experts.

    The scale of what is dequantised has no name on the right.
    """
    letters = [letter for letter in placeholders_of(rule.left) if letter not in recipe.scales]
    scale = next((recipe.scales[letter] for letter in placeholders_of(rule.left) if letter in recipe.scales), None)
    ends = [("weight", "weight"), (scale.left, scale.right)] if scale else [("", "")]
    return [
        (
            filled(rule.left, values | dict.fromkeys(recipe.scales, left)),
            filled(rule.right, values | dict.fromkeys(recipe.scales, right))
            if rule.relation == "same" or right == "weight"
            else "",
        )
        for numbers in product(*(MEMBERS.get(letter, "13") for letter in letters))
        for values in [dict(zip(letters, numbers, strict=True))]
        for left, right in ends
    ]


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_recipe_loads_under_the_name_of_its_file(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.origin == str(FAMILIES_FOLDER / f"{name}.toml")
    assert recipe in list_packaged_recipes()


def test_the_folder_is_the_registry() -> None:
    assert [recipe.name for recipe in list_packaged_recipes()] == PACKAGED
    assert {"deepseek-v2", "deepseek-v3"} <= set(PACKAGED)


def test_recipes_of_one_model_type_differ_in_tensors_that_they_want() -> None:
    """The config does not tell them apart, so the names must: one wants a tensor that the other does not know. So what
    has it is not for the other, and what has it not is not for that one.
    """
    recipes = [
        recipe for recipe in list_packaged_recipes() if not (recipe.engine or recipe.by_name)
    ]  # others are asked for
    pairs = [(one, other) for one in recipes for other in recipes if one.name < other.name]
    alike = [(one, other) for one, other in pairs if {*one.model_types} & {*other.model_types}]
    assert [(one.name, other.name) for one, other in alike] == [
        ("deepseek-v4", "deepseek-v4-dspark"),
        ("deepseek-v4", "deepseek-v4-vision"),
        ("deepseek-v4-dspark", "deepseek-v4-vision"),
        ("glm4-moe", "glm4-moe-fp8"),
    ]
    for one, other in alike:
        assert wanted_only_by(one, other) | wanted_only_by(other, one)
    for one, other in pairs:
        if (one, other) not in alike:
            assert not {*one.architectures} & {*other.architectures}


@pytest.mark.parametrize("usual", ["gpt-oss", "mixtral", "qwen3-moe"])
def test_a_recipe_with_cut_experts_differs_from_the_usual_one_in_the_cuts_of_experts_alone(usual: str) -> None:
    whole, cut = load_recipe(usual), load_recipe(f"{usual}-cut-experts")
    assert (whole.by_name, cut.by_name) == (False, True)
    assert (whole.files, whole.carry, whole.model_types) == (cut.files, cut.carry, cut.model_types)
    assert [(rule.left, rule.right) for rule in whole.rules] == [(rule.left, rule.right) for rule in cut.rules]
    other = {mine.left for mine, its in zip(whole.rules, cut.rules, strict=True) if mine.split != its.split}
    assert other == {rule.left for rule in whole.rules if ".experts." in rule.left}


def wanted_only_by(one: Recipe, other: Recipe) -> set[str]:
    """Names that every checkpoint of one recipe has, and the other does not know."""
    wanted = {rule.left for rule in one.rules if rule.relation != "drop" and not (rule.only or rule.optional)}
    return wanted - {rule.left for rule in other.rules}


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_recipe_goes_both_ways(name: str) -> None:
    recipe = load_recipe(name)
    kept = [rule for rule in recipe.rules if rule.relation != "drop"]
    assert kept
    for rule in kept:
        lost = recipe.scales.keys() if rule.relation == "dequantize" else set[str]()
        lost = lost | ({"e"} if rule.relation == "stack" else set())
        assert sorted({*placeholders_of(rule.left)} - lost) == sorted(placeholders_of(rule.right)), rule
    # What the config chooses between, and what is fused, shares a name on purpose.
    alone = [rule for rule in kept if not rule.only.startswith("if tie") and rule.relation in ("same", "dequantize")]
    pairs = [pair for rule in alone for pair in name_pairs(recipe, rule)]
    assert len({left for left, _ in pairs}) == len(pairs)
    named = [right for _, right in pairs if right]
    assert len({*named}) == len(named) > len(pairs) // 2


@pytest.mark.parametrize("name", PACKAGED)
def test_the_rows_of_a_packaged_recipe_stand_in_columns(name: str) -> None:
    text = (FAMILIES_FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    rows = [line for line in text.partition("\nrules = [")[2].splitlines() if line.startswith('["')]
    assert len(rows) == len(tomllib.loads(text)["rules"]) > 10
    starts = [[cell.start() for cell in CELL.finditer(row)] for row in rows if not row.startswith('["drop"')]
    for column in range(6):
        assert len({row[column] for row in starts if len(row) > column}) <= 1, f"column {column + 1}"
    drops = [[cell.start() for cell in CELL.finditer(row)] for row in rows if row.startswith('["drop"')]
    assert all(row == starts[0][: len(row)] for row in drops)


@pytest.mark.parametrize("name", PACKAGED)
def test_every_kept_row_of_a_packaged_recipe_says_its_shape(name: str) -> None:
    rules = [rule for rule in load_recipe(name).rules if rule.relation != "drop"]
    assert [rule.left for rule in rules if not rule.shape] == []


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
    assert mine.scales == {"p": BlockScale("weight_scale_inv", "scale", (64, 64))}
    assert packaged.scales["p"].block == (128, 128)
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
    assert recipe.rules == (make_rule("same", "a", "b", "replicate"),)
    assert (recipe.placeholders, recipe.scales, recipe.sizes, recipe.run) == ({}, {}, {}, {})
    assert (recipe.carry, recipe.model_types, recipe.padded, recipe.checked) == ((), (), (), "")


@pytest.mark.parametrize(
    ("name", "kind", "word"),
    [
        pytest.param("deepseek-v33", "unknown-recipe", "did you mean deepseek-v3?", id="nearly a name"),
        pytest.param("phi", "unknown-recipe", "deepseek-v2, deepseek-v3", id="another name"),
        pytest.param("no/such/recipe.toml", "unknown-recipe", "no/such/recipe.toml", id="no such file"),
        pytest.param(str(FAMILIES_FOLDER), "unknown-recipe", "no such recipe", id="a folder"),
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


def line_with(start: str) -> str:
    (line,) = (line for line in V3.splitlines() if line.startswith(start))
    return line


EMBED = line_with('["same", "model.embed_tokens.weight"').removesuffix(",")
NORM = line_with('["same", "model.norm.weight"').removesuffix(",")
W3 = line_with('["same", "model.layers.{d}.mlp.up_proj.{p}"').removesuffix(",")
GATE = line_with('["same", "model.layers.{s}.mlp.gate.weight"').removesuffix(",")
REST_ROW = line_with('["drop", "model.layers.{m}.{*}"').removesuffix(",")
ABOUT = line_with("about ")
MODEL_TYPES = line_with("model_types ")
PADDED = line_with("padded ")
D_LINE = line_with("placeholders.d")
M_LINE = line_with("placeholders.m")
SCALE = line_with("scales.p")
QK = line_with("sizes.qk")
RUN_DIM = line_with("dim  ")
RUN_DTYPE = line_with("dtype ")
FILES = '"model{rank}-mp{ranks}.safetensors"'


def norm_row(*cells: str) -> str:
    return json.dumps(cells)


MANY_QK = "+".join(["qk"] * 50)

FAULTS = [
    # Not TOML.
    pytest.param('right         = "', "right         = ", "Invalid value", id="a quote missing"),
    pytest.param("placeholders.s =", "placeholders.d =", "Cannot overwrite", id="two placeholders of a name"),
    pytest.param("carry    ", "files    ", "Cannot overwrite", id="a key twice"),
    # Keys.
    pytest.param("carry    ", "carries  ", "carry", id="a misspelled key"),
    pytest.param("left          =", "wrong_key     =", "left", id="an unknown key"),
    pytest.param(ABOUT, "about = 3", "about: a string", id="a number as text"),
    pytest.param(line_with("checked "), "checked = true", "checked: a string", id="a boolean as checked"),
    pytest.param('"huggingface"', '""', "left: a string", id="an empty text"),
    pytest.param('["*token*"]', '"*token*"', "carry: a list of strings", id="a text as list"),
    pytest.param(MODEL_TYPES, 'model_types = ["deepseek_v3", 3]', "model_types: a list of strings",
                 id="a number in a list"),
    pytest.param(FILES, '"model{rank}.safetensors"', "describes = true", id="file names without the ranks"),
    pytest.param(FILES, '"all.safetensors"', "{rank}, and perhaps {ranks}", id="one name for all files"),
    pytest.param(FILES, '"model.safetensors"', "without a fused tensor", id="whole files without a fused tensor"),
    pytest.param(FILES, '"ranks/{rank}-{ranks}.safetensors"', "a file name", id="file names in a folder"),
    pytest.param(FILES, '"{rank}-{ranks}-{host}.safetensors"', "{rank}, and perhaps {ranks}", id="an unknown part"),
    pytest.param(FILES, '"model{rank}-mp{ranks}.safetensors{"', "a file name", id="a stray brace in the file names"),
    pytest.param(FILES, '"model{rank}-mp{ranks}\\u0000"', "a file name", id="a zero byte in the file names"),
    pytest.param('["*token*"]', '["/etc/host*"]', "carry", id="side files by an absolute path"),
    pytest.param('["*token*"]', '["../*"]', "carry", id="side files outside of the folder"),
    pytest.param('["*token*"]', '[""]', "carry", id="side files without a name"),
    pytest.param('["*token*"]', '["token**"]', "carry", id="side files with two stars in a name"),
    # The scale.
    pytest.param(SCALE, "scale = 128", "scale", id="the key that there was"),
    pytest.param(SCALE, "scales = 128", "scales: a table", id="a number as scales"),
    pytest.param(SCALE, "scales.p = 128", "left, right and block", id="a number as scale"),
    pytest.param(SCALE, 'scales.p = { left = "weight_scale_inv", right = "scale" }', "block",
                 id="a scale without block"),
    pytest.param("block = 128", "block = 0", "block: a whole number", id="a block of nothing"),
    pytest.param("block = 128", "block = 128.0", "block: a whole number", id="a block of a float"),
    pytest.param("block = 128", "block = true", "block: a whole number", id="a block of a boolean"),
    pytest.param('right = "scale"', "right = 1", "left and right: strings", id="a number as the name of a scale"),
    pytest.param("block = 128", "block = [128]", "block: a whole number", id="a block of one side"),
    pytest.param("block = 128", "block = [1, 32, 32]", "block: a whole number", id="a block of three sides"),
    pytest.param("block = 128", "block = [1, 0]", "block: a whole number", id="a side of nothing"),
    pytest.param("block = 128", 'block = 128, dtype = "F32"', "left, right and block",
                 id="an unknown field of a scale"),
    pytest.param("block = 128", 'block = 128, packed = "yes", fp8_block = 1', "packed: true or false",
                 id="packed by a text"),
    pytest.param("block = 128", "block = 128, packed = true", "fp8_block", id="packed without the other block"),
    pytest.param("block = 128", "block = 128, fp8_block = 128", "packed", id="another block without packed"),
    pytest.param("block = 128", "block = [1, 32], packed = true, fp8_block = 0", "fp8_block: as block",
                 id="another block of nothing"),
    pytest.param("scales.p =", "scales.pp =", "single lower-case letter", id="a scale of two letters"),
    pytest.param("scales.p =", "scales.P =", "single lower-case letter", id="a scale in upper case"),
    pytest.param("scales.p =", "scales.e =", "numbers nothing", id="a letter for a number and a scale"),
    # Sizes, padding and the run configuration.

    pytest.param(QK, "sizes.qk = 3", "a formula over config keys", id="a number as formula"),
    pytest.param(QK, 'sizes.qk = "num_attention_heads *"', "is not a formula", id="half a formula"),
    pytest.param(QK, 'sizes.qk = "open(1)"', "no number, key", id="a call in a formula"),
    pytest.param(PADDED, 'padded = "intermediate_size"', "padded: a list of strings", id="a text as padded"),
    pytest.param(RUN_DIM, "dim = 3", "a formula over config keys", id="a number as run configuration"),
    pytest.param(RUN_DIM, 'dim = "hidden_size -"', "is not a formula", id="half a formula to run with"),
    pytest.param(RUN_DIM, 'dim = ["hidden_size", 1, 2]', "a formula over config keys",
                 id="a formula with two defaults"),
    pytest.param(QK, "sizes.qk = \"num_attention_heads or 'many'\"", "is no number", id="a word as a size"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "replicate", "[hidden_size or 'many']"),
                 "is no number", id="a word in a shape"),
    pytest.param(D_LINE, "placeholders.d = { counts = \"d\", within = \"i\", size = \"dense or 'few'\" }",
                 "is no number",
                 id="a word as the size of a placeholder"),
    pytest.param(line_with("ranks_divide "), "ranks_divide = [\"heads or 'many'\"]", "is no number",
                 id="a word as what the ranks divide"),
    pytest.param(RUN_DIM, "dim = \"'many' or hidden_size\"", "is no number", id="a word as the first choice"),
    pytest.param(RUN_DIM, f'dim = "{MANY_QK}"', "steps", id="a long formula to run with"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "replicate", f"[{MANY_QK}]"), "steps",
                 id="a long formula as a shape"),
    pytest.param(RUN_DTYPE, 'dtype = ["a - b c", 1]', "is not a formula", id="a wrong formula with its default"),
    # The placeholders.
    pytest.param("placeholders.d =", "placeholders.dd =", "single lower-case letter",
                 id="a placeholder of two letters"),
    pytest.param("placeholders.d =", "placeholders.D =", "single lower-case letter", id="a placeholder in upper case"),
    pytest.param(D_LINE, "placeholders.d = 3", "a table of strings", id="a number as placeholder"),
    pytest.param(D_LINE, "placeholders.d = { counts = 3 }", "a table of strings", id="a number in a placeholder"),
    pytest.param(D_LINE, 'placeholders.d = { within = "i" }', "what the placeholder counts",
                 id="a placeholder that counts nothing"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", inside = "i" }', "inside",
                 id="an unknown field of a placeholder"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", within = "z" }', "another placeholder",
                 id="within no placeholder"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", within = "d" }', "another placeholder", id="within itself"),
    pytest.param(M_LINE, 'placeholders.m = { counts = "m", after = "i" }', "after and marker",
                 id="after without marker"),
    pytest.param(M_LINE, 'placeholders.m = { counts = "m", after = "y", marker = "x.{m}" }', "another placeholder",
                 id="after no placeholder"),
    pytest.param('marker = "model.layers.{m}', 'marker = "model.layers.{i}', "marker",
                 id="a marker of another placeholder"),
    pytest.param('marker = "model.layers.{m}.', 'marker = "model.', "marker", id="a marker without a placeholder"),
    pytest.param('like = "is"', 'like = "iz"', "the placeholder 'z'", id="like a placeholder that there is not"),
    pytest.param('like = "is"', 'like = "im"', "another placeholder", id="like itself"),
    pytest.param(M_LINE, 'placeholders.m = { counts = "m", like = "i" }', "like", id="like without after"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", some_of = "z" }', "another placeholder",
                 id="some of no placeholder"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", some_of = "i", within = "i" }', "within or some_of",
                 id="within and some of"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", within = "i", picked_by = "kinds" }', "picked_by and picked",
                 id="picked by no values"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", within = "i", picked = [1] }', "picked_by and picked",
                 id="picked by no key"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", within = "i", picked_by = "kinds", picked = 4 }',
                 "picked_by and picked", id="a number as what is picked"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", within = "i", picked_by = "kinds", picked = [4.5] }',
                 "picked_by and picked", id="a fraction in what is picked"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", every = "step" }', "every with within",
                 id="every by itself"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", within = "i", every = "2 *" }', "is not a formula",
                 id="half a formula as every"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", within = "i", first = "n" }', "first with every",
                 id="first without every"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", within = "i", picked_by = "k", picked = [4], others = "x" }',
                 "others with picked_by and some_of", id="others within"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", within = "i", listed = "dense" }', "listed with some_of",
                 id="listed within"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", some_of = "i", listed = "dense layers" }',
                 "is not a formula",
                 id="listed by two words"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", some_of = "i", listed_from = 1 }', "listed_from with listed",
                 id="a list that begins at 1, and no list"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", some_of = "i", listed = "dense", listed_from = "1" }',
                 "the whole number that the list has for member 0", id="a list that begins at a text"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", size = "n", optional = "not needed" }',
                 "optional without size", id="a number of what may be left out"),
    pytest.param(line_with("checked "), "whole_only = true", "whole_only: a string", id="a boolean as whole_only"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", within = "i", size = "2 *" }', "is not a formula",
                 id="half a formula as size"),
    pytest.param(line_with("ranks_divide "), 'ranks_divide = ["heads", "a b"]', "is not a formula",
                 id="two words as what the ranks divide"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", picked_by = "kinds", picked = [4] }', "within or some_of",
                 id="picked from nothing"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", only = "unless dense" }', "only: 'if KEY'",
                 id="a condition that is not an if"),
    pytest.param(D_LINE, 'placeholders.d = { counts = "d", within = "i", only = "if dense" }',
                 "counts from 0 by itself", id="a condition within another placeholder"),
    pytest.param('rows_of = "model.layers.{s}', 'rows_of = "model.layers.{z}', "rows_of",
                 id="rows of an unknown placeholder"),
    pytest.param('rows_of = "model.layers.{s}.mlp.gate.weight"', 'rows_of = "model.layers.{s}.gate.weight"',
                 "the left name of a row", id="rows of a tensor under no row"),
    pytest.param(RUN_DTYPE, 'dtype = "target.z"', "target.z", id="how many of no placeholder the target has"),
    pytest.param(RUN_DTYPE, 'dtype = ["2 * (target.pack + 1)", 2]', "target.pack",
                 id="what nobody knows of the target"),
    # The rows.
    pytest.param(EMBED, EMBED.replace('"same", ', ""), "a relation", id="a row without relation"),
    pytest.param(EMBED, "[]", "4 to 6 strings", id="an empty row"),
    pytest.param(EMBED, '["same", "a", "b"]', "4 to 6 strings", id="a row of three"),
    pytest.param(EMBED, '["same", "a", "b", "rows", "[x]", "if x", "y"]', "4 to 6 strings", id="a row of seven"),
    pytest.param(EMBED, '["same", "a", "b", 0]', "4 to 6 strings", id="a number in a row"),
    pytest.param(EMBED, '"same"', "4 to 6 strings", id="a text as row"),
    pytest.param(NORM, NORM.replace("same", "move"), "same, dequantize, drop", id="an unknown relation"),
    pytest.param(NORM, NORM.replace("same", "drop"), "the reason", id="a drop that keeps"),
    pytest.param(REST_ROW, norm_row("drop", "model.layers.{m}.{*}", "", ""), "the reason", id="a drop without reason"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "copy"), "a split", id="an unknown split"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "by e"), "a split",
                 id="dealt by a placeholder of no name"),
    pytest.param(W3, W3.replace('"rows"', '"by d"'), "a placeholder with 'within'",
                 id="dealt by a placeholder within another"),
    pytest.param(W3, W3.replace('"rows"', '"by m"').replace("{d}", "{m}"), "a placeholder with 'after'",
                 id="dealt by a placeholder after another"),
    pytest.param(GATE, GATE.replace('"replicate"', '"by s"'), "which {m} is like", id="dealt by what another is like"),
    pytest.param(W3, W3.replace('"rows"', '"by p"'), "a split", id="dealt by weight and scale"),
    pytest.param(NORM, norm_row("same", "", "norm.weight", "replicate"), "the name on the left",
                 id="no name on the left"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.{i}.weight", "replicate"), "the same placeholders",
                 id="a placeholder on the right only"),
    pytest.param(NORM, norm_row("same", "model.{i}.norm", "norm", "replicate"), "the same placeholders",
                 id="a placeholder on the left only"),
    pytest.param(NORM, norm_row("same", "model.{i}.norm", "norm.{s}", "replicate"), "the same placeholders",
                 id="another placeholder"),
    pytest.param(NORM, norm_row("same", "model.{k}.norm", "norm.{k}", "replicate"), "{k}", id="an unknown placeholder"),
    pytest.param(NORM, norm_row("same", "model.{i}.{i}", "norm.{i}.{i}", "replicate"), "each placeholder once",
                 id="a placeholder twice"),
    pytest.param(NORM, norm_row("same", "model.{i}.norm", "{i}.norm", "replicate"), "begins with text",
                 id="a name that begins with a placeholder"),
    pytest.param(NORM, norm_row("same", "0.weight", "norm.weight", "replicate"), "begins with text",
                 id="a name that begins with a number"),
    pytest.param(NORM, norm_row("drop", "{*}", "", "all else"), "begins with text", id="a drop of everything"),
    pytest.param(NORM, norm_row("same", "model.x{i}.norm", "norm.x{i}", "replicate"), "between two dots",
                 id="a placeholder that is part of a word"),
    pytest.param(NORM, norm_row("same", "model..norm", "norm", "replicate"), "between two dots",
                 id="an empty component"),
    pytest.param(NORM, norm_row("same", "model.{*}", "norm.{*}", "replicate"), "{*}",
                 id="the rest of a name in a same"),
    pytest.param('"model.layers.{m}.{*}"', '"model.{*}.layers.{m}"', "{*} at the end only",
                 id="the rest of a name in the middle"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "replicate", "", "when x"), "if KEY",
                 id="an unknown condition"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "replicate", "", "if"), "if KEY",
                 id="a condition cut off"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "replicate", "if x"), "[rows, columns]",
                 id="a condition in the place of the shape"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "replicate", "hidden_size"),
                 "[rows, columns]", id="a shape without brackets"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "replicate", "[hidden size]"),
                 "is not a formula", id="two words as a size"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "replicate", "[hidden_size,, 3]"),
                 "is not a formula", id="a size that is empty"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "replicate", "FP32 [hidden_size]"),
                 "a dtype", id="an unknown dtype"),
    pytest.param(NORM, norm_row("dequantize", "model.norm.weight", "norm.weight", "replicate"), "block scale",
                 id="dequantised without a scale"),
    pytest.param(W3, W3.replace('"same"', '"dequantize"'), "the same placeholders",
                 id="dequantised with a scale on the right"),
    pytest.param(NORM, norm_row("same", "model.embed_tokens.weight", "norm.weight", "replicate"), "in one row",
                 id="a left name twice"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "embed.weight", "replicate"), "in one row",
                 id="a right name twice"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "replicate", "", "if {q}"),
                 "that the name does not have", id="a condition on no placeholder"),
    pytest.param(NORM, norm_row("same", "a.{i}.weight", "b.{i}.weight", "replicate", "", "if {i}"),
                 "that the name does not have", id="a condition on a placeholder of the name"),
    pytest.param(NORM, norm_row("same", "model.norm.weight", "norm.weight", "replicate", "", "unless {m}"),
                 "'maybe if KEY'; 'if {m}'", id="an opposite condition on a placeholder"),
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


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.{m}.mlp.gate.weight",  # by the row for {s}
        "model.layers.3.mlp.gate.weight",
        "model.layers.{i}.self_attn.o_proj.weight",  # by {p}
        "model.layers.{m}.any.router.weight",  # by a drop of the rest
    ],
)
def test_rows_of_is_a_name_under_any_row(name: str) -> None:
    text, _ = edited('rows_of = "model.layers.{s}.mlp.gate.weight"', f'rows_of = "{name}"')
    assert parse_recipe(text, "mine.toml").placeholders["e"].rows_of == name


def test_what_some_have_is_not_dealt() -> None:
    """Their numbers have gaps."""
    row = norm_row("same", "model.{d}.norm", "norm.{d}", "by d")
    text = V3.replace(D_LINE, 'placeholders.d = { counts = "dense layers", some_of = "i" }').replace(NORM, row)
    with pytest.raises(Refused, match="a placeholder with 'some_of'"):
        parse_recipe(text, "mine.toml")


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
    text, first = edited(EMBED, EMBED.replace('"rows"', '"by q"'))
    second = text[: text.index(NORM)].count("\n") + 1
    text = text.replace(NORM, norm_row("same", "model.norm.weight", "norm.{i}.weight", "sideways"))
    with pytest.raises(Refused) as caught:
        parse_recipe(text, "mine.toml")
    lines = [problem.subject for problem in caught.value.problems]
    assert lines == [f"mine.toml:{first}", f"mine.toml:{second}", f"mine.toml:{second}"]


def test_a_name_twice_is_told_with_both_lines() -> None:
    text, line = edited(NORM, norm_row("same", "model.embed_tokens.weight", "norm.weight", "replicate"))
    first = text[: text.index(EMBED)].count("\n") + 1
    with pytest.raises(Refused) as caught:
        parse_recipe(text, "mine.toml")
    assert [(problem.subject, problem.found) for problem in caught.value.problems] == [
        (f"mine.toml:{number}", "'model.embed_tokens.weight' on the left 2 times") for number in (first, line)
    ]


def test_a_row_may_span_lines_and_is_named_by_its_last() -> None:
    text, line = edited(NORM, '["same", "model.norm.weight",\n"norm.weight",\n"sideways"]')
    with pytest.raises(Refused) as caught:
        parse_recipe(text, "mine.toml")
    assert [problem.subject for problem in caught.value.problems] == [f"mine.toml:{line + 2}"]


@pytest.mark.parametrize("word", ["placeholders", "scales", "sizes", "run"])
@pytest.mark.parametrize("value", ["3", '"text"', "[]", "true", "2020-01-01"])
def test_what_should_be_a_table_is_refused_if_it_is_not(word: str, value: str) -> None:
    lines = [line for line in V3.splitlines() if not line.startswith(f"{word}.")]
    text = "\n".join(lines).replace("[run]", "[run]" if word != "run" else "[placeholders.run]")
    with pytest.raises(Refused) as caught:
        parse_recipe(f"{word} = {value}\n{text}", "mine.toml")
    assert {problem.kind for problem in caught.value.problems} == {"wrong-recipe"}
    assert f"{word}: a table" in [problem.expected for problem in caught.value.problems]


def test_a_recipe_has_two_kinds_of_scales_at_most_one_a_row() -> None:
    other = 'scales.q = { left = "scale", right = "scale", block = [1, 32], packed = true, fp8_block = 128 }'
    recipe = parse_recipe(V3.replace(SCALE, f"{SCALE}\n{other}"), "mine.toml")
    assert recipe.scales["q"] == BlockScale("scale", "scale", (1, 32), packed=True, fp8_block=(128, 128))
    row = norm_row("same", "model.{p}.{q}", "norm.{p}.{q}", "replicate")
    with pytest.raises(Refused, match="one placeholder for a weight and its block scale"):
        parse_recipe(V3.replace(SCALE, f"{SCALE}\n{other}").replace(NORM, row), "mine.toml")


def test_what_is_like_another_has_its_rows_too() -> None:
    rules = load_recipe("deepseek-v3").rules
    reason = "DeepSeek's inference code has no multi-token prediction"
    gate = "model.layers.{%s}.mlp.gate.weight", "layers.{%s}.ffn.gate.weight"
    assert [(rule.left, rule.right, rule.optional) for rule in rules if rule.left.endswith("}.mlp.gate.weight")] == [
        (gate[0] % "s", gate[1] % "s", ""),
        (gate[0] % "m", gate[1] % "m", reason),
    ]
    like = [rule for rule in rules if "{i}" in rule.left or "{s}" in rule.left]
    optional = [rule for rule in rules if rule.optional]
    own = {"embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"}
    assert len(optional) == len(like) + len(own)
    assert {rule.left for rule in optional} >= {f"model.layers.{{m}}.{name}.weight" for name in own}
    # Of the dense layers an MTP layer has nothing.
    assert not [rule for rule in optional if "{d}" in rule.left or rule.left.endswith("{m}.mlp.up_proj.{p}")]


def test_right_names_that_only_a_marker_tells_apart_are_sound() -> None:
    """As if somebody had written out what `like` says."""
    row = '["same", "model.layers.{m}.input_layernorm.weight", "layers.{m}.attn_norm.weight", "replicate"],'
    written = V3.replace('like = "is", ', "").replace(NORM + ",", f"{NORM},\n{row}")
    assert written.count("attn_norm") == 2
    parse_recipe(written, "mine.toml")
    with pytest.raises(Refused) as caught:
        parse_recipe(written.replace("{m}.attn_norm", "{d}.attn_norm").replace("{m}.input", "{d}.input"), "mine.toml")
    (problem,) = caught.value.problems
    assert "'layers.{i}.attn_norm.weight' and 'layers.{d}.attn_norm.weight' on the right" in problem.found
    assert problem.subject == f"mine.toml:{written.splitlines().index(row) + 1}"


def test_rows_beside_what_is_optional_are_optional_too() -> None:
    optional = {rule.left for rule in load_recipe("qwen3-next").rules if rule.optional}
    beside = {rule.left for rule in load_recipe("qwen3-next").rules if rule.only == "if {m}"}
    assert beside == {f"mtp.{name}.weight" for name in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    assert beside < optional
    assert all("mtp." in name for name in optional)


@pytest.mark.parametrize(
    "row", ['"scoring_func"', '["scoring_func"]', '["a +", 1]', '["a", "=b +"]', '["a", [1]]', "[\"a or 'b'\", 1]"]
)
def test_what_the_code_needs_is_a_formula_and_its_values(row: str) -> None:
    text = (FAMILIES_FOLDER / "deepseek-v3.toml").read_text(encoding="utf-8")
    parse_recipe(text, "own.toml")
    with pytest.raises(Refused) as refused:
        parse_recipe(text.replace("run_needs = [", f"run_needs = [{row},"), "own.toml")
    assert all(problem.kind == "wrong-recipe" for problem in refused.value.problems)
    assert len(refused.value.problems) == 1


def test_packaged_recipes_have_no_faults() -> None:
    # A command does not check them again.
    assert [load_recipe(recipe.origin) for recipe in list_packaged_recipes()] == list(list_packaged_recipes())
    assert len(list_packaged_recipes()) == len(list(FAMILIES_FOLDER.glob("*.toml")))
