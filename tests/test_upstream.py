"""The reports of `docs/upstream/` are true of the installed versions. `make vllm` does the same for vLLM's."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from upstream_reports import REPORTS, find_change, read_report

WITH_VLLM = "vllm-sharded-state.md"


@pytest.mark.parametrize("name", ["safetensors-file-mode.md", "torch-missing-shard.md", "torch-scalars.md"])
def test_a_reported_fault_is_still_there(name: str, tmp_path: Path) -> None:
    change = find_change(read_report(name), tmp_path)
    project = name.partition("-")[0]
    installed, seen = version(project).partition("+")[0], re.findall(r"\d[\w.]*", read_rows()[name])
    if change and installed not in seen:
        pytest.skip(f"{project} {installed} is another version than the report's: {change}")
    assert not change, change


def read_rows() -> dict[str, str]:
    """The pages of the table -> the versions that the fault was seen in."""
    text = (REPORTS / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| \[([\w-]+\.md)\].*?\|.*?\|.*?\| ([^;|]*)", text, re.MULTILINE))


def test_the_table_has_every_report() -> None:
    rows = read_rows()
    assert sorted(rows) == sorted({path.name for path in REPORTS.glob("*.md")} - {"README.md"})
    assert WITH_VLLM in rows
    assert read_report(WITH_VLLM).today != read_report(WITH_VLLM).expected
