"""Tensors of three to ten dimensions, cut along any of them: as torch cuts them, there and back, proven and read."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import Job, convert_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

import reshard
from reshard.errors import Refused

HEAD = """
name   = "boxes"
about  = "tensors of many dimensions"
left   = "huggingface"
right  = "boxes"
files  = "rank{rank}-of-{ranks}.safetensors"
"""

CUTS: Mapping[str, tuple[tuple[int, ...], str, int | None]] = {
    "rows": ((4, 3, 2), "rows", 0),
    "first": ((8, 3, 2), "dimension 0", 0),
    "columns": ((3, 8, 5), "columns", 1),
    "second": ((3, 4, 5, 2), "dimension 1", 1),
    "third": ((3, 5, 4), "dimension 2", 2),
    "third-of-four": ((2, 3, 8, 5), "dimension 2", 2),
    "fourth": ((2, 3, 5, 4), "dimension 3", 3),
    "tenth": ((2, 1, 1, 1, 1, 1, 1, 1, 3, 4), "dimension 9", 9),
    "whole": ((2, 3, 4), "replicate", None),
}
"""By the name of a tensor: its shape, its split, and the dimension that a rank has a part of."""


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}", encoding="utf-8")


def write_recipe(folder: Path, rows: str = "", cuts: Mapping[str, tuple[object, str, object]] = CUTS) -> str:
    """A recipe of all tensors of CUTS, or with other rows."""
    rows = rows or "".join(f'["same", "box.{name}", "box.{name}", "{cuts[name][1]}"],\n' for name in cuts)
    path = folder / "boxes.toml"
    path.write_text(f"{HEAD}\nrules = [\n{rows}]\n", encoding="utf-8")
    return str(path)


def make_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(3)
    if dtype.is_floating_point:
        return {f"box.{name}": torch.rand(shape).to(dtype) for name, (shape, _, _) in CUTS.items()}
    return {f"box.{name}": torch.randint(256, shape).to(dtype) for name, (shape, _, _) in CUTS.items()}


def cut(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    dimensions = {f"box.{name}": dimension for name, (_, _, dimension) in CUTS.items()}
    return {
        name: tensor if at is None else tensor.chunk(ranks, at)[rank].contiguous()
        for name, tensor in tensors.items()
        for at in [dimensions[name]]
    }


def require_ranks(folder: Path, tensors: Mapping[str, Tensor], ranks: int) -> None:
    for rank in range(ranks):
        found, wanted = load_file(folder / f"rank{rank}-of-{ranks}.safetensors"), cut(tensors, rank, ranks)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(found[name], tensor), f"{name} of rank {rank}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_dimension_is_cut_as_torch_cuts_it_and_joined_again(
    dtype: torch.dtype, ranks: int, tmp_path: Path
) -> None:
    tensors, recipe = make_tensors(dtype), write_recipe(tmp_path)
    write(tmp_path / "source", tensors)
    convert_checkpoint(Job(tmp_path / "source", ranks, recipe=recipe), tmp_path / "ranks")
    require_ranks(tmp_path / "ranks", tensors, ranks)
    report = reshard.verify(tmp_path / "ranks", tmp_path / "source", recipe=recipe)
    assert report.problems == ()
    assert report.compared == report.size > 0
    convert_checkpoint(Job(tmp_path / "ranks", 1, recipe=recipe, to="hf"), tmp_path / "back")
    wanted = (tmp_path / "source" / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == wanted
    assert reshard.verify(tmp_path / "back", tmp_path / "ranks", recipe=recipe).problems == ()


@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (1, 4)])
def test_ranks_of_one_number_become_those_of_another(first: int, second: int, tmp_path: Path) -> None:
    tensors, recipe = make_tensors(torch.float32), write_recipe(tmp_path)
    write(tmp_path / "source", tensors)
    convert_checkpoint(Job(tmp_path / "source", first, recipe=recipe), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "ranks", second, recipe=recipe), tmp_path / "again")
    require_ranks(tmp_path / "again", tensors, second)


@pytest.mark.parametrize("share", [None, 0.1])
def test_rounding_keeps_to_the_cut_dimension(share: float | None, tmp_path: Path) -> None:
    tensors, recipe = make_tensors(torch.float32), write_recipe(tmp_path)
    write(tmp_path / "source", tensors)
    convert_checkpoint(Job(tmp_path / "source", 2, recipe=recipe, cast="bf16"), tmp_path / "ranks")
    require_ranks(tmp_path / "ranks", {name: tensor.bfloat16() for name, tensor in tensors.items()}, 2)
    assert reshard.verify(tmp_path / "ranks", tmp_path / "source", recipe=recipe, sample=share).problems == ()


@pytest.mark.parametrize("cast", ["", "bf16"])
@pytest.mark.parametrize("name", [name for name in CUTS if name != "whole"])
def test_verify_sees_one_wrong_value_and_parts_of_another_rank(name: str, cast: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    write(tmp_path / "source", make_tensors(torch.float32))
    convert_checkpoint(Job(tmp_path / "source", 2, recipe=recipe, cast=cast), tmp_path / "ranks")
    paths = [tmp_path / "ranks" / f"rank{rank}-of-2.safetensors" for rank in range(2)]
    first, second = map(load_file, paths)
    key = f"box.{name}"
    changed = first[key].clone()
    changed.view(-1)[-1] += 1
    for wrong in (changed, second[key]):
        save_file({**first, key: wrong}, paths[0])
        found = reshard.verify(tmp_path / "ranks", tmp_path / "source", recipe=recipe).problems
        assert [problem.kind for problem in found if key in problem.subject] == ["differs"]


def test_ranks_open_as_whole_tensors_and_load_as_shards(tmp_path: Path) -> None:
    tensors, recipe = make_tensors(torch.float32), write_recipe(tmp_path)
    write(tmp_path / "source", tensors)
    convert_checkpoint(Job(tmp_path / "source", 4, recipe=recipe), tmp_path / "ranks")
    with reshard.open(tmp_path / "ranks", recipe=recipe) as opened:
        for name, tensor in tensors.items():
            assert np.array_equal(opened[name][...], tensor.numpy()), name
            assert np.array_equal(opened[name][1:, 0], tensor[1:, 0].numpy()), name
            assert np.array_equal(opened[name][-1, ..., -1], tensor[-1, ..., -1].numpy()), name
    loaded = reshard.load(tmp_path / "source", rank=3, mp=4, recipe=recipe)
    for name, tensor in cut(tensors, 3, 4).items():
        assert np.array_equal(loaded[name], tensor.numpy()), name
    report = reshard.diff(tmp_path / "ranks", tmp_path / "source", recipe=recipe)
    assert report.is_same
    assert report.same == len(tensors)


@pytest.mark.parametrize("shape", [(2, 3, 4, 1 << 20), (3, 700, 4096), (5, 1, 1 << 21)])
def test_rows_that_are_longer_or_more_than_a_window_holds(shape: tuple[int, ...], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["same", "box.a", "box.a", "dimension 2"],')
    torch.manual_seed(5)
    tensor = torch.randint(256, shape, dtype=torch.uint8)
    write(tmp_path / "source", {"box.a": tensor})
    convert_checkpoint(Job(tmp_path / "source", 4, recipe=recipe), tmp_path / "ranks")
    for rank in range(4):
        found = load_file(tmp_path / "ranks" / f"rank{rank}-of-4.safetensors")["box.a"]
        assert torch.equal(found, tensor.chunk(4, 2)[rank])
    assert reshard.verify(tmp_path / "ranks", tmp_path / "source", recipe=recipe).problems == ()
    convert_checkpoint(Job(tmp_path / "ranks", 1, recipe=recipe, to="hf"), tmp_path / "back")
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")["box.a"], tensor)


def test_parts_of_a_fused_tensor_may_be_cut_along_a_later_dimension(tmp_path: Path) -> None:
    rows = """
["concat", "box.a", "box.both", "dimension 2"],
["concat", "box.b", "box.both", "dimension 2"],
["stack", "boxes.{e}.c", "box.stacked", "dimension 2"],
"""
    recipe = write_recipe(tmp_path, rows)
    text = Path(recipe).read_text(encoding="utf-8")
    Path(recipe).write_text(text.replace("\nrules", 'placeholders.e = { counts = "boxes" }\n\nrules'), encoding="utf-8")
    torch.manual_seed(4)
    tensors = {f"box.{name}": torch.rand(3, 2, 8) for name in "ab"}
    tensors |= {f"boxes.{number}.c": torch.rand(2, 3, 4) for number in range(3)}
    write(tmp_path / "source", tensors)
    convert_checkpoint(Job(tmp_path / "source", 2, recipe=recipe), tmp_path / "ranks")
    for rank in range(2):
        parts = {name: tensor.chunk(2, 2)[rank] for name, tensor in tensors.items()}
        found = load_file(tmp_path / "ranks" / f"rank{rank}-of-2.safetensors")
        assert torch.equal(found["box.both"], torch.cat([parts["box.a"], parts["box.b"]]))
        assert torch.equal(found["box.stacked"], torch.stack([parts[f"boxes.{number}.c"] for number in range(3)]))
    assert reshard.verify(tmp_path / "ranks", tmp_path / "source", recipe=recipe).problems == ()
    convert_checkpoint(Job(tmp_path / "ranks", 1, recipe=recipe, to="hf"), tmp_path / "back")
    wanted = (tmp_path / "source" / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == wanted


PADDED = 'padded = ["width"]'


def add_padding(recipe: str) -> None:
    text = Path(recipe).read_text(encoding="utf-8")
    Path(recipe).write_text(text.replace("\nrules", f"{PADDED}\n\nrules"), encoding="utf-8")


def test_the_last_dimension_may_be_widened_where_it_is_cut_or_the_first_is(tmp_path: Path) -> None:
    rows = """
["same", "box.a", "box.a", "dimension 2", "[?, ?, width]"],
["same", "box.b", "box.b", "rows",        "[?, ?, width]"],
["same", "box.c", "box.c", "rows",        "[width, ?, ?]"],
"""
    recipe = write_recipe(tmp_path, rows)
    add_padding(recipe)
    tensors = {"box.a": torch.rand(4, 3, 6), "box.b": torch.rand(8, 3, 6), "box.c": torch.rand(6, 3, 2)}
    write(tmp_path / "source", tensors)
    (tmp_path / "source" / "config.json").write_text('{"width": 6}', encoding="utf-8")
    convert_checkpoint(Job(tmp_path / "source", 4, recipe=recipe, pad=True), tmp_path / "ranks")
    wide = {name: torch.nn.functional.pad(tensors[name], (0, 2)) for name in ("box.a", "box.b")}
    wide["box.c"] = torch.cat([tensors["box.c"], torch.zeros(2, 3, 2)])
    for rank in range(4):
        found = load_file(tmp_path / "ranks" / f"rank{rank}-of-4.safetensors")
        assert torch.equal(found["box.a"], wide["box.a"].chunk(4, 2)[rank])
        for name in ("box.b", "box.c"):
            assert torch.equal(found[name], wide[name].chunk(4)[rank])
    assert reshard.verify(tmp_path / "ranks", tmp_path / "source", recipe=recipe).problems == ()
    found["box.b"][1, 2, 7] = 1  # a zero of the padding
    save_file(found, tmp_path / "ranks" / "rank3-of-4.safetensors")
    problems = reshard.verify(tmp_path / "ranks", tmp_path / "source", recipe=recipe).problems
    assert [problem.kind for problem in problems if "box.b" in problem.subject] == ["differs"]


def test_a_widened_later_dimension_is_narrowed_again(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["same", "box.a", "box.a", "dimension 2", "[?, ?, width]"],')
    add_padding(recipe)
    write(tmp_path / "source", {"box.a": torch.rand(4, 3, 6)})
    (tmp_path / "source" / "config.json").write_text('{"width": 6}', encoding="utf-8")
    convert_checkpoint(Job(tmp_path / "source", 4, recipe=recipe, pad=True), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "ranks", 1, recipe=recipe, to="hf"), tmp_path / "back")
    wanted = (tmp_path / "source" / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == wanted


# --- what is refused ---


@pytest.mark.parametrize("row", ['"dimension 1", "[?, ?, width]"', '"dimension 1", "[?, width, ?]"'])
def test_what_cannot_be_widened_is_refused(row: str, tmp_path: Path) -> None:
    vector = '["same", "box.a", "box.a", "rows", "[width]"],'
    recipe = write_recipe(tmp_path, f'["same", "box.b", "box.b", {row}],\n{vector}')
    add_padding(recipe)
    lengths = (2, 4, 6) if row.endswith(', width]"') else (2, 6, 4)
    write(tmp_path / "source", {"box.b": torch.rand(lengths), "box.a": torch.rand(6)})
    (tmp_path / "source" / "config.json").write_text('{"width": 6}', encoding="utf-8")
    with pytest.raises(Refused, match="padding of the first or last dimension"):
        convert_checkpoint(Job(tmp_path / "source", 4, recipe=recipe, pad=True), tmp_path / "ranks")


def test_the_ranks_that_a_later_dimension_allows_are_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["same", "box.a", "box.a", "dimension 2"],')
    write(tmp_path / "source", {"box.a": torch.rand(4, 4, 6)})
    with pytest.raises(Refused, match="--mp with one of 1, 2, 3, 6"):
        convert_checkpoint(Job(tmp_path / "source", 4, recipe=recipe), tmp_path / "ranks")


def test_a_tensor_without_the_dimension_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["same", "box.a", "box.a", "dimension 2"],')
    write(tmp_path / "source", {"box.a": torch.rand(4, 6)})
    with pytest.raises(Refused, match="at least 3 dimensions"):
        convert_checkpoint(Job(tmp_path / "source", 2, recipe=recipe), tmp_path / "ranks")


@pytest.mark.parametrize("split", ["dimension 10", "dimension -1", "dimension", "dimension 2 of 3"])
def test_what_is_no_dimension_is_no_split(split: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, f'["same", "box.a", "box.a", "{split}"],')
    write(tmp_path / "source", {"box.a": torch.rand(4, 6)})
    with pytest.raises(Refused, match="'dimension' and a digit"):
        convert_checkpoint(Job(tmp_path / "source", 2, recipe=recipe), tmp_path / "ranks")


def test_a_weight_with_block_scales_has_rows_and_columns_only(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["same", "box.{p}", "box.{p}", "dimension 2"],')
    text = Path(recipe).read_text(encoding="utf-8")
    scales = 'scales.p = { left = "weight_scale_inv", right = "weight_scale_inv", block = 4 }'
    Path(recipe).write_text(text.replace("\nrules", f"{scales}\n\nrules"), encoding="utf-8")
    write(tmp_path / "source", {"box.weight": torch.rand(4, 6)})
    with pytest.raises(Refused, match="a weight with block scales has two dimensions"):
        convert_checkpoint(Job(tmp_path / "source", 2, recipe=recipe), tmp_path / "ranks")
