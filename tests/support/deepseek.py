"""The plainest DeepSeek-V3: each rank reads its own file and run_config.json, under the names of DeepSeek's own code.

    logits(Rank(load_file(...), run_config, number, exchange), ids)

Written from the formulas of the paper (multi-head latent attention, experts chosen within groups), in float64 and
without a cache. Embedding, heads, the units of MLPs and experts are cut over the ranks, which meet in `exchange` alone.
Imports nothing of the package under test.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

EPSILON = 1e-6
"""Of all norms; the inference code has it in itself, not in its configuration."""
BLOCK = 128


class Rank(NamedTuple):
    """What a rank has."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    """As run_config.json says it; what it does not say is what `ModelArgs` of the inference code says."""
    number: int
    exchange: Callable[[Tensor], Sequence[Tensor]]
    """From a rank's tensor to those of all ranks, in their order."""

    def weight(self, name: str) -> Tensor:
        """Dequantised, if it has a block scale. The first scale is that of the rank's own first element."""
        weight, scale = self.tensors[f"{name}.weight"].double(), self.tensors.get(f"{name}.scale")
        if scale is None:
            return weight
        spread = scale.double().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return weight * spread[: weight.size(0), : weight.size(1)]

    def linear(self, hidden: Tensor, name: str) -> Tensor:
        return hidden @ self.weight(name).T

    def summed(self, tensor: Tensor) -> Tensor:
        return torch.stack(list(self.exchange(tensor))).sum(0)

    def said(self, key: str, usual: Any) -> Any:
        return self.config.get(key, usual)


def logits(rank: Rank, ids: Tensor) -> Tensor:
    """The logits [batch, length, vocabulary], the same on every rank."""
    table = rank.weight("embed")
    place = ids - rank.number * len(table)
    is_here = (place >= 0) & (place < len(table))
    hidden = rank.summed(table[place.clamp(0, len(table) - 1)] * is_here[..., None])
    for layer in range(rank.config["n_layers"]):
        name = f"layers.{layer}"
        hidden = hidden + attention(rank, f"{name}.attn", normed(rank, hidden, f"{name}.attn_norm"))
        inner = normed(rank, hidden, f"{name}.ffn_norm")
        is_dense = layer < rank.said("n_dense_layers", 1)
        hidden = hidden + (gated if is_dense else experts)(rank, f"{name}.ffn", inner)
    part = rank.linear(normed(rank, hidden, "norm"), "head")
    return torch.cat(list(rank.exchange(part)), -1)


def normed(rank: Rank, hidden: Tensor, name: str) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPSILON) * rank.weight(name)


def attention(rank: Rank, name: str, hidden: Tensor) -> Tensor:
    """Multi-head latent attention, of the heads that this rank has; the latents are everybody's."""
    plain, turned, value = (rank.config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    query = rank.linear(normed(rank, rank.linear(hidden, f"{name}.wq_a"), f"{name}.q_norm"), f"{name}.wq_b")
    query_plain, query_turned = torch.split(unflattened(query, plain + turned), [plain, turned], -1)
    latent, key_turned = torch.split(rank.linear(hidden, f"{name}.wkv_a"), [rank.config["kv_lora_rank"], turned], -1)
    both = rank.linear(normed(rank, latent, f"{name}.kv_norm"), f"{name}.wkv_b")
    key_plain, values = torch.split(unflattened(both, plain + value), [plain, value], -1)
    theta = rank.said("rope_theta", 10_000)
    scores = torch.einsum("bqhd,bkhd->bhqk", query_plain, key_plain)
    scores = scores + torch.einsum(
        "bqhd,bkd->bhqk", rotated(query_turned, theta), rotated(key_turned[:, :, None], theta)[:, :, 0]
    )
    hidden_ones = torch.full(scores.shape[-2:], float("-inf"), dtype=torch.float64).triu(1)
    shares = (scores / (plain + turned) ** 0.5 + hidden_ones).softmax(-1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", shares, values).flatten(2)
    return rank.summed(rank.linear(mixed, f"{name}.wo"))


def rotated(heads: Tensor, theta: float) -> Tensor:
    """[batch, length, heads, channels]: neighbouring channels are one complex number, turned by the place."""
    width = heads.size(-1)
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(heads.size(1), dtype=torch.float64), frequencies)[:, None]
    numbers = torch.view_as_complex(unflattened(heads, 2).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def unflattened(tensor: Tensor, width: int) -> Tensor:
    """With the last dimension as parts of that width."""
    return tensor.reshape(*tensor.shape[:-1], -1, width)


def gated(rank: Rank, name: str, hidden: Tensor) -> Tensor:
    """An MLP whose units are cut over the ranks."""
    inner = silu(rank.linear(hidden, f"{name}.w1")) * rank.linear(hidden, f"{name}.w3")
    return rank.summed(rank.linear(inner, f"{name}.w2"))


def experts(rank: Rank, name: str, hidden: Tensor) -> Tensor:
    """Each rank does the experts that it has; their names tell which these are. All share the shared ones."""
    shares = shares_of(rank, f"{name}.gate", hidden)
    pattern = re.compile(re.escape(name) + r"\.experts\.(\d+)\.w1\.weight")
    total = torch.zeros_like(hidden)
    for expert in sorted(int(found[1]) for known in rank.tensors if (found := pattern.fullmatch(known))):
        at = f"{name}.experts.{expert}"
        inner = silu(rank.linear(hidden, f"{at}.w1")) * rank.linear(hidden, f"{at}.w3")
        total = total + rank.linear(inner, f"{at}.w2") * shares[..., expert, None]
    return rank.summed(total) + gated(rank, f"{name}.shared_experts", hidden)


def shares_of(rank: Rank, gate: str, hidden: Tensor) -> Tensor:
    """How much each expert counts for each token: [batch, length, experts], zero for those not chosen."""
    if rank.said("score_func", "softmax") != "sigmoid":
        raise ValueError("not a DeepSeek-V3")
    scores = rank.linear(hidden, gate).sigmoid()
    wanted = scores + rank.tensors[f"{gate}.bias"].double()
    groups = unflattened(wanted, wanted.size(-1) // rank.said("n_expert_groups", 1))
    best = groups.topk(2).values.sum(-1).topk(rank.said("n_limited_groups", 1)).indices
    is_open = torch.zeros(groups.shape[:-1], dtype=torch.bool).scatter(-1, best, value=True)
    wanted = groups.masked_fill(~is_open[..., None], float("-inf")).flatten(-2)
    chosen = wanted.topk(rank.config["n_activated_experts"]).indices
    values = scores.gather(-1, chosen)
    values = values / values.sum(-1, keepdim=True) * rank.config["route_scale"]
    return torch.zeros_like(scores).scatter(-1, chosen, values)
