"""Conversions into a bucket that go on elsewhere: from a copied source, at another level, after a broken removal."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import S3State, Stored, make_etag, serve_s3, set_s3_environment
from targets import RANKS, Crash, make_source_and_target

from reshard.cli.main import main
from reshard.formats.target_names import JOURNAL, STORE_RECORD
from reshard.storage import remote_store
from reshard.storage.s3_requests import S3Answer
from reshard.storage.s3_uploads import PartedTarget
from reshard.storage.whole_objects import WholeObjects

pytest.importorskip("obstore", reason="the package obstore is not installed")
TARGET = "s3://models/t"
STREAMS = "AWS_REQUEST_PAYER"
"""A setting that only obstore knows."""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3State]:
    monkeypatch.setattr(remote_store, "FIRST_WAIT", 0.01)
    with serve_s3() as state:
        set_s3_environment(monkeypatch, state, tmp_path)
        yield state


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source_and_target(tmp_path)


def convert(source: Path, *words: str) -> int:
    return main(["convert", str(source), TARGET, "--mp", str(RANKS), "--quiet", *words])


def require_whole(served: S3State, source: Path) -> None:
    found = served.read_folder("t/")
    del found[STORE_RECORD]
    assert found == {path.name: path.read_bytes() for path in source.with_name("whole").iterdir()}
    assert not served.uploads


def crash(*_: object) -> None:
    raise Crash


def leave_parts(source: Path) -> None:
    """Ends a conversion when all parts are put."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartedTarget, "complete_upload", crash)
        with pytest.raises(Crash):
            convert(source)


def test_a_copy_of_the_source_goes_on(served: S3State, source: Path) -> None:
    leave_parts(source)
    puts = served.count("put_part")
    copied = source.with_name("copied")
    shutil.copytree(source, copied, copy_function=shutil.copyfile)
    for path in copied.iterdir():
        os.utime(path, (1_700_000_000, 1_700_000_000))
    assert convert(copied) == 0
    assert served.count("put_part") == puts
    require_whole(served, source)


def test_other_bytes_behind_the_same_headers_do_not_go_on(
    served: S3State, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_parts(source)
    path = min(source.glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert convert(source) == 2
    assert "of another source, or of other bytes" in capsys.readouterr().err
    assert served.uploads


@pytest.mark.parametrize("words", [(), ("--restart",)])
def test_uploads_are_not_lost_at_the_other_level(
    served: S3State,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    leave_parts(source)
    before, uploads = {*served.objects}, {*served.uploads}
    monkeypatch.setenv(STREAMS, "false")
    assert convert(source, *words) == 2
    assert f"run it without {STREAMS}, as it was begun" in capsys.readouterr().err
    assert ({*served.objects}, {*served.uploads}) == (before, uploads)
    monkeypatch.delenv(STREAMS)
    assert convert(source, *words) == 0
    require_whole(served, source)


def test_a_stream_does_not_go_on_in_parts_but_begins_again(
    served: S3State, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put = WholeObjects.put

    def put_or_crash(self: WholeObjects, name: str, content: bytes) -> str:
        if name == STORE_RECORD:
            raise Crash
        return put(self, name, content)

    with monkeypatch.context() as patch:
        patch.setenv(STREAMS, "false")
        patch.setattr(WholeObjects, "put", put_or_crash)
        with pytest.raises(Crash):
            convert(source)
    assert convert(source) == 2
    assert "run it as it was begun; or --restart" in capsys.readouterr().err
    assert convert(source, "--restart") == 0
    require_whole(served, source)


def test_a_finished_target_with_noted_uploads_is_mended_at_its_level_only(
    served: S3State, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("reshard.execution.store_objects.remove_job", crash)
        with pytest.raises(Crash):
            convert(source)
    monkeypatch.setenv(STREAMS, "false")
    assert convert(source) == 2
    assert f"t/{JOURNAL}" in served.objects
    monkeypatch.delenv(STREAMS)
    assert convert(source) == 0
    require_whole(served, source)


@pytest.mark.parametrize("removals", [1, 2, 3])
def test_a_removal_that_was_broken_off_names_the_way_on(
    served: S3State, source: Path, capsys: pytest.CaptureFixture[str], removals: int
) -> None:
    assert convert(source) == 0
    remove, left = WholeObjects._remove, removals

    def remove_or_crash(self: WholeObjects, names: list[str]) -> None:
        nonlocal left
        for name in names:
            if not left:
                raise Crash
            left -= 1
            remove(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WholeObjects, "remove", remove_or_crash)
        with pytest.raises(Crash):
            convert(source, "--restart", "--yes")
    capsys.readouterr()
    assert convert(source) == 2
    assert "--restart --yes goes on with that" in capsys.readouterr().err
    assert convert(source, "--restart", "--yes") == 0
    require_whole(served, source)


@pytest.mark.parametrize("key", ["t//x", "t/a/../b"])
def test_a_key_that_cannot_be_listed_is_named_at_once(
    served: S3State, source: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    served.objects[key] = Stored(b"mine", make_etag(b"mine"))
    assert convert(source) == 2
    told = capsys.readouterr().err
    assert "wrong name" in told
    assert key in told
    assert main(["inspect", TARGET]) == 2
    assert key in capsys.readouterr().err
    assert served.count("list") == 2
    assert [*served.objects] == [key]


def test_an_answer_may_begin_with_spaces() -> None:
    assert S3Answer({}, b' \n<?xml version="1.0"?><A><B>1</B></A>\n').parse().findtext("B") == "1"


@pytest.mark.parametrize("streams", [False, True])
def test_a_begun_target_is_called_so_as_a_source(
    served: S3State,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    streams: bool,
) -> None:
    if streams:
        monkeypatch.setenv(STREAMS, "false")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WholeObjects, "put", crash)
            with pytest.raises(Crash):
                convert(source)
        assert "t/model0-mp4.safetensors" in served.objects
    else:
        leave_parts(source)
    new = tmp_path / "new"
    for words in (
        ["convert", TARGET, str(new), "--to", "hf"],
        ["diff", str(source), TARGET],
        ["plan", TARGET],
        ["verify", TARGET],
    ):
        capsys.readouterr()
        assert main(words) == 2
        told = capsys.readouterr().err
        assert "t: unfinished target" in told, told
        assert "run the same convert again" in told
    assert not new.exists()


@pytest.mark.parametrize("words", [(), ("--checksums-only",)])
@pytest.mark.parametrize("name", ["model1-mp4.safetensors", "tokenizer.json"])
def test_an_object_that_is_missing_is_written_by_the_same_convert(
    served: S3State, source: Path, capsys: pytest.CaptureFixture[str], name: str, words: tuple[str, ...]
) -> None:
    (source / "tokenizer.json").write_text("{}")
    assert convert(source) == 0
    before = {**served.objects}
    del served.objects[f"t/{name}"]
    puts = served.count("begin") + served.count("put_part")
    assert main(["verify", TARGET, *words]) == 1
    told = capsys.readouterr().out
    assert "run the same convert again, which writes what is missing and nothing else" in told
    assert "--restart" not in told
    assert convert(source) == 0
    assert served.count("begin") + served.count("put_part") - puts == (2 if name.endswith(".safetensors") else 0)
    assert main(["verify", TARGET, *words]) == 0
    assert {*served.objects} == {*before}
    kept = [key for key in before if key.endswith((".safetensors", "tokenizer.json"))]
    assert [served.objects[key].content for key in kept] == [before[key].content for key in kept]


def test_a_begun_target_of_another_job_may_be_thrown_away(
    served: S3State, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_parts(source)
    uploads = {*served.uploads}
    words = ["convert", str(source), TARGET, "--mp", "2", "--quiet"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "by the command that reshard inspect s3://models/t prints" in told
    assert uploads == {*served.uploads}
    assert main([*words, "--restart"]) == 0
    assert not served.uploads
    assert main(["verify", TARGET]) == 0


def test_parts_are_not_called_whole_files_and_need_no_disk(
    served: S3State, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_parts(source)
    assert not [key for key in served.objects if key.endswith(".safetensors")]
    assert main(["inspect", TARGET]) == 0
    assert f"{RANKS} of {RANKS} files sent whole\n" in capsys.readouterr().out
    for words in (["plan", str(source), "--target", TARGET], ["convert", str(source), TARGET, "--dry-run"]):
        assert main([*words, "--mp", str(RANKS)]) == 0
        told = capsys.readouterr().out
        assert f"{RANKS} of {RANKS} files sent whole;" in told
        assert "of disk" not in told
        assert "\nwrites " in told


@pytest.mark.parametrize("content", [b"<html><title>Sign in</title></html>", b"no such page", bytes(5000)])
def test_another_content_in_a_bucket_is_to_be_uploaded_again(
    served: S3State, source: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    for path in source.iterdir():
        served.objects[f"s/{path.name}"] = Stored(path.read_bytes(), make_etag(path.read_bytes()))
    name = max(key for key in served.objects if key.endswith(".safetensors"))
    served.objects[name] = Stored(content, make_etag(content))
    assert main(["inspect", "s3://models/s"]) == 2
    told = capsys.readouterr().err
    assert "upload the sound file again, in its place" in told
    assert "/resolve/" not in told
    assert "hf auth login" not in told
    assert "download" not in told.partition("hint:")[2]


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("s3x://b/f", "did you mean s3://b/f?"),
        ("s3a://KEYAAA:SECRETBBB@b/f", "did you mean s3://b/f?"),
        ("hff://org/name", "did you mean hf://org/name?"),
        ("swift://b/f", "download its files into a folder"),
    ],
)
def test_an_unknown_kind_of_address_is_called_so(address: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", address]) == 2
    told = capsys.readouterr().err
    assert "an unknown kind of address" in told
    assert hint in told
    assert "SECRETBBB" not in told
    assert "az://, gs://, hf://, http://, https://, s3://" in told
