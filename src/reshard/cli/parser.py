"""The argument parser: options in sections, errors in one line with the nearest name, completion of shells."""

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from reshard.cli.outcome import REFUSED, print_aside
from reshard.cli.values import parse_path, parse_source
from reshard.text import escape

OTHER_WORDS = dict.fromkeys(
    ("--tp", "--model-parallel", "--tensor-parallel", "--tensor-parallel-size", "--world-size", "--tp-size"), "--mp"
)
"""Option names of other programs -> our option."""

COMMAND, ACTION = "COMMAND", "ACTION"
"""The places of sub-commands: of the program, and of the command `recipes`."""

LIKE = 0.7
"""How like an option must be to be suggested: `--dry` is like `--dry-run`, `--json` is not like `--version`."""

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
        print_aside(escape(f"{self.prog}: {text}{see}"))
        raise SystemExit(REFUSED)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raises ArgumentError for a word that is none of the choices, with the nearest one or all of them."""
        if action.choices is None or value in action.choices:
            return
        names = list(action.choices)
        nearest = get_close_matches(str(value), names, 1)
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
            parser.error("--print-completion needs the package shtab: pip install shtab")
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
    if wanted in names:
        return f"; put it behind the command: {parser.prog} {wanted}"
    nearest = [OTHER_WORDS[wanted]] if OTHER_WORDS.get(wanted) in names else get_close_matches(wanted, names, 1, LIKE)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def parse_words(parser: Parser, words: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line. Without a command it prints the help; wrong options end the program with one line."""
    options, unknown = parser.parse_known_args(words)
    own: Parser = options.parser
    if unknown:
        wanted = next((word.partition("=")[0] for word in unknown if word.startswith("-")), "")
        own.error(f"unrecognized arguments: {' '.join(unknown)}{suggest_option(own, wanted)}")
    if not hasattr(options, "run"):
        parser.print_help()
        # Not 0, which means proven: a script whose command is an empty variable must not pass.
        raise SystemExit(REFUSED)
    return options
