"""Shows the progress of a command on standard error: a bar, lines of a log, JSON, or a line when SIGUSR1 asks."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from reshard import __version__
from reshard.cli.outcome import STATUS_REQUESTS, print_aside
from reshard.cli.progress_lines import (
    ProgressEvent,
    RateMeter,
    format_json,
    format_progress,
    format_resumed,
)
from reshard.storage.counting import RECEIVED, ProgressView, WorkState
from reshard.storage.remote_store import LISTENERS
from reshard.text import escape, hide_secrets

INTERVALS = {"bar": 0.2, "log": 30.0, "json": 1.0, "none": None}
"""In seconds, between two reports; None: only when somebody asks."""

DUMB = ("dumb", "unknown")
"""Terminals that cannot move the cursor, as TERM names them."""

Report = Callable[[ProgressEvent], None]
"""Prints an event. It is called by one thread only."""

END_SECONDS = 5.0
"""At the end a thread that hangs on a pipe nobody reads is left alone after so many seconds."""


class JobWatch(ProgressView):
    """Keeps how far a job is, and reports it from a thread of its own: also while nothing moves. The job waits for no
    report, and none can fail it: a terminal may be closed, and the reader of a pipe may sleep.
    """

    def __init__(
        self,
        title: str,
        report: Report,
        interval: float | None,
        *,
        is_sample: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._report = report
        self._interval = interval
        self._is_sample = is_sample
        self._clock = clock
        self._lock = Lock()
        self._meter, self._receiving = RateMeter(), RateMeter()
        self._received_before = RECEIVED.size
        self._first: WorkState | None = None
        self._state: WorkState | None = None
        self._began = clock()
        # Of this queue only `put` is allowed in a signal handler: it takes no lock that the handler's thread may hold.
        self._requests: SimpleQueue[str] = SimpleQueue()
        self._told: SimpleQueue[str] = SimpleQueue()
        self._thread = Thread(target=self._report_all, daemon=True)

    def show(self, state: WorkState) -> None:
        """Receives how far the job is."""
        now = self._clock()
        with self._lock:
            is_first, self._state = self._first is None, state
            if is_first:
                self._first, self._began = state, now
            self._meter.add(state, now)
        if is_first:
            self._requests.put("start")

    def start(self) -> None:
        """Starts the thread that reports."""
        self._thread.start()

    def ask(self) -> None:
        """Has the thread report at once. Safe in a signal handler."""
        self._requests.put("asked")

    def tell(self, line: str) -> None:
        """Has the thread print what a store makes us do: only so it does not break a bar."""
        self._told.put(line)
        self._requests.put("told")

    def end(self, *, is_done: bool) -> None:
        """Reports the end of a job that had begun, or was done before it began; ends the thread."""
        if is_done and self._state is None:
            self.show(WorkState(0, 0))
        self._requests.put("done" if is_done else "stopped")
        self._thread.join(END_SECONDS)

    def _report_all(self) -> None:
        has_begun = False
        for request in self._take_requests():
            with self._lock:
                now = self._clock()
                first, state, rate = self._first, self._state, self._meter.compute_rate(now)
                seconds = now - self._began
            received = RECEIVED.size - self._received_before
            self._receiving.add(WorkState(received, 0), now)
            told = self._told.get() if request == "told" else ""
            wire = received, self._receiving.compute_rate(now), told
            # A report by the clock may come before the request to report the start.
            if first and not has_begun:
                has_begun = True
                self._report_safely(ProgressEvent("start", self._title, first, None, 0.0, self._is_sample, *wire[:1]))
            if request != "start" and (has_begun or request != "stopped"):
                self._report_safely(ProgressEvent(request, self._title, state, rate, seconds, self._is_sample, *wire))

    def _report_safely(self, event: ProgressEvent) -> None:
        with suppress(OSError):
            self._report(event)

    def _take_requests(self) -> Iterator[str]:
        request = ""
        while request not in ("done", "stopped"):
            try:
                request = self._requests.get(timeout=self._interval)
            except Empty:
                request = "progress"
            yield request


def make_log_report(title: str, words: Sequence[str]) -> Report:
    """Makes the lines of a log: what runs, if there are `words`, and how far it is, each with the time of day."""
    is_first = bool(words)

    def report(event: ProgressEvent) -> None:
        nonlocal is_first
        lines = [f"reshard {__version__}: {escape(shlex.join(words))}"] if is_first else []
        is_first = False
        if event.event == "start" and event.state:
            lines += [f"{title}: {format_resumed(event.state)}"] if event.state.resumed else []
        elif event.event == "told":
            lines.append(f"{title}: {escape(event.told)}")
        elif event.event != "stopped":
            lines.append(f"{title}: {format_progress(event)}")
        for line in lines:
            print_aside(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    return report


def make_json_report(_title: str, words: Sequence[str]) -> Report:
    """Makes a line of JSON of each event."""

    def report(event: ProgressEvent) -> None:
        more = {"reshard": __version__, "command": [*words]} if event.event == "start" else {}
        print_aside(format_json(event, more))

    return report


def make_silent_report(title: str, _words: Sequence[str]) -> Report:
    """Makes a line only when somebody asks for it."""

    def report(event: ProgressEvent) -> None:
        if event.event == "asked":
            print_aside(f"{title}: {format_progress(event)}")

    return report


def make_bar_report(title: str, _words: Sequence[str]) -> Report:
    """Makes a bar."""
    # Slow to import, and needed on a terminal only.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, TextColumn  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}", markup=False))
    # It is drawn anew by our thread, and needs none of its own. It leaves standard output alone: if the terminal were
    # closed, it would not give it back.
    console = Console(stderr=True, force_terminal=True)
    bar = Bar(*columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    task = bar.add_task(title, total=None, status="")

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def report(event: ProgressEvent) -> None:
        state = event.state
        if event.event == "asked":
            say(f"{title}: {format_progress(event)}")
        if event.event == "told":
            say(f"{title}: {escape(event.told)}")
        if state is None or not state.total:
            return  # all was done before
        if event.event == "start":
            if state.resumed:
                say(f"{title}: {format_resumed(state)}")
            bar.start()
        if event.event != "stopped":
            bar.update(task, total=state.total, completed=state.done, status=format_progress(event), refresh=True)
        if event.event in ("done", "stopped"):
            bar.stop()

    return report


REPORTS: Mapping[str, Callable[[str, Sequence[str]], Report]] = {
    "bar": make_bar_report,
    "log": make_log_report,
    "json": make_json_report,
    "none": make_silent_report,
}


@contextmanager
def show_progress(title: str, options: argparse.Namespace, *, is_first: bool = True) -> Iterator[ProgressView]:
    """Yields a progress function that shows how far a command is, in the way that its options choose. Only the log of
    its first step names the command.
    """
    mode = choose_mode(options)
    words = [*map(hide_secrets, getattr(options, "words", [title]))] if is_first or mode != "log" else []
    report = REPORTS[mode](title, words)
    watch = JobWatch(title, report, INTERVALS[mode], is_sample=bool(getattr(options, "sample", None)))
    STATUS_REQUESTS.append(watch.ask)
    listeners, LISTENERS[:] = [*LISTENERS], [watch.tell]
    watch.start()
    is_done = False
    try:
        yield watch
        is_done = True
    finally:
        STATUS_REQUESTS.remove(watch.ask)
        LISTENERS[:] = listeners
        watch.end(is_done=is_done)


def choose_mode(options: argparse.Namespace) -> str:
    """Chooses how progress is shown: a bar on a terminal, else lines of a log; with --quiet none, unless asked for."""
    asked = getattr(options, "progress", None) or ("none" if getattr(options, "quiet", False) else "auto")
    if asked != "auto":
        return str(asked)
    return "bar" if sys.stderr.isatty() and os.environ.get("TERM") not in DUMB else "log"
