"""What every command prints alike, and the exit codes."""

import json
import sys

PROVEN, PROBLEMS, REFUSED = 0, 1, 2
INTERRUPTED, CLOSED_PIPE = 130, 141
"""As a shell has them for SIGINT and SIGPIPE."""


def print_json(value: object) -> None:
    """As one JSON document on standard output."""
    json.dump(value, sys.stdout, indent=1)
    print()
