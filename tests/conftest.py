import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from families import write_small
from jobs import Job, convert_checkpoint


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reference", help="path to DeepSeek's own convert.py, to compare the outputs with")


# Before anything imports torch: with one worker a core, threads of torch that wait for work take the cores of others.
# The commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# An example that takes long on a busy machine is no fault.
hypothesis.settings.register_profile("reshard", deadline=None)
hypothesis.settings.load_profile("reshard")


def pytest_collection_finish() -> None:
    """Lets the garbage collector pass over torch, transformers and thousands of tests: they stay to the end."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    """Gives the commands that the tests start an interrupt that is not ignored, however the tests were started.

    Behind `nohup ... &` and `trap '' INT`, SIGINT is ignored, and so it would be in every child process. A handler
    is not inherited: the child begins with the default. This process still does nothing when the signal comes.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The small checkpoint of a family, in four files, written once. Nothing may be changed in it."""
    root = tmp_path_factory.mktemp("families")

    def of(name: str) -> Path:
        if not (root / name).exists():
            write_small(root / name, name)
        return root / name

    return of


@pytest.fixture(scope="session")
def converted(source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """The rank files of a family's small checkpoint, written once. Nothing may be changed in them."""
    root = tmp_path_factory.mktemp("converted")

    def of(name: str, ranks: int) -> Path:
        target = root / f"{name}-{ranks}"
        if not target.exists():
            convert_checkpoint(Job(source(name), ranks), target)
        return target

    return of
