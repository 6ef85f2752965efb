"""Processes, perhaps on several machines, that do the shares of a job that only reads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from reshard.types import Progress, Share


class Workers(NamedTuple):
    """What runs shares, and how many of them."""

    most: int
    """So many shares at most."""
    run: Callable[[Callable[..., Any], Sequence[Mapping[str, Any]]], list[Any]]
    """Calls a function of a module, once with each of these arguments and with `progress`, in processes of their own;
    returns what it returns, in this order. Raises Refused.
    """


def run_shares(workers: Workers, call: Callable[..., Any], job: Any, fingerprint: str, things: int) -> list[Any]:
    """Runs the shares of a job: `call` with `job`, `share` and `progress`. There are no more than `things`, which are
    the least that a share may be; without any, none is run. Raises Refused.
    """
    count = min(workers.most, things)
    shares = [Share(number, count, fingerprint) for number in range(count)]
    return workers.run(call, [{"job": job, "share": share} for share in shares]) if shares else []


def open_workers(on: str | None, progress: Progress | None) -> Workers:
    """Opens the workers that `--on` names. Raises Refused."""
    raise NotImplementedError
