"""Shares: the parts of a conversion that several processes make, perhaps on several machines.

Each plans for itself, and all come to the same parts.
"""

import os
import re
from collections.abc import Mapping

from reshard.errors import refuse
from reshard.formats.share_assignment import assign_to_shares
from reshard.planning.plan import Plan
from reshard.planning.planner import keep_ranks
from reshard.planning.share_variables import find_share
from reshard.types import MOST_RANKS, Share

NUMBERED = re.compile(r"(\d{1,6})/(\d{1,6})", re.ASCII)
FOUND = re.compile(r"auto(?:/([1-9]\d{0,5}))?", re.ASCII)


def read_share(given: str | Share | None) -> Share | None:
    """Reads the value of `--share`, with the variables of this process. Raises Refused."""
    share = parse_share(given, os.environ) if isinstance(given, str) else given
    return share if share is None else require_share(share)


def require_share(share: Share) -> Share:
    """Returns a share. Raises Refused if its numbers are none."""
    if not (isinstance(share, Share) and type(share.number) is type(share.shares) is int):
        raise refuse("wrong-option", "--share", repr(share), 'I/N, such as "0/4"')
    if not 0 <= share.number < share.shares <= MOST_RANKS:
        expected = f"numbers from 0 on, such as 0/{share.shares} to {share.shares - 1}/{share.shares}"
        if not 0 < share.shares <= MOST_RANKS:
            expected = f"1 to {MOST_RANKS} shares"
        raise refuse("wrong-option", "--share", str(share), expected)
    return share


def parse_share(text: str, variables: Mapping[str, str]) -> Share:
    """Parses `I/N`; or finds both numbers (`auto`), or the first (`auto/N`), in the `variables` of the environment.
    Raises Refused.
    """
    if automatic := FOUND.fullmatch(text.strip()):
        share = find_share(variables, int(automatic[1]) if automatic[1] else None)
    elif numbered := NUMBERED.fullmatch(text.strip()):
        share = Share(int(numbered[1]), int(numbered[2]))
    else:
        expected = "I/N, such as 0/4 for the first of four; or auto, or auto/N"
        raise refuse("wrong-option", "--share", repr(text), expected)
    return require_share(share)


def find_share_of_files(plan: Plan, count: int) -> dict[str, int]:
    """Finds the number of the share that makes each file of a plan, by the name of the file."""
    shares = assign_to_shares([file.size for file in plan.files], count)
    return {plan.files[index].name: number for number, share in enumerate(shares) for index in share}


def keep_share(plan: Plan, share: Share) -> Plan:
    """Keeps the files of a share only; of a plan with all files."""
    mine = find_share_of_files(plan, share.shares)
    return keep_ranks(plan, [file.rank for file in plan.files if mine[file.name] == share.number])
