"""Targets of four ranks, small and quickly made; conversions that end too early; what tests look at in a target."""

from pathlib import Path

import pytest
from jobs import Job, convert_checkpoint

import reshard.execution.execute
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
