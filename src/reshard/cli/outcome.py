"""Exit codes, messages on standard error, requests for a status line. Imports nothing slow: the help needs it too."""

import sys
from collections.abc import Callable
from contextlib import suppress

PROVEN, PROBLEMS, REFUSED = 0, 1, 2
"""Exit codes: success, differences found, refused."""

INTERNAL = 70
"""Exit code of a bug of reshard: EX_SOFTWARE of sysexits.h."""

INTERRUPTED, CLOSED_PIPE = 130, 141
"""Exit codes after SIGINT and SIGPIPE, as shells use them."""


def print_aside(text: str) -> None:
    """Prints on standard error. Errors are ignored: a closed terminal or a full disk under a log must neither end a job
    of hours nor change its exit code.
    """
    with suppress(OSError):
        # In one piece: what another thread prints must not come between a line and its end.
        print(f"{text}\n", end="", file=sys.stderr, flush=True)


STATUS_REQUESTS: list[Callable[[], None]] = []
"""What is to be called when somebody asks how far the job is; it must be safe in a signal handler."""


def ask_for_status() -> None:
    """Asks the job that runs, if there is one, to print how far it is."""
    for ask in tuple(STATUS_REQUESTS):
        ask()
