"""One conversion by the tasks of a Ray cluster: a share each, joined at the end by the process that asked for it.

The job is shipped, not its plan: that of a large model has 34 MB. Each task plans for itself, and the fingerprints are
compared.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from reshard.errors import Problem, Refused, refuse, require_none
from reshard.execution.execute import Settings
from reshard.execution.finished_files import remove_finished_files
from reshard.execution.journal import open_journal
from reshard.execution.ray_connection import parse_ray
from reshard.execution.ray_progress import TaskTeller
from reshard.execution.ray_tasks import TaskResult, connect_to_ray
from reshard.execution.times import (
    COPYING,
    FINISHING,
    PREPARING,
    ActivityClock,
    RunResult,
    Stages,
    add_thread_seconds,
)
from reshard.formats.manifest import list_rank_files, read_manifest
from reshard.formats.remote_names import is_address, make_full_location
from reshard.formats.share_names import list_share_folders, name_share_folder
from reshard.formats.target_names import JOURNAL, MANIFEST, list_names
from reshard.paths import AnyPath
from reshard.planning.plan import Plan
from reshard.planning.shares import find_share_of_files
from reshard.recipes.recipe import make_full_recipe
from reshard.storage.counting import ProgressView, WorkCounter, WorkState
from reshard.storage.local import CACHED, Ways
from reshard.target.conversion import Conversion, ShareRun
from reshard.target.manifest_writer import identify_conversion
from reshard.target.places import TargetPlace, open_target
from reshard.target.preflight import look_at_target
from reshard.target.side_files import FoundFiles
from reshard.target.state import TargetState
from reshard.target.writing import write_target
from reshard.text import format_list, make_path
from reshard.types import Progress, Share, Subset

WAIT_SECONDS = 60.0
"""So long a share waits for one before it to end, whose process may be dying; and the join for a network file system to
show what others have written there.
"""

SHARED = "a folder that every node sees: on a shared file system, or in a store"


def check_on(on: str | None, share: object) -> Iterator[Problem]:
    """Reports a value of `--on` that is none, and one beside `--share`. Raises Refused."""
    if on is not None:
        parse_ray(on)
        if share is not None:
            yield Problem("wrong-option", "--on", f"{on}, with --share", "one of them: --on makes all shares", "")


def pack_arguments(
    given: Mapping[str, Any], mp: int | None, ranks: Sequence[int] | None, subset: Subset
) -> dict[str, Any]:
    """Packs the arguments of a conversion for another machine: full paths as text, and no iterator."""
    left_out = ("on", "share", "progress")
    paths = {name: make_full_location(given[name]) or None for name in ("source", "target", "config", "tokenizer_path")}
    recipe = make_full_recipe(given["recipe"])
    chosen = {"layers": subset.layers, "experts": subset.experts, "only": subset.only}
    packed = {name: value for name, value in given.items() if name not in left_out}
    return {**packed, **paths, **chosen, "mp": mp, "ranks": ranks, "recipe": recipe}


def make_share(
    convert: Callable[..., Conversion], arguments: Mapping[str, Any], share: Share, progress: TaskTeller
) -> ShareRun:
    """Makes a share, in a task. What lay there is thrown away by the first process of a task only: those after it go
    on. Raises Refused.
    """
    started, target = monotonic(), make_path(arguments["target"])
    ways = {"restart": False, "yes": False} if arguments["restart"] and progress.has_begun() else {}
    if not is_address(target) and name_share_folder(share) not in list_names(target):
        found = f"no {name_share_folder(share)}, which the driver has made"
        raise refuse("not-shared", str(target), found, SHARED, "another target")
    while True:
        try:
            done = convert(**{**arguments, **ways}, share=share, progress=progress)
            break
        except Refused as refused:
            is_held = {problem.kind for problem in refused.problems} == {"target-in-use"}
            if not is_held or monotonic() - started > WAIT_SECONDS:
                raise
            sleep(1)
    run = done.done or RunResult(0, CACHED, 0, 0)
    files, seconds = len(done.plan.files), monotonic() - started
    ways_used = run.ways.read, run.ways.write
    return ShareRun(
        str(share), files, "", 0, seconds, run.resumed, run.inexact, run.jobs, ways_used, run.stages, run.threads
    )


class HeldProgress(ProgressView):
    """Tells a Progress of the shares; the whole is reached when they are joined, not before."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._state = WorkState(0, 0)

    def show(self, state: WorkState) -> None:
        """Receives how far the shares are."""
        self._state = state
        self._tell(max(0, min(state.done, state.total - 1)))

    def finish(self) -> None:
        """Says that all is done."""
        self._tell(self._state.total)

    def _tell(self, done: int) -> None:
        if isinstance(self._progress, ProgressView):
            self._progress.show(self._state._replace(done=done))
        elif self._progress:
            self._progress(done, self._state.total)


def convert_on_ray(
    on: str,
    convert: Callable[..., Conversion],
    arguments: Mapping[str, Any],
    whole: Plan,
    state: TargetState,
    tokenizer: AnyPath | None,
    beside: FoundFiles,
    progress: Progress | None,
) -> tuple[Plan, RunResult, list[ShareRun]]:
    """Makes the shares of a plan, the `whole`, and joins them. `state` is what its target has. Returns the plan of the
    files that were made. Raises Refused.
    """
    held, stages = HeldProgress(progress), ActivityClock(len(Stages._fields), PREPARING)
    with connect_to_ray(parse_ray(on)) as cluster:
        if arguments["restart"]:
            throw_away(state)
        count = choose_count(state, len(whole.files), cluster.processors)
        shares = [Share(number, count, identify_conversion(whole, state.samples)) for number in range(count)]
        numbers = find_share_of_files(whole, count)
        sizes = [sum(file.size for file in whole.files if numbers[file.name] == number) for number in range(count)]
        with lay_folders(state.place, shares):
            tasks = [{"convert": convert, "arguments": arguments, "share": share} for share in shares]
            stages.begin(COPYING)
            with explain_lost_folders(state.place, shares):
                results = cluster.run(make_share, tasks, held, sizes)
            stages.begin(FINISHING)
            if isinstance(state.place, Path):
                require_seen(state.place, shares, results)
            joined = look_at_target(whole, open_target(arguments["target"]), tokenizer, beside)
            if joined.plan.files or joined.must_be_joined:
                with refuse_unwritten_target():
                    write_target(joined, WorkCounter(None, joined.size, writes=True), Settings())
    held.finish()
    runs = [result.value._replace(node=result.node, process=result.process) for result in results]
    jobs = sum(run.jobs for run in runs)
    ways = next((run.ways for run in runs if run.files), (CACHED.read, CACHED.write))
    threads, used = add_thread_seconds(run.threads for run in runs), Stages(*stages.read())
    resumed, inexact = sum(run.resumed for run in runs), sum(run.inexact for run in runs)
    done = RunResult(jobs, Ways(*ways), resumed, inexact, used, threads)
    # What `--restart` throws away is made too, finished shares as well.
    return replace(whole if arguments["restart"] else state.plan, notes=state.plan.notes), done, runs


def choose_count(state: TargetState, files: int, processors: int) -> int:
    """Chooses the number of shares: that of shares which have begun, so that the same command goes on with them on
    another cluster; else as many as run at once. A share has whole files: more shares than files would have none.
    """
    begun = [share.shares for share in list_share_folders(state.folder).values()]
    return begun[0] if begun else max(1, min(files, processors))


@contextmanager
def refuse_unwritten_target() -> Iterator[None]:
    """A context in which a target is written. Raises Refused where the system does not let us."""
    try:
        yield
    except OSError as error:
        remedy = "mend it, and run the same command again"
        raise refuse("cannot-write", str(error.filename), str(error.strerror), "to write the target", remedy) from None


@contextmanager
def explain_lost_folders(place: TargetPlace, shares: Sequence[Share]) -> Iterator[None]:
    """A context in which tasks run. Where the folders of shares are gone here too, another run has joined or removed
    them: of a node that misses them nothing is wrong. Raises Refused.
    """
    try:
        yield
    except Refused as refused:
        is_lost = isinstance(place, Path) and any(not (place / name_share_folder(share)).exists() for share in shares)
        if not is_lost or {problem.kind for problem in refused.problems} != {"not-shared"}:
            raise
        found, remedy = "another run has joined or removed these shares", "run the same command again"
        raise refuse("target-changed", str(place), found, "one run at a time", remedy) from None


@contextmanager
def lay_folders(place: TargetPlace, shares: Sequence[Share]) -> Iterator[None]:
    """Makes the folders of shares, for a task to see whether its node has the same file system; removes those that are
    empty in the end, and the target with them. In a store there are none.
    """
    if not isinstance(place, Path):
        yield
        return
    folders = [place / name_share_folder(share) for share in shares]
    is_new = not place.exists()
    try:
        with refuse_unwritten_target():
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in [*folders, *([place] if is_new else [])]:
            with suppress(OSError):  # not empty, or not there any more
                folder.rmdir()


def require_seen(target: Path, shares: Sequence[Share], results: Sequence[TaskResult]) -> None:
    """Raises Refused if shares that are finished on their nodes do not lie in the target of this machine."""
    begun = monotonic()
    while True:
        missing: dict[str, list[str]] = {}
        for share, result in zip(shares, results, strict=True):
            if result.value.files and not read_manifest(target / name_share_folder(share)):
                missing.setdefault(result.node, []).append(str(share))
        if not missing or monotonic() - begun > WAIT_SECONDS:
            break
        sleep(1)
    remedy = f"another target: {SHARED}; or copy what {target} has on each node into one folder, and the command again"
    require_none(
        Problem("not-shared", str(target), f"shares {format_list(names)} are finished on {node} only", SHARED, remedy)
        for node, names in missing.items()
    )


def throw_away(state: TargetState) -> None:
    """Throws away what a run without shares has left in a target, and for `--restart --yes` finished files. Those in
    shares are thrown away by the tasks. Raises Refused.
    """
    if not isinstance(state.place, Path):
        if state.removed or (state.folder / JOURNAL).is_file():
            remedy = "the same command without --on throws it away"
            raise refuse("wrong-option", "--restart", "with --on, for what another run has left in a store", "", remedy)
        return
    if not state.removed and not (state.place / JOURNAL).is_file():
        return
    kept = list_rank_files(state.known) - {file.name for file in state.plan.files}
    with ExitStack() as stack:
        journal = open_journal(stack, state.place, {}, kept | {MANIFEST, *state.sides, *state.same}, restart=True)
        remove_finished_files(state.place, state.removed)
        journal.path.unlink()
