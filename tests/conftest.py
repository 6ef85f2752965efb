from collections.abc import Callable
from pathlib import Path

import pytest
from families import write_small


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reference", help="path to DeepSeek's own convert.py, to compare the outputs with")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The small checkpoint of a family, in four files, written once. Nothing may be changed in it."""
    root = tmp_path_factory.mktemp("families")

    def of(name: str) -> Path:
        if not (root / name).exists():
            write_small(root / name, name)
        return root / name

    return of
