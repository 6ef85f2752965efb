"""Prints JSON."""

import json
import sys


def print_json(value: object) -> None:
    """Prints one JSON document on standard output."""
    json.dump(value, sys.stdout, indent=1)
    print()
