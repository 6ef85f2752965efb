"""Shares of a verification: what each of several processes compares, perhaps on several machines, and all it found.

Each process looks at source and target for itself, as if it were alone, but compares only its part of the bytes. What
is found is added up, and explained by one that has looked at them too. So nothing depends on how many there are.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from reshard.formats.share_assignment import assign_to_shares
from reshard.formats.share_fingerprints import (
    compute_fingerprint,
    describe_file,
    require_all_compared,
    require_fingerprint,
)
from reshard.paths import AnyPath
from reshard.storage.counting import count_progress
from reshard.types import Progress, Share
from reshard.verification.checked_ranges import ChangedRanges, compare_files
from reshard.verification.checksums import Audit
from reshard.verification.chunks import KeptTensor
from reshard.verification.compare import (
    Compared,
    Comparison,
    compare_parts,
    get_source_position,
    list_parts,
    list_source_tensors,
)
from reshard.verification.manifest_files import ManifestFile
from reshard.verification.unpacked_weights import UnpackedWeight
from reshard.verification.verify import TracedTarget


def compare_traced_share(
    traced: TracedTarget, share: Share, sample: Fraction | None, progress: Progress | None
) -> Comparison:
    """Compares the source tensors of a share, and the casts of them, with all parts of them in the target. Raises
    Refused, also if this is not what the others compare.
    """
    require_fingerprint(share, identify_traced(traced))
    things = sorted(traced.things, key=get_source_position)
    own = assign_to_shares([measure_source(thing) + measure_target_parts(thing) for thing in things], share.shares)
    chosen = [things[number] for number in own[share.number]]
    with count_progress(progress, sum(map(measure_target_parts, chosen))) as advance:
        return compare_parts(chosen, traced.source, traced.target, advance, sample)


def merge_comparisons(traced: TracedTarget, found: Iterable[Comparison], sample: Fraction | None) -> Comparison:
    """Merges what several processes have compared to what one would have found. Raises Refused if that is not all."""
    whole = Comparison()
    for one in found:
        whole.size += one.size
        whole.inexact += one.inexact
        for key, other in one.differences.items():
            known = whole.differences.setdefault(key, other)
            if known is not other:  # two source tensors are parts of one tensor of the target
                known.count += other.count
                known.first, known.last = min(known.first, other.first), max(known.last, other.last)
    if sample is None:
        require_all_compared(whole.size, sum(map(measure_target_parts, traced.things)), "bytes")
    return whole


def compare_audited_share(
    audit: Audit[Any], share: Share, sample: Fraction | None, progress: Progress | None
) -> tuple[ChangedRanges, int]:
    """Compares the byte ranges of a share with the checksums of the manifest. Raises Refused, also if this is not what
    the others compare.
    """
    require_fingerprint(share, identify_entries(audit.target, audit.full))
    return compare_files(audit.target, audit.full, progress, sample, share)


def merge_changed_ranges(
    entries: Sequence[ManifestFile], found: Sequence[tuple[ChangedRanges, int]], sample: Fraction | None
) -> tuple[ChangedRanges, int]:
    """Merges what several processes have compared with checksums to what one would have found. Raises Refused if that
    is not all.
    """
    merged = {entry.name: sorted(checked for wrong, _ in found for checked in wrong[entry.name]) for entry in entries}
    compared = sum(size for _, size in found)
    if sample is None:
        require_all_compared(compared, sum(checked.size for entry in entries for checked in entry.ranges), "bytes")
    return merged, compared


def measure_source(thing: Compared) -> int:
    """The bytes of the source that are read for a thing; none if the target has nothing of it."""
    return sum(tensor.size for tensor in list_source_tensors(thing)) if list_parts(thing) else 0


def measure_target_parts(thing: Compared) -> int:
    """The bytes of the target that are compared with a thing."""
    return sum(len(part.rows) * len(part.columns) for part in list_parts(thing))


def identify_traced(traced: TracedTarget) -> str:
    """Computes the fingerprint of a comparison: equal where the files of both sides are, and what is compared of them,
    on any machine.
    """
    names = [list_identity(thing) for thing in traced.things]
    sizes = [[measure_source(thing), measure_target_parts(thing)] for thing in traced.things]
    sides = [
        [
            [number, file.name, file.header_hash, *describe_file(side.folder / file.name)]
            for number, file in side.files.items()
        ]
        for side in (traced.source, traced.target)
    ]
    return compute_fingerprint([sides, names, sizes])


def list_identity(thing: Compared) -> list[str]:
    """Lists what tells a thing from the others: the name of its tensor, and what is made of it."""
    if isinstance(thing, KeptTensor):
        return [thing.tensor.name]
    if isinstance(thing, UnpackedWeight):
        return [thing.packed.result.name, thing.packed.packing]
    return [thing.weight.name, thing.conversion]


def identify_entries(folder: AnyPath, entries: Sequence[ManifestFile]) -> str:
    """Computes the fingerprint of files that are compared with their checksums. Raises Refused."""
    return compute_fingerprint([[entry.name, *describe_file(folder / entry.name), entry.ranges] for entry in entries])
