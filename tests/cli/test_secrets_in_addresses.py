"""Addresses with a name, a password and a query where a command takes a text: nothing of these is ever printed."""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from targets import RANKS, make_source_and_target

import reshard
from reshard.cli.main import main, make_parser
from reshard.errors import Problem, Refused
from reshard.storage import remote_store
from reshard.text import hide_secrets

PASSWORD, QUERY = "hunter2pw", "SECRETQ"

CLOSED = "127.0.0.1:9"
"""A server that does not answer."""

SCHEMES = ("http", "https", "HTTPS", "hf", "s3", "S3", "gs", "az", "ftp", "file", "my+store")

ADDRESSES = (
    *(f"{scheme}://joe:{PASSWORD}@{CLOSED}/x?sig={QUERY}" for scheme in SCHEMES),
    f"hf://org/x@{PASSWORD}?{QUERY}",
    f"hf:/joe:{PASSWORD}@org/x?{QUERY}",
    f"file:///joe:{PASSWORD}@x?{QUERY}",
    f"s3://models/x?{QUERY}",
    f"http://joe:{PASSWORD}/more{PASSWORD}@{CLOSED}/a b?sig=a {QUERY}",
    f"ftp://joe@{PASSWORD}@host/x#{QUERY}",
    f"https://{CLOSED}/x?other=http://{QUERY}/y",
)

LINES = {
    "convert": "source NEW --mp 2",
    "plan": "source --mp 2",
    "inspect": "source",
    "verify": "target",
    "repair": "target",
    "diff": "source source",
    "recipes show": "deepseek-v3",
    "recipes check": "deepseek-v3 source",
    "demo": "NEW",
    "deepseek": "--hf-ckpt-path source --save-path NEW --n-experts 4 --model-parallel 2",
}
"""By command: words that it takes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    make_source_and_target(folder)
    return folder


@pytest.fixture(autouse=True)
def _nobody_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_ENDPOINT", f"http://{CLOSED}")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 0.0)


def find_parser(command: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = make_parser()
    for word in command.split():
        (choices,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
        parser = choices[word]
    return parser


def list_lines() -> Iterator[tuple[str, str]]:
    """Lines with the word ADDRESS at each place and behind each option that takes a value; and where none is taken."""
    for command, words in LINES.items():
        given = words.split()
        for place, word in enumerate(given):
            if not word.startswith("--"):
                yield command, " ".join([*given[:place], "ADDRESS", *given[place + 1 :]])
        for action in find_parser(command)._actions:
            if action.option_strings and action.nargs != 0:
                yield command, f"{words} {action.option_strings[0]} ADDRESS"
    yield from (("", "ADDRESS"), ("recipes", "ADDRESS"), ("verify", "ADDRESS --download"))
    yield from (("inspect", f"source {more}") for more in ("ADDRESS", "--such=ADDRESS", "--such ADDRESS"))


def require_hidden(told: str) -> None:
    assert PASSWORD not in told
    assert QUERY not in told


@pytest.mark.parametrize(("command", "line"), list_lines())
def test_no_secret_is_printed_whatever_takes_the_address(
    command: str, line: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    modes = [["--json"], [], *([["--progress", "log"], ["--progress", "json"]] if command == "convert" else [])]
    for turn, address in enumerate(ADDRESSES):
        words = [address if word == "ADDRESS" else word.replace("ADDRESS", address) for word in line.split()]
        try:
            code = main([*command.split(), *words, *modes[turn % len(modes)]])
        except SystemExit as ended:
            code = int(ended.code or 0)
        told = capsys.readouterr()
        assert code == 2, (words, told.err)
        require_hidden(told.out + told.err + caplog.text)


@pytest.mark.parametrize("address", ADDRESSES)
def test_python_keeps_no_secret_in_a_refusal(address: str) -> None:
    for call in (
        lambda: reshard.inspect(address),
        lambda: reshard.plan("source", RANKS, recipe=address),
        lambda: reshard.plan("source", RANKS, only=address),
        lambda: reshard.convert("source", "NEW", RANKS, on=address),
    ):
        with pytest.raises(Refused) as caught:
            call()
        require_hidden(f"{caught.value} {caught.value!r} {caught.value.problems}")


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("text", ["{}", "--html {}", "no page at {}", "'{}' is no number", "hf://a/b and {}", "a,{}"])
def test_every_text_of_a_problem_is_without_secrets(text: str, address: str) -> None:
    whole = text.format(address if text[0] in "{-'a" else address.replace(" ", "%20"))
    problem = Problem("no-source", whole, whole, whole, whole)
    require_hidden(repr(problem))
    assert hide_secrets(problem.found) == problem.found
    if text.startswith("'"):
        assert problem.found.endswith("' is no number")


@pytest.mark.parametrize(
    "text",
    [
        "hf://ORG/NAME, hf://ORG/NAME@REVISION",
        "hf://ORG/NAME@refs/pr/1/inner",
        "give hf://ORG/NAME?; or hf download ORG/NAME",
        "did you mean 's3://BUCKET/FOLDER'? or s3://BUCKET/what?/x",
        "s3://models/what?",
        "model.layers.?.mlp.[ab]*",
        "reshard convert hf://ORG/NAME NEW --only 'model.layers.?.mlp*'",
        "https://HOST:PORT or http://HOST:PORT",
        "http://127.0.0.1:80: Connection refused",
        "socks5://127.0.0.1:9",
        "./a?b@c:d",
        "a: b/c?d",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hide_secrets(text) == text


@pytest.mark.parametrize("text", ["http://a:b", "s3://?", "x://b ?a", "'a:/", "http://@?...", "a://b@'"])
def test_a_text_of_millions_of_characters_is_searched_once(text: str) -> None:
    assert len(hide_secrets(text * 100_000)) <= len(text) * 200_000
