"""Targets in buckets, in parts and by streams, on a server of our own that fails in every way we know of."""

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from s3_server import S3State, serve_s3, set_s3_environment

from reshard import Refused
from reshard.storage import remote_store, streamed_uploads
from reshard.storage.resources import map_in_threads, run_in_threads
from reshard.storage.s3_signing import S3Access, find_s3_access, sign_request
from reshard.storage.s3_uploads import PartedTarget
from reshard.storage.streamed_uploads import StreamedTarget
from reshard.storage.target_buckets import open_target_store
from reshard.storage.target_store import NoSuchUploadError, TargetStore

ADDRESS = "s3://models/some folder/ü+%"
PREFIX = ADDRESS.removeprefix("s3://models/") + "/"
CONTENT = os.urandom(3 << 20) + os.urandom(1234)
CUTS = (0, 1 << 20, (1 << 20) + 77, 2 << 20, len(CONTENT))
NUMBERS = (1, 2, 3, 4)
LARGE = bytes(24 << 20)
"""More than lies in the buffers of a connection."""
TOKEN = "FwoGsessionTOKEN"  # noqa: S105 - of our own server
pytest.importorskip("obstore", reason="the package obstore is not installed")


@pytest.fixture(autouse=True)
def _waits_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote_store, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(remote_store, "PATIENCE", 1.5)
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 1.0)
    backoff = {"init_backoff": timedelta(seconds=0.01), "max_backoff": timedelta(seconds=0.1), "base": 2}
    monkeypatch.setitem(streamed_uploads.RETRIES, "backoff", backoff)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3State]:
    with serve_s3(least_part=0, token=TOKEN) as state:
        set_s3_environment(monkeypatch, state, tmp_path)
        yield state


@pytest.fixture(params=["parts", "stream"])
def store(request: pytest.FixtureRequest, served: S3State, monkeypatch: pytest.MonkeyPatch) -> TargetStore:
    assert served.endpoint
    if request.param == "stream":
        monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")  # a setting that only obstore knows
    return open_target_store(ADDRESS).store


@pytest.fixture
def parts(served: S3State) -> PartedTarget:
    assert served.endpoint
    opened = open_target_store(ADDRESS).store
    assert isinstance(opened, PartedTarget)
    return opened


@pytest.fixture
def streams(served: S3State, monkeypatch: pytest.MonkeyPatch) -> StreamedTarget:
    assert served.endpoint
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    monkeypatch.setattr(streamed_uploads, "LEAST_PIECE", 64 << 10)
    opened = open_target_store(ADDRESS).store
    assert isinstance(opened, StreamedTarget)
    return opened


def get_part(number: int) -> memoryview:
    return memoryview(CONTENT)[CUTS[number - 1] : CUTS[number]]


def expect_etag() -> str:
    digests = b"".join(hashlib.md5(get_part(number), usedforsecurity=False).digest() for number in NUMBERS)
    return f'"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(NUMBERS)}"'


# --- whole objects ---


def test_whole_objects_are_written_read_listed_and_removed(store: TargetStore, served: S3State) -> None:
    served.page = 2
    names = ["config.json", "a b/ü&<.json", "reshard.json", "z"]
    etags = {name: store.put(name, name.encode()) for name in names}
    assert served.read_folder(PREFIX) == {name: name.encode() for name in names}
    assert {name: (entry.size, entry.version) for name, entry in store.list_entries().items()} == {
        name: (len(name.encode()), etags[name]) for name in names
    }
    assert [store.get(name) for name in (*names, "none")] == [*(name.encode() for name in names), None]
    assert store.put_new("new", b"1")
    assert not store.put_new("new", b"2")
    assert store.get("new") == b"1"
    store.put("z", b"other")
    assert store.get("z") == b"other"
    store.remove([*names, "never there"])
    store.remove([])
    assert list(store.list_entries()) == ["new"]


def test_a_folder_is_listed_as_it_was(store: TargetStore) -> None:
    store.put("config.json", b"{}")
    folder = open_target_store(ADDRESS).folder
    store.put("later.json", b"{}")
    assert str(folder) == store.address == ADDRESS
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert (folder / "config.json").read_bytes() == b"{}"


def test_an_absent_folder_is_an_empty_one(served: S3State) -> None:
    served.objects.clear()
    for address in (ADDRESS, f"{ADDRESS}/", "s3://models"):
        opened = open_target_store(address)
        assert opened.folder.exists()
        assert not list(opened.folder.iterdir())
        assert not opened.store.list_entries()


@pytest.mark.parametrize("fault", ["busy", "busy-early", "broken", "lost", "flipped"])
def test_a_small_object_is_written_in_spite_of_faults(store: TargetStore, served: S3State, fault: str) -> None:
    served.faults["put", fault] = 2
    assert store.put_new("job", b"of this run")
    served.faults["put", fault] = 2
    store.put("job", b"again")
    assert store.get("job") == b"again"
    assert served.count("put", 200) == (1 if fault == "lost" else 2), "the first one was there after all"


def test_an_object_of_another_is_not_taken_for_ours_after_a_lost_answer(store: TargetStore, served: S3State) -> None:
    store.put("job", b"of another run")
    served.faults["put", "busy"] = 1
    assert not store.put_new("job", b"of this run")
    assert store.get("job") == b"of another run"


@pytest.mark.parametrize("fault", ["busy", "cut", "lost"])
def test_a_small_object_is_read_in_spite_of_faults(store: TargetStore, served: S3State, fault: str) -> None:
    store.put("journal", CONTENT)
    served.faults["get", fault] = served.faults["list", fault] = served.faults["delete", fault] = 2
    assert store.get("journal") == CONTENT
    assert list(store.list_entries()) == ["journal"]
    store.remove(["journal"])
    assert not served.objects


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("denied", "no-access", "s3:PutObject"),
        ("expired", "no-access", "the session of the keys has ended"),
        ("no-bucket", "no-target", "no such bucket"),
        ("not-implemented", "wrong-answer", "convert into a folder, and upload that.*the server answers 501"),
    ],
)
def test_a_small_object_that_is_not_written_is_refused(
    store: TargetStore, served: S3State, fault: str, kind: str, words: str
) -> None:
    served.faults["put", fault] = 1000
    with pytest.raises(Refused) as caught:
        store.put_new("job", b"of this run")
    require_refusal(caught.value, served, kind, words)


# --- parts ---


def test_parts_are_put_in_any_order_and_listed(parts: PartedTarget, served: S3State) -> None:
    served.page = 1
    assert parts.keeps_parts
    upload = parts.begin_upload("model.safetensors")
    etags = dict(zip(NUMBERS, [""] * 4, strict=True))
    for number in (3, 1, 4):
        etags[number] = parts.put_part("model.safetensors", upload, number, get_part(number))
    found = open_target_store(ADDRESS).store.list_parts("model.safetensors", upload)
    assert found == {number: (etags[number], CUTS[number] - CUTS[number - 1]) for number in (1, 3, 4)}
    assert not parts.list_entries()
    etags[2] = parts.put_part("model.safetensors", upload, 2, get_part(2))
    etag = parts.complete_upload("model.safetensors", upload, list(etags.values()))
    assert etag == expect_etag() == parts.list_entries()["model.safetensors"].version
    assert served.read_folder(PREFIX) == {"model.safetensors": CONTENT}
    assert parts.list_parts("model.safetensors", upload) is None


FAULTS = ["busy", "busy-early", "broken", "lost", "cut", "delayed", "error-in-200"]
FAULTY = [(work, fault) for work in ("begin", "put_part", "list_parts", "complete", "abort") for fault in FAULTS]
FAULTY += [("put_part", "flipped"), ("complete", "flipped")]
FAULTY += [("begin", "no-xml"), ("put_part", "no-xml"), ("list_parts", "no-xml"), ("complete", "no-xml")]


@pytest.mark.parametrize(("operation", "fault"), FAULTY)
def test_parts_are_put_in_spite_of_faults(parts: PartedTarget, served: S3State, operation: str, fault: str) -> None:
    served.faults[operation, fault] = 2
    upload = parts.begin_upload("one")
    etags = [parts.put_part("one", upload, number, get_part(number)) for number in NUMBERS]
    found = parts.list_parts("one", upload)
    assert found
    assert [part.etag for part in found.values()] == etags
    if operation == "complete" and fault in ("lost", "cut"):
        with pytest.raises(NoSuchUploadError):  # it was done the first time
            parts.complete_upload("one", upload, etags)
        assert parts.list_entries()["one"].version == expect_etag()
    else:
        assert parts.complete_upload("one", upload, etags) == expect_etag()
    assert served.read_folder(PREFIX) == {"one": CONTENT}
    other = parts.begin_upload("other")
    parts.abort_upload("other", other)
    assert parts.list_parts("other", other) is None
    assert served.faults[operation, fault] < 2, "the fault was not met"


def test_an_upload_that_is_gone_is_told(parts: PartedTarget, served: S3State) -> None:
    upload = parts.begin_upload("one")
    etag = parts.put_part("one", upload, 1, get_part(1))
    served.uploads.clear()
    with pytest.raises(NoSuchUploadError):
        parts.put_part("one", upload, 2, get_part(2))
    with pytest.raises(NoSuchUploadError):
        parts.complete_upload("one", upload, [etag])
    assert parts.list_parts("one", upload) is None
    parts.abort_upload("one", upload)


def test_the_wait_that_a_server_tells_is_told_and_kept(
    parts: PartedTarget, served: S3State, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(remote_store, "LISTENERS", [told.append])
    monkeypatch.setattr(remote_store, "TOLD_WAITS", {})
    served.retry_after = "1"
    served.faults["put_part", "busy"] = 1
    upload, began = parts.begin_upload("one"), time.monotonic()
    parts.put_part("one", upload, 1, get_part(1))
    assert time.monotonic() - began >= 1
    assert told == [f"{ADDRESS}/one: the server is busy (503); waits 1 s"]


REFUSED = [
    ("denied", "no-access", "s3:PutObject.*403 AccessDenied"),
    ("denied-early", "no-access", "s3:PutObject.*403 AccessDenied"),
    ("expired", "no-access", "the session of the keys has ended"),
    ("no-bucket", "no-target", "no such bucket"),
    ("not-implemented", "cannot-write", "501 NotImplemented"),
    ("busy", "cannot-write", "run the same command again.*the server is busy"),
    ("broken", "cannot-write", "run the same command again"),
    ("flipped", "wrong-answer", "not what was sent"),
]


@pytest.mark.parametrize(("fault", "kind", "words"), REFUSED)
def test_what_does_not_pass_is_refused_without_a_secret(
    parts: PartedTarget, served: S3State, fault: str, kind: str, words: str
) -> None:
    upload = parts.begin_upload("one")
    served.faults["put_part", fault] = 1000
    with pytest.raises(Refused) as caught:
        parts.put_part("one", upload, 1, memoryview(LARGE))
    require_refusal(caught.value, served, kind, words)


def require_refusal(refused: Refused, served: S3State, kind: str, words: str) -> None:
    text = " ".join(str(refused).split())
    assert [problem.kind for problem in refused.problems] == [kind]
    assert re.search(words, text), text
    for secret in (served.secret, served.token, served.key, "Signature="):
        assert secret not in text + repr(refused)


def test_a_large_part_goes_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "server.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    words += ["-addext", "basicConstraints=critical,CA:FALSE"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", str(tmp_path / "c.pem")]
    subprocess.run(words, check=True, capture_output=True)
    path.write_text(path.read_text() + (tmp_path / "c.pem").read_text())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "c.pem"))
    data = os.urandom(20 << 20)
    with serve_s3(certificate=path) as state:
        set_s3_environment(monkeypatch, state, tmp_path)
        store = open_target_store("s3://models/tls").store
        state.faults["put_part", "broken"] = state.faults["put_part", "delayed"] = 1
        upload = store.begin_upload("one")
        store.complete_upload("one", upload, [store.put_part("one", upload, 1, memoryview(data))])
        assert state.read_folder("tls/") == {"one": data}


@pytest.mark.parametrize("operation", ["put_part", "complete", "begin"])
def test_a_job_that_is_stopped_does_not_wait_for_a_silent_server(
    store: TargetStore, served: S3State, operation: str
) -> None:
    served.faults[operation, "silent"] = 100
    began = time.monotonic()

    def work(is_first: bool) -> None:  # noqa: FBT001
        if is_first:
            time.sleep(0.5)
            raise KeyboardInterrupt
        upload = store.begin_upload("one")
        store.complete_upload("one", upload, [store.put_part("one", upload, 1, memoryview(LARGE))])
        if store.keeps_parts:
            pytest.fail("the server was not silent")

    with pytest.raises(KeyboardInterrupt):
        run_in_threads([True, False], lambda: work, 2)
    if not store.keeps_parts:
        store.abort_upload("one", "")
    assert time.monotonic() - began < 2.5


# --- streams ---


def upload_stream(store: TargetStore, name: str, content: bytes, size: int) -> str:
    """Uploads parts in their order, from a buffer that is filled again and again."""
    upload, buffer = store.begin_upload(name), bytearray(size)
    for number, begin in enumerate(range(0, len(content), size), 1):
        piece = content[begin : begin + size]
        buffer[: len(piece)] = piece
        assert not store.put_part(name, upload, number, memoryview(buffer)[: len(piece)])
        buffer[:] = bytes(size)
    return store.complete_upload(name, upload, [])


def test_a_stream_is_what_was_put(streams: StreamedTarget, served: S3State) -> None:
    assert not streams.keeps_parts
    etag = upload_stream(streams, "one", CONTENT, 1 << 20)
    assert served.read_folder(PREFIX) == {"one": CONTENT}
    assert etag == streams.list_entries()["one"].version
    sizes = sorted(one.size for one in served.requests if one.operation == "put_part")
    assert sizes == [1234, *[256 << 10] * 12], "some stores want equal parts"
    assert streams.list_parts("one", "") is None


def test_parts_of_a_stream_wait_for_their_turn(streams: StreamedTarget, served: S3State) -> None:
    streams.begin_upload("one")
    order: list[int] = []

    def put(number: int) -> None:
        time.sleep(0.3 if number == 1 else 0)
        streams.put_part("one", "", number, get_part(number))
        order.append(number)

    map_in_threads(put, [1, 2, 3, 4], 4)
    streams.complete_upload("one", "", [])
    assert order == [1, 2, 3, 4]
    assert served.read_folder(PREFIX) == {"one": CONTENT}


@pytest.mark.parametrize("operation", ["begin", "put_part", "complete"])
@pytest.mark.parametrize("fault", ["busy", "broken"])
def test_a_stream_goes_on_in_spite_of_faults(
    streams: StreamedTarget, served: S3State, operation: str, fault: str
) -> None:
    served.faults[operation, fault] = 2
    upload_stream(streams, "one", CONTENT, 1 << 20)
    assert served.read_folder(PREFIX) == {"one": CONTENT}


@pytest.mark.parametrize("operation", ["begin", "put_part", "complete"])
@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [("denied", "no-access", "s3:PutObject"), ("no-upload", "cannot-write", "run the same command again")],
)
def test_a_stream_that_fails_is_refused_without_a_secret(
    streams: StreamedTarget, served: S3State, operation: str, fault: str, kind: str, words: str
) -> None:
    served.faults[operation, fault] = 1000
    with pytest.raises(Refused) as caught:
        upload_stream(streams, "one", CONTENT, 256 << 10)
    require_refusal(caught.value, served, kind, words)
    assert not served.objects


def test_a_stream_that_is_thrown_away_leaves_nothing(streams: StreamedTarget, served: S3State) -> None:
    streams.begin_upload("one")
    for number in (1, 2, 3):
        streams.put_part("one", "", number, get_part(number))
    streams.abort_upload("one", "")
    streams.abort_upload("one", "")
    assert not served.objects
    assert not served.uploads
    assert served.count("abort", 204) == 1
    upload_stream(streams, "one", CONTENT, 1 << 20)
    assert served.read_folder(PREFIX) == {"one": CONTENT}


# --- where, and with which keys ---


@pytest.mark.parametrize(
    ("query", "signature"),
    [
        ({"lifecycle": ""}, "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        ({"max-keys": "2", "prefix": "J"}, "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ],
)
def test_signatures_are_those_of_the_documentation(query: dict[str, str], signature: str) -> None:
    """Those of Amazon, "Examples: Signature Calculations"."""
    keys = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", ""
    access = S3Access("https://examplebucket.s3.amazonaws.com", "us-east-1", *keys)
    signed = sign_request(access, "GET", "", query, hashlib.sha256(b"").hexdigest(), 1369353600)
    assert signed.headers["authorization"].endswith(f"Signature={signature}")
    assert "wJalr" not in repr(access)


def test_an_endpoint_may_be_that_of_the_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(is_virtual=True, least_part=0) as state:
        set_s3_environment(monkeypatch, state, tmp_path)
        monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
        store = open_target_store(ADDRESS).store
        upload = store.begin_upload("one")
        store.complete_upload("one", upload, [store.put_part("one", upload, 1, get_part(1))])
        store.put("two", b"2")
        assert state.read_folder(PREFIX) == {"one": get_part(1), "two": b"2"}


def test_a_profile_gives_keys(served: S3State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    (tmp_path / "config").write_text(f"[profile lab]\nendpoint_url = {served.endpoint}\nregion = eu-west-1\n")
    keys = f"aws_access_key_id = {served.key}\naws_secret_access_key = {served.secret}\n"
    (tmp_path / "credentials").write_text(f"[lab]\n{keys}aws_session_token = {served.token}\n")
    store = open_target_store(ADDRESS).store
    assert store.keeps_parts
    assert store.begin_upload("one") in served.uploads


AMAZON = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "https://s3.us-east-1.amazonaws.com/models"),
        ({"AWS_REGION": "eu-west-1"}, "https://s3.eu-west-1.amazonaws.com/models"),
        ({"AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true"}, "https://models.s3.us-east-1.amazonaws.com"),
        ({"AWS_ENDPOINT_URL": "http://one:9000/"}, "http://one:9000/models"),
        ({"AWS_ENDPOINT_URL": "http://one:9000", "AWS_ENDPOINT_URL_S3": "http://two"}, "http://two/models"),
        ({"AWS_ENDPOINT_URL": "https://0123.r2.cloudflarestorage.com"}, None),
        ({"AWS_ACCESS_KEY_ID": ""}, None),
        ({"AWS_SKIP_SIGNATURE": "true"}, None),
        ({"AWS_SERVER_SIDE_ENCRYPTION": "aws:kms"}, None),
    ],
)
@pytest.mark.usefixtures("served")
def test_a_bucket_is_asked_where_obstore_asks_it(
    variables: dict[str, str], address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    for name, value in (AMAZON | variables).items():
        monkeypatch.setenv(name, value)
    found = find_s3_access("models")
    assert (found.address if found else None) == address


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        ("s3://others/x", "no-target", "no such bucket"),
        ("s3://", "target-not-folder", "s3://BUCKET/FOLDER"),
        ("s3://models/a/../b", "target-not-folder", "s3://BUCKET/FOLDER"),
        ("s3://models/a/model.safetensors", "target-not-folder", "the name of a file"),
        ("hf://org/name", "target-not-folder", "convert into a folder, then upload it"),
        ("https://me:wJalrSECRETsecret@host/x?FwoGsessionTOKEN", "target-not-folder", "convert into a folder"),
    ],
)
def test_what_cannot_be_written_to_is_refused(served: S3State, address: str, kind: str, words: str) -> None:
    with pytest.raises(Refused) as caught:
        open_target_store(address)
    require_refusal(caught.value, served, kind, words)


def test_a_wrong_key_is_refused(served: S3State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrOTHER")
    with pytest.raises(Refused, match=r"are the keys right\? AWS_ACCESS_KEY_ID") as caught:
        open_target_store(ADDRESS)
    require_refusal(caught.value, served, "no-access", "are the keys right")
    assert "wJalrOTHER" not in str(caught.value)
