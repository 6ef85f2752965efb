"""The room and the rough time of a plan: measured, and nothing is left behind."""

from pathlib import Path

import pytest

from reshard import api
from reshard.errors import Refused
from reshard.formats.target_names import MANIFEST
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.target.estimate import describe_estimate, estimate_job, format_rough_time, measure_write_rate


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimate") / "source"
    write_checkpoint(folder, SMALL_V3, 3)
    return folder


def test_the_rates_are_measured_and_no_file_is_left(source: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    plan = api.plan(source, 4)
    estimate = estimate_job(plan, tmp_path / "not" / "there")
    assert estimate.folder == tmp_path
    api.convert(source, tmp_path / "made", 4)
    written = [path.stat().st_size for path in (tmp_path / "made").iterdir() if path.name != MANIFEST]
    assert estimate.needed == sum(written) > plan.size
    assert estimate.read_rate > 0
    assert estimate.write_rate > 0
    assert estimate.measured < 20
    # Source and target are on one disk.
    assert estimate.seconds > plan.size / estimate.write_rate
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "made"]
    first, second = describe_estimate(estimate, is_cast=False)
    assert first.startswith(f"{tmp_path}: ")
    assert "rough: reads" in second


def test_nothing_is_measured_for_a_finished_target(source: Path, tmp_path: Path) -> None:
    api.convert(source, tmp_path / "target", 2)
    plan = api.plan(source, 2, target=tmp_path / "target")
    estimate = estimate_job(plan, tmp_path / "target")
    assert (estimate.needed, estimate.seconds, estimate.measured) == (0, 0, 0)
    assert len([*describe_estimate(estimate, is_cast=False)]) == 1


def test_a_folder_where_no_file_can_be_made_is_refused() -> None:
    with pytest.raises(Refused) as refused:
        measure_write_rate(Path("/proc/self"), 1 << 20)
    assert [(problem.kind, problem.subject) for problem in refused.value.problems] == [("cannot-write", "/proc/self")]


def test_a_source_that_has_gone_is_refused(source: Path, tmp_path: Path) -> None:
    plan = api.plan(source, 4)
    path = min(source.glob("*.safetensors"))
    path.rename(tmp_path / path.name)
    try:
        with pytest.raises(Refused) as refused:
            estimate_job(plan, tmp_path)
    finally:
        (tmp_path / path.name).rename(path)
    assert [(problem.kind, problem.subject) for problem in refused.value.problems] == [("cannot-read", str(path))]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "a second"), (41.2, "41 s"), (99, "99 s"), (150, "2 min"), (5990, "100 min"), (12_600, "3.5 h")],
)
def test_durations_are_as_rough_as_the_estimate(seconds: float, text: str) -> None:
    assert format_rough_time(seconds) == text
