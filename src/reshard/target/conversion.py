"""A finished conversion, and its summary for a person."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reshard.execution.times import RunResult, Stages, ThreadSeconds
from reshard.formats.manifest import list_subset_lines
from reshard.formats.share_names import find_share_of_folder
from reshard.formats.target_names import MANIFEST
from reshard.paths import AnyPath
from reshard.planning.plan import Plan, describe_casts, describe_dropped, describe_notes
from reshard.recipes.recipe import has_ranks
from reshard.storage.page_cache import THROUGH_STORE
from reshard.target.manifest_writer import describe_lost
from reshard.target.run_config import explain_no_run_config
from reshard.text import escape, format_count, format_rate, format_size, round_to_total
from reshard.types import RANKS, SLICED

SHORTEST_TOLD = 0.5
"""In seconds: of a shorter run nobody is told its rate, nor where its time went."""


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
    stages: Stages
    threads: ThreadSeconds


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

    @property
    def planning(self) -> float:
        """How long it took until the run began, in seconds: headers, plan, proofs, a look at the target."""
        return self.seconds - sum(self.done.stages) if self.done else self.seconds

    @property
    def written(self) -> int:
        """What this run has written into the files of its plan, in bytes."""
        return self.plan.size - self.done.resumed if self.done else 0

    @property
    def rate(self) -> float:
        """Of this run, in bytes written a second of its whole time."""
        return self.written / self.seconds if self.seconds else 0.0

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
        rate = f", {format_rate(conversion.rate)}" if conversion.seconds >= SHORTEST_TOLD else ""
        yield f"{target}: {format_count(len(plan.files), kind)}, {size} in {conversion.seconds:.1f} s{rate}"
        yield from describe_shares_made(conversion.shares)
        yield from describe_run(done, jobs if not conversion.shares else None)
        if conversion.seconds >= SHORTEST_TOLD:
            yield from describe_times(conversion, done)
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


def describe_times(conversion: Conversion, done: RunResult) -> Iterator[str]:
    """Describes where the time of a run went: by the clock, and what its threads did while they copied. The parts add
    up to the time that is told, and to 100 %; those that round to nothing are left out.
    """
    tenths = round_to_total([conversion.planning, *done.stages], round(round(conversion.seconds, 1) * 10))
    told = zip(("planning", *Stages._fields), tenths, strict=True)
    yield f"time: {', '.join(f'{part / 10:.1f} s {name}' for name, part in told if part)}"
    words = dict(zip(ThreadSeconds._fields, round_to_total(done.threads, 100), strict=True))
    if done.ways.read == THROUGH_STORE:
        words = {"downloading" if name == "reading" else name: part for name, part in words.items()}
    if done.ways.write == THROUGH_STORE:
        words = {"uploading" if name == "writing" else name: part for name, part in words.items()}
    if any(words.values()):
        yield f"copying: {', '.join(f'{part}% {name}' for name, part in words.items() if part)}"
