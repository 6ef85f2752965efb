"""The command line: a table of the commands, and the function that parses a line and runs its command.

`reshard --help` loads this module, the parser and its texts only. The module of a command is named here, and imported
when the command runs.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

from reshard import __version__
from reshard.cli.help_text import describe_help
from reshard.cli.options import (
    add_convert,
    add_deepseek,
    add_demo,
    add_diff,
    add_inspect,
    add_plan,
    add_recipes,
    add_repair,
    add_verify,
)
from reshard.cli.outcome import INTERRUPTED, print_aside
from reshard.cli.parser import COMMAND, Parser, parse_words
from reshard.cli.shared_options import add_output, add_program


class Command(NamedTuple):
    """One sub-command: its name, its options, and the function that runs it."""

    name: str
    about: str
    """Its line in the help of the program."""
    add_options: Callable[[Parser], None]
    """Adds its options to a parser."""
    run: str
    """The function that runs it, as `module:function`."""


RUN_COMMAND = "reshard.cli.run:run_command"
"""Calls the function of a command, and tells why it is refused."""

COMMANDS = (
    Command("convert", "Write the file of each rank, or whole files.", add_convert, "reshard.cli.convert:run_convert"),
    Command("plan", "Show what convert would write, from the headers alone.", add_plan, "reshard.cli.convert:run_plan"),
    Command("inspect", "Show what a checkpoint holds.", add_inspect, "reshard.cli.inspect:run_inspect"),
    Command("verify", "Compare every byte of a target.", add_verify, "reshard.cli.verify:run_verify"),
    Command("repair", "Write the damaged files of a target again.", add_repair, "reshard.cli.repair:run_repair"),
    Command("diff", "Compare two checkpoints, tensor by tensor.", add_diff, "reshard.cli.diff:run_diff"),
    Command("recipes", "List, show or check recipes.", add_recipes, "reshard.cli.inspect:run_recipes"),
    Command("demo", "Make a small checkpoint, convert it, verify it.", add_demo, "reshard.cli.demo:run_demo"),
    Command(
        "deepseek", "Convert, by the options of DeepSeek's scripts.", add_deepseek, "reshard.cli.convert:run_deepseek"
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code: 0 proven, 1 problems found, 2 refused, 130 interrupted."""
    try:
        options = parse_words(make_parser(), arguments)
        options.words = [*(sys.argv[1:] if arguments is None else arguments)]
        code: int = load_function(RUN_COMMAND)(load_function(options.run), options)
    except KeyboardInterrupt as interrupt:
        print_aside("; ".join(["reshard: interrupted", *map(str, interrupt.args)]))
        return INTERRUPTED
    return code


def load_function(place: str) -> Any:
    """Imports a function by its place, `module:function`."""
    module, function = place.split(":")
    return getattr(import_module(module), function)


def make_parser() -> Parser:
    """Makes the parser of all commands."""
    program = "reshard"
    parser = Parser(prog=program, **describe_help("", program))
    commands = parser.add_subparsers(title="Commands", metavar=COMMAND, prog=program)
    for command in COMMANDS:
        own = commands.add_parser(command.name, help=command.about, **describe_help(command.name, program))
        command.add_options(own)
        add_output(own)
        own.set_defaults(run=command.run)
    add_program(parser, f"{program} {__version__}")
    return parser
