"""Ray clusters of several nodes on this machine, and a source that stops its readers at a known point."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

import pytest
from store_servers import NAME, CdnHandler, HubHandler, ServedFolder, run_servers

ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else 127.0.0.1 becomes the address of this machine
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}

LARGE = 100_000
"""In bytes: a range of so many is data, neither a header nor a sample."""

SECONDS = 120


@dataclass
class RayNodes:
    """A cluster, and the environment of the commands that use it."""

    cluster: Any
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def start(self, *words: str, **options: Any) -> "subprocess.Popen[str]":
        """Starts a command of reshard, in a group of its own: as a terminal's Ctrl-C meets it."""
        command = [sys.executable, "-m", "reshard", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, stdout=pipe, stderr=pipe, text=True, env=self.environment, start_new_session=True, **options
        )

    def run(self, *words: str, **options: Any) -> tuple[int, str, str]:
        """Runs a command of reshard: exit code, output, errors."""
        with self.start(*words, **options) as process:
            said, errors = process.communicate(timeout=SECONDS)
        return process.returncode, said, errors

    def convert(self, *words: str, **options: Any) -> tuple[int, str, str]:
        return self.run("convert", *words, "--on", f"ray={self.address}", **options)

    def add_node(self, **variables: str) -> Any:
        """Adds a node of one processor, with other variables of the environment than the first."""
        return self.cluster.add_node(num_cpus=1, object_store_memory=80 << 20, env_vars=variables)

    def list_tasks(self, node: Any = None) -> list[int]:
        """The processes that run tasks now, of all nodes or of one."""
        nodes = [node] if node else self.cluster.list_all_nodes()
        above = {one.process.pid for each in nodes for one in each.all_processes["raylet"]}
        return [process for process in list_processes() if find_parent(process) in above and is_task(process)]


def list_processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def find_parent(process: int) -> int:
    try:
        return int(Path("/proc", str(process), "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def is_task(process: int) -> bool:
    """Ray names its processes by what they run."""
    try:
        return Path("/proc", str(process), "cmdline").read_bytes().startswith(b"ray::run_task")
    except OSError:
        return False


@contextmanager
def start_ray(**variables: str) -> Iterator[RayNodes]:
    """Starts a cluster of one node with one processor, on the loopback interface, in a folder of its own: its sockets
    have short names, and nobody else finds it.
    """
    folder = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)
    with folder as temporary, pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, **variables, "RAY_TMPDIR": temporary}.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        from ray.cluster_utils import Cluster  # noqa: PLC0415 - reads the variables above

        cluster = Cluster(True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})  # noqa: FBT003
        try:
            yield RayNodes(cluster, dict(os.environ))
        finally:
            cluster.shutdown()


class Gate:
    """Lets so many large answers through, and holds the others until it is opened."""

    def __init__(self) -> None:
        self.lock, self.reached, self.opened, self.left = Lock(), Event(), Event(), 0
        self.opened.set()

    def close_after(self, answers: int) -> None:
        self.left = answers
        self.reached.clear()
        self.opened.clear()

    def wait_for_readers(self) -> None:
        assert self.reached.wait(SECONDS)

    def pass_through(self) -> None:
        with self.lock:
            self.left -= 1
            is_held = self.left < 0 and not self.opened.is_set()
        if is_held:
            self.reached.set()
            self.opened.wait(SECONDS)


@contextmanager
def serve_with_gate(folder: Path) -> Iterator[tuple[ServedFolder, Gate]]:
    """Serves a checkpoint as a hub does, behind a gate."""
    served, gate = ServedFolder(folder), Gate()

    class Gated(CdnHandler):
        def send_bytes(self, path: Path, begin: int, end: int) -> None:
            if end - begin > LARGE and self.command != "HEAD":
                gate.pass_through()
            super().send_bytes(path, begin, end)

    with run_servers(served, HubHandler, Gated) as ports:
        served.endpoint, served.cdn = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[-1]}"
        try:
            yield served, gate
        finally:
            gate.opened.set()


ADDRESS = f"hf://{NAME}"


def interrupt_group(process: "subprocess.Popen[str]") -> None:
    """Sends what Ctrl-C sends."""
    os.killpg(process.pid, signal.SIGINT)
