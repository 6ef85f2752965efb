"""The dtypes of the inference code's parameters, as the recipes have them: against the models, and what is refused."""

import handmade
import pytest
import skeletons
from skeletons import BF16, F32, Parameters
from skeletons_v4 import v4_0731_parameters, v4_parameters, v4_vision_parameters, v41_parameters

from reshard.errors import Refused
from reshard.numbered_names import split_name
from reshard.recipe_types import Recipe, Rule
from reshard.recipes.patterns import make_patterns
from reshard.recipes.recipe import load_recipe, parse_recipe

DTYPES = {"BF16": BF16, "F32": F32}
MODELS: dict[str, Parameters] = {
    "deepseek-v2": skeletons.v3_parameters({**handmade.V3, "dtype": "bf16"}, 1, 0, gate_bias=False),
    "deepseek-v3": skeletons.v3_parameters(handmade.V3, 1, 0, gate_bias=True),
    "deepseek-v32": skeletons.v32_parameters(handmade.V3, 1, 0, gate_bias=True),
    "deepseek-v4": v4_parameters(handmade.V4, 1, 0),
    "deepseek-v4-dspark": v4_0731_parameters(handmade.V4_0731, 1, 0),
    "deepseek-v4-vision": v4_vision_parameters(handmade.V4_0731 | handmade.VISION, 1, 0),
    "deepseek-v41": v41_parameters(handmade.V41, 1, 0),
}
"""Of one rank: the parameters of each model, with names of the right side."""
ONE_LAYER = {"layers.3.attn.compressor.wkv.weight"}
"""BF16 in the layer of V4.1 that compresses nothing, and F32 in all others: a recipe has one dtype for them."""


def rules_by_name(recipe: Recipe) -> dict[str, list[Rule]]:
    """The rules by their right names, numbers as `#`."""
    found: dict[str, list[Rule]] = {}
    for number, rule in enumerate(recipe.rules):
        for pattern in make_patterns(number, rule, recipe) if rule.relation != "drop" and not rule.optional else ():
            name = pattern.right.replace("%%", "%").replace("%s", "0")
            found.setdefault(split_name(name)[0], []).append(rule)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_the_listed_dtypes_are_those_of_the_model(name: str) -> None:
    recipe = load_recipe(name)
    rules, seen = rules_by_name(recipe), set()
    for parameter, (_, dtype) in MODELS[name].items():
        if dtype not in DTYPES.values() or parameter.endswith(".scale") or parameter in ONE_LAYER:
            continue
        said = {rule.code_dtype for rule in rules[split_name(parameter)[0]]}
        wanted = next(word for word, known in DTYPES.items() if known == dtype)
        assert said <= {wanted, ""}, parameter
        assert wanted == "BF16" or "" not in said, parameter
        seen |= said
    assert "F32" in seen or name == "deepseek-v2"


RECIPE = """
name  = "small"
about = "small"
left  = "huggingface"
right = "engine"
files = "model{rank}-mp{ranks}.safetensors"
placeholders.i = { counts = "layers" }
placeholders.m = { counts = "later layers", after = "i", marker = "a.{m}.mark", like = "i", optional = "later" }
code_dtypes.F32    = ["gate.*.bias"]
code_dtypes.others = "BF16"
rules = [
["same", "a.{i}.bias",   "gate.{i}.bias",   "replicate", "[?]"],
["same", "a.{i}.weight", "gate.{i}.weight", "replicate"],
["same", "a.{i}.table",  "gate.{i}.table",  "replicate", "I64 [?]"],
["same", "a.{m}.mark",   "gate.{m}.mark",   "replicate"],
["drop", "a.{i}.{*}",    "",                "unused"],
]
"""


def test_a_list_is_over_right_names_and_holds_for_layers_that_are_like() -> None:
    rules = {rule.left: rule.code_dtype for rule in parse_recipe(RECIPE, "small").rules}
    assert rules == {
        "a.{i}.bias": "F32",
        "a.{i}.weight": "BF16",
        "a.{i}.table": "I64",
        "a.{m}.mark": "BF16",
        "a.{i}.{*}": "",
        "a.{m}.bias": "F32",
        "a.{m}.weight": "BF16",
        "a.{m}.table": "I64",
        "a.{m}.{*}": "",
    }


def test_without_others_a_recipe_tells_of_the_listed_only() -> None:
    text = RECIPE.replace('code_dtypes.others = "BF16"', "")
    rules = {rule.left: rule.code_dtype for rule in parse_recipe(text, "small").rules}
    assert (rules["a.{i}.bias"], rules["a.{i}.weight"]) == ("F32", "")


@pytest.mark.parametrize(
    ("old", "new", "line", "found"),
    [
        ('F32    = ["gate.*.bias"]', 'F33 = ["gate.*.bias"]', 9, "'F33'"),
        ('F32    = ["gate.*.bias"]', 'F32 = "gate.*.bias"', 9, "'gate.*.bias'"),
        ('F32    = ["gate.*.bias"]', 'F32 = ["a.*.bias"]', 9, "'a.*.bias'"),
        ('F32    = ["gate.*.bias"]', 'F32 = ["gate.*.bias", "head"]', 9, "'head'"),
        ('others = "BF16"', 'others = ["BF16"]', 10, "['BF16']"),
        ('others = "BF16"', 'others = "bf16"', 10, "'bf16'"),
        ('others = "BF16"', 'F16 = ["gate.{i}.*"]', 10, "'gate.{i}.bias', listed as F32 and F16"),
    ],
)
def test_a_faulty_table_is_refused_with_its_line(old: str, new: str, line: int, found: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_recipe(RECIPE.replace(old, new), "small.toml")
    assert [(problem.subject, problem.found) for problem in caught.value.problems] == [(f"small.toml:{line}", found)]


def test_a_table_that_is_none_is_refused() -> None:
    text = RECIPE.replace('code_dtypes.F32    = ["gate.*.bias"]', "").replace("code_dtypes.others", "code_dtypes")
    with pytest.raises(Refused, match="a table of lists of names"):
        parse_recipe(text, "small.toml")
