"""Sources in Azurite, the emulator of Azure's store, if it and the package `obstore` are there (`make remote`)."""

import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from store_servers import require_same_files

import reshard
from reshard import Refused
from reshard.storage import remote_store
from reshard.synthetic import SMALL_V3, write_checkpoint

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""That of every emulator, as its documentation has it."""
ADDRESS = "az://models/some/where"
obstore = pytest.importorskip("obstore", reason="the package obstore is not installed")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an emulator with an empty container `models`."""
    beside = str(Path(sys.prefix) / "node_modules" / ".bin")
    program = shutil.which("azurite-blob") or shutil.which("azurite-blob", path=beside)
    if not program:
        pytest.skip("azurite is not installed")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    folder = tmp_path_factory.mktemp("azurite")
    words = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder), "--silent"]
    with subprocess.Popen([*words, "--disableTelemetry", "--skipApiVersionCheck"], cwd=folder) as process:
        try:
            make_container(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def make_container(port: int) -> None:
    date, version = formatdate(usegmt=True), "2021-08-06"
    signed = ["PUT", *[""] * 11, f"x-ms-date:{date}", f"x-ms-version:{version}", f"/{ACCOUNT}/{ACCOUNT}/models"]
    text = "\n".join([*signed, "restype:container"]).encode()
    digest = base64.b64encode(hmac.new(base64.b64decode(KEY), text, hashlib.sha256).digest()).decode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{ACCOUNT}/models?restype=container", method="PUT")
    for name, value in (("x-ms-date", date), ("x-ms-version", version)):
        request.add_header(name, value)
    request.add_header("Authorization", f"SharedKey {ACCOUNT}:{digest}")
    for _ in range(300):
        try:
            with urllib.request.urlopen(request) as answer:  # noqa: S310
                assert answer.status == 201
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail("the emulator does not answer")


@pytest.fixture(autouse=True)
def _emulator(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", endpoint)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 5.0)


def upload(folder: Path, prefix: str) -> None:
    bucket: Any = obstore.store.from_url("az://models", client_options={"allow_http": True})
    for path in folder.iterdir():
        obstore.put(bucket, f"{prefix}/{path.name}", path.read_bytes())


def test_a_conversion_gives_the_same_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", SMALL_V3, 3)
    upload(tmp_path / "source", "some/where")
    reshard.convert(tmp_path / "source", tmp_path / "here", mp=2)
    reshard.convert(ADDRESS, tmp_path / "there", mp=2)
    require_same_files(tmp_path / "here", tmp_path / "there")


def test_a_file_that_is_replaced_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", SMALL_V3, 1)
    upload(tmp_path / "one", "one")
    with reshard.open("az://models/one", framework="numpy") as tensors:
        assert tensors["model.embed_tokens.weight"][:1].size
        upload(tmp_path / "one", "one")
        with pytest.raises(Refused, match="source changed"):
            tensors["model.embed_tokens.weight"][:1]


@pytest.mark.parametrize(("address", "words"), [("az://others/x", "no such bucket"), ("az://models/x", "nothing lies")])
def test_what_is_not_there_is_refused(address: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        reshard.inspect(address)
