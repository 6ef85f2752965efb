"""File names that count: every spelling is a set, and each number that a set lacks is named in its spelling."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from reshard.errors import Refused
from reshard.sources.checkpoints import read_checkpoint

INDEX = "model.safetensors.index.json"


def write_files(folder: Path, names: Iterable[str]) -> Path:
    """A checkpoint whose files have one tensor each, called like its file."""
    for name in names:
        save_file({name: np.ones(1, np.float32)}, folder / f"{name}.safetensors")
    return folder


def list_missing(folder: Path) -> list[str]:
    """The files that the refusal of a folder names, without the suffix."""
    with pytest.raises(Refused) as caught:
        read_checkpoint(folder)
    assert {problem.kind for problem in caught.value.problems} == {"missing-file"}
    return [problem.subject.removesuffix(".safetensors") for problem in caught.value.problems]


SPELLINGS = [
    "model-{:05}-of-{:05}", "model-{:05}-of-{:06}", "model-{}-of-{}", "model_{:05}_of_{:05}", "m.{:02}.of.{:02}",
    "pytorch_model-{:05}-of-{:05}", "model-{:05}-of-{:05}-fp8", "model-{:03}of{:03}", "{}-of-{}", "Model {} OF {}",
    "layer.1-{:05}-of-{:05}", "of-{:07}-of-{:05}",
]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("numbers", [range(1, 13), range(12), range(13)], ids=["1-12", "0-11", "0-12"])
def test_a_whole_set_is_a_checkpoint_and_each_missing_file_is_named(
    spelling: str, numbers: range, tmp_path: Path
) -> None:
    names = [spelling.format(number, 12) for number in numbers]
    write_files(tmp_path, names)
    assert sorted(read_checkpoint(tmp_path).tensors) == sorted(names)
    lost = [names[1], names[3], names[-2]]  # not the first and the last, which tell how it is counted
    for name in lost:
        (tmp_path / f"{name}.safetensors").unlink()
    assert list_missing(tmp_path) == lost


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        pytest.param(
            ["model-1-of-2", "model-1-of-3"], ["model-2-of-2", "model-2-of-3", "model-3-of-3"], id="two totals",
        ),
        pytest.param(["a-1-of-2", "a-2-of-2", "b-1-of-2"], ["b-2-of-2"], id="a second set"),
        pytest.param(["a-1-of-2-x", "a-2-of-2-x", "a-1-of-2-y"], ["a-2-of-2-y"], id="a set with another end"),
        pytest.param(
            [f"model-{n:05}-of-000069" for n in range(1, 68)], [f"model-{n:05}-of-000069" for n in (68, 69)],
            id="the last ones",
        ),
        pytest.param(["m-0-of-3", "m-1-of-3"], ["m-2-of-3"], id="the last one, from 0"),
        pytest.param(["model-1", "model-2", "model-4"], ["model-3"], id="no total"),
        pytest.param(["layer_00", "layer_01", "layer_03"], ["layer_02"], id="no total, from 0"),
        pytest.param(["layer_02", "layer_03"], ["layer_01"], id="no total, the first"),
        pytest.param([f"layer_{n:02}" for n in range(61) if n != 7], ["layer_07"], id="layers"),
        pytest.param(["consolidated.00", "consolidated.02"], ["consolidated.01"], id="as Meta counts"),
        pytest.param(["m-01-of-01", "m-02-of-03", "m-03-of-03"], ["m-01-of-03"], id="one of one"),
    ],
)  # fmt: skip
def test_what_a_set_lacks_is_named_in_its_own_spelling(present: list[str], missing: list[str], tmp_path: Path) -> None:
    assert list_missing(write_files(tmp_path, present)) == missing


@pytest.mark.parametrize(
    "names",
    [
        ["qwen2"], ["llama-3"], ["model-4"], ["a", "b7"], ["model-1", "weights-3"], ["model-1", "model-2"], ["0", "1"],
        ["layer_5", "layer_6"], ["model_fp8", "model_fp16"],
        ["step-1000", "step-2000"], ["a-00001-of-00001", "b-00001-of-00001"], ["part-of-model", "rest-of-model"],
    ],
)  # fmt: skip
def test_names_that_count_nothing_or_lack_nothing_are_taken(names: list[str], tmp_path: Path) -> None:
    assert sorted(read_checkpoint(write_files(tmp_path, names)).tensors) == sorted(names)


def test_what_lacks_at_the_end_may_lack_at_the_beginning(tmp_path: Path) -> None:
    write_files(tmp_path, [f"model-0000{number}-of-00004" for number in (1, 2, 3)])
    with pytest.raises(Refused, match="these are missing: 4; or 0, if they are counted from 0"):
        read_checkpoint(tmp_path)


def test_the_refusal_says_which_numbers_are_missing(tmp_path: Path) -> None:
    write_files(tmp_path, [f"model-{number}-of-61" for number in range(1, 61) if number not in (5, 8, 9)])
    with pytest.raises(Refused) as caught:
        read_checkpoint(tmp_path)
    assert "of the numbers 1-61 these are missing: 5, 8-9, 61\n  expected: 61 files by their names" in str(caught.value)


def test_a_total_that_no_disk_holds_is_refused_at_once(tmp_path: Path) -> None:
    write_files(tmp_path, ["m-3-of-" + "9" * 200, "n-" + "9" * 200, "n-1"])
    missing = list_missing(tmp_path)
    assert missing[:2] == ["m-1-of-" + "9" * 200, "m-2-of-" + "9" * 200]
    assert len(missing) < 100


def test_an_index_may_name_a_part_of_a_set_and_the_rest_is_told(tmp_path: Path) -> None:
    names = [f"model-{number:05}-of-000007" for number in (1, 2, 3, 5)]
    write_files(tmp_path, names)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in names}}))
    (note,) = read_checkpoint(tmp_path).notes
    assert note.kind == "numbering"
    assert "4 of the 7 files that model-*-of-000007.safetensors counts; not named: 4, 6-7" in note.text
