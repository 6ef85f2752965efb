"""Exit codes, and messages on standard error. It imports nothing slow: the help needs it too."""

import sys
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
        print(text, file=sys.stderr)
