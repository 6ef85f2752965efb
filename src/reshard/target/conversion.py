"""A finished conversion, and its summary for a person."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reshard.execution.execute import RunResult
from reshard.formats.manifest import list_subset_lines
from reshard.formats.share_names import find_share_of_folder
from reshard.formats.target_names import MANIFEST
from reshard.paths import AnyPath
from reshard.planning.plan import Plan, describe_casts, describe_dropped, describe_notes
from reshard.recipes.recipe import has_ranks
from reshard.target.manifest_writer import describe_lost
from reshard.target.run_config import explain_no_run_config
from reshard.text import escape, format_count, format_size
from reshard.types import RANKS, SLICED


class ShareRun(NamedTuple):
    """How one of several processes has made its share of a conversion."""

    share: str
    """Such as `1/4`."""
    files: int
    """Those that this run has written."""
    node: str
    process: int
    seconds: float
    resumed: int
    """In bytes."""
    inexact: int
    """The number of values that casts have rounded."""
    jobs: int
    ways: tuple[str, str]
    """Of reading and of writing."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """A finished conversion."""

    target: AnyPath
    plan: Plan
    """Of the files that this run has written."""
    done: RunResult | None
    """How the run went; None if the target was finished already."""
    mended: Sequence[str]
    """The side files that a finished target had lost, and that were written again."""
    seconds: float
    shares: Sequence[ShareRun] = ()
    """Those that the processes of a cluster have made."""

    def __str__(self) -> str:
        return "\n".join(map(escape, describe_conversion(self)))

    __repr__ = __str__


def describe_conversion(conversion: Conversion, jobs: int | None = None) -> Iterator[str]:
    """The summary of a conversion, for a person: also everything that the target lacks. `jobs` were asked for."""
    plan, done, target = conversion.plan, conversion.done, conversion.target
    share = find_share_of_folder(target)
    if conversion.mended:
        yield f"{target}: converted already; written again: {', '.join(conversion.mended)}"
    elif done is None and share and not (target / MANIFEST).is_file():
        whole = str(target).rpartition("/")[0]
        yield f"{whole}: share {share} has no file left to write; its folder was not made"
    elif done is None:
        yield f"{target}: converted already; nothing was written"
    elif not plan.files:
        yield f"{target}: the parts that were made apart are joined; no rank file was written"
    else:
        size = f"{plan.size:,} bytes ({format_size(plan.size)})"
        is_of_ranks = plan.layout.to == SLICED or (plan.layout.to == RANKS and has_ranks(plan.recipe))
        kind = "rank files" if is_of_ranks else "files"
        yield f"{target}: {format_count(len(plan.files), kind)}, {size} in {conversion.seconds:.1f} s"
        yield from describe_shares_made(conversion.shares)
        yield from describe_run(done, jobs if not conversion.shares else None)
    yield from list_subset_lines(plan.source.subset)
    yield from describe_notes(plan.notes)
    yield from describe_casts(plan)
    yield from describe_dropped(plan)
    yield from explain_no_run_config(plan)
    yield from describe_lost(plan)


def describe_shares_made(shares: Sequence[ShareRun]) -> Iterator[str]:
    """Describes how many shares were made on how many nodes; nothing where one process has made all."""
    if shares:
        nodes, longest = {one.node for one in shares}, max(one.seconds for one in shares)
        where = f"{format_count(len(shares), 'shares')} on {format_count(len(nodes), 'nodes')}"
        yield f"{where}, at most {longest:.1f} s each"


def describe_run(done: RunResult, jobs: int | None) -> Iterator[str]:
    """Describes how a run went: bytes resumed, threads, ways through the page cache, values rounded."""
    if done.resumed:
        yield f"resumed: {done.resumed:,} bytes had been written before"
    used = format_count(done.jobs, "jobs")
    if jobs is not None and done.jobs < jobs:
        used = f"{done.jobs} of {format_count(jobs, 'jobs')} (--max-memory or the system allows no more)"
    yield f"{used}, read {done.ways.read}, written {done.ways.write}"
    if done.inexact:
        yield f"rounded: {format_count(done.inexact, 'values')} that the new dtype does not have"
