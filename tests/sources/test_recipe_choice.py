"""Several recipes for one model type, or no config: a faulty checkpoint has the problems of the nearest one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES

from reshard.errors import Problem, Refused
from reshard.recipes.formulas import describe_values, suggest_count
from reshard.recipes.recipe import list_packaged_recipes, load_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.recipe_choice import choose_recipe, explain_other_model
from reshard.synthetic import write_tensors
from reshard.types import Checkpoint

RECIPES = [recipe for recipe in list_packaged_recipes() if not (recipe.engine or recipe.by_name)]
V4 = {
    "deepseek-v4-flash": ("deepseek-v4", "deepseek-v4-dspark, deepseek-v4-vision fit"),
    "deepseek-v4-flash-0731": ("deepseek-v4-dspark", "deepseek-v4, deepseek-v4-vision fit"),
    "deepseek-v4-flash-vision": ("deepseek-v4-vision", "deepseek-v4, deepseek-v4-dspark fit"),
}
LOST = "layers.3.attn.wq_a.weight"


@pytest.fixture(scope="module", params=V4)
def v4(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Checkpoint]:
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("choice") / "source"
    write_tensors(folder, family.tensors(family.small), family.small, 2, sparse=True)
    return request.param, read_checkpoint(folder)


def without(checkpoint: Checkpoint, is_lost: Callable[[str], bool]) -> Checkpoint:
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_lost(name)}
    return replace(checkpoint, tensors=tensors)


def find_problems(checkpoint: Checkpoint) -> list[Problem]:
    with pytest.raises(Refused) as refused:
        choose_recipe(checkpoint, RECIPES)
    return list(refused.value.problems)


def test_a_missing_tensor_of_one_of_two_families_is_a_missing_tensor(v4: tuple[str, Checkpoint]) -> None:
    name, checkpoint = v4
    own, other = V4[name]
    (problem,) = find_problems(without(checkpoint, lambda tensor: tensor == LOST))
    assert (problem.kind, problem.subject) == ("missing-tensor", LOST)
    assert problem.expected.endswith(f"(by the recipe {own}; {other} worse)")
    assert "recipe" not in problem.remedy


def test_a_missing_tensor_without_a_config_is_a_missing_tensor(v4: tuple[str, Checkpoint]) -> None:
    name, checkpoint = v4
    lost = replace(without(checkpoint, lambda tensor: tensor == LOST), config=None)
    (problem,) = find_problems(lost)
    assert (problem.kind, problem.subject) == ("missing-tensor", LOST)
    assert f"(by the recipe {V4[name][0]})" in problem.expected


def test_an_unknown_tensor_without_a_config_is_under_no_rule_of_the_nearest(v4: tuple[str, Checkpoint]) -> None:
    name, checkpoint = v4
    strange = checkpoint.tensors[LOST]._replace(name="layers.3.attn.strange")
    (problem,) = find_problems(replace(checkpoint, tensors={**checkpoint.tensors, strange.name: strange}, config=None))
    assert (problem.kind, problem.subject) == ("no-rule", strange.name)
    assert f"a rule of {V4[name][0]}" in problem.expected


def test_many_unknown_names_without_a_config_are_of_no_recipe(v4: tuple[str, Checkpoint]) -> None:
    tensors = {f"other.{name}": tensor._replace(name=f"other.{name}") for name, tensor in v4[1].tensors.items()}
    (problem,) = find_problems(replace(v4[1], tensors=tensors, config=None))
    assert problem.kind == "no-recipe"
    assert problem.remedy.startswith("put the model's config.json beside the files")


@pytest.mark.parametrize("v4", ["deepseek-v4-flash", "deepseek-v4-flash-0731"], indirect=True)
def test_v4_without_mtp_is_told_what_to_change_and_that_works(v4: tuple[str, Checkpoint]) -> None:
    bare = without(v4[1], lambda tensor: tensor.startswith("mtp."))
    config: dict[str, Any] = dict(bare.config or {})
    ratios, layers = config["compress_ratios"], config["num_hidden_layers"]
    (problem,) = [one for one in find_problems(bare) if one.subject == "MTP blocks"]
    assert problem.kind == "contradiction"
    assert problem.found == "0 by the names of the tensors (none)"
    assert (
        f"{len(ratios) - layers}, as len(compress_ratios) - num_hidden_layers of config.json says" in problem.expected
    )
    assert f"len(compress_ratios) is {len(ratios)}, num_hidden_layers is {layers}" in problem.expected
    change = (
        f"shorten compress_ratios to its first {layers} values and set num_nextn_predict_layers to 0, in config.json"
    )
    assert change in problem.remedy
    mended = {**config, "compress_ratios": ratios[:layers], "num_nextn_predict_layers": 0}
    assert choose_recipe(replace(bare, config=mended), RECIPES)[1].counts["m"] == 0


def test_the_values_of_a_formula_are_named() -> None:
    config = {"a": 3, "b": {"c": [1, 2]}, "d": None}
    assert describe_values("a + len(b.c) * ceil(a / 2) + d", config) == "a is 3, len(b.c) is 2"
    assert describe_values("a", config) == ""
    assert suggest_count("a", config, 1) == "set a to 1"
    assert suggest_count("len(b.c) - a", config, 1) == "shorten b.c to its first 4 values"
    assert suggest_count("a * 2", config, 1) == ""


QWEN3_MOE = [
    *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    *(
        f"model.layers.0.self_attn.{name}.weight"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    ),
    *(f"model.layers.0.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm", "mlp.gate")),
    *(f"model.layers.0.mlp.experts.{e}.{name}_proj.weight" for e in range(4) for name in ("gate", "up", "down")),
]


def test_a_config_of_another_model_is_one_problem(tmp_path: Path) -> None:
    tensors = [(name, "BF16", (4, 4)) for name in QWEN3_MOE]
    for place, more in enumerate(([], [("strange.weight", "BF16", (4, 4))])):
        write_tensors(tmp_path / str(place), [*tensors, *more], {"model_type": "llama"}, 1)
    (problem,) = find_problems(read_checkpoint(tmp_path / "0"))
    assert (problem.kind, problem.subject) == ("contradiction", str(tmp_path / "0"))
    assert problem.found.startswith("all names are of ")
    assert "qwen3-moe" in problem.found.partition(";")[0]
    assert "llama does not know 15 of them" in problem.found
    assert problem.remedy.startswith("is config.json another model's? else another --recipe")
    assert {one.kind for one in find_problems(read_checkpoint(tmp_path / "1"))} == {"no-rule"}


def test_the_hint_of_another_model_is_that_of_an_unknown_name(tmp_path: Path) -> None:
    """A problem of another kind may come first, and may have no hint."""
    write_tensors(tmp_path, [(name, "BF16", (4, 4)) for name in QWEN3_MOE], {"model_type": "llama"}, 1)
    first = Problem("contradiction", "config.json", "found", "expected", "another hint")
    for remedy, wanted in (("add a rule", "is config.json another model's? else add a rule"), ("", "another model's?")):
        unknown = [Problem("no-rule", name, "no rule", "one", remedy) for name in QWEN3_MOE if ".mlp." in name]
        (problem,) = explain_other_model(
            read_checkpoint(tmp_path), load_recipe("llama"), list_packaged_recipes(), Refused([first, *unknown])
        ).problems
        assert problem.remedy.endswith(wanted)
