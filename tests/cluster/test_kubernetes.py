"""The Jobs of docs/cluster.md: no Kubernetes is here, so their YAML is parsed, and their command run as pods run it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from reshard.synthetic import SMALL_V3, write_checkpoint

yaml: Any = pytest.importorskip("yaml")


def read_page(name: str) -> str:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    (text,) = re.findall(rf"^```\w+ write={re.escape(name)}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return str(text)


def run_pod(job: dict[str, Any], folder: Path, variables: dict[str, str]) -> None:
    """Runs the command of a Job, with few ranks, and with a folder in the place of its volume."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    words = [word.replace("/shared/", f"{folder}/") for word in [*container["command"], *container["args"]]]
    words[words.index("16")] = "4"
    assert words[0] == "reshard"
    env = {**os.environ, **variables}
    subprocess.run([sys.executable, "-m", *words, "--quiet"], env=env, check=True, timeout=120)


def test_pods_of_both_jobs_make_the_target(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "DeepSeek-V3", SMALL_V3, 2)
    (tmp_path / "shares.yaml").write_text(read_page("shares.yaml"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").write_text('#!/bin/sh\necho "$@" >> asked\n')
    (tmp_path / "bin" / "kubectl").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", read_page("join.sh")], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    shares, join = (yaml.safe_load((tmp_path / name).read_text()) for name in ("shares.yaml", "join.yaml"))
    assert f"job/{shares['metadata']['name']}" in (tmp_path / "asked").read_text()
    count = shares["spec"]["completions"]
    assert shares["spec"]["completionMode"] == "Indexed"
    assert join["metadata"]["name"] != shares["metadata"]["name"]
    assert set(join["spec"]) == {"backoffLimit", "template"}
    for number in range(count):
        run_pod(shares, tmp_path, {"JOB_COMPLETION_INDEX": str(number)})
    assert not (tmp_path / "DeepSeek-V3-mp16" / "reshard.json").exists()
    run_pod(join, tmp_path, {})
    assert (tmp_path / "DeepSeek-V3-mp16" / "reshard.json").exists()
    assert len([*(tmp_path / "DeepSeek-V3-mp16").glob("*.safetensors")]) == 4
