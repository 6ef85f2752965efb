"""The ledger lets the workers wait for a disk that is behind, and lets them go whatever becomes of who flushes."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Event, Thread

import pytest

import reshard.execution.writer
from reshard.execution.journal import RECORD, open_journal
from reshard.execution.records import parse_records
from reshard.execution.writer import Ledger, flush_regularly
from reshard.storage.counting import WorkCounter
from reshard.storage.local import CACHED
from reshard.storage.resources import run_in_threads

SIZE = 100
SOON = 0.3
LATE = 60


def record(place: int) -> bytes:
    return RECORD.pack(place * SIZE, 0, SIZE, bytes(16))


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshard.execution.writer, "FLUSH_SIZE", 2 * SIZE)
    monkeypatch.setattr(reshard.execution.writer, "MOST_UNSYNCED", 4 * SIZE)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def ledger(stack: ExitStack, tmp_path: Path) -> Ledger:
    file = stack.enter_context((tmp_path / "target").open("wb"))
    counter = WorkCounter(None, 1 << 20, writes=True)
    return Ledger(open_journal(stack, tmp_path, {}), [file.fileno()], CACHED, counter)


def begin_waiting(ledger: Ledger) -> Thread:
    """A thread that adds a record too many, and waits."""
    for place in range(4):
        ledger.add(record(place))
    waiting = Thread(target=ledger.add, args=(record(4),), daemon=True)
    waiting.start()
    waiting.join(SOON)
    assert waiting.is_alive()
    return waiting


def test_who_adds_too_much_waits_for_the_next_flush(ledger: Ledger) -> None:
    with ledger.bound():
        waiting = begin_waiting(ledger)
        assert (ledger.added, ledger.unsynced) == (4 * SIZE, 4 * SIZE)
        ledger.flush()
        waiting.join(LATE)
        assert not waiting.is_alive()
    assert (ledger.added, ledger.unsynced) == (5 * SIZE, SIZE)
    assert len(parse_records(ledger.records)) == 4
    ledger.flush()
    assert ledger.unsynced == 0
    assert parse_records(ledger.records)["offset"].tolist() == [place * SIZE for place in range(5)]


def test_nobody_waits_once_nobody_flushes(ledger: Ledger) -> None:
    with ledger.bound():
        waiting = begin_waiting(ledger)
    waiting.join(LATE)
    assert not waiting.is_alive()
    for place in range(5, 50):
        ledger.add(record(place))
    assert ledger.unsynced == 50 * SIZE


def add_from_threads(ledger: Ledger) -> None:
    def make_worker() -> Callable[[int], None]:
        return lambda place: ledger.add(record(place))

    run_in_threads(range(500), make_worker, 3, partial(flush_regularly, ledger))


def test_much_is_flushed_before_its_time_and_each_record_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshard.execution.writer, "FLUSH_SECONDS", 3600)
    monkeypatch.setattr(reshard.execution.writer, "LOOK_SECONDS", 0.001)
    add_from_threads(ledger)
    assert len(parse_records(ledger.records)) >= 490
    ledger.flush()
    assert parse_records(ledger.records)["offset"].tolist() == [place * SIZE for place in range(500)]
    assert ledger.unsynced == 0


def test_an_error_of_the_flush_ends_those_who_wait_for_it(stack: ExitStack, tmp_path: Path) -> None:
    """A pipe cannot be synced."""
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    counter = WorkCounter(None, 1 << 20, writes=True)
    ledger = Ledger(open_journal(stack, tmp_path, {}), [ends[1]], CACHED, counter)
    with pytest.raises(OSError, match="Invalid argument"):
        add_from_threads(ledger)
    assert ledger.records == b""


def test_an_error_of_a_worker_ends_those_who_wait(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here nothing is ever flushed, as where a disk hangs."""
    monkeypatch.setattr(reshard.execution.writer, "FLUSH_SIZE", 1 << 60)
    full = Event()

    def make_worker() -> Callable[[int], None]:
        def work(place: int) -> None:
            if place == 5:
                full.set()
            if place == 9:
                assert full.wait(LATE)
                raise ZeroDivisionError
            ledger.add(record(place))

        return work

    with pytest.raises(ZeroDivisionError):
        run_in_threads(range(10**6), make_worker, 12, partial(flush_regularly, ledger))
