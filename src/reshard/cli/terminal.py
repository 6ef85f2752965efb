"""What commands print: JSON, progress; and the exit codes."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock

from reshard.text import size_text

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
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives the function that is to be told of the bytes done, of `total`."""
    if not sys.stderr.isatty():
        yield locked(plain_lines(title, total))
        return
    # Heavy, and of use on a terminal only.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda size: bar.advance(task, size)


def locked(advance: Callable[[int], None]) -> Callable[[int], None]:
    """The same function, for several threads."""
    lock = Lock()

    def one_at_a_time(size: int) -> None:
        with lock:
            advance(size)

    return one_at_a_time


def plain_lines(title: str, total: int) -> Callable[[int], None]:
    """A line for each tenth of the bytes, and none within a second of the one before."""
    started = said_at = time.monotonic()
    whole = size_text(total)
    done = said = 0

    def advance(size: int) -> None:
        nonlocal done, said, said_at
        done += size
        step = done * PLAIN_STEPS // total if total else 0
        now = time.monotonic()
        if step > said and now - said_at >= PLAIN_SECONDS:
            said, said_at, seconds = step, now, now - started
            left = (total - done) * seconds / done
            rate = size_text(int(done / seconds))
            print_aside(f"{title}: {done / total:.0%} of {whole}, {rate}/s, {left:.0f} s left")

    return advance
