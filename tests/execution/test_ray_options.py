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
from reshard.execution.ray_progress import TaskNews, TaskSum
from reshard.synthetic import write_checkpoint
from reshard.target.ray_conversion import make_shipped_path


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
    assert make_shipped_path("model") == str(tmp_path / "model")
    assert make_shipped_path("hf://org/model") == "hf://org/model"
    assert make_shipped_path(None) is None


def test_a_task_that_is_begun_again_takes_nothing_back() -> None:
    told: list[tuple[int, int]] = []
    total = TaskSum(lambda done, whole: told.append((done, whole)), [100, 300], 2)
    where = "node", "id", 1
    total.update({0: TaskNews(5, 50, *where)})  # the other has not begun: nothing is told
    total.update({0: TaskNews(25, 50, *where), 1: TaskNews(10, 100, *where)})
    total.update({0: TaskNews(0, 50, *where), 1: TaskNews(10, 100, *where)})
    total.update({0: TaskNews(50, 50, *where), 1: TaskNews(100, 100, *where)})
    total.finish()
    assert told == [(80, 400), (80, 400), (399, 400), (400, 400)]
