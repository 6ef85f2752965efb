"""Shares of a conversion into a bucket: the objects are those of one made at once, whatever comes in between."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Thread

import pytest
from s3_server import S3State, serve_s3, set_s3_environment
from targets import RANKS, make_source_and_target

import reshard
from reshard.cli.main import main
from reshard.formats.target_names import JOURNAL, MANIFEST, PROGRESS, STORE_RECORD
from reshard.storage import remote_store, s3_uploads, whole_objects
from reshard.target import preflight
from reshard.types import Share

ADDRESS = "s3://models/inner/model"
PREFIX = "inner/model/"
AT_ONCE = "s3://models/inner/at-once"
READS = {"list", "get", "head", "list_parts"}
LAYOUTS = {
    "ranks": ["--mp", str(RANKS)],
    "whole": ["--to", "hf", "--max-file-size", "1MB"],
    "slices": ["--to", "dcp", "--mp", str(RANKS)],
}
KILLER = """
import itertools, os, sys
from reshard.cli.process import entry
from reshard.storage import s3_uploads, streamed_uploads, whole_objects
from reshard.execution import store_target

store_target.FLUSH_SECONDS = 0
calls, last = itertools.count(), {last}

def counted(function):
    def call(*arguments, **options):
        if next(calls) == last and {before}:
            os._exit(9)
        done = function(*arguments, **options)
        if next(calls) == last:
            os._exit(9)
        return done
    return call

METHODS = ("begin_upload", "put_part", "complete_upload", "abort_upload", "put", "put_new", "_remove")
for kind in (whole_objects.WholeObjects, s3_uploads.PartedTarget, streamed_uploads.StreamedTarget):
    for name in METHODS:
        if name in vars(kind):
            setattr(kind, name, counted(vars(kind)[name]))
entry()
"""
"""The command; it dies before or behind a call that changes something."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("obstore")
    return make_source_and_target(tmp_path_factory.mktemp("stored"))


@pytest.fixture(params=["parts", "stream"])
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[S3State]:
    monkeypatch.setattr(remote_store, "FIRST_WAIT", 0.01)
    with serve_s3() as state:
        set_s3_environment(monkeypatch, state, tmp_path)
        if "level" in request.fixturenames and request.getfixturevalue("level") == "stream":
            monkeypatch.setenv("AWS_REQUEST_PAYER", "false")  # with which we do not sign requests of our own
        yield state


def convert(source: Path, *words: str, layout: str = "ranks", address: str = ADDRESS) -> int:
    return main(["convert", str(source), address, *LAYOUTS[layout], *words])


def run_refused(capsys: pytest.CaptureFixture[str], source: Path, *words: str, layout: str = "ranks") -> str:
    """Runs a conversion that is refused and changes nothing; returns what is said."""
    capsys.readouterr()
    assert convert(source, *words, layout=layout) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def read_target(bucket: S3State, prefix: str = PREFIX) -> dict[str, bytes]:
    """What lies there, but for the record of the store."""
    return {name: content for name, content in bucket.read_folder(prefix).items() if name != STORE_RECORD}


def read_record(bucket: S3State, prefix: str = PREFIX) -> Mapping[str, Mapping[str, object]]:
    found: Mapping[str, Mapping[str, object]] = json.loads(bucket.read_folder(prefix)[STORE_RECORD])["objects"]
    return found


def list_changes(bucket: S3State) -> list[str]:
    return [f"{one.operation} {one.key}" for one in bucket.requests if one.operation not in READS]


def rank_key(rank: int) -> str:
    return f"model{rank}-mp{RANKS}.safetensors"


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_joined_shares_are_one_conversion(bucket: S3State, source: Path, layout: str) -> None:
    assert convert(source, layout=layout, address=AT_ONCE) == 0
    wanted = read_target(bucket, "inner/at-once/")
    tensors = [entry["name"] for entry in json.loads(wanted[MANIFEST])["files"]]
    for share in (2, 0, 1):
        assert convert(source, "--share", f"{share}/3", layout=layout) == 0
    found = bucket.read_folder(PREFIX)
    folders = [f".share-{share}-of-3/{name}" for share in range(3) for name in (STORE_RECORD, MANIFEST)]
    assert sorted(found) == sorted([*folders, *tensors])
    bucket.requests.clear()
    assert convert(source, layout=layout) == 0
    assert not any(tensor in change for change in list_changes(bucket) for tensor in tensors)
    assert read_target(bucket) == wanted
    assert not bucket.uploads
    assert read_record(bucket) == read_record(bucket, "inner/at-once/")
    assert main(["verify", ADDRESS, "--source", str(source)]) == 0
    assert main(["verify", ADDRESS, "--checksums-only"]) in (0, 1)


@pytest.mark.usefixtures("level")
def test_a_finished_share_is_left_alone_before_and_after_the_join(
    bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for share in range(2):
        assert convert(source, "--share", f"{share}/2") == 0
    for _ in range(2):
        bucket.requests.clear()
        capsys.readouterr()
        assert convert(source, "--share", "1/2") == 0
        assert "converted already; nothing was written" in capsys.readouterr().out
        assert list_changes(bucket) == []
        assert convert(source) == 0
