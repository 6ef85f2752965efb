"""A comparison of two checkpoints by several processes, perhaps on several machines, each a share of the tensors.

Names, dtypes and shapes are compared here, as by one process; so both reports are the same: each tensor is measured
whole, by one process.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from reshard.execution.ray_shares import RunShares, open_workers
from reshard.formats.remote_names import read_location, require_path
from reshard.formats.share_assignment import assign_to_shares
from reshard.formats.share_fingerprints import (
    compute_fingerprint,
    describe_file,
    require_all_compared,
    require_fingerprint,
)
from reshard.inspection.diff import (
    PairedSides,
    compare_pairs,
    diff_checkpoints,
    diff_paired,
    open_side,
    pair_sides,
    sort_pairs,
)
from reshard.inspection.diff_report import DiffReport
from reshard.inspection.tensor_pairs import DiffChoice, TensorPair, get_result
from reshard.inspection.value_distance import RangeDistance
from reshard.paths import AnyPath
from reshard.recipes.recipe import make_full_recipe
from reshard.types import Progress, Share


class DiffJob(NamedTuple):
    """What to compare. Sent to other processes, all paths are full ones, or addresses."""

    a: str
    b: str
    config: str
    """Empty without."""
    choice: DiffChoice
    """It is sent without a config: an opened store is no text."""


def diff_on(job: DiffJob, a: AnyPath, b: AnyPath, on: str | None, progress: Progress | None) -> DiffReport:
    """Compares two checkpoints, in this process or on the workers that `on` names. Raises Refused."""
    if on is None:
        return diff_checkpoints(a, b, job.choice, progress)
    return diff_in_shares(job, a, b, open_workers(on, progress))


def diff_in_shares(job: DiffJob, a: AnyPath, b: AnyPath, run: RunShares) -> DiffReport:
    """Compares two checkpoints, the bytes in shares. Raises Refused."""
    sent = job._replace(choice=replace(job.choice, recipe=make_full_recipe(job.choice.recipe), config=None))
    return diff_paired(a, b, job.choice, None, partial(compare_pairs_in_shares, sent, run))


def compare_pairs_in_shares(
    job: DiffJob, run: RunShares, paired: PairedSides, _: Progress | None
) -> Mapping[str, RangeDistance]:
    """Compares all pairs. Raises Refused, also if a file changes meanwhile."""
    with ExitStack() as stack:
        for side in paired.sides:  # they are looked at again when all have ended
            open_side(stack, side, paired.size)
        found = run(compare_pairs_of_share, job, identify_pairs(paired), len(paired.pairing.pairs))
    merged = {name: measures for one in found for name, measures in one.items()}
    require_all_compared(len(merged), len({pair.name for pair in paired.pairing.pairs}), "tensors")
    return merged


def compare_pairs_of_share(job: DiffJob, share: Share, progress: Progress | None = None) -> dict[str, RangeDistance]:
    """Compares the pairs of a share, in a process of its own. Returns the measures of each. Raises Refused, also if
    they are not those of the others.
    """
    choice = replace(job.choice, config=read_location(job.config or None))
    paired = pair_sides(require_path(job.a), require_path(job.b), choice)
    require_fingerprint(share, identify_pairs(paired))
    pairs = sort_pairs(paired.pairing.pairs)
    own = assign_to_shares(list(map(measure_pair, pairs)), share.shares)[share.number]
    chosen = replace(paired.pairing, pairs=tuple(pairs[number] for number in own))
    return compare_pairs(paired._replace(pairing=chosen), progress)


def measure_pair(pair: TensorPair) -> int:
    """The bytes of both sides of a pair."""
    return get_result(pair.a).size + get_result(pair.b).size


def identify_pairs(paired: PairedSides) -> str:
    """Computes the fingerprint of a comparison: equal where the files of both sides are, and what is compared of them,
    on any machine.
    """
    pairs = [[pair.name, pair.dtype, measure_pair(pair)] for pair in paired.pairing.pairs]
    sides = [
        [
            side.recipe,
            *(
                [file.name, file.header_hash, *describe_file(side.checkpoint.folder / file.name)]
                for file in side.checkpoint.files
            ),
        ]
        for side in paired.sides
    ]
    return compute_fingerprint([sides, pairs])
