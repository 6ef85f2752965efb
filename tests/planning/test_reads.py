"""What a plan says that it reads of the source: against what the kernel counts while the conversion runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from reshard import api
from reshard.planning.plan import Plan
from reshard.planning.reads import Reads, measure_reads
from reshard.synthetic import SMALL_V3, write_checkpoint

OTHERWISE = 1 << 20
"""In bytes: what a run reads besides tensors, such as headers, samples and its own journal, at most."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reads") / "source"
    write_checkpoint(folder, SMALL_V3, 3)
    return folder


@pytest.fixture(scope="module")
def shards(source: Path) -> Path:
    api.convert(source, source.with_name("shards"), mp=4)
    return source.with_name("shards")


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    api.convert(source, source.with_name("whole"), to="hf", cast="bf16")
    return source.with_name("whole")


def count_read() -> int:
    """The bytes that this process has asked the kernel for."""
    return int(Path("/proc/self/io").read_text(encoding="ascii").split("rchar: ")[1].split()[0])


def measure(plan: Plan) -> Reads:
    return measure_reads(plan.source, plan.casts, plan.copies)


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("source", {"mp": 4}),
        ("source", {"mp": 4, "ranks": [0]}),
        ("source", {"mp": 4, "ranks": [1, 3]}),
        ("source", {"mp": 4, "ranks": [2], "cast": "bf16"}),
        ("source", {"to": "hf"}),
        ("shards", {"mp": 2}),
        ("shards", {"mp": 2, "ranks": [1]}),
        ("shards", {"mp": 2, "ranks": [0], "replicas": "first"}),
        ("whole", {"mp": 2, "ranks": [0], "cast": "fp8"}),
    ],
)
def test_a_conversion_reads_what_its_plan_says(
    folder: str, options: Mapping[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path: Path = request.getfixturevalue(folder)
    said = measure(api.plan(path, **options)).size
    # The first conversion also reads code; of the second, the reading of headers is not counted.
    api.convert(path, tmp_path / "first", cache="yes", **options)
    begin = count_read()
    api.plan(path, **options)
    planned = count_read() - begin
    begin = count_read()
    api.convert(path, tmp_path / "second", cache="yes", **options)
    read = count_read() - begin - planned
    assert 0.95 * said <= read <= 1.08 * said + OTHERWISE
    assert said > 8 * OTHERWISE


def test_one_rank_reads_less_than_all(source: Path) -> None:
    every, one = (measure(api.plan(source, 4, ranks=ranks)).size for ranks in (None, [3]))
    assert one < every / 2
    assert f"reads about {one:,} bytes" in str(api.plan(source, 4, ranks=[3]))


def test_replicas_are_read_to_be_compared_only(shards: Path) -> None:
    both, first = (measure(api.plan(shards, 2, replicas=word)) for word in ("compare", "first"))
    assert first.replicas == 0
    # What is joined is read by itself, else with the gaps between.
    assert first.size * 0.95 < both.size - both.replicas <= first.size
    assert both.replicas > 1 << 20
