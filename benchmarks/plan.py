"""How long planning takes, and how much memory it needs, for the largest models at full size and 16 ranks.

    python benchmarks/plan.py

Makes the checkpoints in a temporary folder: all names, shapes and sizes are true, the data are holes in sparse files.
Each run is a fresh process that reads the headers and makes the plan as `reshard plan` does. The headers were written
just before, so they come from the page cache.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

RUNS = 5
RANKS = 16
MODELS = ("deepseek-v3", "kimi-k2", "deepseek-v4-pro")
MEASURES = {"read": "s", "plan": "s", "read + plan": "s", "peak memory": "MB"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of planning for 16 ranks.")
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    source = parser.parse_args().once
    if source:
        print(json.dumps(measure(source)))
        return
    for model in MODELS:
        with tempfile.TemporaryDirectory(prefix="reshard-benchmark-") as folder:
            make_source(Path(folder) / model, model)
            runs = [run_once(Path(folder) / model) for _ in range(RUNS)]
        print(f"{model}, {runs[0]['tensors']:,.0f} tensors, {RANKS} ranks: {RUNS} runs")
        print(f"{'':12}  {'best':>8}  {'median':>8}")
        for name, unit in MEASURES.items():
            values = [run[name] for run in runs]
            print(f"{name:12}  {min(values):8.2f}  {median(values):8.2f}  {unit}")


def make_source(folder: Path, model: str) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from families import write_full  # noqa: PLC0415 - what is measured imports by itself

    write_full(folder, model)


def run_once(source: Path) -> dict[str, float]:
    """Measures in a process of its own, so that nothing is warm and the memory is that of one plan."""
    command = [sys.executable, __file__, "--once", str(source)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def measure(source: Path) -> dict[str, float]:
    from reshard.planning.planner import make_plan  # noqa: PLC0415
    from reshard.sources.source import read_source  # noqa: PLC0415
    from reshard.types import Layout  # noqa: PLC0415

    gc.disable()  # as the command does
    started = time.perf_counter()
    found = read_source(source)
    was_read = time.perf_counter()
    plan = make_plan(found, Layout(RANKS))
    planned = time.perf_counter()
    return {
        "tensors": len(plan.source.tensors),
        "read": was_read - started,
        "plan": planned - was_read,
        "read + plan": planned - started,
        "peak memory": peak_memory(),
    }


def peak_memory() -> float:
    """The most memory that this process has held, in MB, the interpreter and numpy included.

    Not `getrusage`: its figure starts at what the parent held when it started this process.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
