"""Progress of what comes from a store: bytes over the wire, and waits told without breaking a bar."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_servers import NAME, ServedFolder, serve_hub

from reshard.synthetic import SMALL_V3, write_checkpoint

TINY = {**SMALL_V3, "num_hidden_layers": 2, "vocab_size": 512, "n_routed_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedFolder]:
    write_checkpoint(tmp_path / "source", TINY, 3)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with serve_hub(tmp_path / "source", delay=0.1) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def make_command(tmp_path: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "reshard", "convert", f"hf://{NAME}", str(tmp_path / "ranks"), "--mp", "2", *words]


def run_on_terminal(command: list[str]) -> str:
    """Runs a command whose standard error is a terminal. Returns what came there."""
    ours, theirs = pty.openpty()
    found = b""
    with subprocess.Popen(
        command, stderr=theirs, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"}
    ) as run:
        os.close(theirs)
        try:
            while data := os.read(ours, 1 << 16):
                found += data
        except OSError:  # so a terminal ends
            pass
        os.close(ours)
    assert run.returncode == 0, found
    return found.decode()


def test_a_wait_is_told_above_the_bar(served: ServedFolder, tmp_path: Path) -> None:
    served.faults["cdn-busy"] = 1
    lines = re.split(r"\r*\n", run_on_terminal(make_command(tmp_path)))
    told = [line for line in lines if "the server is busy (503); waits 1 s" in line]
    assert len(told) == 1
    assert re.fullmatch(rf"convert: hf://{NAME}@\w+/model-\d+-of-00003.safetensors: [^━]*", told[0])


def test_the_end_tells_what_has_come_over_the_wire(served: ServedFolder, tmp_path: Path) -> None:
    shown = run_on_terminal(make_command(tmp_path))
    sizes = re.findall(
        r"100%, [^\r\n]* MiB from the store|done, [^\r\n]* MiB in [^\r\n]* ([\d.]+) MiB from the store", shown
    )
    assert sizes, shown
    sent = sum(served.sent.values())
    assert float(sizes[-1]) == pytest.approx(sent / 2**20, rel=0.05)


def test_progress_in_json_counts_what_comes_and_tells_waits(served: ServedFolder, tmp_path: Path) -> None:
    served.faults["cut"] = 2
    served.faults["cdn-busy"] = 1
    run = subprocess.run(make_command(tmp_path, "--progress", "json"), capture_output=True, check=True)
    events = [json.loads(line) for line in run.stderr.splitlines()]
    told = [one["text"] for one in events if one["event"] == "told"]
    assert len(told) == 1
    assert told[0].endswith("the server is busy (503); waits 1 s")
    assert [one["event"] for one in events if "text" in one] == ["told"]
    received = [one["received"] for one in events]
    assert received == sorted(received)
    # What stands in the answers of the hub itself is not counted.
    assert served.sent["cdn"] <= received[-1] <= sum(served.sent.values())


def test_a_source_on_a_disk_comes_over_no_wire(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", TINY, 1)
    command = [*make_command(tmp_path, "--progress", "json")]
    command[4] = str(tmp_path / "source")
    run = subprocess.run(command, capture_output=True, check=True)
    assert {json.loads(line)["received"] for line in run.stderr.splitlines()} == {0}
