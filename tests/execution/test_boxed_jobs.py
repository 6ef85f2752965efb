"""Jobs whose source lies in boxes, with joins of joins larger than a window: each against torch."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from jobs import make_plan
from safetensors.torch import save_file
from tilings import cut_evenly, read_boxes, read_wholes, slices_of
from verified_targets import verify_target

from reshard.errors import Refused
from reshard.execution.execute import Settings, execute_plan, measure_memory_per_thread
from reshard.execution.joins import count_join_levels
from reshard.execution.windows import WINDOW_SIZE
from reshard.inspection.diff import PairedSides, compare_pairs
from reshard.inspection.tensor_pairs import DiffChoice, DiffSide, pair_up
from reshard.loading.lazy import Tensors
from reshard.loading.load import load_planned
from reshard.planning.reads import measure_reads
from reshard.recipes.recipe import load_recipe
from reshard.sources.boxes import assemble_boxes
from reshard.sources.checkpoints import read_checkpoint
from reshard.storage.counting import WorkCounter
from reshard.target.preflight import describe_others, look_at_target
from reshard.types import WHOLE, Checkpoint, Layout

SHAPES = {
    "layers.0.w": (3, 700, 1500),
    "layers.1.w": (5, 1000, 900),
    "layers.2.w": (4, 3, 200, 700),
    "layers.3.w": (1, 900),
}
MESH = (1, 2, 3, 2)
"""The pieces of each dimension, whose first is whole: rows lie apart in rows that lie apart."""
RECIPE = """
name = "boxes"
about = "tensors in boxes"
left = "one"
right = "other"
files = "{rank}-of-{ranks}.safetensors"
placeholders.i = { counts = "layers" }
rules = [["same", "layers.{i}.w", "layers.{i}.w", "rows"]]
"""


def cut_for_rank(shape: tuple[int, ...], rank: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(cut_evenly(side, MESH[number])[rank[number]] for number, side in enumerate(shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("boxed")


@pytest.fixture(scope="module")
def wholes() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def checkpoint(folder: Path, wholes: dict[str, torch.Tensor]) -> Checkpoint:
    (folder / "own.toml").write_text(RECIPE, encoding="utf-8")
    source = folder / "source"
    source.mkdir()
    (source / "config.json").write_text("{}", encoding="utf-8")
    places = []
    for number, rank in enumerate(product(*map(range, MESH))):
        bounds = {name: cut_for_rank(shape, rank) for name, shape in SHAPES.items()}
        parts = {name: wholes[name][slices_of(box)].contiguous() for name, box in bounds.items()}
        save_file(parts, source / f"shard-{number + 1:05}.safetensors")
        places.append({name: tuple(low for low, _ in box) for name, box in bounds.items()})
    found = assemble_boxes(read_boxes(source, places), replicas="first")
    assert count_join_levels(found.joins, len(found.files)) == 2
    return found


def convert(checkpoint: Checkpoint, layout: Layout, target: Path, settings: Settings) -> None:
    recipe = load_recipe(str(checkpoint.folder.parent / "own.toml"))
    state = look_at_target(make_plan(checkpoint, recipe, layout), target)
    execute_plan(state.plan, target, describe_others(state), WorkCounter(None, state.size, writes=True), settings)


@pytest.mark.parametrize("cast", ["", "bf16"])
@pytest.mark.parametrize("jobs", [1, 3])
def test_whole_files_are_those_of_torch(
    cast: str, jobs: int, checkpoint: Checkpoint, wholes: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    convert(checkpoint, Layout(1, to=WHOLE, cast=cast), tmp_path / "target", Settings(jobs=jobs))
    found = read_wholes(tmp_path / "target")
    assert found.keys() == wholes.keys()
    for name, whole in wholes.items():
        assert torch.equal(found[name], whole.bfloat16() if cast else whole), name
    recipe = load_recipe(str(checkpoint.folder.parent / "own.toml"))
    assert verify_target(tmp_path / "target", checkpoint, recipe).is_proven


def test_memory_is_that_of_the_buffers_a_level_each(checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> None:
    plan = make_plan(checkpoint, load_recipe(str(folder / "own.toml")), Layout(1, to=WHOLE))
    flat = replace(plan, source=replace(checkpoint, joins=checkpoint.joins[:1]))
    needed = measure_memory_per_thread(plan)
    assert needed - measure_memory_per_thread(flat) == 2 * WINDOW_SIZE
    convert(checkpoint, Layout(1, to=WHOLE), tmp_path / "target", Settings(max_memory=needed))
    with pytest.raises(Refused, match="max-memory"):
        convert(checkpoint, Layout(1, to=WHOLE), tmp_path / "other", Settings(max_memory=needed - 1))


def test_a_rank_is_loaded(checkpoint: Checkpoint, wholes: dict[str, torch.Tensor], folder: Path) -> None:
    plan = make_plan(checkpoint, load_recipe(str(folder / "own.toml")), Layout(1))
    found = load_planned(plan, "cpu", "torch", 2, allow_inexact=False)
    assert found.keys() == wholes.keys()
    assert all(torch.equal(found[name], whole) for name, whole in wholes.items())


def test_slices_of_opened_tensors(checkpoint: Checkpoint, wholes: dict[str, torch.Tensor]) -> None:
    with Tensors(checkpoint, "torch") as opened:
        for name, whole in wholes.items():
            assert torch.equal(opened[name][:], whole)
        for key in ((1,), (2, slice(100, 650)), (slice(1, 3), slice(None, None, 7)), (0, 699, slice(3, 9))):
            assert torch.equal(opened["layers.0.w"][key], wholes["layers.0.w"][key])


def test_a_tensor_inside_a_join_is_opened_and_converted(
    checkpoint: Checkpoint, wholes: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """As the parts of a stacked tensor that is taken apart."""
    stacked = checkpoint.tensors["layers.1.w"]
    size = stacked.size // 5
    apart = {
        name: stacked._replace(name=name, shape=stacked.shape[1:], offset=number * size, size=size)
        for number, name in enumerate(f"layers.{n}.w" for n in range(5))
    }
    part = replace(checkpoint, tensors=apart)
    with Tensors(part, "torch") as opened:
        for number, name in enumerate(apart):
            assert torch.equal(opened[name][:], wholes["layers.1.w"][number])
    for cast in ("", "bf16"):
        target = tmp_path / f"target{cast}"
        convert(part, Layout(1, to=WHOLE, cast=cast), target, Settings())
        found = read_wholes(target)
        for number, name in enumerate(apart):
            wanted = wholes["layers.1.w"][number]
            assert torch.equal(found[name], wanted.bfloat16() if cast else wanted)
        assert verify_target(target, part, load_recipe(str(checkpoint.folder.parent / "own.toml"))).is_proven


def test_diff_reads_both_sides_alike(checkpoint: Checkpoint, wholes: dict[str, torch.Tensor], tmp_path: Path) -> None:
    changed = {name: whole.clone() for name, whole in wholes.items()}
    changed["layers.2.w"][3, 2, 199, 650] += 1
    save_file(changed, tmp_path / "model.safetensors")
    sides = DiffSide(checkpoint, "", ()), DiffSide(read_checkpoint(tmp_path), "", ())
    pairing = pair_up(*sides, DiffChoice())
    found = compare_pairs(PairedSides(sides, pairing, ()), None)
    assert {name for name, distance in found.items() if distance.apart} == {"layers.2.w"}


def count_read() -> int:
    """The bytes that this process has asked the kernel for."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split("rchar: ")[1].split()[0])


def test_a_plan_says_what_is_read_through_joins_of_joins(checkpoint: Checkpoint, folder: Path, tmp_path: Path) -> None:
    plan = make_plan(checkpoint, load_recipe(str(folder / "own.toml")), Layout(1, to=WHOLE))
    planned = measure_reads(plan.source, plan.casts, plan.copies)
    assert planned.size == sum(tensor.size for tensor in checkpoint.tensors.values())
    assert planned.replicas == 0
    state = look_at_target(plan, tmp_path / "target")  # which reads samples of the source
    before = count_read()
    counter = WorkCounter(None, state.size, writes=True)
    execute_plan(state.plan, tmp_path / "target", describe_others(state), counter, Settings())
    assert 0 <= count_read() - before - planned.size < 1 << 19


def test_replicas_inside_joins_of_joins_are_counted(checkpoint: Checkpoint, folder: Path) -> None:
    twice = tuple(
        join._replace(parts=tuple(part * 2 if part[0].file < len(checkpoint.files) else part for part in join.parts))
        for join in checkpoint.joins
    )
    source = replace(checkpoint, joins=twice)
    plan = make_plan(source, load_recipe(str(folder / "own.toml")), Layout(1, to=WHOLE))
    planned = measure_reads(plan.source, plan.casts, plan.copies)
    in_joins = sum(tensor.size for tensor in checkpoint.tensors.values() if tensor.file >= len(checkpoint.files))
    assert planned.replicas == in_joins
