"""The scripts of docs/cluster.md, as they stand there but for paths and sizes, under a real Slurm of two nodes."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from repository import ROOT
from slurm_cluster import Slurm, find_lacking_programs, running_slurm, wait_for

from reshard.formats.target_names import JOURNAL
from reshard.synthetic import SMALL_V3, write_checkpoint

pytestmark = pytest.mark.skipif(
    bool(find_lacking_programs()),
    reason=f"Slurm is not installed (apt-get install slurm-wlm munge): no {', '.join(find_lacking_programs())}",
)

STOPPED = {"1", "2"}
"""The tasks that stop in the middle, once."""
PROGRAM = f"""
import os, sys, threading
from pathlib import Path
from reshard.cli.process import entry
from reshard.execution import writer

flush, task = writer.Ledger.flush, os.environ.get("SLURM_ARRAY_TASK_ID", "")
mark = Path("stopped-" + task)

def stop(ledger):
    flush(ledger)
    if ledger._durable and task in {STOPPED!r} and not mark.exists():
        mark.with_suffix(".new").write_text(str(os.getpid()))
        mark.with_suffix(".new").rename(mark)
        threading.Event().wait()

writer.Ledger.flush = stop
writer.FLUSH_SECONDS = 0.02
entry()
"""
"""The command; two tasks, when they have records in their journals, wait there until they are ended."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Slurm, and a folder that all nodes see."""

    slurm: Slurm
    shared: Path

    @property
    def target(self) -> Path:
        return self.shared / "DeepSeek-V3-mp16"

    def submit(self) -> tuple[str, str]:
        """Submits both jobs as the page does; returns the number of the array and that of the join."""
        said = self.slurm.run("bash", "submit.sh", cwd=self.shared)
        join = said.removeprefix("Submitted batch job ")
        return str(int(join) - 1), join

    def wait_for_states(self, wanted: Mapping[str, str]) -> None:
        """Until jobs and tasks have these states."""

        def have_all() -> bool:
            states = self.slurm.list_states()
            return {job: states.get(job) for job in wanted} == wanted

        wait_for(have_all, lambda: f"{self.slurm.list_states()}\n{self.read_logs()}")

    def read_logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(self.shared.glob("reshard-*.log")))


def read_page(name: str) -> str:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    (text,) = re.findall(rf"^```\w+ write={re.escape(name)}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return str(text)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    shared = tmp_path / "shared"
    (shared / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "stopping.py").write_text(PROGRAM)
    command = shared / "venv" / "bin" / "reshard"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {tmp_path / "stopping.py"} "$@"\n')
    command.chmod(0o755)
    write_checkpoint(shared / "DeepSeek-V3", SMALL_V3, 2)
    changes = {"/shared/": f"{shared}/", "--mp 16": "--mp 4", "--array=0-7": "--array=0-3"}
    for name in ("convert.sbatch", "submit.sh"):
        text = read_page(name)
        for before, after in changes.items():
            text = text.replace(before, after)
        (shared / name).write_text(text)
    with running_slurm(tmp_path / "slurm") as slurm:
        yield Cluster(slurm, shared)


def hash_files(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its name in there."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in paths}


def convert_at_once(cluster: Cluster, target: Path) -> dict[str, str]:
    command = [sys.executable, "-m", "reshard", "convert", str(cluster.shared / "DeepSeek-V3"), str(target)]
    subprocess.run([*command, "--mp", "4", "--quiet"], check=True, timeout=120)
    return hash_files(target)


def test_array_with_a_requeued_and_a_killed_task_is_joined(cluster: Cluster, tmp_path: Path) -> None:
    wanted = convert_at_once(cluster, tmp_path / "wanted")
    array, join = cluster.submit()
    marks = {number: cluster.shared / f"stopped-{number}" for number in STOPPED}
    wait_for(lambda: all(mark.exists() for mark in marks.values()), cluster.read_logs)
    journals = {number: (cluster.target / f".share-{number}-of-4" / JOURNAL).stat().st_size for number in STOPPED}
    assert all(journals.values())
    cluster.slurm.run("scontrol", "requeue", f"{array}_1")
    os.kill(int(marks["2"].read_text()), signal.SIGKILL)
    done = dict.fromkeys((f"{array}_{number}" for number in (0, 1, 3)), "COMPLETED")
    cluster.wait_for_states({**done, f"{array}_2": "FAILED", join: "CANCELLED"})
    assert cluster.slurm.describe(f"{array}_1")["Restarts"] == "1"
    log = (cluster.shared / f"reshard-{cluster.slurm.describe(f'{array}_1')['JobId']}.log").read_text()
    assert "resumed" in log, log  # the requeued task went on
    assert not [*cluster.target.glob("*.safetensors")]  # nothing is joined while one lacks
    before = {path: path.stat().st_mtime_ns for path in cluster.target.rglob("*.safetensors")}
    assert len(before) == 3
    array, join = cluster.submit()
    cluster.wait_for_states({join: "COMPLETED"})
    assert hash_files(cluster.target) == wanted
    assert sorted(path.name for path in cluster.target.iterdir()) == sorted(wanted)  # no empty folders either
    logs = [path.read_text() for path in cluster.shared.glob("reshard-*.log")]
    assert sum("resumed" in log for log in logs) == 2
    after = {path.name: path.stat().st_mtime_ns for path in cluster.target.glob("*.safetensors")}
    assert {path.name: changed for path, changed in before.items()}.items() <= after.items()  # none was made again


def test_variables_of_real_tasks(cluster: Cluster) -> None:
    program = (
        "import os; from reshard.errors import Refused\n"
        "from reshard.planning.shares import parse_share\n"
        "for text in ('auto', 'auto/8'):\n"
        "    try: print(text, parse_share(text, os.environ))\n"
        "    except Refused as refused: print(text, refused.problems[0].found)\n"
    )
    (cluster.shared / "show.py").write_text(program)
    command = f"{shlex.quote(sys.executable)} show.py"
    jobs = {
        "array": ("--array=0-2", command),
        "array of srun": ("--array=0-2", f"srun --ntasks=1 {command}"),
        "rerun": ("--array=2", command),
        "from 1 on": ("--array=1-3", command),
        "srun": ("--ntasks=2 --nodes=2", f"srun --mpi=pmi2 {command}"),
        "no srun": ("--ntasks=2 --nodes=2", command),
    }
    for name, (options, line) in jobs.items():
        (cluster.shared / "show.sh").write_text(f"#!/bin/bash\n{line}\n")
        words = [*options.split(), f"--output=shown-{name.replace(' ', '-')}-%a.txt", "show.sh"]
        cluster.slurm.run("sbatch", *words, cwd=cluster.shared)
    wait_for(lambda: {*cluster.slurm.list_states().values()} == {"COMPLETED"}, lambda: str(cluster.slurm.list_states()))
    shown = {
        name: sorted(
            line
            for path in cluster.shared.glob(f"shown-{name.replace(' ', '-')}-[0-9]*.txt")
            for line in path.read_text().splitlines()
        )
        for name in jobs
    }
    assert shown["array"] == ["auto 0/3", "auto 1/3", "auto 2/3", "auto/8 0/8", "auto/8 1/8", "auto/8 2/8"]
    assert shown["array of srun"] == shown["array"]
    assert shown["rerun"][1] == "auto/8 2/8"
    assert "some tasks only" in shown["rerun"][0]
    assert "some tasks only" in shown["from 1 on"][0]
    assert shown["srun"] == ["auto 0/2", "auto 1/2", "auto/8 2", "auto/8 2"]
    assert "not started by srun" in shown["no srun"][0]
