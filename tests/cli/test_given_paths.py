"""Paths as they are given: an address where a folder is meant, an empty string, a name that is nearly there."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import reshard
from reshard import Refused
from reshard.cli.main import main
from reshard.synthetic import SMALL_V3, write_checkpoint

DOWNLOADS = {
    "s3://bucket/model": "aws s3 sync s3://bucket/model model",
    "hf://org/model": "hf download org/model",
    "gs://bucket/model": "gcloud storage cp -r gs://bucket/model .",
    "az://bucket/model": "download its files into a folder",
    "https://huggingface.co/org/model": "hf download org/model",
    "file:///data/model": "give the path /data/model",
}
WRITTEN_TO = ("s3:", "gs:", "az:")
UPLOADS = {
    "s3://bucket/model": "aws s3 sync FOLDER s3://bucket/model",
    "hf://org/model": "hf upload org/model FOLDER",
    "gs://bucket/model": "gcloud storage rsync -r FOLDER gs://bucket/model",
    "az://bucket/model": "your store's own program",
    "https://huggingface.co/org/model": "hf upload org/model FOLDER",
    "file:///data/model": "give the path /data/model",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a checkpoint and its rank files."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "source", SMALL_V3, 1)
    reshard.convert(folder / "source", folder / "ranks", mp=2)
    return folder


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def run_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(Path().iterdir())
    assert main(words) == 2
    assert sorted(Path().iterdir()) == before
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "address", "hint"),
    [
        (command, address, hint)
        for address, hint in UPLOADS.items()
        for command in ("convert source AT --mp 2", "plan source --mp 2 --target AT", "demo AT")
        if not address.startswith(WRITTEN_TO) or command == "demo AT"
    ],
)
def test_an_address_is_no_target_to_write(
    folder: Path, command: str, address: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run_refused(command.replace("AT", address).split(), capsys)
    assert f"{address}: target not folder" in said
    assert hint in said
    assert folder.exists()


@pytest.mark.parametrize(("address", "hint"), DOWNLOADS.items())
@pytest.mark.parametrize("command", ["repair AT --source source"])
@pytest.mark.usefixtures("folder")
def test_an_address_is_no_target_to_repair(
    command: str, address: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run_refused(command.replace("AT", address).split(), capsys)
    assert f"{address}: target not folder" in said
    assert hint in said


@pytest.mark.usefixtures("folder")
def test_an_address_that_nothing_opens_is_no_target_to_verify(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give the path /data/model" in run_refused(["verify", "file:///data/model"], capsys)


@pytest.mark.parametrize("address", [address for address in UPLOADS if address.startswith(WRITTEN_TO)])
@pytest.mark.usefixtures("folder")
def test_a_plain_install_says_how_a_target_comes_into_a_store(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    said = run_refused(["convert", "source", address, "--mp", "2"], capsys)
    assert f"{address}: missing package" in said
    assert "pip install 'reshard[remote]'; or convert into a FOLDER, then upload it: " in said
    assert UPLOADS[address] in said


WRITTEN: list[Callable[[str], object]] = [
    lambda target: reshard.convert("source", target, mp=2),
    lambda target: reshard.plan("source", 2, target=target),
]
READ: list[Callable[[str], object]] = [
    reshard.verify,
    lambda target: reshard.repair(target, "source"),
]
SOURCES: list[Callable[[str], object]] = [
    lambda source: reshard.convert(source, "new", mp=2),
    lambda source: reshard.plan(source, 2),
    lambda source: reshard.verify("ranks", source),
    lambda source: reshard.repair("ranks", source),
    lambda source: reshard.diff("source", source),
    reshard.inspect,
    lambda source: reshard.open(source, framework="numpy"),
    lambda source: reshard.load(source, mp=2, rank=0, framework="numpy"),
]


@pytest.mark.parametrize("call", [*WRITTEN, READ[1]])
@pytest.mark.usefixtures("folder")
def test_functions_refuse_an_address_as_target(call: Callable[[str], object]) -> None:
    with pytest.raises(Refused, match="hf://org/model: target not folder") as caught:
        call("hf://org/model")
    assert re.search("hf (upload|download) ", str(caught.value))
    assert not Path("hf:").exists()


@pytest.mark.parametrize("call", [*WRITTEN, *READ, *SOURCES])
@pytest.mark.usefixtures("folder")
def test_functions_refuse_an_empty_string(call: Callable[[str], object]) -> None:
    with pytest.raises(Refused, match="is a variable not set"):
        call("")


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "", "new", "--mp", "2"],
        ["convert", "source", "", "--mp", "2"],
        ["convert", "source", "new", "--mp", "2", "--recipe", ""],
        ["verify", ""],
        ["verify", "ranks", "--source", ""],
    ],
)
@pytest.mark.usefixtures("folder")
def test_commands_refuse_an_empty_string(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert "an empty string; is a variable not set?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("plan sorce", "did you mean source?"),
        ("inspect sources/model-00001-of-00001.safetensors", "did you mean source/model-00001-of-00001.safetensors?"),
        ("verify rank", "did you mean ranks?"),
        ("verify rank --download", "did you mean ranks?"),
        ("plan ./nope/x", "is the path right? to try reshard out: reshard demo NEW makes NEW/source"),
        ("plan /nope/x", "is the path right?"),
        ("plan /nope", "is the path right?"),
        ("plan nope/x", "hf download nope/x"),
        ("plan file:///data/x", "give the path /data/x"),
    ],
)
def test_a_path_that_is_not_there_is_explained(
    folder: Path, command: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "source", folder / "unlike", dirs_exist_ok=True)
    said = run_refused(command.split(), capsys)
    assert hint in said
    assert "hf download" not in said or "hf download" in hint


@pytest.mark.usefixtures("folder")
def test_a_text_file_is_no_wrong_download(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes").write_text("some words of a person\n")
    said = run_refused(["plan", "notes"], capsys)
    assert "a text, no safetensors file" in said
    assert "download" not in said
