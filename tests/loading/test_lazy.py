"""Lazy tensors against those that the safetensors package reads, whole checkpoints, rank files and single files."""

import gc
import json
import os
import resource
from collections.abc import Callable
from contextlib import ExitStack
from math import prod
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from conversions import LEGAL, ORACLES
from families import write_small
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import Job, convert_checkpoint
from rank_states import LARGE, State, flat_bytes, rank_file, spoil
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import reshard
from reshard.errors import Refused
from reshard.loading.lazy import find_element_range
from reshard.storage.local import open_descriptor
from reshard.synthetic import write_checkpoint

Source = Callable[[str], Path]


def whole(folder: Path) -> State:
    """Every tensor of every file, by the safetensors package."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def require_equal(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert torch.equal(flat_bytes(found), flat_bytes(wanted))


def require_tensors(found: Any, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].shape, found[name].nbytes) == (tuple(tensor.shape), tensor.nbytes)
        require_equal(found[name][...], tensor)


# --- every layout, whole tensors ---


@pytest.mark.parametrize("name", ORACLES)
def test_a_checkpoint_in_many_files_looks_like_one(name: str, source: Source) -> None:
    with reshard.open(source(name)) as found:
        require_tensors(found, whole(source(name)))


@pytest.mark.parametrize("name", ORACLES)
def test_rank_files_look_like_the_checkpoint_that_they_came_from(
    name: str, source: Source, converted: Callable[[str, int], Path]
) -> None:
    wanted = dict(whole(source(name)))
    with reshard.open(converted(name, LEGAL[name][-1])) as found:
        assert len(found) > 100
        for tensor in found:
            # What DeepSeek's code has in BF16 is cast on the way there, and is what it is.
            if found[tensor].dtype != "BF16" or wanted[tensor].dtype == torch.bfloat16:
                require_equal(found[tensor][:], wanted[tensor])


def test_a_single_file_is_what_it_is(source: Source, tmp_path: Path) -> None:
    convert_checkpoint(Job(source("deepseek-v4-flash"), 4), tmp_path)
    path = rank_file(tmp_path, 2, 4)
    with reshard.open(path) as found, safe_open(path, "pt") as wanted:
        assert {found[name].dtype for name in found} >= {"F4", "F8_E4M3", "F8_E8M0", "BF16"}
        require_tensors(found, {name: wanted.get_tensor(name) for name in wanted.keys()})  # noqa: SIM118 - no mapping


# --- slices ---

SHAPES = [(), (7,), (1, 1), (5, 3), (3, 3), (4, 4, 4), (4, 3, 5), (2, 3, 2, 4), (0, 3), (3, 0)]
TENSORS = {
    f"{dtype}-{'x'.join(map(str, shape))}".replace("torch.", ""): (
        torch.randint(0, 256, (prod(shape) * dtype.itemsize,), dtype=torch.uint8).view(dtype).reshape(shape)
    )
    for shape in SHAPES
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int64)
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("small")
    save_file(TENSORS, folder / "model.safetensors")
    with reshard.open(folder) as found:
        yield found


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint in the files of 8 ranks, and its tensors."""
    folder = tmp_path_factory.mktemp("joined")
    write_small(folder / "source", "deepseek-v3")
    convert_checkpoint(Job(folder / "source", 8), folder / "ranks")
    with reshard.open(folder / "ranks") as found:
        wanted = whole(folder / "source")
        yield found, {name: wanted[name] for name in found}


@st.composite
def keys(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """Numbers and slices for some of the dimensions, at times with an ellipsis behind them or before them."""
    items: list[Any] = []
    for length in shape[: draw(st.integers(0, len(shape)))]:
        bound, step = st.none() | st.integers(-length - 2, length + 2), st.none() | st.integers(1, 4)
        kinds: list[st.SearchStrategy[Any]] = [st.builds(slice, bound, bound, step)]
        if length:
            kinds.append(st.integers(-length, length - 1))
        items.append(draw(st.one_of(kinds)))
    if draw(st.booleans()):
        items.append(...)
    elif len(items) < len(shape) and len(set(shape)) == 1:
        items.insert(0, ...)  # where the same numbers fit the last dimensions too
    return items[0] if len(items) == 1 and draw(st.booleans()) else tuple(items)


@settings(max_examples=200)
@given(data=st.data())
def test_a_slice_is_that_of_torch(data: st.DataObject, small: Any) -> None:
    name = data.draw(st.sampled_from(sorted(TENSORS)))
    key = data.draw(keys(tuple(TENSORS[name].shape)))
    require_equal(small[name][key], TENSORS[name][key])


@settings(max_examples=200)
@given(data=st.data())
def test_a_slice_of_what_lies_in_parts_is_that_of_torch(data: st.DataObject, joined: Any) -> None:
    found, wanted = joined
    cut = [name for name in sorted(wanted) if "o_proj" in name or "down_proj" in name or "q_b_proj" in name]
    name = data.draw(st.sampled_from([*cut[:12], "lm_head.weight", "model.norm.weight"]))
    key = data.draw(keys(tuple(wanted[name].shape)))
    require_equal(found[name][key], wanted[name][key])


def test_keys_of_other_kinds_are_those_of_torch(small: Any) -> None:
    tensor, wanted = small["int64-5x3"], TENSORS["int64-5x3"]
    for key in ([0, 4], torch.tensor([3, 1]), None, (slice(None), [2, 0]), wanted[:, 0] > 0, np.int64(2)):
        require_equal(tensor[key], wanted[key])


ARRAYS = [np.array([0, 4]), np.array([], int), np.array(3), np.arange(5) > 2, np.zeros(5, bool)]


@pytest.mark.parametrize("key", [*ARRAYS, (ARRAYS[0], 1), (slice(None), np.array([2, 0]))], ids=repr)
def test_keys_that_are_arrays_of_numpy_are_those_of_torch(key: Any, small: Any) -> None:
    require_equal(small["int64-5x3"][key], TENSORS["int64-5x3"][key])


@pytest.mark.parametrize("key", [*ARRAYS, (ARRAYS[0], 1), np.True_, np.False_], ids=repr)
def test_keys_that_are_arrays_of_numpy_are_those_of_numpy(key: Any, tmp_path: Path) -> None:
    save_file({"a": TENSORS["int64-5x3"]}, tmp_path / "a.safetensors")
    with reshard.open(tmp_path, framework="numpy") as found:
        assert np.array_equal(found["a"][key], TENSORS["int64-5x3"].numpy()[key])


@pytest.mark.parametrize("step", [None, 3, -1, -3])
def test_what_a_slice_takes_of_many_rows_is_told_at_once(step: int | None) -> None:
    """Going through the numbers of so many rows would never end."""
    rows = 10**15
    found = find_element_range((rows,), slice(None, None, step))
    ends = range(rows)[::step]
    assert (found.first, found.shape) == (min(ends[0], ends[-1]), (abs(ends[-1] - ends[0]) + 1,))


def test_a_negative_step_is_that_of_numpy(tmp_path: Path) -> None:
    save_file({"a": torch.arange(20).reshape(5, 4)}, tmp_path / "a.safetensors")
    with reshard.open(tmp_path, framework="numpy") as found:
        wanted = np.arange(20).reshape(5, 4)
        for key in (np.s_[::-1], np.s_[3:0:-2], np.s_[1, ::-1], np.s_[:, ::-3]):
            assert found["a"][key].tolist() == wanted[key].tolist()


@pytest.mark.parametrize("key", [5, -6, (0, 3), (0, 0, 0), (..., ...)])
def test_a_number_that_is_outside_is_no_index(key: Any, small: Any) -> None:
    with pytest.raises(IndexError):
        small["int64-5x3"][key]


def test_a_tensor_can_be_gone_through_row_by_row(small: Any) -> None:
    rows = list(small["bfloat16-5x3"])
    assert len(rows) == len(small["bfloat16-5x3"]) == 5
    require_equal(torch.stack(rows), TENSORS["bfloat16-5x3"])


# --- what is read ---


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text(encoding="ascii").split("rchar:")[1].split()[0])


def test_a_slice_reads_its_own_bytes_only(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", {**LARGE, "num_hidden_layers": 2}, 2)
    convert_checkpoint(Job(tmp_path / "source", 4), tmp_path / "ranks")
    own = bytes_read()
    own = bytes_read() - own  # of looking itself
    for folder in (tmp_path / "source", tmp_path / "ranks"):
        with reshard.open(folder) as found:
            embedding, output = found["model.embed_tokens.weight"], found["model.layers.0.self_attn.o_proj.weight"]
            for tensor, key, size in (
                (embedding, np.s_[7], 1024),
                (embedding, np.s_[100:1900:3], 1798 * 1024),
                (embedding, np.s_[5, 2:4], 4),
                (output, np.s_[3:5], 2 * 16 * 128),
            ):
                before = bytes_read()
                tensor[key]
                assert bytes_read() - before - own == size


def test_what_is_sliced_does_not_keep_what_was_read(small: Any) -> None:
    part = small["bfloat16-4x3x5"][1:3, :, 2]
    assert part.untyped_storage().nbytes() == part.nbytes == 12


def test_slices_of_what_lies_in_parts_share_a_buffer(joined: Any) -> None:
    """A new one for each would be given its memory page by page."""
    found, wanted = joined
    rows, last = found["lm_head.weight"], len(found["lm_head.weight"]) - 1
    require_equal(rows[last], wanted["lm_head.weight"][last])
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(1000):
        rows[last]
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 500


# --- opening and closing ---


def open_files() -> int:
    gc.collect()  # what other tests have left
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - of itself, without a path's own descriptor


def test_it_closes_its_files(source: Source) -> None:
    before = open_files()
    with reshard.open(source("deepseek-v3")) as found:
        tensor = found["model.norm.weight"]
        assert open_files() == before + 4
    assert open_files() == before
    with pytest.raises(ValueError, match="closed"):
        tensor[:]


def test_without_being_closed_it_closes_its_files_with_the_last_of_its_tensors(source: Source) -> None:
    before = open_files()
    tensor = reshard.open(source("deepseek-v3"))["model.norm.weight"]
    assert open_files() == before + 4
    require_equal(tensor[:], whole(source("deepseek-v3"))["model.norm.weight"])
    del tensor
    assert open_files() == before


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.weight", "model.norm.weight"])
def test_what_is_read_while_another_thread_closes_is_read_to_its_end(
    name: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed before the first byte is read, and then as many other files opened: they get the numbers that are free."""
    convert_checkpoint(Job(source("deepseek-v3"), 4), tmp_path / "ranks")
    (tmp_path / "other").write_bytes(bytes(10_000_000))
    before = open_files()
    found = reshard.open(tmp_path / "ranks")
    tensor, read = found[name], os.preadv
    with ExitStack() as stack, monkeypatch.context() as patch:

        def close_first(*arguments: Any) -> int:
            if not found._closed:
                closing = Thread(target=found.close)
                closing.start()
                closing.join()
                for _ in range(4):
                    open_descriptor(stack, tmp_path / "other", os.O_RDONLY)
            return read(*arguments)

        patch.setattr(os, "preadv", close_first)
        require_equal(tensor[...], whole(source("deepseek-v3"))[name])
    assert open_files() == before
    with pytest.raises(ValueError, match="closed"):
        tensor[...]


@pytest.fixture
def old(source: Source, tmp_path: Path) -> Path:
    """Rank files that were written long ago."""
    convert_checkpoint(Job(source("deepseek-v3"), 4), tmp_path)
    for rank in range(4):
        os.utime(rank_file(tmp_path, rank, 4), (1, 1))
    return tmp_path


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.weight", "model.norm.weight"])
def test_what_was_written_since_it_was_opened_is_refused(name: str, old: Path) -> None:
    with reshard.open(old) as found:
        found[name][:]
        spoil(rank_file(old, 0, 4), "norm.weight")
        with pytest.raises(Refused, match=r"model0-mp4.safetensors: source changed\n.*\n.*written since"):
            found[name][:]


def test_what_was_written_to_a_file_that_is_not_read_is_no_matter(old: Path, source: Source) -> None:
    with reshard.open(old) as found:
        spoil(rank_file(old, 3, 4), "norm.weight")
        require_equal(found["lm_head.weight"][0], whole(source("deepseek-v3"))["lm_head.weight"][0])


def test_a_file_that_is_replaced_is_read_as_it_was(old: Path) -> None:
    with reshard.open(old) as found:
        rows = found["model.norm.weight"][:]
        rank_file(old, 1, 4).replace(rank_file(old, 0, 4))
        require_equal(found["model.norm.weight"][:], rows)


def test_it_is_a_mapping(small: Any) -> None:
    assert sorted(small) == sorted(TENSORS)
    assert "int64-7" in small
    assert "nothing" not in small
    with pytest.raises(KeyError):
        small["nothing"]


def test_an_incomplete_checkpoint_is_refused(source: Source, tmp_path: Path) -> None:
    write_small(tmp_path / "source", "deepseek-v3")
    (tmp_path / "source" / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(Refused, match="missing file"):
        reshard.open(tmp_path / "source")
    convert_checkpoint(Job(source("deepseek-v3"), 4), tmp_path / "ranks")
    rank_file(tmp_path / "ranks", 2, 4).unlink()
    with pytest.raises(Refused):
        reshard.open(tmp_path / "ranks")


def test_a_dtype_that_the_framework_has_not_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    for framework in ("torch", "numpy"):
        with reshard.open(tmp_path, framework=framework) as found, pytest.raises(Refused, match="F6_E2M3"):
            found["a"][:]


def test_replicas_that_differ_are_refused_if_they_are_compared(source: Source, tmp_path: Path) -> None:
    convert_checkpoint(Job(source("deepseek-v3"), 4), tmp_path)
    spoil(rank_file(tmp_path, 3, 4), "norm.weight")
    with reshard.open(tmp_path) as found:
        require_equal(found["model.norm.weight"][:], whole(source("deepseek-v3"))["model.norm.weight"])
    with reshard.open(tmp_path, replicas="compare") as found, pytest.raises(Refused, match="other bytes in model3-mp4"):
        found["model.norm.weight"][:]


def test_one_file_of_several_is_opened_as_it_stands(tmp_path: Path) -> None:
    write_small(tmp_path / "source", "deepseek-v3", files=3)
    path = tmp_path / "source" / "model-00002-of-00003.safetensors"
    with reshard.open(path) as opened, safe_open(path, "pt") as wanted:
        assert set(opened) == set(wanted.keys())
