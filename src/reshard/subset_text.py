"""What a manifest says of a subset: whether it is as we write it, as text for people, and as what was asked for."""

from collections.abc import Iterator, Mapping
from typing import Any

from reshard.errors import listed, refuse
from reshard.holes import numbers_text
from reshard.types import Subset, Tensor

COUNTS = ("layers", "experts")
ITSELF = "source"
"""The key of what the source was a subset of itself."""
KEYS = {*COUNTS, "only", "left_out", ITSELF}


def is_subset(value: Any) -> bool:
    """Whether a value is as we write it: anyone can write a manifest."""
    while isinstance(value, dict) and value:
        kept = [value[key] for key in COUNTS if key in value]
        if not (
            set(value) <= KEYS
            and all(is_kept(entry) for entry in kept)
            and is_only(value.get("only", ["*"]))
            and is_numbers(value.get("left_out"), ("tensors", "bytes"))
        ):
            return False
        value = value.get(ITSELF, {})
    return isinstance(value, dict)


def is_only(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(pattern, str) for pattern in value)


def is_kept(value: Any) -> bool:
    """Whether a value is `{"kept": [0, 1], "of": 61}`."""
    numbers = value.get("kept") if isinstance(value, dict) else None
    return (
        isinstance(numbers, list)
        and bool(numbers)
        and all(type(number) is int and number >= 0 for number in numbers)
        and value.keys() == {"kept", "of"}
        and type(value["of"]) is int
    )


def is_numbers(value: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and value.keys() == set(keys) and all(type(value[key]) is int for key in keys)


def left_out(before: Mapping[str, Tensor], after: Mapping[str, Tensor], known: Mapping[str, int]) -> dict[str, int]:
    """What a subset lacks, and what it lacked before."""
    size = sum(tensor.size for tensor in before.values()) - sum(tensor.size for tensor in after.values())
    tensors = len(before) - len(after)
    return {"tensors": tensors + known.get("tensors", 0), "bytes": size + known.get("bytes", 0)}


def subset_text(subset: Mapping[str, Any]) -> str:
    """`layers 0-3 of 61, experts 0-15 of 256; 87,000 tensors left out, 600,000,000,000 bytes`."""
    return "; of a subset: ".join(own_text(one) for one in with_sources(subset))


def with_sources(subset: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A subset, what it is a subset of, and so on."""
    while subset:
        yield subset
        subset = subset.get(ITSELF, {})


def own_text(subset: Mapping[str, Any]) -> str:
    parts = [f"{key} {numbers_text(subset[key]['kept'])} of {subset[key]['of']:,}" for key in COUNTS if key in subset]
    parts += [f"only {listed(subset['only'])}"] if "only" in subset else []
    lacking = subset["left_out"]
    return f"{', '.join(parts)}; {lacking['tensors']:,} tensors left out, {lacking['bytes']:,} bytes"


def asked_of(source: Mapping[str, Any], target: Mapping[str, Any], name: str) -> Subset:
    """What was asked of a source, itself perhaps a subset, to get a target; `name` is that of the target's folder.

    Raises Refused if the target holds chosen tensors only, or came from another source.
    """
    if target == source:
        return Subset()
    if "only" in target:
        remedy = "verify it without --source, by the checksums of its manifest"
        raise refuse("incomplete-source", name, subset_text(target), "whole layers, to be compared", remedy)
    if target.get(ITSELF, {}) != source:
        found = f"a subset: {subset_text(target)}" if target else "a whole model"
        expected = f"made from this source, which is a subset: {subset_text(source)}" if source else "made from this"
        raise refuse("contradiction", name, found, expected, "name the source that it was made from")
    layers, experts = (tuple(target[key]["kept"]) if key in target else None for key in COUNTS)
    return Subset(layers, experts, renumber=True)


def subset_lines(subset: Mapping[str, Any]) -> Iterator[str]:
    """That this is not the whole model."""
    if subset:
        yield f"a subset: {subset_text(subset)}"
