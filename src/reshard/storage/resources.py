"""Free memory of the machine or container, and a pool of threads that ends cleanly on errors and interrupts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from threading import Event, Lock
from time import monotonic
from typing import Generic, Self, TypeVar

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
    """Adds threads to a pool as long as that makes it faster."""

    def __init__(self, most: int, measure: Callable[[], int]) -> None:
        """`most` threads are allowed; `measure` tells the work done so far, in any unit."""
        self._measure = measure
        self._best = 0.0
        self._started = monotonic()
        self._done = measure()
        self.most = most

    def count_new(self, threads: int) -> int:
        """The number of threads to add now, where so many work: as many again, or none."""
        seconds = monotonic() - self._started
        if threads >= self.most or seconds < GROW_SECONDS:
            return 0
        done = self._measure()
        rate = (done - self._done) / seconds
        self._started, self._done = monotonic(), done
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
    Returns the number of threads in the end: `growth` may have added some.

    `background` runs in one more thread: it has to return soon after the event that it is given is set. The first
    error, or an interrupt, ends all threads; it is raised once they have ended.
    """
    queue = WorkQueue(work)

    def run_worker() -> None:
        worker = make_worker()
        for item in queue:
            worker(item)

    futures: list[Future[None]] = []
    with ThreadPoolExecutor(max(threads, growth.most if growth else 0) + 1) as pool:
        # From the first thread on: the pool waits for all of them, and `background` ends only when it is told to.
        try:
            if background:
                futures.append(pool.submit(stop_on_error, queue.stopped, partial(background, queue.stopped)))
            new, threads = threads, 0
            left: set[Future[None]] = set()
            while new or left:
                added = [pool.submit(stop_on_error, queue.stopped, run_worker) for _ in range(new)]
                futures.extend(added)
                threads += new
                ended, left = wait(left.union(added), WAKE_SECONDS, FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                # Once a worker has ended, nothing is left for others to begin.
                new = growth.count_new(threads) if growth and len(left) == threads else 0
        finally:
            stop_and_wait(queue.stopped, futures)
        futures[0].result()
    return threads


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
