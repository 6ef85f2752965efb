"""Loading into memory: the tensors of a rank are those of its file, by an oracle or by the safetensors package."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle_families
import pytest
import skeletons
import torch
from conversions import LEGAL, ORACLES
from families import FAMILIES, write_small
from jobs import Job, convert_checkpoint, plan_conversion
from model_skeletons import MODELS, TAKEN_FOR_GRANTED
from rank_states import LARGE, State, flat_bytes, rank_file, spoil
from safetensors.torch import load_file, save_file

import reshard
from reshard.errors import Refused
from reshard.execution.reader import MEMORY_PER_THREAD
from reshard.loading.load import RankMemory, fill_memory
from reshard.synthetic import write_checkpoint

Source = Callable[[str], Path]
PACKAGE = Path(reshard.__file__).parents[1]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "source"
    write_checkpoint(folder, LARGE, 3)
    return folder


def require_same(found: State, wanted: State) -> None:
    """The same names, and each tensor of the same dtype and shape, bit for bit."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(flat_bytes(found[name]), flat_bytes(tensor)), name


# --- every family, against its oracle ---


@pytest.mark.parametrize("name", ORACLES)
def test_what_is_loaded_is_what_the_oracle_writes_for_that_rank(name: str, source: Source, tmp_path: Path) -> None:
    ORACLES[name](source(name), tmp_path, 4)
    for rank in (0, 3):
        found = reshard.load(source(name), mp=4, rank=rank)
        require_same(found, load_file(rank_file(tmp_path, rank, 4)))


@pytest.mark.parametrize("name", ORACLES)
def test_from_the_rank_files_of_another_mp_it_is_the_same(
    name: str, source: Source, converted: Callable[[str, int], Path], tmp_path: Path
) -> None:
    """From those of the largest number of ranks, whose parts are put together, and from those of one, which is cut."""
    ORACLES[name](source(name), tmp_path / "wanted", 2)
    for ranks in (1, LEGAL[name][-1]):
        for replicas in {"first", "compare" if ranks > 1 else "first"}:
            found = reshard.load(converted(name, ranks), mp=2, rank=1, replicas=replicas)
            require_same(found, load_file(rank_file(tmp_path / "wanted", 1, 2)))


def test_what_is_larger_than_a_window_comes_together(large: Path, tmp_path: Path) -> None:
    ORACLES["deepseek-v3"](large, tmp_path / "wanted", 4)
    wanted = load_file(rank_file(tmp_path / "wanted", 1, 4))
    require_same(reshard.load(large, mp=4, rank=1), wanted)
    require_same(reshard.load(tmp_path / "wanted", mp=4, rank=1), wanted)
    shutil.rmtree(tmp_path)


def test_the_order_is_that_of_the_file(source: Source, tmp_path: Path) -> None:
    ORACLES["deepseek-v3"](source("deepseek-v3"), tmp_path, 4)
    data = rank_file(tmp_path, 2, 4).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    assert list(reshard.load(source("deepseek-v3"), mp=4, rank=2)) == order


# --- casts, padding and what else changes the numbers ---


@pytest.mark.parametrize(
    ("name", "ranks", "options"),
    [
        ("deepseek-v3", 4, {"cast": "bf16"}),
        ("deepseek-v4.1-flash", 2, {"cast": "bf16"}),
        ("glm-5.1", 1, {"cast": "fp8"}),
        ("glm-5.1", 1, {"cast": "fp8-ue8m0"}),
        ("deepseek-v3", 4, {"keep_mtp": True}),
        ("deepseek-v3-for-32", 32, {"pad": True, "cast": "bf16"}),
    ],
)
def test_with_options_it_is_what_safetensors_reads_from_the_converted_file(
    name: str, ranks: int, options: dict[str, Any], source: Source, tmp_path: Path
) -> None:
    rank = ranks - 1
    convert_checkpoint(Job(source(name), ranks, ranks=[rank], **options), tmp_path)
    found = reshard.load(source(name), mp=ranks, rank=rank, **options)
    require_same(found, load_file(rank_file(tmp_path, rank, ranks)))


def test_padding_is_that_of_the_oracle(source: Source, tmp_path: Path) -> None:
    oracle_families.convert_v3_padded(source("deepseek-v3-for-32"), tmp_path, 32)
    for rank in (0, 31):
        found = reshard.load(source("deepseek-v3-for-32"), mp=32, rank=rank, pad=True)
        require_same(found, load_file(rank_file(tmp_path, rank, 32)))


@pytest.mark.parametrize("ranks", [2, 4])
def test_fp4_experts_become_fp8_as_the_oracle_has_them(ranks: int, source: Source, tmp_path: Path) -> None:
    name = "deepseek-v4-flash"
    oracle_families.convert_v4(source(name), tmp_path, ranks, expert_dtype="fp8")
    found = reshard.load(source(name), mp=ranks, rank=1, expert_dtype="fp8")
    require_same(found, load_file(rank_file(tmp_path, 1, ranks)))


def test_a_cast_from_rank_files_is_that_from_the_model_itself(source: Source, tmp_path: Path) -> None:
    convert_checkpoint(Job(source("deepseek-v3"), 8), tmp_path)
    wanted = reshard.load(source("deepseek-v3"), mp=2, rank=1, cast="bf16")
    assert {tensor.dtype for tensor in wanted.values()} == {torch.bfloat16, torch.float32}
    require_same(reshard.load(tmp_path, mp=2, rank=1, cast="bf16"), wanted)


# --- one line in the place of the old loop ---


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2", "deepseek-v4-pro", "deepseek-v4.1-flash"])
def test_one_line_loads_a_rank_strictly_into_its_model(name: str, source: Source, tmp_path: Path) -> None:
    ORACLES[name](source(name), tmp_path / "wanted", 2)
    convert_checkpoint(Job(source(name), 2, ranks=[1]), tmp_path / "converted")
    line, skeleton = MODELS[name]
    args = {**TAKEN_FOR_GRANTED[line], **json.loads((tmp_path / "converted" / "run_config.json").read_bytes())}
    model = skeletons.build_module(skeleton(args, 2, 1))
    model.load_state_dict(reshard.load(source(name), mp=2, rank=1), strict=True)
    wanted = skeletons.load(skeleton(args, 2, 1), rank_file(tmp_path / "wanted", 1, 2), strict=True)
    require_same(model.state_dict(), wanted.state_dict())


# --- what is read, and how much memory it takes ---

MEASURED = """
import json, sys
from pathlib import Path
import numpy, torch, reshard, reshard.loading
source, options = sys.argv[1], json.loads(sys.argv[2])
def status(word): return int(Path("/proc/self/status").read_text().split(word)[1].split()[0]) << 10
def read(): return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is that of now
memory = status("VmRSS:")
tensors = reshard.load(source, **options)
most = status("VmHWM:") - memory
bytes_read = read()  # not of the first load, which imports modules: these are read as text until they are compiled
tensors = reshard.load(source, **options)
print(json.dumps({"memory": most, "read": read() - bytes_read,
                  "size": sum(tensor.nbytes for tensor in tensors.values())}))
"""


def measured(source: Path, **options: Any) -> dict[str, int]:
    """Bytes of a load in a process of its own: the most `memory` it took, what it `read`, the `size` of the tensors."""
    command = [sys.executable, "-c", MEASURED, str(source), json.dumps(options)]
    done = subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(PACKAGE)})
    return dict(json.loads(done.stdout))


def columns(ranks: int) -> float:
    """Bytes in LARGE of the weights that are cut by columns, of which whole rows are read; less what a rank needs."""
    attention = 3 * 512 * 16 * 128
    feed_forward = 512 * 2048 + 2 * 512 * 1024
    return (attention + feed_forward) * (ranks - 1) / ranks


def test_a_rank_reads_what_it_needs_and_little_more(large: Path) -> None:
    """More is read of weights that are cut by columns, and small gaps are read over."""
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in large.glob("*.safetensors"))
    everything = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    for ranks in (4, 8):
        found = measured(large, mp=ranks, rank=1)
        assert found["size"] < found["read"]
        assert found["read"] < found["size"] + columns(ranks) + headers + everything // 50


def test_from_rank_files_of_another_mp_it_reads_no_more(large: Path, tmp_path: Path) -> None:
    convert_checkpoint(Job(large, 2), tmp_path)
    everything = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    found = measured(tmp_path, mp=8, rank=1)
    assert found["read"] < found["size"] + columns(8) + everything // 40


def test_the_memory_is_that_of_the_tensors_and_fixed_buffers(large: Path) -> None:
    found = measured(large, mp=1, rank=0, jobs=2)
    assert found["size"] > 100e6
    assert found["size"] < found["memory"] < found["size"] + 2 * MEMORY_PER_THREAD + (12 << 20)


def test_each_tensor_has_memory_of_its_own(source: Source, tmp_path: Path) -> None:
    """Else one that is let go would not give its memory back, and none could be saved by itself."""
    found = reshard.load(source("deepseek-v3"), mp=4, rank=0)
    save_file(dict(found), tmp_path / "again.safetensors")
    require_same(load_file(tmp_path / "again.safetensors"), found)
    for array in reshard.load(source("deepseek-v3"), mp=4, rank=0, framework="numpy").values():
        root = array
        while root.base is not None:
            root = root.base
        assert root.nbytes == array.nbytes


# --- numpy, without torch ---

WITHOUT_TORCH = """
import sys, json
sys.modules["torch"] = None  # importing it fails from here on
import reshard
assert "numpy" not in sys.modules, "import reshard should stay light"
from reshard.errors import Refused
tensors = reshard.load(sys.argv[1], mp=2, rank=1, framework="numpy")
with reshard.open(sys.argv[1], framework="numpy") as whole:
    first = next(iter(whole.values()))
    assert (first[...] == first[:]).all()
print(json.dumps({name: [str(tensor.dtype), tensor.shape, tensor.tobytes().hex()] for name, tensor in tensors.items()}))
for call in (lambda: reshard.load(sys.argv[1], mp=2, rank=1), lambda: reshard.open(sys.argv[1])):
    try:
        call()
    except Refused as refused:
        assert "framework='numpy'" in refused.problems[0].remedy
    else:
        sys.exit("not refused")
"""


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4.1-flash"])
def test_without_torch_numpy_has_the_same_bits(name: str, source: Source, tmp_path: Path) -> None:
    ORACLES[name](source(name), tmp_path, 2)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(source(name))]
    done = subprocess.run(command, check=False, capture_output=True, env=os.environ | {"PYTHONPATH": str(PACKAGE)})
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    kinds = {torch.bfloat16: "uint16", torch.float32: "float32", torch.int64: "int64"}
    wanted = {
        name: [kinds.get(tensor.dtype, "uint8"), list(tensor.shape), flat_bytes(tensor).numpy().tobytes().hex()]
        for name, tensor in load_file(rank_file(tmp_path, 1, 2)).items()
    }
    assert found == wanted


# --- devices ---


@pytest.mark.parametrize(
    "device", ["cpu:0", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_device_of_torch_has_the_same_bits(device: str, source: Source, large: Path) -> None:
    cases: tuple[tuple[Path, int, dict[str, Any]], ...] = (
        (source("deepseek-v4.1-flash"), 2, {}),
        (source("deepseek-v3"), 4, {"cast": "bf16"}),
        (large, 4, {}),
        (large, 1, {"cast": "bf16"}),
    )
    for folder, ranks, options in cases:
        found = reshard.load(folder, mp=ranks, rank=ranks - 1, device=device, **options)
        assert {tensor.device.type for tensor in found.values()} == {torch.device(device).type}
        wanted = reshard.load(folder, mp=ranks, rank=ranks - 1, **options)
        require_same({name: tensor.cpu() for name, tensor in found.items()}, wanted)


# --- what is refused ---


def refusal(source: Path, **options: Any) -> tuple[str, str]:
    """Kind and subject of the one problem."""
    with pytest.raises(Refused) as error:
        reshard.load(source, **{"mp": 4, "rank": 0, **options})
    (problem,) = error.value.problems
    return problem.kind, problem.subject


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rank": 4}, ("unknown-rank", "rank")),
        ({"rank": -1}, ("unknown-rank", "rank")),
        ({"mp": 0}, ("wrong-ranks", "mp")),
        ({"mp": "4"}, ("wrong-option", "mp")),
        ({"rank": True}, ("wrong-option", "rank")),
        ({"rank": 1.0}, ("wrong-option", "rank")),
        ({"jobs": 0}, ("wrong-option", "jobs")),
        ({"framework": "jax"}, ("wrong-option", "framework")),
        ({"framework": "numpy", "device": "cuda"}, ("wrong-option", "device")),
        ({"device": "cuda:77"}, ("wrong-option", "device")),
        ({"device": "nowhere"}, ("wrong-option", "device")),
        ({"cast": "bf17"}, ("wrong-option", "cast")),
    ],
)
def test_what_there_is_not_is_refused(options: dict[str, Any], problem: tuple[str, str], source: Source) -> None:
    assert refusal(source("deepseek-v3"), **options) == problem


def test_expert_dtypes_that_there_are_not_are_refused(source: Source) -> None:
    assert refusal(source("deepseek-v4-flash"), expert_dtype="fp6") == ("wrong-option", "expert_dtype")


def test_more_than_the_memory_is_refused_before_it_is_taken(tmp_path: Path) -> None:
    config = {**FAMILIES["deepseek-v3"].full, "num_hidden_layers": 30, "num_nextn_predict_layers": 0}
    write_checkpoint(tmp_path, config, 40, sparse=True)
    assert refusal(tmp_path, mp=1) == ("too-little-memory", "load")


def test_replicas_that_differ_are_refused_if_they_are_compared(source: Source, tmp_path: Path) -> None:
    convert_checkpoint(Job(source("deepseek-v3"), 4), tmp_path)
    wanted = reshard.load(tmp_path, mp=2, rank=0)
    spoil(rank_file(tmp_path, 3, 4), "norm.weight")
    require_same(reshard.load(tmp_path, mp=2, rank=0), wanted)
    assert refusal(tmp_path, mp=2, replicas="compare") == ("replicas-differ", "norm.weight")


def test_a_source_that_is_cut_short_after_its_headers_were_read_is_refused(tmp_path: Path) -> None:
    write_small(tmp_path, "deepseek-v3")
    plan = plan_conversion(Job(tmp_path, 4, ranks=[0]))
    path = tmp_path / plan.source.files[2].name
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(Refused, match="source changed"):
        fill_memory(plan, RankMemory(list(plan.tensors(0)), "cpu"), 1, allow_inexact=False)
