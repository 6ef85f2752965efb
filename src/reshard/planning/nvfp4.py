"""Packed MXFP4 to packed NVFP4: what can be cast, the casts of scales and factors, and which weights share a factor."""

from collections.abc import Iterator, Sequence
from math import prod

from reshard.casts.nvfp4 import FACTOR, SCALE
from reshard.casts.shapes import count_blocks
from reshard.errors import Problem
from reshard.formats.safetensors import BITS
from reshard.recipes.patterns import WEIGHT
from reshard.sources.block_scales import WeightGroup
from reshard.text import format_count
from reshard.types import NVFP4, Cast, Checkpoint, Packed, Tensor

GROUP = 16
"""In elements: columns of NVFP4 that share a scale."""

WORDS = ("weight_packed", "weight_scale", "weight_global_scale")
"""Last words of the names of codes, scales and factor: those of compressed-tensors."""

TAKEN = "weights of MXFP4, in weight_packed and weight_scale of U8"

STEPS = "FP4 has other steps than integers, so most values would be rounded"

OTHERS = {
    "integers": ("packed integers", STEPS),
    "awq": ("AWQ", STEPS),
    "gptq": ("GPTQ", STEPS),
    "gptq-v2": ("GPTQ", STEPS),
    "fp8": ("FP8", "FP4 has 4 bits of its 8, so most values would be rounded"),
    "nvfp4": ("NVFP4", "it is NVFP4 already"),
    "nvfp4-divided": ("NVFP4", "it is NVFP4 already"),
    "mxfp4-experts": ("MXFP4 of gpt-oss", "its experts lie transposed in one tensor, which this NVFP4 cannot have"),
}
"""Packing -> what it is called, and why it does not become NVFP4."""


def check_nvfp4(checkpoint: Checkpoint, kinds: Sequence[WeightGroup]) -> Iterator[Problem]:
    """Reports weights that do not become NVFP4 without loss, and a checkpoint that has none that do."""
    found: dict[str, list[Tensor]] = {}
    for packed in checkpoint.packed:
        found.setdefault(packed.packing, []).append(packed.result)
    scaled = [weight for kind in kinds if kind.scales for weight in kind.weights]
    if scaled and not found:
        found["fp8" if scaled[0].dtype == "F8_E4M3" else ""] = scaled
    for packing, weights in found.items():
        if packing in OTHERS:
            title, reason = OTHERS[packing]
            said = f"{NVFP4}, for {format_count(len(weights), 'weights')} of {title}, such as {weights[0].name}"
            yield Problem("wrong-option", "--cast", said, f"{TAKEN}: {reason}", "--cast bf16")
    if not found.keys() & {"mxfp4", *OTHERS}:
        yield Problem("wrong-option", "--cast", f"{NVFP4}, for a checkpoint without such weights", TAKEN)


def make_nvfp4_tensors(
    weights: Sequence[Tensor], packed: Sequence[Packed], first: int, casts: list[Cast]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Adds the casts that make NVFP4 of some weights. Returns the codes, which are those of the source, the scales and
    the factors. `first` is the number of the first cast.
    """
    codes = [one.codes._replace(name=weight.name, dtype="U8") for weight, one in zip(weights, packed, strict=True)]
    made: dict[str, list[Tensor]] = {SCALE: [], FACTOR: []}
    for weight, one in zip(weights, packed, strict=True):
        rows, columns = weight.shape
        for operation, dtype, block in (
            (SCALE, "F8_E4M3", (1, GROUP)),
            (FACTOR, "F32", (max(1, rows), max(1, columns))),
        ):
            shape = count_blocks((rows, columns), block) if operation == SCALE else (1,)
            result = Tensor(weight.name, dtype, shape, first + len(casts), 0, prod(shape) * BITS[dtype] // 8)
            old = (1, one.group)
            casts.append(Cast(operation, one.codes, one.scales, old, result, block, is_scale=True, packed=one))
            made[operation].append(result)
    return codes, made[SCALE], made[FACTOR]


def group_under_parents(casts: list[Cast]) -> None:
    """Lets the weights of one parent share a factor: an engine that fuses them has one for all."""
    parents: dict[str, list[Packed]] = {}
    for cast in casts:
        if cast.operation == SCALE and cast.packed:
            parents.setdefault(find_parent(cast), []).append(cast.packed)
    together = {parent: tuple(weights) for parent, weights in parents.items()}
    for place, cast in enumerate(casts):
        if cast.operation in (SCALE, FACTOR):
            casts[place] = cast._replace(beside=together[find_parent(cast)])


def find_parent(cast: Cast) -> str:
    """The name of the module that has the weight of a cast, and those beside it: `model.layers.0.mlp`."""
    return cast.result.name.removesuffix(f".{WEIGHT}").rpartition(".")[0]
