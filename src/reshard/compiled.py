"""The look-up of `casts` as a plain loop, compiled where numba is installed: same tables, same bits."""

from collections.abc import Callable
from functools import cache
from typing import Any

from numpy.typing import NDArray

from reshard.tiles import Pair

Recode = Callable[[NDArray[Any], NDArray[Any], Pair, Pair, NDArray[Any], NDArray[Any]], None]
"""Called with codes, pages, group, phase, table and out: see `casts.recode`."""


@cache
def compiled_recode() -> Recode | None:
    """The loop below, compiled at its first call; None without numba. The import alone takes a second or more."""
    try:
        import numba  # noqa: PLC0415 - only when a cast is really run
    except ImportError:
        return None
    compiled: Recode = numba.njit(nogil=True)(recode_each)
    return compiled


def recode_each(
    codes: NDArray[Any], pages: NDArray[Any], group: Pair, phase: Pair, table: NDArray[Any], out: NDArray[Any]
) -> None:
    """See `casts.recode`. Run as it stands, without numba, it is right too, and slow."""
    rows, columns = codes.shape
    for row in range(rows):
        line = (row + phase[0]) // group[0]
        start = 0
        for place in range(pages.shape[1]):
            stop = min(columns, (place + 1) * group[1] - phase[1])
            page = table[pages[line, place]]
            for column in range(start, stop):
                out[row, column] = page[codes[row, column]]
            start = stop
