"""The times of a run: they are of this run, leave nothing out, and say of a cast that something was computed."""

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import Job, convert_checkpoint
from s3_server import serve_s3, set_s3_environment
from targets import CONFIG, leave_unfinished

import reshard
from reshard.execution.reader import OpenFiles, WorkerBuffers, make_cast_inputs
from reshard.execution.times import COMPUTING, WAITING, ActivityClock, ThreadSeconds
from reshard.storage.local import CACHED, open_to_read
from reshard.synthetic import write_checkpoint
from reshard.target.conversion import SHORTEST_TOLD, Conversion, describe_conversion
from reshard.text import round_to_total
from reshard.types import Tensor


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("times") / "source"
    write_checkpoint(folder, CONFIG, 2)
    return folder


def require_times(made: Conversion, jobs: int) -> ThreadSeconds:
    """The stages fill the time of the run, and the threads their stage."""
    done = made.done
    assert done
    assert made.planning > 0
    assert min(*done.stages, *done.threads) >= 0
    assert made.planning + sum(done.stages) == pytest.approx(made.seconds)
    assert done.stages.copying > 0
    assert 0 < sum(done.threads) <= jobs * done.stages.copying
    assert min(done.threads.reading, done.threads.arranging, done.threads.writing) > 0
    return done.threads


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("cast", [None, "bf16"])
def test_the_times_of_a_conversion_fill_it_and_only_a_cast_computes(
    jobs: int, cast: str | None, source: Path, tmp_path: Path
) -> None:
    made = reshard.convert(source, tmp_path / "ranks", mp=2, cast=cast, jobs=jobs)
    assert (require_times(made, jobs).computing > 0) == (cast is not None)


def test_joining_is_not_computing(source: Path, tmp_path: Path) -> None:
    reshard.convert(source, tmp_path / "ranks", mp=2)
    made = reshard.convert(tmp_path / "ranks", tmp_path / "whole", to="hf", jobs=1)
    assert made.plan.source.joins
    assert require_times(made, 1).computing == 0


def test_what_a_cast_reads_is_reading(source: Path, tmp_path: Path) -> None:
    """Its inputs are not read by the window, but on the way."""
    only = ["model.layers.0.mlp.gate_proj.weight"]
    made = reshard.convert(source, tmp_path / "ranks", mp=1, cast="bf16", only=only, jobs=1)
    assert require_times(made, 1).reading > 0


def test_a_store_has_the_same_times(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3() as state:
        set_s3_environment(monkeypatch, state, tmp_path)
        up = reshard.convert(source, "s3://models/ranks", mp=2, cast="bf16", jobs=2)
        down = reshard.convert("s3://models/ranks", tmp_path / "whole", mp=1, jobs=2)
    assert require_times(up, 2).computing > 0
    assert require_times(down, 2).computing == 0
    assert re.search(r"^copying: .*reading.* uploading", describe_longer(up), re.MULTILINE)
    assert re.search(r"^copying: .*downloading.* writing", describe_longer(down), re.MULTILINE)


def test_a_run_that_goes_on_tells_its_own_bytes(source: Path, tmp_path: Path) -> None:
    whole = reshard.convert(source, tmp_path / "whole", mp=2)
    leave_unfinished(Job(source, 2), tmp_path / "ranks")
    made = convert_checkpoint(Job(source, 2), tmp_path / "ranks")
    again = reshard.convert(source, tmp_path / "ranks", mp=2)
    assert made.done
    assert whole.written == whole.plan.size
    assert made.written == sum(len(file.header) for file in made.plan.files), "headers are written anew"
    assert made.rate == pytest.approx(made.written / made.seconds)
    assert made.done.threads == (0, 0, 0, 0, made.done.threads.waiting), "nothing was left to copy"
    assert (again.written, again.done, again.planning) == (0, None, again.seconds)


def describe_longer(made: Conversion, seconds: float = 7.77) -> str:
    """The summary of a conversion that took so much longer: planning it."""
    return "\n".join(describe_conversion(replace(made, seconds=made.seconds + seconds)))


def test_the_summary_tells_times_that_add_up(source: Path, tmp_path: Path) -> None:
    made = reshard.convert(source, tmp_path / "ranks", mp=2, cast="bf16", jobs=1)
    for more in np.linspace(0.5, 9, 80).tolist():
        text = describe_longer(made, more)
        (told,) = re.findall(r"^.*rank files, .* bytes \(.*\) in ([\d.]+) s, [\d.]+ [KM]iB/s$", text, re.MULTILINE)
        (stages,), (threads,) = (re.findall(rf"^{word}: (.*)$", text, re.MULTILINE) for word in ("time", "copying"))
        assert sum(round(float(one) * 10) for one in re.findall(r"([\d.]+) s \w+", stages)) == round(float(told) * 10)
        assert sum(map(int, re.findall(r"(\d+)% \w+", threads))) == 100
        assert "0.0 s" not in stages
        assert " 0%" not in threads


def test_of_a_short_run_only_the_time_is_told(source: Path, tmp_path: Path) -> None:
    made = replace(reshard.convert(source, tmp_path / "ranks", mp=2), seconds=SHORTEST_TOLD * 0.99)
    lines = list(describe_conversion(made))
    assert lines[0].endswith(" in 0.5 s")
    assert [line for line in lines if line.startswith(("time:", "copying:"))] == []


def test_a_cast_goes_on_computing_when_it_has_read(source: Path) -> None:
    path = source / "model-00001-of-00002.safetensors"
    tensor = Tensor("w", "U8", (64,), 0, 8, 64)
    with ExitStack() as stack:
        files = OpenFiles([open_to_read(stack, path, CACHED)], (), CACHED, (), allow_inexact=False, levels=0)
        buffers = WorkerBuffers(makes=True, levels=0)
        buffers.clock.begin(COMPUTING)
        found = bytes(make_cast_inputs(files, buffers).weight(tensor, 0, 64))
    assert found == path.read_bytes()[8:72]
    assert buffers.clock.begin(WAITING) == COMPUTING
    spent = ThreadSeconds(*buffers.clock.read())
    assert spent.reading > 0


def test_a_clock_leaves_no_moment_out_and_counts_none_twice() -> None:
    before = perf_counter()
    clock = ActivityClock(3, 2)
    begun = perf_counter()
    turns = [clock.begin(number % 3) for number in range(1000)]
    least = perf_counter() - begun
    first, last = clock.read(), clock.read()
    assert turns == [2, *(number % 3 for number in range(999))]
    assert least - 1e-9 <= sum(first) <= sum(last) <= perf_counter() - before
    assert last[1:] == first[1:], "since then the last activity was on"


@given(st.lists(st.floats(0, 1e12), min_size=1), st.integers(0, 10_000))
def test_rounded_parts_add_up_and_are_not_far_off(weights: list[float], total: int) -> None:
    parts = round_to_total(weights, total)
    whole = sum(weights)
    if not whole:
        assert parts == [0] * len(weights)
        return
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - weight / whole * total) < 1 + 1e-6
