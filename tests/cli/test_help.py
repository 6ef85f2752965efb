"""The help: sentences, sections, examples that parse, what it loads and how fast; and the completion of shells."""

import os
import re
import resource
import shlex
import subprocess
import sys
from argparse import Action, Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

from reshard.cli.main import COMMANDS, main, make_parser
from reshard.cli.parser import Parser, parse_words

NAMES = ["", *(command.name for command in COMMANDS), "recipes list", "recipes show", "recipes check"]
LIGHT = {"help_text", "layout_options", "main", "options", "outcome", "parser", "process", "shared_options", "values"}
"""The modules of the command line that the help needs."""


def run(*words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """With bytecode written, as for everybody: compiling takes longer than all else."""
    command = [sys.executable, *options, "-m", "reshard", *words]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)


def parsers(parser: Parser) -> Iterator[Parser]:
    """A parser, and those of its commands and their actions."""
    yield parser
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for own in action.choices.values():
                yield from parsers(own)


def help_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*name.split(), "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_commands_are_all_there() -> None:
    assert [parser.prog for parser in parsers(make_parser())] == [
        "reshard",
        *(f"reshard {command.name}" for command in COMMANDS[:7]),
        *(f"reshard recipes {action}" for action in ("list", "show", "check")),
        *(f"reshard {command.name}" for command in COMMANDS[7:]),
    ]


def test_without_a_command_the_help_is_printed_and_nothing_is_proven(capsys: pytest.CaptureFixture[str]) -> None:
    expected = help_of("", capsys)
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert capsys.readouterr() == (expected, "")


@pytest.mark.parametrize("name", NAMES)
def test_the_help_has_examples_exit_codes_and_a_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(name, capsys)
    assert text.startswith(f"usage: reshard {name}".rstrip() + " ")
    assert max(map(len, text.splitlines())) <= 100
    examples = re.findall(r"^  (reshard .+)$", text, re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example.partition(" >")[0])[1:]
        assert not name or words[: len(name.split())] == name.split()
        assert isinstance(parse_words(make_parser(), words), Namespace)  # a wrong one ends the program
    assert re.search(r"^Exit code:\n  0 if ", text, re.MULTILINE)
    (page,) = re.findall(r"^Documentation: (\S+), ", text, re.MULTILINE)
    assert (ROOT / page).exists()


@pytest.mark.parametrize("parser", parsers(make_parser()), ids=lambda parser: parser.prog)
def test_every_option_stands_in_a_section_and_has_sentences(parser: Parser) -> None:
    in_sections: list[Action] = [action for group in parser.sections.values() for action in group._group_actions]
    commands = [action for action in parser._actions if isinstance(action.choices, dict)]
    assert {id(action) for action in [*in_sections, *commands]} == {id(action) for action in parser._actions}
    assert not any("." in title for title in parser.sections)
    for action in in_sections:
        assert re.fullmatch(r"[A-Z].*\.", action.help or ""), action.dest
    for command in commands:
        for choice in getattr(command, "_choices_actions"):  # noqa: B009 - the type does not have it
            assert re.fullmatch(r"[A-Z].*\.", choice.help or ""), choice.dest


def test_the_help_loads_the_parser_only() -> None:
    for words in ([], ["--help"], ["convert", "--help"], ["recipes", "check", "-h"], ["--version"]):
        done = run(*words, options=("-X", "importtime"))
        loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
        ours = {name for name in loaded if name.startswith("reshard.")} - {"reshard.text", "reshard.cli"}
        assert ours - {"reshard.__main__"} == {f"reshard.cli.{name}" for name in LIGHT}
        assert loaded.isdisjoint({"dataclasses", "fractions", "inspect", "json", "numpy", "rich", "typing_extensions"})


def test_the_help_takes_less_than_a_tenth_of_a_second() -> None:
    """Of a processor, the best of some runs: other tests run beside it."""
    times = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.1


def test_make_help_lists_every_target_and_variable() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (help .+)$", text, re.MULTILINE)
    variables = {"PYTHON", *re.findall(r"\$\((\w+_(?:OPTIONS|TARGETS|SECONDS))\)", text)}
    done = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    assert re.findall(r"^([a-z]+): (?=\w)", done.stdout, re.MULTILINE) == [*targets.split(), "variables"]
    assert variables <= {*re.findall(r"[A-Z_]+", done.stdout)}


# completion


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["conv"], ["convert"]),
        (["recipes", ""], ["list", "show", "check"]),
        (["convert", "--ma"], ["--max-file-size", "--max-memory"]),
        (["convert", "--to", ""], ["ranks", "hf"]),
        (["convert", "mod"], ["model-a", "model-b"]),
        (["verify", "model-a", "--source", "model-"], ["model-a", "model-b"]),
        (["recipes", "check", "mine"], ["mine.toml"]),
    ],
)
def test_bash_completes_commands_options_values_and_paths(words: list[str], offered: list[str], tmp_path: Path) -> None:
    pytest.importorskip("shtab", reason="makes the scripts")
    for name in ("model-a", "model-b"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.toml").touch()
    script = run("--print-completion", "bash").stdout
    line = " ".join(map(shlex.quote, ["reshard", *words]))
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; COMP_LINE={shlex.quote(line)}; COMP_POINT=${{#COMP_LINE}}"
    call = """F=$(complete -p reshard | sed -E 's/.*-F ([^ ]+).*/\\1/'); $F; printf '%s\\n' "${COMPREPLY[@]}" """
    command = ["bash", "--norc", "-c", f"{script}\n{ask}\n{call}"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60)
    assert set(offered) <= set(done.stdout.split())
    assert done.stderr == ""


def test_the_script_of_zsh_is_of_this_command() -> None:
    pytest.importorskip("shtab", reason="makes the scripts")
    assert run("--print-completion", "zsh").stdout.startswith("#compdef reshard\n")


def test_without_shtab_the_package_to_install_is_named() -> None:
    """Isolated from the packages beside Python: only the standard library and ours are found."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from reshard.cli.main import main; main(sys.argv[1:])"
    source = str(ROOT / "src")
    command = [sys.executable, "-I", "-S", "-c", code, source, "--print-completion", "bash"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    said = "--print-completion needs the package shtab: pip install 'reshard[completion]'; see reshard --help"
    assert done.stderr == f"reshard: {said}\n"
