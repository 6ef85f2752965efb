"""Finds which share a process is to make by the variables that Slurm, torchrun, MPI and Kubernetes set."""

from collections.abc import Mapping

from reshard.errors import refuse
from reshard.types import Share


def find_share(variables: Mapping[str, str], count: int | None) -> Share:
    """Finds the number of a share and, unless it is given, the number of shares. Raises Refused."""
    raise refuse("wrong-option", "--share", f"auto, of {count} and {len(variables)}", "not built yet")
