"""Verified against its source, a target must have the side files that it was made with, too."""

import json
from pathlib import Path

import pytest
from jobs import Job, convert_checkpoint

from reshard import verify
from reshard.cli.main import main
from reshard.synthetic import SMALL_V3, write_checkpoint

NAMES = ["tokenizer.json", "run_config.json"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sides") / "source"
    write_checkpoint(folder, SMALL_V3, 2)
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["missing-file", "wrong-checksum"])
def test_a_side_file_that_is_missing_or_changed_is_told_once(
    source: Path, tmp_path: Path, name: str, damage: str
) -> None:
    convert_checkpoint(Job(source, 2), tmp_path / "ranks")
    path = tmp_path / "ranks" / name
    if damage == "missing-file":
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "more": 1}))
    report = verify(tmp_path / "ranks", source)
    assert [(problem.kind, problem.subject) for problem in report.problems] == [(damage, name)]
    assert main(["verify", str(tmp_path / "ranks"), "--source", str(source)]) == 1


def test_without_a_manifest_the_tensors_are_all_that_is_compared(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(Job(source, 2), tmp_path / "ranks")
    for name in (*NAMES, "reshard.json"):
        (tmp_path / "ranks" / name).unlink()
    assert verify(tmp_path / "ranks", source).is_proven
