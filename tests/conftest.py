import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reference", help="path to DeepSeek's own convert.py, to compare the outputs with")
