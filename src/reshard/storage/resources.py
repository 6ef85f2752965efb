"""Free memory and threads."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import TypeVar

from reshard.types import Advance, Progress

PLENTY = 1 << 62
"""Where the system does not tell."""


def available_memory() -> int:
    """What this process could get now without swapping, in bytes; a huge number where nothing tells."""
    return min(system_memory(), *(limit - used for limit, used in container_limits()), PLENTY)


def system_memory() -> int:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.split("MemAvailable:")[1].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        return PLENTY


def container_limits() -> Iterator[tuple[int, int]]:
    """For each control group that limits us: its limit, and what of it is used for good, in bytes."""
    for folder, limit, used, cache in control_groups():
        try:
            most = int((folder / limit).read_text(encoding="ascii"))
            now = int((folder / used).read_text(encoding="ascii"))
            fields = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            yield most, max(0, now - int(fields[cache]))
        except (OSError, ValueError, KeyError):  # no such group, or `max`: no limit
            continue


def control_groups() -> Iterator[tuple[Path, str, str, str]]:
    """The folders that may tell of our limits, and the names in them, of both versions of control groups.

    Inside a container the group that we are told to be in may be the root of what is mounted.
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


Item = TypeVar("Item")


def in_threads(work: Iterable[Item], make_worker: Callable[[], Callable[[Item], None]], threads: int) -> None:
    """Hands each item to a worker that is free, in the order of the items. Each thread makes a worker of its own, with
    the buffers that it needs. The first error of one ends all and is raised.
    """
    items, lock, stopped = iter(work), Lock(), Event()

    def run() -> None:
        try:
            worker = make_worker()
            while True:
                with lock:
                    if stopped.is_set():
                        return
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                worker(item)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(run) for _ in range(threads)]
        try:
            for future in futures:
                future.result()
        finally:
            stopped.set()


def count_progress(progress: Progress | None, total: int) -> Advance:
    """Adds up the bytes done by all threads, and tells them one thread at a time."""
    if progress is None:
        return lambda _: None
    lock, done = Lock(), 0
    progress(0, total)

    def advance(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress(done, total)

    return advance
