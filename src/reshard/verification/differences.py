"""Explains what a comparison has found: which bytes of which target tensor differ, and from what."""

from collections.abc import Iterable, Iterator

from reshard.errors import Problem
from reshard.text import format_count
from reshard.verification.chunks import KeptTensor, TargetPart
from reshard.verification.compare import Comparison, PartKey, is_padding, make_part_key
from reshard.verification.expected import DEQUANTIZE
from reshard.verification.provenance import Provenance
from reshard.verification.target_folder import CONVERT_AGAIN_HINT, PADDING


def check_differences(trace: Provenance, comparison: Comparison) -> Iterator[Problem]:
    """Target tensors whose bytes differ from their box of the source, or of the cast."""
    for kept in trace.kept.values():
        for key in list_target_tensors(kept.parts):
            yield from explain_difference(trace, comparison, key, kept)
    for (name, conversion), recast in trace.casts.items():
        for key in list_target_tensors((*recast.parts[0], *recast.parts[1])):
            yield from explain_difference(trace, comparison, key, f"what {conversion} makes of {name}")
    for whole in trace.unpacked.values():
        packed = whole.packed
        for key in list_target_tensors(whole.parts):
            made = f"what {DEQUANTIZE} makes of {packed.codes.name} ({packed.packing})"
            yield from explain_difference(trace, comparison, key, made)


def list_target_tensors(parts: Iterable[TargetPart]) -> Iterable[PartKey]:
    """The key of each target tensor once, though it may have two parts."""
    return dict.fromkeys(map(make_part_key, parts))


def explain_difference(
    trace: Provenance, comparison: Comparison, key: PartKey, origin: KeptTensor | str
) -> Iterator[Problem]:
    if found := comparison.differences.get(key):
        place = f"first in byte {found.first:,} of the tensor, last in byte {found.last:,}"
        where = "than in the source" if isinstance(origin, KeptTensor) else "than are made of the source"
        expected = f"those of {origin.tensor.name}" if isinstance(origin, KeptTensor) else origin
        if isinstance(origin, KeptTensor) and is_padding(origin, key, found.first):
            where, expected = "than zeros", f"{PADDING} {origin.tensor.name}"
        subject = f"{trace.folder.names[key[0]]}: {key[1]}"
        said = f"{format_count(found.count, 'other bytes')} {where}, {place}"
        yield Problem("differs", subject, said, expected, CONVERT_AGAIN_HINT)
