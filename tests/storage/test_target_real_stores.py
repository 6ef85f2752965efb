"""Targets in real servers: SeaweedFS (S3), in parts and by streams, and Azurite (Azure), by streams (`make remote`)."""

import hashlib
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from real_stores import SEAWEED_KEY, SEAWEED_SECRET, run_azurite, run_seaweedfs
from s3_server import S3State, set_s3_environment

from reshard import Refused
from reshard.storage import remote_store
from reshard.storage.target_buckets import open_target_store
from reshard.storage.target_store import NoSuchUploadError, TargetStore

FOLDER = "some folder/ü+%"
CONTENT = os.urandom(11 << 20)
CUTS = (0, 5 << 20, 10 << 20, len(CONTENT))
pytest.importorskip("obstore", reason="the package obstore is not installed")


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
    monkeypatch.setattr(remote_store, "PATIENCE", 20.0)
    inner = f"{FOLDER}/{tmp_path.name}"
    if request.param == "azure":
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", request.getfixturevalue("azurite"))
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "127.0.0.1,localhost")
        return f"az://models/{inner}"
    endpoint = request.getfixturevalue("seaweedfs")
    set_s3_environment(monkeypatch, S3State(SEAWEED_KEY, SEAWEED_SECRET, endpoint=endpoint), tmp_path)
    if request.param == "stream":
        monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")  # a setting that only obstore knows
    return f"s3://models/{inner}"


def put_parts(store: TargetStore, name: str, upload: str) -> list[str]:
    numbers = (3, 1, 2) if store.keeps_parts else (1, 2, 3)
    etags = {
        number: store.put_part(name, upload, number, memoryview(CONTENT)[CUTS[number - 1] : CUTS[number]])
        for number in numbers
    }
    return [etags[number] for number in (1, 2, 3)]


def test_whole_objects_are_written_read_listed_and_removed(address: str) -> None:
    folder, store = open_target_store(address)
    assert folder.exists()
    assert not list(folder.iterdir())
    etags = {name: store.put(name, name.encode()) for name in ("a b/ü&.json", "z")}
    assert {name: (entry.size, entry.version) for name, entry in store.list_entries().items()} == {
        name: (len(name.encode()), etag) for name, etag in etags.items()
    }
    assert [store.get(name) for name in (*etags, "none")] == [*(name.encode() for name in etags), None]
    assert store.put_new("new", b"1")
    assert not store.put_new("new", b"2")
    assert store.get("new") == b"1"
    store.remove(["new", "never there"])
    assert store.list_entries().keys() == etags.keys()
    assert (open_target_store(address).folder / "z").read_bytes() == b"z"


def test_an_upload_appears_once_it_is_completed(address: str) -> None:
    store = open_target_store(address).store
    upload = store.begin_upload("one")
    etags = put_parts(store, "one", upload)
    assert not store.list_entries()
    etag = store.complete_upload("one", upload, etags)
    found = store.list_entries()
    assert {name: (entry.size, entry.version) for name, entry in found.items()} == {"one": (len(CONTENT), etag)}
    assert store.get("one") == CONTENT
    other = store.begin_upload("other")
    put_parts(store, "other", other)
    store.abort_upload("other", other)
    assert store.list_entries().keys() == {"one"}
    assert store.list_parts("other", other) is None


@pytest.mark.parametrize("address", ["parts"], indirect=True)
def test_parts_are_found_after_a_crash(address: str) -> None:
    store = open_target_store(address).store
    upload = store.begin_upload("one")
    etags = put_parts(store, "one", upload)
    store = open_target_store(address).store
    parts = [memoryview(CONTENT)[begin:end] for begin, end in pairwise(CUTS)]
    assert etags == [f'"{hashlib.md5(part, usedforsecurity=False).hexdigest()}"' for part in parts]
    found = store.list_parts("one", upload)
    assert found == {number: (etag, len(part)) for number, (etag, part) in enumerate(zip(etags, parts, strict=True), 1)}
    store.complete_upload("one", upload, etags)
    assert store.list_parts("one", upload) is None
    with pytest.raises(NoSuchUploadError):
        store.put_part("one", upload, 1, parts[0])


def test_a_bucket_that_is_not_there_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 3.0)
    with pytest.raises(Refused, match="no such bucket"):
        open_target_store(f"{address.partition(':')[0]}://others/x")
