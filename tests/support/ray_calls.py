"""What tests run on a Ray cluster. It knows nothing of pytest: processes of the cluster import it."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any

from reshard.errors import Problem, Refused, refuse
from reshard.execution.ray_progress import TaskPlace, TaskTeller
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


def add_after_the_death_of_the_board(*, one: int, other: int, must_know: bool, progress: TaskTeller) -> int:
    """Ends the process of the actor, which Ray begins again."""
    progress(0, 10)
    board = progress._board
    killed = board.__ray_call__.remote(end_process)
    with suppress(ray_exceptions().RayError):
        progress._ray.get(killed)
    if must_know:
        progress.has_begun()
    progress(10, 10)
    return one + other


def end_process(_: object) -> None:
    os._exit(1)


def ray_exceptions() -> Any:
    from ray import exceptions  # noqa: PLC0415

    return exceptions


def begin_again_and_again(*, progress: TaskTeller) -> None:
    """As a task whose processes Ray ends for want of memory: others begin it, more often than a death allows."""
    for process in range(2, 9):
        progress._board.begin.remote(progress._number, TaskPlace(os.uname().nodename, "", process))
    while True:
        sleep(0.05)


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
