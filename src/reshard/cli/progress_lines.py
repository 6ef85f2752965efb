"""The progress of a job as text: rate and time left, lines for a log, JSON. Opens nothing and asks no clock."""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from reshard.storage.counting import WorkState
from reshard.text import format_percent, format_rate, format_size

WINDOW_SECONDS = 60.0
"""The rate is that of so many seconds: it follows a disk that slows down, and evens out how a disk takes its bytes."""

SAMPLE_SECONDS = 0.25
"""Time between two samples of the bytes done."""

SHORTEST_WINDOW = 0.5
"""In seconds: no rate is told of a shorter time."""


class RateMeter:
    """The rate of this run: what was there before it is not counted."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()
        self._state = WorkState(0, 0)

    def add(self, state: WorkState, now: float) -> None:
        """Adds a sample. Waiting for the disk is measured by itself: it has another rate than copying."""
        if (state.unsynced is None) != (self._state.unsynced is None):
            self._samples.clear()
        self._state = state
        if not self._samples or now - self._samples[-1][0] >= SAMPLE_SECONDS:
            self._samples.append((now, get_measured_bytes(state)))

    def compute_rate(self, now: float) -> float | None:
        """Computes the rate in bytes a second; None if too little time has gone by to know it."""
        while len(self._samples) > 1 and self._samples[1][0] <= now - WINDOW_SECONDS:
            self._samples.popleft()
        if not self._samples or now - self._samples[0][0] < SHORTEST_WINDOW:
            return None
        began, before = self._samples[0]
        return (get_measured_bytes(self._state) - before) / (now - began)


def get_measured_bytes(state: WorkState) -> int:
    return state.done if state.unsynced is None else -state.unsynced


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """How far a job is at a moment."""

    event: str
    """`start`, `progress`, `asked` (by a signal), `told`, `done` or `stopped`."""
    title: str
    """What is done, such as `convert`."""
    state: WorkState | None
    """None while the headers are read and the plan is made."""
    rate: float | None
    """In bytes a second; None if it is not known."""
    seconds: float
    """Since the work began."""
    is_sample: bool = False
    """Whether most bytes are left out: then their rate is no rate of any disk, and is not told."""
    received: int = 0
    """In bytes: how much has come from stores, headers and what was asked for again included."""
    receive_rate: float | None = None
    """In bytes a second; None if it is not known."""
    told: str = ""
    """What a store makes us do, such as to wait; of the event `told`."""

    @property
    def left(self) -> int:
        """The bytes that are measured by the rate and still to be done."""
        if self.state is None:
            return 0
        return self.state.total - self.state.done if self.state.unsynced is None else self.state.unsynced

    @property
    def seconds_left(self) -> float | None:
        """By the rate; None if it is not known."""
        return self.left / self.rate if self.rate else None


def format_duration(seconds: float) -> str:
    """Formats a time as hours, minutes and seconds: `0:01:07`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def format_progress(event: ProgressEvent) -> str:
    """Formats an event in words, without a title: share, bytes, rate, time left."""
    state = event.state
    if state is None:
        return ", ".join(["reading headers and planning", *format_received(event)])
    if event.event == "done":
        size = state.total - state.resumed
        rate = [] if event.is_sample or event.seconds < SHORTEST_WINDOW else [format_rate(size / event.seconds)]
        done = f"done, {format_size(size)} in {format_duration(event.seconds)}"
        return ", ".join([done, *rate, *format_received(event)])
    parts = [format_percent(state.done, state.total)]
    if state.unsynced is None:
        parts.append(f"{format_size(state.done)} of {format_size(state.total)}")
    else:
        doing = "completing files in the store" if state.is_stored else "writing to disk"
        parts.append(f"{doing}: {format_size(state.unsynced)} left" if state.unsynced else doing)
    parts += [] if event.rate is None or event.is_sample else [format_rate(event.rate)]
    parts += [] if event.seconds_left is None else [f"{format_duration(event.seconds_left)} left"]
    return ", ".join([*parts, *format_received(event)])


def format_received(event: ProgressEvent) -> list[str]:
    """Formats what has come from stores; empty if nothing has."""
    is_moving = event.receive_rate is not None and event.event != "done"
    rate = f" at {format_rate(event.receive_rate or 0)}" if is_moving else ""
    return [f"{format_size(event.received)} from the store{rate}"] if event.received else []


def format_resumed(state: WorkState) -> str:
    """Formats what was done before this run; empty if nothing was."""
    if not state.resumed:
        return ""
    left = format_size(state.total - state.resumed)
    return f"resumed: {format_size(state.resumed)} were written before; {left} are left"


def format_json(event: ProgressEvent, more: Mapping[str, object]) -> str:
    """Formats an event as one line of JSON, with more fields behind its own."""
    state = event.state
    if event.event == "done":
        phase = "done"
    elif state is None:
        phase = "plan"
    elif state.unsynced is None:
        phase = "work"
    else:
        phase = "store" if state.is_stored else "disk"
    rate, left = event.rate, event.seconds_left
    value = {
        "event": "progress" if event.event == "asked" else event.event,
        "job": event.title,
        "phase": phase,
        "bytes": state.done if state else None,
        "total": state.total if state else None,
        "resumed": state.resumed if state else None,
        "unsynced": state.unsynced if state else None,
        "rate": None if rate is None or event.is_sample else int(rate),
        "seconds": round(event.seconds, 1),
        "seconds_left": None if left is None else round(left, 1),
        "received": event.received,
        **({"text": event.told} if event.told else {}),
    }
    return json.dumps({**value, **more})
