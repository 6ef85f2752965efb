"""`verify` and `diff` on a Ray cluster of two nodes, which is of this test alone."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.synthetic import SMALL_V3, write_checkpoint

pytest.importorskip("ray")

CONFIG = {**SMALL_V3, "num_hidden_layers": 2, "num_nextn_predict_layers": 0, "n_routed_experts": 4, "vocab_size": 1024}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with two nodes of one processor each."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray") as folder:
        # Else 127.0.0.1 is taken for the address of this machine in its network, where nobody listens.
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster  # noqa: PLC0415 - it reads the variables

        small = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False, "temp_dir": folder}
        nodes = Cluster(initialize_head=True, head_node_args=small)
        nodes.add_node(num_cpus=1, object_store_memory=100_000_000)
        yield str(nodes.address)
        nodes.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its rank files, and the same damaged."""
    made = tmp_path_factory.mktemp("clustered")
    write_checkpoint(made / "source", CONFIG, 3)
    reshard.convert(made / "source", made / "good", mp=2)
    shutil.copytree(made / "good", made / "damaged")
    for path in (made / "damaged").glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        content[-1] ^= 1
        path.write_bytes(content)
    return made


def test_a_target_is_verified_on_both_nodes(cluster: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("good", "damaged"):
        for source in ("source", None):
            told: list[tuple[int, int]] = []
            report = reshard.verify(name, source, on=f"ray={cluster}", progress=lambda *two: told.append(two))  # noqa: B023
            assert report == reshard.verify(name, source)
            assert bool(report.problems) == (name == "damaged")
            assert told[-1][0] == told[-1][1] > 0


def test_a_sample_of_some_ranks(cluster: str, folder: Path) -> None:
    here = reshard.verify(folder / "damaged", folder / "source", ranks=[1], sample=0.1)
    assert reshard.verify(folder / "damaged", folder / "source", ranks=[1], sample=0.1, on=f"ray={cluster}") == here


def test_two_checkpoints_are_compared_on_both_nodes(cluster: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "damaged", tmp_path / "other")
    (tmp_path / "other" / "reshard.json").unlink()  # which knows that it is damaged
    report = reshard.diff(folder / "source", tmp_path / "other", replicas="first", on=f"ray={cluster}")
    assert report == reshard.diff(folder / "source", tmp_path / "other", replicas="first")
    assert report.values
    assert reshard.diff(folder / "source", folder / "good", on=f"ray={cluster}").is_same


def test_the_command_prints_the_same(cluster: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", str(folder / "damaged"), "--source", str(folder / "source"), "--progress", "none"]
    found = []
    for more in ([], ["--on", f"ray={cluster}"]):
        assert main([*words, *more]) == 1
        found.append(capsys.readouterr())
    assert found[0] == found[1]
    assert "problems" in found[0].out


def test_what_a_task_refuses_is_refused(cluster: str, folder: Path, tmp_path: Path) -> None:
    """The nodes see it only when they read."""
    for name, value in (("wrong", "dask"), ("no address", "ray=")):
        with pytest.raises(Refused) as refused:
            reshard.verify(folder / "good", on=value)
        assert (name, refused.value.problems[0].kind) == (name, "wrong-option")
    shutil.copytree(folder / "good", tmp_path / "good")
    with pytest.raises(Refused) as refused:
        reshard.verify(tmp_path / "good", sums=tmp_path / "sums", on=f"ray={cluster}")  # type: ignore[call-overload]
    assert [problem.subject for problem in refused.value.problems] == ["on"]
