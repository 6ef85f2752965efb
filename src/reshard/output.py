"""What every command prints alike, and the exit codes."""

import json
import sys

PROVEN, PROBLEMS, REFUSED, INTERRUPTED = 0, 1, 2, 130


def print_json(value: object) -> None:
    """As one JSON document on standard output."""
    json.dump(value, sys.stdout, indent=1)
    print()
