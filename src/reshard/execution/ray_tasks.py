"""Runs tasks on a Ray cluster, and collects what they return; Ray is needed, and imported, only here.

Ray retries a task whose process or node dies, elsewhere if need be. A refusal is no such death: it comes back as a
value, with all of its problems, and the other tasks are cancelled.
"""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, NamedTuple

from reshard import __version__
from reshard.errors import Problem, Refused, refuse
from reshard.execution.ray_progress import TaskBoard, TaskNews, TaskSum, TaskTeller
from reshard.storage.remote_store import LISTENERS
from reshard.types import Progress

RAY = "ray"

RETRIES = 3
"""So often Ray begins a task again whose process or node has died."""

LOOK_SECONDS = 0.5
"""Between two looks at the tasks."""

ANSWER_SECONDS = 10.0
"""So long the port of a head node may take to answer."""

TRIES = "RAY_NUM_REDIS_GET_RETRIES"
"""So often Ray tries to reach a head node where something else listens: by default for a quarter of an hour."""

IDLE_SECONDS = 15.0
"""After so long without a task that has begun, somebody is told."""

CANCEL_SECONDS = 30.0
"""So long cancelled tasks may take to end."""


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
        board = ray.remote(num_cpus=0)(TaskBoard).options(scheduling_strategy=here).remote()
        start = ray.remote(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")(run_task)
        references = [start.remote(call, dict(task), number, board, __version__) for number, task in enumerate(tasks)]
        total = TaskSum(progress, sizes, min(len(tasks), max(1, self.processors)))
        try:
            return self._collect(ray, references, board, total)
        finally:
            cancel_tasks(ray, references)
            ray.kill(board)

    def _collect(self, ray: Any, references: Sequence[Any], board: Any, total: TaskSum) -> list[TaskResult]:
        """Collects the results of tasks. Raises Refused with all problems that came before the tasks ended."""
        results, news, started = dict[Any, TaskResult](), dict[int, TaskNews](), monotonic()
        while left := [reference for reference in references if reference not in results]:
            ready, _ = ray.wait(left, num_returns=len(left), timeout=LOOK_SECONDS)
            with suppress(ray.exceptions.RayError):  # only a bar depends on it
                news = ray.get(board.read.remote(), timeout=LOOK_SECONDS)
                total.update(news)
            results |= {one: self._get_result(ray, one, news.get(references.index(one))) for one in ready}
            if any(result.problems for result in results.values()):
                cancel_tasks(ray, references)
                ready, _ = ray.wait(list(references), num_returns=len(references), timeout=0)
                results |= {
                    one: self._get_result(ray, one, news.get(references.index(one)), is_cancelled=True)
                    for one in ready
                    if one not in results
                }
                raise Refused(problem for one in references if one in results for problem in results[one].problems)
            if not news and not results and monotonic() - started > IDLE_SECONDS:
                started = float("inf")
                tell_listeners("no task has begun: Ray waits for a free processor; `ray status` shows them")
        total.finish()
        return [results[reference] for reference in references]

    def _get_result(self, ray: Any, reference: Any, news: TaskNews | None, *, is_cancelled: bool = False) -> TaskResult:
        """The result of a task that has ended; that of one which died is a problem."""
        where = news or TaskNews(0, 0, "a node of the cluster", "", 0)
        try:
            result: TaskResult = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if is_cancelled:
                return TaskResult(None, (), *where[2:5])
            if "failed to import" not in str(error) and "ModuleNotFoundError" not in str(error):
                raise
            return TaskResult(None, (explain_missing(str(error)),), *where[2:5])
        except ray.exceptions.RayError as error:
            return TaskResult(None, () if is_cancelled else (explain_death(error, where),), *where[2:5])
        if self.nodes > 1:  # else there is no doubt where it was
            on = f"; on {result.node}"
            problems = tuple(replace(problem, found=problem.found + on) for problem in result.problems)
            return result._replace(problems=problems)
        return result


def run_on_ray(
    call: Callable[..., Any], tasks: Sequence[Mapping[str, Any]], address: str | None, progress: Progress | None
) -> list[Any]:
    """Connects to a cluster by its address, runs a task for each of the arguments, and returns what they return. Raises
    Refused.
    """
    with connect_to_ray(address) as cluster:
        return [result.value for result in cluster.run(call, tasks, progress)]


def parse_ray(on: str) -> str | None:
    """Parses the value of `--on`; returns the address of a cluster, None for the one that Ray finds. Raises Refused."""
    name, sign, address = on.partition("=")
    if name != RAY or (sign and not address):
        raise refuse("wrong-option", "--on", repr(on), "ray, or ray=ADDRESS, such as ray=HEAD:6379")
    return address or None


@contextmanager
def connect_to_ray(address: str | None) -> Iterator[RayCluster]:
    """Connects to the cluster at an address, as `ray.init` takes it. Without one: that of RAY_ADDRESS, one that runs on
    this machine, or a new one of this machine alone, which is ended again. A Ray that this Python is connected to is
    used as it is. Raises Refused.
    """
    known = address or os.environ.get("RAY_ADDRESS")
    ray = load_ray(is_patient=not known)
    is_ours = not ray.is_initialized()
    if is_ours:
        require_answer(known)
        begin_connection(ray, address)
    try:
        nodes = sum(node["Alive"] for node in ray.nodes())
        yield RayCluster(int(ray.cluster_resources().get("CPU", 0)), nodes)
    finally:
        if is_ours:
            ray.shutdown()


def load_ray(*, is_patient: bool = True) -> Any:
    """Loads the package. Without patience it tries once to reach a head node, 45 seconds, in the place of 20 times.
    Raises Refused if it is not installed.
    """
    before = os.environ.get(TRIES)
    if not is_patient:
        os.environ.setdefault(TRIES, "1")  # Ray reads it when it is loaded
    try:
        import ray  # noqa: PLC0415 - heavy, and not there for everybody
    except ModuleNotFoundError as error:
        remedy = "pip install 'reshard[ray]'"
        raise refuse("missing-package", "--on ray", str(error), "the package ray", remedy) from None
    finally:
        if before is None:
            os.environ.pop(TRIES, None)
    return ray


def begin_connection(ray: Any, address: str | None) -> None:
    """Connects to Ray, and leaves the signals to those who handled them before. Raises Refused."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        # What workers print stays in Ray's logs: what matters comes back as a value.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ImportError) as error:
        raise refuse_cluster(address or "a cluster of this machine", str(error)) from None
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def require_answer(address: str | None) -> None:
    """Raises Refused if nothing listens at the address of a head node."""
    host, _, port = (address or "").removeprefix("ray://").partition("?")[0].rpartition(":")
    if not host or not port.isdecimal():
        return  # `auto`, `local` and the like
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise refuse_cluster(str(address), getattr(error, "strerror", None) or str(error)) from None


def refuse_cluster(address: str, found: str) -> Refused:
    """Makes the refusal of a cluster that does not answer."""
    remedy = "is it running? `ray start --head --port=6379` starts one, whose address is HEAD:6379"
    return refuse("no-cluster", address, found.partition("\n")[0], "a Ray cluster that answers", remedy)


def find_own_node(ray: Any) -> str:
    """The node that this process is connected to."""
    return str(ray.get_runtime_context().get_node_id())


def cancel_tasks(ray: Any, references: Sequence[Any]) -> None:
    """Cancels the tasks that have not ended, and waits for them: they end their files well. Who does not end is killed:
    nobody must write any more when the caller is told.
    """
    _, left = ray.wait(list(references), num_returns=len(references), timeout=0)
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
    where = name_node(ray), find_own_node(ray), os.getpid()
    if version != __version__:
        remedy = "the same version of reshard on every node"
        problem = Problem("another-version", "reshard", __version__, f"{version}, as on the driver", remedy)
        return TaskResult(None, (problem,), *where)
    try:
        value = call(**arguments, progress=TaskTeller(ray, board, number, where))
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


def explain_death(error: Exception, where: TaskNews) -> Problem:
    """Explains a task that died as often as Ray begins it again; or that somebody else has cancelled."""
    kind = type(error).__name__
    tries = f"died, as often as Ray tries it ({kind})" if "Cancel" not in kind else "was cancelled by somebody else"
    subject = f"process {where.process} on {where.node}" if where.process else where.node
    remedy = (
        "the same command goes on from what is written; if memory was short: fewer --jobs, or a smaller --max-memory"
    )
    return Problem("worker-died", subject, tries, "a task that ends", f"{remedy}; Ray's logs on that node tell more")


def tell_listeners(line: str) -> None:
    """Tells a person."""
    for listen in LISTENERS:
        listen(line)
