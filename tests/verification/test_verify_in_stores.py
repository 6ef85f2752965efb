"""Targets in stores: read back against their manifest or source, or held against the ETags of their upload."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served_buckets import BUCKET, ServeFolder, serve_buckets
from store_records import RECORD, write_record
from store_servers import NAME, ServedFolder, serve_hub

import reshard
from reshard import Refused
from reshard.cli.main import main
from reshard.storage import page_cache
from reshard.storage.local import Ways
from reshard.storage.page_cache import THROUGH_STORE, choose_reading_threads, choose_ways_to_read
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.verification.report import Report

pytest.importorskip("obstore", reason="the package obstore is not installed")
TINY = {**SMALL_V3, "num_hidden_layers": 2, "vocab_size": 512, "n_routed_experts": 4, "num_experts_per_tok": 2}
RANK = "model1-mp2.safetensors"
AT = f"{BUCKET}/ranks"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a checkpoint, its rank files, its slices, and its weights in BF16."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "source", TINY, 3)
    (folder / "source" / "tokenizer.json").write_text("{}")
    reshard.convert(folder / "source", folder / "ranks", mp=2)
    reshard.convert(folder / "source", folder / "slices", to="dcp", ranks=3)
    reshard.convert(folder / "source", folder / "bf16", to="hf", cast="bf16")
    return folder


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServeFolder]:
    (tmp_path / "aws").mkdir()
    with serve_buckets(tmp_path / "aws") as start:
        yield start


@pytest.fixture
def served(made: Path, tmp_path: Path, serve: ServeFolder) -> ServedFolder:
    """A bucket with `source` and `ranks`, as a conversion leaves it there."""
    for name in ("source", "ranks"):
        shutil.copytree(made / name, tmp_path / "served" / name)
    bucket = serve(tmp_path / "served")
    write_record(tmp_path / "served" / "ranks", bucket)
    return bucket


def verify(*places: Any, **options: Any) -> Report:
    report = reshard.verify(*places, **options)
    assert isinstance(report, Report)
    return report


def kinds_of(report: Report) -> list[str]:
    return [problem.kind for problem in report.problems]


# --- read back ---


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("options", [{}, {"ranks": [1]}, {"sample": 0.1}])
def test_a_report_is_that_of_a_folder(made: Path, options: dict[str, Any]) -> None:
    there, here = verify(AT, **options), verify(made / "ranks", **options)
    assert there.target == AT
    assert here.target == str(made / "ranks")
    assert replace(there, target="") == replace(here, target="")
    assert not there.problems


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("source", ["made", BUCKET])
def test_a_target_in_a_bucket_is_compared_with_its_source(made: Path, source: str) -> None:
    origin = made / "source" if source == "made" else f"{BUCKET}/source"
    assert verify(AT, origin).is_proven
    assert verify(AT, origin, ranks=[0]).is_proven


@pytest.mark.parametrize("name", ["slices", "bf16"])
def test_slices_and_whole_files_in_a_bucket_are_verified(made: Path, serve: ServeFolder, name: str) -> None:
    serve(made / name)
    assert verify(BUCKET).is_proven
    assert verify(BUCKET, made / "source").is_proven


def test_all_is_read_in_large_pieces_and_once(served: ServedFolder) -> None:
    assert verify(AT).is_proven
    asked = [(one.path, one.range) for one in served.requests if RANK in one.path]
    assert len(asked) == len(set(asked)) == -(-(served.folder / "ranks" / RANK).stat().st_size // (8 << 20))


def test_a_target_on_the_hub_is_verified_with_its_commit(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    with serve_hub(made / "ranks") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        report = verify(f"hf://{NAME}")
        assert report.is_proven
        assert report.target == f"hf://{NAME}@{hub.commit}"
        with pytest.raises(Refused, match="which has no such record"):
            reshard.verify(f"hf://{NAME}", checksums_only=True)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(path: Path) -> None:
    path.write_bytes((path.parent / "model0-mp2.safetensors").read_bytes())


DAMAGES: list[tuple[Callable[[Path], object], str, str]] = [
    (flip_a_byte, "wrong-checksum", "other-upload"),
    (cut_short, "wrong-size", "wrong-size"),
    (swap, "swapped-file", "other-upload"),
    (Path.unlink, "missing-file", "missing-file"),
]


@pytest.mark.parametrize(("damage", "read", "listed"), DAMAGES)
def test_damage_is_found_and_its_hint_repairs_nothing(
    made: Path, served: ServedFolder, damage: Callable[[Path], object], read: str, listed: str
) -> None:
    damage(served.folder / "ranks" / RANK)
    report, by_etags = verify(AT), verify(AT, checksums_only=True)
    assert kinds_of(report) == [read]
    assert kinds_of(by_etags) == [listed]
    assert kinds_of(verify(AT, made / "source"))
    for problem in (*report.problems, *by_etags.problems, *verify(AT, made / "source").problems):
        assert RANK in problem.subject
        assert "repair" not in problem.remedy
    if read != "swapped-file":
        assert "convert again" in report.problems[0].remedy


def test_where_a_byte_differs_is_told_as_of_a_folder(served: ServedFolder) -> None:
    flip_a_byte(served.folder / "ranks" / RANK)
    (there,), (here,) = verify(AT).problems, verify(served.folder / "ranks").problems
    assert (there.subject, there.found, there.expected) == (here.subject, here.found, here.expected)


@pytest.mark.parametrize(("damage", "read", "listed"), DAMAGES[:2] + DAMAGES[3:])
def test_side_files_are_compared(
    served: ServedFolder, damage: Callable[[Path], object], read: str, listed: str, made: Path
) -> None:
    path = served.folder / "ranks" / "run_config.json"
    if damage is flip_a_byte:
        path.write_bytes(path.read_bytes()[::-1])
    else:
        damage(path)
    for report in (verify(AT), verify(AT, made / "source")):
        assert [(problem.kind, problem.subject) for problem in report.problems] == [
            (read.replace("wrong-size", "wrong-checksum"), path.name)
        ]
    assert kinds_of(verify(AT, checksums_only=True)) == [listed]


def test_an_object_that_is_replaced_meanwhile_is_refused(served: ServedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose_late(path: Any, size: int) -> object:
        swap(served.folder / "ranks" / RANK)  # after all was listed
        return choose_ways_to_read(path, size)

    monkeypatch.setattr("reshard.verification.checked_ranges.choose_ways_to_read", choose_late)
    with pytest.raises(Refused, match="source changed"):
        reshard.verify(AT)


def test_a_target_that_is_not_finished_is_refused(served: ServedFolder) -> None:
    (served.folder / "ranks" / "reshard.json").rename(served.folder / "ranks" / "reshard.journal")
    for unread in (False, True):
        with pytest.raises(Refused, match="unfinished target"):
            reshard.verify(AT, checksums_only=unread)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("address", "kind"), [(f"{AT}/{RANK}", "empty target"), (f"{BUCKET}/source", "no manifest")])
def test_what_is_no_target_is_refused(address: str, kind: str) -> None:
    with pytest.raises(Refused, match=kind):
        reshard.verify(address)


# --- memory ---


@pytest.mark.parametrize(("memory", "threads"), [(1 << 20, 16), (16 << 20, 16), (64 << 20, 4), (1 << 40, 1)])
def test_so_many_threads_read_a_store_as_their_memory_allows(memory: int, threads: int) -> None:
    assert choose_reading_threads(Ways(THROUGH_STORE, "cached"), memory) == threads


CHECKS: list[Callable[[], object]] = [
    lambda: reshard.verify(AT),
    lambda: reshard.verify(AT, f"{BUCKET}/source"),
    lambda: reshard.diff(AT, f"{BUCKET}/source"),
]


@pytest.mark.parametrize("check", CHECKS)
def test_each_check_bounds_its_threads(
    served: ServedFolder, check: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reshard.verification.checked_ranges.STORE_READ_SIZE", 64 << 10)
    served.delay = 0.01
    check()
    assert served.busiest > 6
    served.forget()
    monkeypatch.setattr(page_cache, "MEMORY_TO_READ_STORE", 1)
    check()
    assert served.busiest <= 6  # headers and side files


# --- by ETags ---


def test_an_upload_that_nobody_has_changed_is_told_without_reading(
    served: ServedFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    report = verify(AT, checksums_only=True)
    assert (report.problems, report.verdict, report.compared) == ((), "unchanged", 0)
    assert not report.is_proven
    assert not any("safetensors" in one.path or "run_config" in one.path for one in served.requests)
    assert main(["verify", AT, "--checksums-only"]) == 0
    said = capsys.readouterr().out
    assert f"{AT}: unchanged\n2 of 2 rank files, " in said
    assert "by their sizes and ETags; not read" in said
    assert "equal" not in said


def test_what_was_changed_ends_with_1(served: ServedFolder, capsys: pytest.CaptureFixture[str]) -> None:
    flip_a_byte(served.folder / "ranks" / RANK)
    assert main(["verify", AT, "--checksums-only", "--ranks", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "unchanged"
    assert main(["verify", AT, "--checksums-only", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert (said["status"], said["is_unread"], said["target"]) == ("differs", True, AT)
    assert said["problems"][0]["kind"] == "other-upload"
    assert main(["verify", AT, "--checksums-only"]) == 1
    said = capsys.readouterr().out
    assert f"{RANK}: other upload" in said
    assert "compared sizes and ETags; not read" in said


def edit_record(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / RECORD).read_text())
    edit(record)
    (folder / RECORD).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (lambda record: record["objects"].pop(RANK), "no-record"),
        (lambda record: record["objects"].pop("run_config.json"), "no-record"),
        (lambda record: record["objects"][RANK].update(etag=""), "no-record"),
        (lambda record: record["objects"][RANK].update(size=3), "other-upload"),
    ],
)
def test_what_the_record_does_not_vouch_for_is_a_problem(
    served: ServedFolder, edit: Callable[[dict[str, Any]], object], kind: str
) -> None:
    edit_record(served.folder / "ranks", edit)
    assert kinds_of(verify(AT, checksums_only=True)) == [kind]


def test_quotes_of_etags_do_not_count(served: ServedFolder) -> None:
    def strip(record: dict[str, Any]) -> None:
        for entry in record["objects"].values():
            entry["etag"] = entry["etag"].strip('"')

    edit_record(served.folder / "ranks", strip)
    assert verify(AT, checksums_only=True).verdict == "unchanged"


def test_an_extra_file_is_a_problem(served: ServedFolder) -> None:
    shutil.copy(served.folder / "ranks" / RANK, served.folder / "ranks" / "more.safetensors")
    assert kinds_of(verify(AT, checksums_only=True)) == ["extra-file"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no reshard-store.json"),
        ('{"objects": {"x": {"size": -1, "etag": "x"}}}', "other fields"),
        ('{"objects": [1]}', "other fields"),
        ('{"objects": {"x": {"size": 1}}}', "other fields"),
        ('{"objects": {', "JSONDecodeError"),
    ],
)
def test_a_record_that_says_nothing_is_refused(served: ServedFolder, content: str | None, words: str) -> None:
    if content is None:
        (served.folder / "ranks" / RECORD).unlink()
    else:
        (served.folder / "ranks" / RECORD).write_text(content)
    with pytest.raises(Refused, match=words) as caught:
        reshard.verify(AT, checksums_only=True)
    assert content is not None or "leave checksums_only out" in str(caught.value)
    assert verify(AT).is_proven


@pytest.mark.parametrize(
    "words", ["--source s", "--sample 1%", "--download", "--sums s", "--recipe llama", "--config s"]
)
def test_options_that_read_do_not_go_with_it(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", AT, "--checksums-only", *words.split()]) == 2
    assert f"{words.split(maxsplit=1)[0]}: wrong option" in capsys.readouterr().err


def test_a_folder_of_this_machine_is_refused(made: Path) -> None:
    with pytest.raises(Refused, match="has no such record"):
        reshard.verify(made / "ranks", checksums_only=True)


# --- diff ---


@pytest.mark.usefixtures("served")
def test_two_sides_in_buckets_are_compared(made: Path) -> None:
    there, here = reshard.diff(AT, f"{BUCKET}/source"), reshard.diff(made / "ranks", made / "source")
    assert there.same
    assert not there.values  # the MTP layers are in B only
    assert replace(there, a="", b="") == replace(here, a="", b="")


def test_distances_are_those_of_folders(made: Path, serve: ServeFolder) -> None:
    serve(made)
    options: dict[str, Any] = {"dequantize": True}
    there = reshard.diff(f"{BUCKET}/bf16", f"{BUCKET}/source", **options)
    here = reshard.diff(made / "bf16", made / "source", **options)
    assert replace(there, a="", b="") == replace(here, a="", b="")
    assert there.dequantized
