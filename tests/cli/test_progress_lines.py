"""The progress of a job as text: the rate is that of this run, the whole is said at the end only."""

import json

import pytest

from reshard.cli.progress_lines import (
    ProgressEvent,
    RateMeter,
    format_duration,
    format_json,
    format_progress,
    format_resumed,
)
from reshard.storage.counting import WorkState
from reshard.text import format_percent

GIB = 1 << 30


def event(state: WorkState | None, rate: float | None = None, kind: str = "progress", **more: object) -> ProgressEvent:
    return ProgressEvent(kind, "convert", state, rate, seconds=10.0, **more)  # type: ignore[arg-type]


def test_what_was_there_before_is_no_rate_of_this_run() -> None:
    """29 of 30 GiB were there; 0.5 GiB in five seconds leaves five seconds, not a sixth of one."""
    meter = RateMeter()
    meter.add(WorkState(29 * GIB, 30 * GIB, 29 * GIB), 100.0)
    assert meter.compute_rate(100.1) is None
    state = WorkState(29 * GIB + GIB // 2, 30 * GIB, 29 * GIB)
    meter.add(state, 105.0)
    rate = meter.compute_rate(105.0)
    assert rate == GIB / 10
    assert event(state, rate).seconds_left == 5.0
    assert format_resumed(state) == "resumed: 29.00 GiB were written before; 1.00 GiB are left"
    assert format_resumed(WorkState(5, 30)) == ""


def test_waiting_for_the_disk_has_a_rate_of_its_own() -> None:
    meter = RateMeter()
    meter.add(WorkState(0, 4 * GIB), 0.0)
    meter.add(WorkState(2 * GIB, 4 * GIB, unsynced=4 * GIB), 1.0)  # copied, at a rate that no disk has
    assert meter.compute_rate(1.2) is None
    state = WorkState(3 * GIB, 4 * GIB, unsynced=2 * GIB)
    meter.add(state, 9.0)
    rate = meter.compute_rate(9.0)
    assert rate == GIB / 4
    text = format_progress(event(state, rate))
    assert text == "75.0%, writing to disk: 2.00 GiB left, 256.00 MiB/s, 0:00:08 left"


def test_the_rate_is_that_of_the_last_minute() -> None:
    """A disk that becomes slow is seen, and a stall is no rate."""
    meter = RateMeter()
    for second in range(100):
        meter.add(WorkState(second * 100, 100_000), float(second))
    assert meter.compute_rate(99.0) == pytest.approx(100)
    for second in range(100, 200):
        meter.add(WorkState(9900 + second - 99, 100_000), float(second))
    assert meter.compute_rate(199.0) == pytest.approx(1)
    assert meter.compute_rate(259.5) == 0
    assert event(WorkState(1, 3), 0.0).seconds_left is None


def test_a_line_has_share_bytes_rate_and_time_in_one_style() -> None:
    state = WorkState(5 * GIB, 40 * GIB)
    assert format_progress(event(state, 1.25 * GIB)) == "12.5%, 5.00 GiB of 40.00 GiB, 1.25 GiB/s, 0:00:28 left"
    assert format_progress(event(state)) == "12.5%, 5.00 GiB of 40.00 GiB"
    assert format_progress(event(None)) == "reading headers and planning"
    done = event(WorkState(40 * GIB, 40 * GIB, 20 * GIB), kind="done")
    assert format_progress(done) == "done, 20.00 GiB in 0:00:10, 2.00 GiB/s"


def test_of_a_sample_no_rate_is_told() -> None:
    state = WorkState(5 * GIB, 40 * GIB)
    assert format_progress(event(state, GIB, is_sample=True)) == "12.5%, 5.00 GiB of 40.00 GiB, 0:00:35 left"
    assert format_progress(event(state, kind="done", is_sample=True)) == "done, 40.00 GiB in 0:00:10"


def test_no_share_but_the_whole_is_a_hundred_percent() -> None:
    assert format_percent(10**15 - 1, 10**15) == "99.9%"
    assert format_percent(7, 7) == "100.0%"
    assert format_percent(0, 0) == "100.0%"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00:00"), (67, "0:01:07"), (3599.6, "1:00:00"), (360_000, "100:00:00")]
)
def test_a_time_is_hours_minutes_seconds(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_an_event_in_json_is_one_line() -> None:
    found = json.loads(format_json(event(WorkState(6, 10, 2, unsynced=8), 2.0, kind="asked"), {"more": "\n"}))
    assert found == {
        "event": "progress",
        "job": "convert",
        "phase": "disk",
        "bytes": 6,
        "total": 10,
        "resumed": 2,
        "unsynced": 8,
        "rate": 2,
        "seconds": 10.0,
        "seconds_left": 4.0,
        "received": 0,
        "more": "\n",
    }
    assert "\n" not in format_json(event(None), {"more": "\n"})
    phases = [json.loads(format_json(event(state, kind=kind), {}))["phase"] for state, kind in (
        (None, "progress"), (WorkState(1, 2), "progress"), (WorkState(2, 2), "done"),
    )]  # fmt: skip
    assert phases == ["plan", "work", "done"]


def test_the_end_of_a_target_in_a_store_is_not_of_a_disk() -> None:
    waiting = event(WorkState(9, 10, unsynced=0, is_stored=True))
    assert format_progress(waiting).startswith("90.0%, completing files in the store")
    assert "disk" not in format_progress(waiting)
    assert json.loads(format_json(waiting, {}))["phase"] == "store"
    left = event(WorkState(9, 10, unsynced=1 << 20, is_stored=True))
    assert "completing files in the store: 1.00 MiB left" in format_progress(left)
