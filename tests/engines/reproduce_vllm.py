"""Runs the script of the report to vLLM in `docs/upstream/`: a part of `make vllm`.

Ends with an error if the fault is gone: then the report is to be withdrawn.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from run_vllm import ENVIRONMENT
from upstream_reports import find_change, read_report

REPORT = "vllm-sharded-state.md"


def main() -> None:
    """Runs the script, and says whether the fault is there."""
    os.environ |= {**ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "0"}
    with tempfile.TemporaryDirectory(prefix="reshard-vllm-") as folder:
        if change := find_change(read_report(REPORT), Path(folder), seconds=1800):
            sys.exit(f"{REPORT}: {change}")
    print(f"passed: the fault of {REPORT} is there as reported")


if __name__ == "__main__":
    main()
