"""Shares as processes of one machine against one process: `python benchmarks/shares.py FOLDER [--rounds 3]`.

On one machine shares have nothing to gain, so this is what they cost. A DeepSeek-V3 of 2.9 GB becomes rank files for 16
ranks in FOLDER: by one process, and by 1, 2 and 4 shares at the same time with their join. Each time is that of whole
commands, the source in the page cache. They run in turn, forwards and backwards (A B C, C B A, ...); a ratio is their
time divided by that of one process, the median (least to most): below 1, shares are faster. The join is measured alone
too. Then, from headers of DeepSeek-V3 at full size (`--only plan`): the time and memory to plan one of 16 shares.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from compileall import compile_dir
from itertools import pairwise
from pathlib import Path

from plan import make_source, peak_memory
from run import fresh, machine, make, measure_folder, prepare, spread

import reshard

RANKS = 16
SHARES = (1, 2, 4)
FULL_SHARES, RUNS = 16, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("run", "plan"))
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure_plan(options.folder)))
        return
    print(machine(), f"load {os.getloadavg()[0]:.1f}", sep="; ")
    compile_dir(Path(reshard.__file__).parent, quiet=1)  # as it is once it is installed
    if options.only != "plan":
        compare(make(options.folder, "v3"), options.folder / "target", options.rounds)
    if options.only != "run":
        show_plans(options.folder / "deepseek-v3-full")


def compare(source: Path, target: Path, rounds: int) -> None:
    seconds: dict[int, list[float]] = {count: [] for count in (0, *SHARES)}
    joins: dict[int, list[float]] = {count: [] for count in SHARES}
    for number in range(2 * rounds):
        for count in list(seconds)[:: -1 if number % 2 else 1]:
            prepare(source, "warm")
            fresh(target)
            started = time.perf_counter()
            if count:
                run([convert(source, target, "--share", f"{share}/{count}") for share in range(count)])
                made = time.perf_counter()
                run([convert(source, target)])
                joins[count].append(time.perf_counter() - made)
            else:
                run([convert(source, target)])
            seconds[count].append(time.perf_counter() - started)
            size = measure_folder(target)
    shutil.rmtree(target)
    print(f"{size / 1e9:.2f} GB written, {RANKS} ranks, {2 * rounds} times each")
    print(f"one process: {statistics.median(seconds[0]):.2f} s")
    for count in SHARES:
        ratios = [ours / theirs for ours, theirs in zip(seconds[count], seconds[0], strict=True)]
        taken, join = statistics.median(seconds[count]), statistics.median(joins[count])
        print(f"{count} shares and join: {taken:.2f} s; / one process: {spread(ratios)}; the join alone {join:.2f} s")


def convert(source: Path, target: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "reshard", "convert", str(source), str(target), "--mp", str(RANKS), "--quiet"]
    return [*words, *options]


def run(commands: Sequence[Sequence[str]]) -> None:
    """At the same time."""
    processes = [subprocess.Popen(command) for command in commands]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a command failed")


def show_plans(source: Path) -> None:
    if not source.exists():
        make_source(source, "deepseek-v3")
    command = [sys.executable, __file__, str(source), "--once"]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(RUNS)]
    print(f"a share of {FULL_SHARES} of DeepSeek-V3 at full size, {RANKS} ranks: {RUNS} runs, median (least to most)")
    for name, unit in (("read", "s"), ("plan", "s"), ("keep", "s"), ("memory", "MB")):
        print(f"{name:8} {spread([run[name] for run in runs])} {unit}")


def measure_plan(source: Path) -> dict[str, float]:
    """In a process of its own: headers, the plan of all files, as each share makes it, and what it keeps of that."""
    from reshard.planning.planner import make_plan  # noqa: PLC0415
    from reshard.planning.shares import keep_share  # noqa: PLC0415
    from reshard.sources.source import read_source  # noqa: PLC0415
    from reshard.types import Layout, Share  # noqa: PLC0415

    gc.disable()  # as the command does
    times = [time.perf_counter()]
    found = read_source(source)
    times.append(time.perf_counter())
    plan = make_plan(found, Layout(RANKS))
    times.append(time.perf_counter())
    keep_share(plan, Share(FULL_SHARES // 2, FULL_SHARES))
    times.append(time.perf_counter())
    read, planned, kept = (after - before for before, after in pairwise(times))
    return {"read": read, "plan": planned, "keep": kept, "memory": peak_memory()}


if __name__ == "__main__":
    main()
