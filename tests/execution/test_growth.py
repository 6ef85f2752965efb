"""More threads are added as long as they do more work, and never more than are allowed."""

from collections.abc import Callable, Sequence
from threading import Barrier, Event
from time import sleep

import pytest

import reshard.storage.resources
from reshard.storage.resources import Growth, run_in_threads


def follow(monkeypatch: pytest.MonkeyPatch, rates: Sequence[float], threads: int, most: int) -> list[int]:
    """The numbers of threads, where each second does as much work as `rates` say."""
    now, done = [0.0], [0]
    monkeypatch.setattr(reshard.storage.resources, "monotonic", lambda: now[0])
    growth, numbers = Growth(most, lambda: done[0]), [threads]
    for rate in rates:
        now[0] += 0.5
        assert growth.count_new(numbers[-1]) == 0, "too early to tell"
        now[0] += 0.5
        done[0] += round(rate * 1000)
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
        ([0, 0, 1], 8, [2, 4, 8, 8]),
    ],
)
def test_threads_double_while_that_helps(
    rates: Sequence[float], most: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert follow(monkeypatch, rates, 2, most) == expected


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

    assert run_in_threads(range(100), make_worker, 1, growth=Growth(4, lambda: 0)) == 4
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
        run_in_threads(range(10**9), make_worker, 1, growth=Growth(2, lambda: 0))


def test_none_is_added_once_one_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last item takes long, and nothing is left for another thread."""
    monkeypatch.setattr(reshard.storage.resources, "GROW_SECONDS", 0.0)
    monkeypatch.setattr(reshard.storage.resources, "WAKE_SECONDS", 0.05)
    assert run_in_threads([0.0, 0.5], lambda: sleep, 2, growth=Growth(8, lambda: 0)) == 2
