"""Rank files as a source: they become the checkpoint that they came from, or are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, write_small
from safetensors.torch import load_file

from reshard.convert import Job, convert_checkpoint
from reshard.errors import Refused
from reshard.generate import write_tensors

RANKS = 4


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rank files of a small DeepSeek-V3, its MTP layer included."""
    folder = tmp_path_factory.mktemp("gather")
    write_small(folder / "source", "deepseek-v3")
    convert_checkpoint(Job(folder / "source", RANKS, keep_optional=True), folder / "ranks")
    return folder / "ranks"


@pytest.fixture
def copied(four: Path, tmp_path: Path) -> Path:
    """To be damaged. Without the manifest, which could tell."""
    shutil.copytree(four, tmp_path / "ranks")
    (tmp_path / "ranks" / "reshard.json").unlink()
    return tmp_path / "ranks"


def require_the_source_again(source: Path, ranks: Path, target: Path) -> None:
    convert_checkpoint(Job(ranks, 1, to="hf"), target)
    names = [path.name for path in source.iterdir() if path.suffix in (".safetensors", ".json")]
    assert len(names) > 2
    assert [name for name in names if (source / name).read_bytes() != (target / name).read_bytes()] == []


def refused_kinds(ranks: Path, target: Path) -> set[str]:
    with pytest.raises(Refused) as error:
        convert_checkpoint(Job(ranks, 1, "deepseek-v3", to="hf"), target)
    assert not list(target.glob("*.safetensors"))
    return {problem.kind for problem in error.value.problems}


@pytest.mark.parametrize(("name", "ranks"), [("deepseek-v3", 4), ("deepseek-v3.2", 8), ("glm-5.1", 2)])
def test_rank_files_become_the_checkpoint_again(name: str, ranks: int, tmp_path: Path) -> None:
    write_small(tmp_path / "source", name)
    convert_checkpoint(Job(tmp_path / "source", ranks, keep_optional=True), tmp_path / "ranks")
    require_the_source_again(tmp_path / "source", tmp_path / "ranks", tmp_path / "target")


def test_a_scale_that_ranks_share_comes_back_once(tmp_path: Path) -> None:
    """A shared expert of two blocks for 8 ranks."""
    config = {**FAMILIES["deepseek-v3"].small, "moe_intermediate_size": 256}
    write_tensors(tmp_path / "source", FAMILIES["deepseek-v3"].tensors(config), config, 3)
    convert_checkpoint(Job(tmp_path / "source", 8, keep_optional=True), tmp_path / "ranks")
    require_the_source_again(tmp_path / "source", tmp_path / "ranks", tmp_path / "target")


def test_padding_is_taken_off_again(tmp_path: Path) -> None:
    """Tables of n-grams are filled up, so that all ranks have as many rows."""
    write_small(tmp_path / "source", "deepseek-v4.1-flash")
    convert_checkpoint(Job(tmp_path / "source", 4), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "target")
    before, after = (tables_of(tmp_path / name) for name in ("source", "target"))
    assert any(len(table) % 4 for table in before.values())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def tables_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: tensor for name, tensor in found.items() if ".engram.embed." in name}


def test_a_replica_that_differs_is_refused(copied: Path, tmp_path: Path) -> None:
    path = copied / "model1-mp4.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    begin = offsets_of(bytes(content), b"norm.weight")[0]
    content[start + begin + 3] ^= 16
    path.write_bytes(content)
    assert refused_kinds(copied, tmp_path / "target") == {"replicas-differ"}


def test_parts_of_another_dtype_are_refused(copied: Path, tmp_path: Path) -> None:
    path = copied / "model1-mp4.safetensors"
    content = path.read_bytes()
    entry = content.index(b'"embed.weight":{"dtype":"BF16"')
    place = content.index(b'"BF16"', entry)
    path.write_bytes(content[:place] + b'"F16" ' + content[place + 6 :])
    assert refused_kinds(copied, tmp_path / "target") == {"wrong-shape"}


def offsets_of(content: bytes, name: bytes) -> tuple[int, int]:
    """Where the data of a tensor begin and end, from the header as text."""
    entry = content.index(b'"' + name + b'":{')
    begin = content.index(b"[", content.index(b"data_offsets", entry)) + 1
    first, second = content[begin : content.index(b"]", begin)].split(b",")
    return int(first), int(second)
