"""Fused rank files as a source: they become the checkpoint that they were made of, or are refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fused_ranks import CONFIG, RECIPE, Stored, Tensors, list_bytes, make_model, read, write_ranks, write_whole

import reshard
from reshard.errors import Problem, Refused

LAYER = "layers.1"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "fused.toml").write_text(RECIPE)
    return str(tmp_path / "fused.toml")


def restore(ranks: Path, target: Path, recipe: str) -> dict[str, tuple[str, list[int], bytes]]:
    reshard.convert(ranks, target, to="hf", recipe=recipe)
    return {name: one for path in target.glob("*.safetensors") for name, one in read(path).items()}


def refused(ranks: Path, recipe: str) -> list[Problem]:
    target = ranks.parent / "refused"
    with pytest.raises(Refused) as error:
        reshard.convert(ranks, target, to="hf", recipe=recipe)
    assert not target.exists() or not list(target.iterdir())
    return list(error.value.problems)


def kinds(problems: list[Problem]) -> set[tuple[str, str]]:
    return {(problem.kind, problem.subject) for problem in problems}


# --- sound files ---


@pytest.mark.parametrize("describes", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fused_rank_files_become_the_checkpoint_again(
    ranks: int,
    describes: bool,  # noqa: FBT001 - drawn
    tmp_path: Path,
    recipe: str,
) -> None:
    folder = write_ranks(tmp_path / "ranks", ranks, describes=describes)
    assert restore(folder, tmp_path / "target", recipe) == list_bytes(make_model())


def test_parts_alike_need_no_config(tmp_path: Path, recipe: str) -> None:
    """Gate and up share the rows of a stack. The heads have to be told."""
    folder = write_ranks(tmp_path / "ranks", 2)
    (folder / "config.json").unlink()
    problems = refused(folder, recipe)
    assert sorted((one.kind, one.subject) for one in problems) == [
        ("no-config", f"layers.{{i}}.qkv.{word}") for word in ("bias", "weight", "weight_scale")
    ], "once for all layers and ranks"
    assert all("config.json" in one.remedy for one in problems)


def test_a_row_without_a_shape_is_named(tmp_path: Path) -> None:
    """A config.json beside the files would not help."""
    row = '"layers.{i}.qkv.bias", "rows", "[q]"'
    assert row in RECIPE
    (tmp_path / "own.toml").write_text(RECIPE.replace(row, row.replace("[q]", "[?]")))
    (problem,) = refused(write_ranks(tmp_path / "ranks", 2), str(tmp_path / "own.toml"))
    assert (problem.kind, problem.subject) == ("wrong-recipe", "layers.{i}.qkv.bias")
    assert problem.remedy == "give it to them in the recipe"


def test_parts_of_another_formula_are_not_halved(tmp_path: Path) -> None:
    text = RECIPE.replace(
        '"[inner, hidden_size]"],\n["stack", "layers.{i}.experts.{e}.up',
        '"[2 * inner, hidden_size]"],\n["stack", "layers.{i}.experts.{e}.up',
    )
    assert text != RECIPE
    (tmp_path / "own.toml").write_text(text)
    folder = write_ranks(tmp_path / "ranks", 2)
    config = {key: value for key, value in CONFIG.items() if key != "moe_intermediate_size"}
    (folder / "config.json").write_text(json.dumps(config))
    assert {one.subject for one in refused(folder, str(tmp_path / "own.toml")) if one.kind == "no-config"} == {
        "layers.{i}.w13.weight", "layers.{i}.w13.weight_scale"
    }  # fmt: skip


def test_open_reads_a_part_of_a_fused_tensor(tmp_path: Path, recipe: str) -> None:
    folder = write_ranks(tmp_path / "ranks", 4)
    model = make_model()
    with reshard.open(folder, recipe, framework="numpy") as opened:
        assert set(opened) == set(model)
        for name in ("layers.2.k.bias", "layers.0.experts.10.up.weight", "embed.weight"):
            assert opened[name][1:3].tobytes() == model[name].array[1:3].tobytes()
        assert opened["layers.1.experts.2.down.weight"][:, 3:9].tobytes() == (
            model["layers.1.experts.2.down.weight"].array[:, 3:9].tobytes()
        )


def test_diff_finds_no_difference_to_the_checkpoint(tmp_path: Path, recipe: str) -> None:
    report = reshard.diff(write_ranks(tmp_path / "ranks", 4), write_whole(tmp_path / "whole"), recipe=recipe)
    assert report.is_same, report


def test_inspect_tells_the_facts(tmp_path: Path, recipe: str) -> None:
    content = reshard.inspect(write_ranks(tmp_path / "ranks", 4), recipe, tensors="*.w13.*")
    assert (content.recipe, content.layout, content.ranks, content.remark) == ("fused-test", "test-engine", 4, "")
    assert content.counts == {"layers": 3, "experts": 12}
    assert content.listed is not None
    assert {(one.name, one.shape) for one in content.listed if one.name.startswith("layers.0")} == {
        ("layers.0.w13.weight", (12, 8, 16)), ("layers.0.w13.weight_scale", (12, 2, 4))
    }  # fmt: skip


def test_a_replica_of_a_part_that_differs_is_refused(tmp_path: Path, recipe: str) -> None:
    """Ranks 2 and 3 have the same key head, within fused tensors."""

    def change(rank: int, tensors: Tensors) -> None:
        if rank == 3:
            tensors["layers.1.qkv.bias"].array[8] ^= 1  # behind 8 rows of q: the first of k

    folder = write_ranks(tmp_path / "ranks", 4, change=change)
    with pytest.raises(Refused) as error:
        reshard.convert(folder, tmp_path / "target", to="hf", recipe=recipe)
    assert kinds(list(error.value.problems)) == {("replicas-differ", "layers.1.qkv.bias")}


# --- files ---


@pytest.mark.parametrize("lost", [0, 2, 3])
def test_a_missing_file_is_named(lost: int, tmp_path: Path, recipe: str) -> None:
    folder = write_ranks(tmp_path / "ranks", 4)
    (folder / f"part-{lost}.safetensors").unlink()
    (problem,) = refused(folder, recipe)
    assert (problem.kind, problem.subject) == ("missing-file", f"part-{lost}.safetensors")
    assert problem.expected == "4 rank files, by the headers of the others"


def test_a_last_file_that_nothing_tells_of_is_seen_by_what_lacks(tmp_path: Path, recipe: str) -> None:
    """Without metadata three files look like three ranks. No head can be cut for three."""
    folder = write_ranks(tmp_path / "ranks", 4, describes=False)
    (folder / "part-3.safetensors").unlink()
    assert {one.kind for one in refused(folder, recipe)} >= {"not-divisible"}


def test_exchanged_files_are_named(tmp_path: Path, recipe: str) -> None:
    folder = write_ranks(tmp_path / "ranks", 4)
    first, second = folder / "part-1.safetensors", folder / "part-2.safetensors"
    first.rename(folder / "third")
    second.rename(first)
    (folder / "third").rename(second)
    assert kinds(refused(folder, recipe)) == {("wrong-ranks", first.name), ("wrong-ranks", second.name)}


def test_a_file_of_another_number_of_ranks_is_named(tmp_path: Path, recipe: str) -> None:
    folder, other = write_ranks(tmp_path / "ranks", 4), write_ranks(tmp_path / "other", 2)
    (other / "part-1.safetensors").replace(folder / "part-1.safetensors")
    assert kinds(refused(folder, recipe)) == {("wrong-ranks", "part-1.safetensors")}


def test_a_file_too_much_is_named(tmp_path: Path, recipe: str) -> None:
    folder = write_ranks(tmp_path / "ranks", 2)
    (folder / "part-7.safetensors").write_bytes((folder / "part-1.safetensors").read_bytes())
    assert kinds(refused(folder, recipe)) == {("extra-file", "part-7.safetensors")}


# --- fused tensors ---


def shorten(name: str, axis: int) -> Callable[[int, Tensors], None]:
    """Takes the last of a dimension away, in rank 1."""

    def change(rank: int, tensors: Tensors) -> None:
        if rank == 1:
            dtype, array = tensors[name]
            tensors[name] = Stored(dtype, np.delete(array, -1, axis))

    return change


@pytest.mark.parametrize(
    ("name", "axis"),
    [(f"{LAYER}.qkv.weight", 0), (f"{LAYER}.qkv.bias", 0), (f"{LAYER}.w13.weight", 1), (f"{LAYER}.w2.weight_scale", 1)],
)
def test_rows_that_the_parts_do_not_make_up_are_refused(name: str, axis: int, tmp_path: Path, recipe: str) -> None:
    folder = write_ranks(tmp_path / "ranks", 2, change=shorten(name, axis))
    (problem,) = refused(folder, recipe)
    assert (problem.kind, problem.subject) == ("wrong-shape", f"part-1.safetensors: {name}")
    assert "config.json" in problem.expected


def test_another_length_of_rows_is_refused(tmp_path: Path, recipe: str) -> None:
    folder = write_ranks(tmp_path / "ranks", 2, change=shorten(f"{LAYER}.qkv.weight", 1))
    assert {one.kind for one in refused(folder, recipe)} == {"wrong-shape"}


def test_an_expert_that_one_rank_lacks_is_named(tmp_path: Path, recipe: str) -> None:
    folder = write_ranks(tmp_path / "ranks", 2, change=shorten(f"{LAYER}.w2.weight", 0))
    assert kinds(refused(folder, recipe)) == {("wrong-ranks", f"{LAYER}.experts.11.down.weight")}


def test_another_number_of_experts_than_the_config_says_is_refused(tmp_path: Path, recipe: str) -> None:
    folder = write_ranks(tmp_path / "ranks", 2)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_experts": 10}))
    assert ("contradiction", "experts") in kinds(refused(folder, recipe))


def test_another_config_is_refused(tmp_path: Path, recipe: str) -> None:
    folder = write_ranks(tmp_path / "ranks", 2)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_key_value_heads": 4}))
    problems = refused(folder, recipe)
    assert {one.kind for one in problems} == {"wrong-shape"}
    assert any("4 of k.bias" in one.expected or "8 of k.bias" in one.expected for one in problems)


def test_a_dimension_too_few_is_refused(tmp_path: Path, recipe: str) -> None:
    def change(_: int, tensors: Tensors) -> None:
        dtype, array = tensors[f"{LAYER}.w13.weight"]
        tensors[f"{LAYER}.w13.weight"] = Stored(dtype, array.reshape(-1))

    folder = write_ranks(tmp_path / "ranks", 2, change=change)
    assert kinds(refused(folder, recipe)) == {
        ("wrong-shape", f"part-{rank}.safetensors: {LAYER}.w13.weight") for rank in range(2)
    }


def test_a_million_members_without_a_byte_are_refused(tmp_path: Path, recipe: str) -> None:
    """They would be a million names."""

    def change(_: int, tensors: Tensors) -> None:
        tensors[f"{LAYER}.w13.weight"] = Stored("F8_E4M3", np.zeros((1 << 30, 32, 0), np.uint8))

    folder = write_ranks(tmp_path / "ranks", 1, change=change)
    assert kinds(refused(folder, recipe)) == {("wrong-shape", f"part-0.safetensors: {LAYER}.w13.weight")}


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path, recipe: str) -> None:
    folder = write_ranks(tmp_path / "ranks", 2)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 24}))
    assert ("wrong-shape", "embed.weight") in kinds(refused(folder, recipe))


def test_a_vocabulary_that_no_config_tells_is_refused(tmp_path: Path, recipe: str) -> None:
    folder = write_ranks(tmp_path / "ranks", 2)
    (folder / "config.json").write_text(json.dumps({key: CONFIG[key] for key in CONFIG if key != "vocab_size"}))
    assert kinds(refused(folder, recipe)) == {("no-config", "embed.weight")}


# --- constants ---


def put(name: str, stored: Stored | None) -> Callable[[int, Tensors], None]:
    """Puts another constant into rank 1; None takes it away."""

    def change(rank: int, tensors: Tensors) -> None:
        if rank == 1:
            del tensors[name]
            tensors.update({name: stored} if stored else {})

    return change


SCALE, HALF = f"{LAYER}.attn.k_scale", f"{LAYER}.attn.half"


@pytest.mark.parametrize(
    ("name", "stored", "kind", "found"),
    [
        (SCALE, Stored("F32", np.array(0.75, np.float32)), "wrong-value", "0.75"),
        (HALF, Stored("BF16", np.array([0x3F00, 0x3F00, 0x3F80], np.uint16)), "wrong-value", "1"),
        (SCALE, Stored("F16", np.array(1, np.float16)), "wrong-dtype", "F16 []"),
        (SCALE, Stored("F32", np.ones(1, np.float32)), "wrong-shape", "F32 [1]"),
        (SCALE, None, "missing-tensor", "not in part-1.safetensors"),
    ],
)
def test_another_constant_is_refused(
    name: str, stored: Stored | None, kind: str, found: str, tmp_path: Path, recipe: str
) -> None:
    (problem,) = refused(write_ranks(tmp_path / "ranks", 2, change=put(name, stored)), recipe)
    assert (problem.kind, problem.found) == (kind, found)
    assert problem.subject == (f"part-1.safetensors: {name}" if stored else name)


def test_a_constant_of_a_layer_that_is_not_there_is_refused(tmp_path: Path, recipe: str) -> None:
    def change(_: int, tensors: Tensors) -> None:
        tensors["layers.9.attn.k_scale"] = Stored("F32", np.array(1, np.float32))

    folder = write_ranks(tmp_path / "ranks", 2, change=change)
    assert kinds(refused(folder, recipe)) == {
        ("contradiction", f"part-{rank}.safetensors: layers.9.attn.k_scale") for rank in range(2)
    }


def test_inspect_reads_no_value(tmp_path: Path, recipe: str) -> None:
    """It reads headers alone; a lacking constant it sees."""
    other = Stored("F32", np.array(0.75, np.float32))
    content = reshard.inspect(write_ranks(tmp_path / "ranks", 2, change=put(SCALE, other)), recipe)
    assert content.recipe == "fused-test"
    content = reshard.inspect(write_ranks(tmp_path / "lacking", 2, change=put(SCALE, None)), recipe)
    assert "missing tensor" in content.remark
