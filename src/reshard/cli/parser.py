"""The argument parser: options in sections, errors in one line with the nearest name, completion of shells."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from reshard.cli.outcome import REFUSED, print_aside
from reshard.cli.values import parse_path, parse_source
from reshard.text import escape, hide_secrets

OTHER_WORDS = {
    **dict.fromkeys(
        ("--model-parallel", "--tensor-parallel", "--tensor-parallel-size", "--world-size", "--tp-size"), "--mp"
    ),
    **dict.fromkeys(("--dtype", "--torch-dtype", "--precision"), "--cast"),
    **dict.fromkeys(("--engine", "--for-engine", "--backend"), "--for"),
}
"""Option names of other programs -> our option."""

PLACES = {
    **dict.fromkeys(("--target", "--output", "--out", "-o", "--output-dir", "--out-dir", "--save-path"), "TARGET"),
    **dict.fromkeys(("--source", "--input", "-i", "--input-dir", "--model", "--hf-ckpt-path"), "SOURCE"),
}
"""Option names of other programs -> our argument that stands without an option."""

LATER_WORDS = {"verify": "--source", "repair": "--source", "plan": "--target"}
"""By command: the option that a word too much may stand for."""

COMMANDS_OF_OTHERS = {
    "help": "reshard --help, or reshard COMMAND --help",
    "version": "reshard --version",
    "list": "reshard recipes list",
    "show": "reshard recipes show",
    "check": "reshard recipes check",
}
"""Words that are no commands of ours -> what to type for them."""

ASKED_FOR = ("--restart", "--yes", "--allow-inexact")
"""Options that remove files or change values: they are suggested for their own beginning only."""

COMMAND, ACTION = "COMMAND", "ACTION"
"""The places of sub-commands: of the program, and of the command `recipes`."""

LIKE = 0.8
"""How like a word must be to be suggested: `hff` is like `hf`, `fp16` is not like `bf16`."""

RUNNING, OUTPUT = "How to run", "Output"
"""Sections that several commands have; the first one of each command is its own."""


class Parser(argparse.ArgumentParser):
    """A parser of the program, a command or an action: no abbreviations, and no `-h` but the one it is given."""

    def __init__(self, **kwargs: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(add_help=False, allow_abbrev=False, formatter_class=form, **kwargs)
        self.sections: dict[str, argparse._ArgumentGroup] = {}
        self.set_defaults(parser=self)

    def section(self, title: str) -> argparse._ArgumentGroup:
        """The group of options with a title; a new one is shown below the others."""
        if title not in self.sections:
            self.sections[title] = self.add_argument_group(title)
        return self.sections[title]

    def error(self, message: str) -> NoReturn:
        """Ends the program, with one line that says what is wrong and where the help is."""
        text = message.removeprefix("argument ").removeprefix(f"{COMMAND}: ").removeprefix(f"{ACTION}: ")
        if text.endswith(": PATH"):  # of `inspect`, whose option takes it for its pattern
            text += " (before --tensors)"
        see = f"{' See' if text.endswith('?') else '; see'} {self.prog} --help"
        print_aside(escape(f"{self.prog}: {hide_secrets(text)}{see}"))
        raise SystemExit(REFUSED)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raises ArgumentError for a word that is none of the choices, with the nearest one or all of them."""
        if action.choices is None or value in action.choices:
            return
        names = list(action.choices)
        if action.metavar == COMMAND and value in COMMANDS_OF_OTHERS:
            raise argparse.ArgumentError(action, f"{value!r} is no command; type {COMMANDS_OF_OTHERS[value]}")
        nearest = get_close_matches(str(value).lower(), names, 1, LIKE)
        if nearest:
            raise argparse.ArgumentError(action, f"{value!r} is unknown; did you mean {nearest[0]}?")
        hint = f"; for a recipe: reshard recipes show {value!r}" if action.metavar == ACTION else ""
        raise argparse.ArgumentError(action, f"{value!r} is not {', '.join(names[:-1])} or {names[-1]}{hint}")


class PrintCompletion(argparse.Action):
    """The option that prints the completion script of a shell, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, _: argparse.Namespace, shell: Any, *__: Any) -> NoReturn:
        """Prints the script. An error if shtab is not installed, which makes it."""
        try:
            import shtab  # noqa: PLC0415
        except ImportError:
            parser.error("--print-completion needs the package shtab: pip install 'reshard[completion]'")
        set_path_completion(parser, shtab.FILE)
        print(shtab.complete(parser, shell=shell))
        raise SystemExit(0)


def set_path_completion(parser: argparse.ArgumentParser, files: Any) -> None:
    """Marks the arguments of a parser and its commands that are paths, as shtab asks for it."""
    for action in parser._actions:  # noqa: SLF001
        if action.type in (parse_path, parse_source) or action.metavar in ("NAME|FILE", "FILE"):
            action.complete = files  # type: ignore[attr-defined]
        for command in action.choices.values() if isinstance(action.choices, dict) else ():
            set_path_completion(command, files)


def suggest_option(parser: Parser, wanted: str) -> str:
    """Suggests the option that an unknown one may stand for; empty if none is like it."""
    names = [name for action in parser._actions for name in action.option_strings]  # noqa: SLF001
    places = [action.metavar for action in parser._actions if not action.option_strings]  # noqa: SLF001
    if wanted in names:
        return f"put it behind the command: {parser.prog} {wanted}"
    if PLACES.get(wanted) in places:
        return f"{PLACES[wanted]} stands without an option: {parser.usage}"
    if OTHER_WORDS.get(wanted) in names:
        return f"did you mean {OTHER_WORDS[wanted]}?"
    names = [name for name in names if name != "--for"]  # it is like `--force`, which asks for something else
    fitting = [name for name in names if name not in ASKED_FOR or name.startswith(wanted[:5])]
    near = [name for name in fitting if name.startswith(wanted) or name.lower() == wanted.lower()]
    near += get_close_matches(wanted.lower(), fitting, 1, LIKE)
    return f"did you mean {near[0]}?" if near else ""


def explain_unknown_words(parser: Parser, words: Sequence[str], unknown: Sequence[str]) -> str:
    """Explains words that a parser does not know: options with the value that stood behind each, else all of them."""
    wanted = [word for word in unknown if word.startswith("-")]
    if not wanted:
        option = LATER_WORDS.get(parser.prog.rpartition(" ")[2], "")
        option = "--mp" if unknown[0].isdecimal() and parser.prog.endswith((" convert", " plan")) else option
        hint = f"; did you mean {option} {unknown[0]}?" if option else ""
        return f"{' '.join(unknown)}{hint}"
    shown, hints = [], []
    for option in dict.fromkeys(wanted):
        behind = words[words.index(option) + 1 :][:1] if option in words else []
        takes_value = option in OTHER_WORDS or option in PLACES
        shown += [option, *(word for word in behind if not word.startswith("-") and (takes_value or word in unknown))]
        hints.append(suggest_option(parser, option.partition("=")[0]))
    return "; ".join([" ".join(shown), *filter(None, dict.fromkeys(hints))])


def parse_words(parser: Parser, words: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line. Without a command it prints the help; wrong options end the program with one line."""
    options, unknown = parser.parse_known_args(words)
    own: Parser = options.parser
    if unknown:
        given, unknown = ([*map(hide_secrets, some)] for some in (sys.argv[1:] if words is None else words, unknown))
        own.error(f"unrecognized arguments: {explain_unknown_words(own, given, unknown)}")
    if not hasattr(options, "run"):
        parser.print_help()
        # Not 0, which means proven: a script whose command is an empty variable must not pass.
        raise SystemExit(REFUSED)
    return options
