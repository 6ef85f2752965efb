"""Torch's distributed checkpoints in a bucket: the same boxes and bytes as from a folder, by few requests."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from boxed_reads import compare_boxes, copy_folder, read
from distributed_saves import make_weights, save_all
from safetensors.torch import load_file
from served_buckets import BUCKET, ServeFolder, serve_buckets
from store_servers import require_same_files
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state

import reshard
from reshard import Refused
from reshard.formats import archive_ends
from reshard.formats.boxed_folder import read_boxed
from reshard.formats.boxes import BoxedCheckpoint
from reshard.formats.remote_names import require_path
from reshard.synthetic import SMALL_V3, write_checkpoint

TINY = {**SMALL_V3, "num_hidden_layers": 2, "vocab_size": 512, "n_routed_experts": 4, "num_experts_per_tok": 2}
pytest.importorskip("obstore", reason="the package obstore is not installed")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_all(folder)
    return folder


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServeFolder]:
    with serve_buckets(tmp_path) as start:
        yield start


def read_there() -> BoxedCheckpoint:
    boxed = read_boxed(require_path(BUCKET))
    assert boxed is not None
    return boxed


@pytest.mark.parametrize(("name", "prefix"), [("grid", "model."), ("line", ""), ("slices", ""), ("slices2", "")])
def test_the_same_boxes_and_bytes_as_torch_had(saved: Path, serve: ServeFolder, name: str, prefix: str) -> None:
    serve(saved / name)
    boxed = read_there()
    compare_boxes(boxed, make_weights(), prefix)
    here = read(saved / name)
    assert (boxed.boxes, boxed.shapes, boxed.notes) == (here.boxes, here.shapes, here.notes)
    versions = [file.version for file in boxed.files]
    assert len(set(versions)) == len(versions)
    assert all(isinstance(version, str) and version.startswith('"') for version in versions)


def save_large(folder: Path, parts: int) -> dict[str, torch.Tensor]:
    """Tensors so large that nobody reads them whole to find their ends."""
    state = {f"w{number}": torch.full((64 << 10,), number, dtype=torch.float32) for number in range(parts)}
    save_state(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    return state


def test_ends_are_read_many_at_a_time_and_no_tensor_is(tmp_path: Path, serve: ServeFolder) -> None:
    folder = tmp_path / "large"
    state = save_large(folder, 40)
    served = serve(folder, delay=0.05)
    boxed = read_there()
    wanted = [one for one in served.requests if one.range]
    assert len(wanted) == 1 + len(state) + 1  # .metadata; before the first archive, between two, behind the last
    assert len({(one.path, one.range) for one in wanted}) == len(wanted)
    assert served.busiest > 8
    metadata = (folder / ".metadata").stat().st_size
    assert served.sent["s3"] < metadata + 41 * 2048 + 4096
    compare_boxes(boxed, state)


def test_small_parts_are_read_together(saved: Path, serve: ServeFolder) -> None:
    served = serve(saved / "line")
    read_there()
    files = len(list((saved / "line").glob("*.distcp")))
    assert sum(1 for one in served.requests if one.range) == 1 + files


def test_files_are_read_ahead_a_few_at_a_time(saved: Path, serve: ServeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_ends, "ARCHIVES_AT_ONCE", 5)
    serve(saved / "line")
    compare_boxes(read_there(), make_weights())


def test_what_the_ends_do_not_have_is_read_when_it_is_asked_for(
    saved: Path, serve: ServeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HEAD", "TAIL"):
        monkeypatch.setattr(archive_ends, name, 16)
    monkeypatch.setattr(archive_ends, "SMALL_GAP", 0)
    serve(saved / "grid")
    compare_boxes(read_there(), make_weights(), "model.")


def test_slices_have_their_headers_read_many_at_a_time(tmp_path: Path, serve: ServeFolder) -> None:
    write_checkpoint(tmp_path / "source", TINY, 2)
    reshard.convert(tmp_path / "source", tmp_path / "slices", to="dcp", ranks=12)
    served = serve(tmp_path / "slices", delay=0.05)
    read_there()
    assert sum(1 for one in served.requests if one.path.endswith(".safetensors")) == 12
    assert served.busiest > 6


@pytest.mark.parametrize("layout", ["slices", "distcp"])
def test_a_conversion_gives_the_same_files(tmp_path: Path, serve: ServeFolder, layout: str) -> None:
    write_checkpoint(tmp_path / "source", TINY, 2)
    if layout == "slices":
        reshard.convert(tmp_path / "source", tmp_path / "boxes", to="dcp", ranks=3)
    else:
        state: dict[str, torch.Tensor] = {}
        for path in (tmp_path / "source").glob("*.safetensors"):
            state |= load_file(path)
        save_state(state, storage_writer=FileSystemWriter(tmp_path / "boxes", thread_count=2), no_dist=True)
        (tmp_path / "boxes" / "config.json").write_bytes((tmp_path / "source" / "config.json").read_bytes())
    reshard.convert(tmp_path / "boxes", tmp_path / "here", mp=2)
    serve(tmp_path / "boxes")
    reshard.convert(BUCKET, tmp_path / "there", mp=2)
    assert reshard.verify(tmp_path / "there", BUCKET).is_proven
    assert reshard.diff(BUCKET, tmp_path / "source").is_same
    names = sorted(path.name for path in (tmp_path / "there").iterdir())
    assert "reshard.json" in names
    require_same_files(tmp_path / "here", tmp_path / "there")


def test_what_is_wrong_is_told_as_of_a_folder(saved: Path, tmp_path: Path, serve: ServeFolder) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    copy_folder(saved / "grid", folder)
    (folder / "__1_0.distcp").unlink()
    cut = folder / "__2_0.distcp"
    cut.write_bytes(cut.read_bytes()[:-700])
    spoilt = folder / "__3_0.distcp"
    content = bytearray(spoilt.read_bytes())
    content[:2] = b"XX"
    spoilt.write_bytes(content)
    with pytest.raises(Refused) as here:
        read_boxed(folder)
    serve(folder)
    with pytest.raises(Refused) as there:
        read_there()
    assert there.value.problems == here.value.problems
    assert {problem.kind for problem in there.value.problems} == {"missing-file", "truncated-file", "wrong-archive"}


def test_a_folder_without_its_metadata_is_refused_as_here(saved: Path, tmp_path: Path, serve: ServeFolder) -> None:
    folder = tmp_path / "lacking"
    folder.mkdir()
    copy_folder(saved / "grid", folder)
    (folder / ".metadata").unlink()
    serve(folder)
    with pytest.raises(Refused, match="which says what the"):
        reshard.inspect(BUCKET)


@pytest.mark.parametrize("name", ["grid", "slices"])
def test_inspect_says_of_a_bucket_what_it_says_of_a_folder(saved: Path, serve: ServeFolder, name: str) -> None:
    serve(saved / name)
    there, here = reshard.inspect(BUCKET), reshard.inspect(saved / name)
    assert there.path == BUCKET
    remark = there.remark.replace(BUCKET, str(saved / name))
    assert replace(there, path="", remark=remark) == replace(here, path="")
