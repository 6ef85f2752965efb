"""Every byte of the source is read once, and every byte of the target written once, as the system counts them."""

from mmap import PAGESIZE
from pathlib import Path

import numpy as np
import pytest
from cached_pages import drop_files, find_cached_pages
from safetensors.numpy import save_file

import reshard
from reshard.cli.main import main

RANKS = 8
MOST = 1.02
"""Bytes moved, for each byte of source and target."""

RECIPE = """
name  = "shapes"
about = "rows, columns, replicas, and columns of rows that are longer than a window"
left  = "one"
right = "other"
files = "{rank}-of-{ranks}.safetensors"
placeholders.i = { counts = "layers" }
rules = [
["same", "layers.{i}.tall.weight", "layers.{i}.tall.weight", "rows"],
["same", "layers.{i}.wide.weight", "layers.{i}.wide.weight", "columns"],
["same", "layers.{i}.long.weight", "layers.{i}.long.weight", "columns"],
["same", "layers.{i}.shared.weight", "layers.{i}.shared.weight", "replicate"],
]
"""

SHAPES = {"tall": (2048, 1000), "wide": (1000, 4096), "long": (3, 5 << 20), "shared": (3 << 20, 2)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "source"
    folder.mkdir()
    values = np.random.default_rng(0)
    tensors = {
        f"layers.{layer}.{name}.weight": values.integers(0, 256, shape, np.uint8).view(np.int8)
        for layer in range(2)
        for name, shape in SHAPES.items()
    }
    save_file(tensors, folder / "model.safetensors")
    (folder.parent / "shapes.toml").write_text(RECIPE, encoding="utf-8")
    return folder


def read_counts() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return {name: int(value) for name, value in (line.split(":") for line in lines)}


@pytest.mark.parametrize("cache", ["yes", "no"])
@pytest.mark.parametrize("jobs", [1, 4])
def test_no_byte_is_read_or_written_twice(source: Path, tmp_path: Path, cache: str, jobs: int) -> None:
    recipe = source.parent / "shapes.toml"
    drop_files(source)
    before = read_counts()
    result = reshard.convert(source, tmp_path / "target", mp=RANKS, recipe=str(recipe), cache=cache, jobs=jobs)
    moved = {name: value - before[name] for name, value in read_counts().items()}
    read = sum(path.stat().st_size for path in source.iterdir())
    written = sum(path.stat().st_size for path in (tmp_path / "target").iterdir())
    assert read <= moved["rchar"] <= MOST * read
    assert written <= moved["wchar"] <= MOST * written
    # Of a cold source the disk counts as well. What was read ahead behind the header is read once more past the cache.
    kept = sum(len(find_cached_pages(path)) * PAGESIZE for path in source.iterdir())
    ahead = kept if cache == "no" else 0
    assert moved["read_bytes"] <= MOST * read + ahead
    assert result.done is not None
    assert (result.done.ways.read == "cached") == (cache == "yes")
    assert kept >= read if cache == "yes" else kept < read / 2


def test_a_small_job_goes_through_the_cache_from_a_cold_disk_too(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Past it, a cold source took 1.2 times as long."""
    drop_files(source)
    recipe = str(source.parent / "shapes.toml")
    assert main(["convert", str(source), str(tmp_path / "target"), "--mp", "2", "--recipe", recipe]) == 0
    assert "read cached, written cached" in capsys.readouterr().out
