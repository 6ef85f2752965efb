"""Targets in a bucket: the objects of a local target, byte for byte, and nothing of other people is touched."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from s3_server import SECRET, S3State, Stored, make_etag, serve_s3, set_s3_environment
from targets import CONFIG, RANKS, make_source_and_target

import reshard
from reshard.cli.main import main
from reshard.formats.part_manifests import Manifests, read_manifests_with_shares
from reshard.formats.target_names import JOURNAL, MANIFEST, PROGRESS, STORE_RECORD
from reshard.paths import AnyPath
from reshard.storage import remote_store, s3_uploads, streamed_uploads
from reshard.storage.target_store import UploadLimits
from reshard.synthetic import write_checkpoint
from reshard.target import preflight

ADDRESS = "s3://models/inner/model"
PREFIX = "inner/model/"
FOR_16_RANKS = {
    **CONFIG,
    "hidden_size": 128,
    "intermediate_size": 2048,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 128,
    "num_attention_heads": 32,
    "q_lora_rank": 128,
}
READS = {"list", "get", "head", "list_parts"}
"""Operations that change nothing."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("obstore")
    return make_source_and_target(tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="module")
def local(source: Path) -> Mapping[str, bytes]:
    return read_folder(source.with_name("whole"))


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=["parts", "stream"])
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[S3State]:
    """Empty; waits are short, and nothing of this machine's own settings counts."""
    monkeypatch.setattr(remote_store, "FIRST_WAIT", 0.01)
    with serve_s3() as state:
        set_s3_environment(monkeypatch, state, tmp_path)
        if "level" in request.fixturenames and request.getfixturevalue("level") == "stream":
            monkeypatch.setenv("AWS_REQUEST_PAYER", "false")  # with which we do not sign requests of our own
        yield state


def convert(source: Path, *words: str, address: str = ADDRESS, ranks: int = RANKS) -> int:
    return main(["convert", str(source), address, "--mp", str(ranks), *words])


def read_target(bucket: S3State, prefix: str = PREFIX) -> dict[str, bytes]:
    """What lies there, but for the record of the store."""
    return {name: content for name, content in bucket.read_folder(prefix).items() if name != STORE_RECORD}


def list_changes(bucket: S3State) -> list[str]:
    return [f"{one.operation} {one.key}" for one in bucket.requests if one.operation not in READS]


def run_refused(capsys: pytest.CaptureFixture[str], source: Path, *words: str, **given: object) -> str:
    """Runs a conversion that is refused, and returns what is said: without any secret."""
    capsys.readouterr()
    assert convert(source, *words, **given) == 2  # type: ignore[arg-type]
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert SECRET not in said.err + said.out
    return said.err


@pytest.mark.usefixtures("level")
def test_the_objects_are_the_files_of_a_local_target(
    bucket: S3State, source: Path, local: Mapping[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source) == 0
    assert read_target(bucket) == local
    record = json.loads(bucket.read_folder(PREFIX)[STORE_RECORD])["objects"]
    assert {name: entry["size"] for name, entry in record.items()} == {
        name: len(content) for name, content in local.items() if name != MANIFEST
    }
    assert not bucket.uploads
    assert f"reshard verify {ADDRESS} --source {source}" in capsys.readouterr().out
    bucket.requests.clear()
    assert convert(source) == 0
    assert f"{ADDRESS}: converted already; nothing was written" in capsys.readouterr().out
    assert list_changes(bucket) == []


def test_a_bucket_alone_is_a_target(bucket: S3State, source: Path, local: Mapping[str, bytes]) -> None:
    assert convert(source, address="s3://models") == 0
    assert read_target(bucket, "") == local


def test_functions_take_an_address(bucket: S3State, source: Path, local: Mapping[str, bytes]) -> None:
    conversion = reshard.convert(source, f"{ADDRESS}/", mp=RANKS)
    assert str(conversion.target) == ADDRESS
    assert str(conversion).startswith(f"{ADDRESS}: {RANKS} rank files")
    assert read_target(bucket) == local
    assert not reshard.plan(source, RANKS, target=ADDRESS).files


def test_json_names_the_target_and_the_next_steps(
    bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["status"] == "converted"
    steps = {step["does"]: step["command"] for step in told["next"]}
    assert steps["verify"] == f"reshard verify {ADDRESS} --source {source}"
    assert steps["copy"] == f"aws s3 sync {ADDRESS} model"
    assert steps["verify-copy"] == "reshard verify model"
    assert bucket.objects


def test_each_node_is_told_to_copy_its_ranks(
    bucket: S3State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "source", {**FOR_16_RANKS, "num_nextn_predict_layers": 0}, 1)
    assert convert(tmp_path / "source", "--json", ranks=16) == 0
    steps = {step["does"]: step["command"] for step in json.loads(capsys.readouterr().out)["next"]}
    words = shlex.split(steps["copy"])
    assert words[:5] == ["aws", "s3", "sync", ADDRESS, "model"]
    patterns = [*zip(words[5::2], words[6::2], strict=True)]
    copied = {name for name in read_target(bucket) if is_copied(name, patterns)}
    assert {name for name in copied if name.endswith(".safetensors")} == {
        f"model{rank}-mp16.safetensors" for rank in range(8)
    }
    assert MANIFEST in copied
    assert steps["verify-copy"] == "reshard verify model --ranks 0-7"


def is_copied(name: str, patterns: Sequence[tuple[str, str]]) -> bool:
    """Whether `aws s3 sync` copies a file: the last pattern that fits decides."""
    fitting = [option for option, pattern in patterns if fnmatchcase(name, pattern)]
    return not fitting or fitting[-1] == "--include"


def test_another_conversion_there_is_refused(bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(source) == 0
    before = dict(bucket.objects)
    said = run_refused(capsys, source, ranks=2)
    assert f"{ADDRESS}: target not empty" in said
    assert f"a finished conversion: {RANKS} ranks" in said
    assert f"reshard convert {ADDRESS} NEW --mp 2" in said
    assert bucket.objects == before


def test_files_of_other_people_are_refused(
    bucket: S3State, source: Path, local: Mapping[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    for stranger in ("notes.txt", "model0-mp4.safetensors", "config.json", "folder/x"):
        bucket.objects = {PREFIX + stranger: Stored(b"mine", make_etag(b"mine"))}
        before = dict(bucket.objects)
        said = run_refused(capsys, source)
        assert re.search("target not empty|no manifest", said)
        assert stranger.partition("/")[0] in said
        run_refused(capsys, source, "--restart", "--yes")
        assert bucket.objects == before
    assert list_changes(bucket) == []
    assert local


def test_a_target_in_its_source_is_refused(bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in source.iterdir():
        content = path.read_bytes()
        bucket.objects[f"source/{path.name}"] = Stored(content, make_etag(content))
    before = dict(bucket.objects)
    for address, kind in (("s3://models/source/ranks", "inside source"), ("s3://models/source", "inside source")):
        assert main(["convert", "s3://models/source", address, "--mp", "4"]) == 2
        assert f"{address}: target {kind}" in capsys.readouterr().err
    assert main(["convert", "s3://models/source", "s3://models", "--mp", "4"]) == 2
    assert "target not empty" in capsys.readouterr().err
    assert bucket.objects == before


def test_from_a_bucket_into_a_bucket(bucket: S3State, source: Path, local: Mapping[str, bytes]) -> None:
    for path in source.iterdir():
        content = path.read_bytes()
        bucket.objects[f"source/{path.name}"] = Stored(content, make_etag(content))
    assert main(["convert", "s3://models/source", ADDRESS, "--mp", str(RANKS)]) == 0
    assert read_target(bucket) == local


def test_ranks_in_two_runs_become_one_target(
    bucket: S3State, source: Path, local: Mapping[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, "--ranks", "0-1") == 0
    assert "reshard.ranks-0-1.json" in read_target(bucket)
    assert f"reshard convert {source} {ADDRESS} --mp {RANKS}" in capsys.readouterr().out
    assert convert(source, "--ranks", "2-3") == 0
    assert read_target(bucket) == local
    record = json.loads(bucket.read_folder(PREFIX)[STORE_RECORD])["objects"]
    assert {*record} == {*local} - {MANIFEST}
    assert convert(source, "--ranks", "1") == 0
    assert read_target(bucket) == local


def test_parts_that_were_copied_into_one_folder_are_joined(
    bucket: S3State, source: Path, local: Mapping[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    for ranks in ("0-1", "2-3"):
        assert convert(source, "--ranks", ranks, address=f"s3://models/part-{ranks}") == 0
        for name, content in bucket.read_folder(f"part-{ranks}/").items():
            bucket.objects[PREFIX + name] = Stored(content, make_etag(content))
    bucket.requests.clear()
    assert convert(source) == 0
    assert "the parts that were made apart are joined" in capsys.readouterr().out
    assert read_target(bucket) == local
    assert not any(".safetensors" in change for change in list_changes(bucket))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("ranks", [RANKS, 2])
def test_a_finished_target_is_made_anew_when_somebody_agrees(
    bucket: S3State, source: Path, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source) == 0
    bucket.objects[f"{PREFIX}notes.txt"] = Stored(b"mine", make_etag(b"mine"))
    before = dict(bucket.objects)
    bucket.requests.clear()
    said = run_refused(capsys, source, "--restart", ranks=ranks)
    assert f"--restart would remove {len(before) - 1} files" in said
    assert list_changes(bucket) == []
    assert convert(source, "--restart", "--yes", ranks=ranks) == 0
    made = read_target(bucket)
    assert made.pop("notes.txt") == b"mine"
    anew = source.with_name(f"anew-{ranks}")
    reshard.convert(source, anew, mp=ranks)
    assert made == read_folder(anew)
    record = json.loads(bucket.read_folder(PREFIX)[STORE_RECORD])["objects"]
    assert {*record} == {*made} - {MANIFEST}


def test_some_ranks_are_made_anew_beside_others(
    bucket: S3State, source: Path, local: Mapping[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source) == 0
    bucket.requests.clear()
    assert "--restart would remove 1 file, " in run_refused(capsys, source, "--restart", "--ranks", "1")
    assert convert(source, "--restart", "--yes", "--ranks", "1") == 0
    assert read_target(bucket) == local
    record = json.loads(bucket.read_folder(PREFIX)[STORE_RECORD])["objects"]
    assert {*record} == {*local} - {MANIFEST}
    assert {change.rpartition("/")[2] for change in list_changes(bucket) if ".safe" in change} == {
        "model1-mp4.safetensors"
    }


def test_a_plan_looks_at_the_target_and_writes_nothing(
    bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str], level: str
) -> None:
    words = ["plan", str(source), "--mp", str(RANKS), "--target", ADDRESS]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert ("uploads parts of 16.00 MiB or more; after an interruption those" in said) == (level == "parts")
    assert ("; after an interruption a file that is not whole begins anew" in said) == (level == "stream")
    assert not bucket.objects
    assert list_changes(bucket) == []
    bucket.objects[f"{PREFIX}notes.txt"] = Stored(b"mine", make_etag(b"mine"))
    assert main(words) == 2
    assert "target not empty" in capsys.readouterr().err
    del bucket.objects[f"{PREFIX}notes.txt"]
    assert convert(source, "--ranks", "0") == 0
    assert main(words) == 0
    assert "finished there, not written again: ranks 0" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "estimate" not in told
    assert told["upload"]["part_size"] == 16 << 20
    assert told["upload"]["memory"] <= 256 << 20
    assert convert(source) == 0
    assert main(words) == 0
    assert f"{ADDRESS}: converted already; no tensor would be written" in capsys.readouterr().out


def test_files_too_large_for_the_store_are_refused_first(
    bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_uploads.PartedTarget, "limits", UploadLimits(5 << 20, 5 << 20, 1, 5 << 20))
    for words in (
        ["convert", str(source), ADDRESS, "--mp", "1"],
        ["plan", str(source), "--mp", "1", "--target", ADDRESS],
    ):
        assert main(words) == 2
        assert "model0-mp1.safetensors: too large" in capsys.readouterr().err
    assert list_changes(bucket) == []


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source whose target has several parts in each file; beside it the target, `ranks`."""
    folder = tmp_path_factory.mktemp("large")
    write_checkpoint(folder / "source", {**CONFIG, "vocab_size": 32768}, 2)
    reshard.convert(folder / "source", folder / "ranks", mp=2)
    return folder / "source"


def kill_run(bucket: S3State, source: Path, operation: str, count: int) -> None:
    """Runs a conversion with small parts in a process that is killed after so many requests of an operation."""
    bucket.faults[operation, "delayed"] = 1000
    memory = "80MiB" if "AWS_REQUEST_PAYER" in os.environ else "20MiB"
    words = ["convert", str(source), ADDRESS, "--mp", "2", "--jobs", "1", "--max-memory", memory]
    with subprocess.Popen([sys.executable, "-m", "reshard", *words], stderr=subprocess.PIPE) as process:
        while bucket.count(operation) < count:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    bucket.faults.clear()


@pytest.mark.parametrize("operation", ["put_part", "complete", "delete"])
def test_a_killed_run_is_finished_by_the_next(
    bucket: S3State, large: Path, operation: str, level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_run(bucket, large, operation, 1 if operation == "complete" else 2)
    assert PREFIX + JOURNAL in bucket.objects
    if MANIFEST not in read_target(bucket):
        assert main(["inspect", ADDRESS]) == 0
        said = capsys.readouterr().out
        assert "an unfinished conversion" in said
        assert "in the store: " in said
        assert f"reshard convert SOURCE {ADDRESS} --mp 2" in said
        assert main(["plan", str(large), "--mp", "2", "--target", ADDRESS]) == 0
        assert "an unfinished run there has " in capsys.readouterr().out
        assert "an unfinished conversion: 2 ranks" in run_refused(capsys, large)
    assert convert(large, ranks=2) == 0
    assert read_target(bucket) == read_folder(large.with_name("ranks"))
    assert level == "stream" or not bucket.uploads


@pytest.mark.usefixtures("level")
def test_an_interrupt_ends_soon_and_says_the_way_on(bucket: S3State, large: Path) -> None:
    bucket.faults["put_part", "silent"] = 1000
    words = ["convert", str(large), ADDRESS, "--mp", "2"]
    with subprocess.Popen([sys.executable, "-m", "reshard", *words], stderr=subprocess.PIPE) as process:
        while not bucket.count("begin"):
            time.sleep(0.02)
        time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1].decode()
    assert time.monotonic() - began < 3
    assert process.returncode == 130
    assert "run the same command again to go on from there" in said
    assert "Traceback" not in said


def test_parts_that_were_noted_are_not_put_again(
    bucket: S3State, large: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.faults["complete", "denied"] = 1000
    words = ["--jobs", "1", "--max-memory", "20MiB"]
    assert convert(large, *words, ranks=2) == 2
    put = bucket.count("put_part")
    assert put >= 6
    bucket.faults.clear()
    capsys.readouterr()
    assert main(["inspect", ADDRESS]) == 0
    assert "2 of 2 files sent whole" in capsys.readouterr().out
    assert convert(large, *words, ranks=2) == 0
    assert "resumed: " in capsys.readouterr().out
    assert bucket.count("put_part") == put
    assert read_target(bucket) == read_folder(large.with_name("ranks"))


def test_a_killed_run_is_thrown_away_by_restart(
    bucket: S3State, source: Path, large: Path, local: Mapping[str, bytes], level: str
) -> None:
    kill_run(bucket, large, "complete", 1)
    assert convert(source, "--restart") == 0
    assert read_target(bucket) == local
    assert level == "stream" or not bucket.uploads


def test_a_journal_left_behind_the_manifest_is_removed(
    bucket: S3State, source: Path, local: Mapping[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.faults["delete", "denied"] = 1000
    assert convert(source) == 2
    assert SECRET not in capsys.readouterr().err
    assert {*read_target(bucket)} > {*local}
    bucket.faults.clear()
    assert convert(source) == 0
    assert "converted already; nothing was written" in capsys.readouterr().out
    assert read_target(bucket) == local


def test_notes_without_a_job_are_removed(
    bucket: S3State, source: Path, local: Mapping[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source) == 0
    bucket.objects[f"{PREFIX}{PROGRESS}/run-00001"] = Stored(b"late", make_etag(b"late"))
    capsys.readouterr()
    assert convert(source) == 0
    assert "converted already; nothing was written" in capsys.readouterr().out
    assert read_target(bucket) == local


@pytest.mark.parametrize("level", ["stream"], indirect=True)
@pytest.mark.usefixtures("level")
def test_an_object_whose_end_was_not_heard_of_is_no_stranger(
    bucket: S3State, source: Path, local: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(streamed_uploads.RETRIES, "max_retries", 1)
    bucket.faults["complete", "lost"] = 1000
    assert convert(source) == 2
    bucket.faults.clear()
    assert convert(source) == 0
    assert read_target(bucket) == local


def test_a_journal_of_other_ranks_is_left_to_its_run(
    bucket: S3State, source: Path, local: Mapping[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, "--ranks", "0-1") == 0
    bucket.faults["complete", "denied"] = 1000
    assert convert(source, "--ranks", "2-3") == 2
    bucket.faults.clear()
    left = dict(bucket.objects)
    assert PREFIX + JOURNAL in left
    assert convert(source, "--ranks", "0-1") == 0
    assert bucket.objects == left
    del bucket.objects[f"{PREFIX}tokenizer.json"]
    said = run_refused(capsys, source, "--ranks", "0-1")
    assert "an unfinished conversion of other ranks" in said
    assert convert(source, "--ranks", "2-3") == 0
    assert read_target(bucket) == local


def test_a_file_of_somebody_else_is_not_taken_for_that_of_an_unfinished_run(
    bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.faults["complete", "denied"] = 1000
    assert convert(source) == 2
    bucket.faults.clear()
    bucket.objects[f"{PREFIX}tokenizer.json"] = Stored(b"mine", make_etag(b"mine"))
    before = dict(bucket.objects)
    assert "1 file: tokenizer.json" in run_refused(capsys, source)
    run_refused(capsys, source, "--restart")
    assert bucket.objects == before


def test_a_run_that_ends_while_we_look_is_not_overwritten(
    bucket: S3State,
    source: Path,
    local: Mapping[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read_and_end(folder: AnyPath) -> Manifests:
        found = read_manifests_with_shares(folder)
        monkeypatch.setattr(preflight, "read_manifests_with_shares", read_manifests_with_shares)
        assert convert(source, "--ranks", "0-1") == 0
        return found

    monkeypatch.setattr(preflight, "read_manifests_with_shares", read_and_end)
    assert convert(source, "--ranks", "2-3") == 2
    assert "another run has ended there just now" in capsys.readouterr().err
    assert convert(source, "--ranks", "2-3") == 0
    assert read_target(bucket) == local


def test_lost_side_files_are_written_again(
    bucket: S3State, source: Path, local: Mapping[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source) == 0
    del bucket.objects[f"{PREFIX}tokenizer.json"]
    bucket.objects[PREFIX + STORE_RECORD] = Stored(b"{}", make_etag(b"{}"))
    bucket.requests.clear()
    assert convert(source) == 0
    assert "converted already; written again: tokenizer.json" in capsys.readouterr().out
    assert read_target(bucket) == local
    assert [change for change in list_changes(bucket) if ".safetensors" in change] == []
    etag = bucket.objects[f"{PREFIX}tokenizer.json"].etag
    record = json.loads(bucket.read_folder(PREFIX)[STORE_RECORD])["objects"]
    assert record == {"tokenizer.json": {"size": len(local["tokenizer.json"]), "etag": etag}}


def test_side_files_that_were_changed_are_refused(
    bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, "--ranks", "0") == 0
    bucket.objects[f"{PREFIX}tokenizer.json"] = Stored(b"{}", make_etag(b"{}"))
    said = run_refused(capsys, source)
    assert f"{ADDRESS}/tokenizer.json: wrong checksum" in said
    assert "changed since it was written" in said


@pytest.mark.parametrize(
    ("address", "kind", "hint"),
    [
        ("s3://nothing/model", "no target", "make it first"),
        ("s3://models/model.safetensors", "target not folder", "give the folder"),
        ("hf://org/model", "target not folder", "hf upload org/model FOLDER"),
        ("https://127.0.0.1/model", "target not folder", "upload it"),
    ],
)
def test_places_where_nothing_can_be_written_are_refused(
    bucket: S3State, source: Path, address: str, kind: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run_refused(capsys, source, address=address)
    assert f"{address}: {kind}" in said
    assert hint in said
    assert not bucket.objects


@pytest.mark.usefixtures("level")
def test_keys_that_may_not_write_are_refused(bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for operation in ("list", "put", "begin", "put_part"):
        bucket.faults[operation, "denied"] = 1000
        assert "no access" in run_refused(capsys, source)
        bucket.faults.clear()
        assert not bucket.objects
        assert not bucket.uploads


def test_the_command_in_place_of_deepseeks_script_takes_an_address(
    bucket: S3State, source: Path, local: Mapping[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--hf-ckpt-path", str(source), "--save-path", ADDRESS, "--n-experts", "16", "--model-parallel", str(RANKS)]
    assert main(["deepseek", *words]) == 0, capsys.readouterr().err
    assert read_target(bucket) == local


def test_repair_writes_to_disks_only(bucket: S3State, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", ADDRESS, "--source", str(source)]) == 2
    said = capsys.readouterr().err
    assert "target not folder" in said
    assert "--restart --yes" in said
    assert not bucket.requests
