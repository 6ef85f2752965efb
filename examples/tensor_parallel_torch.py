"""Runs Llama, Mistral, Qwen2 or Qwen3 from the rank files that `reshard convert MODEL RANKS --mp N` writes.

    pip install torch safetensors transformers
    reshard convert Qwen3-0.6B/ ranks/ --mp 2
    torchrun --nproc-per-node 2 examples/tensor_parallel_torch.py ranks/ --prompt "The sky is" --tokens 8

Each process opens one file, `model-rankR-of-N.safetensors`, and `config.json`. `--compare Qwen3-0.6B/` computes the
same with transformers from the checkpoint, and says how far the logits are apart. With `--ids 1,2,3` in the place of a
prompt neither transformers nor a tokenizer is needed.

It is written to be read: on CPUs, in float32, without a key-value cache, and for dense models without quantization.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

KNOWN_MODELS = ("llama", "mistral", "qwen2", "qwen3")


class Rank:
    """One process of a tensor-parallel model: its shard of the weights, and the model's config."""

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        path = folder / f"model-rank{rank}-of-{ranks}.safetensors"
        if not path.is_file():
            raise SystemExit(f"{path} is not there: reshard convert MODEL {folder} --mp {ranks} writes it")
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        with safe_open(path, "pt") as file:
            self.weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        check_model(self.config, self.weights)
        self.weights = {name: tensor.float() for name, tensor in self.weights.items()}

    # --- what ranks do together: two operations are all that tensor parallelism needs ---

    def sum_over_ranks(self, part: Tensor) -> Tensor:
        """Each rank has a summand of every number."""
        dist.all_reduce(part)
        return part

    def join_ranks(self, part: Tensor) -> Tensor:
        """Each rank has some of the numbers, in the order of the ranks."""
        parts = [torch.empty_like(part) for _ in range(self.ranks)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, -1)

    # --- the three kinds of weights ---

    def project(self, hidden: Tensor, name: str) -> Tensor:
        """A weight cut by rows (`q_proj`, `gate_proj`): the rank computes some of the output channels."""
        return linear(hidden, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def project_back(self, hidden: Tensor, name: str) -> Tensor:
        """A weight cut by columns (`o_proj`, `down_proj`): the rank has some of the input channels, and a summand of
        every output channel. All ranks have the whole bias, if there is one: it is added once, behind the sum.
        """
        total = self.sum_over_ranks(linear(hidden, self.weights[f"{name}.weight"]))
        bias = self.weights.get(f"{name}.bias")
        return total if bias is None else total + bias

    def normalize(self, hidden: Tensor, name: str) -> Tensor:
        """A weight that all ranks have whole."""
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        found: Tensor = hidden * scale * self.weights[f"{name}.weight"]
        return found

    # --- the model ---

    def compute_logits(self, ids: Tensor) -> Tensor:
        """The logits [length, vocabulary] of all positions, the same on every rank."""
        hidden = self.embed(ids)
        turns = make_turns(self.config, len(ids))
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            hidden = hidden + self.attend(self.normalize(hidden, f"{name}.input_layernorm"), f"{name}.self_attn", turns)
            hidden = hidden + self.feed(self.normalize(hidden, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        hidden = self.normalize(hidden, "model.norm")
        head = "lm_head" if "lm_head.weight" in self.weights else "model.embed_tokens"  # tied models may have one only
        return self.join_ranks(self.project(hidden, head))[:, : self.config["vocab_size"]]  # `--pad` adds rows

    def embed(self, ids: Tensor) -> Tensor:
        """Each rank has some rows of the table: it looks up the tokens that it has, and takes zeros for the others."""
        table = self.weights["model.embed_tokens.weight"]
        rows = ids - self.rank * len(table)
        is_here = (rows >= 0) & (rows < len(table))
        return self.sum_over_ranks(table[rows.clamp(0, len(table) - 1)] * is_here[:, None])

    def attend(self, hidden: Tensor, name: str, turns: tuple[Tensor, Tensor]) -> Tensor:
        """The rank has some query heads, and the key and value heads that these need."""
        width = self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]
        query, key, value = (
            self.project(hidden, f"{name}.{kind}_proj").view(len(hidden), -1, width).transpose(0, 1) for kind in "qkv"
        )
        if f"{name}.q_norm.weight" in self.weights:  # Qwen3
            query, key = self.normalize(query, f"{name}.q_norm"), self.normalize(key, f"{name}.k_norm")
        query, key = turn(query, turns), turn(key, turns)
        shared = len(query) // len(key)  # so many query heads share a key head; count them in the file
        key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
        found = scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
        return self.project_back(found.transpose(0, 1).flatten(1), f"{name}.o_proj")

    def feed(self, hidden: Tensor, name: str) -> Tensor:
        """The rank has some inner channels."""
        inner = silu(self.project(hidden, f"{name}.gate_proj")) * self.project(hidden, f"{name}.up_proj")
        return self.project_back(inner, f"{name}.down_proj")


def check_model(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raises SystemExit for a model that this program does not run."""
    if config["model_type"] not in KNOWN_MODELS:
        raise SystemExit(f"model_type {config['model_type']}: this example runs {', '.join(KNOWN_MODELS)} only")
    if found := {str(tensor.dtype) for tensor in weights.values() if tensor.dtype.itemsize == 1}:
        raise SystemExit(f"weights in {', '.join(found)}: convert with --cast bf16 to run them here")


def make_turns(config: Mapping[str, Any], length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head width] of the rotary embedding."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and length > window:
        raise SystemExit(f"{length} tokens: beyond the sliding window of {window}, which this example does not have")
    # transformers 5 writes `rope_parameters`; published configs have `rope_theta` and perhaps `rope_scaling`.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    theta = rope.get("rope_theta") or config.get("rope_theta", 10_000.0)
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    if kind == "llama3":  # Llama 3.1: low frequencies are slower, those between are blended
        waves = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        blend = (waves - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        blend = blend.clamp(0, 1)
        frequencies = frequencies * (blend + (1 - blend) / rope["factor"])
    elif kind != "default":
        raise SystemExit(f"rotary embedding {kind}: this example has default and llama3 only")
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def turn(heads: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the two halves of each head by the angles of its position."""
    first, second = heads.chunk(2, -1)
    return heads * turns[0] + torch.cat([-second, first], -1) * turns[1]


def generate(model: Rank, ids: Sequence[int], tokens: int) -> list[int]:
    """The most likely next tokens, one by one. Every rank finds the same."""
    ends = model.config.get("eos_token_id")
    known = list(ids)
    for _ in range(tokens):
        known.append(int(model.compute_logits(torch.tensor(known))[-1].argmax()))
        if known[-1] in (ends if isinstance(ends, list) else [ends]):
            break
    return known[len(ids) :]


def compare(found: Tensor, source: Path, ids: Sequence[int]) -> None:
    """Compares logits with those of transformers. Raises SystemExit if they are not the same but for rounding."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - needed for this only

    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    wanted = whole(torch.tensor([list(ids)])).logits[0]
    apart = float((found - wanted).abs().max())
    print(f"logits {list(found.shape)}: largest difference from transformers {apart:.2g}, of {wanted.abs().max():.3g}")
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3):
        raise SystemExit("they differ by more than rounding")


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs a model from its rank files; start it with torchrun.")
    parser.add_argument("folder", type=Path, help="the folder that reshard convert wrote")
    parser.add_argument("--prompt", default="The sky is", help="needs transformers and a tokenizer in the folder")
    parser.add_argument("--ids", help="tokens by their numbers in the place of a prompt: 1,2,3")
    parser.add_argument("--tokens", type=int, default=16, help="generate so many; default: 16")
    parser.add_argument("--compare", type=Path, metavar="SOURCE", help="the checkpoint, to compare with transformers")
    options = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error("start it with torchrun, which tells each process its rank")

    dist.init_process_group("gloo")  # torchrun has set rank, number of ranks and where they meet
    model = Rank(options.folder, dist.get_rank(), dist.get_world_size())
    tokenizer = None
    if not options.ids:
        from transformers import AutoTokenizer  # noqa: PLC0415 - needed for this only

        tokenizer = AutoTokenizer.from_pretrained(options.folder)
    ids = tokenizer.encode(options.prompt) if tokenizer else [int(number) for number in options.ids.split(",")]
    with torch.no_grad():
        logits = model.compute_logits(torch.tensor(ids))
        new = generate(model, ids, options.tokens)
        if model.rank == 0:
            print("generated:", tokenizer.decode(new) if tokenizer else new)
            if options.compare:
                compare(logits, options.compare, ids)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
