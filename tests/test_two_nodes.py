"""The Slurm scripts of docs/two-nodes.md: run as they stand on the page, with their paths changed, on two processes."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from inference_code import GENERATE
from repository import ROOT

from reshard.synthetic import SMALL_V3, write_checkpoint

SRUN = """
import os, subprocess, sys
words = [word for word in sys.argv[1:] if not word.startswith("--")]
tasks = [subprocess.Popen(words, env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2"}) for rank in (0, 1)]
sys.exit(max(task.wait() for task in tasks))
"""
"""Runs a command once for each node, at the same time, as srun does with one task a node."""


def read_script(name: str) -> str:
    page = (ROOT / "docs" / "two-nodes.md").read_text(encoding="utf-8")
    (text,) = re.findall(rf"^```bash write={re.escape(name)}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return str(text)


@pytest.fixture
def sbatch(tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Runs a script, with one GPU a node and every folder of the page in one of this machine."""
    shared = tmp_path / "shared"
    commands = {
        "srun": f"{shlex.quote(sys.executable)} {tmp_path / 'srun.py'}",
        "scontrol": "echo localhost #",
        "reshard": f"{shlex.quote(sys.executable)} -m reshard",
        "torchrun": f"{shlex.quote(sys.executable)} -m torch.distributed.run --master-port 29517",
    }
    (shared / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "srun.py").write_text(SRUN)
    for name, command in commands.items():
        path = shared / "venv" / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        path.chmod(0o755)
    write_checkpoint(shared / "DeepSeek-V3", SMALL_V3, 2)
    (shared / "DeepSeek-V3" / "inference").mkdir()
    code = GENERATE.replace('"--interactive", action="store_true"', '"--input-file", required=True')
    (shared / "DeepSeek-V3" / "inference" / "generate.py").write_text(code)
    for name in ("prepare.sbatch", "serve.sbatch", "node.sh"):
        (shared / name).write_text(read_script(name).replace("/shared/", f"{shared}/"))
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "16", "GPUS": "1"}

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(shared / name)]
        env = {**os.environ, **slurm, "PATH": f"{shared / 'venv' / 'bin'}:{os.environ['PATH']}"}
        return subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=300, check=False)

    return run


def test_each_node_makes_proves_and_serves_its_own_ranks(
    sbatch: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    early = sbatch("serve.sbatch")
    assert early.returncode == 1
    assert "ranks-1-1: prepare it first" in early.stderr
    done = sbatch("prepare.sbatch")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": proven against ") == 2
    assert sbatch("prepare.sbatch").returncode == 0  # again, as after a requeue
    folder = tmp_path / "shared" / "DeepSeek-V3-mp16"
    for rank in (0, 1):
        files = sorted(path.name for path in (folder / f"ranks-{rank}-{rank}").glob("*.safetensors"))
        assert files == [f"model{rank}-mp2.safetensors"]
    done = sbatch("serve.sbatch")
    assert done.returncode == 0, done.stderr
    ran = sorted(path.name for path in (tmp_path / "shared" / "DeepSeek-V3" / "inference").glob("ran-*"))
    assert ran == ["ran-0", "ran-1"]


def test_nothing_is_started_where_a_checkpoint_is_refused(
    sbatch: Callable[[str], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    min((tmp_path / "shared" / "DeepSeek-V3").glob("*.safetensors")).unlink()
    done = sbatch("prepare.sbatch")
    assert done.returncode == 2
    assert "missing file" in done.stderr
    assert sbatch("serve.sbatch").returncode == 1
    assert not [*(tmp_path / "shared" / "DeepSeek-V3" / "inference").glob("ran-*")]
