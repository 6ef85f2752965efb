"""Strips: some rows of a weight whose codes lie column by column, taken out of the codes once, for all threads."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Event, Lock
from typing import Any, NamedTuple

from numpy.typing import NDArray


class Strip(NamedTuple):
    """What some rows of a weight are computed from."""

    codes: NDArray[Any]
    """uint8 [rows, bytes], as the rows of the weight have them; of experts as they lie: [columns, rows / 2]."""
    scales: NDArray[Any]
    """[rows, groups], as bit patterns; of experts as they lie: [columns, groups]."""
    zeros: NDArray[Any] | None
    """uint8 [rows, groups]; None where there are none."""


class StripStore:
    """The strips of a job, of which as many are kept as it has threads. The first thread that needs one makes it, and
    others wait for it.
    """

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._lock = Lock()
        self._strips: OrderedDict[tuple[int, int], tuple[Event, list[Strip]]] = OrderedDict()

    def take(self, key: tuple[int, int], make: Callable[[], Strip]) -> Strip:
        """Takes a strip. `key` is the number of the cast and that of the strip in it."""
        with self._lock:
            entry = self._strips.get(key)
            is_mine = entry is None
            ready, made = self._strips[key] = entry or (Event(), [])
            self._strips.move_to_end(key)
            while len(self._strips) > self._threads:
                self._strips.popitem(last=False)
        if not is_mine:
            ready.wait()
            if made:
                return made[0]
            return make()  # the other thread could not: this one says why
        try:
            made.append(make())
        except BaseException:
            with self._lock:
                self._strips.pop(key, None)
            raise
        finally:
            ready.set()
        return made[0]
