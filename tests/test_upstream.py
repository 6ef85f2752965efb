"""The reports of `docs/upstream/` are true of the installed versions. `make vllm` does the same for vLLM's."""

import re
from pathlib import Path

import pytest
from upstream_reports import REPORTS, find_change, read_report

WITH_VLLM = "vllm-sharded-state.md"


@pytest.mark.parametrize("name", ["safetensors-file-mode.md", "torch-missing-shard.md", "torch-scalars.md"])
def test_a_reported_fault_is_still_there(name: str, tmp_path: Path) -> None:
    assert not (change := find_change(read_report(name), tmp_path)), change


def test_the_table_has_every_report() -> None:
    rows = re.findall(r"^\| \[([\w-]+\.md)\]", (REPORTS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted({path.name for path in REPORTS.glob("*.md")} - {"README.md"})
    assert WITH_VLLM in rows
    assert read_report(WITH_VLLM).today != read_report(WITH_VLLM).expected
