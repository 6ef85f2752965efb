"""Where a page may be written: nothing of the user's is replaced, and what cannot be written is refused at once."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from targets import CONFIG

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.pages.page import MARK
from reshard.pages.page_file import write_page
from reshard.synthetic import write_checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page-file")
    write_checkpoint(folder / "source", CONFIG, 2)
    return folder / "source"


def refusal_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Kind and found of the one problem of a command that is refused."""
    assert main([*words, "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["subject"].startswith("--html")
    return problem["kind"], problem["found"]


def commands(source: Path) -> list[list[str]]:
    return [["plan", f"{source}", "--mp", "2"], ["inspect", f"{source}"], ["diff", f"{source}", f"{source}"]]


@pytest.mark.parametrize("number", range(3))
def test_what_cannot_be_written_is_refused_before_the_work(
    number: int, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = commands(small)[number]
    (tmp_path / "mine.html").write_text("<!DOCTYPE html><title>mine</title>", encoding="utf-8")
    (tmp_path / "link.html").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(small)
    before = sorted(small.rglob("*"))
    for file, kind in (
        (tmp_path / "mine.html", "not-a-page"),
        (tmp_path / "link.html", "not-a-page"),
        (tmp_path, "cannot-write"),
        (tmp_path / "nowhere" / "page.html", "cannot-write"),
        (tmp_path / ("x" * 252 + ".html"), "cannot-write"),
        ("/proc/page.html", "cannot-write"),
        ("-", "cannot-write"),
        ("s3://bucket/page.html", "cannot-write"),
        (small / "page.html", "target-inside-source"),
        (small / "model-00001-of-00002.safetensors", "target-inside-source"),
        (tmp_path / "link" / "page.html", "target-inside-source"),
    ):
        assert refusal_of([*command, "--html", f"{file}"], capsys)[0] == kind, file
    assert (tmp_path / "mine.html").read_text(encoding="utf-8") == "<!DOCTYPE html><title>mine</title>"
    assert sorted(small.rglob("*")) == before


def test_a_target_gets_no_page_within(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "target").mkdir()
    words = ["plan", f"{small}", "--mp", "2", "--target", f"{tmp_path / 'target'}"]
    assert refusal_of([*words, "--html", f"{tmp_path / 'target' / 'page.html'}"], capsys)[0] == "target-inside-source"


def test_a_single_file_is_no_page(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next(small.glob("*.safetensors"))
    assert refusal_of(["inspect", f"{file}", "--html", f"{file}"], capsys)[0] == "target-inside-source"


def test_without_a_number_of_ranks_there_is_no_page(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal_of(["plan", f"{small}", "--html", f"{tmp_path / 'page.html'}"], capsys)[0] == "wrong-option"
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("number", range(3))
def test_a_page_is_told_of_and_replaced(
    number: int, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, command = tmp_path / "page.html", commands(small)[number]
    assert main([*command, "--html", f"{page}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"page: {page}"
    first = page.read_bytes()
    assert main([*command, "--html", f"{page}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == f"{page}"
    assert page.read_bytes() == first
    assert [*tmp_path.iterdir()] == [page]


def test_a_page_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    write_page(page, MARK + "first")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Refused, match="No space left"):
        write_page(page, MARK + "second")
    assert page.read_text(encoding="utf-8") == MARK + "first"
    assert [*tmp_path.iterdir()] == [page]


def test_a_page_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    page, link = tmp_path / "elsewhere" / "page.html", tmp_path / "link.html"
    write_page(page, MARK + "first")
    link.symlink_to(page)
    write_page(link, MARK + "second")
    assert link.is_symlink()
    assert page.read_text(encoding="utf-8") == MARK + "second"
    assert [*page.parent.iterdir()] == [page]


def test_the_file_of_another_run_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of several machines may have the same number: the name is random, and was there here all the same."""
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    theirs = tmp_path / f".reshard-page-{'0' * 16}.partial"
    theirs.write_text("theirs", encoding="utf-8")
    with pytest.raises(Refused, match="exists"):
        write_page(tmp_path / "page.html", MARK)
    assert [*tmp_path.iterdir()] == [theirs]
    assert theirs.read_text(encoding="utf-8") == "theirs"


def test_what_comes_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    monkeypatch.setattr(os, "fsync", lambda _: page.write_text("mine", encoding="utf-8"))
    with pytest.raises(Refused, match="no page of reshard"):
        write_page(page, MARK)
    assert page.read_text(encoding="utf-8") == "mine"
    assert [*tmp_path.iterdir()] == [page]


def test_looking_with_a_page_needs_no_numpy(small: Path, tmp_path: Path) -> None:
    words = ["inspect", f"{small}", "--html", f"{tmp_path / 'page.html'}"]
    code = f"import sys; from reshard.cli.main import main; main({words}); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_a_finished_target_has_a_page_too(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reshard.convert(small, tmp_path / "target", 2)
    words = [
        "plan",
        f"{small}",
        "--mp",
        "2",
        "--target",
        f"{tmp_path / 'target'}",
        "--html",
        f"{tmp_path / 'page.html'}",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"page: {tmp_path / 'page.html'}"
    assert "all are finished" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_difference_is_told_though_its_page_cannot_be_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    monkeypatch.setattr(os, "fsync", lambda _: page.write_text("mine", encoding="utf-8"))
    assert main(["diff", f"{small}", f"{small}", "--html", f"{page}"]) == 2
    told = capsys.readouterr()
    assert told.out.startswith("same: ")
    assert "page:" not in told.out
    assert "no page of reshard" in told.err
