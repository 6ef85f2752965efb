"""Conversions on a real Ray cluster of two nodes: equal to one made at once, whatever dies on the way.

The source is held at a gate, so that what dies has copied a part of it, whatever the machine's speed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("ray") is None:  # not imported here: it reads its variables then, which `start_ray` sets
    pytest.skip("Ray is not installed: pip install 'reshard[ray]'", allow_module_level=True)

from ray_clusters import ADDRESS, Gate, RayNodes, interrupt_group, serve_with_gate, start_ray
from store_servers import ServedFolder, require_same_files

import reshard
from reshard.execution.journal import has_durable_bytes
from reshard.synthetic import SMALL_V3, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    write_checkpoint(folder / "source", SMALL_V3, 4)
    return folder / "source"


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    """Made at once."""
    reshard.convert(source, source.with_name("whole"), mp=4)
    return source.with_name("whole")


@pytest.fixture(scope="module")
def hub(source: Path) -> Iterator[tuple[ServedFolder, Gate]]:
    with serve_with_gate(source) as served:
        yield served


@pytest.fixture(scope="module")
def nodes(hub: tuple[ServedFolder, Gate]) -> Iterator[RayNodes]:
    with start_ray(HF_ENDPOINT=hub[0].endpoint) as nodes:
        nodes.add_node()
        yield nodes


@pytest.fixture
def gate(hub: tuple[ServedFolder, Gate]) -> Iterator[Gate]:
    yield hub[1]
    hub[1].opened.set()


def test_rank_files_are_those_of_one_process(source: Path, whole: Path, nodes: RayNodes, tmp_path: Path) -> None:
    code, said, errors = nodes.convert("source", str(tmp_path / "ranks"), "--mp", "4", "--json", cwd=source.parent)
    assert code == 0, errors
    require_same_files(whole, tmp_path / "ranks")
    shares = json.loads(said)["shares"]
    assert [share["share"] for share in shares] == ["0/2", "1/2"]
    assert [share["files"] for share in shares] == [2, 2]
    assert len({share["process"] for share in shares}) == 2
    code, said, errors = nodes.convert(str(source), str(tmp_path / "ranks"), "--mp", "4")
    assert code == 0, errors
    assert "converted already" in said


def test_whole_files_are_those_of_one_process(whole: Path, nodes: RayNodes, tmp_path: Path) -> None:
    reshard.convert(whole, tmp_path / "once", to="hf", max_file_size=10_000_000)
    words = [str(whole), str(tmp_path / "files"), "--to", "hf", "--max-file-size", "10MB"]
    code, said, errors = nodes.convert(*words)
    assert code == 0, errors
    assert "2 shares on 1 node" in said  # both are this machine
    require_same_files(tmp_path / "once", tmp_path / "files")


def test_a_process_that_is_killed_is_begun_again(whole: Path, nodes: RayNodes, gate: Gate, tmp_path: Path) -> None:
    gate.close_after(2)
    with nodes.start(
        "convert", ADDRESS, str(tmp_path / "ranks"), "--mp", "4", "--on", f"ray={nodes.address}"
    ) as process:
        gate.wait_for_readers()
        os.kill(nodes.list_tasks()[0], signal.SIGKILL)
        gate.opened.set()
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    require_same_files(whole, tmp_path / "ranks")


def test_a_node_that_is_lost_is_replaced_by_another(whole: Path, nodes: RayNodes, gate: Gate, tmp_path: Path) -> None:
    lost = nodes.add_node()
    gate.close_after(2)
    try:
        with nodes.start(
            "convert", ADDRESS, str(tmp_path / "ranks"), "--mp", "4", "--on", f"ray={nodes.address}"
        ) as process:
            gate.wait_for_readers()
            assert nodes.list_tasks(lost)
            nodes.cluster.remove_node(lost, allow_graceful=False)
            lost = None
            gate.opened.set()
            _, errors = process.communicate(timeout=120)
    finally:
        if lost:
            nodes.cluster.remove_node(lost, allow_graceful=False)
    assert process.returncode == 0, errors
    require_same_files(whole, tmp_path / "ranks")


def test_after_an_interrupt_the_same_command_goes_on(whole: Path, nodes: RayNodes, gate: Gate, tmp_path: Path) -> None:
    gate.close_after(16)
    words = [ADDRESS, str(tmp_path / "ranks"), "--mp", "4", "--on", f"ray={nodes.address}"]
    with nodes.start("convert", *words) as process:
        while not any(has_durable_bytes(share) for share in (tmp_path / "ranks").glob(".share-*")):
            assert process.poll() is None
            time.sleep(0.05)
        interrupt_group(process)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "run the same command again to go on from there" in errors
    assert "Traceback" not in errors
    shutil.copytree(tmp_path / "ranks", tmp_path / "again")
    gate.opened.set()
    code, said, errors = nodes.run("convert", *words)
    assert code == 0, errors
    assert "resumed: " in said
    assert "of no use" not in said
    require_same_files(whole, tmp_path / "ranks")
    code, said, errors = nodes.convert(ADDRESS, str(tmp_path / "again"), "--mp", "4", "--restart")
    assert code == 0, errors
    assert "resumed: " not in said
    require_same_files(whole, tmp_path / "again")


def test_a_restart_makes_finished_shares_anew_and_says_so(whole: Path, nodes: RayNodes, tmp_path: Path) -> None:
    target = tmp_path / "ranks"
    for number in range(2):
        assert nodes.run("convert", ADDRESS, str(target), "--mp", "4", "--share", f"{number}/2")[0] == 0
    code, said, errors = nodes.convert(ADDRESS, str(target), "--mp", "4", "--restart")
    assert (code, said) == (2, "")
    assert "--yes" in errors
    code, said, errors = nodes.convert(ADDRESS, str(target), "--mp", "4", "--restart", "--yes")
    assert code == 0, errors
    assert "4 rank files" in said
    require_same_files(whole, target)


def test_after_a_killed_driver_the_same_command_goes_on(
    whole: Path, nodes: RayNodes, gate: Gate, tmp_path: Path
) -> None:
    gate.close_after(2)
    words = [ADDRESS, str(tmp_path / "ranks"), "--mp", "4", "--on", f"ray={nodes.address}"]
    with nodes.start("convert", *words) as process:
        gate.wait_for_readers()
        process.kill()
    gate.opened.set()
    code, _, errors = nodes.run("convert", *words)
    assert code == 0, errors
    require_same_files(whole, tmp_path / "ranks")


def test_a_node_with_another_source_is_refused(source: Path, nodes: RayNodes, tmp_path: Path) -> None:
    """Before its first byte, by the fingerprint: of what it has the headers are the same."""
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    with next(changed.glob("*.safetensors")).open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"12345678")
    with serve_with_gate(changed) as (served, _):
        other = nodes.add_node(HF_ENDPOINT=served.endpoint)
        try:
            code, _, errors = nodes.convert(ADDRESS, str(tmp_path / "ranks"), "--mp", "4")
        finally:
            nodes.cluster.remove_node(other, allow_graceful=False)
    assert code == 2, errors
    assert "another job" in errors
    assert "; on " in errors
    assert not (tmp_path / "ranks" / "reshard.json").exists()


def test_a_target_that_the_nodes_do_not_see_is_refused(source: Path, nodes: RayNodes, tmp_path: Path) -> None:
    """Before anything is written there. Here the driver alone has another disk mounted."""
    alone = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path)]
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    words = ["convert", str(source), str(tmp_path / "ranks"), "--mp", "4", "--on", f"ray={nodes.address}"]
    command = [*alone, sys.executable, "-m", "reshard", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=nodes.environment, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "not shared" in done.stderr
    assert not [*tmp_path.iterdir()]
