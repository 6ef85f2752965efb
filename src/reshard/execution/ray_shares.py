"""The shares of a job that only reads, and the processes that do them, perhaps on several machines."""

from collections.abc import Callable
from functools import partial
from typing import Any

from reshard.execution.ray_connection import parse_ray
from reshard.execution.ray_tasks import connect_to_ray
from reshard.types import Progress, Share

RunShares = Callable[[Callable[..., Any], Any, str, int], list[Any]]
"""Runs the shares of a job in processes of their own: calls a function of a module with `job`, `share` and `progress`.
Receives that function, the job, its fingerprint, and the most shares that it can be cut into; without any, nothing is
run. Returns what the calls return, in the order of the shares. Raises Refused.
"""


def open_workers(on: str, progress: Progress | None) -> RunShares:
    """Opens the workers that `--on` names, which are asked for when there is something to do. Raises Refused."""
    return partial(run_shares_on_ray, parse_ray(on), progress)


def run_shares_on_ray(
    address: str | None, progress: Progress | None, call: Callable[..., Any], job: Any, fingerprint: str, most: int
) -> list[Any]:
    """Runs the shares of a job on a Ray cluster, as many as it has processors. Raises Refused."""
    if not most:
        return []
    with connect_to_ray(address) as cluster:
        tasks = list_share_tasks(job, fingerprint, min(max(1, cluster.processors), most))
        return [result.value for result in cluster.run(call, tasks, progress)]


def list_share_tasks(job: Any, fingerprint: str, count: int) -> list[dict[str, Any]]:
    """Lists the arguments of each share of a job."""
    return [{"job": job, "share": Share(number, count, fingerprint)} for number in range(count)]
