"""The part of a model that a tensor belongs to, by the words of its name: its kind, and its row in a drawing."""

from collections.abc import Iterable
from functools import lru_cache

from reshard.formats.folders_below import split_numbers
from reshard.numbered_names import name_layer, split_name

ATTENTION, EXPERTS, SHARED, DENSE, ENDS = (
    "attention",
    "routed experts",
    "shared experts",
    "dense MLP",
    "embedding, head",
)
NORMS, ROUTERS, SCALES, VISION, OTHER = "norms", "routers", "scales of weights", "vision", "other"

KINDS = (ATTENTION, EXPERTS, SHARED, DENSE, ENDS, NORMS, ROUTERS, SCALES, VISION, OTHER)
"""What a model is made of, in the order of a drawing."""

VISION_WORDS = ("visual", "vision", "image", "aligner", "mm_projector", "multi_modal")
ROUTER_WORDS = {"gate", "router", "shared_expert_gate", "e_score_correction_bias"}
END_WORDS = {"head", "embed", "embedding", "embeddings", "wte"}
MLP_WORDS = {"mlp", "ffn", "feed_forward", "block_sparse_moe"}
SCALE_WORDS = {"scale", "scales", "qzeros", "g_idx", "input_scale", "weight_zero_point", "weight_g_idx"}


@lru_cache(4096)
def find_module_kind(module: str) -> str:
    """Finds the kind of a tensor, one of KINDS, by its name, with or without the numbers."""
    words = module.lower().split(".")
    last = words[-1]
    if any(word.startswith(VISION_WORDS) for word in words):
        return VISION
    if last in SCALE_WORDS or last.endswith("_scales") or "weight_scale" in last or last.startswith("weight_global"):
        return SCALES
    if any("norm" in word for word in words):
        return NORMS
    if not ROUTER_WORDS.isdisjoint(words):
        return ROUTERS
    if any(word.lstrip("_").startswith("shared_expert") for word in words):
        return SHARED
    if "experts" in words or any(word.startswith("routed_expert") for word in words):
        return EXPERTS
    if any(word in END_WORDS or word.startswith("embed_") or word.endswith("_head") for word in words):
        return ENDS
    if any("attn" in word or "attention" in word for word in words) or "sinks" in words:
        return ATTENTION
    return DENSE if not MLP_WORDS.isdisjoint(words) else OTHER


def name_row(name: str) -> str:
    """Names the row of a tensor: its layer; without one, its name without the last word, as `model.embed_tokens`."""
    return name_layer(name) or name.rpartition(".")[0] or name


def sort_rows(rows: Iterable[str]) -> list[str]:
    """Sorts rows: embeddings, then layers, 9 before 10, then all else."""

    def find_place(row: str) -> tuple[int, list[tuple[int, str]], str]:
        is_first = not name_layer(row) and "embed" in row
        return 0 if is_first else 1 if name_layer(row) == row else 2, split_numbers(row), row

    return sorted(rows, key=find_place)


def split_at_layer(name: str) -> tuple[str, str, str]:
    """Splits the name of a tensor: what its layer is one of, the number of the layer, and the rest with `#` for each
    number. The first two are empty for a tensor in no layer, whose name stays whole.
    """
    layer = name_layer(name)
    kind, _, number = layer.rpartition(".")
    return kind, number, split_name(name[len(layer) :].removeprefix("."))[0] if layer else name
