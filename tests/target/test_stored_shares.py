"""Shares of a conversion into a bucket: the objects are those of one made at once, whatever comes in between."""

import json
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3State, Stored, make_etag, serve_s3, set_s3_environment
from targets import RANKS, Crash, make_source_and_target

from reshard.cli.main import main
from reshard.execution import store_objects, store_target
from reshard.execution.store_journal import StoreJournal
from reshard.formats.target_names import JOURNAL, MANIFEST, STORE_RECORD
from reshard.storage import remote_store
from reshard.target import preflight

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
steps, last = itertools.count(), {last}

def count():
    if next(steps) == last:
        os._exit(9)

def counted(function):
    def call(*arguments, **options):
        count()
        done = function(*arguments, **options)
        count()
        return done
    return call

METHODS = ("begin_upload", "put_part", "complete_upload", "abort_upload", "put", "put_new", "_remove")
for kind in (whole_objects.WholeObjects, s3_uploads.PartedTarget, streamed_uploads.StreamedTarget):
    for name in METHODS:
        if name in vars(kind):
            setattr(kind, name, counted(vars(kind)[name]))
entry()
"""
"""The command; it dies before or behind a call that changes something, two steps each."""


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
    for said in ("/.share-1-of-2: converted already; nothing was written", ": share 1/2 has no file left to write"):
        bucket.requests.clear()
        capsys.readouterr()
        assert convert(source, "--share", "1/2") == 0
        assert f"{ADDRESS}{said}" in capsys.readouterr().out
        assert list_changes(bucket) == []
        assert convert(source) == 0


def run_killed(source: Path, last: int, *words: str, layout: str = "ranks") -> int:
    """Runs the command until such a step; returns its exit code, 9 if it was killed."""
    command = [sys.executable, "-c", KILLER.format(last=last), "convert", str(source), ADDRESS, *LAYOUTS[layout]]
    done = subprocess.run([*command, *words, "--jobs", "2"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 9), done.stderr
    return done.returncode


def leave_begun(source: Path, *words: str) -> None:
    """Ends a run when its tensor files are whole, and its manifest is not there."""

    def crash(*_: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoreJournal, "begin_ending", crash)
        with pytest.raises(Crash):
            convert(source, *words)


def run_once(patch: pytest.MonkeyPatch, module: object, name: str, run: Callable[[], object]) -> list[object]:
    """Has a function of a module run something else first, once. Returns what that gave."""
    function, given = getattr(module, name), list[object]()

    def call(*arguments: Any, **options: Any) -> Any:
        if not given:
            given.append(None)
            given[0] = run()
        return function(*arguments, **options)

    patch.setattr(module, name, call)
    return given


@pytest.fixture(scope="module")
def local(source: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in source.with_name("whole").iterdir()}


@pytest.mark.usefixtures("level")
def test_killed_shares_and_joins_go_on(bucket: S3State, source: Path, local: Mapping[str, bytes], level: str) -> None:
    dice, killed = random.Random(level), 0
    for words in (["--share", "0/2"], ["--share", "1/2"], []):
        for _ in range(2):
            if run_killed(source, dice.randrange(30), *words) == 0:
                break
            killed += 1
        else:
            assert convert(source, *words) == 0
        found = read_target(bucket)
        assert all(found[name] == local[name] for name in found.keys() & local.keys())
    assert killed > 2
    assert read_target(bucket) == local
    assert {*read_record(bucket)} == {*local} - {MANIFEST}
    # One that was just beginning at a kill is known to nobody.
    assert level == "stream" or not any(upload.parts for upload in bucket.uploads.values())


def test_a_join_that_is_killed_at_any_step_is_gone_on_with(
    bucket: S3State, source: Path, local: Mapping[str, bytes]
) -> None:
    for share in range(2):
        assert convert(source, "--share", f"{share}/2") == 0
    shares = dict(bucket.objects)
    for last in range(2 * len(local), 60, 5):  # from the files beside the tensors on
        bucket.objects = dict(shares)
        is_killed = run_killed(source, last) == 9
        found = read_target(bucket)
        assert MANIFEST not in found or {*found} >= {*local}
        assert convert(source) == 0
        assert read_target(bucket) == local
        assert {*read_record(bucket)} == {*local} - {MANIFEST}
        if not is_killed:
            return
    pytest.fail("the join has more steps than that")


@pytest.mark.usefixtures("level")
def test_a_join_needs_all_shares(
    bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str], local: Mapping[str, bytes]
) -> None:
    assert convert(source, "--share", "0/3") == 0
    leave_begun(source, "--share", "1/3")
    before = dict(bucket.objects)
    said = run_refused(capsys, source)
    assert "unfinished share" in said
    assert f"not finished; it makes {rank_key(1)}, {rank_key(2)}" in said
    assert f"not begun; it makes {rank_key(3)}" in said
    assert bucket.objects == before
    assert convert(source, "--share", "2/3") == 0
    assert convert(source, "--share", "1/3") == 0
    assert convert(source) == 0
    assert read_target(bucket) == local


@pytest.mark.usefixtures("level")
def test_restart_throws_away_one_share_only(
    bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str], local: Mapping[str, bytes]
) -> None:
    assert convert(source, "--share", "0/2") == 0
    leave_begun(source, "--share", "1/2")
    others = {key: one for key, one in bucket.objects.items() if ".share-0" in key or rank_key(0) in key}
    bucket.requests.clear()
    assert convert(source, "--share", "1/2", "--restart") == 0
    deleted = {change.removeprefix(f"delete {PREFIX}") for change in list_changes(bucket) if "delete" in change}
    assert (
        {rank_key(2), rank_key(3)}
        <= deleted
        <= {rank_key(2), rank_key(3)} | {name for name in deleted if name.startswith(".share-1-of-2/")}
    )
    assert others.items() <= bucket.objects.items()
    assert "--yes" in run_refused(capsys, source, "--share", "0/2", "--restart")
    assert others.items() <= bucket.objects.items()
    bucket.requests.clear()
    assert convert(source, "--share", "0/2", "--restart", "--yes") == 0
    assert not any("share-1" in change or rank_key(2) in change for change in list_changes(bucket))
    assert any(change.endswith(rank_key(0)) for change in list_changes(bucket))
    assert convert(source) == 0
    assert read_target(bucket) == local


def test_restart_ends_the_uploads_of_one_share_only(bucket: S3State, source: Path) -> None:
    for share in range(2):
        assert run_killed(source, 12, "--share", f"{share}/2") == 9
    others = {name for name, upload in bucket.uploads.items() if rank_key(0) in upload.key or rank_key(1) in upload.key}
    mine = {*bucket.uploads} - others
    assert others
    assert mine
    assert convert(source, "--share", "1/2", "--restart") == 0
    assert others == {*bucket.uploads}


@pytest.mark.parametrize("run", [convert, leave_begun])
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--share", "0/3"], f"{ADDRESS}: another job"),
        (["--share", "0/2", "--cast", "bf16"], f"{ADDRESS}/.share-1-of-2: another job"),
        (["--cast", "bf16"], f"{ADDRESS}/.share-1-of-2: another job"),
    ],
)
def test_other_conversions_are_refused_beside_a_share(
    bucket: S3State,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    run: Callable[..., int | None],
    words: list[str],
    found: str,
) -> None:
    run(source, "--share", "1/2")
    before = dict(bucket.objects)
    assert found in run_refused(capsys, source, *words)
    assert bucket.objects == before


def test_objects_of_strangers_are_refused_by_share_and_join(
    bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_begun(source, "--share", "1/2")
    bucket.objects[PREFIX + rank_key(1)] = Stored(b"precious", make_etag(b"precious"))
    before = dict(bucket.objects)
    for words in (["--share", "0/2"], ["--share", "0/2", "--restart"], ["--share", "1/2"], []):
        said = run_refused(capsys, source, *words)
        assert f"{ADDRESS}: no manifest" in said
        assert f"1 file that no manifest here names: {rank_key(1)}" in said
    assert bucket.objects == before


def test_a_share_is_refused_beside_a_run_for_all(
    bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_begun(source)
    before = dict(bucket.objects)
    assert "unfinished target" in run_refused(capsys, source, "--share", "0/2")
    assert bucket.objects == before


def test_a_share_and_a_run_for_all_that_begin_at_once_see_each_other(
    bucket: S3State,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    local: Mapping[str, bytes],
) -> None:
    with monkeypatch.context() as patch:
        run_once(patch, store_target, "open_store_journal", lambda: leave_begun(source))
        assert "unfinished target" in run_refused(capsys, source, "--share", "0/2")
    assert not any(".share" in key for key in bucket.objects)
    assert convert(source) == 0
    bucket.objects.clear()
    with monkeypatch.context() as patch:
        run_once(patch, store_target, "open_store_journal", lambda: leave_begun(source, "--share", "0/2"))
        assert "a share has begun there just now" in run_refused(capsys, source)
    assert PREFIX + JOURNAL not in bucket.objects
    for share in range(2):
        assert convert(source, "--share", f"{share}/2") == 0
    assert convert(source) == 0
    assert read_target(bucket) == local


def test_two_joins_at_once_spoil_nothing(
    bucket: S3State,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    local: Mapping[str, bytes],
) -> None:
    for share in range(2):
        assert convert(source, "--share", f"{share}/2") == 0
    before = dict(bucket.objects)
    for module, name in (
        (preflight, "read_share_records"),
        (store_target, "open_store_journal"),
        (store_target, "put_files"),
        (store_objects, "write_store_record"),
        (store_objects, "put_manifest"),
        (store_objects, "remove_finished_objects"),
    ):
        bucket.objects = dict(before)
        with monkeypatch.context() as patch:
            given = run_once(patch, module, name, lambda: convert(source))
            assert convert(source) in (0, 2)
        assert given == [0]
        assert "Traceback" not in capsys.readouterr().err
        assert convert(source) == 0
        assert read_target(bucket) == local, name
        assert {*read_record(bucket)} == {*local} - {MANIFEST}, name


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("name", ["open_store_journal", "put_files", "finish_target"])
def test_a_share_that_is_still_at_work_when_all_is_joined_spoils_nothing(
    bucket: S3State,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    local: Mapping[str, bytes],
    name: str,
) -> None:
    assert convert(source, "--share", "0/2") == 0
    with monkeypatch.context() as patch:
        given = run_once(patch, store_target, name, lambda: convert(source, "--share", "1/2") or convert(source))
        assert "Traceback" not in run_refused(capsys, source, "--share", "1/2")
    assert given == [0]
    assert read_target(bucket) == local
    assert {*read_record(bucket)} == {*local} - {MANIFEST}
    assert not bucket.uploads


def test_a_share_that_ends_while_another_looks_is_no_stranger(
    bucket: S3State, source: Path, monkeypatch: pytest.MonkeyPatch, local: Mapping[str, bytes]
) -> None:
    leave_begun(source, "--share", "1/2")
    run_once(monkeypatch, preflight, "read_manifests_with_shares", lambda: convert(source, "--share", "1/2"))
    assert convert(source, "--share", "0/2") == 0
    assert convert(source) == 0
    assert read_target(bucket) == local


def test_the_next_step_of_a_share_joins_all(
    bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str], local: Mapping[str, bytes]
) -> None:
    for share in range(2):
        capsys.readouterr()
        assert convert(source, "--share", f"{share}/2", "--json") == 0
    (step,) = json.loads(capsys.readouterr().out)["next"]
    assert step["does"] == "join"
    assert main(shlex.split(step["command"])[1:]) == 0
    assert read_target(bucket) == local


def test_what_ranks_have_made_is_not_of_a_share(bucket: S3State, source: Path, local: Mapping[str, bytes]) -> None:
    assert convert(source, "--ranks", "1") == 0
    bucket.requests.clear()
    for share in range(2):
        assert convert(source, "--share", f"{share}/2") == 0
    assert not any(rank_key(1) in change for change in list_changes(bucket))
    assert convert(source) == 0
    assert read_target(bucket) == local
    assert {*read_record(bucket)} == {*local} - {MANIFEST}


def test_a_share_without_files_writes_nothing(bucket: S3State, source: Path) -> None:
    assert convert(source, "--share", "5/9") == 0
    assert list_changes(bucket) == []


@pytest.mark.parametrize("layout", ["ranks", "slices"])
def test_shares_beside_a_part_are_seen(
    bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    assert convert(source, "--ranks", "1", layout=layout) == 0
    assert convert(source, "--share", "0/2", layout=layout) == 0
    before = dict(bucket.objects)
    capsys.readouterr()
    assert main(["inspect", ADDRESS]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:4] == [
        f"{ADDRESS}: shares of a target, not joined yet",
        "share 0/2: finished, rank 0 of 4",
        "share 1/2: not begun",
        "finished beside them: rank 1 of 4, by reshard.json",
    ]
    assert "a share alone" not in shown[4]  # its tensors are not in its folder
    share = f"{ADDRESS}/.share-0-of-2"
    for words in (
        ["inspect", ADDRESS, "--tensors", "*norm*"],
        ["inspect", share],
        ["verify", ADDRESS],
        ["verify", ADDRESS, "--checksums-only"],
        ["verify", ADDRESS, "--source", str(source)],
        ["verify", share],
        ["verify", share, "--source", str(source)],
        ["diff", str(source), ADDRESS],
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert f"{words[2] if words[0] == 'diff' else words[1]}: not joined\n" in said
        assert f"without --share: reshard convert SOURCE {ADDRESS} " in said
    for words in ([], ["--checksums-only"]):
        assert main(["verify", ADDRESS, "--ranks", "1", *words]) == 0
    assert bucket.objects == before
