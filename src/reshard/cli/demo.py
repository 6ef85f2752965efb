"""Runs the command `demo`."""

import argparse
import sys
import tempfile
from pathlib import Path

from reshard import api
from reshard.cli.convert import format_plan, make_verify_command
from reshard.cli.progress import show_progress
from reshard.cli.verify import print_report
from reshard.formats.remote_names import require_target
from reshard.inspection.contents import inspect_path
from reshard.synthetic import SMALL_V3, require_empty, write_checkpoint
from reshard.text import escape, format_command_lines

RANKS = 4
"""Number of ranks of the target."""

FILES = 4
"""Number of files of the source."""


def run_demo(options: argparse.Namespace) -> int:
    """Runs `demo` in the given folder or a temporary one. Returns the exit code of the verification."""
    if options.folder:
        require_empty(require_target(options.folder, is_written=True))
        return run_demo_in(options.folder, as_json=options.json)
    with tempfile.TemporaryDirectory(prefix="reshard-demo-") as folder:
        return run_demo_in(Path(folder), as_json=options.json)


def run_demo_in(folder: Path, *, as_json: bool) -> int:
    """Runs the demo in the subfolders `source` and `ranks` of a folder. Returns the exit code of the verification."""
    source, target = folder / "source", folder / "ranks"
    shown = argparse.Namespace(quiet=not sys.stderr.isatty())

    def say(text: str) -> None:
        if not as_json:
            print("\n".join(map(escape, text.split("\n"))))

    say(f"1. Make a small checkpoint of DeepSeek-V3's true layout\n\n$ reshard inspect {source}")
    write_checkpoint(source, SMALL_V3, FILES)
    say(str(inspect_path(source)))
    say(f"\n2. Plan, from the headers alone\n\n$ reshard plan {source} --mp {RANKS}")
    if not as_json:
        print(format_plan(api.plan(source, RANKS)))
    say(f"\n3. Convert\n\n$ reshard convert {source} {target} --mp {RANKS}")
    with show_progress("convert", shown) as progress:
        conversion = api.convert(source, target, RANKS, progress=progress)
    steps = format_command_lines("next", make_verify_command(conversion, argparse.Namespace()))
    say("\n".join([str(conversion), *steps]))
    say(f"\n4. Verify: read both sides again and compare every byte\n\n$ reshard verify {target} --source {source}")
    with show_progress("verify", shown) as progress:
        report = api.verify(target, source, progress=progress)
    return print_report(report, target, str(source), as_json=as_json)
