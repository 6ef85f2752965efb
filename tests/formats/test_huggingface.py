"""Reading a checkpoint: what its files, its index and its config say, and every way in which they can contradict."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import deserialize
from safetensors.numpy import save

from reshard.errors import Refused
from reshard.sources.checkpoints import read_checkpoint
from reshard.synthetic import DEEPSEEK_V3, write_checkpoint

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG = {"model_type": "toy", "sizes": [1, 2.5, None]}
FILES: dict[str, dict[str, NDArray[Any]]] = {
    FIRST: {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "scalar": np.array(7, np.int64)},
    SECOND: {"b.2": np.ones((3, 1), np.uint8), "b.10": np.ones(4, np.float16), "empty": np.zeros((0, 5), np.int32)},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two files, with index and config."""
    found = tmp_path / "checkpoint"
    found.mkdir()
    for name, tensors in FILES.items():
        (found / name).write_bytes(save(tensors, {"format": "np"}))
    write_index(found)
    (found / "config.json").write_text(json.dumps(CONFIG))
    return found


def write_index(folder: Path, **changed: object) -> None:
    """The true index, or one that says something else of some tensors."""
    weight_map = {tensor: name for name, tensors in FILES.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map | changed}))


def remove(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def index(**changed: object) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, **changed)


def without_index(*damages: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for step in (remove(INDEX), *damages):
            step(folder)

    return damage


def shortened(name: str, size: int) -> Callable[[Path], None]:
    """Cuts so many bytes off the end of a file."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - size)


def link_to_nothing(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to("blob that is gone")


def as_stored(paths: Iterable[Path]) -> Mapping[str, tuple[str, str, tuple[int, ...], bytes]]:
    """Name -> file name, dtype, shape and bytes, as the safetensors package reads them."""
    return {
        name: (path.name, entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for path in paths
        for name, entry in deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    }


def as_read(source: Path, **options: Any) -> Mapping[str, tuple[str, str, tuple[int, ...], bytes]]:
    """The same, by the offsets that we read."""
    checkpoint = read_checkpoint(source, **options)
    contents = [(checkpoint.folder / file.name).read_bytes() for file in checkpoint.files]
    assert all(name == tensor.name for name, tensor in checkpoint.tensors.items())
    return {
        tensor.name: (
            checkpoint.files[tensor.file].name, tensor.dtype, tensor.shape,
            contents[tensor.file][tensor.offset : tensor.offset + tensor.size],
        )
        for tensor in checkpoint.tensors.values()
    }  # fmt: skip


@pytest.mark.parametrize("names", [(), (INDEX,), ("config.json",), (INDEX, "config.json")])
def test_every_tensor_is_found_with_and_without_index_and_config(folder: Path, names: tuple[str, ...]) -> None:
    remove(*names)(folder)
    assert as_read(folder) == as_stored([folder / FIRST, folder / SECOND])
    config = read_checkpoint(folder).config
    assert config == (None if "config.json" in names else CONFIG)


def test_each_file_has_its_sizes_and_the_hash_of_its_header(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert [file.name for file in checkpoint.files] == [FIRST, SECOND]
    for file in checkpoint.files:
        content = (folder / file.name).read_bytes()
        header = content[: 8 + int.from_bytes(content[:8], "little")]
        assert (file.size, file.header_size) == (len(content), len(header))
        assert file.header_hash == hashlib.sha256(header).hexdigest()


def test_a_single_file_is_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "any name"
    path.write_bytes(save(FILES[FIRST]))
    assert as_read(path) == as_stored([path])
    assert read_checkpoint(path).config is None


def test_a_single_file_has_the_config_beside_it_and_no_neighbour(folder: Path) -> None:
    remove(INDEX)(folder)
    (folder / SECOND).rename(folder / "other.safetensors")
    (folder / FIRST).rename(folder / "model.safetensors")
    assert as_read(folder / "model.safetensors") == as_stored([folder / "model.safetensors"])
    assert read_checkpoint(folder / "model.safetensors").config == CONFIG


def test_files_need_not_be_numbered(folder: Path) -> None:
    remove(INDEX)(folder)
    (folder / FIRST).rename(folder / "one.safetensors")
    (folder / SECOND).rename(folder / "model-two.safetensors")
    assert as_read(folder) == as_stored([folder / "one.safetensors", folder / "model-two.safetensors"])


@pytest.mark.parametrize("names", [(), (INDEX, "config.json")])
def test_the_links_of_the_hub_cache_are_followed(folder: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    expected = as_stored([folder / FIRST, folder / SECOND])
    for path in list(folder.iterdir()):
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.move(path, blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    remove(*names)(snapshot)
    assert as_read(snapshot) == expected


def test_files_that_the_index_does_not_name_are_left_out_on_demand(folder: Path) -> None:
    expected = as_stored([folder / FIRST, folder / SECOND])
    write("extra.safetensors", b"no safetensors at all")(folder)
    assert as_read(folder, ignore_extra_files=True) == expected


def test_other_files_do_not_matter(folder: Path) -> None:
    expected = as_stored([folder / FIRST, folder / SECOND])
    for name in ("model.safetensors.part", "README.md", "pytorch_model.bin", ".gitattributes"):
        write(name, b"\xff")(folder)
    (folder / "original").mkdir()
    assert as_read(folder) == expected


@pytest.mark.parametrize(
    ("damage", "kind", "subject", "word"),
    [
        # Nothing there.
        pytest.param(shutil.rmtree, "no-source", "checkpoint", "No such file", id="no folder"),
        pytest.param(remove(FIRST, SECOND, INDEX), "empty-source", "checkpoint", "right folder", id="no weights"),
        pytest.param(
            without_index(remove(SECOND), write(FIRST, b"\2\0\0\0\0\0\0\0{}")), "missing-file", SECOND, "2 files",
            id="one of two files",
        ),
        pytest.param(
            without_index(
                remove(FIRST, SECOND), write("a.safetensors", b"\2\0\0\0\0\0\0\0{}"),
                write("b.safetensors", b"\2\0\0\0\0\0\0\0{}"),
            ),
            "empty-source", "checkpoint", "without a tensor", id="files without a tensor",
        ),
        # The index and the files.
        pytest.param(remove(SECOND), "missing-file", SECOND, "3 tensors: b.2, b.10, empty", id="a file missing"),
        pytest.param(remove(FIRST, SECOND), "missing-file", FIRST, "2 tensors: a, scalar", id="an index alone"),
        pytest.param(link_to_nothing, "missing-file", SECOND, "a link to nothing", id="a link to nothing"),
        pytest.param(
            lambda folder: ((folder / FIRST).unlink(), (folder / FIRST).mkdir()), "missing-file", FIRST, "2 tensors",
            id="a folder in the place of a file",
        ),
        pytest.param(
            write("a stray.safetensors", save({"c": np.ones(1)})), "extra-file", "a stray.safetensors",
            "--ignore-extra-files", id="a file too many",
        ),
        pytest.param(index(c=FIRST), "missing-tensor", "c", f"not in {FIRST}", id="a tensor missing"),
        pytest.param(index(a=SECOND), "misplaced-tensor", "a", f"in {SECOND}", id="a tensor in another file"),
        pytest.param(
            without_index(write(SECOND, save({"a": np.ones(2)}))), "tensor-twice", "a", f"{FIRST} and in {SECOND}",
            id="a tensor in two files without index",
        ),
        # What an index may not say.
        *(
            pytest.param(index(a=name), "unsafe-file-name", INDEX, "plain file name", id=f"a file name {name!r}")
            for name in (
                "../out.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "sub\\x.safetensors", "x.bin", "..",
                ".", "", "x\0.safetensors", None, 7, True, ["x.safetensors"], {"x.safetensors": 1},
            )
        ),
        pytest.param(
            index(a="x" * 300 + ".safetensors"), "missing-file", "xxx", "1 tensors: a", id="a file name of 300 letters"
        ),
        pytest.param(index(a="\ud800.safetensors"), "unsafe-file-name", INDEX, "ud800", id="a lone surrogate"),
        pytest.param(write(INDEX, b"{"), "not-json", INDEX, "JSON", id="an index cut off"),
        pytest.param(write(INDEX, b"\xff\xfe\xff"), "not-json", INDEX, "Unicode", id="an index of other bytes"),
        pytest.param(write(INDEX, b"[" * 100_000), "not-json", INDEX, "Recursion", id="an index nested too deep"),
        pytest.param(write(INDEX, b"[]"), "not-json", INDEX, "a JSON object", id="an index that is a list"),
        pytest.param(write(INDEX, b"{}"), "wrong-index", INDEX, "weight_map", id="an index without weight_map"),
        pytest.param(write(INDEX, b'{"weight_map":{}}'), "wrong-index", INDEX, "weight_map", id="an empty index"),
        pytest.param(write(INDEX, b'{"weight_map":[]}'), "wrong-index", INDEX, "weight_map", id="a list as weight_map"),
        # Files by themselves.
        pytest.param(shortened(FIRST, 1), "truncated-file", FIRST, "as its header says", id="data cut off"),
        pytest.param(write(FIRST, b"\x80\0\0"), "truncated-file", FIRST, "3 bytes", id="three bytes"),
        pytest.param(write(FIRST, b""), "truncated-file", FIRST, "0 bytes", id="an empty file"),
        pytest.param(
            write(FIRST, b"\xff\0\0\0\0\0\0\0{}"), "truncated-file", FIRST, "255 bytes", id="a header cut off"
        ),
        pytest.param(write(FIRST, b"<!DOCTYPE html>"), "wrong-download", FIRST, "/resolve/", id="a web page"),
        pytest.param(
            write(FIRST, b"version https://git-lfs.github.com/spec/v1\n"), "lfs-pointer", FIRST, "git lfs pull",
            id="a pointer of git-lfs",
        ),
        pytest.param(write(FIRST, b"\2\0\0\0\0\0\0\0{}x"), "wrong-size", FIRST, "11 bytes", id="a byte too many"),
        pytest.param(
            without_index(lambda folder: (folder / "dir.safetensors").mkdir()), "cannot-read", "dir.safetensors",
            "a directory", id="a folder among the files",
        ),
        # The config.
        pytest.param(write("config.json", b"{'a': 1}"), "not-json", "config.json", "JSON", id="a config of Python"),
        pytest.param(write("config.json", b"null"), "not-json", "config.json", "a JSON object", id="a null config"),
        pytest.param(
            lambda folder: (remove("config.json")(folder), (folder / "config.json").mkdir()), "cannot-read",
            "config.json", "a directory", id="a folder as config",
        ),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(
    folder: Path, damage: Callable[[Path], object], kind: str, subject: str, word: str
) -> None:
    damage(folder)
    with pytest.raises(Refused) as caught:
        read_checkpoint(folder)
    fitting = [problem for problem in caught.value.problems if problem.kind == kind and subject in problem.subject]
    assert fitting, caught.value
    assert any(word in f"{problem.found} {problem.expected} {problem.remedy}" for problem in fitting), fitting


def test_the_faults_of_all_files_are_named(folder: Path) -> None:
    write(FIRST, b"\2\0\0\0\0\0\0\0[]")(folder)
    shortened(SECOND, 3)(folder)
    with pytest.raises(Refused) as caught:
        read_checkpoint(folder)
    kinds = [(problem.kind, problem.subject) for problem in caught.value.problems]
    assert kinds == [("header-not-json", FIRST), ("truncated-file", SECOND)]


def test_all_missing_and_extra_files_are_named(folder: Path) -> None:
    for name, other in ((FIRST, "more.safetensors"), (SECOND, "other.safetensors")):
        (folder / name).rename(folder / other)
    with pytest.raises(Refused) as caught:
        read_checkpoint(folder)
    kinds = [(problem.kind, problem.subject) for problem in caught.value.problems]
    others = [("extra-file", name) for name in ("more.safetensors", "other.safetensors")]
    assert kinds == [("missing-file", FIRST), ("missing-file", SECOND), *others]


def test_without_an_index_each_missing_number_of_each_family_is_named(tmp_path: Path) -> None:
    for name in ("m-00002-of-00004.safetensors", "m-00004-of-00004.safetensors", "n-00002-of-00002.safetensors"):
        write(name, save({name: np.ones(1)}))(tmp_path)
    with pytest.raises(Refused) as caught:
        read_checkpoint(tmp_path)
    missing = {problem.subject for problem in caught.value.problems if problem.kind == "missing-file"}
    assert missing == {
        "m-00001-of-00004.safetensors", "m-00003-of-00004.safetensors", "n-00001-of-00002.safetensors",
    }  # fmt: skip


def test_a_file_name_that_claims_many_files_is_refused_at_once(tmp_path: Path) -> None:
    write("m-00001-of-99999.safetensors", save({"a": np.ones(1)}))(tmp_path)
    with pytest.raises(Refused) as caught:
        read_checkpoint(tmp_path)
    assert "99999 files by their names" in str(caught.value)
    assert len(caught.value.problems) < 100


@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json"])
def test_a_file_without_read_permission_is_refused(folder: Path, name: str) -> None:
    (folder / name).chmod(0)
    if os.access(folder / name, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(Refused, match="Permission denied"):
        read_checkpoint(folder)


def test_the_full_v3_is_read_to_the_byte(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DEEPSEEK_V3, 163, sparse=True)
    checkpoint = read_checkpoint(tmp_path)
    assert len(checkpoint.files) == 163
    assert len(checkpoint.tensors) == 91_991
    assert sum(tensor.size for tensor in checkpoint.tensors.values()) == 688_574_839_360
    assert sum(file.size - file.header_size for file in checkpoint.files) == 688_574_839_360
    assert checkpoint.config == DEEPSEEK_V3
