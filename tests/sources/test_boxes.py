"""Boxes put together: random tilings byte for byte, and every way in which boxes do not fill their tensor."""

import re
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from random import Random
from time import process_time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tilings import Tiled, tile, tilings

from reshard.errors import Problem, Refused
from reshard.execution.joins import PartReader, count_join_levels
from reshard.formats.boxes import Box, BoxedCheckpoint
from reshard.sources.boxes import assemble_boxes, list_missing_files
from reshard.types import Checkpoint, File, Join, Tensor


def reader_of(checkpoint: Checkpoint, files: list[bytes], most: int) -> PartReader:
    """Reads into one buffer, never beyond the tensor and never more than `most`; with the buffers that it should need,
    and one, for all tensors are read as a cast reads them.
    """
    buffer = bytearray(most)

    def read(tensor: Tensor, offset: int, size: int) -> memoryview:
        assert 0 < size <= most
        assert offset + size <= tensor.size
        buffer[:size] = files[tensor.file][tensor.offset + offset : tensor.offset + offset + size]
        return memoryview(buffer)[:size]

    levels = count_join_levels(checkpoint.joins, len(files))
    buffers = [memoryview(bytearray(most)) for _ in range(levels + 1)]
    return PartReader(read, [f"part-{number}" for number in range(len(files))], checkpoint.joins, most, buffers)


def read_in_steps(reader: PartReader, tensor: Tensor, most: int) -> bytes:
    steps = range(0, tensor.size, most)
    return b"".join(bytes(reader.read(tensor, begin, min(most, tensor.size - begin))) for begin in steps)


@given(tilings(), st.integers(1, 50))
@settings(max_examples=300)
def test_any_tiling_gives_the_whole_byte_for_byte(tiled: Tiled, most: int) -> None:
    checkpoint = assemble_boxes(tiled.boxed)
    reader = reader_of(checkpoint, tiled.files, most)
    assert checkpoint.tensors.keys() == tiled.wholes.keys()
    for name, whole in tiled.wholes.items():
        tensor = checkpoint.tensors[name]
        assert (tensor.name, tensor.shape, tensor.size) == (name, whole.shape, whole.nbytes)
        assert read_in_steps(reader, tensor, most) == whole.tobytes()
        if tensor.file >= len(tiled.files):
            filled = np.zeros(whole.nbytes, np.uint8)
            reader.fill(tensor, 0, filled)  # all at once: only reads of files have a limit
            assert filled.tobytes() == whole.tobytes()


@given(tilings(), st.data())
@settings(max_examples=200)
def test_any_range_of_a_tensor_inside_a_join_is_read(tiled: Tiled, data: st.DataObject) -> None:
    """As of a stacked tensor that is taken apart, and of a join of such parts."""
    checkpoint = assemble_boxes(tiled.boxed)
    reader = reader_of(checkpoint, tiled.files, 16)
    name = data.draw(st.sampled_from(sorted(tiled.wholes)))
    tensor, wanted = checkpoint.tensors[name], tiled.wholes[name].tobytes()
    begin = data.draw(st.integers(0, tensor.size - 1))
    end = data.draw(st.integers(begin + 1, tensor.size))
    inside = tensor._replace(offset=tensor.offset + begin, size=end - begin)
    assert read_in_steps(reader, inside, 16) == wanted[begin:end]
    files = len(tiled.files)
    again = Join(1, ((inside,), (tensor,)), Tensor("x", "U8", (), files + len(checkpoint.joins), 0, 0))
    both = Tensor("x", "U8", (), files + len(checkpoint.joins), 0, len(wanted) + end - begin)
    more = replace(checkpoint, joins=(*checkpoint.joins, again._replace(result=both)))
    assert read_in_steps(reader_of(more, tiled.files, 16), both, 16) == wanted[begin:end] + wanted


@given(tilings(replicas=1), st.data())
@settings(max_examples=200)
def test_a_box_that_lacks_is_named_with_its_place(tiled: Tiled, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(tiled.wholes)))
    boxes = [box for box in tiled.boxed.boxes[name] if box.part.size]
    lost = data.draw(st.sampled_from(boxes))
    shapes = {key: whole.shape for key, whole in tiled.wholes.items()}
    left = {**tiled.boxed.boxes, name: [box for box in tiled.boxed.boxes[name] if box != lost]}
    problems = refusal(replace(tiled.boxed, boxes=left, shapes=shapes))
    assert {(problem.kind, problem.subject) for problem in problems} == {("missing-box", name)}
    assert {problem.expected for problem in problems} == {f"boxes that fill {list(tiled.wholes[name].shape)}"}
    if len(boxes) > 1:  # mostly it is one hole, but a cut may go through it
        places = [re.search(r"no box has \[(.*?)\]", problem.found) for problem in problems]
        holes = [[span.split(":") for span in place[1].split(", ")] for place in places if place]
        assert sum(prod(int(high) - int(low) for low, high in hole) for hole in holes) == prod(lost.part.shape)
        for hole in holes:
            for (low, high), begin, length in zip(hole, lost.offsets, lost.part.shape, strict=True):
                assert begin <= int(low) < int(high) <= begin + length
        files = {tiled.boxed.files[box.part.file].name for box in left[name]}
        assert all(any(file in problem.found for file in files) for problem in problems)


@given(tilings(replicas=1), st.data())
@settings(max_examples=200)
def test_a_box_that_is_moved_or_grows_is_refused(tiled: Tiled, data: st.DataObject) -> None:
    cut = [name for name, whole in sorted(tiled.wholes.items()) if whole.ndim]
    if not cut:
        return
    name = data.draw(st.sampled_from(cut))
    number = data.draw(st.integers(0, len(tiled.boxed.boxes[name]) - 1))
    box = tiled.boxed.boxes[name][number]
    if not box.part.size:
        return
    where, step = data.draw(st.integers(0, len(box.offsets) - 1)), data.draw(st.sampled_from([-1, 1]))
    moved = Box(box.part, tuple(place + step * (n == where) for n, place in enumerate(box.offsets)))
    boxes = [moved if n == number else one for n, one in enumerate(tiled.boxed.boxes[name])]
    shapes = {key: whole.shape for key, whole in tiled.wholes.items()}
    problems = refusal(replace(tiled.boxed, boxes={**tiled.boxed.boxes, name: boxes}, shapes=shapes))
    assert {problem.kind for problem in problems} <= {"missing-box", "overlap", "wrong-shape"}
    assert {problem.subject for problem in problems} == {name}


def refusal(boxed: BoxedCheckpoint) -> tuple[Problem, ...]:
    with pytest.raises(Refused) as refused:
        assemble_boxes(boxed)
    return refused.value.problems


# --- plain cases ---


def boxes_of(
    *places: tuple[tuple[int, ...], tuple[int, ...]], dtype: str = "BF16", bits: int = 16, files: int = 0
) -> BoxedCheckpoint:
    """A tensor `w` of boxes at offsets, of shapes; one in each file."""
    boxes = [
        Box(Tensor("w", dtype, shape, number, 0, int(np.prod(shape)) * bits // 8), offsets)
        for number, (offsets, shape) in enumerate(places)
    ]
    names = [f"__{number}_0.distcp" for number in range(files or len(places))]
    return BoxedCheckpoint(Path(), tuple(File(name, 0, 0, "", 0) for name in names), {"w": boxes}, {}, None)


def only(boxed: BoxedCheckpoint) -> tuple[str, str]:
    (problem,) = refusal(boxed)
    return problem.kind, problem.found


def test_one_box_is_the_tensor_itself() -> None:
    found = assemble_boxes(boxes_of(((0, 0), (4, 6))))
    assert (found.joins, found.boxes, found.tensors["w"].file) == ((), {}, 0)


def test_rows_are_one_join_and_columns_have_rows() -> None:
    rows = assemble_boxes(boxes_of(((0, 0), (2, 6)), ((2, 0), (2, 6))))
    assert [join.rows for join in rows.joins] == [1]
    columns = assemble_boxes(boxes_of(((0, 3), (4, 3)), ((0, 0), (4, 3))))
    assert [join.rows for join in columns.joins] == [4]
    assert [part[0].file for part in columns.joins[0].parts] == [1, 0]


def test_a_grid_is_a_join_of_joins() -> None:
    grid = boxes_of(*(((row, column), (2, 3)) for row, column in product((0, 2), (0, 3))))
    found = assemble_boxes(grid)
    assert [(join.rows, join.result.shape) for join in found.joins] == [(2, (2, 6)), (2, (2, 6)), (1, (4, 6))]
    assert [part[0].file for part in found.joins[2].parts] == [4, 5]
    assert found.tensors["w"].file == 6
    assert list(found.boxes or ()) == [6]
    assert count_join_levels(found.joins, 4) == 0, "rows are read where they belong"


def test_replicas_are_compared_or_the_first_is_taken() -> None:
    twice = boxes_of(((0,), (2,)), ((2,), (2,)), ((2,), (2,)), ((0,), (2,)))
    files = [[copy.file for copy in part] for part in assemble_boxes(twice).joins[0].parts]
    assert files == [[0, 3], [1, 2]]
    files = [[copy.file for copy in part] for part in assemble_boxes(twice, replicas="first").joins[0].parts]
    assert files == [[0], [1]]
    whole = boxes_of(((0,), (4,)), ((0,), (4,)))
    assert [len(part) for part in assemble_boxes(whole).joins[0].parts] == [2]
    assert assemble_boxes(whole, replicas="first").joins == ()


@given(tilings(), st.data())
@settings(max_examples=100)
def test_replicas_that_differ_are_named_by_their_files(tiled: Tiled, data: st.DataObject) -> None:
    checkpoint = assemble_boxes(tiled.boxed)
    stored = [part for join in checkpoint.joins for part in join.parts if len(part) > 1]
    if not stored:
        return
    part = data.draw(st.sampled_from(stored))
    copy = part[data.draw(st.integers(0, len(part) - 1))]
    spoiled = bytearray(tiled.files[copy.file])
    spoiled[copy.offset + data.draw(st.integers(0, copy.size - 1))] ^= 1
    files = [bytes(spoiled) if number == copy.file else one for number, one in enumerate(tiled.files)]
    reader = reader_of(checkpoint, files, 20)
    with pytest.raises(Refused, match=rf"found: .* other bytes in part-\d than in part-{part[0].file}"):
        [read_in_steps(reader, tensor, 20) for tensor in checkpoint.tensors.values()]


def test_scalars_empty_tensors_and_empty_boxes() -> None:
    assert assemble_boxes(boxes_of(((), ()))).tensors["w"].shape == ()
    assert assemble_boxes(boxes_of(((0, 0), (0, 6)))).tensors["w"][2:] == ((0, 6), 0, 0, 0)
    found = assemble_boxes(boxes_of(((0, 0), (4, 6)), ((4, 0), (0, 6))))
    assert (found.tensors["w"].shape, found.joins) == ((4, 6), ())


def test_an_empty_box_at_the_end_shows_that_rows_lack() -> None:
    """A rank without rows says where they end."""
    assert only(boxes_of(((0, 0), (4, 6)), ((6, 0), (0, 6)))) == (
        "missing-box",
        "no box has [4:6, 0:6]; its boxes are in __0_0.distcp, __1_0.distcp",
    )


def test_the_file_that_plainly_lacks_is_named() -> None:
    boxed = boxes_of(((0,), (2,)), ((4,), (2,)))
    files = tuple(replace(file, name=name) for file, name in zip(boxed.files, ("a-01", "a-03"), strict=True))
    (problem,) = refusal(replace(boxed, files=files))
    assert problem.remedy == "a-02 is missing: copy the whole folder again"
    assert problem.found == "no box has [2:4]; its boxes are in a-01, a-03"
    assert "is a file missing, or of another save" in refusal(boxed)[0].remedy


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["__0_0.distcp", "__0_1.distcp", "__2_0.distcp", "__10_0.distcp"], [1, 3, 4, 5, 6, 7, 8, 9]),
        (["__0_0.distcp", "__1_0.distcp"], []),
        (["__0_0.distcp", "__99999999999_0.distcp"], []),
        (["plain"], []),
    ],
)
def test_missing_files_by_the_numbers_of_ranks(names: list[str], missing: list[int]) -> None:
    assert list(list_missing_files(names)) == [f"__{number}_0.distcp" for number in missing]


def test_boxes_that_overlap_are_named_with_both_files() -> None:
    assert only(boxes_of(((0, 0), (3, 6)), ((2, 0), (2, 6)))) == (
        "overlap",
        "two different boxes have [2:3, 0:6], in __0_0.distcp, __1_0.distcp",
    )


def test_a_box_beyond_the_shape_or_of_other_dimensions_is_refused() -> None:
    boxed = replace(boxes_of(((0, 0), (4, 6)), ((4, 0), (2, 6))), shapes={"w": (4, 6)})
    assert only(boxed) == ("wrong-shape", "a box [2, 6] at [4, 0], in __1_0.distcp")
    assert only(replace(boxed, shapes={"w": (4, 6, 1)}))[0] == "wrong-shape"
    assert only(boxes_of(((0, 0), (4, 6)), ((4,), (2,)), ((0, 0), (4, 6))))[1] == "a box [2] at [4], in __1_0.distcp"
    assert only(boxes_of(((-1, 0), (4, 6))))[0] == "wrong-shape"


def test_dtypes_and_sizes_must_agree() -> None:
    boxed = boxes_of(((0,), (2,)), ((2,), (2,)))
    one, other = boxed.boxes["w"]
    mixed = replace(boxed, boxes={"w": [one, Box(other.part._replace(dtype="F16"), (2,))]})
    assert only(mixed) == ("wrong-dtype", "BF16 and F16")
    short = replace(boxed, boxes={"w": [one, Box(other.part._replace(size=3), (2,))]})
    assert only(short) == ("wrong-shape", "3 bytes in __1_0.distcp")
    assert only(replace(boxed, boxes={"w": []}))[0] == "missing-box"


def test_half_bytes_are_refused() -> None:
    boxed = boxes_of(((0, 0), (2, 3)), ((0, 3), (2, 3)), dtype="F4", bits=4)
    assert {problem.kind for problem in refusal(boxed)} == {"box-layout"}
    assert assemble_boxes(boxes_of(((0, 0), (2, 2)), ((0, 2), (2, 4)), dtype="F4", bits=4)).tensors["w"].size == 6


def test_a_pinwheel_is_refused_by_name() -> None:
    wheel = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert only(boxes_of(*wheel)) == ("box-layout", "5 boxes that no few straight cuts divide, in [0:3, 0:3] of [3, 3]")
    kind, found = only(boxes_of(*wheel[:4]))
    assert (kind, found.split(";")[0]) == ("missing-box", "no box has 1 elements of [0:3, 0:3]")


def test_cuts_that_are_too_deep_are_refused() -> None:
    """Each box is cut off what the boxes before it left, once from the left and once from above."""
    places, begin, end = [], [0, 0], (40, 40)
    for number in range(30):
        shape = [end[0] - begin[0], end[1] - begin[1]]
        shape[number % 2] = 1
        places.append(((begin[0], begin[1]), (shape[0], shape[1])))
        begin[number % 2] += 1
    places.append(((begin[0], begin[1]), (end[0] - begin[0], end[1] - begin[1])))
    assert only(boxes_of(*places))[0] == "box-layout"


def test_every_fault_of_every_tensor_is_told() -> None:
    boxes = {f"layers.{n}.w": boxes_of(((0,), (2,)), ((4,), (2,)), ((7,), (1,))).boxes["w"] for n in range(50)}
    problems = refusal(replace(boxes_of(((0,), (1,)), files=3), boxes=boxes))
    assert len(problems) == 100
    assert str(Refused(problems)).count("\n") < 15


def test_many_tensors_take_seconds() -> None:
    """20,000 tensors of 8 boxes, each as on a mesh of 2 x 4."""
    grid = [((row, column), (2, 3)) for row, column in product((0, 2), (0, 3, 6, 9))]
    boxed = boxes_of(*grid)
    boxes = {f"layers.{number}.w": boxed.boxes["w"] for number in range(20_000)}
    begun = process_time()
    found = assemble_boxes(replace(boxed, boxes=boxes))
    assert process_time() - begun < 4
    assert len(found.joins) == 60_000


def test_layouts_of_all_kinds_are_laid_out_quickly() -> None:
    random = Random(1)
    tiled = tile(random, {f"layers.{number}.w": (16, 16, 16) for number in range(300)}, depth=4)
    begun = process_time()
    assemble_boxes(tiled.boxed)
    assert process_time() - begun < 4
