"""Loads one rank straight from a checkpoint into a torch module: no rank file is written.

    pip install 'reshard[torch]'
    torchrun --nproc-per-node 2 examples/load_into_module.py Qwen3-0.6B/ --layer 0

Each process takes its shard of one feed-forward layer of a Llama, Mistral or Qwen, and together they compute it.
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import silu

import reshard


class FeedForward(nn.Module):
    """The shard of one rank: `gate_proj` and `up_proj` are cut by rows, `down_proj` by columns."""

    def __init__(self, hidden: int, inner: int, ranks: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner // ranks, bias=False)
        self.up_proj = nn.Linear(hidden, inner // ranks, bias=False)
        self.down_proj = nn.Linear(inner // ranks, hidden, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        """The output [hidden], the same on every rank."""
        part: Tensor = self.down_proj(silu(self.gate_proj(values)) * self.up_proj(values))
        dist.all_reduce(part)
        return part


def main() -> None:
    parser = argparse.ArgumentParser(description="Loads a rank into a module; start it with torchrun.")
    parser.add_argument("source", help="the checkpoint, a folder or an address")
    parser.add_argument("--layer", type=int, default=0, help="the layer to compute; default: 0")
    options = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error("start it with torchrun, which tells each process its rank")

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    prefix = f"model.layers.{options.layer}.mlp."
    try:
        state = reshard.load(options.source, mp=ranks, rank=rank, device="cpu")  # or f"cuda:{rank}"
    except reshard.Refused as refused:
        parser.exit(2, f"{refused}\n")
    shard = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if sorted(shard) != ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]:
        parser.error(f"{options.source}: layer {options.layer} is none of gate_proj, up_proj and down_proj alone")

    inner, hidden = shard["gate_proj.weight"].shape
    with torch.device("meta"):  # a module without memory: it takes the loaded tensors themselves
        layer = FeedForward(hidden, inner * ranks, ranks)
    layer.load_state_dict(shard, assign=True)
    with torch.no_grad():
        found = layer.float()(torch.linspace(-1, 1, hidden))
    if rank == 0:
        print("loaded:", sum(tensor.nbytes for tensor in shard.values()), "bytes on each of", ranks, "ranks")
        print("output:", " ".join(f"{value:.5f}" for value in found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
