"""Checkpoints that torch itself saves from four processes: `save_all`. Run as a program, it becomes them."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from made_once import make_once
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

WORLD = 4
DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]


def make_bytes(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of bytes by chance; of zeros and ones if it is of booleans."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(shape, dtype=dtype).nbytes
    most = 2 if dtype == torch.bool else 256
    return torch.randint(0, most, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def make_weights() -> dict[str, torch.Tensor]:
    """The whole tensors of `grid` and `line`, by the names that the model gives them."""
    weights = {
        "model.a.weight": make_bytes(1, torch.bfloat16, 10, 6),
        "model.b.weight": make_bytes(2, torch.float32, 7, 5),
        "model.e.gate_up_proj": make_bytes(3, torch.float32, 3, 8, 5),
        "model.n": make_bytes(4, torch.float32, 3),
        "model.one": make_bytes(5, torch.float32, 1, 4),
        "model.s": make_bytes(6, torch.float32),
        "lm_head.weight": make_bytes(7, torch.int64, 3),
    }
    for seed, dtype in enumerate(DTYPES):
        weights[f"dtypes.{str(dtype).removeprefix('torch.')}"] = make_bytes(100 + seed, dtype, 6, 4)
    return weights


GRID: dict[str, list[Any]] = {
    "model.a.weight": [Shard(0), Shard(1)],
    "model.b.weight": [Shard(0), Shard(0)],
    "model.e.gate_up_proj": [Shard(0), Shard(1)],
    "model.n": [Shard(0), Replicate()],
    "model.one": [Replicate(), Shard(1)],
}
"""How the tensors are split over 2 x 2 processes; the others are replicated."""


def distribute(whole: torch.Tensor, mesh: DeviceMesh, placements: list[Any]) -> torch.Tensor:
    """The part of a tensor that this process has, without sending anything: gloo knows few dtypes."""
    local = whole
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for dimension, placement in enumerate(placements):
        if isinstance(placement, Shard):
            pieces = list(local.chunk(mesh.size(dimension), placement.dim))
            empty = local.narrow(placement.dim, 0, 0)
            pieces += [empty] * (mesh.size(dimension) - len(pieces))
            local = pieces[coordinate[dimension]]
        assert not isinstance(placement, Partial)
    return DTensor.from_local(
        local.contiguous(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


class Tiny(nn.Module):
    """Two layers, whose rows four processes do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 3, bias=False)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(given))  # type: ignore[no-any-return]


def save_fsdp(folder: Path, mesh: DeviceMesh) -> None:
    """A model of FSDP 2 with the state of its optimizer, after a step."""
    torch.manual_seed(0)
    model = Tiny()
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    states, moments = get_state_dict(model, optimizer)
    save({"app": {"model": states, "optim": moments}, "step": 1}, checkpoint_id=folder / "fsdp")
    whole = {name: value.full_tensor() for name, value in states.items() if isinstance(value, DTensor)}
    if dist.get_rank() == 0:
        torch.save(whole, folder / "fsdp.pt")


def save_as_rank(rank: int, folder: Path) -> None:
    """Saves all checkpoints, as one of four processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (WORLD,))
    weights = make_weights()
    split = {name: distribute(value, grid, GRID[name]) if name in GRID else value for name, value in weights.items()}
    moments = {"state.model.b.weight.exp_avg": split["model.b.weight"]}
    save({"model": split, "optim": moments, "lr": 0.1, "step": 3}, checkpoint_id=folder / "grid")
    rows = {name: distribute(value, line, [Shard(0)]) if value.dim() else value for name, value in weights.items()}
    beside = {"optimizer": {"state.model.a.weight.exp_avg": rows["model.a.weight"]}, "train_state": {"step": 3}}
    save({**rows, **beside}, storage_writer=FileSystemWriter(folder / "line", thread_count=3))
    writer = HuggingFaceStorageWriter(str(folder / "slices"), save_distributed=True)
    save(split, storage_writer=writer)
    numbers = {name: 1 + place % 2 for place, name in enumerate(weights)}
    writer = HuggingFaceStorageWriter(str(folder / "slices2"), fqn_to_index_mapping=numbers, save_distributed=True)
    save(rows, storage_writer=writer)
    save_fsdp(folder, line)
    dist.barrier()
    dist.destroy_process_group()


@make_once
def save_all(folder: Path) -> None:
    """Saves `grid`, `line` and `fsdp` as .distcp, `slices` and `slices2` as safetensors, below a folder."""
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(
        [sys.executable, __file__, str(folder)], env=quiet, capture_output=True, text=True, timeout=300, check=False
    )
    assert not ran.returncode, ran.stderr[-3000:]


def main() -> None:
    """Becomes four processes: torch is imported only once."""
    import_module("torch._dynamo")  # which each would import by itself, for its optimizer
    run_ranks(save_as_rank, WORLD, Path(sys.argv[1]))


def run_ranks(run_as: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """Forks a process a rank, each of which gets its number and the arguments, and exits with their fate."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_as, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


if __name__ == "__main__":
    main()
