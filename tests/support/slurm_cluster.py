"""A real Slurm of two nodes on this machine, for the tests: munged, slurmctld and two slurmd on the loopback."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SYSTEM_PATH = "/usr/sbin:/usr/local/sbin"
"""Where the servers lie; a user's PATH often lacks it."""
NODES = ("n1", "n2")
WAIT_SECONDS = 60.0
"""As long as nothing takes."""
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CryptoType=crypto/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=1
SlurmdParameters=config_overrides
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool.%n
"""
"""`cred_expire` is how long a requeued job waits, two minutes by default; with `config_overrides` each node has the
processors and the memory that are stated, whatever this machine has.
"""
NODE = "NodeName={name} NodeAddr=127.0.0.1 NodeHostname=localhost Port={port} CPUs=16 RealMemory=64000 State=UNKNOWN\n"
PARTITION = "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"


def find_lacking_programs() -> list[str]:
    """The programs of Slurm and munge that are not installed."""
    return [name for name in PROGRAMS if not find_program(name)]


def find_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=SYSTEM_PATH)


class Slurm:
    """A cluster that runs: its commands as a user gives them."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, environment

    def run(self, *words: str, cwd: Path | None = None) -> str:
        """What a command of Slurm prints; it must succeed."""
        done = subprocess.run(
            words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout.strip()

    def list_states(self) -> dict[str, str]:
        """The state of each job and task, by its name, such as `3_1`."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T", "--states=all").splitlines()
        return dict(line.split() for line in lines)

    def describe(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def read_logs(self) -> str:
        """The ends of the logs of the servers."""
        logs = {path.name: path.read_text(errors="replace")[-1500:] for path in self.folder.glob("*.log")}
        return "\n".join(f"{name}: {text}" for name, text in logs.items())


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """Starts the cluster below a folder, with free ports; ends it, and all its jobs."""
    folder.mkdir()
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    write_configuration(folder)
    slurm, servers = Slurm(folder, environment), []
    try:
        for name, words in list_servers(folder):
            with (folder / f"{name}.log").open("wb") as log:
                servers.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True))
            if name == "munged":
                wait_for((folder / "munge.sock").exists, slurm.read_logs)
        wait_for(lambda: is_up(slurm), slurm.read_logs)
        yield slurm
    finally:
        with suppress(subprocess.SubprocessError, OSError):
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=environment, timeout=20, check=False)
            wait_for(lambda: not is_running(slurm), slurm.read_logs)
        for server in reversed(servers):
            server.terminate()
        for server in reversed(servers):
            with suppress(subprocess.TimeoutExpired):
                server.wait(20)
            server.kill()
            server.wait()


def write_configuration(folder: Path) -> None:
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    ports = list_free_ports(1 + len(NODES))
    text = CONFIGURATION.format(user=getpass.getuser(), folder=folder, ports=ports)
    nodes = [NODE.format(name=name, port=port) for name, port in zip(NODES, ports[1:], strict=True)]
    (folder / "slurm.conf").write_text("".join([text, *nodes, PARTITION]))


def list_free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens at, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def list_servers(folder: Path) -> list[tuple[str, list[str]]]:
    """The commands of the servers, in the foreground, so that they can be ended as children."""
    paths = {name: find_program(name) or name for name in PROGRAMS}
    files = {"socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged-own.log", "seed-file": "munge.seed"}
    munged = [f"--{name}={folder / file}" for name, file in {**files, "key-file": "munge.key"}.items()]
    nodes = [(f"slurmd-{node}", [paths["slurmd"], "-D", "-N", node]) for node in NODES]
    return [
        ("munged", [paths["munged"], "--foreground", "--force", *munged]),
        ("ctld", [paths["slurmctld"], "-D"]),
        *nodes,
    ]


def is_up(slurm: Slurm) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%D %T"], env=slurm.environment, capture_output=True, text=True, check=False
    )
    return done.stdout.split() == [str(len(NODES)), "idle"]


def is_running(slurm: Slurm) -> bool:
    return bool(slurm.run("squeue", "--noheader"))


def wait_for(is_so: Callable[[], bool], describe: Callable[[], str], seconds: float = WAIT_SECONDS) -> None:
    """Until something is so; if it takes too long, fails with a description of how it is."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, describe()
        time.sleep(0.1)
