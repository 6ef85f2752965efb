"""Tasks on a real Ray cluster: results, refusals, mistakes, deaths, and what a driver leaves behind."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if find_spec("ray") is None:  # not imported here: it reads its variables then, which `start_ray` sets
    pytest.skip("Ray is not installed: pip install 'reshard[ray]'", allow_module_level=True)

from ray_calls import (
    add_after_the_death_of_the_board,
    add_numbers,
    begin_again_and_again,
    die,
    fail_by_mistake,
    fail_by_system,
    refuse_odd,
    wait_for_ever_beside_a_refusal,
)
from ray_clusters import RayNodes, start_ray

import reshard
from reshard.errors import Refused
from reshard.execution.ray_tasks import connect_to_ray
from reshard.storage.remote_store import LISTENERS
from reshard.types import Progress


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    package, support = Path(reshard.__file__).parents[1], Path(__file__).parents[1] / "support"
    with start_ray(PYTHONPATH=f"{package}:{support}") as nodes:
        nodes.add_node()
        yield nodes


def run_on_ray(
    call: Callable[..., Any], tasks: Sequence[Mapping[str, Any]], address: str | None, progress: Progress | None
) -> list[Any]:
    with connect_to_ray(address) as cluster:
        return [result.value for result in cluster.run(call, tasks, progress)]


def test_results_come_in_the_order_of_the_tasks(nodes: RayNodes) -> None:
    told: list[tuple[int, int]] = []
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    tasks = [{"one": number, "other": 1} for number in range(7)]
    assert run_on_ray(add_numbers, tasks, nodes.address, lambda *pair: told.append(pair)) == [*range(1, 8)]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert told[-1] == (70, 70)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert all(done < whole for done, whole in told[:-1])


def test_all_problems_of_a_refusal_come_with_the_node(nodes: RayNodes) -> None:
    with pytest.raises(Refused) as refused:
        run_on_ray(refuse_odd, [{"number": 1}, {"number": 2}], nodes.address, None)
    assert [problem.subject for problem in refused.value.problems] == ["number 1", "and another"]
    assert all(problem.found.startswith(f"odd; on {os.uname().nodename} (") for problem in refused.value.problems)


def test_a_refusal_cancels_the_other_tasks(nodes: RayNodes, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "waits")
    tasks = [{"number": number, "folder": str(tmp_path)} for number in range(2)]
    with pytest.raises(Refused, match="number 1"):
        run_on_ray(wait_for_ever_beside_a_refusal, tasks, nodes.address, None)
    assert (tmp_path / "cancelled").exists()


def test_an_error_of_the_system_is_a_refusal(nodes: RayNodes) -> None:
    with pytest.raises(Refused, match=r"nowhere: system error"):
        run_on_ray(fail_by_system, [{"path": "/nowhere"}], nodes.address, None)


def test_a_mistake_is_raised_as_it_is(nodes: RayNodes) -> None:
    with pytest.raises(KeyError, match="a mistake of our own"):
        run_on_ray(fail_by_mistake, [{}], nodes.address, None)


def test_a_task_that_always_dies_is_refused_with_its_node(nodes: RayNodes) -> None:
    with pytest.raises(Refused) as refused:
        run_on_ray(die, [{}, {}], nodes.address, None)
    assert {problem.kind for problem in refused.value.problems} == {"worker-died"}
    assert f"on {os.uname().nodename}" in refused.value.problems[0].subject


def test_a_ray_that_is_connected_stays_connected(nodes: RayNodes) -> None:
    import ray  # noqa: PLC0415

    with connect_to_ray(nodes.address) as cluster:
        assert (cluster.processors, cluster.nodes) == (2, 2)
        assert run_on_ray(add_numbers, [{"one": 1, "other": 1}], None, None) == [2]
        assert ray.is_initialized()
    assert not ray.is_initialized()


def test_another_cluster_than_the_one_that_is_connected_is_refused(nodes: RayNodes) -> None:
    host, _, port = nodes.address.rpartition(":")
    with connect_to_ray(nodes.address):
        with pytest.raises(Refused, match=r"connected to "), connect_to_ray(f"{host}:{int(port) - 1}"):
            pass
        with connect_to_ray(nodes.address), connect_to_ray("auto"):
            pass


def test_of_two_users_the_last_ends_the_connection(nodes: RayNodes) -> None:
    import ray  # noqa: PLC0415

    has_begun, may_end, found = threading.Event(), threading.Event(), list[Any]()

    def use() -> None:
        with connect_to_ray(nodes.address):
            has_begun.set()
            may_end.wait(60)
            found.append(run_on_ray(add_numbers, [{"one": 1, "other": 1}], nodes.address, None))

    thread = threading.Thread(target=use)
    with connect_to_ray(nodes.address):
        thread.start()
        assert has_begun.wait(60)
    may_end.set()
    thread.join()
    assert found == [[2]]
    assert not ray.is_initialized()


def test_a_dead_board_stops_nobody_but_who_must_know(nodes: RayNodes) -> None:
    task = {"one": 1, "other": 1}
    assert run_on_ray(add_after_the_death_of_the_board, [{**task, "must_know": False}], nodes.address, None) == [2]
    with pytest.raises(Refused, match="without --restart"):
        run_on_ray(add_after_the_death_of_the_board, [{**task, "must_know": True}], nodes.address, None)


def test_processes_that_want_of_memory_ends_are_counted(nodes: RayNodes) -> None:
    """Ray itself would begin them for ever."""
    told: list[str] = []
    LISTENERS.append(told.append)
    try:
        with pytest.raises(Refused) as refused:
            run_on_ray(begin_again_and_again, [{}], nodes.address, None)
    finally:
        LISTENERS.remove(told.append)
    assert [problem.kind for problem in refused.value.problems] == ["worker-died"]
    assert f"on {os.uname().nodename}" in refused.value.problems[0].subject
    assert "--max-memory" in refused.value.problems[0].remedy
    assert any("is begun again" in line for line in told)


def test_a_node_without_the_package_is_refused(nodes: RayNodes) -> None:
    bare = nodes.add_node(PYTHONPATH="")
    try:
        with pytest.raises(Refused, match="missing package"):
            run_on_ray(add_numbers, [{"one": 1, "other": 1}] * 3, nodes.address, None)
    finally:
        nodes.cluster.remove_node(bare, allow_graceful=False)
