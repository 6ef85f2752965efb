"""Slow, obvious converters of every family beside V2 and V3, for the tests to compare with.

Like `oracle`, they read a whole checkpoint into memory, look whole names up, cut with torch, and import nothing of
the package under test. Each writes what the family's own script writes, and where that script stops at a block
shared by two ranks, the scale of that block.
"""

import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import oracle
import torch
from oracle_casts import dequantize, fp4_to_fp8
from safetensors.torch import save_file
from torch import Tensor

Names = Mapping[str, tuple[str, int | None]]

# What V3.2 adds to V3: its weights are whole on every rank, unlike `q_b_proj`, which becomes another `wq_b`.
INDEXER: Names = {
    f"model.layers.#.self_attn.indexer.{part}": (f"layers.#.attn.indexer.{part}", None)
    for part in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
}

# The tensors that V4 cuts, by what follows `layers.N.` or `mtp.N.`. Every other tensor is whole on every rank,
# shared experts too; routed experts are dealt whole.
V4_CUTS: dict[str, int] = {
    "attn.attn_sink": 0,
    "attn.wq_b.weight": 0,
    "attn.wq_b.scale": 0,
    "attn.wo_a.weight": 0,
    "attn.wo_a.scale": 0,
    "attn.wo_b.weight": 1,
    "attn.wo_b.scale": 1,
    "attn.indexer.wq_b.weight": 0,
    "attn.indexer.wq_b.scale": 0,
    "attn.indexer.weights_proj.weight": 0,
}
# The drafter's bigram tables, under the names of 0731 and under those of V4.1.
V4_0731_CUTS = V4_CUTS | {"markov_head.markov_w1.weight": 0, "markov_head.markov_w2.weight": 0}
V41_CUTS = V4_CUTS | {"markov_head.embed.weight": 0, "markov_head.head.weight": 0}


def convert_v3(source: Path, target: Path, ranks: int, *, mtp_layers: Collection[int] | None = None) -> None:
    """Convert V2, V3, R1, V3.1; `mtp_layers` are left out, without it the layer numbered `num_hidden_layers`."""
    _convert(source, target, ranks, _load(source, mtp_layers), oracle.NAMES)


def convert_v32(source: Path, target: Path, ranks: int, *, mtp_layers: Collection[int] | None = None) -> None:
    """Convert V3.2 and V3.2-Exp."""
    _convert(source, target, ranks, _load(source, mtp_layers), {**oracle.NAMES, **INDEXER})


def convert_glm51(source: Path, target: Path, ranks: int, *, mtp_layers: Collection[int] | None = None) -> None:
    """Convert GLM-5.1 and GLM-5.2: the names of V3.2 with more layers than 61, of which layer 61 is a real one."""
    convert_v32(source, target, ranks, mtp_layers=mtp_layers)


def convert_kimi_k2(source: Path, target: Path, ranks: int) -> None:
    """Convert Kimi-K2 in FP8: V3 without the tables of rotary frequencies, which the model computes itself."""
    tensors = _load(source, None)
    kept = {name: tensors[name] for name in tensors if not name.endswith(".self_attn.rotary_emb.inv_freq")}
    _convert(source, target, ranks, kept, oracle.NAMES)


def convert_v3_padded(source: Path, target: Path, ranks: int, *, mtp_layers: Collection[int] | None = None) -> None:
    """Convert V3 in FP8 for more ranks than its blocks divide into: dense and shared experts end in zeros."""
    tensors = pad_to_blocks(_load(source, mtp_layers), ranks, oracle.block_size(source))
    _convert(source, target, ranks, tensors, oracle.NAMES)


def convert_v4(source: Path, target: Path, ranks: int, *, expert_dtype: str = "fp4") -> None:
    """Convert V4-Flash and V4-Pro of April 2026; `expert_dtype` is fp4 or fp8."""
    _convert_v4(source, target, ranks, V4_CUTS, 128, expert_dtype)


def convert_v4_0731(source: Path, target: Path, ranks: int, *, expert_dtype: str = "fp4") -> None:
    """Convert V4-Flash-0731 and the DSpark releases."""
    _convert_v4(source, target, ranks, V4_0731_CUTS, 128, expert_dtype)


def convert_v4_vision(source: Path, target: Path, ranks: int, *, expert_dtype: str = "fp4") -> None:
    """Convert V4-Flash-Vision-Exp by the rule of the script of its generation, which looks at one word of a name."""
    tensors = {name: tensor for name, tensor in oracle.load_tensors(source, ()).items() if not is_dropped_by_word(name)}
    count = 1 + max(number for name in tensors if (number := routed_expert(name)) is not None)
    shares = (
        cast_v4(dict(take_by_word(tensors, range(count), ranks, rank)), 128, expert_dtype) for rank in range(ranks)
    )
    side_files = [name for name in ("tokenizer.json", "tokenizer_config.json") if (source / name).exists()]
    _write(source, target, ranks, shares, side_files)


def convert_v41(source: Path, target: Path, ranks: int, *, expert_dtype: str = "fp4") -> None:
    """Convert V4.1-Flash, with blocks of 32."""
    _convert_v4(source, target, ranks, V41_CUTS, 32, expert_dtype)


# --- the V3 line ---


def _load(source: Path, mtp_layers: Collection[int] | None) -> dict[str, Tensor]:
    """Return all tensors but those of the given layers, or of the first one past the model's own."""
    if mtp_layers is None:
        mtp_layers = [oracle.read_config(source)["num_hidden_layers"]]
    return oracle.load_tensors(source, mtp_layers)


def _convert(source: Path, target: Path, ranks: int, tensors: dict[str, Tensor], names: Names) -> None:
    block = oracle.block_size(source)
    shares = (dict(oracle.rank_tensors(tensors, ranks, rank, block, names)) for rank in range(ranks))
    _write(source, target, ranks, shares, oracle.visible_files(source, "*token*"))


def _write(
    source: Path, target: Path, ranks: int, shares: Iterable[dict[str, Tensor]], side_files: Iterable[str]
) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for rank, share in enumerate(shares):
        save_file(share, target / f"model{rank}-mp{ranks}.safetensors")
    for file_name in side_files:
        shutil.copyfile(source / file_name, target / file_name)


def pad_to_blocks(tensors: dict[str, Tensor], ranks: int, block: int) -> dict[str, Tensor]:
    """Return the tensors with dense and shared experts grown at the tail to equal whole blocks a rank.

    New weights are zero and their scales one, so that the longer product has the same sum.
    """
    result = dict(tensors)
    for name, tensor in tensors.items():
        dimension = padded_dimension(name)
        scale_name = f"{name}_scale_inv"
        if dimension is not None and scale_name in tensors:
            blocks = -(-tensor.size(dimension) // block)
            wanted = -(-blocks // ranks) * ranks
            result[name] = pad(tensor, dimension, wanted * block, 0.0)
            result[scale_name] = pad(tensors[scale_name], dimension, wanted, 1.0)
    return result


def padded_dimension(name: str) -> int | None:
    """Return the dimension of a dense or shared weight that is cut, None for every other tensor."""
    found = re.fullmatch(r"model\.layers\.\d+\.mlp\.(shared_experts\.)?(gate|up|down)_proj\.weight", name)
    if found is None:
        return None
    return 1 if found.group(2) == "down" else 0


def pad(tensor: Tensor, dimension: int, length: int, value: float) -> Tensor:
    """Return the tensor grown to `length` at the end of a dimension."""
    shape = list(tensor.shape)
    shape[dimension] = length - tensor.size(dimension)
    return torch.cat([tensor, torch.full(shape, value).to(tensor.dtype)], dimension)


# --- the V4 line ---


def _convert_v4(source: Path, target: Path, ranks: int, cuts: Mapping[str, int], block: int, expert_dtype: str) -> None:
    if expert_dtype not in {"fp4", "fp8"}:
        raise ValueError(f"expert_dtype {expert_dtype} is neither fp4 nor fp8")
    tensors = oracle.load_tensors(source, ())
    tensors = {name: tensors[name] for name in tensors if not is_dropped(name)}
    block = oracle.block_size(source, block)
    shares = (cast_v4(share_v4(tensors, ranks, rank, cuts, block), block, expert_dtype) for rank in range(ranks))
    side_files = [name for name in ("tokenizer.json", "tokenizer_config.json") if (source / name).exists()]
    _write(source, target, ranks, shares, side_files)


# The script of Vision-Exp: the word of a name that it looks at, and the dimension that it cuts for that word.
CUT_WORDS = {"wo_b": 1} | dict.fromkeys(
    ("embed", "head", "attn_sink", "wq_b", "wo_a", "weights_proj", "markov_w1", "markov_w2"), 0
)
WITHOUT_WEIGHT = ("hc", "attn_sink", "tid2eid", "ape", "image_")


def is_dropped_by_word(name: str) -> bool:
    """Say whether the script leaves a tensor of the drafter out: any that embeds, and any weight called head."""
    return name.startswith("mtp.") and ("emb" in name or name.endswith("head.weight"))


def take_by_word(tensors: Mapping[str, Tensor], experts: range, ranks: int, rank: int) -> Iterable[tuple[str, Tensor]]:
    """Yield what a rank gets: its routed experts, its part of what is cut, and all else whole."""
    share = len(experts) // ranks
    for name, tensor in tensors.items():
        words = name.split(".")
        word = words[-1] if any(part in name for part in WITHOUT_WEIGHT) else words[-2]
        if "experts" in words:
            if int(words[words.index("experts") + 1]) // share == rank:
                yield name, tensor
        elif word in CUT_WORDS:
            yield name, tensor.chunk(ranks, CUT_WORDS[word])[rank].contiguous()
        else:
            yield name, tensor


def is_dropped(name: str) -> bool:
    """Say whether this is a drafter's copy of the backbone's embedding or head."""
    return re.fullmatch(r"mtp\.\d+\.(embed|head)\.weight", name) is not None


def share_v4(
    tensors: dict[str, Tensor], ranks: int, rank: int, cuts: Mapping[str, int], block: int
) -> dict[str, Tensor]:
    """Return what one rank holds, in the dtypes of the source."""
    held = {part: held_experts(tensors, part, ranks, rank) for part in ("layers", "mtp")}
    share: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        check_native(name)
        expert = routed_expert(name)
        if expert is not None:
            if expert in held[name.split(".")[0]]:
                share[name] = tensor
        elif re.fullmatch(r"layers\.\d+\.engram\.embed\.(weight|scale)", name):
            share[name] = engram_share(tensor, ranks, rank, 1.0 if name.endswith(".scale") else 0.0)
        else:
            share[name] = cut_v4(name, tensors, ranks, rank, cuts, block)
    return share


def check_native(name: str) -> None:
    """Refuse a name that the scripts would rewrite: no published V4 checkpoint has one."""
    foreign = ("weight_scale_inv", "self_attn", "e_score_correction_bias")
    if name.startswith("model.") or any(part in name for part in foreign):
        raise ValueError(f"{name} is not a name of V4")
    if "mlp" in name and not name.startswith("vision."):
        raise ValueError(f"{name} is not a name of V4")


def routed_expert(name: str) -> int | None:
    """Return the number of the routed expert that a tensor belongs to."""
    found = re.fullmatch(r"(layers|mtp)\.\d+\.ffn\.experts\.(\d+)\.w[123]\.(weight|scale)", name)
    return int(found.group(2)) if found else None


def held_experts(tensors: Iterable[str], part: str, ranks: int, rank: int) -> range:
    """Return the numbers of the experts that a rank holds of the backbone (`layers`) or of the drafter (`mtp`)."""
    numbers = {routed_expert(name) for name in tensors if name.startswith(f"{part}.")} - {None}
    if len(numbers) % ranks != 0:
        raise ValueError(f"{len(numbers)} experts of {part} cannot be dealt to {ranks} ranks")
    local = len(numbers) // ranks
    return range(rank * local, (rank + 1) * local)


def engram_share(table: Tensor, ranks: int, rank: int, padding: float) -> Tensor:
    """Return a rank's rows of a table; past the table's end they are `padding`."""
    local = -(-table.size(0) // ranks)
    return pad(table, 0, local * ranks, padding).narrow(0, rank * local, local).contiguous()


def cut_v4(name: str, tensors: dict[str, Tensor], ranks: int, rank: int, cuts: Mapping[str, int], block: int) -> Tensor:
    """Return the rank's part of a tensor that is cut, and any other tensor whole."""
    tensor = tensors[name]
    dimension = 0 if name in {"embed.weight", "head.weight"} else cuts.get(re.sub(r"^(layers|mtp)\.\d+\.", "", name))
    if dimension is None or ranks == 1:
        return tensor
    if name.endswith(".scale"):
        weight = tensors[name.removesuffix("scale") + "weight"]
        return oracle.cut_scale(tensor, dimension, weight.size(dimension) // ranks, rank, block)
    return oracle.cut_weight(tensor, dimension, ranks, rank)


def cast_v4(share: dict[str, Tensor], block: int, expert_dtype: str) -> dict[str, Tensor]:
    """Return a rank's tensors in the dtypes of its file: `wo_a` as BF16 without scale, FP4 experts as asked."""
    result = dict(share)
    for name, tensor in share.items():
        scale_name = name.removesuffix("weight") + "scale"
        if name.endswith(".attn.wo_a.weight"):
            result[name] = dequantize(tensor, result.pop(scale_name), block)
        elif routed_expert(name) is not None and tensor.dtype == torch.int8:
            if expert_dtype == "fp8":
                result[name], result[scale_name] = fp4_to_fp8(tensor, share[scale_name], block)
            else:
                result[name] = tensor.view(torch.float4_e2m1fn_x2)
    return result
