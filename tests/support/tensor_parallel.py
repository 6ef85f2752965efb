"""The plainest tensor-parallel model: each rank reads its own file and config.json, and nothing else.

    logits(load_rank(folder, rank, ranks), config, exchange, ids)

It runs Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Qwen3-Next, the text of Qwen3.5, Mixtral, GLM-4 MoE, MiniMax-M2 and
gpt-oss, in float32 and without a cache. A rank meets the others in `exchange` alone, which gives it the tensor of every
rank. So the same code runs with a thread a rank (`all_logits`) and with a process a rank (`main`, by gloo). Imports
nothing of the package under test.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Exchange = Callable[[Tensor], Sequence[Tensor]]
"""From a rank's tensor to those of all ranks, in their order."""
TIMEOUT = 300
AROUND_ZERO = ("qwen3_next", "qwen3_5")
"""Model types with norms whose weights are less by one, and with a gate for each query."""


class Rank(NamedTuple):
    """What a rank has."""

    tensors: Tensors
    config: Config
    number: int
    exchange: Exchange

    def weight(self, name: str) -> Tensor:
        return self.tensors[name].float()

    def linear(self, hidden: Tensor, name: str) -> Tensor:
        """By the weight that this rank has of a layer, and by its bias, if there is one."""
        bias = self.tensors.get(f"{name}.bias")
        return functional.linear(hidden, self.weight(f"{name}.weight"), None if bias is None else bias.float())

    def reduced(self, hidden: Tensor, name: str) -> Tensor:
        """By a layer whose columns are cut: the sum over the ranks; the bias, which all have whole, counts once."""
        bias = self.tensors.get(f"{name}.bias")
        total = self.summed(functional.linear(hidden, self.weight(f"{name}.weight")))
        return total if bias is None else total + bias.float()

    def gathered(self, tensor: Tensor) -> Tensor:
        """The channels of all ranks."""
        return torch.cat(list(self.exchange(tensor)), -1)

    def summed(self, tensor: Tensor) -> Tensor:
        return torch.stack(list(self.exchange(tensor))).sum(0)


def load_rank(folder: Path, rank: int, ranks: int) -> dict[str, Tensor]:
    """What a rank loads. Its file says of itself which part it is."""
    with safe_open(folder / f"model-rank{rank}-of-{ranks}.safetensors", "pt") as file:
        said = file.metadata()
        if (said["rank"], said["ranks"]) != (str(rank), str(ranks)):
            raise ValueError(said)
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping


def logits(rank: Rank, ids: Tensor) -> Tensor:
    """The logits [batch, length, vocabulary], the same on every rank; without those that padding has added."""
    root = "model.language_model" if "text_config" in rank.config else "model"
    rank = rank._replace(config=rank.config.get("text_config", rank.config))
    embedding = f"{root}.embed_tokens.weight"
    head = "lm_head.weight" if "lm_head.weight" in rank.tensors else embedding
    hidden = embedded(rank, embedding, ids)
    for layer in range(rank.config["num_hidden_layers"]):
        name = f"{root}.layers.{layer}"
        is_linear = f"{name}.linear_attn.A_log" in rank.tensors
        attend, word = (linear_attention, "linear_attn") if is_linear else (attention, "self_attn")
        hidden = hidden + attend(rank, f"{name}.{word}", normed(rank, hidden, f"{name}.input_layernorm"))
        hidden = hidden + forward(rank, name, normed(rank, hidden, f"{name}.post_attention_layernorm"))
    hidden = normed(rank, hidden, f"{root}.norm")
    return rank.gathered(functional.linear(hidden, rank.weight(head)))[..., : rank.config["vocab_size"]]


def embedded(rank: Rank, name: str, ids: Tensor) -> Tensor:
    """Each rank has some rows of the table; the others' tokens are zeros to it."""
    table = rank.weight(name)
    place = ids - rank.number * len(table)
    is_here = (place >= 0) & (place < len(table))
    return rank.summed(table[place.clamp(0, len(table) - 1)] * is_here[..., None])


def normed(rank: Rank, hidden: Tensor, name: str) -> Tensor:
    """Some models have the weight less one."""
    less = name.rpartition(".")[0].endswith("linear_attn") or not rank.config["model_type"].startswith(AROUND_ZERO)
    weight = rank.weight(f"{name}.weight") + (0 if less else 1)
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + rank.config["rms_norm_eps"]) * weight


def attention(rank: Rank, name: str, hidden: Tensor) -> Tensor:
    """Of the heads that this rank has: each key head is there for as many query heads as the rank has for it."""
    width = rank.config.get("head_dim") or rank.config["hidden_size"] // rank.config["num_attention_heads"]
    parts = [rank.linear(hidden, f"{name}.{kind}_proj") for kind in ("q", "k", "v")]
    gate = None
    if rank.config["model_type"].startswith(AROUND_ZERO):  # of each head a query, then its gate
        parts[0], gate = (half.flatten(2) for half in by_head(parts[0], 2 * width).chunk(2, -1))
    has_norms = f"{name}.q_norm.weight" in rank.tensors
    is_wide = has_norms and len(rank.tensors[f"{name}.q_norm.weight"]) > width
    if is_wide:  # a norm over all heads
        for at, kind in enumerate(("q", "k")):
            whole = normed(rank, rank.gathered(parts[at]), f"{name}.{kind}_norm")
            parts[at] = whole[..., rank.number * parts[at].shape[-1] :][..., : parts[at].shape[-1]]
    heads = [part.reshape(*hidden.shape[:2], -1, width).transpose(1, 2) for part in parts]
    if has_norms and not is_wide:
        heads[:2] = [normed(rank, heads[0], f"{name}.q_norm"), normed(rank, heads[1], f"{name}.k_norm")]
    query, key, value = rotated(heads[0], rank.config), rotated(heads[1], rank.config), heads[2]
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    scores = query @ key.transpose(-1, -2) / width**0.5
    scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
    if f"{name}.sinks" in rank.tensors:
        sinks = rank.weight(f"{name}.sinks").reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        probabilities = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        probabilities = scores.softmax(-1)
    found = (probabilities @ value).transpose(1, 2).flatten(2)
    return rank.reduced(found if gate is None else found * gate.sigmoid(), f"{name}.o_proj")


def by_head(tensor: Tensor, width: int) -> Tensor:
    """The channels of each head: [batch, length, heads, width]."""
    return tensor.reshape(*tensor.shape[:2], -1, width)


def linear_attention(rank: Rank, name: str, hidden: Tensor) -> Tensor:
    """Gated DeltaNet, token by token. Its projections are cut by rows and gathered; the rest all ranks have."""
    sizes = [rank.config[f"linear_{word}"] for word in ("num_key_heads", "num_value_heads", "key_head_dim")]
    (keys, values, width), (query, key, value, gate, rates, decays) = sizes, projected(rank, name, hidden)
    mixed, weight = torch.cat([query, key, value], -1).transpose(1, 2), rank.weight(f"{name}.conv1d.weight")
    mixed = functional.conv1d(functional.pad(mixed, (weight.shape[-1] - 1, 0)), weight, groups=len(weight))
    lengths = [query.shape[-1], key.shape[-1], value.shape[-1]]
    parts = torch.split(functional.silu(mixed).transpose(1, 2), lengths, -1)
    query, key = (by_head(part, width) for part in parts[:2])
    query, key = (part * torch.rsqrt(part.pow(2).sum(-1, keepdim=True) + 1e-6) for part in (query, key))
    query, key = (part.repeat_interleave(values // keys, 2) for part in (query / width**0.5, key))
    value, gate = (by_head(part, value.shape[-1] // values) for part in (parts[2], gate))
    speed = rank.weight(f"{name}.A_log").exp() * functional.softplus(decays + rank.weight(f"{name}.dt_bias"))
    kept, rates, found = (-speed).exp(), rates.sigmoid(), []
    state = torch.zeros(len(hidden), values, width, value.shape[-1])
    for at in range(hidden.shape[1]):
        state = state * kept[:, at, :, None, None]
        told = (state * key[:, at, ..., None]).sum(-2)
        state = state + key[:, at, ..., None] * ((value[:, at] - told) * rates[:, at, :, None])[..., None, :]
        found.append((state * query[:, at, ..., None]).sum(-2))
    total = normed(rank, torch.stack(found, 1), f"{name}.norm") * functional.silu(gate)
    return rank.gathered(rank.linear(total.flatten(2), f"{name}.out_proj"))


def projected(rank: Rank, name: str, hidden: Tensor) -> tuple[Tensor, ...]:
    """Query, key, value, gate, rates and decays, of all heads."""

    def project(word: str) -> Tensor:
        return rank.gathered(rank.linear(hidden, f"{name}.in_proj_{word}"))

    keys, values = (rank.config[f"linear_num_{word}_heads"] for word in ("key", "value"))
    widths = [rank.config[f"linear_{word}_head_dim"] for word in ("key", "key", "value", "value")]
    if f"{name}.in_proj_qkv.weight" in rank.tensors:
        lengths = [count * width for count, width in zip((keys, keys, values), widths, strict=False)]
        return *torch.split(project("qkv"), lengths, -1), project("z"), project("b"), project("a")
    group = values // keys
    lengths = [count * width for count, width in zip((1, 1, group, group), widths, strict=True)]
    parts = torch.split(by_head(project("qkvz"), sum(lengths)), lengths, -1)
    others = torch.split(by_head(project("ba"), 2 * group), group, -1)
    return tuple(part.flatten(2) for part in (*parts, *others))


def rotated(heads: Tensor, config: Config) -> Tensor:
    """By the usual rotary embedding, of all or of the first channels of a head."""
    rotary = config["rope_parameters"]
    width = int(heads.shape[-1] * rotary.get("partial_rotary_factor", 1))
    frequencies = rotary["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.outer(torch.arange(heads.shape[-2], dtype=torch.float32), frequencies).repeat(1, 2)
    turned, rest = heads[..., :width], heads[..., width:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * angles.cos() + torch.cat([-second, first], -1) * angles.sin(), rest], -1)


def forward(rank: Rank, layer: str, hidden: Tensor) -> Tensor:
    """The feed-forward part of a layer, whichever it has."""
    if f"{layer}.block_sparse_moe.gate.weight" in rank.tensors:
        return experts(rank, f"{layer}.block_sparse_moe", hidden, ("w1", "w3", "w2"))
    if f"{layer}.mlp.gate.weight" in rank.tensors:
        return experts(rank, f"{layer}.mlp", hidden, ("gate_proj", "up_proj", "down_proj"))
    if f"{layer}.mlp.router.weight" in rank.tensors:
        return fused_experts(rank, f"{layer}.mlp", hidden)
    return gated(rank, f"{layer}.mlp", hidden)


def gated(rank: Rank, name: str, hidden: Tensor) -> Tensor:
    gate, up = rank.linear(hidden, f"{name}.gate_proj"), rank.linear(hidden, f"{name}.up_proj")
    return rank.reduced(functional.silu(gate) * up, f"{name}.down_proj")


def experts(rank: Rank, name: str, hidden: Tensor, words: tuple[str, str, str]) -> Tensor:
    """Each rank does the experts that it has; their names tell which these are."""
    scores = functional.linear(hidden, rank.weight(f"{name}.gate.weight"))
    biases = [f"{place}.e_score_correction_bias" for place in (f"{name}.gate", name)]
    shares = shares_of(rank, next((bias for bias in biases if bias in rank.tensors), ""), scores)
    pattern = re.compile(re.escape(name) + rf"\.experts\.(\d+)\.{words[0]}\.weight")
    total = torch.zeros_like(hidden)
    for expert in sorted(int(found[1]) for known in rank.tensors if (found := pattern.fullmatch(known))):
        gate, up, down = (rank.weight(f"{name}.experts.{expert}.{word}.weight") for word in words)
        inner = functional.silu(functional.linear(hidden, gate)) * functional.linear(hidden, up)
        total = total + functional.linear(inner, down) * shares[..., expert, None]
    total = rank.summed(total)
    if f"{name}.shared_expert_gate.weight" in rank.tensors:
        part = rank.linear(hidden, f"{name}.shared_expert_gate").sigmoid()
        return total + part * gated(rank, f"{name}.shared_expert", hidden)
    has_shared = f"{name}.shared_experts.gate_proj.weight" in rank.tensors
    return total + gated(rank, f"{name}.shared_experts", hidden) if has_shared else total


def shares_of(rank: Rank, bias: str, scores: Tensor) -> Tensor:
    """How much each expert counts for each token: [batch, length, experts], zero for those not chosen."""
    if bias in rank.tensors:
        probabilities = scores.sigmoid()
        chosen = (probabilities + rank.weight(bias)).topk(rank.config["num_experts_per_tok"]).indices
    else:
        probabilities = scores.softmax(-1)
        chosen = probabilities.topk(rank.config["num_experts_per_tok"]).indices
    values = probabilities.gather(-1, chosen)
    if rank.config.get("norm_topk_prob", True):
        values = values / values.sum(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, chosen, values * rank.config.get("routed_scaling_factor", 1))


def fused_experts(rank: Rank, name: str, hidden: Tensor) -> Tensor:
    """Those of gpt-oss: a tensor has all that a rank has; in it gates and what they let through alternate. Where each
    is cut, a rank has all of them, and the bias behind the sum counts once.
    """
    best = rank.linear(hidden, f"{name}.router").topk(rank.config["num_experts_per_tok"])
    scores = torch.zeros(*hidden.shape[:-1], rank.config["num_local_experts"])
    shares = scores.scatter(-1, best.indices, best.values.softmax(-1))
    weights = {word: rank.weight(f"{name}.experts.{word}") for word in ("gate_up_proj", "down_proj")}
    biases = {word: rank.weight(f"{name}.experts.{word}_bias") for word in weights}
    count, inner_size = weights["down_proj"].shape[:2]
    first = rank.number * count % shares.shape[-1]
    if rank.number and inner_size < rank.config["intermediate_size"]:
        biases["down_proj"] = torch.zeros_like(biases["down_proj"])
    total = torch.zeros_like(hidden)
    for place in range(count):
        both = hidden @ weights["gate_up_proj"][place] + biases["gate_up_proj"][place]
        gate, up = both[..., ::2].clamp(max=7), both[..., 1::2].clamp(-7, 7)
        inner = (up + 1) * gate * torch.sigmoid(gate * 1.702)
        done = inner @ weights["down_proj"][place] + biases["down_proj"][place]
        total = total + done * shares[..., first + place, None]
    return rank.summed(total)


def all_logits(folder: Path, ranks: int, ids: Tensor) -> list[Tensor]:
    """The logits that each rank comes to, with a thread a rank."""
    config = json.loads((folder / "config.json").read_text())
    return in_threads(ranks, lambda at, meet: logits(Rank(load_rank(folder, at, ranks), config, at, meet), ids))


def in_threads(ranks: int, run: Callable[[int, Exchange], Tensor]) -> list[Tensor]:
    """What each rank computes, given its number and how it meets the others, with a thread a rank."""
    barrier = Barrier(ranks, timeout=TIMEOUT)
    shelf: list[Tensor] = [torch.empty(0)] * ranks

    def run_one(number: int) -> Tensor:
        def exchange(tensor: Tensor) -> list[Tensor]:
            shelf[number] = tensor
            barrier.wait()
            found = list(shelf)
            barrier.wait()
            return found

        try:
            with torch.no_grad():
                return run(number, exchange)
        except BaseException:
            barrier.abort()  # the others would wait for it
            raise

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run_one, range(ranks)))


def main(folder: Path, number: int, ranks: int, rendezvous: str, ids: list[int]) -> None:
    """One process of several. Rank 0 writes the logits to `logits.pt` beside the rendezvous."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=number, world_size=ranks, timeout=timedelta(seconds=TIMEOUT)
    )

    def exchange(tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(ranks)]
        dist.all_gather(found, tensor.contiguous())
        return found

    config = json.loads((folder / "config.json").read_text())
    with torch.no_grad():
        found = logits(Rank(load_rank(folder, number, ranks), config, number, exchange), torch.tensor([ids]))
    if number == 0:
        torch.save(found, Path(rendezvous).with_name("logits.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5]))
