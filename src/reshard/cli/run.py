"""Runs a command, and says why it was refused."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict

from reshard.cli.outcome import REFUSED, print_aside
from reshard.cli.painting import RED, paint
from reshard.cli.terminal import print_json
from reshard.errors import Problem, Refused
from reshard.text import escape


def run_command(run: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Runs the function of a command. Returns its exit code, or REFUSED with the problems printed."""
    try:
        return run(options)
    except Refused as refused:
        problems, told = refused.problems, str(refused)
    except OSError as error:
        file, said = str(error.filename or ""), str(error.strerror or error)
        problems = (Problem("system-error", file, said, "no error of the system"),)
        told = f"{escape(file)}: {said}"
    if options.json:
        print_json({"status": "refused", "problems": [asdict(problem) for problem in problems]})
    print_aside(paint(f"reshard: refused\n{told}", RED, sys.stderr))
    return REFUSED
