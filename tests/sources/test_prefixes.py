"""Names with a prefix, or without one: the conversion changes them by itself if all fit then, and says it."""

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from families import write_small
from prefixed import (
    LLAMA,
    QWEN3,
    WAYS,
    add_prefix,
    leave_out_body,
    make_tensors,
    name_text_model,
    write_model_as,
    write_tensors_as,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import reshard
from reshard.cli.main import main
from reshard.errors import Problem, Refused
from reshard.recipes.recipe import list_packaged_recipes
from reshard.sources.prefixes import WRAPPERS, KnownNames, is_known, list_renamings
from reshard.sources.source import read_source


def refusal(source: Path, **options: Any) -> tuple[Problem, ...]:
    with pytest.raises(Refused) as caught:
        read_source(source, **options)
    return caught.value.problems


def notes(source: Path, **options: Any) -> list[str]:
    return [f"{note.kind}: {note.text}" for note in read_source(source, **options).checkpoint.notes]


@pytest.mark.parametrize("way", WAYS)
def test_all_names_fit_once_the_prefix_is_changed(way: str, tmp_path: Path) -> None:
    rename, said = WAYS[way]
    tensors = write_model_as(tmp_path / "source", rename)
    found = read_source(tmp_path / "source")
    assert list(found.checkpoint.tensors) == [tensor.name for tensor in found.checkpoint.tensors.values()]
    assert set(found.checkpoint.tensors) == set(tensors)
    assert found.recipe.name == "llama"
    assert notes(tmp_path / "source") == [f"renamed: {said}"]


def test_names_that_fit_stay(tmp_path: Path) -> None:
    write_model_as(tmp_path / "source", lambda name: name)
    found = read_source(tmp_path / "source")
    assert not found.checkpoint.notes
    assert not found.origin.renaming


def test_the_recipe_is_the_one_asked_for_or_found_by_the_names(tmp_path: Path) -> None:
    write_model_as(tmp_path / "asked", add_prefix("module."), {**LLAMA, "model_type": "mine", "architectures": []})
    assert notes(tmp_path / "asked", recipe="llama") == ["renamed: all 21 names: `module.` in front was taken off"]
    write_small(tmp_path / "v3", "deepseek-v3", index=False)
    (tmp_path / "v3" / "config.json").unlink()
    for path in (tmp_path / "v3").glob("*.safetensors"):
        save_file({"_orig_mod." + name: tensor for name, tensor in load_file(path).items()}, path)
    clean = tmp_path / "clean"
    write_small(clean, "deepseek-v3", index=False)
    (clean / "config.json").unlink()
    assert (
        read_source(tmp_path / "v3", "deepseek-v3").checkpoint.tensors.keys()
        == read_source(clean, "deepseek-v3").checkpoint.tensors.keys()
    )


def test_a_recipe_without_model_in_front_takes_it_off(tmp_path: Path) -> None:
    write_small(tmp_path / "v4", "deepseek-v4-flash", index=False)
    wanted = set(read_source(tmp_path / "v4").checkpoint.tensors)
    for path in (tmp_path / "v4").glob("*.safetensors"):
        save_file({"model." + name: tensor for name, tensor in load_file(path).items()}, path)
    found = read_source(tmp_path / "v4")
    assert set(found.checkpoint.tensors) == wanted
    assert [note.text for note in found.checkpoint.notes] == [
        f"all {len(wanted):,} names: `model.` in front was taken off"
    ]


def test_embedding_models_have_no_model_in_front_and_no_head(tmp_path: Path) -> None:
    tied = {**QWEN3, "tie_word_embeddings": True}
    tensors = write_model_as(tmp_path / "source", leave_out_body, tied, files=1)
    assert set(read_source(tmp_path / "source").checkpoint.tensors) == set(tensors)
    assert notes(tmp_path / "source") == ["renamed: all 24 names: `model.` was put in front"]
    untied = tmp_path / "untied"
    write_model_as(untied, leave_out_body, QWEN3, files=1, without="lm_head.weight")
    (problem,) = refusal(untied)
    assert (problem.kind, problem.subject) == ("missing-tensor", "lm_head.weight")
    assert "a model without it has tie_word_embeddings true in its config.json: set it so" in problem.remedy
    assert "all 24 names: `model.` was put in front" in problem.found


def test_a_missing_tensor_is_told_under_the_names_of_the_recipe(tmp_path: Path) -> None:
    write_model_as(tmp_path / "source", add_prefix("module."), without="model.layers.1.mlp.up_proj.weight")
    (problem,) = refusal(tmp_path / "source")
    assert problem.kind == "missing-tensor"
    assert problem.subject == "model.layers.1.mlp.up_proj.weight"
    assert problem.found == "not in the checkpoint (all 20 names: `module.` in front was taken off)"


def test_problems_of_the_plan_tell_of_the_renaming_too(tmp_path: Path) -> None:
    write_model_as(tmp_path / "source", add_prefix("module."))
    with pytest.raises(Refused) as caught:
        reshard.plan(tmp_path / "source", mp=3)
    assert "`module.` in front was taken off" in caught.value.problems[0].found
    with pytest.raises(Refused) as caught:
        reshard.plan(tmp_path / "source", mp=2, only=["module.*"])
    assert "`module.` in front was taken off" in caught.value.problems[0].found


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "student."])
def test_a_prefix_that_only_some_names_have_is_one_problem(prefix: str, tmp_path: Path) -> None:
    write_model_as(tmp_path / "source", lambda name: prefix + name if ".layers.0." in name else name)
    (problem,) = refusal(tmp_path / "source")
    assert problem.kind == "prefix"
    assert problem.subject == str(tmp_path / "source")
    assert problem.found == f"9 of 21 names begin with `{prefix}`, all in model-00001-of-00002.safetensors"
    assert "two saves" in problem.remedy


def test_only_the_head_lacks_a_prefix_as_in_every_model(tmp_path: Path) -> None:
    write_model_as(tmp_path / "source", lambda name: name.replace("model.", "modle."))
    (problem,) = refusal(tmp_path / "source")
    assert (problem.kind, problem.found) == ("prefix", "all 20 names but those of lm_head begin with `modle.`")
    assert "two saves" not in problem.remedy
    assert "`modle.` in front was taken off; then 20 of 21 names: `model.` was put in front" in problem.expected


def test_the_others_are_named_if_they_are_in_few_files(tmp_path: Path) -> None:
    write_model_as(tmp_path / "source", lambda name: name if "norm" in name else "student." + name, files=21)
    (problem,) = refusal(tmp_path / "source")
    assert problem.found == "16 of 21 names begin with `student.`"
    write_model_as(tmp_path / "other", lambda name: name if "embed" in name else "student." + name, files=21)
    (problem,) = refusal(tmp_path / "other")
    others = "the others all in model-00001-of-00021.safetensors"
    assert problem.found == f"20 of 21 names begin with `student.`, {others}"


def test_a_prefix_that_fits_a_few_names_by_chance_tells_nothing(tmp_path: Path) -> None:
    tensors = {name.replace("layers.", "blocks.").removeprefix("model."): one for name, one in make_tensors().items()}
    write_tensors_as(tmp_path / "source", tensors)
    assert {problem.kind for problem in refusal(tmp_path / "source")} == {"no-rule"}


def test_the_search_is_bounded_with_many_kinds_of_names() -> None:
    words = (*WRAPPERS, "model.", "language_model.", "text_model.")
    random = Random(12)
    letters = ["".join(random.choices("abcdefgh", k=20)) for _ in range(990)]
    names = ["".join(random.choices(words, k=12)) + last for last in letters]
    tried = sum(len(made) for _, made in list_renamings(names, of_some=True))
    assert 0 < tried <= 40_000


def test_half_of_the_names_without_model_in_front(tmp_path: Path) -> None:
    write_model_as(tmp_path / "source", lambda name: leave_out_body(name) if ".layers.0." in name else name)
    (problem,) = refusal(tmp_path / "source")
    assert problem.kind == "prefix"
    assert problem.found == "9 of 21 names begin without `model.`, all in model-00001-of-00002.safetensors"


def test_two_models_in_one_folder_are_told(tmp_path: Path) -> None:
    tensors = make_tensors()
    both = {**tensors, **{"ema." + name: tensor + 1 for name, tensor in tensors.items()}}
    write_tensors_as(tmp_path / "source", both)
    (problem,) = refusal(tmp_path / "source")
    assert (problem.kind, problem.found) == (
        "prefix",
        "21 of 42 names begin with `ema.`, all in model-00002-of-00002.safetensors",
    )
    assert "21 names would be there twice" in problem.expected


def test_a_prefix_beside_unknown_names(tmp_path: Path) -> None:
    tensors = {"module." + name: tensor for name, tensor in make_tensors().items()}
    write_tensors_as(tmp_path / "source", {**tensors, "module.model.value_head.weight": torch.zeros(2)})
    first, second = refusal(tmp_path / "source")
    assert (first.kind, first.found) == ("prefix", "all 22 names begin with `module.`")
    assert "would know 21 of 22 names" in first.expected
    assert (second.kind, second.subject) == ("no-rule", "model.value_head.weight")


def test_vision_tensors_are_not_left_aside(tmp_path: Path) -> None:
    tensors = {name_text_model(name): tensor for name, tensor in make_tensors().items()}
    write_tensors_as(tmp_path / "source", {**tensors, "model.visual.proj.weight": torch.zeros(2)})
    kinds = [(problem.kind, problem.subject) for problem in refusal(tmp_path / "source")]
    assert kinds == [("prefix", str(tmp_path / "source")), ("no-rule", "model.visual.proj.weight")]


def test_a_common_prefix_of_another_model(tmp_path: Path) -> None:
    write_tensors_as(tmp_path / "source", {f"transformer.h.{n}.ln_1.bias": torch.zeros(2) for n in range(30)})
    first, *others = refusal(tmp_path / "source")
    assert (first.kind, first.found) == ("prefix", "all 30 names begin with `transformer.`")
    assert {problem.kind for problem in others} == {"no-rule"}


def test_no_renaming_lets_two_tensors_have_one_name(tmp_path: Path) -> None:
    tensors = make_tensors()
    name = "model.layers.0.mlp.up_proj.weight"
    twice = {**tensors, name.replace("mlp.", "mlp._orig_mod."): tensors[name] + 1}
    write_tensors_as(tmp_path / "source", twice)
    (problem,) = refusal(tmp_path / "source")
    assert problem.kind == "prefix"
    assert "1 name would be there twice" in problem.expected


def test_a_model_that_no_recipe_lists_stays_refused(tmp_path: Path) -> None:
    write_model_as(tmp_path / "source", add_prefix("module."), {**LLAMA, "model_type": "other", "architectures": []})
    assert [problem.kind for problem in refusal(tmp_path / "source")] == ["no-recipe"]


def test_without_a_config_the_recipe_that_needs_no_experts_fits(tmp_path: Path) -> None:
    tensors = {"module." + name: tensor for name, tensor in make_tensors().items()}
    write_tensors_as(tmp_path / "source", tensors, None)
    assert read_source(tmp_path / "source").recipe.name == "llama"


def test_hostile_names_end_soon(tmp_path: Path) -> None:
    deep = {"a." * 3000 + f"x{number}": torch.zeros(1) for number in range(30)}
    write_tensors_as(tmp_path / "deep", deep)
    assert refusal(tmp_path / "deep")[0].kind == "prefix"
    many = {f"module.k{number}.weight": torch.zeros(1) for number in range(3000)}
    write_tensors_as(tmp_path / "many", many)
    assert {problem.kind for problem in refusal(tmp_path / "many")} == {"no-rule"}


@pytest.mark.parametrize("command", ["plan", "convert", "inspect"])
def test_commands_tell_of_it_to_people_and_machines(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model_as(tmp_path / "source", add_prefix("module."))
    target = [str(tmp_path / "target")] if command == "convert" else []
    ranks = [] if command == "inspect" else ["--mp", "2"]
    said = "all 21 names: `module.` in front was taken off"
    assert main([command, str(tmp_path / "source"), *target, *ranks]) == 0
    assert f"note: {said}" in capsys.readouterr().out.splitlines()
    assert main([command, str(tmp_path / "source"), *target, *ranks, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == [{"kind": "renamed", "text": said}]


def test_loading_takes_the_names_of_the_recipe(tmp_path: Path) -> None:
    tensors: Mapping[str, Tensor] = write_model_as(tmp_path / "source", add_prefix("_orig_mod."))
    loaded = reshard.load(tmp_path / "source", mp=1, rank=0)
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_every_recipe_has_kinds_of_names_for_a_quick_look() -> None:
    for recipe in list_packaged_recipes():
        known = KnownNames(recipe)
        assert is_known([rule.left.replace("{i}", "3").replace("{e}", "7") for rule in recipe.rules[:1]], known)
        assert not is_known(["no.such.name"], known)
