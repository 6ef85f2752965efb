"""A name on the hub where a path is expected: every command and function names the command that downloads it."""

from collections.abc import Callable
from pathlib import Path

import pytest

import reshard
from reshard import Refused
from reshard.cli.main import main
from reshard.synthetic import SMALL_V3, write_checkpoint

NAME = "deepseek-ai/DeepSeek-V3"
HINT = f"hint:     is it a name on the hub? hf download {NAME} downloads it and prints the folder to name instead\n"
SNAPSHOT = "models--deepseek-ai--DeepSeek-V3/snapshots/0123abcd"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a checkpoint, its rank files, and the cache of the hub with a snapshot."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("source"), SMALL_V3, 1)
    reshard.convert("source", "ranks", mp=2)
    write_checkpoint(Path(SNAPSHOT), SMALL_V3, 1)
    (Path(SNAPSHOT).parent.parent / "blobs").mkdir()
    return tmp_path


COMMANDS = [
    "inspect NAME",
    "plan NAME --mp 2",
    "convert NAME out --mp 2",
    "deepseek --hf-ckpt-path NAME --save-path out --model-parallel 2",
    "diff NAME source",
    "diff source NAME",
    "diff NAME other/model",
    "verify ranks --source NAME",
    "verify NAME --download",
    "recipes check deepseek-v3 NAME",
]
CALLS: list[Callable[[str], object]] = [
    reshard.open,
    reshard.inspect,
    lambda name: reshard.load(name, mp=2, rank=0),
    lambda name: reshard.plan(name, 2),
    lambda name: reshard.convert(name, "out", 2),
    lambda name: reshard.diff("source", name),
    lambda name: reshard.verify("ranks", name),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_names_the_download_and_the_snapshot(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.replace("NAME", NAME).split()) == 2
    assert HINT in capsys.readouterr().err
    assert main(words.replace("NAME", SNAPSHOT.partition("/")[0]).split()) == 2
    assert f": {SNAPSHOT}\n" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("call", CALLS)
def test_a_function_names_the_download_and_the_snapshot(call: Callable[[str], object]) -> None:
    with pytest.raises(Refused) as caught:
        call(NAME)
    assert HINT in f"{caught.value}\n"
    with pytest.raises(Refused) as caught:
        call(SNAPSHOT.partition("/")[0])
    assert f": {SNAPSHOT}\n" in f"{caught.value}\n"
    assert not Path("out").exists()
