"""The promise of a config: its `quantization_config`, and whether the weights are as it says. Opens no file."""

import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from reshard.errors import Problem
from reshard.recipe_types import Recipe
from reshard.sources.exemptions import read_exemptions
from reshard.text import format_count
from reshard.types import Checkpoint, Note, Tensor

PROMISE_KEY = "quantization_config"

CONFIG_KEYS = (PROMISE_KEY, "compression_config", "quantization")
"""Config keys of a quantization: of most quantizers, of old compressed-tensors, and of MLX."""

SWITCHES = ("load_in_4bit", "load_in_8bit")
"""Keys of bitsandbytes. If both are false, the weights are plain: it is only how a script once loaded them."""

CODES = {"I32", "U32", "I16", "U16", "I8", "U8", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0"}
"""Dtypes of quantized weights, packed or not. I64 is not among them: models have tables of numbers."""

FLOATS = ("BF16", "F16", "F32")
"""Dtypes of unscaled weights. Loaders copy each of them into a parameter of any other."""

SPELLED = {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "mxfp4": "MXFP4", "hqq": "HQQ", "modelopt": "ModelOpt"}
"""`quant_method` -> as people write it. Others are written as they stand."""

UNDERSTOOD = (
    *("AWQ", "GPTQ", "FP8", "MXFP4", "MLX", "ModelOpt"),
    *("bitsandbytes", "compressed-tensors", "quark"),
)
"""Methods of which `covers_weights` can tell what they quantize. Others get a note where no weight is quantized."""


class Promise(NamedTuple):
    """A quantization that a config tells of."""

    place: str
    """Its place: `quantization_config of config.json`."""
    words: str
    """What it is: `AWQ with 4 bits`."""
    method: str
    """What it is, without details: `AWQ`."""
    table: Mapping[str, Any]


def read_promise(config: Mapping[str, Any] | None) -> Promise | None:
    """Reads the quantization that a config tells of; None if there is none, or if it leaves the weights as they are."""
    config = config or {}
    for prefix, table in (("", config), ("text_config.", config.get("text_config"))):
        for key in CONFIG_KEYS:
            found = table.get(key) if isinstance(table, Mapping) else None
            if isinstance(found, Mapping) and covers_weights(found):
                method = name_method(found, key)
                words = describe_method(method, found)
                return Promise(f"{prefix}{key} of config.json", words, method, found)
    return None


def drop_promise(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Drops from a config what it tells of the quantization."""
    if config is None:
        return None
    plain = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    inner = plain.get("text_config")
    if isinstance(inner, Mapping):
        plain["text_config"] = {key: value for key, value in inner.items() if key not in CONFIG_KEYS}
    return plain


def covers_weights(table: Mapping[str, Any]) -> bool:
    """Whether a quantization is of weights. Published configs also have some that are empty, or of the cache only."""
    if any(key in table for key in SWITCHES):
        return any(table.get(key) is True for key in SWITCHES)
    if isinstance(inner := table.get("quantization"), Mapping):
        table = inner
    if not any(isinstance(table.get(key), str) for key in ("quant_method", "quant_algo", "fmt")):
        return "weight_block_size" in table or (type(table.get("bits")) is int and table["bits"] < 16)
    method = str(table.get("quant_method")).lower()
    if method in COVERING:
        return COVERING[method](table)
    # ModelOpt without an algorithm has only quantized the key-value cache.
    return bool(table.get("quant_algo", True)) and table.get("bits") != 16


def covers_by_groups(table: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors covers weights. Without groups it has only quantized the key-value cache, or pruned;
    a group may also be of activations only.
    """
    return any(group.get("weights") for group in list_tables(table.get("config_groups")))


def covers_by_layers(table: Mapping[str, Any]) -> bool:
    """Whether Quark covers weights: by one table for all layers, and others for some layers."""
    tables = [table.get("global_quant_config")]
    tables += [part for key in LAYERS_OF_QUARK for part in list_tables(table.get(key))]
    return any(isinstance(part, Mapping) and part.get("weight") for part in tables)


LAYERS_OF_QUARK = ("layer_quant_config", "layer_type_quant_config")

COVERING: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "none": lambda _: False,
    "bitsandbytes": lambda _: False,  # with neither of its switches
    "compressed-tensors": covers_by_groups,
    "quark": covers_by_layers,
}
"""`quant_method` -> whether its table is of weights, where more than the name decides."""


def list_tables(value: Any) -> list[Mapping[str, Any]]:
    """Lists the tables within a table; empty if it is none."""
    return [part for part in value.values() if isinstance(part, Mapping)] if isinstance(value, Mapping) else []


def name_method(table: Mapping[str, Any], key: str) -> str:
    """Names the method of a quantization."""
    found = table.get("quant_method")
    if isinstance(found, str) and found:
        return SPELLED.get(found.lower(), reprlib.repr(found)[1:-1])
    if any(name in table for name in SWITCHES):
        return "bitsandbytes"
    return "MLX" if key == "quantization" else "an unknown method"


def describe_method(method: str, table: Mapping[str, Any]) -> str:
    """Describes a quantization: its method, its format, its bits."""
    inner = table.get("quantization")
    merged = {**inner, **table} if isinstance(inner, Mapping) else table
    details = [merged[key] for key in ("quant_algo", "format") if isinstance(merged.get(key), str)]
    bits = merged.get("bits", {SWITCHES[0]: 4, SWITCHES[1]: 8}.get(next((k for k in SWITCHES if merged.get(k)), "")))
    words = " ".join([method, *(f"({reprlib.repr(detail)[1:-1]})" for detail in details)])
    return f"{words} with {bits} bits" if type(bits) is int else words


class Stale(NamedTuple):
    """A promise that no weight keeps."""

    promise: Promise
    weights: Sequence[Tensor]
    """Those that it is of, as far as that is known."""
    are_scaled: bool
    """Whether the recipe pairs them with block scales."""
    is_sure: bool
    """Whether it is of them in truth: its method is understood, and so is its list of other modules."""


def find_stale(checkpoint: Checkpoint, recipe: Recipe, scaled: Sequence[Tensor], *, has_scales: bool) -> Stale | None:
    """Finds a config that promises quantized weights where all are plain.

    `scaled` are the weights that the recipe pairs with block scales; if it has none, every matrix counts. A mixture is
    no matter of the config: its tensors are reported one by one.
    """
    promise = read_promise(checkpoint.config)
    has_codes = bool(checkpoint.packed) or any(tensor.dtype in CODES for tensor in checkpoint.tensors.values())
    if promise is None or has_scales or has_codes:
        return None
    exemptions = read_exemptions(promise.table)
    matrices = scaled if recipe.scales else [tensor for tensor in checkpoint.tensors.values() if len(tensor.shape) > 1]
    weights = [tensor for tensor in matrices if not exemptions.cover(tensor.name)]
    is_understood = promise.method in UNDERSTOOD or bool(recipe.scales)
    return Stale(promise, weights, bool(scaled), is_understood and exemptions.are_clear) if weights else None


def check_promise(stale: Stale | None) -> Iterator[Problem]:
    """Reports a promise that no weight keeps, if that is sure: a loader would look for the scales."""
    if stale is None or not stale.is_sure:
        return
    promise, weights = stale.promise, stale.weights
    what = "has a block scale" if stale.are_scaled else "is quantized"
    dtype = find_dtype(weights)
    found = f"{promise.words}, but none of the {len(weights):,} weights {what}; they are {dtype}"
    key = promise.place.removesuffix(" of config.json")
    remedy = f"take {key} out of config.json (keep a copy of the file); or is it the config of another checkpoint?"
    yield Problem("contradiction", promise.place, found, f"no {key}, for weights of {dtype}", remedy)


def note_promise(stale: Stale | None) -> Iterator[Note]:
    """Notes a promise that no weight keeps, if it may be of none."""
    if stale and not stale.is_sure:
        weights = f"{format_count(len(stale.weights), 'weights')} of {find_dtype(stale.weights)}"
        text = f"{stale.promise.place} tells of {stale.promise.words}, but no weight is quantized ({weights})"
        yield Note("quantization-config", f"{text}; a loader may look for scales: does it belong to these weights?")


def find_dtype(tensors: Sequence[Tensor]) -> str:
    """The dtype of most tensors."""
    return Counter(tensor.dtype for tensor in tensors).most_common(1)[0][0]
