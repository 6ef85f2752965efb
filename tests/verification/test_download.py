"""A download against the hub's own records: every damage is seen and named, with the command that mends it."""

import gc
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from downloads import (
    COMMIT,
    CONFIG,
    DEEP,
    INDEX,
    NAMES,
    OTHER_COMMIT,
    SHARDS,
    begin_download,
    flip,
    hub_hash,
    record,
    record_path,
    write_cache,
    write_files,
)

import reshard
from reshard.cli.main import main
from reshard.errors import Problem, Refused
from reshard.verification.download import DownloadReport, verify_download

FIRST, SECOND, THIRD = SHARDS


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("download") / "good"
    write_files(folder)
    record(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(good, tmp_path / "download")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return write_cache(tmp_path / "hub")


@pytest.fixture(params=["through the cache", "past the cache"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "past the cache":
        monkeypatch.setattr("reshard.storage.page_cache.measure_available_memory", lambda: 0)


def check(folder: Path) -> DownloadReport:
    return verify_download(folder, None, None)


def facts(report: DownloadReport) -> list[tuple[str, str]]:
    return [(problem.kind, problem.subject) for problem in report.problems]


def only_problem(folder: Path) -> Problem:
    (problem,) = check(folder).problems
    return problem


def refusal(folder: Path) -> Problem:
    with pytest.raises(Refused) as caught:
        check(folder)
    (problem,) = caught.value.problems
    return problem


# --- files that are as the hub has them ---


@pytest.mark.usefixtures("way")
def test_a_good_download_is_proven_to_the_last_byte(good: Path) -> None:
    told: list[tuple[int, int]] = []
    report = verify_download(good, None, lambda done, total: told.append((done, total)))
    size = sum((good / name).stat().st_size for name in NAMES)
    assert (report.is_proven, report.problems, report.notes) == (True, (), ())
    assert (report.records, report.files, report.size) == (len(NAMES), len(NAMES), size)
    assert (told[0], told[-1]) == ((0, size), (size, size))


def test_a_snapshot_of_the_cache_is_proven_by_the_names_of_its_blobs(snapshot: Path, tmp_path: Path) -> None:
    assert check(snapshot).records == len(NAMES)
    assert check(snapshot).is_proven
    # Through a link to the snapshot: `..` in its links counts from where they are.
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "model").symlink_to(snapshot)
    assert check(tmp_path / "deep" / "er" / "model").is_proven
    flip((snapshot / FIRST).resolve(), -1)
    assert "org/some-model" in only_problem(tmp_path / "deep" / "er" / "model").remedy


def test_a_blob_may_be_a_link_to_a_blob_of_another_name(snapshot: Path) -> None:
    """Such are the blobs that several repositories share: their own names are no hashes of the content."""
    blob = (snapshot / FIRST).resolve()
    shared = snapshot.parents[2] / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    assert check(snapshot).is_proven
    flip(shared, -1)
    assert facts(check(snapshot)) == [("wrong-checksum", FIRST)]


@pytest.mark.parametrize("form", ['"{}"', 'W/"{}"', "{}\r"])
def test_a_hash_may_be_written_as_http_has_it(folder: Path, form: str) -> None:
    path = record_path(folder, FIRST)
    path.write_text(path.read_text().replace(hub_hash(folder / FIRST), form.format(hub_hash(folder / FIRST))))
    assert form.format(hub_hash(folder / FIRST)).encode() in path.read_bytes()
    assert check(folder).is_proven


def test_records_of_the_older_place_are_read(folder: Path) -> None:
    (folder / ".cache" / "huggingface").rename(folder / ".huggingface")
    assert check(folder).records == len(NAMES)
    flip(folder / FIRST, -1)
    assert facts(check(folder)) == [("wrong-checksum", FIRST)]


def test_files_of_the_user_are_counted_and_no_problem(folder: Path) -> None:
    (folder / "notes.md").write_text("mine")
    (folder / "out").mkdir()
    shutil.copy(folder / FIRST, folder / "out" / "model0-mp1.safetensors")
    shutil.copy(folder / FIRST, folder / "._model.safetensors")
    report = check(folder)
    assert report.is_proven
    (note,) = report.notes
    found = "2 files without a record of the hub, not compared: notes.md, out/model0-mp1.safetensors"
    assert (note.kind, note.text) == ("no-record", found)


def test_hundreds_of_files_are_compared(tmp_path: Path) -> None:
    write_files(tmp_path / "d")
    names = [f"part/{number}.txt" for number in range(500)]
    (tmp_path / "d" / "part").mkdir()
    for name in names:
        (tmp_path / "d" / name).write_text(name)
    record(tmp_path / "d", [*NAMES, *names])
    (tmp_path / "d" / names[377]).write_text("part/378.txt")
    report = check(tmp_path / "d")
    assert report.files == len(NAMES) + 500
    assert facts(report) == [("swapped-file", names[377])]


def test_several_revisions_are_noted(folder: Path) -> None:
    record(folder, [CONFIG, INDEX], OTHER_COMMIT)
    (note,) = check(folder).notes
    assert f"{COMMIT[:12]} (6 files), {OTHER_COMMIT[:12]} (2 files)" in note.text


# --- files that are not ---


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("place", [8, 300_000, -1])
def test_a_flipped_bit_is_seen_wherever_it_is(folder: Path, place: int) -> None:
    flip(folder / SECOND, place)
    ((_, subject),) = facts(check(folder))
    assert subject == SECOND


def test_both_hashes_and_the_command_that_mends_it_are_told(folder: Path) -> None:
    expected = hub_hash(folder / SECOND)
    flip(folder / SECOND, -1)
    problem = only_problem(folder)
    assert problem.kind == "wrong-checksum"
    assert problem.found == f"SHA-256 {hub_hash(folder / SECOND)}, {(folder / SECOND).stat().st_size:,} bytes"
    assert problem.expected == f"SHA-256 {expected}, by the hub"
    command = f"hf download ORG/NAME {SECOND} --revision {COMMIT} --local-dir {folder} --force-download"
    assert problem.remedy == command


def test_in_the_cache_the_command_names_the_repository(snapshot: Path) -> None:
    flip((snapshot / DEEP).resolve(), 0)
    cache = snapshot.parents[2]
    command = f"hf download org/some-model {DEEP} --revision {COMMIT} --cache-dir {cache} --force-download"
    assert only_problem(snapshot).remedy.startswith(command)


@pytest.mark.parametrize("name", [CONFIG, DEEP, "empty.txt", ".gitattributes", INDEX])
def test_a_small_file_is_compared_by_the_hash_of_git(folder: Path, name: str) -> None:
    (folder / name).write_text((folder / name).read_text() + " ")
    problem = only_problem(folder)
    assert (problem.kind, problem.subject) == ("wrong-checksum", name)
    assert problem.found.startswith("git SHA-1 ")
    assert "keep a copy, if you have changed it yourself" in problem.remedy


def test_a_file_that_is_cut_off_or_too_long_is_called_so(folder: Path) -> None:
    sizes = {name: (folder / name).stat().st_size for name in (FIRST, SECOND)}
    os.truncate(folder / FIRST, 1_000)
    with (folder / SECOND).open("ab") as file:
        file.write(b"x")
    short, long = check(folder).problems
    assert (short.kind, short.subject) == ("truncated-file", FIRST)
    assert f"{sizes[FIRST]:,} bytes, as its header says" in short.expected
    assert (long.kind, long.subject) == ("wrong-size", SECOND)
    assert f"{sizes[SECOND] + 1:,} bytes" in long.found


def test_swapped_files_are_named(folder: Path) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)
    report = check(folder)
    assert facts(report) == [("swapped-file", FIRST), ("swapped-file", SECOND)]
    assert report.problems[0].found.startswith(f"the content of {SECOND}")
    assert "give the files their names back" in report.problems[0].remedy


def test_a_copy_of_another_file_is_not_to_be_renamed(folder: Path) -> None:
    shutil.copy(folder / FIRST, folder / SECOND)
    problem = only_problem(folder)
    assert (problem.kind, problem.subject) == ("swapped-file", SECOND)
    assert problem.remedy.startswith("hf download")


def test_a_renamed_file_is_found_by_its_content(folder: Path) -> None:
    (folder / SECOND).rename(folder / "model.safetensors")
    problem = only_problem(folder)
    assert (problem.kind, problem.subject) == ("missing-file", SECOND)
    assert problem.found == "no such file, but model.safetensors has its content"
    assert problem.remedy == f"rename model.safetensors to {SECOND}"


@pytest.mark.parametrize("name", [FIRST, DEEP])
def test_a_recorded_file_that_is_not_there_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    problem = only_problem(folder)
    assert (problem.kind, problem.subject, problem.found) == ("missing-file", name, "no such file")


def test_a_link_to_nothing_is_missing(snapshot: Path) -> None:
    blob = (snapshot / THIRD).resolve()
    blob.rename(blob.with_name(blob.name + ".incomplete"))
    problem = only_problem(snapshot)
    assert (problem.kind, problem.subject) == ("missing-file", THIRD)
    assert problem.found == "a link to nothing, but an unfinished download: ../../blobs has its beginning"
    assert problem.remedy.startswith("hf download org/some-model ")
    assert "--force-download" not in problem.remedy
    blob.with_name(blob.name + ".incomplete").rename(blob.with_name(blob.name + ".0123abcd.incomplete"))
    assert only_problem(snapshot).found == problem.found
    blob.with_name(blob.name + ".0123abcd.incomplete").rename(blob.with_name("aside"))
    assert only_problem(snapshot).found == "a link to nothing"


def test_a_missing_file_of_a_snapshot_was_perhaps_begun(snapshot: Path) -> None:
    """As the downloader leaves it: the link is made when the blob is whole."""
    blob = (snapshot / THIRD).resolve()
    blob.rename(blob.with_name(blob.name + ".0123abcd.incomplete"))
    (snapshot / THIRD).unlink()
    problem = only_problem(snapshot)
    assert (problem.kind, problem.subject) == ("missing-file", THIRD)
    assert problem.found == "no such file, but ../../blobs has 1 unfinished download"


def test_an_unfinished_blob_is_a_problem_though_no_name_is_missing(snapshot: Path) -> None:
    blob = (snapshot / DEEP).resolve()
    blob.rename(blob.with_name(blob.name + ".incomplete"))
    (snapshot / DEEP).unlink()
    problem = only_problem(snapshot)
    assert (problem.subject, problem.found) == (
        "../../blobs",
        "1 unfinished download, of files whose names are not known",
    )
    assert "until it ends" in problem.remedy
    (snapshot.parent / OTHER_COMMIT).mkdir()
    report = check(snapshot)
    assert report.is_proven
    (note,) = report.notes
    assert "../../blobs has 1 unfinished download, of this revision or of another" in note.text


def test_a_file_that_only_the_index_names_is_missing(folder: Path) -> None:
    (folder / FIRST).unlink()
    record_path(folder, FIRST).unlink()
    problem = only_problem(folder)
    assert (problem.kind, problem.subject) == ("missing-file", FIRST)
    assert "no record" in problem.found
    assert f"--revision {COMMIT}" in problem.remedy


def test_without_an_index_the_numbers_tell_what_is_missing(folder: Path) -> None:
    for name in (SECOND, INDEX):
        (folder / name).unlink()
        record_path(folder, name).unlink()
    assert facts(check(folder)) == [("missing-file", SECOND)]


@pytest.mark.parametrize("form", ["old", "hashed", "with digits"])
def test_an_unfinished_download_is_called_so(folder: Path, form: str) -> None:
    content = (folder / SECOND).read_bytes()
    part = begin_download(folder, SECOND, content, 1_234, "0123abcd" if form == "with digits" else "")
    if form == "old":  # before the names were hashed
        part.rename(part.with_name(f"{SECOND}.{hub_hash(folder / SECOND)}.incomplete"))
    assert check(folder).is_proven  # left from a download that another has finished
    (folder / SECOND).unlink()
    problem = only_problem(folder)
    found = "no such file, but an unfinished download: .cache/huggingface/download has its beginning"
    assert problem.found == found
    assert "--force-download" not in problem.remedy
    record_path(folder, SECOND).unlink()
    problem = only_problem(folder)
    assert (problem.kind, problem.subject, problem.found) == ("missing-file", SECOND, found)
    assert problem.remedy == f"hf download ORG/NAME {SECOND} --revision {COMMIT} --local-dir {folder}"


@pytest.mark.parametrize("digits", ["", "0123abcd"])
def test_an_unfinished_download_of_an_unknown_file_is_seen(folder: Path, digits: str) -> None:
    part = begin_download(folder, "vision/other.bin", b"12345678", 5, digits)
    problem = only_problem(folder)
    assert problem.subject == f".cache/huggingface/download/vision/{part.name[:8]}..."
    assert problem.found == "an unfinished download, of a file whose name is not known"
    assert problem.remedy == "run the same `hf download` again until it ends"


def test_an_unfinished_index_is_called_by_its_name(folder: Path) -> None:
    content = (folder / INDEX).read_bytes()
    (folder / INDEX).unlink()
    record_path(folder, INDEX).unlink()
    begin_download(folder, INDEX, content, 5, "0123abcd")
    assert facts(check(folder)) == [("missing-file", INDEX)]
    assert "unfinished download" in only_problem(folder).found


def test_a_download_with_no_finished_file_is_refused_as_unfinished(tmp_path: Path) -> None:
    begin_download(tmp_path, FIRST, b"12345678", 5, "0123abcd")
    problem = refusal(tmp_path)
    assert (problem.kind, problem.subject) == ("unfinished-download", str(tmp_path))
    assert "until it ends" in problem.remedy


def test_a_file_beside_tells_an_unfinished_download(folder: Path) -> None:
    (folder / SECOND).rename(folder / f"{SECOND}.part")
    problem = only_problem(folder)
    assert problem.found == f"no such file, but an unfinished download: {SECOND}.part has its beginning"


@pytest.mark.parametrize("name", ["extra.safetensors", "original/tokenizer/extra.safetensors"])
def test_nothing_vouches_for_a_safetensors_file_without_a_record(folder: Path, name: str) -> None:
    shutil.copy(folder / FIRST, folder / name)
    problem = only_problem(folder)
    assert (problem.kind, problem.subject) == ("no-record", name)
    assert "--force-download; or move it away" in problem.remedy


@pytest.mark.parametrize("text", ["", "\n", f"{COMMIT}\n", f"{COMMIT}\nd41d8cd98f00b204e9800998ecf8427e-38\n1.5\n"])
def test_a_record_that_cannot_be_used_is_a_problem(folder: Path, text: str) -> None:
    record_path(folder, FIRST).write_text(text)
    problem = only_problem(folder)
    assert (problem.kind, problem.subject) == ("wrong-record", FIRST)


def test_a_file_that_cannot_be_read_does_not_end_the_job(folder: Path) -> None:
    (folder / FIRST).unlink()
    os.mkfifo(folder / FIRST)
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()
    flip(folder / THIRD, -1)
    report = check(folder)
    assert sorted(facts(report)) == [("cannot-read", FIRST), ("cannot-read", SECOND), ("wrong-checksum", THIRD)]
    assert all("--force-download" in problem.remedy for problem in report.problems)


def test_a_damaged_index_is_one_problem(folder: Path) -> None:
    (folder / INDEX).write_text("<html>")
    assert facts(check(folder)) == [("wrong-checksum", INDEX)]
    record_path(folder, INDEX).unlink()
    assert ("wrong-download", str(folder / INDEX)) in facts(check(folder))


def test_a_command_of_the_hint_is_safe_to_paste(folder: Path) -> None:
    name = "x; rm -rf $HOME"
    (folder / name).write_text("1")
    record(folder, [name])
    (folder / name).write_text("2")
    path = record_path(folder, name)
    path.write_text(path.read_text().replace(COMMIT, "$(reboot)"))
    remedy = only_problem(folder).remedy
    assert f"'{name}' --revision {COMMIT}" in remedy


def test_records_are_not_followed_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.txt.metadata").write_text(f"{COMMIT}\n{'0' * 64}\n1.0\n")
    (folder / ".cache" / "huggingface" / "download" / "link").symlink_to(tmp_path / "elsewhere")
    assert check(folder).records == len(NAMES)
    assert check(folder).is_proven


# --- no job at all ---


def test_a_folder_without_records_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / ".cache")
    assert refusal(folder).kind == "no-record"
    assert main(["verify", str(folder), "--download"]) == 2
    assert "--sums FILE" in capsys.readouterr().err


def test_a_subfolder_of_a_download_leads_to_the_download(folder: Path) -> None:
    problem = refusal(folder / "original")
    assert problem.kind == "no-record"
    assert problem.remedy.endswith(f"verify {folder}")


def test_a_repository_of_the_cache_leads_to_its_snapshot(snapshot: Path) -> None:
    (snapshot.parent / OTHER_COMMIT).mkdir()
    for folder in (snapshot.parents[1], snapshot.parent, snapshot.parents[1] / "blobs", snapshot.parents[2]):
        problem = refusal(folder)
        assert (problem.kind, problem.subject) == ("hub-cache", str(folder))
        assert problem.remedy == f"name the snapshot: {snapshot}"


def test_a_checkpoint_may_have_the_cache_of_the_hub_in_it(folder: Path, snapshot: Path) -> None:
    shutil.copytree(snapshot.parents[1], folder / "models--org--some-model", symlinks=True)
    assert check(folder).is_proven
    for name in SHARDS:
        (folder / name).unlink()
    assert facts(check(folder)) == [("missing-file", name) for name in SHARDS]
    (snapshot / "models--org--other").mkdir()
    assert check(snapshot).is_proven


@pytest.mark.parametrize("name", ["nowhere", CONFIG])
def test_anything_but_a_folder_is_refused(folder: Path, name: str) -> None:
    assert refusal(folder / name).kind == "no-source"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("spoil", [os.utime, Path.unlink, lambda path: os.truncate(path, 5_000)])
def test_a_file_that_changes_while_it_is_read_is_refused(folder: Path, spoil: Callable[[Path], object]) -> None:
    sums = folder / "SUMS"  # of this file alone, so that it is the one that is read
    sums.write_text(f"{hub_hash(folder / THIRD)}  {THIRD}\n")

    def change(done: int, _: int) -> None:
        if done and (folder / THIRD).exists():
            spoil(folder / THIRD)

    with pytest.raises(Refused) as caught:
        verify_download(folder, sums, change)
    assert {problem.kind for problem in caught.value.problems} == {"file-changed"}
    assert THIRD in str(caught.value)


def test_an_interrupt_does_not_wait_for_the_end_of_a_file(folder: Path) -> None:
    for name in (FIRST, SECOND, THIRD):
        os.truncate(folder / name, 2**40)  # without data: zeros, which would take a quarter of an hour

    sent: list[int] = []

    def interrupt(done: int, _: int) -> None:
        if done >= 1 << 20 and not sent:
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    gc.disable()  # hypothesis watches collections: an interrupt that comes while it does so is lost
    try:
        with pytest.raises(KeyboardInterrupt):
            verify_download(folder, None, interrupt)
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, before)


# --- the command and the function ---


def test_the_command_tells_what_was_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = sum((folder / name).stat().st_size for name in NAMES)
    assert main(["verify", str(folder), "--download"]) == 0
    assert capsys.readouterr().out == (
        f"{folder}: proven against 8 records of the hub\n8 files, {size:,} bytes compared, all equal\n"
    )
    flip(folder / FIRST, -1)
    (folder / "mine.txt").touch()
    assert main(["verify", str(folder), "--download"]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{folder}: 1 problem\n{FIRST}: wrong checksum\n")
    assert f"8 files, {size:,} bytes compared\nnote: 1 file without a record" in out
    assert "equal" not in out


def test_json_has_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.txt").touch()
    assert main(["verify", str(folder), "--download", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["files"], found["records"], found["problems"]) == ("proven", 8, 8, [])
    assert [note["kind"] for note in found["notes"]] == ["no-record"]
    flip(folder / FIRST, -1)
    assert main(["verify", str(folder), "--download", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], [problem["subject"] for problem in found["problems"]]) == ("differs", [FIRST])


def test_the_function_gives_a_report_that_prints(folder: Path) -> None:
    report = reshard.verify(folder, download=True)
    assert report.is_proven
    assert re.fullmatch(r"proven against 8 records of the hub\n8 files, [\d,]+ bytes compared, all equal", str(report))
    assert repr(report) == str(report)


@pytest.mark.parametrize(
    "more",
    [
        ["--source", "x"],
        ["--recipe", "llama"],
        ["--ranks", "0"],
        ["--sample", "1%"],
        ["--ignore-extra-files"],
        ["--sums", "x"],
    ],
)
def test_other_options_are_refused(more: list[str], good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(good), "--download", *more]) == 2
    error = capsys.readouterr().err
    assert f"{more[0]}: wrong option\n  hint:     leave one of them out\n  found:    with --download" in error
