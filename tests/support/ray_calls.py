"""What tests run on a Ray cluster. It knows nothing of pytest: processes of the cluster import it."""

import os
import signal
from pathlib import Path
from time import sleep

from reshard.errors import Problem, Refused, refuse
from reshard.types import Progress


def add_numbers(*, one: int, other: int, progress: Progress) -> int:
    progress(0, 10)
    progress(10, 10)
    return one + other


def refuse_odd(*, number: int, progress: Progress) -> int:
    progress(0, 1)
    if number % 2:
        raise Refused([Problem("odd", f"number {number}", "odd", "even"), Problem("odd", "and another", "odd", "even")])
    return number


def fail_by_system(*, path: str, progress: Progress) -> bytes:
    progress(0, 1)
    return Path(path).read_bytes()


def fail_by_mistake(*, progress: Progress) -> None:
    progress(0, 1)
    raise KeyError("a mistake of our own")


def die(*, progress: Progress) -> None:
    progress(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_ever_beside_a_refusal(*, number: int, folder: str, progress: Progress) -> None:
    """Number 0 waits, and notes how it ends; number 1 is refused once 0 waits."""
    progress(0, 1)
    if number == 0:
        try:
            with Path(folder, "waits").open("w"):
                while True:  # an interrupt by Ray is no signal: it ends no call of the system
                    sleep(0.05)
        except KeyboardInterrupt:
            Path(folder, "cancelled").touch()
            raise
    else:
        with Path(folder, "waits").open("rb"):
            raise refuse("odd", "number 1", "odd", "even")
