"""Which files of a folder are the checkpoint: hidden files, `model.safetensors`, the index, `--ignore-extra-files`."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reshard.errors import Problem, Refused
from reshard.sources.checkpoints import read_checkpoint
from reshard.types import Checkpoint

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
FILES = {ONE: {"a": 1, "b": 2}, TWO: {"c": 3}}


def write_files(folder: Path, files: Mapping[str, Mapping[str, int]]) -> Path:
    """Files by name, with tensors of one number each."""
    for file, tensors in files.items():
        save_file({name: np.full(3, number, np.int32) for name, number in tensors.items()}, folder / file)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, str]) -> Path:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read_values(checkpoint: Checkpoint) -> dict[str, int]:
    """The number in each tensor, by the place that we found for it."""
    found = {}
    for name, tensor in checkpoint.tensors.items():
        content = (checkpoint.folder / checkpoint.files[tensor.file].name).read_bytes()
        values = np.frombuffer(content[tensor.offset : tensor.offset + tensor.size], np.int32)
        assert len(set(values.tolist())) == 1
        found[name] = int(values[0])
    return found


def list_notes(checkpoint: Checkpoint) -> dict[str, str]:
    assert len({note.kind for note in checkpoint.notes}) == len(checkpoint.notes)
    return {note.kind: note.text for note in checkpoint.notes}


def list_problems(folder: Path, *, ignore_extra_files: bool = False) -> list[Problem]:
    with pytest.raises(Refused) as caught:
        read_checkpoint(folder, ignore_extra_files=ignore_extra_files)
    return list(caught.value.problems)


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """Two files with an index."""
    return write_index(write_files(tmp_path, FILES), {"a": ONE, "b": ONE, "c": TWO})


# --- hidden files ---


@pytest.mark.parametrize("has_index", [True, False])
def test_a_name_that_begins_with_a_dot_is_no_shard(indexed: Path, *, has_index: bool) -> None:
    for name in ("._" + ONE, "._model.safetensors", ".safetensors"):
        (indexed / name).write_bytes(b"\0\5\x16\7 attributes of macOS")
    if not has_index:
        (indexed / INDEX).unlink()
    checkpoint = read_checkpoint(indexed)
    assert (read_values(checkpoint), checkpoint.notes) == ({"a": 1, "b": 2, "c": 3}, ())


def test_hidden_files_alone_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "._model.safetensors").write_bytes(b"x")
    assert [problem.kind for problem in list_problems(tmp_path)] == ["empty-source"]


# --- no index ---


@pytest.mark.parametrize("ignore_extra_files", [True, False])
@pytest.mark.parametrize("other", ["consolidated", "adapter_model", "optimizer", "model-00001-of-00002", "model-2"])
def test_model_safetensors_is_the_checkpoint(other: str, tmp_path: Path, *, ignore_extra_files: bool) -> None:
    write_files(tmp_path, {"model.safetensors": {"a": 1}, f"{other}.safetensors": {"a": 9, "x": 9}})
    checkpoint = read_checkpoint(tmp_path, ignore_extra_files=ignore_extra_files)
    assert read_values(checkpoint) == {"a": 1}
    assert f"left aside: {other}.safetensors" in list_notes(checkpoint)["left-aside"]


@pytest.mark.parametrize(
    ("taken", "others"),
    [
        pytest.param(FILES, ["consolidated.safetensors"], id="beside one file"),
        pytest.param(FILES, ["consolidated-00001-of-00001.safetensors"], id="beside another set"),
        pytest.param(FILES, ["consolidated-00001-of-00003.safetensors"], id="beside a set with a gap"),
        pytest.param(FILES, ["x-1.safetensors", "x-2.safetensors"], id="beside a set without a total"),
        pytest.param({"x-1-of-1.safetensors": {"a": 1}}, ["y.safetensors"], id="the only set"),
        pytest.param({"x-1.safetensors": {"a": 1}, "x-2.safetensors": {"b": 2}}, ["y.safetensors"], id="without total"),
        pytest.param(FILES, [], id="nothing is extra"),
        pytest.param({"any.safetensors": {"a": 1}}, [], id="one file"),
    ],
)
def test_the_flag_keeps_one_numbered_set(
    taken: Mapping[str, Mapping[str, int]], others: list[str], tmp_path: Path
) -> None:
    write_files(tmp_path, {**taken, **{name: {"z" + name: 9, "a": 9} for name in others}})
    checkpoint = read_checkpoint(tmp_path, ignore_extra_files=True)
    assert read_values(checkpoint) == {name: value for tensors in taken.values() for name, value in tensors.items()}
    assert [file.name for file in checkpoint.files] == list(taken)
    assert list_notes(checkpoint).keys() == ({"left-aside"} if others else set())
    assert all(name in list_notes(checkpoint)["left-aside"] for name in others)


@pytest.mark.parametrize(
    "names",
    [
        ["a.safetensors", "b.safetensors"],
        ["a-1-of-1.safetensors", "b-1-of-1.safetensors"],
        ["model-1-of-1.safetensors", "model-1-of-2.safetensors", "model-2-of-2.safetensors"],
    ],
)
def test_the_flag_is_refused_where_nothing_tells_what_is_extra(names: list[str], tmp_path: Path) -> None:
    write_files(tmp_path, {name: {name: 1} for name in names})
    assert sorted(read_values(read_checkpoint(tmp_path))) == sorted(names)
    (problem,) = list_problems(tmp_path, ignore_extra_files=True)
    assert (problem.kind, problem.subject) == ("wrong-option", "--ignore-extra-files")
    assert all(name in problem.found for name in names)
    assert "leave the option out" in problem.remedy


def test_the_set_that_is_kept_must_be_complete_though_others_are_ignored(tmp_path: Path) -> None:
    write_files(tmp_path, {ONE: {"a": 1}, "x.safetensors": {"x": 1}})
    for ignore in (True, False):
        problems = list_problems(tmp_path, ignore_extra_files=ignore)
        assert [(problem.kind, problem.subject) for problem in problems] == [("missing-file", TWO)]
        assert "--ignore-extra-files" not in problems[0].remedy


def test_a_gap_in_another_set_is_refused_with_the_option_that_helps(tmp_path: Path) -> None:
    write_files(tmp_path, {**FILES, "consolidated-1-of-2.safetensors": {"x": 1}})
    (problem,) = list_problems(tmp_path)
    assert (problem.kind, problem.subject) == ("missing-file", "consolidated-2-of-2.safetensors")
    assert "--ignore-extra-files leaves it out" in problem.remedy
    assert read_values(read_checkpoint(tmp_path, ignore_extra_files=True)) == {"a": 1, "b": 2, "c": 3}


def test_a_tensor_in_two_files_is_refused_with_a_hint_that_destroys_nothing(tmp_path: Path) -> None:
    write_files(tmp_path, {**FILES, TWO: {"a": 7, "c": 3}})
    (problem,) = list_problems(tmp_path)
    assert (problem.kind, problem.subject, problem.found) == ("tensor-twice", "a", f"in {ONE} and in {TWO}")
    assert problem.remedy == f"move one of the two out of the folder, or name the right one in {INDEX}"
    write_index(tmp_path, {"a": ONE, "b": ONE, "c": TWO})  # as the hint says
    assert read_values(read_checkpoint(tmp_path)) == {"a": 1, "b": 2, "c": 3}


def test_a_copy_that_the_flag_leaves_out_is_refused_with_the_flag(tmp_path: Path) -> None:
    write_files(tmp_path, {**FILES, "copy.safetensors": {"a": 7}})
    (problem,) = list_problems(tmp_path)
    assert problem.remedy.startswith("--ignore-extra-files leaves out copy.safetensors")
    assert read_values(read_checkpoint(tmp_path, ignore_extra_files=True)) == {"a": 1, "b": 2, "c": 3}


def test_an_index_of_another_format_is_nobodys(tmp_path: Path) -> None:
    write_files(tmp_path, FILES)
    for name in ("pytorch_model.bin.index.json", "consolidated.safetensors.index.json"):
        (tmp_path / name).write_text('{"weight_map": {"a": "gone.bin"}}')
    assert read_values(read_checkpoint(tmp_path)) == {"a": 1, "b": 2, "c": 3}


# --- the index decides ---


def test_a_tensor_is_taken_from_the_file_that_the_index_names(indexed: Path) -> None:
    """Overlay shards: both files are indexed, and each has a copy of a tensor of the other."""
    write_files(indexed, {ONE: {"a": 1, "b": 2, "c": 8}, TWO: {"c": 3, "a": 9}})
    checkpoint = read_checkpoint(indexed)
    assert read_values(checkpoint) == {"a": 1, "b": 2, "c": 3}
    text = list_notes(checkpoint)["shadowed"]
    assert "2 tensors" in text
    assert f"a in {TWO} ({ONE} is taken)" in text
    write_index(indexed, {"a": TWO, "b": ONE, "c": ONE})
    assert read_values(read_checkpoint(indexed)) == {"a": 9, "b": 2, "c": 8}


def test_an_overlay_in_a_file_of_its_own_replaces_what_the_index_says(indexed: Path) -> None:
    write_files(indexed, {"overlay.safetensors": {"b": 20}})
    write_index(indexed, {"a": ONE, "b": "overlay.safetensors", "c": TWO})
    assert read_values(read_checkpoint(indexed)) == {"a": 1, "b": 20, "c": 3}


def test_many_shadowed_tensors_are_one_line(indexed: Path) -> None:
    names = [f"t{number}" for number in range(500)]
    write_files(indexed, {ONE: dict.fromkeys(names, 1), TWO: dict.fromkeys(names, 2)})
    write_index(indexed, {**dict.fromkeys(names, ONE), names[0]: TWO})
    checkpoint = read_checkpoint(indexed)
    assert read_values(checkpoint) == {**dict.fromkeys(names, 1), names[0]: 2}
    assert "500 tensors" in list_notes(checkpoint)["shadowed"]
    assert "they were not compared, and may differ" in list_notes(checkpoint)["shadowed"]
    assert len(list_notes(checkpoint)["shadowed"]) < 500


def test_tensors_that_the_index_does_not_name_are_set_apart(indexed: Path) -> None:
    write_index(indexed, {"a": ONE, "c": TWO})
    checkpoint = read_checkpoint(indexed)
    assert (read_values(checkpoint), checkpoint.unnamed) == ({"a": 1, "c": 3}, {"b": ONE})
    assert f"1 tensor that the index does not name: b in {ONE}" in list_notes(checkpoint)["not-in-index"]


def test_a_tensor_in_another_file_only_is_misplaced(indexed: Path) -> None:
    write_index(indexed, {"a": TWO, "b": ONE, "c": TWO})
    (problem,) = list_problems(indexed)
    assert (problem.kind, problem.subject, problem.found) == ("misplaced-tensor", "a", f"in {ONE}")


def test_what_the_flag_leaves_out_beside_an_index_is_told(indexed: Path) -> None:
    write_files(indexed, {"x.safetensors": {"x": 1}})
    assert [(problem.kind, problem.subject) for problem in list_problems(indexed)] == [("extra-file", "x.safetensors")]
    checkpoint = read_checkpoint(indexed, ignore_extra_files=True)
    assert read_values(checkpoint) == {"a": 1, "b": 2, "c": 3}
    assert "left aside: x.safetensors" in list_notes(checkpoint)["left-aside"]


# --- a stale index ---


@pytest.mark.parametrize("ignore_extra_files", [True, False])
@pytest.mark.parametrize(
    "names", [(ONE, TWO), ("model.safetensors", "x.safetensors"), ("m-0.safetensors", "m-1.safetensors")]
)
def test_an_index_of_other_files_is_one_problem(
    names: tuple[str, str], tmp_path: Path, *, ignore_extra_files: bool
) -> None:
    write_files(tmp_path, {names[0]: {"a": 1}, names[1]: {"c": 3}})
    write_index(tmp_path, {str(number): f"model-{number:05}-of-00030.safetensors" for number in range(1, 31)})
    (problem,) = list_problems(tmp_path, ignore_extra_files=ignore_extra_files)
    assert (problem.kind, problem.subject) == ("wrong-index", INDEX)
    assert f"move or rename {INDEX} and keep the weights" in problem.remedy
    (tmp_path / INDEX).rename(tmp_path / "aside.json")  # as the hint says
    assert read_values(read_checkpoint(tmp_path))["a"] == 1


@pytest.mark.parametrize("names", [["adapter_model"], ["model-00001-of-00002"]])
def test_files_that_are_no_whole_checkpoint_do_not_make_an_index_stale(names: list[str], tmp_path: Path) -> None:
    write_files(tmp_path, {f"{name}.safetensors": {"x": 1} for name in names})
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    problems = list_problems(tmp_path)
    assert [problem.kind for problem in problems] == ["missing-file", "missing-file", "extra-file"]


def test_extra_files_are_not_to_be_thrown_away_while_others_are_missing(indexed: Path) -> None:
    (indexed / TWO).rename(indexed / "model-2.safetensors")
    problems = list_problems(indexed)
    assert [(problem.kind, problem.subject) for problem in problems] == [
        ("missing-file", TWO), ("extra-file", "model-2.safetensors"),
    ]  # fmt: skip
    assert "keep it" in problems[1].remedy
    assert "--ignore-extra-files" not in problems[1].remedy
    assert load_file(indexed / "model-2.safetensors")["c"][0] == 3
