"""Names the process that has a lock, for people; and tells on its own machine whether it has ended."""

import os
import re
import time
from pathlib import Path
from socket import gethostname

from reshard.errors import Refused, refuse

HOLDER_WIDTH = 128
"""In characters."""

HOLDER_TEXT = re.compile(r"process (\d{1,10}) on ([\w.-]{1,64}) since (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)", re.ASCII)


def describe_holder() -> str:
    """Describes this process, in HOLDER_WIDTH characters: its number, its host, the time."""
    return f"process {os.getpid()} on {name_host()} since {time.strftime('%Y-%m-%d %H:%M:%S')}".ljust(HOLDER_WIDTH)


def name_host() -> str:
    """The name of this host, in characters that need no escape."""
    return re.sub(r"[^\w.-]", "-", gethostname(), flags=re.ASCII)[:64] or "-"


def identify_machine() -> str:
    """Identifies the machine, its boot, and the space in which its process numbers are told: containers of one machine,
    even with one name, each have their own. Empty if the system does not tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{name_host()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except (OSError, ValueError):
        return ""


def read_start_time(process: int) -> int:
    """The time at which a process of this machine began, in ticks of its kernel; 0 if that is not told."""
    try:
        told = Path("/proc", str(process), "stat").read_text(encoding="utf-8", errors="replace")
        return int(told.rpartition(")")[2].split()[19])  # the name of the program before it may hold anything
    except (OSError, ValueError, IndexError):
        return 0


def is_gone(machine: str, process: int, started: int) -> bool:
    """Whether a process has ended, for sure: it was on this machine, and its number is free, or is another's by now."""
    if not machine or machine != identify_machine() or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is there, and another user's; or no number of a process
        pass
    now = read_start_time(process)
    return 0 not in (started, now) and started != now


def refuse_in_use(target: Path, holder: str) -> Refused:
    """Makes the refusal of a target that another process writes to."""
    remedy = (
        "wait for it to end; or give each --ranks a folder of its own, copy the folders into one, and run the "
        "command there once more without --ranks"
    )
    return refuse("target-in-use", str(target), f"{holder} is writing to it", "a target of our own", remedy)
