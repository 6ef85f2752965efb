"""The reports of `docs/upstream/` are true of the installed versions. `make vllm` does the same for vLLM's."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from upstream_reports import REPORTS, NotRun, Report, find_change, read_report

WITH_VLLM = "vllm-sharded-state.md"


@pytest.mark.parametrize("name", ["safetensors-file-mode.md", "torch-missing-shard.md", "torch-scalars.md"])
def test_a_reported_fault_is_still_there(name: str, tmp_path: Path) -> None:
    try:
        change = find_change(read_report(name), tmp_path)
    except NotRun as end:
        pytest.skip(str(end))
    project = name.partition("-")[0]
    installed, seen = version(project).partition("+")[0], re.findall(r"\d[\w.]*", read_rows()[name])
    if change and installed not in seen:
        pytest.skip(f"{project} {installed} is another version than the report's: {change}")
    assert not change, change


@pytest.mark.parametrize(
    ("script", "seconds", "told"),
    [
        ("import threading\nthreading.Event().wait()", 1, "did not end within 1 s"),
        ("print('new')\nraise OSError('no loopback')", 60, "exit code 1, which may be this environment: .*no loopback"),
    ],
)
def test_a_script_that_does_not_come_to_its_end_is_not_held_against_upstream(
    script: str, seconds: int, told: str, tmp_path: Path
) -> None:
    with pytest.raises(NotRun, match=told):
        find_change(Report(script, "old\n", "new\n"), tmp_path, seconds)


@pytest.mark.parametrize(("printed", "told"), [("old", "^$"), ("new", "it is mended"), ("other", "another fault now")])
def test_what_a_script_prints_tells_the_change(printed: str, told: str, tmp_path: Path) -> None:
    assert re.search(told, find_change(Report(f"print({printed!r})", "old\n", "new\n"), tmp_path))


def read_rows() -> dict[str, str]:
    """The pages of the table -> the versions that the fault was seen in."""
    text = (REPORTS / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| \[([\w-]+\.md)\].*?\|.*?\|.*?\| ([^;|]*)", text, re.MULTILINE))


def test_the_table_has_every_report() -> None:
    rows = read_rows()
    assert sorted(rows) == sorted({path.name for path in REPORTS.glob("*.md")} - {"README.md"})
    assert WITH_VLLM in rows
    assert read_report(WITH_VLLM).today != read_report(WITH_VLLM).expected
