"""Problems come in the order of the layers, whatever the order of the tensors in the files."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from jobs import make_plan

from reshard.errors import Problem, Refused
from reshard.recipes.recipe import load_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.problem_order import sort_by_layer, sort_problems
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.types import Checkpoint, Layout

V3 = load_recipe("deepseek-v3")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Twelve layers, tensors in the order of their names: layer 10 before layer 2."""
    folder = tmp_path_factory.mktemp("order") / "source"
    write_checkpoint(folder, {**SMALL_V3, "num_hidden_layers": 12}, files=1)
    found = read_checkpoint(folder)
    return replace(found, tensors=dict(sorted(found.tensors.items())))


def find_problems(checkpoint: Checkpoint, lost: Iterable[str]) -> list[Problem]:
    gone = set(lost)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in gone}
    with pytest.raises(Refused) as refused:
        make_plan(replace(checkpoint, tensors=tensors), V3, Layout(2))
    return list(refused.value.problems)


def test_names_are_sorted_by_number_and_keep_their_order_within_a_layer() -> None:
    names = ["a.10.x", "a.10.w", "a.2.e.10.w", "z", "a.2.e.9.w", "a.2.x"]
    assert [names[place] for place in sort_by_layer(names)] == [
        *("a.2.x", "a.2.e.9.w", "a.2.e.10.w", "a.10.x", "a.10.w", "z")
    ]


def test_problems_of_one_kind_stay_together() -> None:
    problems = [Problem(kind, name, "", "") for kind, name in (("b", "a.3"), ("a", "a.10"), ("b", "a.1"), ("a", "a.9"))]
    assert [(one.kind, one.subject) for one in sort_problems(problems)] == [
        *(("b", "a.1"), ("b", "a.3"), ("a", "a.9"), ("a", "a.10"))
    ]


def test_missing_tensors_come_layer_by_layer(deep: Checkpoint) -> None:
    lost = [f"model.layers.{layer}.{norm}_layernorm.weight" for layer in (9, 10, 2) for norm in ("input",)]
    lost += [f"model.layers.{layer}.self_attn.q_a_layernorm.weight" for layer in (10, 2)]
    assert [problem.subject for problem in find_problems(deep, lost)] == [
        "model.layers.2.input_layernorm.weight",
        "model.layers.2.self_attn.q_a_layernorm.weight",
        "model.layers.9.input_layernorm.weight",
        "model.layers.10.input_layernorm.weight",
        "model.layers.10.self_attn.q_a_layernorm.weight",
    ]


def test_weights_without_their_scales_come_layer_by_layer(deep: Checkpoint) -> None:
    weights = [
        f"model.layers.{layer}.self_attn.{part}.weight" for layer in range(12) for part in ("q_b_proj", "o_proj")
    ]
    found = find_problems(deep, [f"{weight}_scale_inv" for weight in weights])
    assert {problem.kind for problem in found} == {"weight-without-scale"}
    assert [problem.subject for problem in found] == weights


def test_layers_of_the_middle_are_one_gap(deep: Checkpoint) -> None:
    lost = [name for name in deep.tensors if name.startswith(("model.layers.5.", "model.layers.6."))]
    found = find_problems(deep, lost)
    assert [(problem.kind, problem.found) for problem in found if problem.subject == "layers"] == [
        ("gap", "layers 0-4, 7-11"),
        ("contradiction", "10 by the names of the tensors (0-4, 7-11)"),
    ]


def test_a_number_of_layers_that_is_too_small_is_to_be_corrected(deep: Checkpoint) -> None:
    stale = replace(deep, config={**(deep.config or {}), "num_hidden_layers": 11})
    (problem,) = find_problems(stale, [])
    assert "11, as num_hidden_layers of config.json says" in problem.expected
    assert "set num_hidden_layers to 12" in problem.remedy
