"""Prints JSON and progress."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from reshard.cli.outcome import print_aside
from reshard.text import format_size
from reshard.types import Progress


def print_json(value: object) -> None:
    """Prints one JSON document on standard output."""
    json.dump(value, sys.stdout, indent=1)
    print()


PLAIN_STEPS = 10
"""Maximum number of plain progress lines for a job."""

PLAIN_SECONDS = 1.0
"""Minimum time between two plain progress lines, in seconds."""


@contextmanager
def show_progress(title: str) -> Iterator[Progress]:
    """Yields a function that shows progress on standard error: a bar on a terminal, else plain lines."""
    if not sys.stderr.isatty():
        yield print_lines(title)
        return
    # Slow to import, and needed on a terminal only.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Bar(*columns, console=Console(stderr=True))
    task = bar.add_task(title, total=None, start=False)

    def show(done: int, total: int) -> None:
        if not done:
            bar.start()
            bar.start_task(task)
        bar.update(task, total=total, completed=done)

    try:
        yield show
    finally:
        bar.stop()


def print_lines(title: str) -> Progress:
    """Makes a function that prints a line for each tenth of the bytes, at most one in PLAIN_SECONDS."""
    started = printed_at = time.monotonic()
    printed = 0

    def show(done: int, total: int) -> None:
        nonlocal started, printed, printed_at
        now = time.monotonic()
        if not done:
            started = printed_at = now
        step = done * PLAIN_STEPS // total if total else 0
        if step > printed and now - printed_at >= PLAIN_SECONDS:
            printed, printed_at, seconds = step, now, now - started
            left = (total - done) * seconds / done
            rate = format_size(int(done / seconds))
            print_aside(f"{title}: {done / total:.0%} of {format_size(total)}, {rate}/s, {left:.0f} s left")

    return show
