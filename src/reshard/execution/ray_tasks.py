"""Runs tasks on a Ray cluster, and collects what they return.

Ray retries a task whose process or node dies, elsewhere if need be. A refusal is no such death: it comes back as a
value, with all of its problems, and the other tasks are cancelled.
"""

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, NamedTuple

from reshard import __version__
from reshard.errors import Problem, Refused
from reshard.execution.ray_connection import load_ray, open_connection
from reshard.execution.ray_progress import TaskBoard, TaskPlace, TasksTold, TaskSum, TaskTeller
from reshard.storage.remote_store import tell
from reshard.types import Progress

RETRIES = 3
"""So often Ray begins a task again whose process or node has died."""

LOOK_SECONDS = 0.5
"""Between two looks at the tasks."""

BEGIN_SECONDS = 5.0
"""So long a task waits until the actor knows that it has begun, which is told if it dies at once."""

IDLE_SECONDS = 15.0
"""After so long with fewer tasks than run at once, somebody is told."""

CANCEL_SECONDS = 8.0
"""So long cancelled tasks may take to end, before they are killed: one that waits for a disk hears nothing."""


class TaskResult(NamedTuple):
    """What a task has returned, and where it ran."""

    value: Any
    """None if it was refused."""
    problems: tuple[Problem, ...]
    node: str
    """The name and the address of the machine."""
    node_id: str
    process: int


@dataclass(frozen=True, slots=True)
class RayCluster:
    """A Ray cluster that this process is connected to."""

    processors: int
    nodes: int

    def run(
        self,
        call: Callable[..., Any],
        tasks: Sequence[Mapping[str, Any]],
        progress: Progress | None = None,
        sizes: Sequence[int] = (),
    ) -> list[TaskResult]:
        """Calls a function of a module in a task for each of the arguments, with `progress` added to them. Returns the
        results in the order of the tasks, which should be small: they go through this process.

        `sizes` has the bytes of each task, as far as they are known before it tells. Raises Refused with the problems
        of all tasks; the others are cancelled then, as they are by an interrupt.
        """
        ray = load_ray()
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(find_own_node(ray), soft=True)
        board = ray.remote(num_cpus=0, max_restarts=-1)(TaskBoard).options(scheduling_strategy=here)
        board = board.remote(is_actor_restarted)
        start = ray.remote(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")(run_task)
        references = [start.remote(call, dict(task), number, board, __version__) for number, task in enumerate(tasks)]
        watch = TaskWatch(ray, board, TaskSum(progress, sizes, len(tasks)), min(len(tasks), max(1, self.processors)))
        try:
            return self._collect(ray, references, watch)
        finally:
            cancel_tasks(ray, references)
            ray.kill(board)

    def _collect(self, ray: Any, references: Sequence[Any], watch: "TaskWatch") -> list[TaskResult]:
        """Collects the results of tasks. Raises Refused with all problems that came before the tasks ended."""
        results = dict[Any, TaskResult]()
        while left := [reference for reference in references if reference not in results]:
            ready, waiting = ray.wait(left, num_returns=len(left), timeout=LOOK_SECONDS)
            watch.look(len(references))
            results |= {one: self._get_result(ray, one, watch.find(references.index(one))) for one in ready}
            for one in waiting:
                if len(begun := watch.told.begun.get(references.index(one), [])) > RETRIES + 1:
                    results[one] = TaskResult(None, (explain_death("MemoryMonitor", begun[-1]),), *begun[-1])
            if any(result.problems for result in results.values()):
                cancel_tasks(ray, references)
                ready, _ = ray.wait(list(references), num_returns=len(references), timeout=0)
                results |= {
                    one: self._get_result(ray, one, watch.find(references.index(one)), is_cancelled=True)
                    for one in ready
                    if one not in results
                }
                raise Refused(problem for one in references if one in results for problem in results[one].problems)
        watch.total.finish()
        return [results[reference] for reference in references]

    def _get_result(self, ray: Any, reference: Any, where: TaskPlace, *, is_cancelled: bool = False) -> TaskResult:
        """The result of a task that has ended; that of one which died is a problem."""
        try:
            result: TaskResult = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if is_cancelled:
                return TaskResult(None, (), *where)
            if "failed to import" not in str(error) and "ModuleNotFoundError" not in str(error):
                raise
            return TaskResult(None, (explain_missing(str(error)),), *where)
        except ray.exceptions.RayError as error:
            return TaskResult(None, () if is_cancelled else (explain_death(type(error).__name__, where),), *where)
        if self.nodes > 1:  # else there is no doubt where it was
            on = f"; on {result.node}"
            problems = tuple(replace(problem, found=problem.found + on) for problem in result.problems)
            return result._replace(problems=problems)
        return result


@dataclass
class TaskWatch:
    """Looks at the board of the tasks, and tells a person what is to be known."""

    ray: Any
    board: Any
    total: TaskSum
    at_once: int
    """So many tasks run at once on a cluster that is free."""
    told: TasksTold = field(default_factory=lambda: TasksTold({}, {}))
    started: float = field(default_factory=monotonic)

    def look(self, tasks: int) -> None:
        """Looks at the board. If that has died, what it knew before still counts."""
        with suppress(self.ray.exceptions.RayError):
            told: TasksTold = self.ray.get(self.board.read.remote(), timeout=LOOK_SECONDS)
            before, self.told = self.told, self.told.add(told)
            for number, places in self.told.begun.items():
                if len(places) > max(1, len(before.begun.get(number, ()))):
                    tell(
                        f"task {number + 1} of {tasks} is begun again, on {places[-1].node}: its process or node has "
                        f"died, as Ray ends processes where memory is short (try {len(places)} of {RETRIES + 1})"
                    )
            self.total.update(self.told.news)
        if monotonic() - self.started > IDLE_SECONDS:
            self.started = float("inf")
            if len(self.told.begun) < self.at_once:
                begun = f"{len(self.told.begun)} of {tasks} tasks have begun"
                tell(f"{begun}: Ray waits for free processors; `ray status` shows them")

    def find(self, number: int) -> TaskPlace:
        """Where a task was begun last."""
        return self.told.begun.get(number, [TaskPlace("a node of the cluster", "", 0)])[-1]


@contextmanager
def connect_to_ray(address: str | None) -> Iterator[RayCluster]:
    """Connects to a cluster as `open_connection` does. Raises Refused."""
    with open_connection(address) as ray:
        nodes = sum(node["Alive"] for node in ray.nodes())
        yield RayCluster(int(ray.cluster_resources().get("CPU", 0)), nodes)


def is_actor_restarted() -> bool:
    """Whether this process, of an actor, was begun in the place of one that has died."""
    return bool(load_ray().get_runtime_context().was_current_actor_reconstructed)


def find_own_node(ray: Any) -> str:
    """The node that this process is connected to."""
    return str(ray.get_runtime_context().get_node_id())


def cancel_tasks(ray: Any, references: Sequence[Any]) -> None:
    """Cancels the tasks that have not ended, and waits for them: they end their files well. Who does not end is killed:
    nobody must write any more when the caller is told.
    """
    _, left = ray.wait(list(references), num_returns=len(references), timeout=0)
    if left:
        tell(f"{len(left)} of {len(references)} tasks are being ended")
    for is_forced in (False, True):
        for reference in left:
            ray.cancel(reference, force=is_forced)
        if left:
            _, left = ray.wait(left, num_returns=len(left), timeout=CANCEL_SECONDS)


def run_task(
    call: Callable[..., Any], arguments: Mapping[str, Any], number: int, board: Any, version: str
) -> TaskResult:
    """Runs a task, in a process of the cluster. A refusal is returned, not raised: Ray would wrap it."""
    ray = load_ray()
    where = TaskPlace(name_node(ray), find_own_node(ray), os.getpid())
    ray.wait([board.begin.remote(number, where)], timeout=BEGIN_SECONDS)  # no `get`: a dead actor is no error
    if version != __version__:
        remedy = "the same version of reshard on every node"
        problem = Problem("another-version", "reshard", __version__, f"{version}, as on the driver", remedy)
        return TaskResult(None, (problem,), *where)
    try:
        value = call(**arguments, progress=TaskTeller(ray, board, number))
    except Refused as refused:
        return TaskResult(None, refused.problems, *where)
    except OSError as error:
        subject, found = str(error.filename or ""), str(error.strerror or error)
        return TaskResult(None, (Problem("system-error", subject, found, "no error of the system"),), *where)
    return TaskResult(value, (), *where)


def name_node(ray: Any) -> str:
    """Names the machine that this process runs on, for a person."""
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


def explain_missing(text: str) -> Problem:
    """Explains a node that cannot import what it is to run."""
    lacking = next((line.strip() for line in reversed(text.splitlines()) if "No module" in line), "cannot be imported")
    remedy = f"pip install reshard=={__version__} on every node, or in the runtime environment of the job"
    return Problem("missing-package", "reshard", lacking[:200], f"reshard {__version__} on every node", remedy)


def explain_death(kind: str, where: TaskPlace) -> Problem:
    """Explains a task that died as often as it may be begun; or that somebody else has cancelled."""
    tries = f"died, as often as it is tried ({kind})" if "Cancel" not in kind else "was cancelled by somebody else"
    subject = f"process {where.process} on {where.node}" if where.process else where.node
    remedy = (
        "the same command goes on from what is written; if memory was short: fewer --jobs, or a smaller --max-memory"
    )
    return Problem("worker-died", subject, tries, "a task that ends", f"{remedy}; Ray's logs on that node tell more")
