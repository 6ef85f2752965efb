"""How the weights of a source lie packed: found out from its headers and its config, and compared with how they were
read.

    X.qweight, X.qzeros, X.scales, X.g_idx:   X.weight, codes of four bits; what each part is follows from its name
"""

from collections.abc import Iterator
from typing import NamedTuple

from reshard.errors import Problem
from reshard.types import PACKED, Checkpoint, Packed, Tensor
from reshard.verification.stacked_source import REPORT, describe_place
from reshard.verification.stored_packings import find_packed_weights

LEFT_ASIDE = (
    *(".weight_shape", ".input_scale", ".input_global_scale", ".input_zero_point"),
    *(".k_scale", ".v_scale", ".q_scale", ".output_scale"),
)
"""The ends of the names of what a model in BF16 does not have: scales of activations and caches, and shapes."""

PARTS = ("codes", "scales", "zeros", "factor", "order")


class PackedSource(NamedTuple):
    """A source with packed weights: as it lies there, and as it was read."""

    stored: Checkpoint
    read: Checkpoint
    """Under the plain names of the weights."""


def check_packed_source(source: PackedSource) -> Iterator[Problem]:
    """Reports each packed weight that was read from other tensors than its own or in another way than it lies, each
    other tensor that was read from another place, and tensors that are not in the source.
    """
    stored, read = source
    weights = {packed.result.name: packed for packed in find_packed_weights(stored)}
    parts = {part.name for packed in weights.values() for part in packed.list_inputs()}
    kept = {
        name: tensor
        for name, tensor in stored.tensors.items()
        if name not in parts and not (weights and name.endswith(LEFT_ASIDE))
    }
    for name in dict.fromkeys((*weights, *kept, *read.tensors)):
        found, wanted = read.tensors.get(name), kept.get(name)
        if name in weights:
            yield from check_packed_weight(weights[name], found, source)
        if (found if name not in weights else None) != wanted:
            text = describe_place(found, read) if found else "not read"
            yield Problem("wrong-place", name, text, describe_place(wanted, stored) if wanted else "no tensor", REPORT)


def check_packed_weight(wanted: Packed, tensor: Tensor | None, source: PackedSource) -> Iterator[Problem]:
    """Reports what is wrong with how a packed weight was read."""
    stored, read = source
    name, place = wanted.result.name, tensor.file - PACKED if tensor else -1
    if tensor is None or not 0 <= place < len(read.packed):
        text = describe_place(tensor, read) if tensor else "not read"
        yield Problem("wrong-place", name, text, f"what is made of {wanted.codes.name} ({wanted.packing})", REPORT)
        return
    found = read.packed[place]
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


def is_same_place(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors have the same bytes of the same file, dtype and shape: the name may be another."""
    return (one and one._replace(name="")) == (other and other._replace(name=""))
