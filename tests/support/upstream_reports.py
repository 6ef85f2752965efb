"""The reports of `docs/upstream/`: the script of each, what it prints with the fault, and what it would without."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from repository import ROOT

REPORTS = ROOT / "docs" / "upstream"


class Report(NamedTuple):
    script: str
    today: str
    expected: str


def read_report(name: str) -> Report:
    """Takes the three marked blocks from a page."""
    page = (REPORTS / name).read_text(encoding="utf-8")
    marks = ("python reproduce", "text today", "text expected")
    return Report(*(re.findall(rf"^```{mark}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0] for mark in marks))


class NotRun(Exception):
    """A script did not come to its end, which says nothing of upstream: what it printed last."""


def find_change(report: Report, folder: Path, seconds: int = 120) -> str:
    """Runs the script in an empty folder: empty if the fault is there as reported, else what has changed.

    Raises NotRun.
    """
    path = folder / "reproduce.py"
    path.write_text(report.script, encoding="utf-8")
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    try:
        ran = subprocess.run(
            [sys.executable, path],
            cwd=folder,
            env=quiet,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise NotRun(f"the script did not end within {seconds} s") from None
    if ran.returncode:
        last = " / ".join(ran.stderr.strip().splitlines()[-3:])
        raise NotRun(f"the script ended with exit code {ran.returncode}, which may be this environment: {last}")
    if ran.stdout == report.expected:
        return "it is mended in the installed version: withdraw the report, as docs/upstream/README.md says"
    if ran.stdout == report.today:
        return ""
    return f"it is another fault now, look at it:\n{ran.stdout}{ran.stderr[-3000:]}"
