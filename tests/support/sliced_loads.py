"""Loads slices in three processes of torch, each into its shards, and compares these with the whole tensors; then has
torch save these shards itself.

Run as a program with the folders of the slices, of the whole files, and of what torch saves, it becomes the processes.
"""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from distributed_saves import run_ranks
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

WORLD = 3


def slice_name(rank: int) -> str:
    """The name that torch gives the file of a rank."""
    return f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"


def load_as_rank(rank: int, store: str, folder: Path, whole: Path, saved: Path) -> None:
    """Loads as one of the processes: columns of each tensor, then rows, which are saved. Raises AssertionError if
    anything differs.
    """
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    wanted = {name: one for path in sorted(whole.glob("*.safetensors")) for name, one in load_file(path).items()}
    for dimension in (1, 0):
        places = {name: Shard(min(dimension, one.dim() - 1)) for name, one in wanted.items()}
        state = {name: distribute_tensor(torch.zeros_like(one), mesh, [places[name]]) for name, one in wanted.items()}
        load(state, storage_reader=HuggingFaceStorageReader(str(folder)))
        for name, one in wanted.items():
            assert torch.equal(state[name].full_tensor(), one), name
    save(state, storage_writer=HuggingFaceStorageWriter(str(saved), save_distributed=True))
    dist.barrier()
    dist.destroy_process_group()


def load_in_processes(folder: Path, whole: Path, saved: Path) -> None:
    """Starts the program and requires that it ends well."""
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, __file__, str(folder), str(whole), str(saved)]
    ran = subprocess.run(words, env=quiet, capture_output=True, text=True, timeout=300, check=False)
    assert not ran.returncode, ran.stderr[-3000:]


def main() -> None:
    """Forks a process a rank, and exits with their fate."""
    with TemporaryDirectory() as store:
        run_ranks(load_as_rank, WORLD, store, *map(Path, sys.argv[1:]))


if __name__ == "__main__":
    main()
