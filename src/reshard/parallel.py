"""Items of work, handed out one by one to a few threads."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import TypeVar

from reshard.disk import Ways

MOST_THREADS = 4
Item = TypeVar("Item")


def reading_threads(ways: Ways) -> int:
    """How many threads read at a time: as many as processors; past the page cache a disk is kept busy by more."""
    return MOST_THREADS if ways.read != "cached" else min(MOST_THREADS, len(os.sched_getaffinity(0)))


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
