"""More threads are added as long as they do more work, and never more than are allowed."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import count
from threading import Barrier, Event
from time import sleep

import pytest

import reshard.storage.resources
from reshard.storage.resources import Growth, run_in_threads


def follow(monkeypatch: pytest.MonkeyPatch, rates: Sequence[float], threads: int, most: int) -> list[int]:
    """The numbers of threads, where each second does as much work as `rates` say. While nothing is done, or because the
    disk stands still, nothing is decided.
    """
    now, done = [0.0], [0]
    monkeypatch.setattr(reshard.storage.resources, "monotonic", lambda: now[0])
    growth, numbers = Growth(most, lambda: done[0]), [threads]
    for rate in rates:
        for _ in range(2):
            assert growth.count_new(numbers[-1]) == 0, "too early to tell"
            now[0] += 0.5
            done[0] += round(rate * 500)
        numbers.append(numbers[-1] + growth.count_new(numbers[-1]))
    return numbers


@pytest.mark.parametrize(
    ("rates", "most", "expected"),
    [
        ([1, 2, 4, 4], 16, [2, 4, 8, 16, 16]),
        ([1, 1.05, 9, 9], 16, [2, 4, 4, 4, 4]),
        ([1, 2, 2, 9], 16, [2, 4, 8, 8, 8]),
        ([1, 2, 4, 8], 5, [2, 4, 5, 5, 5]),
        ([1, 2], 2, [2, 2, 2]),
        ([0, 0, 1, 1.05, 9], 8, [2, 2, 2, 4, 4, 4]),
        ([1, 0, 2, 9], 16, [2, 4, 4, 8, 16]),
    ],
)
def test_threads_double_while_that_helps(
    rates: Sequence[float], most: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert follow(monkeypatch, rates, 2, most) == expected


def test_what_passes_before_the_first_byte_makes_nobody_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are made under the lock of the queue first, which may take a second. Else four threads, which do as much,
    would look twice as fast as two.
    """
    now, done = [0.0], [0]
    monkeypatch.setattr(reshard.storage.resources, "monotonic", lambda: now[0])
    growth, numbers = Growth(16, lambda: done[0]), [2]
    for place in range(40):
        now[0] += 0.2
        done[0] += 1000 if place >= 4 else 0
        numbers.append(numbers[-1] + growth.count_new(numbers[-1]))
    assert numbers[-1] == 4


def rising() -> Callable[[], int]:
    """Work that is done ever faster."""
    looks = count()
    return lambda: int(10 ** next(looks))


def test_added_threads_take_part_and_each_item_is_handled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first four items end only when four threads are at work."""
    monkeypatch.setattr(reshard.storage.resources, "GROW_SECONDS", 0.0)
    together, seen = Barrier(4), list[int]()

    def make_worker() -> Callable[[int], None]:
        def work(item: int) -> None:
            if item < 4:
                together.wait(60)
            seen.append(item)

        return work

    assert run_in_threads(range(100), make_worker, 1, growth=Growth(4, rising())) == 4
    assert sorted(seen) == [*range(100)]


def test_an_error_of_an_added_thread_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshard.storage.resources, "GROW_SECONDS", 0.0)
    failed = Event()

    def make_worker() -> Callable[[int], None]:
        def work(item: int) -> None:
            if item == 1:
                failed.set()
                raise ZeroDivisionError
            assert failed.wait(60)

        return work

    with pytest.raises(ZeroDivisionError):
        run_in_threads(range(10**9), make_worker, 1, growth=Growth(2, rising()))


def test_none_is_added_once_one_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last item takes long, and nothing is left for another thread."""
    monkeypatch.setattr(reshard.storage.resources, "GROW_SECONDS", 0.0)
    monkeypatch.setattr(reshard.storage.resources, "WAKE_SECONDS", 0.05)
    assert run_in_threads([0.0, 0.5], lambda: sleep, 2, growth=Growth(8, rising())) == 2


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), MemoryError()])
def test_an_added_thread_that_gets_no_buffers_ends_nothing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshard.storage.resources, "GROW_SECONDS", 0.0)
    refused, seen, made = Event(), list[int](), count()

    def make_worker() -> Callable[[int], None]:
        if next(made):
            refused.set()
            raise error

        def work(item: int) -> None:
            assert refused.wait(60)
            seen.append(item)

        return work

    assert run_in_threads(range(50), make_worker, 1, growth=Growth(8, rising())) == 1
    assert seen == [*range(50)]
    with pytest.raises(type(error)):
        run_in_threads(range(50), make_worker, 1)


NO_MORE_THREADS = """
import resource, sys, threading
from pathlib import Path
import reshard.storage.resources
from reshard import Refused
from reshard.storage.resources import Growth, run_in_threads

def allow_no_more():
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), -1))
"""
"""A stack of 8 MiB does not fit any more."""

WHILE_IT_GROWS = """
reshard.storage.resources.GROW_SECONDS = 0.0
seen, done, asked = [], 0, threading.Event()

def measure():
    global done
    done = done * 10 + 1
    if done > 1:
        allow_no_more()
        asked.set()
    return done

def work(item):
    assert asked.wait(60)
    seen.append(item)

threads = run_in_threads(range(50), lambda: work, 1, growth=Growth(8, measure))
assert (threads, sorted(seen)) == (1, [*range(50)]), (threads, seen)
"""

AT_THE_BEGINNING = """
allow_no_more()
try:
    run_in_threads(range(50), lambda: print, 4, lambda stopped: None)
except Refused as refused:
    assert [problem.kind for problem in refused.problems] == ["too-little-memory"]
else:
    sys.exit("it ran")
"""


@pytest.mark.parametrize("program", [WHILE_IT_GROWS, AT_THE_BEGINNING])
def test_where_the_system_starts_no_more_threads(program: str) -> None:
    """More of them are not needed; where there is none at all, that is told in words."""
    command = [sys.executable, "-c", NO_MORE_THREADS + program]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
