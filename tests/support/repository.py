"""Where the parts of this repository lie, and its test files by their names, which stand there once."""

from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"


@cache
def find_test_file(name: str) -> Path:
    """Finds a test file in the folders below `tests/`."""
    (path,) = TESTS.rglob(name)
    return path
