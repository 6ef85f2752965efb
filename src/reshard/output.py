"""What every command prints alike, and the exit codes."""

import json
import sys
from contextlib import suppress

PROVEN, PROBLEMS, REFUSED = 0, 1, 2
INTERNAL = 70
"""A fault of ours, by the name EX_SOFTWARE of sysexits.h."""
INTERRUPTED, CLOSED_PIPE = 130, 141
"""As a shell has them for SIGINT and SIGPIPE."""


def print_json(value: object) -> None:
    """As one JSON document on standard output."""
    json.dump(value, sys.stdout, indent=1)
    print()


def print_aside(text: str) -> None:
    """On standard error. Whoever listened there may be gone, or the disk of a log full: that ends no job of hours, and
    changes no exit code.
    """
    with suppress(OSError):
        print(text, file=sys.stderr)
