"""The ledger lets the workers wait for a disk that is behind, and lets them go whatever becomes of who flushes."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Event, Thread

import pytest
from cached_pages import mount

import reshard.execution.writer
import reshard.storage.residency
from reshard.execution.journal import RECORD, open_journal
from reshard.execution.writer import Ledger, flush_regularly
from reshard.storage.counting import WorkCounter
from reshard.storage.local import CACHED, open_descriptor
from reshard.storage.residency import CACHESTAT
from reshard.storage.resources import run_in_threads

SIZE = 100
SOON = 0.3
LATE = 60


def record(place: int) -> bytes:
    return RECORD.pack(place * SIZE, 0, SIZE, bytes(16))


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshard.execution.writer, "FLUSH_SIZE", 2 * SIZE)
    monkeypatch.setattr(reshard.execution.writer, "LATE_FLUSH_SIZE", 2 * SIZE)
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
    assert len(ledger.read_records()) == 4
    ledger.flush()
    assert ledger.unsynced == 0
    assert ledger.read_records()["offset"].tolist() == [place * SIZE for place in range(5)]


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
    assert len(ledger.read_records()) >= 490
    ledger.flush()
    assert ledger.read_records()["offset"].tolist() == [place * SIZE for place in range(500)]
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
    assert len(ledger.read_records()) == 0


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


class Log(WorkCounter):
    """Counts, and logs what comes to the disk."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(None, 1 << 20, writes=True)
        self._events = events

    def settle(self, size: int) -> None:
        self._events.append(f"settle {size}")
        super().settle(size)


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """As a container has it: a folder laid over another."""
    names = ("lower", "upper", "work")
    for name in names:
        (tmp_path / name).mkdir()
    options = ",".join(f"{name}dir={tmp_path / name}" for name in names)
    folder = mount(tmp_path / "overlay", "-t", "overlay", "overlay", "-o", options)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def flush_file(stack: ExitStack, folder: Path, journal: Path, events: list[str]) -> Ledger:
    """The ledger of a file into which three groups were written, after a flush."""
    path = folder / "target"
    path.write_bytes(bytes(3 * SIZE))
    descriptor = open_descriptor(stack, path, os.O_RDWR)
    ledger = Ledger(open_journal(stack, journal, {}), [descriptor], CACHED, Log(events))
    for place in range(3):
        ledger.add(record(place))
    ledger.flush()
    return ledger


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens: syncs, and bytes that are said to be on the disk."""
    events: list[str] = []
    fdatasync = os.fdatasync

    def sync(descriptor: int) -> None:
        events.append("sync")
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", sync)
    monkeypatch.setattr(reshard.execution.writer, "FLUSH_SIZE", 1 << 60)
    return events


@pytest.mark.parametrize("cachestat", [CACHESTAT, 9999])
def test_bytes_that_only_a_sync_writes_are_counted_behind_it_and_synced_often(
    cachestat: int, overlay: Path, stack: ExitStack, tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard.storage.residency, "CACHESTAT", cachestat)
    ledger = flush_file(stack, overlay, tmp_path, events)
    stack.close()  # before the overlay goes
    assert events[-3:] == ["sync", f"settle {3 * SIZE}", "sync"], "the file, and then the journal"
    assert ledger.flush_size == 2 * SIZE


@pytest.mark.parametrize("cachestat", [CACHESTAT, 9999])
def test_bytes_on_a_disk_that_writes_at_once_are_counted_as_they_come_to_it(
    cachestat: int, stack: ExitStack, tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard.storage.residency, "CACHESTAT", cachestat)
    ledger = flush_file(stack, tmp_path, tmp_path, events)
    assert events[-3:] == [f"settle {3 * SIZE}", "sync", "sync"]
    assert ledger.flush_size == 1 << 60
