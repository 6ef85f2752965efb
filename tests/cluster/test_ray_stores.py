"""Shares made by the tasks of a Ray cluster, from a bucket and into one: all is as one process makes it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import S3State, Stored, make_etag, serve_s3, set_s3_environment
from targets import RANKS, make_source_and_target
from torture import contents

from reshard.formats.target_names import STORE_RECORD

pytest.importorskip("ray")
pytest.importorskip("obstore")

from ray_clusters import RayNodes, start_ray

IN, OUT = "s3://models/source", "s3://models/target"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, and beside it `whole`, which one process has made of it."""
    return make_source_and_target(tmp_path_factory.mktemp("stores")).parent


@pytest.fixture(scope="module")
def bucket(folder: Path) -> Iterator[S3State]:
    """A bucket with the source, whose keys are in the environment of the nodes."""
    with pytest.MonkeyPatch.context() as patch, serve_s3() as state:
        set_s3_environment(patch, state, folder)
        for path in (folder / "source").iterdir():
            content = path.read_bytes()
            state.objects[f"source/{path.name}"] = Stored(content, make_etag(content))
        yield state


@pytest.fixture(scope="module")
def nodes(bucket: S3State) -> Iterator[RayNodes]:
    assert bucket
    with start_ray() as nodes:
        nodes.add_node()
        yield nodes


def test_a_bucket_gets_what_one_process_makes(nodes: RayNodes, bucket: S3State, folder: Path) -> None:
    code, said, errors = nodes.convert(IN, OUT, "--mp", str(RANKS))
    assert code == 0, errors
    assert "2 shares on" in said
    made = bucket.read_folder("target/")
    del made[STORE_RECORD]
    assert made == {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    for words in (["verify", OUT], ["verify", OUT, "--source", IN], ["diff", IN, OUT]):
        code, said, errors = nodes.run(*words, "--on", f"ray={nodes.address}")
        assert code == 0, said + errors


def test_a_folder_gets_what_one_process_makes_of_a_bucket(nodes: RayNodes, folder: Path, tmp_path: Path) -> None:
    code, _, errors = nodes.convert(IN, str(tmp_path / "target"), "--mp", str(RANKS))
    assert code == 0, errors
    assert contents(tmp_path / "target") == contents(folder / "whole")
