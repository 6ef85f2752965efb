"""Ranges of tensors gathered from their boxes, against numpy; and what verify says of a source in boxes."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from time import process_time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import make_plan
from numpy.typing import NDArray
from safetensors.torch import load_file
from small_models import write_model
from tilings import Tiled, read_wholes, tilings, write_boxed
from verified_targets import verify_target

from reshard import api
from reshard.errors import Refused
from reshard.execution.execute import Settings, execute_plan
from reshard.formats.boxes import Box
from reshard.recipes.recipe import load_recipe
from reshard.sources.boxes import assemble_boxes
from reshard.sources.match import match
from reshard.sources.subset import narrow_checkpoint
from reshard.storage.counting import WorkCounter
from reshard.target.preflight import describe_others, look_at_target
from reshard.types import WHOLE, Checkpoint, Layout, Subset, Tensor
from reshard.verification.boxes import BoxedTensor, arrange_boxes, gather_range


def gather(tensor: BoxedTensor, files: Sequence[bytes], begin: int, end: int) -> bytes:
    """Through one buffer, from which nothing beyond the range or the box is read."""
    buffer = np.empty(end - begin, np.uint8)

    def read(part: Tensor, offset: int, size: int) -> NDArray[np.uint8]:
        assert 0 < size <= end - begin
        assert offset + size <= part.size
        data = files[part.file][part.offset + offset : part.offset + offset + size]
        buffer[:size] = np.frombuffer(data, np.uint8)
        return buffer[:size]

    return gather_range(tensor, begin, end - begin, read).tobytes()


@given(tilings(), st.data())
@settings(max_examples=400)
def test_any_range_is_gathered_from_the_boxes(tiled: Tiled, data: st.DataObject) -> None:
    for name, whole in tiled.wholes.items():
        boxed = BoxedTensor(tiled.boxed.boxes[name], whole.nbytes)
        begin = data.draw(st.integers(0, whole.nbytes - 1))
        end = data.draw(st.integers(begin + 1, whole.nbytes))
        assert gather(boxed, tiled.files, begin, end) == whole.tobytes()[begin:end]
        assert gather(boxed, tiled.files, 0, whole.nbytes) == whole.tobytes()


@given(tilings(replicas=1), st.data())
@settings(max_examples=300)
def test_boxes_that_do_not_fill_the_tensor_once_are_refused(tiled: Tiled, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(tiled.wholes)))
    boxes = [box for box in tiled.boxed.boxes[name] if box.part.size]
    number = data.draw(st.integers(0, len(boxes) - 1))
    others = [*boxes[:number], *boxes[number + 1 :]]
    size = tiled.wholes[name].nbytes
    arrange_boxes(BoxedTensor(boxes, size))
    if others:
        with pytest.raises(Refused):
            arrange_boxes(BoxedTensor(others, size))
    if boxes[number].offsets:
        where, step = data.draw(st.integers(0, len(boxes[number].offsets) - 1)), data.draw(st.sampled_from([-1, 1]))
        offsets = tuple(place + step * (n == where) for n, place in enumerate(boxes[number].offsets))
        with pytest.raises(Refused):
            arrange_boxes(BoxedTensor([*others, Box(boxes[number].part, offsets)], size))


def test_many_boxes_are_checked_quickly() -> None:
    """64 x 64 of them, in any order."""
    places = [(row, column) for row in range(64) for column in range(64)]
    Random(1).shuffle(places)
    boxes = [Box(Tensor("w", "U8", (2, 2), 0, 0, 4), (2 * row, 2 * column)) for row, column in places]
    begun = process_time()
    assert len(arrange_boxes(BoxedTensor(boxes, 128 * 128))) == 4096
    assert process_time() - begun < 2


def test_columns_of_many_rows_take_few_steps() -> None:
    """A matrix of 500,000 rows, cut in its last dimension, of three: rows of a plane are spread at once."""
    shape = (250_000, 2, 2)
    boxes = [Box(Tensor("w", "U8", (*shape[:2], 1), file, 0, 500_000), (0, 0, file)) for file in range(2)]
    files = [bytes(500_000), b"\x01" * 500_000]
    begun = process_time()
    assert gather(BoxedTensor(boxes, 1_000_000), files, 0, 1_000_000) == b"\x00\x01" * 500_000
    assert process_time() - begun < 1


# --- the source of a conversion ---


CASES = [("qwen3-moe", "bfloat16", ""), ("mixtral", "float32", "bf16"), ("gpt-oss", "bfloat16", "")]


def convert_boxed(checkpoint: Checkpoint, recipe: str, layout: Layout, target: Path) -> None:
    state = look_at_target(make_plan(checkpoint, load_recipe(recipe), layout), target)
    execute_plan(state.plan, target, describe_others(state), WorkCounter(None, state.size, writes=True), Settings())


@pytest.mark.parametrize("mesh", [(1, 4), (2, 2), (3, 2), (7, 1)])
@pytest.mark.parametrize(("model", "dtype", "cast"), CASES)
def test_a_model_in_boxes_becomes_the_rank_files_of_the_whole(
    model: str, dtype: str, cast: str, mesh: tuple[int, int], tmp_path: Path
) -> None:
    write_model(tmp_path / "whole", model, dtype=dtype)
    checkpoint = assemble_boxes(write_boxed(tmp_path / "whole", tmp_path / "boxes", mesh))
    convert_boxed(checkpoint, model, Layout(2, cast=cast), tmp_path / "target")
    api.convert(tmp_path / "whole", tmp_path / "wanted", mp=2, cast=cast or None)
    for path in sorted((tmp_path / "wanted").glob("*.safetensors")):
        assert (tmp_path / "target" / path.name).read_bytes() == path.read_bytes()
    report = verify_target(tmp_path / "target", checkpoint, load_recipe(model))
    assert report.is_proven
    assert report.compared == report.size > 0


def test_whole_files_are_those_of_torch(tmp_path: Path) -> None:
    write_model(tmp_path / "whole", "mixtral")
    checkpoint = assemble_boxes(write_boxed(tmp_path / "whole", tmp_path / "boxes", (3, 2)), replicas="first")
    convert_boxed(checkpoint, "mixtral", Layout(1, to=WHOLE), tmp_path / "target")
    found, wanted = read_wholes(tmp_path / "target"), read_wholes(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert verify_target(tmp_path / "target", checkpoint, load_recipe("mixtral")).is_proven


def flip_bit(path: Path, name: str, place: int) -> None:
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0] + place] ^= 1
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk damages it


@pytest.mark.parametrize("shard", [1, 2, 3, 4])
def test_a_bit_of_a_box_that_is_not_the_target_s_is_found(shard: int, tmp_path: Path) -> None:
    """The source is exchanged after the conversion: the boxes themselves are compared, each of them."""
    write_model(tmp_path / "whole", "llama")
    boxed = write_boxed(tmp_path / "whole", tmp_path / "boxes", (2, 2))
    convert_boxed(assemble_boxes(boxed), "llama", Layout(2), tmp_path / "target")
    name = "model.layers.1.mlp.up_proj.weight"
    flip_bit(tmp_path / "boxes" / f"shard-{shard:05}.safetensors", name, 100)
    report = verify_target(tmp_path / "target", assemble_boxes(boxed), load_recipe("llama"))
    (problem,) = report.problems
    assert problem.kind == "differs"
    assert name in problem.expected
    assert problem.found.startswith("1 other byte ")


def test_verify_never_reads_the_joins_of_boxes(tmp_path: Path) -> None:
    """With other joins, which give other bytes, it says the same."""
    write_model(tmp_path / "whole", "llama")
    checkpoint = assemble_boxes(write_boxed(tmp_path / "whole", tmp_path / "boxes", (2, 2)))
    convert_boxed(checkpoint, "llama", Layout(2), tmp_path / "target")
    turned = tuple(join._replace(parts=join.parts[::-1]) for join in checkpoint.joins)
    wrong = replace(checkpoint, joins=turned)
    assert verify_target(tmp_path / "target", wrong, load_recipe("llama")).is_proven
    convert_boxed(wrong, "llama", Layout(2), tmp_path / "wrong")
    report = verify_target(tmp_path / "wrong", wrong, load_recipe("llama"))
    assert {problem.kind for problem in report.problems} == {"differs"}


def test_rows_of_chosen_experts_of_a_tensor_in_boxes(tmp_path: Path) -> None:
    """In one piece, they are a part of a join; apart, a join of such parts."""
    write_model(tmp_path / "whole", "qwen3-moe")
    checkpoint = assemble_boxes(write_boxed(tmp_path / "whole", tmp_path / "boxes", (5, 2)))
    recipe = load_recipe("qwen3-moe")
    name = "model.layers.2.mlp.gate.weight"
    wanted = read_wholes(tmp_path / "whole")[name]
    for number, experts in enumerate([(4, 5, 6, 7), (0, 1, 2, 7, 8, 11)]):
        target = tmp_path / f"target{number}"
        subset = Subset(experts=experts, renumber=True)
        part = narrow_checkpoint(checkpoint, recipe, match(checkpoint, recipe, keep_optional=True), subset)
        convert_boxed(part, "qwen3-moe", Layout(1, to=WHOLE), target)
        assert torch.equal(read_wholes(target)[name], wanted[list(experts)])
        assert verify_target(target, part, recipe).is_proven
        for path in target.glob("*.safetensors"):
            if name in load_file(path):
                flip_bit(path, name, 5)
        assert [one.kind for one in verify_target(target, part, recipe).problems] == ["differs"]
