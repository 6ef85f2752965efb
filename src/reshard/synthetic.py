"""Makes DeepSeek-V2 and V3 checkpoints of the true layout at any scale, by the configs in `synthetic_configs`.

It states that layout by itself, from the shapes of the models: it knows no recipe and no plan, so that they can be
checked against what stands here.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from math import prod
from pathlib import Path
from typing import Any

from reshard.errors import refuse
from reshard.formats.safetensors import BITS, format_entry, format_header, make_order_key

TensorEntry = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""

CONFIGS = Path(__file__).parent / "synthetic_configs"


def read_packaged_config(name: str) -> Mapping[str, Any]:
    """Reads the `config.json` of a published model, which lies in the package."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return config


DEEPSEEK_V3 = read_packaged_config("deepseek-v3")
"""The `config.json` of DeepSeek-V3: 671 billion parameters and an MTP layer, FP8 with a scale a block."""

DEEPSEEK_V2_LITE = read_packaged_config("deepseek-v2-lite")
"""The `config.json` of DeepSeek-V2-Lite: 16 billion parameters, BF16 throughout, `q_proj` in one piece."""

SMALL_V3: Mapping[str, Any] = {
    **DEEPSEEK_V3,
    "first_k_dense_replace": 1,
    "hidden_size": 256,
    "intermediate_size": 1536,
    "kv_lora_rank": 256,
    "moe_intermediate_size": 512,
    "n_routed_experts": 16,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "q_lora_rank": 192,
    "vocab_size": 4096,
}
"""A DeepSeek-V3 of 51 MB for the demo. What 1, 2 and 4 ranks cut ends on a block of 128; `q_a` and `kv_a` do not."""

TOKENIZER: Mapping[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": {"type": "BPE", "vocab": {"<bos>": 0, "<eos>": 1, "a": 2, "b": 3, "ab": 4}, "merges": ["a b"]},
}

TOKENIZER_CONFIG: Mapping[str, Any] = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "model_max_length": 131072,
    "tokenizer_class": "PreTrainedTokenizerFast",
}

FILE_METADATA = '"__metadata__":{"format":"pt"}'

CHUNK_SIZE = 2**20
"""Bytes drawn at a time: they stay in the processor's cache."""

WORD_BITS: Mapping[str, tuple[int, int]] = {
    "I8": (0xFFFF_FFFF_FFFF_FFFF, 0),
    "F8_E4M3": (0xFEFE_FEFE_FEFE_FEFE, 0),
    "F8_E8M0": (0x0707_0707_0707_0707, 0x7070_7070_7070_7070),
    "BF16": (0x83FF_83FF_83FF_83FF, 0x3800_3800_3800_3800),
    "F32": (0x00FF_FFFF_00FF_FFFF, 0x3A00_0000_3A00_0000),
    "I64": (0x07, 0),
}
"""The bits that stay random in eight bytes, and those that are always set.

They make FP8 an even code, so never 0x7f or 0xff (NaN); BF16 of either sign between 2^-15 and 2^-7; F32 positive
between 2^-11 and 2^-9, as scales are; E8M0 between 2^-15 and 2^-8, so near each other that FP4 becomes FP8 without a
loss; I64 the number of one of 8 experts.
"""

SCALE_ENDINGS = ("_scale_inv", ".scale")
"""How the names of block scales end."""


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], files: int, *, sparse: bool = False, seed: int = 0, index: bool = True
) -> None:
    """Writes the checkpoint of `config` into `folder`, which must be absent or empty, in exactly `files` files.

    The data of a tensor depend on `seed` and its name alone. `sparse` leaves them a hole: all sizes are true, the disk
    holds the headers only, and every byte reads as zero. With `index` false there is no index. Raises Refused.
    """
    write_tensors(folder, list_tensors(config), config, files, sparse=sparse, seed=seed, index=index)


def write_tensors(
    folder: Path,
    tensors: Sequence[TensorEntry],
    config: Mapping[str, Any],
    files: int,
    *,
    sparse: bool = False,
    seed: int = 0,
    index: bool = True,
) -> None:
    """As `write_checkpoint`, for any tensors that come with a config. A scale must follow its weight."""
    require_empty(folder)
    contents = split_into_files(tensors, files)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_file(folder / name, content, None if sparse else seed)
    if index:
        weight_map = {tensor[0]: name for name, content in contents.items() for tensor in content}
        metadata = {"total_size": sum(map(compute_data_size, tensors))}
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", TOKENIZER)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)


def require_empty(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        found = "a folder that holds files" if folder.is_dir() else "a file"
        raise refuse("not-empty", str(folder), found, "a new or an empty folder", "name another folder")


def list_tensors(config: Mapping[str, Any]) -> list[TensorEntry]:
    """Name, dtype and shape of every tensor, in the order of the model; each weight is followed by its scale."""
    hidden, vocabulary, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    mtp_layers = range(layers, layers + config.get("num_nextn_predict_layers", 0))
    return [
        make_bf16_entry("model.embed_tokens.weight", vocabulary, hidden),
        *chain.from_iterable(list_layer(config, number) for number in range(layers)),
        make_bf16_entry("model.norm.weight", hidden),
        make_bf16_entry("lm_head.weight", vocabulary, hidden),
        *chain.from_iterable(list_mtp_layer(config, number) for number in mtp_layers),
    ]


def list_mtp_layer(config: Mapping[str, Any], number: int) -> Iterator[TensorEntry]:
    """A layer of multi-token prediction: an expert layer, with an embedding and a head of its own around it."""
    hidden, vocabulary, prefix = config["hidden_size"], config["vocab_size"], f"model.layers.{number}"
    yield make_bf16_entry(f"{prefix}.embed_tokens.weight", vocabulary, hidden)
    yield make_bf16_entry(f"{prefix}.enorm.weight", hidden)
    yield make_bf16_entry(f"{prefix}.hnorm.weight", hidden)
    yield make_bf16_entry(f"{prefix}.eh_proj.weight", hidden, 2 * hidden)
    yield from list_layer(config, number)
    yield make_bf16_entry(f"{prefix}.shared_head.norm.weight", hidden)
    yield make_bf16_entry(f"{prefix}.shared_head.head.weight", vocabulary, hidden)


def list_layer(config: Mapping[str, Any], number: int) -> Iterator[TensorEntry]:
    prefix = f"model.layers.{number}"
    yield from list_attention(config, f"{prefix}.self_attn")
    if number < config["first_k_dense_replace"]:
        yield from list_feed_forward(config, f"{prefix}.mlp", config["intermediate_size"])
    else:
        yield from list_experts(config, f"{prefix}.mlp")
    yield make_bf16_entry(f"{prefix}.input_layernorm.weight", config["hidden_size"])
    yield make_bf16_entry(f"{prefix}.post_attention_layernorm.weight", config["hidden_size"])


def list_attention(config: Mapping[str, Any], prefix: str) -> Iterator[TensorEntry]:
    hidden, heads, query_rank = config["hidden_size"], config["num_attention_heads"], config["q_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    if query_rank is None:
        yield from list_linear(config, f"{prefix}.q_proj", heads * (nope + rope), hidden)
    else:
        yield from list_linear(config, f"{prefix}.q_a_proj", query_rank, hidden)
        yield make_bf16_entry(f"{prefix}.q_a_layernorm.weight", query_rank)
        yield from list_linear(config, f"{prefix}.q_b_proj", heads * (nope + rope), query_rank)
    yield from list_linear(config, f"{prefix}.kv_a_proj_with_mqa", config["kv_lora_rank"] + rope, hidden)
    yield make_bf16_entry(f"{prefix}.kv_a_layernorm.weight", config["kv_lora_rank"])
    yield from list_linear(config, f"{prefix}.kv_b_proj", heads * (nope + value), config["kv_lora_rank"])
    yield from list_linear(config, f"{prefix}.o_proj", hidden, heads * value)


def list_experts(config: Mapping[str, Any], prefix: str) -> Iterator[TensorEntry]:
    """The experts of a layer. However many are shared, they are one set of tensors, as wide as all of them."""
    width, count = config["moe_intermediate_size"], config["n_routed_experts"]
    yield make_bf16_entry(f"{prefix}.gate.weight", count, config["hidden_size"])
    if config["model_type"] == "deepseek_v3":
        yield f"{prefix}.gate.e_score_correction_bias", "F32", (count,)
    for expert in range(count):
        yield from list_feed_forward(config, f"{prefix}.experts.{expert}", width)
    yield from list_feed_forward(config, f"{prefix}.shared_experts", width * config["n_shared_experts"])


def list_feed_forward(config: Mapping[str, Any], prefix: str, width: int) -> Iterator[TensorEntry]:
    yield from list_linear(config, f"{prefix}.gate_proj", width, config["hidden_size"])
    yield from list_linear(config, f"{prefix}.up_proj", width, config["hidden_size"])
    yield from list_linear(config, f"{prefix}.down_proj", config["hidden_size"], width)


def list_linear(config: Mapping[str, Any], prefix: str, rows: int, columns: int) -> Iterator[TensorEntry]:
    """A weight that is quantised where the model is, with a scale for each block, the last ones smaller."""
    quantization = config.get("quantization_config")
    if quantization is None:
        yield make_bf16_entry(f"{prefix}.weight", rows, columns)
        return
    block_rows, block_columns = quantization["weight_block_size"]
    yield f"{prefix}.weight", "F8_E4M3", (rows, columns)
    yield f"{prefix}.weight_scale_inv", "F32", (-(-rows // block_rows), -(-columns // block_columns))


def make_bf16_entry(name: str, *shape: int) -> TensorEntry:
    return name, "BF16", shape


def compute_data_size(tensor: TensorEntry) -> int:
    """In bytes."""
    return prod(tensor[2]) * BITS[tensor[1]] // 8


def split_into_files(tensors: Sequence[TensorEntry], files: int) -> dict[str, Sequence[TensorEntry]]:
    """File name -> a run of the tensors, about equal in bytes. Raises Refused if there cannot be so many files.

    Where there are scales, every cut falls between a weight and its scale (in each file the order is then that of
    safetensors): a reader that looks for a scale only in the file of its weight must fail here.
    """
    places = [place for place, tensor in enumerate(tensors) if tensor[0].endswith(SCALE_ENDINGS)]
    places = places or list(range(1, len(tensors)))
    if not 1 <= files <= len(places) + 1:
        raise refuse("wrong-number-of-files", "files", f"{files:,}", f"1 to {len(places) + 1:,} for this model")
    starts = list(accumulate(map(compute_data_size, tensors), initial=0))
    cuts = [0, *choose_cuts(places, starts, files), len(tensors)]
    names = (f"model-{number:05}-of-{files:05}.safetensors" for number in range(1, files + 1))
    return {name: tensors[cuts[file] : cuts[file + 1]] for file, name in enumerate(names)}


def choose_cuts(places: Sequence[int], starts: Sequence[int], files: int) -> Iterator[int]:
    """Of the `places`, the nearest to each even share of the bytes, and such that no file stays empty."""
    middles = [starts[place] + starts[following] for place, following in pairwise(places)]
    chosen = -1
    for number in range(1, files):
        wanted = bisect_left(middles, 2 * starts[-1] * number // files)
        chosen = min(max(wanted, chosen + 1), len(places) - files + number)
        yield places[chosen]


def write_file(path: Path, tensors: Iterable[TensorEntry], seed: int | None) -> None:
    """Writes a safetensors file; without a seed, only its header and its size."""
    ordered = sorted(tensors, key=lambda tensor: make_order_key(tensor[0], tensor[1]))
    ends = list(accumulate(map(compute_data_size, ordered), initial=0))
    entries = [f"{format_entry(*tensor)}{ends[i]},{ends[i + 1]}]}}" for i, tensor in enumerate(ordered)]
    header = format_header([FILE_METADATA, *entries])
    with path.open("xb") as file:
        file.write(header)
        if seed is None:
            file.truncate(len(header) + ends[-1])
            return
        for tensor in ordered:
            file.writelines(make_random_data(tensor, seed))


def make_random_data(tensor: TensorEntry, seed: int) -> Iterator[memoryview]:
    """The data of a tensor in chunks. Nothing in it repeats, so that 16 bytes in a wrong place are seen."""
    import numpy as np  # noqa: PLC0415 - slow to import, and nothing else here needs it

    name, dtype, _ = tensor
    random_bits, set_bits = WORD_BITS[dtype]
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    source = np.random.PCG64(int.from_bytes(key, "little"))
    size = compute_data_size(tensor)
    for start in range(0, size, CHUNK_SIZE):
        chunk_size = min(CHUNK_SIZE, size - start)
        words = source.random_raw(-(-chunk_size // 8))
        words &= random_bits
        words |= set_bits
        yield words.view(np.uint8)[:chunk_size].data


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
