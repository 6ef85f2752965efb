"""A folder against a list of checksums, as `sha256sum` and others write it."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from downloads import CONFIG, NAMES, SHARDS, flip, write_files

import reshard
from reshard.cli.main import main
from reshard.errors import Problem, Refused
from reshard.verification.download import DownloadReport, verify_download

ODD = "a\\b\nc *(x) = y.txt"
"""A name that sha256sum escapes."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path / "model")
    (tmp_path / "model" / ODD).write_text("odd")
    return tmp_path / "model"


def run_sha256sum(folder: Path, *words: str) -> str:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return subprocess.run(["sha256sum", *words, *names], cwd=folder, check=True, capture_output=True, text=True).stdout


def check(folder: Path, text: str | bytes) -> DownloadReport:
    path = folder.parent / "SHA256SUMS"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return verify_download(folder, path, None)


def refusals(folder: Path, text: str) -> list[Problem]:
    with pytest.raises(Refused) as caught:
        check(folder, text)
    return list(caught.value.problems)


def make_lines(folder: Path, form: str = "{0}  {1}") -> str:
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SHARDS}
    return "".join(form.format(digest, name) + "\n" for name, digest in hashes.items())


@pytest.mark.parametrize("words", [[], ["--binary"], ["--tag"]])
def test_a_list_of_sha256sum_is_read_with_odd_names(folder: Path, words: list[str]) -> None:
    text = run_sha256sum(folder, *words)
    assert "\n\\" in text  # an escaped name
    report = check(folder, text)
    assert (report.problems, report.records, report.files) == ((), len(NAMES) + 1, len(NAMES) + 1)
    (folder / ODD).write_text("ODD")
    assert [problem.subject for problem in check(folder, text).problems] == [ODD]


@pytest.mark.parametrize(
    "form",
    [
        "{0} {1}",
        "{0}\t{1}",
        "{0} *./{1}",
        "{0}  {1}\r",
        "\n# a comment\n{0}  {1}",
        "SHA2-256({1})= {0}",
        "{0}  x/../{1}",
    ],
)
def test_other_forms_are_read(folder: Path, form: str) -> None:
    report = check(folder, make_lines(folder, form))
    assert (report.problems, report.records) == ((), len(SHARDS))
    flip(folder / SHARDS[1], -1)
    assert [problem.subject for problem in check(folder, make_lines(folder, form)).problems] == []
    before = make_lines(folder, form)
    flip(folder / SHARDS[1], -1)
    (problem,) = check(folder, before).problems
    assert (problem.kind, problem.subject) == ("wrong-checksum", SHARDS[1])


def test_capitals_and_a_mark_of_byte_order_are_read(folder: Path) -> None:
    text = "".join(f"{line[:64].upper()}{line[64:]}\n" for line in make_lines(folder).splitlines())
    assert check(folder, b"\xef\xbb\xbf" + text.encode()).is_proven


def test_names_may_be_absolute_within_the_folder(folder: Path) -> None:
    assert check(folder, make_lines(folder, f"{{0}}  {folder}/{{1}}")).is_proven


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ".", "a\0b"])
def test_a_name_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    (problem,) = refusals(folder, make_lines(folder) + "0" * 64 + "  " + name)
    assert (problem.kind, problem.found) == ("unsafe-file-name", name)
    assert problem.subject.endswith("SHA256SUMS: line 4")
    assert problem.remedy.startswith("cd into the folder of the checkpoint where its files are known to be good")


@pytest.mark.parametrize("line", ["what is this", "0" * 63 + "  x", "f" * 64 + "x", "g" * 64 + "  x", "SHA256 x = 1"])
def test_a_line_of_another_form_is_named_by_its_number(folder: Path, line: str) -> None:
    (problem,) = refusals(folder, make_lines(folder) + "\n" + line)
    assert (problem.kind, problem.subject[-6:]) == ("wrong-sums", "line 5")
    assert "64" in problem.expected


@pytest.mark.parametrize(
    ("command", "algorithm"),
    [("md5sum", "MD5"), ("sha1sum", "SHA-1"), ("sha512sum", "SHA-512"), ("sha224sum", "SHA-224")],
)
@pytest.mark.parametrize("words", [[], ["--tag"]])
def test_hashes_of_other_programs_are_refused_by_name(
    folder: Path, command: str, algorithm: str, words: list[str]
) -> None:
    text = subprocess.run([command, *words, *SHARDS], cwd=folder, check=True, capture_output=True, text=True).stdout
    problem, *others = refusals(folder, text)
    assert (problem.kind, len(others)) == ("wrong-sums", len(SHARDS) - 1)
    assert problem.found.replace("-", "").startswith(algorithm.replace("-", ""))
    assert "sha256sum *.safetensors" in problem.remedy


def test_of_another_file_than_a_list_ten_lines_are_named(folder: Path) -> None:
    problems = refusals(folder, (folder / CONFIG).read_text() * 50)
    assert [problem.subject.rpartition(": ")[2] for problem in problems] == [f"line {n}" for n in range(1, 11)]
    assert {problem.kind for problem in problems} == {"wrong-sums"}


def test_every_bad_line_of_a_list_is_named(folder: Path) -> None:
    """Also if they come first, or none is good."""
    for text, numbers in (("bad\nbad\n" + make_lines(folder), [1, 2]), ("bad\n" * 3, [1, 2, 3])):
        problems = refusals(folder, text)
        assert [problem.subject.rpartition("line ")[2] for problem in problems] == list(map(str, numbers))


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_list_is_refused(folder: Path, text: str) -> None:
    (problem,) = refusals(folder, text)
    assert problem.found == "no line with a checksum"


def test_a_list_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(Refused, match="SUMS: cannot read"):
        verify_download(folder, folder / "SUMS", None)


def test_two_hashes_of_one_file_are_refused(folder: Path) -> None:
    text = make_lines(folder)
    assert check(folder, text + text).is_proven
    (problem,) = refusals(folder, text + "0" * 64 + "  " + SHARDS[0])
    assert (problem.kind, problem.found) == ("wrong-sums", f"another hash of {SHARDS[0]} than before")


def test_a_list_of_files_elsewhere_is_refused(folder: Path) -> None:
    (problem,) = refusals(folder, "0" * 64 + "  other.safetensors")
    assert problem.found == "other.safetensors: none of them is there"
    assert problem.remedy == "is it the right list?"


@pytest.mark.parametrize("leading", ["model/", "demo/source/", "demo/source/original/"])
def test_the_folder_in_front_of_all_names_is_taken_off(
    folder: Path, leading: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list was made above the folder that the files were copied from."""
    elsewhere = folder.parent / leading.strip("/")
    if elsewhere != folder:
        shutil.copytree(folder, elsewhere)
    text = make_lines(folder, f"{{0}}  {leading}{{1}}")
    report = check(folder, text)
    assert (report.problems, report.records, report.files) == ((), len(SHARDS), len(SHARDS))
    assert f"without `{leading}`" in report.notes[0].text
    flip(folder / SHARDS[1], -1)
    (problem,) = check(folder, text).problems  # of the folder itself, not of the files that the list was made of
    assert (problem.kind, problem.subject) == ("wrong-checksum", SHARDS[1])
    assert main(["verify", str(folder), "--sums", str(folder.parent / "SHA256SUMS")]) == 1
    assert f"note: the names of SHA256SUMS are taken without `{leading}`" in capsys.readouterr().out
    shutil.copy(folder / SHARDS[0], folder / "more.safetensors")
    assert ("no-record", "more.safetensors") in [(one.kind, one.subject) for one in check(folder, text).problems]


def test_only_the_folders_above_the_checkpoint_are_taken_off(folder: Path) -> None:
    (folder / "original" / "x").write_text("x")
    report = check(folder, hashlib.sha256(b"x").hexdigest() + "  demo/original/x")
    assert "without `demo/`" in report.notes[0].text
    assert [(problem.kind, problem.subject) for problem in report.problems] == [("no-record", name) for name in SHARDS]


def test_a_folder_of_the_checkpoint_is_never_taken_off(folder: Path) -> None:
    """`original/x` is another file than `x`."""
    (problem,) = refusals(folder, make_lines(folder, "{0}  original/{1}"))
    assert problem.found.startswith(f"original/{SHARDS[0]}")


def test_a_list_of_several_folders_leads_above_if_it_names_this_one(folder: Path) -> None:
    other = shutil.copytree(folder, folder.parent / "other")
    text = make_lines(folder, "{0}  model/{1}") + make_lines(other, "{0}  other/{1}")
    (problem,) = refusals(folder, text)
    assert f"verify {folder.parent} with it" in problem.remedy
    assert check(folder.parent / "model", make_lines(folder)).is_proven
    # It names files there, but none of this folder: they would be proven in its place.
    text = make_lines(other, "{0}  other/{1}") + make_lines(other, "{0}  third/{1}")
    (problem,) = refusals(folder, text)
    assert problem.remedy == "is it the right list?"


def test_in_a_sub_folder_of_which_nothing_is_listed_safetensors_files_are_noted(folder: Path) -> None:
    (folder / "mine").mkdir()
    shutil.copy(folder / SHARDS[0], folder / "mine" / "x.safetensors")
    report = check(folder, make_lines(folder))
    assert report.is_proven
    assert "mine/x.safetensors" in report.notes[0].text
    text = make_lines(folder) + hashlib.sha256(b"y").hexdigest() + "  mine/y\n"
    (folder / "mine" / "y").write_text("y")
    (problem,) = check(folder, text).problems
    assert (problem.kind, problem.subject) == ("no-record", "mine/x.safetensors")


def test_what_the_list_does_not_name(folder: Path) -> None:
    shutil.copy(folder / SHARDS[0], folder / "more.safetensors")
    path = folder / "SHA256SUMS"
    path.write_text(make_lines(folder))
    report = verify_download(folder, path, None)
    assert [(problem.kind, problem.subject) for problem in report.problems] == [("no-record", "more.safetensors")]
    (note,) = report.notes
    assert note.text.startswith("5 files without a record of SHA256SUMS, not compared: ")
    assert "SHA256SUMS" not in note.text.partition("compared: ")[2]


def test_missing_and_renamed_files_are_named(folder: Path) -> None:
    text = make_lines(folder)
    (folder / SHARDS[0]).rename(folder / "x.safetensors")
    (folder / SHARDS[2]).unlink()
    first, second = check(folder, text).problems
    assert (first.subject, first.found) == (SHARDS[0], "no such file, but x.safetensors has its content")
    assert (second.kind, second.subject) == ("missing-file", SHARDS[2])


def test_the_command_and_the_function(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sums = folder.parent / "SUMS"
    sums.write_text(make_lines(folder))
    report = reshard.verify(folder, sums=sums)
    assert report.is_proven
    assert report.files == len(SHARDS)
    assert main(["verify", str(folder), "--sums", str(sums)]) == 0
    assert f"{folder}: proven against 3 records of SUMS\n" in capsys.readouterr().out
    (folder / SHARDS[1]).write_bytes(b"Entry not found")
    assert main(["verify", str(folder), "--sums", str(sums), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["subject"] == SHARDS[1]
    assert main(["verify", str(folder), "--sums", str(sums), "--ranks", "0"]) == 2
    assert (
        "--ranks: wrong option\n  hint:     leave one of them out\n  found:    with --sums" in capsys.readouterr().err
    )
