"""Plans: tables of shapes and copies without files, random models against plain slicing, and true models in full."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import make_plan
from numpy.typing import NDArray
from safetensors.torch import load, save

from reshard.errors import Refused
from reshard.formats.safetensors import BITS, parse_header
from reshard.planning.copies import Copies, WrongPlan
from reshard.planning.file_layout import EVERY_RANK, Pieces, lay_out_files
from reshard.planning.plan import Plan
from reshard.planning.planner import keep_ranks
from reshard.planning.proofs import prove_coverage, require_coverage, require_tiling
from reshard.planning.shards import cut_along, cut_for_ranks
from reshard.planning.transforms import Terms, transform_weights
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import load_recipe, parse_recipe
from reshard.sources.block_scales import group_weights as units_by_kind
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.match import match
from reshard.synthetic import DEEPSEEK_V2_LITE, DEEPSEEK_V3, SMALL_V3, list_tensors, write_checkpoint
from reshard.target.run_config import make_run_config
from reshard.types import WHOLE, Cast, Checkpoint, File, Layout, Tensor

DATA_START = 1000
"""Where the data of a checkpoint made by hand begins: the copies of the tables count from here."""
RECIPE = """
name = "table"
about = "one kind of tensor"
left = "one"
right = "other"
files = "{rank}-of-{ranks}.safetensors"
scales.p = { left = "weight_scale_inv", right = "scale", block = 128 }
placeholders.e = { counts = "experts" }
rules = [["same", "%s.{p}", "%s.{p}", "%s"]]
"""
Shape = tuple[int, ...]
Row = tuple[int, int, int, int]
"""One copy: source offset from the start of the data, pitch, run and rows."""


def checkpoint_of(
    tensors: Iterable[tuple[str, str, Shape]], config: Mapping[str, Any] | None = None, start: int = DATA_START
) -> Checkpoint:
    """A checkpoint of one file that is nowhere, with its tensors in the order given."""
    found: dict[str, Tensor] = {}
    end = start
    for name, dtype, shape in tensors:
        size = prod(shape) * BITS[dtype] // 8
        found[name] = Tensor(name, dtype, shape, 0, end, size)
        end += size
    return Checkpoint(Path("nowhere"), (File("model.safetensors", end, start, "", 0),), found, config)


def recipe_of(split: str) -> Recipe:
    name = "x.{e}" if split == "by e" else "x"
    return parse_recipe(RECIPE % (name, name, split), "table.toml")


def rows_of(copies: Copies) -> list[list[Row]]:
    """The copies of each target file, without their place there."""
    found: dict[int, list[Row]] = {}
    columns = (copies.target_file, copies.source_offset - DATA_START, copies.pitch, copies.run, copies.rows)
    for target, *row in zip(*(column.tolist() for column in columns), strict=True):
        found.setdefault(target, []).append((row[0], row[1], row[2], row[3]))
    return [found.get(target, []) for target in range(max(found, default=-1) + 1)]


def kinds_of(refused: Refused) -> set[str]:
    return {problem.kind for problem in refused.problems}


# --- tables ---


@pytest.mark.parametrize(
    ("dtype", "shape", "split", "ranks", "wanted"),
    [
        ("U8", (4, 3), "rows", 2, [[(0, 6, 6, 1)], [(6, 6, 6, 1)]]),
        ("BF16", (4, 3), "rows", 4, [[(0, 6, 6, 1)], [(6, 6, 6, 1)], [(12, 6, 6, 1)], [(18, 6, 6, 1)]]),
        ("BF16", (3, 4), "columns", 2, [[(0, 8, 4, 3)], [(4, 8, 4, 3)]]),
        ("F32", (2, 3), "columns", 3, [[(0, 12, 4, 2)], [(4, 12, 4, 2)], [(8, 12, 4, 2)]]),
        ("U8", (4, 3), "replicate", 2, [[(0, 12, 12, 1)], [(0, 12, 12, 1)]]),
        ("F32", (8,), "rows", 4, [[(0, 8, 8, 1)], [(8, 8, 8, 1)], [(16, 8, 8, 1)], [(24, 8, 8, 1)]]),
        ("F32", (5,), "replicate", 2, [[(0, 20, 20, 1)], [(0, 20, 20, 1)]]),
        ("F64", (), "replicate", 2, [[(0, 8, 8, 1)], [(0, 8, 8, 1)]]),
        # A single row has nothing to skip.
        ("U8", (1, 8), "columns", 2, [[(0, 4, 4, 1)], [(4, 4, 4, 1)]]),
        # A row or column of more than two dimensions is all that lies behind its index.
        ("U8", (4, 2, 3), "rows", 2, [[(0, 12, 12, 1)], [(12, 12, 12, 1)]]),
        ("U8", (2, 4, 3), "columns", 2, [[(0, 12, 6, 2)], [(6, 12, 6, 2)]]),
        # Two elements of F4 are a byte.
        ("F4", (2, 8), "columns", 2, [[(0, 4, 2, 2)], [(2, 4, 2, 2)]]),
        ("F4", (4, 3), "rows", 2, [[(0, 3, 3, 1)], [(3, 3, 3, 1)]]),
        # One rank: whatever the split, the tensor in one piece.
        ("BF16", (4, 3), "rows", 1, [[(0, 24, 24, 1)]]),
        ("BF16", (4, 3), "columns", 1, [[(0, 24, 24, 1)]]),
        ("BF16", (4, 3), "replicate", 1, [[(0, 24, 24, 1)]]),
        ("F4", (4, 3), "columns", 1, [[(0, 6, 6, 1)]]),
        # Nothing to copy.
        ("U8", (0, 3), "rows", 2, []),
        ("U8", (0, 4), "columns", 2, []),
        ("U8", (4, 0), "rows", 2, []),
        ("U8", (4, 0), "columns", 2, []),
        ("U8", (0,), "replicate", 2, []),
    ],
)
def test_copies_of_a_weight(dtype: str, shape: Shape, split: str, ranks: int, wanted: list[list[Row]]) -> None:
    plan = make_plan(checkpoint_of([("x.weight", dtype, shape)]), recipe_of(split), Layout(ranks))
    assert rows_of(plan.copies) == wanted
    assert plan.copies.target_offset.tolist() == [len(plan.files[0].header)] * len(wanted)


@pytest.mark.parametrize(
    ("shape", "split", "ranks", "wanted"),
    [
        ((4, 3), "rows", 2, (2, 3)),
        ((3, 4), "columns", 2, (3, 2)),
        ((4, 3), "replicate", 2, (4, 3)),
        ((8,), "rows", 4, (2,)),
        ((), "replicate", 2, ()),
        ((2, 4, 3), "columns", 2, (2, 2, 3)),
        ((4, 2, 3), "rows", 4, (1, 2, 3)),
        ((0, 4), "columns", 2, (0, 2)),
        ((4, 0), "rows", 2, (2, 0)),
        ((0, 4), "rows", 2, (0, 4)),
    ],
)
def test_shape_of_a_share(shape: Shape, split: str, ranks: int, wanted: Shape) -> None:
    plan = make_plan(checkpoint_of([("x.weight", "F32", shape)]), recipe_of(split), Layout(ranks))
    assert [[tensor.shape for tensor in plan.tensors(rank)] for rank in range(ranks)] == [[wanted]] * ranks


@pytest.mark.parametrize(
    ("experts", "ranks", "wanted"),
    [(2, 2, [[0], [1]]), (4, 2, [[0, 1], [2, 3]]), (4, 1, [[0, 1, 2, 3]]), (12, 3, [[0, 1, 2, 3], [4, 5, 6, 7], []])],
)
def test_experts_go_whole_and_in_order_of_number(experts: int, ranks: int, wanted: list[list[int]]) -> None:
    """Stored, and named, such that 10 comes before 2."""
    numbers = sorted(range(experts), key=str)
    tensors = [(f"x.{number}.weight", "U8", (number + 1, 2)) for number in numbers]
    checkpoint = checkpoint_of(tensors)
    plan = make_plan(checkpoint, recipe_of("by e"), Layout(ranks))
    wanted = wanted if wanted[-1] else [*wanted[:-1], [10, 11, 8, 9]]
    for rank, members in enumerate(wanted):
        assert [tensor.name for tensor in plan.tensors(rank)] == [f"x.{number}.weight" for number in members]
        starts = [checkpoint.tensors[f"x.{number}.weight"].offset - DATA_START for number in members]
        sizes = [2 * (number + 1) for number in members]
        assert rows_of(plan.copies)[rank] == [(start, size, size, 1) for start, size in zip(starts, sizes, strict=True)]


@pytest.mark.parametrize(
    ("length", "ranks", "wanted"),
    [
        # Whole blocks: the scale is cut like its weight.
        (512, 2, [[0, 1], [2, 3]]),
        (512, 4, [[0], [1], [2], [3]]),
        (384, 3, [[0], [1], [2]]),
        # Parts of a block: each rank has the scale of the block in which its part lies.
        (256, 4, [[0], [0], [1], [1]]),
        (256, 8, [[0]] * 4 + [[1]] * 4),
        (384, 6, [[0], [0], [1], [1], [2], [2]]),
        (192, 3, [[0], [0], [1]]),
        (128, 2, [[0], [0]]),
        (64, 2, [[0], [0]]),
        (4, 4, [[0]] * 4),
        # One rank: no matter where the blocks end.
        (200, 1, [[0, 1]]),
        (576, 1, [[0, 1, 2, 3, 4]]),
        # Nothing at all has no scale.
        (0, 2, [[], []]),
    ],
)
@pytest.mark.parametrize("split", ["rows", "columns"])
def test_block_scales_go_with_their_weight(split: str, length: int, ranks: int, wanted: list[list[int]]) -> None:
    """Two blocks lie across the cut: `wanted` counts scales along the cut dimension, of which there are two each."""
    blocks = -(-length // 128)
    shape, scale = ((length, 130), (blocks, 2)) if split == "rows" else ((130, length), (2, blocks))
    tensors = [("x.weight_scale_inv", "F32", scale), ("x.weight", "F8_E4M3", shape)]
    plan = make_plan(checkpoint_of(tensors), recipe_of(split), Layout(ranks))
    for rank, members in enumerate(wanted):
        found = {tensor.name: tensor.shape for tensor in plan.tensors(rank)}
        part = (length // ranks, 130) if split == "rows" else (130, length // ranks)
        assert found == {"x.weight": part, "x.scale": (len(members), 2) if split == "rows" else (2, len(members))}
        grid = np.arange(2 * blocks).reshape(scale)
        elements = grid[members] if split == "rows" else grid[:, members]
        assert scale_elements(plan, rank, 4 * grid.size) == elements.reshape(-1).tolist()


def scale_elements(plan: Plan, rank: int, size: int) -> list[int]:
    """Which F32 elements, of those in the first `size` bytes of the source, a rank has, in the order of its file."""
    copies = plan.copies
    columns = (copies.target_file, copies.source_offset - DATA_START, copies.pitch, copies.run, copies.rows)
    return [
        (start + row * pitch) // 4 + element
        for target, start, pitch, run, rows in zip(*(column.tolist() for column in columns), strict=True)
        if target == rank and start < size
        for row in range(rows)
        for element in range(run // 4)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_scale_of_a_replicated_weight_is_replicated(ranks: int) -> None:
    """576 rows are four and a half blocks: no matter where nothing is cut."""
    tensors = [("x.weight", "F8_E4M3", (576, 130)), ("x.weight_scale_inv", "F32", (5, 2))]
    plan = make_plan(checkpoint_of(tensors), recipe_of("replicate"), Layout(ranks))
    wanted = [(576 * 130, 40, 40, 1), (0, 576 * 130, 576 * 130, 1)]
    assert rows_of(plan.copies) == [wanted] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_scale_of_an_expert_goes_with_it(ranks: int) -> None:
    tensors = [
        entry
        for number in range(4)
        for entry in ((f"x.{number}.weight", "F8_E4M3", (200, 3)), (f"x.{number}.weight_scale_inv", "F32", (2, 1)))
    ]
    plan = make_plan(checkpoint_of(tensors), recipe_of("by e"), Layout(ranks))
    for rank in range(ranks):
        members = range(rank * 4 // ranks, (rank + 1) * 4 // ranks)
        scales, weights = [f"x.{number}.scale" for number in members], [f"x.{number}.weight" for number in members]
        assert [tensor.name for tensor in plan.tensors(rank)] == scales + weights


def test_the_header_is_there_to_the_byte() -> None:
    plan = make_plan(checkpoint_of([("x.weight", "U8", (2, 3))]), recipe_of("rows"), Layout(2))
    text = b'{"x.weight":{"dtype":"U8","shape":[1,3],"data_offsets":[0,3]}}'
    assert [file.header for file in plan.files] == [b"\x40" + bytes(7) + text + b"  "] * 2
    assert [(file.name, file.rank, file.size) for file in plan.files] == [
        ("0-of-2.safetensors", 0, 8 + 64 + 3),
        ("1-of-2.safetensors", 1, 8 + 64 + 3),
    ]


def test_the_order_in_a_file_is_by_dtype_then_name() -> None:
    """Not by number: 10 stands before 2, as safetensors has it."""
    dtypes = ["U8", "I64", "BF16", "F32"]
    tensors = [(f"x.{number}.weight", dtypes[number // 4], (1, 1)) for number in range(16)]
    plan = make_plan(checkpoint_of(tensors), recipe_of("by e"), Layout(1))
    assert [int(tensor.name.split(".")[1]) for tensor in plan.tensors(0)] == [
        *(4, 5, 6, 7),
        *(12, 13, 14, 15),
        *(10, 11, 8, 9),
        *(0, 1, 2, 3),
    ]


# --- numbers of ranks that do not work ---


def is_cuttable(length: int, block: int, ranks: int) -> bool:
    """By looking at every row: each local block of a rank lies in one block of the whole, so that its scale is that."""
    if length % ranks:
        return False
    part = length // ranks
    return all(
        len({(rank * part + row) // block for row in range(first, min(part, first + block))}) == 1
        for rank in range(ranks)
        for first in range(0, part, block)
    )


def scaled_weight(length: int, split: str) -> Checkpoint:
    blocks = -(-length // 128)
    shape, scale = ((length, 1), (blocks, 1)) if split == "rows" else ((1, length), (1, blocks))
    return checkpoint_of([("x.weight", "F8_E4M3", shape), ("x.weight_scale_inv", "F32", scale)])


@pytest.mark.parametrize("split", ["rows", "columns"])
@pytest.mark.parametrize("length", [129, 192, 200, 256, 384, 576, 640, 1152, 18_432])
def test_the_ranks_that_work_are_those_of_brute_force(length: int, split: str) -> None:
    working = [ranks for ranks in range(1, min(length, 4096) + 1) if is_cuttable(length, 128, ranks)]
    for ranks in range(1, min(length, 300) + 1):
        if ranks in working:
            assert len(make_plan(scaled_weight(length, split), recipe_of(split), Layout(ranks)).files) == ranks
            continue
        with pytest.raises(Refused) as refused:
            make_plan(scaled_weight(length, split), recipe_of(split), Layout(ranks))
        (problem,) = refused.value.problems
        assert problem.kind == ("not-divisible" if length % ranks else "straddles-blocks")
        a_rank = f"{length:,} {split}" if length % ranks else f"{length // ranks:,} {split} a rank"
        assert (problem.subject, problem.found) == (f"x.weight ({a_rank})", f"{ranks} ranks")
        assert problem.remedy == f"--mp with one of {text_of(working)}"


def text_of(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 30} more" if len(ranks) > 30 else ""
    return ", ".join(map(str, ranks[:30])) + more


@pytest.mark.parametrize("lengths", [(12, 18), (6, 35), (64, 96, 80), (1, 4), (24, 24)])
def test_the_ranks_that_work_suit_every_tensor(lengths: tuple[int, ...]) -> None:
    rules = ",\n".join(f'["same", "{name}", "{name}", "rows"]' for name in "abc"[: len(lengths)])
    recipe = parse_recipe(RECIPE.split("rules", maxsplit=1)[0] + f"rules = [\n{rules}\n]", "table.toml")
    checkpoint = checkpoint_of([(name, "U8", (length,)) for name, length in zip("abc", lengths, strict=False)])
    divisors = [ranks for ranks in range(1, gcd(*lengths) + 1) if gcd(*lengths) % ranks == 0]
    for ranks in range(1, 100):
        if ranks in divisors:
            assert len(make_plan(checkpoint, recipe, Layout(ranks)).files) == ranks
            continue
        with pytest.raises(Refused) as refused:
            make_plan(checkpoint, recipe, Layout(ranks))
        wrong = {name: f"{length} rows)" for name, length in zip("abc", lengths, strict=False) if length % ranks}
        said = [problem.subject.split(" (") for problem in refused.value.problems]
        assert {name: rows for names, rows in said for name in names.split(", ")} == wrong
        assert {problem.remedy for problem in refused.value.problems} == {f"--mp with one of {text_of(divisors)}"}


@pytest.mark.parametrize(
    ("dtype", "shape", "split", "working"),
    [
        ("F4", (2, 12), "columns", [1, 2, 3, 6]),
        ("F4", (4, 3), "columns", [1]),
        ("F4", (4, 3), "rows", [1, 2]),
        ("F4", (4, 4), "rows", [1, 2, 4]),
        ("F6_E2M3", (2, 16), "columns", [1, 2, 4]),
        ("F6_E2M3", (8, 2), "rows", [1, 2, 4]),
    ],
)
def test_elements_smaller_than_a_byte_are_cut_between_bytes(
    dtype: str, shape: Shape, split: str, working: list[int]
) -> None:
    for ranks in range(1, 14):
        if ranks in working:
            plan = make_plan(checkpoint_of([("x.weight", dtype, shape)]), recipe_of(split), Layout(ranks))
            assert len(plan.files) == ranks
            continue
        with pytest.raises(Refused) as refused:
            make_plan(checkpoint_of([("x.weight", dtype, shape)]), recipe_of(split), Layout(ranks))
        (problem,) = refused.value.problems
        assert (problem.kind, problem.subject.partition(" ")[0]) == ("not-divisible", "x.weight")
        assert problem.remedy == f"--mp with one of {text_of(working)}"


DENSE_WEIGHTS = "mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight"
NARROW_HEADS = {"num_attention_heads": 2, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}


@pytest.mark.parametrize(
    ("changes", "ranks", "subjects", "working"),
    [
        ({"n_routed_experts": 6}, 4, {"experts (6)"}, "1, 2"),
        (NARROW_HEADS, 4, {"num_attention_heads (2)"}, "1, 2"),
        (
            {},
            3,
            {
                "experts (16)",
                "num_attention_heads (8)",
                "model.embed_tokens.weight, lm_head.weight (4,096 rows)",
                "layers 0-4, self_attn.o_proj.weight (1,024 columns)",
            },
            "1, 2, 4",
        ),
        # 1536 is 192 for each of 8 ranks: one and a half blocks.
        (
            {},
            8,
            {
                f"dense layer 0, {DENSE_WEIGHTS} (192 rows or columns a rank)",
                "layers 0-4, self_attn.q_b_proj.weight (192 rows a rank)",
            },
            "1, 2, 4",
        ),
    ],
)
def test_what_the_ranks_do_not_suit_is_named(
    changes: Mapping[str, int], ranks: int, subjects: set[str], working: str
) -> None:
    config = {**SMALL_V3, **changes}
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint_of(list_tensors(config), config), load_recipe("deepseek-v3"), Layout(ranks))
    assert subjects <= {problem.subject for problem in refused.value.problems}
    assert {problem.remedy for problem in refused.value.problems} == {f"--mp with one of {working}"}


@pytest.mark.parametrize(
    ("tensors", "kind", "subject"),
    [
        ([("x.weight", "F8_E4M3", (4, 4))], "weight-without-scale", "x.weight"),
        ([("x.weight", "BF16", (4, 4)), ("x.weight_scale_inv", "F32", (1, 1))], "scale-without-weight", "_scale_inv"),
        ([("x.weight", "U8", (4, 4)), ("x.weight_scale_inv", "F32", (1, 1))], "wrong-dtype", "x.weight"),
        ([("x.weight_scale_inv", "F32", (1, 1))], "missing-tensor", "x.weight"),
        ([("x.weight", "F8_E4M3", (200, 4)), ("x.weight_scale_inv", "F32", (1, 1))], "wrong-scale", "_scale_inv"),
        ([("x.weight", "F8_E4M3", (4, 4)), ("x.weight_scale_inv", "F32", (1, 2))], "wrong-scale", "_scale_inv"),
        ([("x.weight", "F8_E4M3", (4, 4)), ("x.weight_scale_inv", "F32", (1,))], "wrong-scale", "_scale_inv"),
        ([("x.weight", "F8_E4M3", (4, 4)), ("x.weight_scale_inv", "F32", ())], "wrong-scale", "_scale_inv"),
        ([("x.weight", "U8", ())], "wrong-shape", "x.weight"),
    ],
)
def test_a_weight_and_its_scale_that_do_not_fit_are_refused(
    tensors: list[tuple[str, str, Shape]], kind: str, subject: str
) -> None:
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint_of(tensors), recipe_of("rows"), Layout(2))
    assert [problem.kind for problem in refused.value.problems] == [kind]
    assert refused.value.problems[0].subject.endswith(subject)


def test_a_line_has_no_columns() -> None:
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint_of([("x.weight", "U8", (4,))]), recipe_of("columns"), Layout(2))
    assert kinds_of(refused.value) == {"wrong-shape"}


# --- random models against plain slicing ---

DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DENSE = {f"model.layers.#.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
GATE = "model.layers.#.mlp.gate.weight"
BIAS = "model.layers.#.mlp.gate.e_score_correction_bias"
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Model:
    """What a random model is made from; all else is drawn from the seed."""

    ranks: int
    layers: int
    dense: int
    experts: int
    has_query_rank: bool
    is_scaled: bool
    has_mtp: bool
    has_config: bool
    files: int
    seed: int


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Models that can be cut."""
    ranks, dense = draw(st.sampled_from([1, 2, 3, 4, 6, 8])), draw(st.integers(0, 2))
    return Model(
        ranks=ranks,
        layers=dense + draw(st.integers(1, 2)),
        dense=dense,
        experts=ranks * draw(st.integers(1, 3)),
        has_query_rank=draw(st.booleans()),
        is_scaled=draw(st.booleans()),
        has_mtp=draw(st.booleans()),
        has_config=draw(st.booleans()),
        files=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**32)),
    )


@dataclass(frozen=True)
class Made:
    """A checkpoint, the bytes of its files, and each tensor as an array with one more axis: the bytes of an element."""

    checkpoint: Checkpoint
    files: list[bytes]
    arrays: dict[str, Bytes]
    dtypes: dict[str, str]


def make_model(model: Model) -> Made:
    """Tensors of any size that suits the ranks, stored in any order in any file."""
    random = Random(model.seed)
    shapes = dict(shapes_of(model, random))
    if model.has_mtp:
        shapes |= dict(mtp_shapes(model, shapes))
    arrays, dtypes = {}, {}
    generator = np.random.default_rng(model.seed)
    for name, (dtype, shape) in shapes.items():
        dtypes[name] = dtype
        arrays[name] = generator.integers(0, 256, (*shape, BITS[dtype] // 8), np.uint8)
    contents = [bytearray(random.randbytes(random.randint(10, 50))) for _ in range(model.files)]
    starts = [len(content) for content in contents]
    tensors = {}
    for name in random.sample(list(shapes), len(shapes)):
        file = random.randrange(model.files)
        data = arrays[name].tobytes()
        tensors[name] = Tensor(name, dtypes[name], shapes[name][1], file, len(contents[file]), len(data))
        contents[file] += data
    files = tuple(
        File(f"{number}.safetensors", len(content), start, "", 0)
        for number, (content, start) in enumerate(zip(contents, starts, strict=True))
    )
    return Made(
        Checkpoint(Path("nowhere"), files, tensors, config_of(model)), list(map(bytes, contents)), arrays, dtypes
    )


def config_of(model: Model) -> dict[str, Any] | None:
    if not model.has_config:
        return None
    return {
        "num_hidden_layers": model.layers,
        "first_k_dense_replace": model.dense,
        "n_routed_experts": model.experts,
        # Not the rank: the shapes are drawn, and what is no number is not held against them.
        "q_lora_rank": model.has_query_rank,
        "num_attention_heads": 2 * model.ranks,
    }


def names_of(kind: str, model: Model) -> list[str]:
    """The names of one kind of tensor, each # a number."""
    if "#" not in kind or (".q_proj." in kind and model.has_query_rank):
        return [] if "#" in kind else [kind]
    if (".q_a_" in kind or ".q_b_" in kind) and not model.has_query_rank:
        return []
    layers = range(model.layers)
    if ".mlp." in kind:
        layers = range(model.dense) if kind in DENSE else range(model.dense, model.layers)
    numbers = product(layers, range(model.experts)) if ".experts.#" in kind else product(layers)
    return [kind.replace("#", "%d") % chosen for chosen in numbers]


def shapes_of(model: Model, random: Random) -> Iterator[tuple[str, tuple[str, Shape]]]:
    for kind, (_, dimension) in oracle.NAMES.items():
        for name in names_of(kind, model):
            is_scaled = model.is_scaled and "_proj" in kind
            shape = shape_of(kind, dimension, model, random, is_scaled=is_scaled)
            dtype = "F8_E4M3" if is_scaled else random.choice(["BF16", "F16", "F32"])
            yield name, (dtype, shape)
            if is_scaled:
                yield f"{name}_scale_inv", ("F32", tuple(-(-size // 128) for size in shape))


def shape_of(kind: str, dimension: int | None, model: Model, random: Random, *, is_scaled: bool) -> Shape:
    other = random.choice([1, 2, 3, 5, 130])
    if kind == GATE:
        return model.experts, other
    if kind == BIAS:
        return (model.experts,)
    if "norm" in kind:
        return (other,)
    if dimension is None:
        return random.choice([1, 3, 130]), other
    length = model.ranks * random.choice([128, 256, 64, 32, 1] if is_scaled else [1, 2, 3, 7])
    return (length, other) if dimension == 0 else (other, length)


def mtp_shapes(model: Model, shapes: Mapping[str, tuple[str, Shape]]) -> Iterator[tuple[str, tuple[str, Shape]]]:
    """One more layer like the last, with what makes it an MTP layer."""
    last, own = f"model.layers.{model.layers - 1}.", f"model.layers.{model.layers}."
    for name, entry in shapes.items():
        if name.startswith(last):
            yield own + name.removeprefix(last), entry
    yield f"{own}eh_proj.weight", ("BF16", (3, 6))
    yield f"{own}shared_head.head.weight", ("BF16", (5, 3))


def expected_files(model: Model, made: Made) -> list[bytes]:
    """What safetensors writes for the share of each rank."""
    found = []
    for rank in range(model.ranks):
        share = {}
        for name in made.arrays:
            expert = oracle.expert_number(name)
            is_other = expert is not None and expert // (model.experts // model.ranks) != rank
            if is_other or name.startswith(f"model.layers.{model.layers}."):
                continue
            piece = slice_of(name, made, model.ranks, rank)
            flat = torch.from_numpy(piece.reshape(-1).copy()).view(DTYPES[made.dtypes[name]])
            share[oracle.look_up(name)[0]] = flat.reshape(piece.shape[:-1])
        found.append(save(share))
    return found


def slice_of(name: str, made: Made, ranks: int, rank: int) -> Bytes:
    """The rank's part of a weight by its equal share, and of a block scale by the blocks that this share touches."""
    array = made.arrays[name]
    dimension = oracle.look_up(name)[1]
    if dimension is None:
        return array
    is_scale = name.endswith("_scale_inv")
    length = made.arrays[oracle.weight_name(name)].shape[dimension] if is_scale else array.shape[dimension]
    first, end = length // ranks * rank, length // ranks * (rank + 1)
    if is_scale:
        first, end = first // 128, (end - 1) // 128 + 1
    return array[first:end] if dimension == 0 else array[:, first:end]


def apply(plan: Plan, sources: Sequence[bytes]) -> list[bytes]:
    """The copies, carried out one run at a time."""
    targets = [bytearray(file.header.ljust(file.size, b"\0")) for file in plan.files]
    for source, start, pitch, run, rows, target, offset in table_of(plan.copies):
        for row in range(rows):
            place = offset + row * run
            targets[target][place : place + run] = sources[source][start + row * pitch :][:run]
    return list(map(bytes, targets))


def table_of(copies: Copies) -> list[tuple[int, ...]]:
    return list(zip(*(getattr(copies, name).tolist() for name in Copies.__slots__), strict=True))


def plan_of(model: Model, made: Made) -> Plan:
    return make_plan(made.checkpoint, load_recipe("deepseek-v3"), Layout(model.ranks))


@given(models())
@settings(max_examples=40)
def test_the_copies_give_what_slicing_gives(model: Model) -> None:
    made = make_model(model)
    plan = plan_of(model, made)
    for rank, (found, expected) in enumerate(zip(apply(plan, made.files), expected_files(model, made), strict=True)):
        assert found == expected, f"rank {rank}"
        start = 8 + int.from_bytes(expected[:8], "little")
        assert list(plan.tensors(rank)) == parse_header(expected[8:start], rank, len(expected), "expected")


@given(models())
@settings(max_examples=30)
def test_what_becomes_of_the_source_is_what_the_copies_do(model: Model) -> None:
    made = make_model(model)
    plan = plan_of(model, made)
    reads = [np.zeros(len(content), int) for content in made.files]
    for source, start, pitch, run, rows, *_ in table_of(plan.copies):
        for row in range(rows):
            reads[source][start + row * pitch :][:run] += 1
    expected: dict[str, list[int]] = {}
    for tensor in made.checkpoint.tensors.values():
        times = set(reads[tensor.file][tensor.offset :][: tensor.size].tolist())
        use = {(0,): "dropped", (1,): "once", (model.ranks,): "replicated"}.get(tuple(times), "shared")
        use = "once" if times == {1} else use
        count = expected.setdefault(use, [0, 0])
        count[0] += 1
        count[1] += tensor.size
    found: dict[str, list[int]] = {}
    for share in plan.coverage:
        count = found.setdefault(share.use, [0, 0])
        count[0] += share.tensors
        count[1] += share.size
    assert found == expected
    assert sum(int(times.sum()) for times in reads) == sum(file.size - len(file.header) for file in plan.files)


@given(models(), st.data())
@settings(max_examples=20)
def test_some_ranks_have_the_copies_of_all_ranks(model: Model, data: st.DataObject) -> None:
    made = make_model(model)
    plan = plan_of(model, made)
    chosen = data.draw(st.sets(st.integers(0, model.ranks - 1), min_size=1))
    part = keep_ranks(plan, sorted(chosen, reverse=True))
    whole = apply(plan, made.files)
    assert apply(part, made.files) == [whole[rank] for rank in sorted(chosen)]
    assert [file.rank for file in part.files] == sorted(chosen)


# --- the proof ---


def prove(plan: Plan, copies: Copies) -> None:
    """All that `make_plan` proves of its copies."""
    require_tiling(copies, [len(file.header) for file in plan.files], [file.size for file in plan.files])
    matched = match(plan.source, plan.recipe)
    terms, casts = Terms(plan.recipe, plan.layout, None, len(plan.source.files), plan.config or {}), list(plan.casts)
    outcomes = [transform_weights(kind, terms, []) for kind in units_by_kind(matched, plan.recipe, plan.layout)]
    series = [one for outcome in outcomes for one in cut_for_ranks(outcome, terms, matched.counts)]
    prove_coverage(plan.source, plan.recipe, plan.layout, matched, series, casts, copies)


def with_row(copies: Copies, index: int, **changes: int) -> Copies:
    columns = {name: getattr(copies, name).copy() for name in Copies.__slots__}
    for name, value in changes.items():
        columns[name][index] = value
    return Copies(**columns)


def with_rows(copies: Copies, indices: Sequence[int]) -> Copies:
    return Copies(*(getattr(copies, name)[list(indices)] for name in Copies.__slots__))


def spoiled(copies: Copies, index: int, step: int, targets: int) -> Iterator[tuple[str, Copies]]:
    """Every way in which a single copy can be wrong, by a step of 1 or -1 where it is moved."""
    every = list(range(len(copies)))
    source, start, pitch, run, rows, target, offset = table_of(copies)[index]
    yield "dropped", with_rows(copies, every[:index] + every[index + 1 :])
    yield "duplicated", with_rows(copies, [*every, index])
    yield "moved in the target", with_row(copies, index, target_offset=offset + step)
    if targets > 1:
        yield "moved to another target", with_row(copies, index, target_file=(target + 1) % targets)
    yield "longer", with_row(copies, index, run=run + 1)
    yield "shorter", with_row(copies, index, run=run - 1)
    yield "higher", with_row(copies, index, rows=rows + 1)
    yield "moved in the source", with_row(copies, index, source_offset=start + step)
    yield "moved to another source", with_row(copies, index, source_file=source + step)
    if rows > 1:
        yield "of another pitch", with_row(copies, index, pitch=pitch + step)
        yield "of one long row", with_row(copies, index, run=run * rows, rows=1)
        if rows != run:
            yield "turned", with_row(copies, index, run=rows, rows=run)


@given(models(), st.data(), st.sampled_from([1, -1]))
@settings(max_examples=30)
def test_the_proof_sees_every_fault_of_a_single_copy(model: Model, data: st.DataObject, step: int) -> None:
    plan = plan_of(model, make_model(model))
    prove(plan, plan.copies)
    index = data.draw(st.integers(0, len(plan.copies) - 1))
    for fault, copies in spoiled(plan.copies, index, step, len(plan.files)):
        try:
            prove(plan, copies)
        except WrongPlan:
            continue
        pytest.fail(f"copy {index}, {fault}, was not seen")


@given(models(), st.data())
@settings(max_examples=50)
def test_the_proof_sees_a_copy_that_reads_another_part(model: Model, data: st.DataObject) -> None:
    """The other part is as large, so that the target is still tiled."""
    plan = plan_of(model, make_model(model))
    table = table_of(plan.copies)
    index = data.draw(st.integers(0, len(table) - 1))
    alike = [row for row in table if row[2:5] == table[index][2:5] and row[:2] != table[index][:2]]
    if not alike:
        return
    source, start, *_ = data.draw(st.sampled_from(alike))
    with pytest.raises(WrongPlan):
        prove(plan, with_row(plan.copies, index, source_file=source, source_offset=start))


@st.composite
def tables(draw: st.DrawFn, start: int) -> Copies:
    """A few small rectangles, most of them where the one before ends."""
    rows, source, target = [], start, start
    for _ in range(draw(st.integers(1, 4))):
        source += draw(st.sampled_from([0, 0, 0, 1, -1]))
        target += draw(st.sampled_from([0, 0, 0, 1, -1]))
        pitch, run, height = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
        rows.append((0, max(source, 0), pitch, run, height, 0, max(target, 0)))
        source, target = source + run, target + run * height
    return Copies(*np.array(rows, np.int64).T)


@given(tables(1), st.integers(1, 8))
@settings(max_examples=500)
def test_what_counts_as_tiled_is_tiled(copies: Copies, size: int) -> None:
    try:
        require_tiling(copies, [1], [1 + size])
    except WrongPlan:
        return
    writes = np.zeros(40, int)
    for *_, run, rows, _, offset in table_of(copies):
        writes[offset : offset + run * rows] += 1
    assert writes.tolist() == [0] + [1] * size + [0] * (39 - size)


@given(tables(1), st.sampled_from([[4], [2], [2, 4], [4, 2]]))
@settings(max_examples=500)
def test_what_counts_as_covered_is_covered(copies: Copies, sizes: list[int]) -> None:
    """Tensors from byte 1 on, behind a header of one byte and before a dropped one."""
    starts = [1, 1 + sizes[0]]
    used = [Tensor("", "U8", (size,), 0, start, size) for start, size in zip(starts, sizes, strict=False)]
    try:
        require_coverage(copies, used, [40])
    except WrongPlan:
        return
    reads = np.zeros(40, int)
    for _, start, pitch, run, rows, *_ in table_of(copies):
        for row in range(rows):
            reads[start + row * pitch :][:run] += 1
    end = 1 + sum(sizes)
    assert reads[0] == reads[end:].sum() == 0
    assert (reads[1:end] > 0).all()


def test_a_column_of_which_not_every_row_is_read_is_seen() -> None:
    """A tensor of two rows of ten bytes: the left half of its second row is read by nobody."""
    columns = {"source_file": [0, 0], "source_offset": [0, 5], "pitch": [5, 10], "run": [5, 5], "rows": [1, 2]}
    copies = Copies(
        **{name: np.array(column) for name, column in columns.items()},
        target_file=np.array([0, 1]),
        target_offset=np.array([0, 0]),
    )
    with pytest.raises(WrongPlan):
        require_coverage(copies, [Tensor("", "U8", (2, 10), 0, 0, 20)], [20])


@pytest.mark.parametrize("change", [{"size": 7}, {"size": 9}, {"offset": DATA_START}])
def test_a_plan_whose_proof_fails_is_not_given_out(change: Mapping[str, int]) -> None:
    """For a tensor that is not as large as its shape, or that lies where another one does; no header gives such."""
    checkpoint = checkpoint_of([("x.0.weight", "U8", (4, 2)), ("x.1.weight", "U8", (4, 2))])
    wrong = checkpoint.tensors["x.1.weight"]._replace(**change)  # type: ignore[arg-type]
    with pytest.raises(WrongPlan):
        make_plan(
            replace(checkpoint, tensors={**checkpoint.tensors, "x.1.weight": wrong}), recipe_of("by e"), Layout(2)
        )


@pytest.mark.parametrize("change", [{}, {"repeat": 1}, {"run": 2}, {"shape": (1, 2)}, {"repeat": 1, "uneven": (0, 3)}])
def test_a_cut_whose_runs_are_not_its_shape_is_seen(change: Mapping[str, Any]) -> None:
    """The header has the shape, the copies bring the runs. Two parts for four ranks."""
    tensor = Tensor("x.0.weight", "U8", (4, 2), 0, DATA_START, 8)
    cut = replace(cut_along(tensor, 0, 2, 2), **change)
    every, one = np.full(1, EVERY_RANK), np.zeros(1, np.int64)
    pieces = Pieces([tensor.name], [tensor], one, [cut], every, np.ones(1, np.bool_), {})
    files, copies = lay_out_files(recipe_of("rows"), Layout(4), pieces)
    ends = [len(file.header) for file in files], [file.size for file in files]
    if not change:
        require_tiling(copies, *ends)
        return
    with pytest.raises(WrongPlan):
        require_tiling(copies, *ends)


# --- the models in full size ---

V2: Mapping[str, Any] = {
    **DEEPSEEK_V2_LITE,
    "hidden_size": 5120,
    "intermediate_size": 12_288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "q_lora_rank": 1536,
}


@pytest.fixture(scope="session")
def deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """By the headers of files whose data are holes."""
    folder = tmp_path_factory.mktemp("full") / "deepseek-v3"
    write_checkpoint(folder, DEEPSEEK_V3, 163, sparse=True)
    return read_checkpoint(folder)


@pytest.mark.parametrize(
    ("ranks", "tensors", "size"),
    [
        (1, 90_427, 673_150_611_808),
        (16, 6_907, 43_139_382_208),
    ],
)
def test_deepseek_v3_in_full_size(ranks: int, tensors: int, size: int, deepseek_v3: Checkpoint) -> None:
    plan = make_plan(deepseek_v3, load_recipe("deepseek-v3"), Layout(ranks))
    assert [file.name for file in plan.files] == [f"model{rank}-mp{ranks}.safetensors" for rank in range(ranks)]
    assert [len(file.pieces) for file in plan.files] == [tensors] * ranks
    assert [file.size - len(file.header) for file in plan.files] == [size] * ranks
    assert [len(json.loads(file.header[8:])) for file in plan.files] == [tensors] * ranks
    assert sum(share.tensors for share in plan.coverage) == 91_991
    assert sum(share.size for share in plan.coverage) == 688_574_839_360
    dropped = [share for share in plan.coverage if share.use == "dropped"]
    assert [(share.tensors, share.size) for share in dropped] == [(1_564, 15_424_227_552)]
    uses = {"once", "dropped"} | ({"replicated"} if ranks > 1 else set())
    assert {share.use for share in plan.coverage} == uses
    assert plan.counts == {"i": 61, "d": 3, "s": 58, "e": 256, "m": 1}


def test_deepseek_v3_cannot_be_cut_for_32_ranks(deepseek_v3: Checkpoint) -> None:
    with pytest.raises(Refused) as refused:
        make_plan(deepseek_v3, load_recipe("deepseek-v3"), Layout(32))
    assert kinds_of(refused.value) == {"straddles-blocks"}
    (problem,) = refused.value.problems
    assert problem.subject == f"dense layers 0-2, {DENSE_WEIGHTS} (576 rows or columns a rank)"
    assert problem.remedy == "--mp with one of 1, 2, 4, 8, 16, or --pad"


@pytest.mark.parametrize(
    ("config", "ranks", "size"),
    [
        (DEEPSEEK_V2_LITE, 1, 31_412_968_448),
        (DEEPSEEK_V2_LITE, 2, 15_741_869_056),
        (DEEPSEEK_V2_LITE, 4, 7_906_319_360),
        (DEEPSEEK_V2_LITE, 8, 3_988_544_512),
        (DEEPSEEK_V2_LITE, 16, 2_029_657_088),
        (V2, 8, 60_156_651_520),
        (V2, 16, 30_776_207_360),
    ],
)
def test_deepseek_v2_in_full_size(config: Mapping[str, Any], ranks: int, size: int) -> None:
    plan = make_plan(checkpoint_of(list_tensors(config), config), load_recipe("deepseek-v2"), Layout(ranks))
    assert [file.size - len(file.header) for file in plan.files] == [size] * ranks
    assert sum(share.tensors for share in plan.coverage) == (5_291 if config is DEEPSEEK_V2_LITE else 29_102)


@pytest.mark.parametrize(
    ("config", "ranks", "working"),
    [(DEEPSEEK_V2_LITE, 32, "1, 2, 4, 8, 16"), (V2, 64, "1, 2, 4, 8, 16, 32")],
)
def test_the_ranks_that_work_for_deepseek_v2(config: Mapping[str, Any], ranks: int, working: str) -> None:
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint_of(list_tensors(config), config), load_recipe("deepseek-v2"), Layout(ranks))
    assert {problem.remedy for problem in refused.value.problems} == {f"--mp with one of {working}"}


# --- shapes and dtypes, by the config ---

TINY: Mapping[str, Any] = {
    **SMALL_V3,
    "hidden_size": 128,
    "intermediate_size": 512,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "q_lora_rank": 128,
    "vocab_size": 128,
}
PLAIN: Mapping[str, Any] = {key: value for key, value in TINY.items() if key != "quantization_config"}
V3 = load_recipe("deepseek-v3")
OUTPUT = "model.layers.1.self_attn.o_proj.weight"
Entries = list[tuple[str, str, Shape]]


def changed(config: Mapping[str, Any], name: str, dtype: str, shape: Shape | None = None) -> Entries:
    """The tensors of a model, one of them of another dtype or shape."""
    entries = [(old, dtype, shape or is_shape) if old == name else (old, is_dtype, is_shape)
               for old, is_dtype, is_shape in list_tensors(config)]  # fmt: skip
    assert entries != list_tensors(config)
    return entries


def refusal(entries: Iterable[tuple[str, str, Shape]], config: Mapping[str, Any] | None, layout: Layout) -> Refused:
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint_of(entries, config), V3, layout)
    return refused.value


@pytest.mark.parametrize(
    ("change", "names", "found", "expected"),
    [
        ({"vocab_size": 256}, {"model.embed_tokens.weight", "lm_head.weight"}, "[128, 128]", "[256, 128]"),
        ({"intermediate_size": 640}, {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")},
         "[512, 128]", "[640, 128]"),
        ({"qk_nope_head_dim": 64}, {f"model.layers.{layer}.self_attn.q_b_proj.weight" for layer in range(3)},
         "[768, 128]", "[512, 128]"),
        ({"n_shared_experts": 2}, {f"model.layers.{layer}.mlp.shared_experts.down_proj.weight" for layer in (1, 2)},
         "[128, 128]", "[128, 256]"),
        ({"kv_lora_rank": 64}, {f"model.layers.{layer}.self_attn.kv_a_layernorm.weight" for layer in range(3)},
         "[128]", "[64]"),
        ({"hidden_size": 256}, {"model.norm.weight"}, "[128]", "[256]"),
        # What the config does not tell is not held against it.
        ({"hidden_size": 256, "vocab_size": None}, {"lm_head.weight"}, "[128, 128]", "[?, 256]"),
    ],
)  # fmt: skip
def test_shapes_that_are_not_those_of_the_config_are_refused(
    change: Mapping[str, Any], names: set[str], found: str, expected: str
) -> None:
    refused = refusal(list_tensors(TINY), {**TINY, **change}, Layout(2))
    assert kinds_of(refused) == {"wrong-shape"}
    texts = {problem.subject: (problem.found, problem.expected) for problem in refused.problems}
    assert names <= texts.keys()
    for name in names:
        assert texts[name][0] == f"shape {found}"
        assert texts[name][1].startswith(f"{expected}, by config.json: [")
    assert not any(name.endswith("scale_inv") for name in texts)


@pytest.mark.parametrize("shape", [(128, 512, 1), (65_536,), (512, 128), (128, 256)])
def test_a_single_tensor_of_another_shape_is_named(shape: Shape) -> None:
    refused = refusal(changed(PLAIN, OUTPUT, "BF16", shape), PLAIN, Layout(1))
    assert [(problem.kind, problem.subject) for problem in refused.problems] == [("wrong-shape", OUTPUT)]


@pytest.mark.parametrize("config", [None, {}, {"vocab_size": "many"}, {"hidden_size": 3.5}, {"vocab_size": None}])
def test_shapes_of_which_the_config_says_nothing_are_taken(config: Mapping[str, Any] | None) -> None:
    """A vocabulary of 256 in one tensor only."""
    entries = changed(TINY, "lm_head.weight", "BF16", (256, 128))
    assert len(make_plan(checkpoint_of(entries, config), V3, Layout(2)).files) == 2


def test_what_is_dropped_may_have_any_shape() -> None:
    entries = changed(TINY, "model.layers.3.eh_proj.weight", "U8", (3,))
    assert make_plan(checkpoint_of(entries, TINY), V3, Layout(2))
    refused = refusal(entries, TINY, Layout(2, keep_optional=True))
    assert kinds_of(refused) == {"wrong-shape", "wrong-dtype"}
    assert {problem.subject for problem in refused.problems} == {"model.layers.3.eh_proj.weight"}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_floats_may_stand_for_one_another(dtype: str) -> None:
    assert make_plan(checkpoint_of(changed(PLAIN, OUTPUT, dtype) if dtype != "BF16" else list_tensors(PLAIN), PLAIN),
                     V3, Layout(2))  # fmt: skip


@pytest.mark.parametrize("config", [PLAIN, None])
@pytest.mark.parametrize("dtype", ["U8", "I8", "I64", "F64", "BOOL", "F8_E8M0", "F4"])
def test_another_dtype_than_a_float_is_refused(dtype: str, config: Mapping[str, Any] | None) -> None:
    name = "model.layers.1.mlp.gate.weight"
    refused = refusal(changed(PLAIN, name, dtype), config, Layout(2))
    assert [(problem.kind, problem.subject) for problem in refused.problems] == [("wrong-dtype", name)]
    assert refused.problems[0].expected == "BF16 or F16 or F32"


def test_the_dtype_that_a_row_names_is_the_only_one() -> None:
    text = RECIPE.split("rules", maxsplit=1)[0] + 'rules = [["same", "x", "x", "rows", "I64 [n, 2]"]]'
    recipe = parse_recipe(text, "table.toml")
    assert make_plan(checkpoint_of([("x", "I64", (4, 2))], {"n": 4}), recipe, Layout(2))
    for dtype in ("I32", "F32", "BF16"):
        with pytest.raises(Refused) as refused:
            make_plan(checkpoint_of([("x", dtype, (4, 2))], {"n": 4}), recipe, Layout(2))
        (problem,) = refused.value.problems
        assert (problem.kind, problem.found, problem.expected) == ("wrong-dtype", dtype, "I64")


def mixture(without_scale: Sequence[str]) -> Entries:
    """An FP8 model in which some weights are BF16 and have no scale."""
    scales = {f"{name}_scale_inv" for name in without_scale}
    return [
        (name, "BF16" if name in without_scale else dtype, shape)
        for name, dtype, shape in list_tensors(TINY)
        if name not in scales
    ]


def quantization(**more: object) -> dict[str, Any]:
    return {**TINY, "quantization_config": {**TINY["quantization_config"], **more}}


@pytest.mark.parametrize(
    "named",
    [None, [], ["lm_head"], ["model.layers.2.self_attn"], "model.layers.1.self_attn.o_proj", 5, [5], {"o_proj": 1}],
)
def test_a_bf16_weight_in_an_fp8_model_is_refused(named: object) -> None:
    """A loader makes an FP8 parameter of it, by the config, and casts it without a scale."""
    refused = refusal(mixture([OUTPUT]), quantization(modules_to_not_convert=named), Layout(2))
    assert [(problem.kind, problem.subject) for problem in refused.problems] == [("weight-without-scale", OUTPUT)]
    assert "quantization_config" in refused.problems[0].expected


@pytest.mark.parametrize("named", [["model.layers.1.self_attn.o_proj"], ["lm_head", 5, "self_attn"], ["o_proj"]])
def test_a_bf16_weight_that_the_config_excepts_is_taken(named: list[object]) -> None:
    plan = make_plan(checkpoint_of(mixture([OUTPUT]), quantization(modules_to_not_convert=named)), V3, Layout(2))
    found = {tensor.name: tensor.dtype for tensor in plan.tensors(1)}
    assert found["layers.1.attn.wo.weight"] == "BF16"
    assert "layers.1.attn.wo.scale" not in found
    assert found["layers.2.attn.wo.scale"] == "F32"


@pytest.mark.parametrize("config", [None, PLAIN])
def test_without_a_word_on_quantisation_a_bf16_weight_is_taken(config: Mapping[str, Any] | None) -> None:
    assert make_plan(checkpoint_of(mixture([OUTPUT]), config), V3, Layout(2))


# --- MTP layers ---


def test_mtp_layers_are_kept_if_they_are_asked_for() -> None:
    """They are laid out as the same tensors are in any other layer."""
    checkpoint = checkpoint_of(list_tensors(TINY), TINY)
    plan, without = make_plan(checkpoint, V3, Layout(2, keep_optional=True)), make_plan(checkpoint, V3, Layout(2))
    assert not [share for share in plan.coverage if share.use == "dropped"]
    for rank in range(2):
        found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.tensors(rank)}
        own = {name for name in found if name.startswith("layers.3.")}
        assert {tensor.name for tensor in without.tensors(rank)} == found.keys() - own
        like = {name for name in own if name.replace("layers.3.", "layers.2.") in found}
        assert {name: found[name] for name in like} == {
            name: found[name.replace("layers.3.", "layers.2.")] for name in like
        }
        assert {name: found[name] for name in own - like} == {
            "layers.3.embed.weight": ("BF16", (64, 128)),
            "layers.3.enorm.weight": ("BF16", (128,)),
            "layers.3.hnorm.weight": ("BF16", (128,)),
            "layers.3.eh_proj.weight": ("BF16", (128, 256)),
            "layers.3.norm.weight": ("BF16", (128,)),
            "layers.3.head.weight": ("BF16", (64, 128)),
        }


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_lies_in_mtp_layers_is_dropped_for_one_reason(ranks: int) -> None:
    extra = [("model.layers.3.what.ever", "U8", (7,)), ("model.layers.3.self_attn.rotary_emb.inv_freq", "F32", (32,))]
    of_layer = [entry for entry in list_tensors(TINY) if entry[0].startswith("model.layers.3.")]
    plan = make_plan(checkpoint_of([*list_tensors(TINY), *extra], TINY), V3, Layout(ranks))
    (share,) = (share for share in plan.coverage if share.use == "dropped")
    assert (share.what, share.reason) == ("MTP layers", "DeepSeek's inference code has no multi-token prediction")
    assert share.tensors == len(of_layer) + 2
    assert share.size == sum(prod(shape) * BITS[dtype] // 8 for _, dtype, shape in [*of_layer, *extra])


# --- padding: the model of a larger config ---

WIDE: Mapping[str, Any] = {**DEEPSEEK_V3, "num_hidden_layers": 4, "n_routed_experts": 64}
"""As wide as DeepSeek-V3: what is cut is the same, but for the number of layers and experts."""


@pytest.mark.parametrize(
    ("ranks", "raised"),
    [
        (16, {}),
        (32, {"intermediate_size": 20_480, "n_shared_experts": 2}),
        (64, {"intermediate_size": 24_576, "n_shared_experts": 4}),
    ],
)
@pytest.mark.parametrize("config", [WIDE, {key: value for key, value in WIDE.items() if key != "quantization_config"}])
def test_padding_gives_the_files_of_a_larger_config(
    ranks: int, raised: Mapping[str, int], config: Mapping[str, Any]
) -> None:
    """BF16 weights have no blocks: the widths of DeepSeek-V3 suit any of these numbers as they are."""
    raised = raised if "quantization_config" in config else {}
    plan = make_plan(checkpoint_of(list_tensors(config), config), V3, Layout(ranks, pad=True))
    assert plan.config == {**config, **raised}
    larger = make_plan(checkpoint_of(list_tensors({**config, **raised}), None), V3, Layout(ranks))
    assert [(file.name, file.header, file.size) for file in plan.files] == [
        (file.name, file.header, file.size) for file in larger.files
    ]
    assert {cast.operation for cast in plan.casts} == ({"pad"} if raised else set())


@pytest.mark.parametrize(
    ("source", "cast", "result"),
    [("bf16", "fp8", {"intermediate_size": 20_480, "n_shared_experts": 2}), ("fp8", "bf16", {})],
)
def test_padding_suits_the_blocks_that_there_will_be(source: str, cast: str, result: Mapping[str, int]) -> None:
    without = {key: value for key, value in WIDE.items() if key != "quantization_config"}
    config, other = (WIDE, without) if source == "fp8" else (without, WIDE)
    plan = make_plan(checkpoint_of(list_tensors(config), config), V3, Layout(32, pad=True, cast=cast))
    assert plan.config == {**config, **result}
    larger = make_plan(checkpoint_of(list_tensors({**other, **result})), V3, Layout(32))
    assert [file.header for file in plan.files] == [file.header for file in larger.files]


def test_what_is_padded_is_what_grows() -> None:
    plan = make_plan(checkpoint_of(list_tensors(WIDE), WIDE), V3, Layout(32, pad=True))
    before, after = list_tensors(WIDE), list_tensors({**WIDE, "intermediate_size": 20_480, "n_shared_experts": 2})
    grown = {
        name: (old, new)
        for (name, _, old), (_, _, new) in zip(before, after, strict=True)
        if old != new and not name.startswith("model.layers.4.")
    }
    assert {cast.weight.name: (cast.weight.shape, cast.result.shape) for cast in plan.casts} == grown
    assert len(plan.casts) == len(grown) == 2 * 3 * (3 + 1)
    assert all(cast.is_scale == cast.weight.name.endswith("_scale_inv") for cast in plan.casts)
    assert sum(share.tensors for share in plan.coverage if share.use == "padded") == len(grown)
    assert sum(share.tensors for share in plan.coverage) == len(before)


def test_deepseek_v3_in_full_size_is_padded_for_32_ranks(deepseek_v3: Checkpoint) -> None:
    plan = make_plan(deepseek_v3, load_recipe("deepseek-v3"), Layout(32, pad=True))
    raised = {"intermediate_size": 20_480, "n_shared_experts": 2}
    assert plan.config == {**DEEPSEEK_V3, **raised}
    kept = [entry for entry in list_tensors({**DEEPSEEK_V3, **raised}) if not entry[0].startswith("model.layers.61.")]
    whole = sum(prod(shape) * BITS[dtype] // 8 for name, dtype, shape in kept if is_whole(name))
    parts = sum(prod(shape) * BITS[dtype] // 8 for name, dtype, shape in kept if not is_whole(name))
    assert [file.size - len(file.header) for file in plan.files] == [whole + parts // 32] * 32
    assert sum(share.size for share in plan.coverage) == 688_574_839_360
    said = json.loads(make_run_config(plan))
    assert said == {**CONFIG_671B, "inter_dim": 20_480, "n_shared_experts": 2}


CONFIG_671B = {
    "vocab_size": 129_280,
    "dim": 7168,
    "inter_dim": 18_432,
    "moe_inter_dim": 2048,
    "n_layers": 61,
    "n_dense_layers": 3,
    "n_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 8,
    "n_expert_groups": 8,
    "n_limited_groups": 4,
    "route_scale": 2.5,
    "score_func": "sigmoid",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "dtype": "fp8",
}
"""The configuration that DeepSeek's code is started with for DeepSeek-V3, as it is published."""


def test_the_run_configuration_is_the_published_one(deepseek_v3: Checkpoint) -> None:
    said = make_run_config(make_plan(deepseek_v3, V3, Layout(16)))
    assert said == json.dumps(CONFIG_671B, indent=4)


def is_whole(name: str) -> bool:
    """Whether every rank has all of a tensor."""
    return oracle.expert_number(name) is None and oracle.look_up(name)[1] is None


def test_padding_needs_a_config() -> None:
    refused = refusal(list_tensors(TINY), None, Layout(2, pad=True))
    assert kinds_of(refused) == {"no-config"}


def test_heads_cannot_be_padded() -> None:
    refused = refusal(list_tensors(TINY), TINY, Layout(8, pad=True))
    subjects = {problem.subject.partition(" ")[0] for problem in refused.problems if problem.kind == "not-divisible"}
    assert subjects >= {"num_attention_heads", "experts"}
    assert not any("--pad" in problem.remedy for problem in refused.problems)


@pytest.mark.parametrize(
    ("length", "ranks", "wanted"), [(5, 2, 3), (6, 2, 3), (1, 4, 1), (7, 1, 7), (0, 3, 0), (257, 4, 65)]
)
def test_padded_rows_are_as_few_as_all_ranks_can_share(length: int, ranks: int, wanted: int) -> None:
    plan = make_plan(checkpoint_of([("x.weight", "BF16", (length, 3))]), recipe_of("padded rows"), Layout(ranks))
    assert [[tensor.shape for tensor in plan.tensors(rank)] for rank in range(ranks)] == [[(wanted, 3)]] * ranks
    assert [cast.operation for cast in plan.casts] == ["pad"] * (length != wanted * ranks)
    assert [cast.result.shape for cast in plan.casts] == [(wanted * ranks, 3)] * len(plan.casts)


def test_a_number_has_no_rows_to_pad() -> None:
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint_of([("x.weight", "BF16", ())]), recipe_of("padded rows"), Layout(2))
    assert kinds_of(refused.value) == {"wrong-shape"}


# --- casts ---


def listing(plan: Plan) -> Entries:
    """What all files of a target hold."""
    tensors = [tensor for index in range(len(plan.files)) for tensor in plan.tensors(index)]
    return [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]


@pytest.mark.parametrize(
    ("source", "cast", "result", "operations"),
    [
        (TINY, "bf16", PLAIN, {"dequantize"}),
        (PLAIN, "fp8", TINY, {"quantize", "quantize-scale"}),
        (PLAIN, "fp8-ue8m0", TINY, {"quantize-ue8m0", "quantize-ue8m0-scale"}),
        (TINY, "", TINY, set()),
    ],
)
@pytest.mark.parametrize("layout", [Layout(2), Layout(1, keep_optional=True), Layout(1, to=WHOLE)])
def test_a_cast_gives_the_tensors_of_the_other_model(
    source: Mapping[str, Any], cast: str, result: Mapping[str, Any], operations: set[str], layout: Layout
) -> None:
    layout = replace(layout, cast=cast)
    plan = make_plan(checkpoint_of(list_tensors(source), source), V3, layout)
    assert {one.operation for one in plan.casts} == operations
    assert sum(share.tensors for share in plan.coverage) == len(list_tensors(source))
    if layout.to == WHOLE:
        assert sorted(listing(plan)) == sorted(list_tensors(result))
        return
    other = make_plan(checkpoint_of(list_tensors(result), result), V3, replace(layout, cast=""))
    assert [(file.name, file.header) for file in plan.files] == [(file.name, file.header) for file in other.files]


@pytest.mark.parametrize(("source", "cast"), [(PLAIN, "bf16"), (TINY, "fp8")])
@pytest.mark.parametrize("layout", [Layout(2), Layout(1, to=WHOLE)])
def test_a_cast_to_what_is_there_already_is_refused(source: Mapping[str, Any], cast: str, layout: Layout) -> None:
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint_of(list_tensors(source), source), V3, replace(layout, cast=cast))
    assert [problem.kind for problem in refused.value.problems] == ["wrong-option"]


@pytest.mark.parametrize("layout", [Layout(4), Layout(1, to=WHOLE), Layout(1, to=WHOLE, file_size=100_000)])
def test_what_is_cast_is_computed_from_a_weight_and_its_scale(layout: Layout) -> None:
    checkpoint = checkpoint_of(list_tensors(TINY), TINY)
    plan = make_plan(checkpoint, V3, replace(layout, cast="bf16"))
    dropped = () if layout.to == WHOLE else ("model.layers.3.",)
    scales = [name for name in checkpoint.tensors if name.endswith("_scale_inv") and not name.startswith(dropped)]
    assert sorted(cast.scale.name for cast in plan.casts if cast.scale) == sorted(scales)
    files = len(checkpoint.files)
    for place, cast in enumerate(plan.casts):
        assert cast.scale == checkpoint.tensors[f"{cast.weight.name}_scale_inv"]
        assert cast.weight == checkpoint.tensors[cast.weight.name]
        assert cast.block == (128, 128)
        assert cast.result[1:] == ("BF16", cast.weight.shape, files + place, 0, 2 * cast.weight.size)
    share = [one for one in plan.coverage if one.use == "dequantized"]
    assert sum(one.tensors for one in share) == 2 * len(plan.casts)
    assert sum(one.size for one in share) == sum(
        cast.weight.size + cast.scale.size for cast in plan.casts if cast.scale
    )
    # Every byte of every result is copied; here to one place, for no such weight is replicated whole.
    read = np.zeros(files + len(plan.casts), np.int64)
    np.add.at(read, plan.copies.source_file, plan.copies.run * plan.copies.rows)
    for place, cast in enumerate(plan.casts):
        assert read[files + place] in ({cast.result.size} | ({4 * cast.result.size} if layout.ranks == 4 else set()))


def test_results_of_casts_are_proven_to_be_used_whole() -> None:
    plan = make_plan(checkpoint_of(list_tensors(TINY), TINY), V3, Layout(2, cast="bf16"))
    first = int(np.flatnonzero(plan.copies.source_file >= len(plan.source.files))[0])
    matched, terms, casts = (
        match(plan.source, V3),
        Terms(V3, plan.layout, None, len(plan.source.files), TINY),
        list[Cast](),
    )
    outcomes = [transform_weights(kind, terms, casts) for kind in units_by_kind(matched, V3, plan.layout)]
    series = [one for outcome in outcomes for one in cut_for_ranks(outcome, terms, matched.counts)]
    prove_coverage(plan.source, V3, plan.layout, matched, series, casts, plan.copies)
    wrong = with_row(plan.copies, first, source_offset=int(plan.copies.source_offset[first]) + 1)
    with pytest.raises(WrongPlan):
        prove_coverage(plan.source, V3, plan.layout, matched, series, casts, wrong)
    with pytest.raises(WrongPlan):
        prove_coverage(plan.source, V3, plan.layout, matched, series[1:], casts, plan.copies)


# --- the layout of the source ---


def test_a_checkpoint_goes_out_in_files_that_are_not_too_large() -> None:
    """In the order of the source; a tensor that is larger than a file may be is a file by itself."""
    checkpoint = checkpoint_of(list_tensors(TINY), TINY)
    most = 60_000
    plan = make_plan(checkpoint, V3, Layout(1, to=WHOLE, file_size=most))
    count = len(plan.files)
    assert [file.name for file in plan.files] == [
        f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)
    ]
    groups = [[checkpoint.tensors[tensor.name] for tensor in plan.tensors(index)] for index in range(count)]
    sizes = [sum(tensor.size for tensor in group) for group in groups]
    assert all(size <= most or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    assert any(size > most for size in sizes)
    ordered = [sorted(group, key=lambda tensor: tensor.offset) for group in groups]
    assert [tensor.name for group in ordered for tensor in group] == list(checkpoint.tensors)
    # Nothing more would have gone into any of them.
    assert all(size + group[0].size > most for size, group in zip(sizes, ordered[1:], strict=False))
    for file in plan.files:
        assert json.loads(file.header[8:])["__metadata__"] == {"format": "pt"}


@given(st.integers(1, 4), st.integers(1, 400), st.integers(0, 2**32))
@settings(max_examples=20)
def test_the_copies_of_a_whole_checkpoint_give_its_bytes(files: int, most: int, seed: int) -> None:
    model = Model(
        1, 2, 1, 2, has_query_rank=True, is_scaled=True, has_mtp=False, has_config=False, files=files, seed=seed
    )
    made = make_model(model)
    plan = make_plan(made.checkpoint, V3, Layout(1, to=WHOLE, file_size=100 * most))
    found: dict[str, torch.Tensor] = {}
    for content in apply(plan, made.files):
        found |= load(content)
    assert found.keys() == made.arrays.keys()
    for name, tensor in found.items():
        assert tensor.dtype == DTYPES[made.dtypes[name]]
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == made.arrays[name].tobytes()


def test_a_checkpoint_that_fits_is_one_file() -> None:
    plan = make_plan(checkpoint_of(list_tensors(TINY), TINY), V3, Layout(1, to=WHOLE))
    assert [file.name for file in plan.files] == ["model.safetensors"]
    assert {share.use for share in plan.coverage} == {"once"}


def test_what_is_dropped_for_ranks_stays_in_a_whole_checkpoint() -> None:
    extra = ("model.layers.3.what.ever", "U8", (7,))
    plan = make_plan(checkpoint_of([*list_tensors(TINY), extra], TINY), V3, Layout(1, to=WHOLE))
    assert sorted(listing(plan)) == sorted([*list_tensors(TINY), extra])


# --- packed FP4 ---

PACKED = RECIPE.replace("block = 128", "block = [1, 32], packed = true, fp8_block = 128")
FP4 = [("x.weight", "I8", (4, 128)), ("x.weight_scale_inv", "F8_E8M0", (4, 8))]


def packed(split: str) -> Recipe:
    return parse_recipe(PACKED % ("x", "x", split), "packed.toml")


@pytest.mark.parametrize(
    ("layout", "split", "wanted"),
    [
        (Layout(2), "rows", [("x.scale", "F8_E8M0", (2, 8)), ("x.weight", "F4", (2, 256))]),
        (Layout(2), "columns", [("x.scale", "F8_E8M0", (4, 4)), ("x.weight", "F4", (4, 128))]),
        (Layout(8), "columns", [("x.scale", "F8_E8M0", (4, 1)), ("x.weight", "F4", (4, 32))]),
        # A rank's 16 elements share a scale with another rank's.
        (Layout(16), "columns", [("x.scale", "F8_E8M0", (4, 1)), ("x.weight", "F4", (4, 16))]),
        (Layout(1), "replicate", [("x.scale", "F8_E8M0", (4, 8)), ("x.weight", "F4", (4, 256))]),
        (Layout(1, to=WHOLE), "rows", [("x.weight", "I8", (4, 128)), ("x.weight_scale_inv", "F8_E8M0", (4, 8))]),
        (Layout(2, expert_dtype="fp8"), "columns", [("x.scale", "F8_E8M0", (1, 1)), ("x.weight", "F8_E4M3", (4, 128))]),
        (Layout(1, expert_dtype="fp8", to=WHOLE), "rows",
         [("x.weight", "F8_E4M3", (4, 256)), ("x.weight_scale_inv", "F8_E8M0", (1, 2))]),
        (Layout(2, cast="bf16"), "rows", [("x.weight", "BF16", (2, 256))]),
        (Layout(1, cast="bf16", to=WHOLE), "rows", [("x.weight", "BF16", (4, 256))]),
    ],
)  # fmt: skip
def test_packed_weights_are_elements_of_four_bits(layout: Layout, split: str, wanted: Entries) -> None:
    plan = make_plan(checkpoint_of(FP4), packed(split), layout)
    found = [[(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors(index)]
             for index in range(len(plan.files))]  # fmt: skip
    assert [sorted(one) for one in found] == [wanted] * layout.ranks
    for one in plan.casts:
        assert (one.weight.name, one.scale and one.scale.name) == ("x.weight", "x.weight_scale_inv")
        assert one.block == (1, 32)
        assert one.new_block == ((128, 128) if layout.expert_dtype else (1, 1))


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        (FP4[:1], "weight-without-scale"),
        # FP8 that was cast from FP4 has the block of that.
        ([("x.weight", "F8_E4M3", (4, 128)), ("x.weight_scale_inv", "F8_E8M0", (4, 4))], "wrong-scale"),
        ([("x.weight", "F8_E4M3", (4, 128))], "weight-without-scale"),
        ([("x.weight", "BF16", (4, 256)), FP4[1]], "scale-without-weight"),
        ([("x.weight", "U8", (4, 256)), FP4[1]], "wrong-dtype"),
        ([FP4[0], ("x.weight_scale_inv", "F8_E8M0", (4, 4))], "wrong-scale"),
        ([FP4[0], ("x.weight_scale_inv", "U8", (4, 8))], "wrong-scale"),
        ([FP4[0], ("x.weight_scale_inv", "I64", (4, 8))], "wrong-scale"),
    ],
)
def test_packed_weights_and_scales_that_do_not_fit_are_refused(tensors: Entries, kind: str) -> None:
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint_of(tensors), packed("rows"), Layout(2))
    assert kinds_of(refused.value) == {kind}


def test_weights_that_could_be_packed_may_be_fp8() -> None:
    tensors = [("x.weight", "F8_E4M3", (200, 256)), ("x.weight_scale_inv", "F8_E8M0", (2, 2))]
    plan = make_plan(checkpoint_of(tensors), packed("columns"), Layout(2))
    found = [(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors(1)]
    assert sorted(found) == [("x.scale", "F8_E8M0", (2, 1)), ("x.weight", "F8_E4M3", (200, 128))]
    assert not plan.casts


@pytest.mark.parametrize("ranks", [32, 512])
def test_packed_weights_are_cut_between_bytes_and_blocks(ranks: int) -> None:
    tensors = [("x.weight", "I8", (4, 128 * 3)), ("x.weight_scale_inv", "F8_E8M0", (4, 24))]
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint_of(tensors), packed("columns"), Layout(ranks))
    assert kinds_of(refused.value) <= {"straddles-blocks", "not-divisible"}


# --- weights that are dequantised for the other side ---


@pytest.mark.parametrize(
    ("source", "layout", "wanted"),
    [
        ([("x.weight", "F8_E4M3", (200, 4)), ("x.weight_scale_inv", "F32", (2, 1))], Layout(2),
         [("y.weight", "BF16", (100, 4))]),
        ([("x.weight", "BF16", (200, 4))], Layout(2), [("y.weight", "BF16", (100, 4))]),
        ([("x.weight", "F8_E4M3", (200, 4)), ("x.weight_scale_inv", "F32", (2, 1))], Layout(1, to=WHOLE),
         [("x.weight", "F8_E4M3", (200, 4)), ("x.weight_scale_inv", "F32", (2, 1))]),
    ],
)  # fmt: skip
def test_what_is_dequantised_has_no_scale_and_no_blocks(source: Entries, layout: Layout, wanted: Entries) -> None:
    """200 rows are no whole blocks for 2 ranks: of BF16 that does not matter."""
    row = 'rules = [["dequantize", "x.{p}", "y.weight", "rows"]]'
    recipe = parse_recipe(RECIPE.split("rules", maxsplit=1)[0] + row, "table.toml")
    plan = make_plan(checkpoint_of(source), recipe, layout)
    for index in range(len(plan.files)):
        found = [(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors(index)]
        assert sorted(found) == wanted


def test_what_is_dequantised_for_the_other_side_is_not_quantised_for_it() -> None:
    row = 'rules = [["dequantize", "x.{p}", "y.weight", "rows"], ["same", "z.{p}", "z.{p}", "rows"]]'
    recipe = parse_recipe(RECIPE.split("rules", maxsplit=1)[0] + row, "table.toml")
    source = checkpoint_of([("x.weight", "BF16", (256, 4)), ("z.weight", "BF16", (256, 4))])
    plan = make_plan(source, recipe, Layout(2, cast="fp8"))
    assert {tensor.name: tensor.dtype for tensor in plan.tensors(0)} == {
        "y.weight": "BF16", "z.weight": "F8_E4M3", "z.scale": "F32"
    }  # fmt: skip


# --- options that would do nothing ---


@pytest.mark.parametrize(
    ("recipe", "layout", "subject"),
    [
        ("deepseek-v2", Layout(2, cast="bf16"), "--cast"),
        ("deepseek-v3", Layout(2, expert_dtype="fp8"), "--expert-dtype"),
        ("deepseek-v2", Layout(2, keep_optional=True), "--mtp"),
        ("deepseek-v3", Layout(2, to=WHOLE), "--to hf"),
        ("deepseek-v3", Layout(1, to=WHOLE, pad=True), "--to hf"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(recipe: str, layout: Layout, subject: str) -> None:
    config = TINY if recipe == "deepseek-v3" else DEEPSEEK_V2_LITE
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint_of(list_tensors(config), config), load_recipe(recipe), layout)
    assert [(problem.kind, problem.subject) for problem in refused.value.problems] == [("wrong-option", subject)]


def test_nothing_can_be_padded_by_a_recipe_that_does_not_say_what() -> None:
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint_of([("x.weight", "U8", (4, 4))], {}), recipe_of("rows"), Layout(2, pad=True))
    assert [problem.subject for problem in refused.value.problems] == ["--pad"]


@pytest.mark.parametrize("ranks", [0, -1, 4097, 10**9])
@pytest.mark.parametrize("split", ["rows", "padded rows", "by e"])
def test_a_number_of_ranks_that_is_none_is_refused_before_all_else(ranks: int, split: str) -> None:
    tensors = [("x.0.weight" if split == "by e" else "x.weight", "BF16", (4, 4))]
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint_of(tensors), recipe_of(split), Layout(ranks))
    assert kinds_of(refused.value) == {"wrong-ranks"}


@pytest.mark.parametrize("ranks", [[], [3, 0]])
def test_a_plan_for_some_ranks_keeps_what_it_is_of(ranks: list[int]) -> None:
    plan = make_plan(checkpoint_of([("x.weight", "U8", (4, 4))]), recipe_of("rows"), Layout(4))
    part = keep_ranks(plan, ranks)
    assert replace(part, files=plan.files, copies=plan.copies) == plan
    assert [file.rank for file in part.files] == sorted(ranks)
    assert len(part.copies) == len(ranks)
