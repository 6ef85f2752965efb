"""The next steps with a finished target: ranks are copied to another node and verified there, the engine is started,
slices are loaded.
"""

import shlex
from collections.abc import Collection, Iterator, Sequence
from glob import escape as escape_pattern
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from reshard.execution.staging import STAGING
from reshard.formats.huggingface import SUFFIX
from reshard.formats.remote_names import find_bucket_download
from reshard.formats.slice_names import name_slices
from reshard.formats.target_names import JOURNAL, LOCK, PARTIAL, list_names
from reshard.paths import AnyPath, RemotePath
from reshard.planning.plan import Plan
from reshard.recipe_types import Recipe
from reshard.target.engines import count_ranks_per_node, list_slice_loads, make_rank_start, make_whole_start
from reshard.text import format_numbers
from reshard.types import RANKS, SLICED, WHOLE


class NextStep(NamedTuple):
    """One thing to do next."""

    does: str
    """A stable word for machines: `verify`, `join`, `copy`, `verify-copy`, `start` or `load`."""
    text: str
    """What it is, for a person."""
    command: str
    """For a shell, with full paths; of `load` a line of Python. NODE, $RANK, $ADDR and `state` in it are to be filled
    in."""


def list_next_steps(plan: Plan, target: AnyPath) -> Iterator[NextStep]:
    """Lists what is to be done with a target after it was verified. With chosen tensors (`--only`) nothing: they are no
    model.
    """
    if "only" in plan.source.subset:
        return
    if isinstance(target, RemotePath):
        yield from list_download_steps(plan, target)
        return
    folder, names = target.absolute(), list_names(target)
    if plan.layout.to == RANKS:
        yield from list_rank_steps(plan, folder, names)
    elif plan.layout.to == WHOLE and (start := make_whole_start(plan, folder, names)):
        yield NextStep("start", *start)
    elif plan.layout.to == SLICED and {*name_slices(plan.layout.ranks)} <= {*names}:
        yield from (NextStep("load", *load) for load in list_slice_loads(plan, folder, names))


def list_rank_steps(plan: Plan, folder: Path, names: Sequence[str]) -> Iterator[NextStep]:
    """Lists the starts of rank files: on one node, or after some ranks were copied, on several. A start is listed where
    all ranks of one of its nodes lie.
    """
    ranks = plan.layout.ranks
    there = {rank for rank in range(ranks) if plan.recipe.files.format(rank=rank, ranks=ranks) in names}
    own = count_ranks_per_node(ranks)
    is_small = own == ranks
    start = make_rank_start(plan, folder, names, own) if has_node(there, own, ranks) else None
    if start and is_small:
        yield NextStep("start", *start)
    if len(there) == ranks > 1:
        yield from list_copy_steps(plan.recipe, ranks, folder, "or copy" if start and is_small else "copy")
    if is_small:
        is_halved = ranks % 2 == 0 and has_node(there, ranks // 2, ranks)
        start = make_rank_start(plan, folder, names, ranks // 2) if is_halved else None
    if start:
        yield NextStep("start", *start)


def has_node(there: Collection[int], own: int, ranks: int) -> bool:
    """Whether all ranks of a node are there, if each node has `own` ranks."""
    return any({*range(first, first + own)} <= {*there} for first in range(0, ranks, own))


def list_copy_steps(recipe: Recipe, ranks: int, folder: Path, verb: str) -> Iterator[NextStep]:
    """Lists how the ranks of a second node are copied to it, and verified there."""
    own = count_ranks_per_node(ranks)
    chosen = range(own, 2 * own) if own < ranks else range((ranks + 1) // 2, ranks)
    text = format_numbers(chosen)
    # Older versions of rsync let the shell of the other node take a path apart, unless -s is given.
    options = "-a" if shlex.quote(str(folder)) == str(folder) else "-as"
    includes = [f"--include=/{pattern}" for pattern in make_rank_patterns(recipe, ranks, chosen)]
    excludes = [f"--exclude={name}" for name in (f"*{SUFFIX}", f"*{PARTIAL}", JOURNAL, LOCK, STAGING)]
    words = ["rsync", options, *includes, *excludes, f"{folder}/", f"NODE:{folder}/"]
    many = "ranks" if len(chosen) > 1 else "rank"
    yield NextStep("copy", f"{verb} {many} {text} to another node", shlex.join(words))
    yield NextStep("verify-copy", "verify there", shlex.join(["reshard", "verify", str(folder), "--ranks", text]))


def list_download_steps(plan: Plan, target: RemotePath) -> Iterator[NextStep]:
    """Lists how a target in a store comes to the disk of a node, and is verified there: of rank files, those of one
    node. Nothing while some are not there yet, or where no program is known.
    """
    scheme, _, rest = str(target).partition("://")
    download, ranks = find_bucket_download(scheme, rest), plan.layout.ranks
    is_of_ranks = plan.layout.to == RANKS
    files = {plan.recipe.files.format(rank=rank, ranks=ranks) for rank in range(ranks)} if is_of_ranks else set()
    if not download or not files <= {*list_names(target)}:
        return
    words, check, text = download.words, ["reshard", "verify", download.folder], "copy to a disk"
    own = count_ranks_per_node(ranks)
    if is_of_ranks and own < ranks and scheme == "s3":
        includes = make_rank_patterns(plan.recipe, ranks, range(own))
        words = [*words, "--exclude", f"*{SUFFIX}", *(word for one in includes for word in ("--include", one))]
        check += ["--ranks", format_numbers(range(own))]
        text = f"copy ranks {format_numbers(range(own))} to a node"
    yield NextStep("copy", text, shlex.join(words))
    yield NextStep("verify-copy", "verify there", shlex.join(check))


def make_rank_patterns(recipe: Recipe, ranks: int, chosen: Sequence[int]) -> list[str]:
    """Makes the fewest patterns, as a shell and rsync have them, that only the files of the chosen ranks match. The
    ranks are consecutive.
    """
    patterns = []
    for tens, group in groupby(chosen, lambda rank: rank // 10):
        digits = [rank % 10 for rank in group]
        last = f"[{digits[0]}-{digits[-1]}]" if len(digits) > 1 else str(digits[0])
        # {rank} is filled in after the rest is escaped, for it is the one part that is a pattern.
        name = escape_pattern(recipe.files.format(rank="\0", ranks=ranks))
        patterns.append(name.replace("\0", f"{tens or ''}{last}"))
    return patterns
