"""The hints of a verification: they agree with `repair` where it mends, or ask for the right source."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from vllm_models import write_case

import reshard
from reshard.cli.main import main
from reshard.synthetic import SMALL_V3, write_checkpoint

OFFSET = 400_000
"""In bytes, into the first rank file and the first file of a source: behind its header."""


def change_byte(path: Path, offset: int = OFFSET) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(1)
        file.seek(offset)
        file.write(bytes([before[0] ^ 0xFF]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With `source` and `ranks`, whose second rank is damaged."""
    write_checkpoint(tmp_path / "source", SMALL_V3, 1)
    reshard.convert(tmp_path / "source", tmp_path / "ranks", mp=2)
    change_byte(tmp_path / "ranks" / "model1-mp2.safetensors")
    return tmp_path


def verify(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["verify", str(folder / "ranks"), *more]) == 1
    return capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--source"]])
def test_the_hint_agrees_with_the_command_that_mends(
    folder: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = verify(folder, capsys, *(word for option in options for word in (option, str(folder / "source"))))
    assert "hint:     reshard repair writes it again" in said
    assert "\n  reshard repair " in said
    assert "convert again" not in said
    assert reshard.repair(folder / "ranks", folder / "source").is_proven


def test_a_missing_rank_may_be_copied_or_repaired(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "ranks" / "model1-mp2.safetensors").unlink()
    for more in ([], ["--source", str(folder / "source")]):
        said = verify(folder, capsys, *more)
        assert "else copy it there, or reshard repair writes it again" in said
        assert "convert again" not in said


def test_without_a_manifest_the_way_is_to_convert_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "ranks" / "reshard.json").rename(folder / "reshard.json")
    said = verify(folder, capsys, "--source", str(folder / "source"))
    assert "hint:     convert again, into another folder\n" in said
    assert "repair" not in said


@pytest.mark.parametrize("files", [1, 2])
def test_with_another_source_the_files_may_be_sound(
    folder: Path, files: int, capsys: pytest.CaptureFixture[str]
) -> None:
    change_byte(folder / "ranks" / "model1-mp2.safetensors")  # back to what it was
    assert reshard.verify(folder / "ranks").is_proven
    write_checkpoint(folder / "other", SMALL_V3, files, seed=1)  # one file: with the same header
    said = verify(folder, capsys, "--source", str(folder / "other"))
    assert "hint:     give the --source that this was made from" in said
    assert "repair" not in said
    assert "convert again" not in said


@pytest.mark.parametrize("manifest", ["there", "lost"])
def test_padding_of_a_source_is_no_fault_of_the_target(
    manifest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing reads the rows behind the vocabulary: neither a conversion nor a repair would change a byte."""
    write_case(tmp_path / "source", "qwen2")
    reshard.convert(tmp_path / "source", tmp_path / "ranks", mp=2, for_engine="vllm")
    (tmp_path / "ranks" / "reshard.json").rename(tmp_path / "reshard.json")
    path = tmp_path / "ranks" / "model-rank-1-part-0.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][-1, 0] = 1
    save_file(tensors, path)
    reshard.convert(tmp_path / "ranks", tmp_path / "whole", to="hf", recipe="vllm-qwen2")
    if manifest == "lost":
        (tmp_path / "whole" / "reshard.json").rename(tmp_path / "whole.json")
    assert main(["verify", str(tmp_path / "whole"), "--source", str(tmp_path / "ranks"), "--recipe", "vllm-qwen2"]) == 1
    said = capsys.readouterr().out
    assert "expected: zeros, behind the last row of lm_head.weight" in said
    assert "the source is damaged here, not the target" in said
    assert "repair" not in said
    (problem,) = reshard.verify(tmp_path / "ranks", tmp_path / "source").problems
    assert (problem.kind, problem.remedy) == ("differs", "convert again, into another folder")
