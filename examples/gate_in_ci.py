"""Lets a pipeline go on only if a folder is proven: a step for CI, before rank files are served or uploaded.

    pip install reshard
    python examples/gate_in_ci.py ranks/                        # against the checksums of its manifest
    python examples/gate_in_ci.py ranks/ --source DeepSeek-V3/  # against the checkpoint, byte by byte

Exit codes are those of `reshard verify`: 0 proven, 1 problems found, 2 refused. Of the problems it prints the first
few, a line each, as most CI services show them.
"""

import argparse
import sys
from collections.abc import Sequence

import reshard


def list_problems(problems: Sequence[reshard.Problem], most: int) -> list[str]:
    """A line for each of the first problems, and one for the rest. `!r` escapes what a stranger may have named."""
    lines = [f"{one.kind}: {one.subject!r}: {one.found!r}, expected {one.expected!r}" for one in problems[:most]]
    return [*lines, f"... and {len(problems) - most} more"] if len(problems) > most else lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Verifies a folder of rank files; the exit code is the verdict.")
    parser.add_argument("target", help="the folder that reshard convert wrote")
    parser.add_argument("--source", help="the checkpoint that it was made from")
    parser.add_argument("--show", type=int, default=5, help="print so many problems at most; default: 5")
    options = parser.parse_args()
    if options.show < 0:
        parser.error("--show: 0 or more")
    try:
        report = reshard.verify(options.target, options.source)
    except reshard.Refused as refused:
        print("refused", *list_problems(refused.problems, options.show), sep="\n", file=sys.stderr)
        return 2
    if report.is_proven:
        print(f"proven: {report.size} bytes")
        return 0
    print("NOT proven", *list_problems(report.problems, options.show), sep="\n", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
