"""`inspect --tensors`: what it lists, against the safetensors package; patterns, order and refusals."""

import json
from pathlib import Path

import pytest
import torch
from families import write_small
from jobs import Job, convert_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file

import reshard
from reshard.cli.main import main
from reshard.errors import Refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files, its rank files, and a file that no recipe fits."""
    made = tmp_path_factory.mktemp("listed")
    write_small(made / "whole", "deepseek-v3")
    convert_checkpoint(Job(made / "whole", 2), made / "ranks")
    odd = {f"block.{number}.w": torch.zeros(number, 3, dtype=torch.bfloat16) for number in range(130)}
    save_file(odd | {"a\nb": torch.zeros(()), "x" * 300: torch.zeros(2)}, made / "odd.safetensors")
    return made


def stored(path: Path) -> set[tuple[str, str, tuple[int, ...], str]]:
    """Of all files: name, dtype, shape and file, as the safetensors package has them."""
    found = set()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                part = opened.get_slice(name)
                found.add((name, part.get_dtype(), tuple(part.get_shape()), file.name))
    return found


@pytest.mark.parametrize("kind", ["whole", "ranks", "odd.safetensors", "ranks/model1-mp2.safetensors"])
def test_everything_is_listed_with_its_file(folder: Path, kind: str) -> None:
    content = reshard.inspect(folder / kind, tensors="*")
    assert content.listed is not None
    listed = [(tensor.name, tensor.dtype, tensor.shape, tensor.file) for tensor in content.listed]
    assert len(listed) == content.tensors
    assert set(listed) == stored(folder / kind)
    assert sum(tensor.size for tensor in content.listed) == content.size


def test_layer_2_comes_before_layer_10(folder: Path) -> None:
    listed = reshard.inspect(folder / "odd.safetensors", tensors=["block.*"]).listed
    assert listed is not None
    assert [tensor.name for tensor in listed] == [f"block.{number}.w" for number in range(130)]
    assert [tensor.size for tensor in listed] == [6 * number for number in range(130)]


def test_the_shards_of_a_tensor_stand_together(folder: Path) -> None:
    listed = reshard.inspect(folder / "ranks", tensors=["layers.0.attn.wq_b.weight", "embed.weight"]).listed
    assert listed is not None
    assert [(tensor.name, tensor.file) for tensor in listed] == [
        (name, f"model{rank}-mp2.safetensors")
        for name in ("embed.weight", "layers.0.attn.wq_b.weight")
        for rank in (0, 1)
    ]


def test_nothing_is_listed_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reshard.inspect(folder / "whole").listed is None
    assert main(["inspect", str(folder / "whole"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["listed"] is None


def test_a_long_list_is_whole_in_a_pipe_and_a_hostile_name_is_harmless(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal it is cut: `test_looks.py`."""
    path = str(folder / "odd.safetensors")
    assert main(["inspect", path, "--tensors"]) == 0
    text = capsys.readouterr().out
    listed = text[text.index("132 tensors listed") :].split("\n\n")[1]
    assert len(listed.split("\n")) == 1 + 132
    assert "more; --json" not in text
    assert "a\\nb " in listed
    assert "x" * 101 not in listed
    assert main(["inspect", path, "--tensors", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["listed"]
    assert len(listed) == 132
    assert {"name": "a\nb", "dtype": "F32", "shape": [], "size": 4, "file": "odd.safetensors"} in listed
    assert main(["inspect", path, "--tensors", "block.12?.w", "--tensors", "block.7.w"]) == 0
    text = capsys.readouterr().out
    assert "11 tensors listed" in text
    assert len(text[text.index("11 tensors listed") :].split("\n\n")[1].rstrip("\n").split("\n")) == 1 + 11
    assert "more; --json" not in text


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("w", "--tensors '*w*' fits 130 names"),
        ("blok.3.w", "--tensors block.3.w fits 1 name"),
        ("bloc?.900.w", "such as block.0.w"),
        ("nothing.*", "inspect --tensors lists all names"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused_with_what_does(
    folder: Path, pattern: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(folder / "odd.safetensors"), "--tensors", pattern]) == 2
    said = capsys.readouterr().err
    assert f"--tensors {pattern}: wrong option" in said
    assert words in said
    with pytest.raises(Refused, match=r"tensors [wbn]"):
        reshard.inspect(folder / "odd.safetensors", tensors=["block.*", pattern])
