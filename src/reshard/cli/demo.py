"""The command `demo`."""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

from reshard.api import convert_checkpoint
from reshard.cli.convert import converted_lines, plan_lines
from reshard.cli.terminal import progress
from reshard.cli.verify import say_report
from reshard.formats.huggingface import read_checkpoint
from reshard.inspection.contents import inspect_path
from reshard.planning.plan import Job, plan_conversion, recipe_for
from reshard.synthetic import SMALL, write_checkpoint
from reshard.text import printable
from reshard.verification.verify import verify_target

RANKS = 4

FILES = 4


def run_demo(options: argparse.Namespace) -> int:
    if options.folder:
        return demonstrate(options.folder, as_json=options.json)
    with tempfile.TemporaryDirectory(prefix="reshard-demo-") as folder:
        return demonstrate(Path(folder), as_json=options.json)


def demonstrate(folder: Path, *, as_json: bool) -> int:
    """Works in the subfolders `source` and `ranks` of a folder; returns the exit code of the verification."""
    source, target = folder / "source", folder / "ranks"
    job = Job(source, RANKS)

    def say(text: str) -> None:
        if not as_json:
            print("\n".join(map(printable, text.split("\n"))))

    say(f"1. Make a small checkpoint of DeepSeek-V3's true layout\n\n$ reshard inspect {source}")
    write_checkpoint(source, SMALL, FILES)
    say(str(inspect_path(source)))
    say(f"\n2. Plan, from the headers alone\n\n$ reshard plan {source} --mp {RANKS}")
    say("\n".join(plan_lines(plan_conversion(job), source)))
    say(f"\n3. Convert\n\n$ reshard convert {source} {target} --mp {RANKS}")
    started = time.monotonic()
    result = convert_checkpoint(job, target, progress=partial(progress, "convert"))
    say("\n".join(converted_lines(result, job, target, time.monotonic() - started)))
    say(f"\n4. Verify: read both sides again and compare every byte\n\n$ reshard verify {target} --source {source}")
    checkpoint = read_checkpoint(source)
    with progress("verify", result.plan.size) as advance:
        report = verify_target(target, checkpoint, recipe_for(job, checkpoint), advance)
    return say_report(report, target, source, as_json=as_json)
