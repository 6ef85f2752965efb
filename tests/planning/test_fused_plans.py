"""Plans of fused rank files: shapes, counts, the ranks that work, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_models import CONFIG, FP8, RECIPE, list_shapes, write_source
from torch import Tensor

from reshard import api
from reshard.casts.rounding import round_constant
from reshard.errors import Problem, Refused
from reshard.planning.plan import Plan
from reshard.planning.rank_choices import RankChoice, list_rank_choices
from reshard.planning.reads import measure_reads
from reshard.sources.source import read_source
from reshard.types import Layout

V_ROW = '"model.layers.{i}.v.{s}", "model.layers.{i}.qkv.{s}", "rows of num_key_value_heads", "[kv, hidden_size]"'
UP_ROW = '"model.layers.{i}.mlp.{e}.up.{s}", "model.layers.{i}.mlp.w13.{s}", "rows", "[inner_size, hidden_size]"'
EXTRA_ROW = '"model.layers.{i}.b.extra", "model.layers.{i}.extra", "replicate", "[?, 4 + 1]"'

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]


def make_plan(
    folder: Path,
    ranks: int,
    change: Change | None = None,
    *,
    edit: tuple[str, str] = ("", ""),
    block: tuple[int, int] | None = None,
    cast: str | None = None,
) -> Plan:
    """Plans a checkpoint that is written anew, after `change` has changed its tensors and `edit` its recipe."""
    folder.mkdir(exist_ok=True)
    recipe = write_source(folder / "source", change, block=block)
    text = recipe.read_text()
    if edit[0]:
        assert text.count(edit[0]) == 1
        recipe.write_text(text.replace(*edit))
    return api.plan(folder / "source", mp=ranks, recipe=str(recipe), cast=cast)


def refuse_plan(folder: Path, ranks: int, change: Change | None = None, **options: Any) -> list[Problem]:
    with pytest.raises(Refused) as refused:
        make_plan(folder, ranks, change, **options)
    return list(refused.value.problems)


# --- what a plan says ---


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_shapes_of_fused_tensors(ranks: int, tmp_path: Path) -> None:
    plan, kv = make_plan(tmp_path, ranks), max(1, 2 // ranks) * 3
    for index in range(ranks):
        found = {tensor.name: tensor.shape for tensor in plan.tensors(index)}
        assert found["model.layers.1.qkv.weight"] == (12 // ranks + 2 * kv, 7)
        assert found["model.layers.1.qkv.bias"] == (12 // ranks + 2 * kv,)
        assert found["model.layers.0.mlp.w13.weight"] == (12, 2 * 20 // ranks, 7)
        assert found["model.layers.0.mlp.w2_weight"] == (12, 7, 20 // ranks)
        assert found["model.layers.0.mlp.w2_bias"] == (12, 7)
        assert (found["model.layers.0.extra"], found["model.layers.1.extra"]) == ((3, 5), (0, 5))
        assert found["model.embed.weight"] == (16 // ranks, 7)
        assert (found["model.layers.0.attn.k_scale"], found["model.version"]) == ((), (3,))
        assert len(plan.files[index].pieces) == len(found)


def test_constants_are_read_from_nowhere(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "one", 1)
    made = {tensor.name: tensor.size for tensor in plan.tensors(0) if "attn" in tensor.name or "version" in tensor.name}
    assert (len(made), sum(made.values())) == (5, 2 * (4 + 12) + 6)
    rows = RECIPE[RECIPE.index("constants = [") : RECIPE.index("rules = [")]
    without = make_plan(tmp_path / "two", 1, edit=(rows, ""))
    assert (
        measure_reads(plan.source, plan.casts, plan.copies).size
        == measure_reads(without.source, without.casts, without.copies).size
    )
    assert {*plan.tensors(0)} != {*without.tensors(0)}
    assert plan.coverage == without.coverage
    assert plan.notes == ()


def test_a_constant_is_no_cast(tmp_path: Path) -> None:
    """It makes no plan one that computes, and does not hide that a cast changes nothing."""
    plan = make_plan(tmp_path / "one", 1, edit=('"rows padded to 8"', '"replicate"'))
    assert {cast.operation for cast in plan.casts} == {"fill"}
    assert not plan.computes
    assert make_plan(tmp_path / "two", 1).computes
    (problem,) = refuse_plan(tmp_path / "three", 1, to_bf16, cast="bf16")
    assert (problem.kind, problem.subject) == ("wrong-option", "--cast")


def to_bf16(tensors: Tensors) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


def test_the_choices_of_ranks_are_those_of_full_plans(tmp_path: Path) -> None:
    for place, block in (("one", None), ("two", (4, 4))):
        recipe = write_source(tmp_path / place, block=block)
        source = read_source(tmp_path / place, str(recipe))
        for only in ((), ("*.k.weight", "*.gate.*")):
            found = list_rank_choices(source, Layout(0), only)
            plans = [api.plan(str(source.path), mp=ranks, recipe=str(recipe), only=only) for ranks in (1, 2, 4)]
            sizes = [plan.files[0].size - len(plan.files[0].header) for plan in plans]
            counts = [len(plan.files[0].pieces) for plan in plans]
            wanted = zip((1, 2, 4), counts, sizes, strict=True)
            assert list(found) == [
                RankChoice(ranks, needs_pad=False, tensors=n, size=size) for ranks, n, size in wanted
            ]


def test_the_bytes_of_constants() -> None:
    for dtype, wide in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        for value in (1.0, -0.3, 0.0, 1e30, float("inf"), 1e-30):
            expected = torch.tensor(value, dtype=torch.float64).to(torch.float32).to(wide)
            if dtype == "F16":
                expected = torch.tensor(value, dtype=torch.float64).to(wide)
            assert round_constant(value, dtype) == bytes(expected.reshape(1).view(torch.uint8).tolist()), (dtype, value)


# --- rows padded to a multiple ---


@pytest.mark.parametrize(("ranks", "rows"), [(1, 18), (2, 9), (9, 2), (18, 1)])
def test_rows_are_padded_to_a_multiple_whatever_the_ranks(ranks: int, rows: int, tmp_path: Path) -> None:
    plan = make_padded_plan(tmp_path, ranks)
    (tensor,) = plan.tensors(ranks - 1)
    assert tensor.shape == (rows, 7)


def make_padded_plan(folder: Path, ranks: int) -> Plan:
    lines = RECIPE[: RECIPE.index("constants = [")].splitlines(keepends=True)
    recipe = "".join(line for line in lines if not line.startswith(("placeholders", "ranks_divide")))
    rules = ['["same", "model.embed.weight", "model.embed.weight", "rows padded to 6", "[vocab_size, hidden_size]"],']
    rules.append('["drop", "model.{*}", "", "not needed here"],')
    write_source(folder / "source")
    (folder / "padded.toml").write_text(recipe + "rules = [\n" + "\n".join(rules) + "\n]\n")
    return api.plan(folder / "source", mp=ranks, recipe=str(folder / "padded.toml"))


def test_ranks_divide_the_padded_rows(tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        make_padded_plan(tmp_path, 4)
    (problem,) = refused.value.problems
    assert problem.kind == "not-divisible"
    assert "model.embed.weight (18 rows" in problem.subject
    assert problem.remedy == "--mp with one of 1, 2, 3, 6, 9, 18"


def test_rows_that_are_a_multiple_stay(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, 1, edit=('"rows padded to 8"', '"rows padded to 13"'))
    assert {cast.operation for cast in plan.casts} == {"fill"}


# --- refusals ---


def test_parts_of_unlike_dtypes_are_refused(tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> None:
        tensors["model.layers.1.k.weight"] = tensors["model.layers.1.k.weight"].half()

    (problem,) = refuse_plan(tmp_path, 2, widen)
    assert (problem.kind, problem.subject, problem.found) == ("wrong-dtype", "model.layers.1.k.weight", "F16")
    assert "model.layers.1.q.weight" in problem.expected
    assert "model.layers.1.qkv.weight" in problem.expected
    assert "--cast bf16" in problem.remedy


def test_a_mixture_of_scaled_and_plain_parts_is_refused(tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.10.up.weight"] = torch.zeros(16, 10, dtype=torch.bfloat16)
        del tensors["model.layers.0.mlp.10.up.weight_scale_inv"]

    recipe = write_source(tmp_path / "source", widen, block=(4, 4))
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps({**CONFIG, **FP8}))  # which promises nothing of scales
    with pytest.raises(Refused) as refused:
        api.plan(tmp_path / "source", mp=2, recipe=str(recipe))
    (problem,) = refused.value.problems
    assert (problem.kind, problem.subject) == ("wrong-dtype", "model.layers.0.mlp.10.up.weight")


def test_the_remedy_for_unlike_dtypes_works(tmp_path: Path) -> None:
    def widen(tensors: Tensors) -> None:
        tensors["model.layers.1.k.weight"] = tensors["model.layers.1.k.weight"].half()

    plan = make_plan(tmp_path, 2, widen, cast="bf16")
    assert {tensor.dtype for tensor in plan.tensors(0) if tensor.name.endswith("qkv.weight")} == {"BF16"}


def test_parts_of_other_widths_are_refused(tmp_path: Path) -> None:
    def narrow(tensors: Tensors) -> None:
        tensors["model.layers.0.b.extra"] = torch.zeros(3, 4, dtype=torch.bfloat16)

    (problem,) = refuse_plan(
        tmp_path,
        2,
        narrow,
        edit=(EXTRA_ROW, EXTRA_ROW.removesuffix(', "[?, 4 + 1]"')),
    )
    assert (problem.kind, problem.subject) == ("wrong-shape", "model.layers.0.b.extra")
    assert problem.expected == "[?, 5], for a part of model.layers.0.extra"


def test_parts_that_the_recipe_describes_alike_have_as_many_rows(tmp_path: Path) -> None:
    """Without a config their rank files are taken apart in halves: that must be right."""
    (problem,) = refuse_plan(tmp_path, 2, edit=(EXTRA_ROW, EXTRA_ROW.replace("4 + 1", "5")))
    assert (problem.kind, problem.subject) == ("wrong-shape", "model.layers.0.b.extra")
    assert (problem.found, problem.expected) == ("shape [3, 5] in a rank", "[0, 5], for a part of model.layers.0.extra")


def test_members_of_other_heights_are_refused(tmp_path: Path) -> None:
    """Together they have as many rows as they should."""

    def move_row(tensors: Tensors) -> None:
        for expert, rows in ((3, 22), (11, 18)):
            tensors[f"model.layers.0.mlp.{expert}.up.weight"] = torch.zeros(rows, 7, dtype=torch.bfloat16)

    (one, other) = refuse_plan(tmp_path, 1, move_row, edit=(UP_ROW, UP_ROW.replace("inner_size", "?")))
    assert {one.kind, other.kind} == {"wrong-shape"}
    assert {one.found, other.found} == {"shape [22, 7] in a rank", "shape [18, 7] in a rank"}
    assert one.expected == "[20, 7], for a part of model.layers.0.mlp.w13.weight"


def test_a_missing_expert_of_a_stack_is_refused(tmp_path: Path) -> None:
    def lose(tensors: Tensors) -> None:
        del tensors["model.layers.1.mlp.10.up.weight"]

    (problem,) = refuse_plan(tmp_path, 2, lose)
    assert (problem.kind, problem.subject) == ("missing-tensor", "model.layers.1.mlp.10.up.weight")


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_a_missing_part_that_may_be_missing_alone_is_refused(layers: tuple[int, ...], tmp_path: Path) -> None:
    """The model has biases or has none."""

    def lose(tensors: Tensors) -> None:
        for layer in layers:
            del tensors[f"model.layers.{layer}.v.bias"]

    problems = refuse_plan(tmp_path, 2, lose)
    assert [problem.subject for problem in problems] == [f"model.layers.{layer}.qkv.bias" for layer in layers]
    assert {problem.kind for problem in problems} == {"missing-tensor"}
    assert "model.layers.{i}.v.bias" in problems[0].expected


def test_a_model_without_biases_has_no_fused_bias(tmp_path: Path) -> None:
    def lose(tensors: Tensors) -> None:
        for name in [name for name in tensors if name[-6:] in ("q.bias", "k.bias", "v.bias")]:
            del tensors[name]

    names = {tensor.name for tensor in make_plan(tmp_path, 2, lose).tensors(0)}
    assert not {name for name in names if "qkv.bias" in name}
    assert "model.layers.0.qkv.weight" in names


def test_a_part_inside_a_block_is_refused(tmp_path: Path) -> None:
    """4 rows of a rank at blocks of 8: unfused, they could lie inside one."""
    problems = refuse_plan(tmp_path, 2, block=(8, 4))
    assert [(problem.kind, problem.subject) for problem in problems] == [
        ("straddles-blocks", "layers 0-1, k.weight, v.weight (4 rows of num_key_value_heads a rank)")
    ]
    assert problems[0].expected == "whole blocks of 8: two block scales have no common value"
    assert problems[0].remedy == "--mp with one of 1"


def test_an_inner_part_that_ends_inside_a_block_is_refused_at_any_number_of_ranks(tmp_path: Path) -> None:
    """16 rows of q and 8 of k, before those of v, at blocks of 12; the last parts may end inside one."""
    problems = refuse_plan(tmp_path / "one", 1, block=(12, 4))
    assert [(problem.kind, problem.subject, problem.found) for problem in problems] == [
        ("straddles-blocks", "layers 0-1, q.weight", "16 rows"),
        ("straddles-blocks", "layers 0-1, k.weight", "8 rows"),
        ("straddles-blocks", "layers 0-1, mlp.*.gate.weight", "16 rows"),
    ]
    assert {problem.remedy for problem in problems} == {"--cast bf16, which needs no blocks"}
    # Also where the ranks do not suit other weights: no number of ranks would help.
    found = refuse_plan(tmp_path / "seven", 7, block=(12, 4))
    assert {problem.remedy for problem in found} == {"--cast bf16, which needs no blocks"}
    plan = make_plan(tmp_path / "two", 1, block=(12, 4), cast="bf16")
    assert {tensor.dtype for tensor in plan.tensors(0) if tensor.name.endswith("qkv.weight")} == {"BF16"}


def test_the_last_part_may_end_inside_a_block(tmp_path: Path) -> None:
    """v has 8 rows, the part of the second rank of q and k 8: half a block of 16 at the end, at 1 rank only."""
    plan = make_plan(
        tmp_path,
        1,
        longer,
        block=(8, 4),
        edit=(V_ROW, V_ROW.replace("[kv,", "[?,")),
    )
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors(0)}
    assert shapes["model.layers.0.qkv.weight"] == (16 + 8 + 10, 10)
    assert shapes["model.layers.0.qkv.weight_scale_inv"] == (2 + 1 + 2, 3)


def longer(tensors: Tensors) -> None:
    """Two more rows of v, of which the second block is not whole."""
    for layer in range(2):
        name = f"model.layers.{layer}.v.weight"
        tensors[name] = tensors[name][[*range(8), 0, 1]]
        tensors[f"{name}_scale_inv"] = tensors[f"{name}_scale_inv"][[0, 0]]


def test_a_constant_with_the_name_of_a_tensor_is_refused(tmp_path: Path) -> None:
    (problem,) = refuse_plan(tmp_path, 1, edit=('"model.version"', '"model.layers.1.qkv.weight"'))
    assert (problem.kind, problem.subject) == ("same-name", "model.layers.1.qkv.weight")


def test_only_the_rows_of_one_fusion_share_a_name(tmp_path: Path) -> None:
    problems = refuse_plan(
        tmp_path,
        1,
        edit=('"model.norm.weight", "model.norm.weight"', '"model.norm.weight", "model.layers.0.qkv.weight"'),
    )
    assert {problem.kind for problem in problems} == {"same-name"}
    assert any("model.layers.0.q.weight" in f"{problem.subject} {problem.found}" for problem in problems)


def test_a_scale_with_the_name_of_its_weight_is_refused(tmp_path: Path) -> None:
    problems = refuse_plan(tmp_path, 1, block=(4, 4), edit=('right = "weight_scale_inv"', 'right = "weight"'))
    assert {problem.kind for problem in problems} == {"same-name"}
    subjects = {problem.subject for problem in problems}
    assert "model.layers.0.q.weight_scale_inv -> model.layers.0.qkv.weight" in subjects


def test_the_checkpoint_has_the_shapes_of_its_config() -> None:
    """Of the model of these tests itself: fewer key heads than ranks, and experts beyond 9."""
    assert CONFIG["num_key_value_heads"] < CONFIG["num_attention_heads"] < 10 < CONFIG["num_experts"]
    assert list_shapes(CONFIG)["model.layers.0.a.extra"] == (0, 5)
