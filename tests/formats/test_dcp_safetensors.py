"""Slices in safetensors files, as torch's distributed checkpoints write them: every box; every refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boxed_reads import compare_boxes, copy_folder, read, refused
from distributed_saves import make_weights, save_all
from safetensors.numpy import save_file

from reshard.formats.boxed_folder import read_boxed
from reshard.formats.slice_names import parse_shard_numbers
from reshard.sources.checkpoints import read_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_all(folder)
    return folder


@pytest.mark.parametrize("name", ["slices", "slices2"])
def test_slices_of_torch(saved: Path, name: str) -> None:
    boxed = read(saved / name)
    compare_boxes(boxed, make_weights())
    assert boxed.shapes == {}
    assert [note.text for note in boxed.notes] == ["4 shards are read; no file tells how many were saved"]


def name_shard(shard: int, file: int = 1, total: int = 1) -> str:
    return f"shard-{shard:05}-model-{file:05}-of-{total:05}.safetensors"


def write(folder: Path, name: str, places: Any, version: str | None = "1.0", **arrays: np.ndarray) -> None:
    said = {"format": "pt"}
    if version is not None:
        said["DCP_VERSION"] = version
    if places is not None:
        said["DCP_SHARDING_INFO"] = places if isinstance(places, str) else json.dumps(places)
    save_file(arrays or {"w": np.ones((2, 3), np.float32)}, folder / name, said)


def at(*offsets: int) -> dict[str, Any]:
    return {"w": {"saved_offsets": list(offsets)}}


def test_a_tensor_without_a_place_is_whole(tmp_path: Path) -> None:
    write(tmp_path, name_shard(1), {}, w=np.arange(6, dtype=np.float32).reshape(2, 3), s=np.array(2, np.float32))
    compare_boxes(read(tmp_path), {"w": torch.arange(6.0).reshape(2, 3), "s": torch.tensor(2.0)})


def test_one_shard_is_read(tmp_path: Path) -> None:
    write(tmp_path, name_shard(1), at(0, 0))
    assert [box.offsets for box in read(tmp_path).boxes["w"]] == [(0, 0)]


def test_whole_files_stay_an_ordinary_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, "model-00001-of-00001.safetensors", at(0, 0))
    assert read_boxed(tmp_path) is None
    assert list(read_checkpoint(tmp_path).tensors) == ["w"]
    write(tmp_path, name_shard(1), at(2, 0))
    assert read_boxed(tmp_path) is None


FAULTS: list[tuple[str, Any, str, str]] = [
    ("no JSON", "{", "DCP_SHARDING_INFO", "JSON"),
    ("a key twice", '{"w": {}, "w": {}}', "DCP_SHARDING_INFO", "stands twice"),
    ("deep JSON", "[" * 100_000, "DCP_SHARDING_INFO", "RecursionError"),
    ("a list", [], "DCP_SHARDING_INFO", "places of its slices"),
    ("none", None, "DCP_SHARDING_INFO", "no such entry"),
    ("a number for a place", {"w": 1}, "w", "saved_offsets"),
    ("no offsets", {"w": {}}, "w", "saved_offsets"),
    ("another key too", {"w": {"saved_offsets": [0, 0], "x": 1}}, "w", "saved_offsets"),
    ("an offset below nothing", at(0, -1), "w", "none negative"),
    ("an offset that is no number", {"w": {"saved_offsets": [0, "0"]}}, "w", "whole numbers"),
    ("a truth for an offset", {"w": {"saved_offsets": [0, True]}}, "w", "whole numbers"),
    ("a fraction", {"w": {"saved_offsets": [0, 0.5]}}, "w", "whole numbers"),
    ("an offset too large", at(0, 2**63), "w", "whole numbers"),
    ("one dimension", at(0), "w", "2 offsets: its shape is [2, 3]"),
    ("three dimensions", at(0, 0, 0), "w", "2 offsets"),
]


@pytest.mark.parametrize(("places", "name", "text"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_faults_of_the_places(tmp_path: Path, places: Any, name: str, text: str) -> None:
    write(tmp_path, name_shard(1), places)
    ((kind, subject, said),) = refused(tmp_path)
    assert (kind, subject) == ("wrong-metadata", f"{name_shard(1)}: {name}")
    assert text in said


def test_a_place_of_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, name_shard(1), {**at(0, 0), "x": {"saved_offsets": [0]}})
    ((kind, subject, _),) = refused(tmp_path)
    assert (kind, subject) == ("missing-tensor", f"{name_shard(1)}: x")


def test_an_unknown_version(tmp_path: Path) -> None:
    write(tmp_path, name_shard(1), at(0, 0), version="2.0")
    assert 'version "2.0"' in refused(tmp_path)[0][2]
    write(tmp_path, name_shard(1), at(0, 0), version=None)
    assert read(tmp_path).boxes


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, name_shard(1), at(-1, 0))
    write(tmp_path, name_shard(2), "{")
    (tmp_path / name_shard(3)).write_bytes(b"\x00")
    assert len(refused(tmp_path)) == 3


@pytest.mark.parametrize("shard", [1, 2, 3])
def test_a_missing_shard_is_named(saved: Path, tmp_path: Path, shard: int) -> None:
    folder = copy_folder(saved / "slices", tmp_path)
    (folder / name_shard(shard)).unlink()
    ((kind, subject, text),) = refused(folder)
    assert (kind, subject) == ("missing-file", f"shard-{shard:05}-model-*-of-00001.safetensors")
    assert "shards 1-4, by the names" in text


def test_a_missing_last_shard_is_noted_only(saved: Path, tmp_path: Path) -> None:
    folder = copy_folder(saved / "slices", tmp_path)
    (folder / name_shard(4)).unlink()
    assert read(folder).notes[0].text.startswith("3 shards are read")


def test_a_missing_file_of_all_shards_is_named(saved: Path, tmp_path: Path) -> None:
    folder = copy_folder(saved / "slices2", tmp_path)
    for shard in range(1, 5):
        (folder / name_shard(shard, 1, 2)).unlink()
    ((kind, subject, _),) = refused(folder)
    assert (kind, subject) == ("missing-file", "shard-*-model-00001-of-00002.safetensors")


def test_a_file_that_one_shard_lacks_is_noted(saved: Path, tmp_path: Path) -> None:
    folder = copy_folder(saved / "slices2", tmp_path)
    (folder / name_shard(2, 1, 2)).unlink()
    assert read(folder).notes[1].text == (
        "files that are not there: 1, which is right if nothing was saved in them: shard 2 of file 1"
    )


def test_numbers_that_claim_billions(tmp_path: Path) -> None:
    write(tmp_path, "shard-999999999-model-999999999-of-999999999.safetensors", at(0, 0))
    assert {kind for kind, _, _ in refused(tmp_path)} == {"missing-file"}


def test_files_of_two_saves(tmp_path: Path) -> None:
    write(tmp_path, name_shard(1), at(0, 0))
    write(tmp_path, name_shard(1, 1, 2), at(0, 0))
    assert refused(tmp_path)[0][0] == "mixed-files"


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data[:20], lambda data: data[:3] + b"\xff" * 9]
)
def test_a_damaged_file_is_named(saved: Path, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    folder = copy_folder(saved / "slices", tmp_path)
    path = folder / name_shard(2)
    path.write_bytes(change(path.read_bytes()))
    assert {subject.rpartition("/")[2] for _, subject, _ in refused(folder)} == {path.name}


def test_numbers_in_names() -> None:
    assert parse_shard_numbers([name_shard(3, 2, 5), "x.safetensors"]) == [(3, 2, 5)]
