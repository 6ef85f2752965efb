"""Targets of four ranks, small and quickly made; conversions that end too early; what tests look at in a target."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import Job, convert_checkpoint

import reshard.execution.execute
from reshard.execution import execute, finished_files
from reshard.synthetic import SMALL_V3, write_checkpoint

RANKS = 4
CONFIG = {**SMALL_V3, "num_hidden_layers": 2, "num_nextn_predict_layers": 0, "vocab_size": 512}


class Crash(BaseException):
    """The end of the program, without a word."""


def make_source_and_target(folder: Path) -> Path:
    """Makes the folder `source`, and beside it `whole`: its conversion for all ranks. Returns the first."""
    write_checkpoint(folder / "source", CONFIG, 2)
    convert_checkpoint(Job(folder / "source", RANKS), folder / "whole")
    return folder / "source"


def leave_unfinished(job: Job, target: Path) -> None:
    """Ends a conversion when it has copied everything, and not renamed it."""

    def crash(*_: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshard.execution.execute, "rename_to_final", crash)
        with pytest.raises(Crash):
            convert_checkpoint(job, target)


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"model{rank}-mp{RANKS}.safetensors"


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Of each file: another pair, if it is written again or replaced."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def crashes(run: Callable[[], object]) -> Iterator[int]:
    """Runs again and again, and ends the program behind its first step, its second, and so on, until a run gets
    through: files are made durable, renamed and removed.
    """
    steps = ("write_durable", "write_side_files", "remove_files", "sync_folder")
    for last in range(100):
        left = last

        def crash_behind(function: Callable[..., object]) -> Callable[..., object]:
            def step(*arguments: object, **options: object) -> object:
                nonlocal left
                result = function(*arguments, **options)
                if left == 0:
                    raise Crash
                left -= 1
                return result

            return step

        with pytest.MonkeyPatch.context() as patch:
            for module in (execute, finished_files):
                for name in {*steps} & {*vars(module)}:
                    patch.setattr(module, name, crash_behind(getattr(module, name)))
            patch.setattr(Path, "rmdir", crash_behind(Path.rmdir))
            patch.setattr(Path, "rename", crash_behind(Path.rename))
            patch.setattr(Path, "unlink", crash_behind(Path.unlink))
            try:
                run()
            except Crash:
                pass
            else:
                return
        yield last
    raise AssertionError("no run gets through")
