"""Notes on dtypes: a router bias that lost precision when it was saved, tensors that some loaders refuse, and weights
that loaders round, for the config says another dtype.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reshard.planning.transforms import Outcome, is_rounded
from reshard.recipe_types import Recipe
from reshard.sources.block_scales import WeightGroup
from reshard.text import format_count, format_size
from reshard.types import RANKS, Layout, Note, Tensor

FULL, SHORT = "F32", ("BF16", "F16")
"""The dtype of a published router bias, and those that it is found in after a training run saved it."""

REFUSING = "safetensors 0.6.0 to 0.6.2 refuse to load that in DeepSeek's generate.py; older and newer versions cast it"

ROUNDED_TO = {"bfloat16": ("F16", "F32", "F64"), "float16": ("BF16", "F32", "F64")}
"""By the dtype in a config: the dtypes of weights that a loader would round to it."""

KEEPING = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""By the dtype of weights: what a config says of them."""


def note_dtypes(
    recipe: Recipe, layout: Layout, outcomes: Sequence[Outcome], config: Mapping[str, Any]
) -> Iterator[Note]:
    """Notes what a person should know about the dtypes of a target: one note a kind."""
    modules = {find_module(place.rows_of) for place in recipe.placeholders.values() if place.rows_of}
    rounded = [outcome for outcome in outcomes if is_rounded_router_bias(outcome.kind, modules)]
    yield from note_router_biases(rounded)
    is_known = all(rule.code_dtype for rule in recipe.rules if rule.relation != "drop")
    if layout.to == RANKS and is_known:
        yield from note_loader_dtypes(layout, [outcome for outcome in outcomes if outcome not in rounded])
    else:
        yield from note_config_dtype(layout, outcomes, config)


def note_config_dtype(layout: Layout, outcomes: Sequence[Outcome], config: Mapping[str, Any]) -> Iterator[Note]:
    """Notes weights most of whose bytes are of a wider dtype than the config says, as a training saves them. `--cast
    bf16` changes the config too.
    """
    said = config.get("dtype", config.get("torch_dtype"))
    if layout.cast == "bf16" or not isinstance(said, str) or said not in ROUNDED_TO:
        return
    sizes: Counter[str] = Counter()
    for outcome in outcomes:
        sizes[outcome.weights[0].dtype] += sum(tensor.size for tensor in outcome.weights)
    wider = max(ROUNDED_TO[said], key=lambda dtype: sizes[dtype])
    if sizes[wider] * 2 > sizes.total():
        weights = f"{wider} weights ({format_size(sizes[wider])}), but config.json says {said}"
        why = "loaders that go by it round them unasked, as transformers and vLLM do"
        is_remedied = said == "bfloat16" and any(is_rounded(outcome.kind) for outcome in outcomes)
        remedy = "; --cast bf16 rounds them here" if is_remedied else ""
        yield Note("config-dtype", f"{weights}: {why}{remedy}; to keep them, say {KEEPING[wider]} there")


def note_router_biases(rounded: Sequence[Outcome]) -> Iterator[Note]:
    """Notes router biases of fewer bits than the published ones: they choose other experts."""
    found = [tensor for outcome in rounded for tensor in outcome.kind.weights]
    if found:
        first = find_first(found)
        biases = f"{format_count(len(found), 'router bias tensors')} of {first.dtype}, such as {first.name}"
        why = f"{FULL} in published checkpoints and in the inference code; they were rounded when they were saved"
        remedy = "take them from the original checkpoint"
        yield Note("router-bias-dtype", f"{biases}: {why}, so tokens are routed otherwise; {remedy}")


def find_module(name: str) -> tuple[str, ...]:
    """The last two components of the module that a tensor name belongs to: of `layers.{i}.ffn.gate.bias`, `ffn` and
    `gate`.
    """
    return tuple(name.split(".")[-3:-1])


def is_rounded_router_bias(kind: WeightGroup, modules: set[tuple[str, ...]]) -> bool:
    """Whether tensors are short, should be F32, and lie beside a weight that has a row for each expert."""
    rule = kind.rule
    is_short = kind.weights[0].dtype in SHORT and rule.code_dtype == FULL
    return is_short and not rule.left.endswith("weight") and find_module(rule.left) in modules


def find_first(tensors: Sequence[Tensor]) -> Tensor:
    """The tensor of the first layer: layer 9 comes before layer 10."""
    return min(tensors, key=lambda tensor: (len(tensor.name), tensor.name))


def note_loader_dtypes(layout: Layout, outcomes: Sequence[Outcome]) -> Iterator[Note]:
    """Notes tensors of rank files of another dtype than their parameters. Optional and scaled ones do not count,
    but for block scales that no inference code has: BF16 and F16.
    """
    kinds: dict[tuple[str, str], list[Tensor]] = {}
    for outcome in outcomes:
        rule, dtype = outcome.kind.rule, outcome.weights[0].dtype
        if outcome.scales and outcome.scales[0].dtype in SHORT and not rule.optional:
            kinds.setdefault((outcome.scales[0].dtype, FULL), []).extend(outcome.kind.scales)
        if outcome.scales or rule.optional or rule.relation == "drop" or dtype == rule.code_dtype:
            continue
        kinds.setdefault((dtype, rule.code_dtype), []).extend(outcome.kind.weights)
    if kinds:
        listed = [
            f"{format_count(len(found), 'tensors')} of {dtype} (the inference code has {wanted}), such as "
            f"{find_first(found).name}"
            for (dtype, wanted), found in kinds.items()
        ]
        is_plain = not layout.cast and not any(outcome.scales for outcome in outcomes)
        is_remedied = is_plain and any(is_rounded(outcome.kind) for outcome in outcomes)
        remedy = "; --cast bf16 rounds F32 to BF16" if is_remedied else ""
        yield Note("loader-dtype", f"{'; '.join(listed)}: {REFUSING}{remedy}")
