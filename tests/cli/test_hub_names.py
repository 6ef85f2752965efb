"""A name on the hub where a path is expected: every command and function names the command that downloads it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import reshard
from reshard import Refused
from reshard.cli.main import main
from reshard.storage import remote_store
from reshard.synthetic import SMALL_V3, write_checkpoint

NAME = "deepseek-ai/DeepSeek-V3"
DOWNLOAD = f"download it: hf download {NAME} --local-dir DeepSeek-V3; then give DeepSeek-V3\n"
HINT = f"hint:     if it is a name on the hub, {DOWNLOAD}"
SNAPSHOT = "models--deepseek-ai--DeepSeek-V3/snapshots/0123abcd"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain install; nothing is there to be asked, and nobody waits for it."""
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 0.0)
    for name in ("obstore", "obstore.store"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


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
    lambda name: reshard.open(name, framework="numpy"),
    reshard.inspect,
    lambda name: reshard.load(name, mp=2, rank=0, framework="numpy"),
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


@pytest.mark.parametrize(
    ("address", "command"),
    [
        (f"hf://{NAME}", f"hf download {NAME} --local-dir DeepSeek-V3"),
        (f"hf://models/{NAME}@v1.0/config.json", f"hf download {NAME} --revision v1.0 --local-dir DeepSeek-V3"),
        (f"https://huggingface.co/{NAME}", f"hf download {NAME} --local-dir DeepSeek-V3"),
        (f"https://huggingface.co/{NAME}/", f"hf download {NAME} --local-dir DeepSeek-V3"),
        (f"huggingface.co/{NAME}", f"hf download {NAME} --local-dir DeepSeek-V3"),
        (f"https://hf-mirror.com/{NAME}/tree/main?a=b", f"hf download {NAME} --local-dir DeepSeek-V3"),
        (
            f"https://huggingface.co/{NAME}/blob/1d044fd/config.json",
            f"hf download {NAME} --revision 1d044fd --local-dir DeepSeek-V3",
        ),
        (
            f"https://www.modelscope.cn/models/{NAME}/files",
            f"modelscope download --model {NAME} --local_dir DeepSeek-V3",
        ),
        ("s3://bucket/models/DeepSeek-V3/", "aws s3 sync s3://bucket/models/DeepSeek-V3 DeepSeek-V3"),
        ("gs://bucket/models/DeepSeek-V3", "gcloud storage cp -r gs://bucket/models/DeepSeek-V3 ."),
    ],
)
@pytest.mark.usefixtures("folder")
def test_an_address_names_the_command_that_downloads_it(
    address: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["convert", address, "out", "--mp", "2"], ["verify", address, "--download"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert "reshard: refused\n" in said
        assert f"download it: {command}; then give DeepSeek-V3\n" in said
    with pytest.raises(Refused) as caught:
        reshard.plan(address, 2)
    assert f"download it: {command}; then give DeepSeek-V3\n" in str(caught.value)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        (f"https://huggingface.co/{NAME}", f"give hf://{NAME}; or download it"),
        (f"https://hf.co/{NAME}/tree/main", f"give hf://{NAME}; or download it"),
        (f"https://huggingface.co/{NAME}/tree/v1.0", f"give hf://{NAME}@v1.0; or download it"),
        (f"https://hf-mirror.com/{NAME}", f"give hf://{NAME}, with HF_ENDPOINT=https://hf-mirror.com; or download it"),
    ],
)
def test_a_page_of_the_hub_leads_to_its_address(address: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", address]) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    "address",
    ["https://example.com/a/b", "https://huggingface.co/datasets/a/b", "https://huggingface.co/a", "az://a/b"],
)
def test_another_address_is_to_be_downloaded_too(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", address]) == 2
    assert "download its files into a folder, and give that folder\n" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["DeepSeek-V3", "/models/DeepSeek-V3", "a/b/c", "./a"])
def test_a_path_is_no_name_on_the_hub(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", path]) == 2
    assert "download" not in capsys.readouterr().err
