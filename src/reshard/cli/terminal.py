"""What commands print: JSON, progress; and the exit codes."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from reshard.text import format_size
from reshard.types import Progress

PROVEN, PROBLEMS, REFUSED = 0, 1, 2

INTERNAL = 70
"""A fault of ours, by the name EX_SOFTWARE of sysexits.h."""

INTERRUPTED, CLOSED_PIPE = 130, 141
"""As a shell has them for SIGINT and SIGPIPE."""


def print_json(value: object) -> None:
    """As one JSON document on standard output."""
    json.dump(value, sys.stdout, indent=1)
    print()


def print_aside(text: str) -> None:
    """On standard error. Whoever listened there may be gone, or the disk of a log full: that ends no job of hours, and
    changes no exit code.
    """
    with suppress(OSError):
        print(text, file=sys.stderr)


PLAIN_STEPS = 10
"""At most so many plain lines for a whole job."""

PLAIN_SECONDS = 1.0


@contextmanager
def show_progress(title: str) -> Iterator[Progress]:
    """Gives the function that shows the bytes done on standard error: as a bar on a terminal, else as plain lines."""
    if not sys.stderr.isatty():
        yield print_lines(title)
        return
    # Heavy, and of use on a terminal only.
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
    """A line for each tenth of the bytes, and none within a second of the one before."""
    started = said_at = time.monotonic()
    said = 0

    def show(done: int, total: int) -> None:
        nonlocal started, said, said_at
        now = time.monotonic()
        if not done:
            started = said_at = now
        step = done * PLAIN_STEPS // total if total else 0
        if step > said and now - said_at >= PLAIN_SECONDS:
            said, said_at, seconds = step, now, now - started
            left = (total - done) * seconds / done
            rate = format_size(int(done / seconds))
            print_aside(f"{title}: {done / total:.0%} of {format_size(total)}, {rate}/s, {left:.0f} s left")

    return show
