"""What a progress function is told: never too much, never less than before, the whole at the end only."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from socket import gethostname
from threading import Thread

import pytest
from jobs import Job, convert_checkpoint
from torture import durable_bytes

import reshard
import reshard.execution.writer
from reshard.errors import Problem, Refused
from reshard.formats.target_names import JOURNAL, MANIFEST
from reshard.storage.counting import ProgressView, WorkCounter, WorkState, spread_evenly
from reshard.synthetic import SMALL_V3, write_checkpoint

RANKS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counting") / "source"
    write_checkpoint(folder, SMALL_V3, 4)
    return folder


@pytest.fixture(scope="module")
def target(source: Path) -> Path:
    folder = source.with_name("target")
    convert_checkpoint(Job(source, RANKS), folder)
    return folder


class Listener(ProgressView):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.states: list[WorkState] = []

    def show(self, state: WorkState) -> None:
        self.states.append(state)


def require_honest(calls: list[tuple[int, int]], total: int, first: int = 0) -> None:
    assert {whole for _, whole in calls} == {total}
    numbers = [done for done, _ in calls]
    assert numbers == sorted(numbers)
    assert numbers[0] == first
    assert numbers[-1] == total
    assert total not in numbers[:-1]


def size_of(folder: Path, pattern: str = "*.safetensors") -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def size_written(folder: Path) -> int:
    """Of all files of a target but the manifest."""
    return size_of(folder, "*") - (folder / MANIFEST).stat().st_size


def test_a_conversion_reaches_the_whole_when_all_has_its_final_name(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    named = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        named.append((tmp_path / "target" / MANIFEST).exists())

    reshard.convert(source, tmp_path / "target", RANKS, progress=progress)
    require_honest(calls, size_written(tmp_path / "target"))
    assert named == [False] * (len(calls) - 1) + [True]


def test_what_is_copied_and_not_on_the_disk_counts_half(source: Path, tmp_path: Path) -> None:
    listener = Listener()
    reshard.convert(source, tmp_path / "target", RANKS, progress=listener)
    copying = [state for state in listener.states if state.unsynced is None]
    waiting = [state for state in listener.states if state.unsynced is not None]
    total = size_written(tmp_path / "target")
    beside = total - size_of(tmp_path / "target")  # on the disk before the first tensor
    # A job that takes less than the five seconds between two syncs: all of it is waited for at the end.
    assert copying[-2].done <= (total + beside) // 2
    assert [waiting[0].done, waiting[0].unsynced] == [(total + beside) // 2, total - beside]
    assert all(state.done == (2 * total - state.unsynced) // 2 for state in waiting if state.unsynced is not None)
    assert listener.states[-1] == WorkState(total, total)


def test_the_first_call_of_a_resumed_job_says_what_was_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard.execution.writer, "FLUSH_SECONDS", 0.001)
    target = tmp_path / "target"

    def interrupt(done: int, total: int) -> None:
        if done > total * 0.4 and durable_bytes(target / JOURNAL):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard.convert(source, target, RANKS, jobs=1, progress=interrupt)
    durable = durable_bytes(target / JOURNAL)
    assert durable
    calls: list[tuple[int, int]] = []
    reshard.convert(source, target, RANKS, progress=lambda *call: calls.append(call))
    require_honest(calls, size_written(target), durable)


def test_large_files_beside_the_tensors_are_counted_while_they_are_copied(source: Path, tmp_path: Path) -> None:
    whole = tmp_path / "source"
    shutil.copytree(source, whole)
    size = 5 << 20
    (whole / "tokenizer.json").write_bytes(b"{" + b" " * (size - 2) + b"}")
    calls: list[tuple[int, int]] = []
    reshard.convert(whole, tmp_path / "target", RANKS, progress=lambda *call: calls.append(call))
    require_honest(calls, size_written(tmp_path / "target"))
    # In steps of 1 MiB, before the tensors and after the other file: each byte counts half until it is on the disk.
    beside = (tmp_path / "target" / "run_config.json").stat().st_size
    assert {beside + (number << 19) for number in range(1, 6)} <= {done for done, _ in calls}


def test_an_interrupt_before_anything_is_durable_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, _: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reshard.convert(source, tmp_path / "target", RANKS, progress=interrupt)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("more", [{}, {"ranks": [1, 2]}, {"sample": 0.1}, {"ranks": [3], "sample": 0.1}])
def test_a_verification_counts_the_files_that_it_compares(more: dict[str, object], source: Path, target: Path) -> None:
    calls: list[tuple[int, int]] = []
    reshard.verify(target, source, progress=lambda *call: calls.append(call), **more)  # type: ignore[call-overload]
    ranks: Iterable[int] = more.get("ranks", range(RANKS))  # type: ignore[assignment]
    require_honest(calls, sum(size_of(target, f"model{rank}-mp*") for rank in ranks))


def test_other_commands_count_alike(source: Path, target: Path) -> None:
    jobs: list[tuple[Callable[..., object], int]] = [
        (lambda progress: reshard.verify(target, progress=progress), size_of(target)),
        (lambda progress: reshard.verify(target, sample=0.3, progress=progress), size_of(target)),
        (lambda progress: reshard.diff(source, source, progress=progress), data_size(source)),
    ]
    for job, total in jobs:
        calls: list[tuple[int, int]] = []
        job(lambda *call: calls.append(call))  # noqa: B023
        require_honest(calls, total)


def data_size(folder: Path) -> int:
    contents = [path.read_bytes() for path in folder.glob("*.safetensors")]
    return sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in contents)


def test_a_sample_is_spread_evenly() -> None:
    """Not 99 percent at once, and the one that is read behind it."""
    told: list[int] = []
    advance = spread_evenly(told.append, 100, 10_001)
    for _ in range(10):
        advance(10)
    assert sum(told) == 10_001
    assert max(told) <= 1001


def test_many_threads_lose_no_byte() -> None:
    told: list[int] = []
    counter = WorkCounter(lambda done, _: told.append(done), 8_001)
    counter.begin()

    def count() -> None:
        for _ in range(1000):
            counter.advance(1)

    threads = [Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == sorted(told)
    assert told[-1] == 8_000
    counter.finish()
    assert told[-1] == 8_001


def test_more_bytes_than_were_announced_are_not_the_whole() -> None:
    told: list[int] = []
    counter = WorkCounter(lambda done, _: told.append(done), 10)
    counter.begin()
    counter.advance(25)
    counter.finish()
    assert told == [0, 9, 10]


# --- who holds a target ---


def test_a_target_in_use_is_refused_with_process_and_host(source: Path, tmp_path: Path) -> None:
    found: list[Problem] = []

    def convert_again(done: int, _: int) -> None:
        if done and not found:
            with pytest.raises(Refused) as error:
                reshard.convert(source, tmp_path / "target", RANKS)
            found.extend(error.value.problems)

    reshard.convert(source, tmp_path / "target", RANKS, progress=convert_again)
    (problem,) = found
    assert problem.kind == "target-in-use"
    assert problem.found.startswith(f"process {os.getpid()} on {gethostname()} since 2")
    assert problem.found.endswith(" is writing to it")
