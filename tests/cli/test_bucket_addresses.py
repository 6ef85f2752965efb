"""Addresses of buckets that are refused at once: without a bucket, or with keys in them, which are not shown."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3State, serve_s3, set_s3_environment
from targets import RANKS, make_source_and_target

import reshard
from reshard.cli.main import main
from reshard.text import hide_secrets

pytest.importorskip("obstore", reason="the package obstore is not installed")

SECRETS = ("KEYAAA", "SECRETBBB", "more")

WITH_KEYS = (
    "s3://KEYAAA:SECRETBBB@models/m4",
    "s3://KEYAAA:SECRETBBB/more@models/m4",
    "s3://KEYAAA:SECRETBBB@more@models/m4",
    "s3://KEYAAA:SECRETBBB/models/m4",
    "s3://KEYAAA@models/m4",
    "S3://KEYAAA:SECRETBBB@models/m4",
    "s3:///KEYAAA:SECRETBBB@models/m4",
    "gs://KEYAAA:SECRETBBB@models/m4",
    "az://models/m4?sv=2024&sig=SECRETBBB",
    "s3://models/m4?AWSAccessKeyId=KEYAAA&Signature=SECRETBBB",
)

WITHOUT_BUCKET = ("s3:///models/x", "s3:/models/x", "s3:////models/x", "S3:///models/x", "gs:///x", "az:/x", "s3://")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3State]:
    with serve_s3() as state:
        set_s3_environment(monkeypatch, state, tmp_path)
        yield state


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source_and_target(tmp_path)


def list_commands(address: str, source: str) -> Iterator[list[str]]:
    yield ["convert", source, address, "--mp", str(RANKS)]
    yield ["convert", address, "s3://models/new", "--mp", str(RANKS)]
    yield ["convert", source, "s3://models/new", "--mp", str(RANKS), "--config", address]
    yield ["plan", source, "--mp", str(RANKS), "--target", address]
    yield ["plan", address]
    yield ["inspect", address]
    yield ["verify", address]
    yield ["verify", "s3://models/new", "--source", address]
    yield ["verify", address, "--download"]
    yield ["diff", source, address]
    yield ["diff", "s3://models/new", address]
    yield ["repair", address]
    yield ["repair", source, "--source", address]
    yield ["recipes", "check", "deepseek-v3", address]
    yield ["deepseek", "--hf-ckpt-path", source, "--save-path", address, "--model-parallel", "4", "--n-experts", "4"]


def require_refused(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*words, "--json"]) == 2
    told = capsys.readouterr()
    (problem,) = json.loads(told.out)["problems"]
    assert problem["kind"] in ("no-source", "target-not-folder")
    assert "://BUCKET/FOLDER" in problem["expected"]
    assert hint in problem["remedy"]
    return told.out + told.err


@pytest.mark.parametrize("address", WITH_KEYS)
def test_keys_in_an_address_are_refused_at_once_and_not_shown(
    served: S3State, source: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in list_commands(address, str(source)):
        told = require_refused(words, "", capsys)
        assert not [secret for secret in SECRETS if secret in told], told
    assert not served.requests


def test_the_hint_tells_where_keys_and_servers_stand(served: S3State, capsys: pytest.CaptureFixture[str]) -> None:
    told = require_refused(["inspect", "s3://127.0.0.1:9000/models"], "AWS_ACCESS_KEY_ID", capsys)
    assert "AWS_ENDPOINT_URL names another server" in told
    assert not served.requests


@pytest.mark.parametrize("address", WITHOUT_BUCKET)
def test_an_address_without_a_bucket_is_refused_at_once(
    served: S3State, source: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in list_commands(address, str(source)):
        told = require_refused(words, "is a variable not set?", capsys)
        assert json.dumps(address) in told  # as it was given, and not as a path has it
    assert not served.requests


@pytest.mark.parametrize("address", [*WITHOUT_BUCKET, *WITH_KEYS])
def test_python_refuses_the_same(served: S3State, source: Path, address: str) -> None:
    calls: tuple[Callable[[], Any], ...] = (
        lambda: reshard.convert(source, address, RANKS),
        lambda: reshard.convert(address, "s3://models/new", RANKS),
        lambda: reshard.plan(source, RANKS, target=address),
        lambda: reshard.inspect(address),
        lambda: reshard.load(address, mp=RANKS, rank=0, framework="numpy"),
        lambda: reshard.open(address, framework="numpy"),
        lambda: reshard.verify("s3://models/new", address),
        lambda: reshard.diff("s3://models/new", address),
        lambda: reshard.repair(source, address),
    )
    for call in calls:
        with pytest.raises(reshard.Refused) as refused:
            call()
        told = f"{refused.value} {refused.value.problems}"
        assert not [secret for secret in SECRETS if secret in told], told
        assert "://BUCKET/FOLDER" in told
    assert not served.requests


def test_the_first_line_of_the_log_and_wrong_options_do_not_show_keys(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in list_commands(WITH_KEYS[0], str(source)):
        assert main([*words]) == 2
    for words in (["inspect", str(source), *WITH_KEYS], ["inspect", f"--such={WITH_KEYS[0]}"]):
        with pytest.raises(SystemExit):
            main(words)
    told = capsys.readouterr()
    assert "s3://...@models/m4" in told.err
    assert "unrecognized arguments" in told.err
    assert not [secret for secret in SECRETS if secret in told.out + told.err]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--source=s3://A:B@models/m4", "--source=s3://...@models/m4"),
        ("s3n://A:B@models/m4", "s3n://...@models/m4"),
        ("az://models/m4?sig=B", "az://models/m4?..."),
        ("s3://models/a@b:c", "s3://models/a@b:c"),
        ("s3://models/what?", "s3://models/what?"),
        ("hf://ORG/NAME@main", "hf://ORG/NAME@main"),
        ("file:///a@b", "file:///a@b"),
        ("http://127.0.0.1:80/a", "http://127.0.0.1:80/a"),
        ("a:b/c@d", "a:b/c@d"),
    ],
)
def test_nothing_else_is_hidden(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown


def test_a_path_has_lost_its_second_slash_and_is_still_the_address(served: S3State, source: Path) -> None:
    assert reshard.convert(source, Path("s3://models/t"), RANKS).done
    assert "t/reshard.json" in served.objects
    assert reshard.inspect(Path("s3://models/t"))
