"""Free memory of the machine or container, and threads that end cleanly on errors and interrupts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from threading import Event, Lock, local
from time import monotonic
from typing import Generic, Self, TypeVar

from reshard.errors import refuse

UNLIMITED = 1 << 62
"""In bytes: stands for free memory where the system does not tell."""


def measure_available_memory() -> int:
    """Memory that this process can get now without swapping, in bytes; UNLIMITED where the system does not tell."""
    return min(read_system_memory(), *(limit - used for limit, used in read_container_limits()), UNLIMITED)


def read_system_memory() -> int:
    """Free memory of the machine, in bytes."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.split("MemAvailable:")[1].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        return UNLIMITED


def read_container_limits() -> Iterator[tuple[int, int]]:
    """For each control group that limits us: its limit, and its memory in use without the page cache, in bytes."""
    for folder, limit, used, cache in list_control_groups():
        try:
            most = int((folder / limit).read_text(encoding="ascii"))
            now = int((folder / used).read_text(encoding="ascii"))
            fields = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            yield most, max(0, now - int(fields[cache]))
        except (OSError, ValueError, KeyError):  # no such group, or `max`: no limit
            continue


def list_control_groups() -> Iterator[tuple[Path, str, str, str]]:
    """Folders of the control groups that may limit us, each with its names of limit, use and page cache (v1 or v2).

    Inside a container our group may be mounted as the root, so both places are looked at.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "file")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "cache")
        else:
            continue
        yield from ((folder, *names) for folder in {root / path.lstrip("/"), root})


WorkItem = TypeVar("WorkItem")

WAKE_SECONDS = 0.2
"""The kernel may give a signal to any thread, but Python acts on it only in the main thread, once that one wakes up."""


class Stopped(Exception):
    """Raised in a worker that waits, when all are to end: because of an interrupt, or of an error of another one."""


class CurrentStop(local):
    """The event that tells this thread to end; one that nobody sets in a thread that is no worker."""

    event = Event()


STOP = CurrentStop()


def wait_unless_stopped(seconds: float = 0) -> None:
    """Waits. Raises Stopped as soon as this thread is to end. Without a time it only looks."""
    if STOP.event.wait(seconds):
        raise Stopped


class WorkQueue(Generic[WorkItem]):
    """Items that several threads take one by one, in order. It ends early once it is stopped."""

    def __init__(self, items: Iterable[WorkItem]) -> None:
        self._items = iter(items)
        self._lock = Lock()
        self.stopped = Event()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> WorkItem:
        with self._lock:
            if self.stopped.is_set():
                raise StopIteration
            return next(self._items)


GROW_SECONDS = 1.0
"""So long the work of a number of threads is measured, before it is compared with that of fewer."""

WORTH = 1.1
"""More threads must do so many times the work of half of them, or no more are added."""


class Growth:
    """Adds threads as long as that makes it faster. The last ones added, which did not, stay."""

    def __init__(self, most: int, measure: Callable[[], int]) -> None:
        """`most` threads are allowed; `measure` tells the work done so far, in any unit."""
        self._measure = measure
        self._best = 0.0
        self._started = monotonic()
        self._done = measure()
        self._stands = True
        self.most = most

    def count_new(self, threads: int) -> int:
        """The number of threads to add now, where so many work: as many again, or none."""
        if threads >= self.most:
            return 0
        now, done = monotonic(), self._measure()
        seconds, more = now - self._started, done - self._done
        if self._stands:
            # Nothing has come yet, or the first bytes have: whole windows, begun before. Neither tells of the number of
            # threads.
            self._stands = not more
            self._started, self._done = now, done
            return 0
        if seconds < GROW_SECONDS:
            return 0
        self._started, self._done, self._stands = now, done, not more
        if not more:
            return 0
        rate = more / seconds
        if rate < self._best * WORTH:
            self.most = threads
            return 0
        self._best = rate
        return min(threads, self.most - threads)


def run_in_threads(
    work: Iterable[WorkItem],
    make_worker: Callable[[], Callable[[WorkItem], None]],
    threads: int,
    background: Callable[[Event], None] | None = None,
    growth: Growth | None = None,
) -> int:
    """Hands each item to a free worker, in the order of the items. Each thread makes one worker, with its own buffers.
    Returns the number of threads in the end: `growth` may have added some, and the system may allow fewer.

    `background` runs in one more thread: it has to return soon after the event that it is given is set. The first
    error, or an interrupt, ends all threads; it is raised once they have ended. Raises Refused where no thread can be
    started. What an added thread lacks ends nothing but that thread.
    """
    queue, lacking = WorkQueue(work), list[Exception]()
    futures: list[Future[None]] = []
    with ExitStack() as pools:
        start = partial(start_threads, pools, queue.stopped)
        # From the first thread on: the pools wait for all of them, and `background` ends only when it is told to.
        try:
            if background:
                futures += require_thread(start(partial(background, queue.stopped), 1))
            left = set(require_thread(start(partial(run_worker, queue, make_worker), threads)))
            futures += left
            threads = len(left)
            while left:
                ended, left = wait(left, WAKE_SECONDS, FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                # Once a worker has ended, nothing is left for others to begin.
                if growth and len(left) == threads and (new := growth.count_new(threads)):
                    added = start(partial(run_worker, queue, make_worker, lacking), new)
                    futures += added
                    left.update(added)
                    threads += len(added)
                    if len(added) < new:
                        growth.most = threads
        finally:
            stop_and_wait(queue.stopped, futures)
        futures[0].result()
    return threads - len(lacking)


WorkResult = TypeVar("WorkResult")


def map_in_threads(
    function: Callable[[WorkItem], WorkResult], items: Sequence[WorkItem], threads: int
) -> list[WorkResult]:
    """The results of a function for some items, in their order, computed by several threads: for what waits. Raises
    its first error.
    """
    found: dict[int, WorkResult] = {}

    def work(place: int) -> None:
        found[place] = function(items[place])

    if items:
        run_in_threads(range(len(items)), lambda: work, min(threads, len(items)))
    return [found[place] for place in range(len(items))]


def run_worker(
    queue: WorkQueue[WorkItem],
    make_worker: Callable[[], Callable[[WorkItem], None]],
    lacking: list[Exception] | None = None,
) -> None:
    """Makes a worker, and hands it items to the end. One that lacks memory for its buffers fails, or with a list for
    that, says so there and ends.
    """
    STOP.event = queue.stopped
    try:
        worker = make_worker()
    except (OSError, MemoryError) as error:
        if lacking is None:
            raise
        lacking.append(error)
        return
    with suppress(Stopped):  # the reason is told by the one who stops all
        for item in queue:
            worker(item)


def start_threads(pools: ExitStack, stopped: Event, run: Callable[[], None], count: int) -> list[Future[None]]:
    """Starts threads: so many, or as many as the system allows. Any error of one stops the others.

    Each in a pool of its own, which the stack closes: in a common one, what a thread that cannot be started was to do
    is done later by any other, unseen.
    """
    started: list[Future[None]] = []
    with suppress(RuntimeError):  # what Python says where no more can be started
        while len(started) < count:
            started.append(pools.enter_context(ThreadPoolExecutor(1)).submit(stop_on_error, stopped, run))
    return started


def require_thread(started: list[Future[None]]) -> list[Future[None]]:
    """Returns threads that were to be started. Raises Refused if there is none."""
    if not started:
        remedy = "end other programs, or allow more processes (`ulimit -u`) or memory"
        raise refuse(
            "too-little-memory", "threads", "the system starts no more of them", "one of them at least", remedy
        )
    return started


def stop_on_error(stopped: Event, run: Callable[[], None]) -> None:
    """Runs a thread. Any error of it stops the others."""
    try:
        run()
    except BaseException:
        stopped.set()
        raise


def stop_and_wait(stopped: Event, futures: Sequence[Future[None]]) -> None:
    """Tells all threads to end, and waits for them even if Ctrl-C is pressed again: their files must not be closed
    before. An interrupt meanwhile is raised at the end, for it may be the first.
    """
    interrupted = None
    while True:
        try:
            stopped.set()
            wait(futures)
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted:
        raise interrupted
