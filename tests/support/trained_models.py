"""Small models as a training leaves them: saved by torch from four processes. Run as a program, it becomes them."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from distributed_saves import WORLD, distribute, run_ranks
from made_once import make_once
from small_models import write_model
from stacked_models import read_tensors, write_stacked_model
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard


def save_trained(model: Any, mesh: Any, folder: Path) -> None:
    """Saves a model of FSDP 2 with the state of its optimizer, after a step of length 0."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states, moments = get_state_dict(model, optimizer)
    save({"model": states, "optim": moments, "step": 1}, checkpoint_id=folder)


def save_as_rank(rank: int, folder: Path) -> None:
    """Saves all checkpoints, as one of four processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    line = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("replicate", "shard"))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    save_trained(load(folder / "moe" / "hub", dtype="bfloat16"), line, folder / "moe-fsdp")
    save_trained(load(folder / "llama", dtype="float32"), grid, folder / "llama-hsdp")
    for name, whole in (("moe", "hub"), ("moe-stacked", "stacked")):
        tensors = read_tensors(folder / "moe" / whole)
        split = {
            key: distribute(value, grid, [Shard(0), Shard(1) if value.dim() > 1 else Replicate()])
            for key, value in tensors.items()
        }
        save(split, storage_writer=HuggingFaceStorageWriter(str(folder / f"{name}-slices"), save_distributed=True))
        save(split, checkpoint_id=folder / f"{name}-grid")
    dist.barrier()
    dist.destroy_process_group()


@make_once
def save_models(folder: Path) -> None:
    """Saves `moe-fsdp` and `llama-hsdp` as FSDP 2 has them, with the state of the optimizer; `moe-slices`, `moe-grid`,
    `moe-stacked-slices` and `moe-stacked-grid` as DTensors; beside them `moe` and `llama`, as transformers saves them.
    """
    write_stacked_model(folder / "moe", "qwen3-moe")
    write_model(folder / "parts", "llama")
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder / "parts", dtype="float32")
    model.save_pretrained(folder / "llama")
    model.to(torch.bfloat16).save_pretrained(folder / "llama-bf16")
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(
        [sys.executable, __file__, str(folder)], env=quiet, capture_output=True, text=True, timeout=300, check=False
    )
    assert not ran.returncode, ran.stderr[-3000:]


def main() -> None:
    """Becomes four processes: torch and the models are imported only once."""
    for name in ("torch._dynamo", "transformers.models.qwen3_moe.modeling_qwen3_moe"):
        import_module(name)
    run_ranks(save_as_rank, WORLD, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
