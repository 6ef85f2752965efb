"""Conversions into real servers, killed again and again: SeaweedFS in parts and by streams, Azurite (`make remote`)."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_stores import run_azurite, run_seaweedfs
from s3_server import S3State, set_s3_environment
from seaweedfs import KEY, SECRET

import reshard
from reshard.cli.main import main
from reshard.formats.target_names import STORE_RECORD
from reshard.synthetic import SMALL_V3, write_checkpoint

KILLS = 6
obstore = pytest.importorskip("obstore", reason="the package obstore is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a checkpoint and its rank files."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "source", {**SMALL_V3, "vocab_size": 32768}, 3)
    reshard.convert(folder / "source", folder / "ranks", mp=2)
    return folder


@pytest.fixture(scope="module")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_seaweedfs(tmp_path_factory.mktemp("seaweed")) as address:
        yield address


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_azurite(tmp_path_factory.mktemp("azurite")) as address:
        yield address


@pytest.fixture(params=["parts", "stream", "azure"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a folder that no other test writes to."""
    if request.param == "azure":
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", request.getfixturevalue("azurite"))
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1,localhost")
        return f"az://models/{tmp_path.name}/ü+%"
    endpoint = request.getfixturevalue("seaweedfs")
    set_s3_environment(monkeypatch, S3State(KEY, SECRET, endpoint=endpoint), tmp_path)
    if request.param == "stream":
        monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")  # a setting that only obstore knows
    return f"s3://models/{tmp_path.name}/ü+%"


def read_objects(address: str) -> dict[str, bytes]:
    """What lies in a folder, but for the record of the store."""
    scheme, _, rest = address.partition("://")
    prefix = rest.partition("/")[2] + "/"
    bucket: Any = obstore.store.from_url(f"{scheme}://models", client_options={"allow_http": True})
    keys = [item["path"] for item in obstore.list(bucket, prefix).collect()]
    return {
        key.removeprefix(prefix): bytes(obstore.get(bucket, key).bytes()) for key in keys if STORE_RECORD not in key
    }


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_that_is_killed_again_and_again_ends_right(
    made: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(made / "source"), address, "--mp", "2", "--jobs", "2", "--max-memory", "128MiB"]
    dice = random.Random(address)
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, "-m", "reshard", *words], stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(dice.uniform(0.8, 3))
                break
            except subprocess.TimeoutExpired:
                process.kill()
    assert main(words) == 0, capsys.readouterr().err
    assert read_objects(address) == read_files(made / "ranks")
    capsys.readouterr()
    assert main(words) == 0
    assert "converted already; nothing was written" in capsys.readouterr().out


def test_parts_and_another_conversion(made: Path, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(made / "source"), address, "--mp", "2"]
    assert main([*words, "--ranks", "1"]) == 0
    assert main(words) == 0
    assert read_objects(address) == read_files(made / "ranks")
    words[-1] = "4"
    assert main(words) == 2
    assert "a finished conversion: 2 ranks" in capsys.readouterr().err
    assert main([*words, "--restart", "--yes"]) == 0
    reshard.convert(made / "source", made / address.replace("/", "_"), mp=4)
    assert read_objects(address) == read_files(made / address.replace("/", "_"))


def test_shares_at_once_of_which_two_are_killed(
    made: Path, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(made / "source"), address, "--to", "hf", "--max-file-size", "8MB"]
    shares, dice = [f"{share}/4" for share in range(4)], random.Random(address)

    def start(share: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "reshard", *words, "--share", share, "--jobs", "2"]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    processes = {share: start(share) for share in shares}
    for share in dice.sample(shares, 2):
        try:
            processes[share].wait(dice.uniform(1, 3))
        except subprocess.TimeoutExpired:
            processes[share].kill()
            processes[share].wait()
            processes[share] = start(share)
    assert [process.wait() for process in processes.values()] == [0] * 4
    assert main(words) == 0, capsys.readouterr().err
    reshard.convert(made / "source", tmp_path / "at-once", to="hf", max_file_size=8_000_000)
    assert read_objects(address) == read_files(tmp_path / "at-once")
    assert main(["verify", address, "--source", str(made / "source")]) == 0
    assert main(["verify", address, "--checksums-only"]) == 0
