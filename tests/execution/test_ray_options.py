"""`--on`: what is refused before Ray is asked for anything; the sum of the progress of many tasks."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from targets import CONFIG

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.ray_connection import load_ray
from reshard.execution.ray_progress import TaskBoard, TaskNews, TaskPlace, TasksTold, TaskSum
from reshard.formats.remote_names import make_full_location
from reshard.synthetic import write_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on") / "source"
    write_checkpoint(folder, CONFIG, 2)
    return folder


@pytest.mark.parametrize("on", ["dask", "ray=", "Ray", ""])
def test_what_is_no_cluster_is_refused(on: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"ray=HEAD:6379"):
        reshard.convert(source, tmp_path / "ranks", mp=2, on=on)
    assert not [*tmp_path.iterdir()]


def test_a_cluster_makes_all_shares(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "ranks"), "--mp", "2", "--on", "ray", "--share", "0/2"]) == 2
    assert "--on makes all shares" in capsys.readouterr().err


def test_a_dry_run_says_that_it_asks_no_cluster(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(source), str(tmp_path / "ranks"), "--mp", "2", "--dry-run", "--on"]
    assert main([*words, "ray"]) == 0
    assert "note: --on ray: the plan is that of one machine, and nothing was sent there\n" in capsys.readouterr().out
    assert main([*words, "ray", "--share", "0/2"]) == 2
    assert main([*words, "dask"]) == 2
    assert not [*tmp_path.iterdir()]


def test_without_ray_it_says_how_to_install_it(source: Path, tmp_path: Path) -> None:
    """With a module in its place that cannot be found, wherever Ray is installed."""
    code = "import sys; sys.modules['ray'] = None; from reshard.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "convert", str(source), str(tmp_path / "ranks"), "--mp", "2", "--on", "ray"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'reshard[ray]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [*tmp_path.iterdir()]


def test_a_port_where_nobody_listens_is_no_cluster(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "reshard", "convert", str(source), str(tmp_path / "ranks"), "--mp", "2"]
    done = subprocess.run(
        [*command, "--on", f"ray=127.0.0.1:{port}"], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "no cluster" in done.stderr
    assert not [*tmp_path.iterdir()]


def test_paths_are_shipped_in_full_and_addresses_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert make_full_location("model") == str(tmp_path / "model")
    assert make_full_location("hf://org/model") == "hf://org/model"
    assert make_full_location(Path("s3://bucket/model")) == "s3://bucket/model"
    assert make_full_location(None) == ""


def test_a_task_that_is_begun_again_takes_nothing_back() -> None:
    told: list[tuple[int, int]] = []
    total = TaskSum(lambda done, whole: told.append((done, whole)), [100, 300], 2)
    total.update({})  # none has begun: nothing is told
    total.update({0: TaskNews(5, 50)})
    total.update({0: TaskNews(25, 50), 1: TaskNews(10, 100)})
    total.update({0: TaskNews(0, 50), 1: TaskNews(10, 100)})
    total.update({0: TaskNews(50, 50), 1: TaskNews(100, 100)})
    total.finish()
    assert told == [(10, 400), (80, 400), (80, 400), (399, 400), (400, 400)]


def test_a_task_that_has_not_begun_counts_as_large_as_the_others() -> None:
    told: list[tuple[int, int]] = []
    total = TaskSum(lambda done, whole: told.append((done, whole)), (), 3)
    total.update({0: TaskNews(5, 50)})
    total.update({0: TaskNews(50, 50), 1: TaskNews(0, 30), 2: TaskNews(0, 40)})
    total.finish()
    assert told == [(5, 150), (50, 150), (150, 150)]


def test_a_restarted_board_takes_nothing_from_what_is_known() -> None:
    places = [TaskPlace("node", "id", process) for process in range(3)]
    whole = TasksTold({0: places[:2]}, {0: TaskNews(5, 50)}).add(TasksTold({0: places[1:], 1: places[:1]}, {}))
    assert whole == TasksTold({0: places, 1: places[:1]}, {0: TaskNews(5, 50)})
    board = TaskBoard(lambda: True)
    with pytest.raises(LookupError):
        board.has_begun(0)


def test_a_ray_that_is_broken_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray.py").write_text("from os import nothing_of_the_kind", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(Refused, match="nothing_of_the_kind"):
        load_ray()
