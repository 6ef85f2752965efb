"""How the weights of a source lie packed: found out from its headers and its config, and compared with how they were
read.

    X.qweight, X.qzeros, X.scales, X.g_idx:   X.weight, codes of four bits; what each part is follows from its name
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from reshard.errors import Problem
from reshard.types import NVFP4, PACKED, Checkpoint, Packed, Tensor
from reshard.verification.nvfp4_config import make_nvfp4_config
from reshard.verification.stacked_source import REPORT, describe_place
from reshard.verification.stored_packings import (
    QUANTIZATION_KEYS,
    WORD,
    find_packed_weights,
    find_quantization,
    make_result,
)

LEFT_ASIDE = (
    *(".weight_shape", ".input_scale", ".input_global_scale", ".input_zero_point", ".output_scale"),
    *(".output_zero_point", ".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point"),
)
"""The ends of the names of what a model in BF16 does not have: scales of activations and caches, and shapes."""

PARTS = ("codes", "scales", "zeros", "factor", "order")


class PackedSource(NamedTuple):
    """A source with packed weights: as it lies there, and as it was read."""

    stored: Checkpoint
    read: Checkpoint
    """Under the plain names of the weights."""
    cast: str = ""
    """What it was read for: `bf16` or `nvfp4`."""


def check_packed_source(source: PackedSource) -> Iterator[Problem]:
    """Reports each packed weight that was read from other tensors than its own or in another way than it lies, each
    other tensor that was read from another place, and tensors that are not in the source.
    """
    stored, read, _ = source
    weights = {packed.result.name: packed for packed in find_packed_weights(stored)}
    parts = {part.name for packed in weights.values() for part in packed.list_inputs()}
    kept = {
        name: tensor
        for name, tensor in stored.tensors.items()
        if name not in parts and not (weights and name.endswith(LEFT_ASIDE))
    }
    yield from check_read_config(source) if weights else ()
    for name in dict.fromkeys((*weights, *kept, *read.tensors)):
        found, wanted = read.tensors.get(name), kept.get(name)
        if name in weights:
            yield from check_packed_weight(weights[name], found, source)
        if (found if name not in weights else None) != wanted:
            text = describe_place(found, read) if found else "not read"
            yield Problem("wrong-place", name, text, describe_place(wanted, stored) if wanted else "no tensor", REPORT)


def check_read_config(source: PackedSource) -> Iterator[Problem]:
    """Reports a config that was not read as it is but for what it tells of the quantization: nothing, or of NVFP4."""
    stored = source.stored.config or {}
    wanted = make_nvfp4_config(stored) if source.cast == NVFP4 else drop_quantization(stored)
    if source.cast != NVFP4 and "text_config" in wanted and isinstance(wanted["text_config"], Mapping):
        wanted["text_config"] = drop_quantization(wanted["text_config"])
    found = source.read.config or {}
    for key in sorted(found.keys() | wanted.keys()):
        if (key in found, found.get(key)) != (key in wanted, wanted.get(key)):
            said, expected = (json.dumps(one[key]) if key in one else "nothing" for one in (found, wanted))
            yield Problem("wrong-config", f"config.json: {key}", said, expected, REPORT)


def drop_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that tell of a quantization."""
    return {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}


def check_packed_weight(wanted: Packed, tensor: Tensor | None, source: PackedSource) -> Iterator[Problem]:
    """Reports what is wrong with how a packed weight was read."""
    stored, read, _ = source
    name, place = wanted.result.name, tensor.file - PACKED if tensor else -1
    if tensor is None or not 0 <= place < len(read.packed):
        text = describe_place(tensor, read) if tensor else "not read"
        yield Problem("wrong-place", name, text, f"what is made of {wanted.codes.name} ({wanted.packing})", REPORT)
        return
    found = read.packed[place]
    wanted = take_open_facts(wanted, found, find_quantization(stored.config or {}))
    said, expected = (f"{one.packing}, {one.bits} bits, groups of {one.group}" for one in (found, wanted))
    if said != expected:
        yield Problem("wrong-place", name, said, expected, REPORT)
    result = wanted.result._replace(file=tensor.file)
    for one in (tensor, found.result):
        if one != result:
            said, expected = (f"{side.dtype} {list(side.shape)}, {side.size:,} bytes" for side in (one, result))
            yield Problem("wrong-place", name, said, expected, REPORT)
    for part in PARTS:
        one, other = getattr(found, part), getattr(wanted, part)
        if not is_same_place(one, other):
            said = f"{part}: {describe_place(one, read) if one else 'none'}"
            expected = f"{part}: {describe_place(other, stored) if other else 'none'}"
            yield Problem("wrong-place", name, said, expected, REPORT)


def take_open_facts(wanted: Packed, found: Packed, table: Mapping[str, Any]) -> Packed:
    """The same weight with the bits and columns that it was read with, where only a tensor tells them: of integers
    whose last word may have room for more codes, or of whose bits no config tells, or several.
    """
    words, in_row = wanted.codes.shape[-1], wanted.scales.shape[-1] or 1
    groups = table.get("config_groups")
    parts = [one.get("weights") for one in groups.values() if isinstance(one, dict)] if isinstance(groups, dict) else []
    is_told = len({part.get("num_bits") for part in parts if isinstance(part, dict)}) == 1
    bits, columns = wanted.bits if is_told else found.bits, found.result.shape[-1] if found.result.shape else 0
    is_open = wanted.packing == "integers" and (in_row == 1 or not is_told)
    if not is_open or bits not in (4, 8) or -(-columns * bits // WORD) != words or columns % in_row:
        return wanted
    result = make_result(wanted.result.name, wanted.result.shape[0], columns)
    return wanted._replace(bits=bits, group=columns // in_row, result=result)


def is_same_place(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors have the same bytes of the same file, dtype and shape: the name may be another."""
    return (one and one._replace(name="")) == (other and other._replace(name=""))
