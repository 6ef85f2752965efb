"""Buckets that do not let us in: the hint names what is wrong, the keys, their rights, or the server."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from s3_server import SECRET, S3State, serve_s3, set_s3_environment
from store_servers import Server
from targets import RANKS, make_source_and_target

import reshard
from reshard import Refused
from reshard.errors import Problem
from reshard.storage import remote_store

pytest.importorskip("obstore", reason="the package obstore is not installed")

TARGET = "s3://models/t"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3State]:
    monkeypatch.setattr(remote_store, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 0.2)
    with serve_s3() as state:
        set_s3_environment(monkeypatch, state, tmp_path)
        yield state


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source_and_target(tmp_path)


def refuse_both(source: Path) -> Iterator[Problem]:
    """What is wrong with an address as a source, and as a target."""
    for call in (lambda: reshard.inspect(TARGET), lambda: reshard.convert(source, TARGET, RANKS)):
        with pytest.raises(Refused) as caught:
            call()
        told = f"{caught.value} {caught.value.problems}"
        assert SECRET not in told
        assert "Credential=" not in told
        assert "HF_ENDPOINT" not in told
        yield from caught.value.problems


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("AWS_SECRET_ACCESS_KEY", "another", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "another", "InvalidAccessKeyId"),
    ],
)
def test_wrong_keys_are_not_called_none(
    served: S3State, source: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, code: str
) -> None:
    monkeypatch.setenv(name, value)
    for problem in refuse_both(source):
        assert problem.found == f"the server answers 403 {code}"
        assert problem.remedy.startswith("are the keys right? AWS_ACCESS_KEY_ID")
    assert not served.objects


def test_keys_that_may_not_list_are_asked_about_that(served: S3State, source: Path) -> None:
    served.faults["list", "denied"] = 2
    for problem in refuse_both(source):
        assert problem.found == "the server answers 403 AccessDenied"
        assert "and may they list and read this bucket?" in problem.remedy


@pytest.mark.parametrize("streams", [False, True])
def test_keys_that_may_only_read_are_told_what_writing_needs(
    served: S3State, source: Path, monkeypatch: pytest.MonkeyPatch, *, streams: bool
) -> None:
    if streams:
        monkeypatch.setenv("AWS_REQUEST_PAYER", "false")
    for operation in ("put", "begin", "delete"):
        served.faults[operation, "denied"] = 100
    with pytest.raises(Refused) as caught:
        reshard.convert(source, TARGET, RANKS)
    (problem,) = caught.value.problems
    assert problem.found == "the server answers 403 AccessDenied"
    assert "may list this bucket, but not write to it" in problem.remedy
    assert "s3:PutObject" in problem.remedy
    assert "SKIP_SIGNATURE" not in problem.remedy
    assert not served.objects
    assert not served.uploads


def test_keys_that_may_not_begin_an_upload_are_told_the_same(served: S3State, source: Path) -> None:
    served.faults["begin", "denied"] = 100
    with pytest.raises(Refused, match="may list this bucket, but not write to it: a target needs s3:PutObject"):
        reshard.convert(source, TARGET, RANKS)


def test_an_endpoint_where_nobody_answers_is_named(
    served: S3State, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:9/path")
    for problem in refuse_both(source):
        assert problem.kind == "cannot-read"
        assert "Connection refused" in problem.found
        assert "is AWS_ENDPOINT_URL=http://127.0.0.1:9 the server that you mean" in problem.remedy
        assert "aws s3 sync" not in problem.remedy
    assert not served.requests


def test_the_endpoint_of_a_profile_is_named(
    served: S3State, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    (tmp_path / "config").write_text("[default]\nendpoint_url = http://127.0.0.1:9\n")
    for problem in refuse_both(source):
        assert "is endpoint_url in ~/.aws=http://127.0.0.1:9 the server that you mean" in problem.remedy
    assert not served.requests


@pytest.mark.parametrize(
    ("endpoint", "cause"),
    [
        ("http://no.such.host.invalid", "failed to lookup address"),
        ("https://127.0.0.1:{port}", "the server does not speak TLS: is it http:// in the place of https://?"),
    ],
)
def test_causes_of_dns_and_tls_are_told(
    served: S3State, source: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, cause: str
) -> None:
    endpoint = endpoint.format(port=served.endpoint.rpartition(":")[2])
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for problem in refuse_both(source):
        assert cause in problem.found
        assert f"is AWS_ENDPOINT_URL={endpoint} the" in problem.remedy


@contextmanager
def serve_nothing() -> Iterator[str]:
    """A web server that has no such page, whatever is asked."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_error(404)

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.usefixtures("served")
def test_a_server_of_another_kind_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_nothing() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        for problem in refuse_both(source):
            assert "the server answers 404" in problem.found
            assert f"is AWS_ENDPOINT_URL={endpoint} the server that you mean" in problem.remedy


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("127.0.0.1:19333", "write AWS_ENDPOINT_URL=https://127.0.0.1:19333, or http://127.0.0.1:19333"),
        ("minio", "write AWS_ENDPOINT_URL=https://minio, or http://minio"),
        (f"me:{SECRET}@minio:9000", "copy it anew"),
        ("ftp://minio:9000", "copy it anew"),
    ],
)
def test_an_endpoint_without_its_scheme_is_asked_for_it(
    served: S3State, source: Path, monkeypatch: pytest.MonkeyPatch, value: str, hint: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    for problem in refuse_both(source):
        assert (problem.kind, problem.subject) == ("no-access", "AWS_ENDPOINT_URL")
        assert problem.found == "no address of a server"
        assert problem.remedy.startswith(hint)
    assert not served.requests


def test_without_an_endpoint_another_machine_may_reach_the_store(
    source: Path, served: S3State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing goes out of here
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    for problem in refuse_both(source):
        assert "AWS_ENDPOINT_URL a server of your own" in problem.remedy
        assert "aws s3 sync" in problem.remedy
    assert not served.requests
