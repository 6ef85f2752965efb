"""Runs a command, and says why it was refused."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict

from reshard.cli.outcome import REFUSED, print_aside
from reshard.cli.painting import RED, paint
from reshard.cli.terminal import print_json
from reshard.errors import Problem, Refused
from reshard.storage.remote_store import LISTENERS
from reshard.text import escape


def run_command(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Runs the function of a command. Returns its exit code, or REFUSED with the problems printed."""
    LISTENERS[:] = [] if options.json else [tell_aside]
    try:
        return run(options)
    except Refused as refused:
        if ask_to_remove(refused, options):
            options.yes = True
            return run_command(run, options)
        problems, told = refused.problems, str(refused)
    except OSError as error:
        file, said = str(error.filename or ""), str(error.strerror or error)
        problems = (Problem("system-error", file, said, "no error of the system"),)
        told = f"{escape(problems[0].subject)}: {problems[0].found}"
    if options.json:
        print_json({"status": "refused", "problems": [asdict(problem) for problem in problems]})
    print_aside(paint(f"reshard: refused\n{told}", RED, sys.stderr))
    return REFUSED


def tell_aside(line: str) -> None:
    """Tells that a store makes us wait."""
    print_aside(f"reshard: {escape(line)}")


def ask_to_remove(refused: Refused, options: argparse.Namespace) -> bool:
    """Asks on a terminal whether a restart may remove finished files. Elsewhere nobody is asked."""
    is_question = [problem.kind for problem in refused.problems] == ["finished-target"]
    if not is_question or options.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print_aside(f"{refused}\nRemove these files and write the target anew? [y/N] ")
    return sys.stdin.readline().strip().lower() in ("y", "yes")
