"""What a conversion leaves in a store: byte for byte what it leaves in a folder, the manifest included."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job, convert_checkpoint
from safetensors.torch import save_file
from small_models import write_model
from store_servers import serve_web
from stores_to_write import FolderStore, convert_to_store, write_to_store

import reshard
from reshard.execution.execute import Settings
from reshard.formats.target_names import MANIFEST, STORE_RECORD
from reshard.target.preflight import look_at_target
from reshard.types import SLICED, WHOLE, Subset

Source = Callable[[str], Path]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ranks": ("deepseek-v3", {"mp": 4}),
    "cast to BF16": ("deepseek-v3", {"mp": 2, "cast": "bf16"}),
    "cast to FP8": ("glm-5.1", {"mp": 1, "cast": "fp8"}),
    "FP4 experts": ("deepseek-v4-flash", {"mp": 2, "expert_dtype": "fp8"}),
    "whole files": ("deepseek-v3", {"mp": 1, "to": WHOLE, "max_file_size": 100_000, "cast": "bf16"}),
    "slices": ("deepseek-v3", {"mp": 4, "to": SLICED}),
    "tables of n-grams": ("deepseek-v4.1-flash", {"mp": 4}),
    "a part": ("deepseek-v3", {"mp": 2, "subset": Subset(layers=(0,))}),
}

RECIPE = f"""
name = "tiny"
about = "tensors of a byte, and of none"
left = "huggingface"
right = "ranks"
model_types = ["tiny"]
files = "rank{{rank}}-of-{{ranks}}.safetensors"
placeholders.i = {{ counts = "numbers", size = "many" }}
rules = [
["same", "{"long" * 9}.{{i}}", "{"long" * 9}.{{i}}", "by i"],
["same", "empty", "empty", "replicate"],
["same", "odd", "odd", "first rank"],
]
"""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.execution.store_target.PART_SIZE", 5_000)


def require_same_as_folder(store: FolderStore, folder: Path) -> None:
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = store.objects
    record = json.loads(found.pop(STORE_RECORD))["objects"]
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert {name: entry["size"] for name, entry in record.items()} == {
        name: len(content) for name, content in wanted.items() if name != MANIFEST
    }
    entries = store.list_entries()
    assert all(entries[name].version.strip('"') == entry["etag"].strip('"') for name, entry in record.items())
    assert not store.open_uploads


@pytest.mark.parametrize("keeps_parts", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_store_gets_what_a_folder_gets(case: str, source: Source, tmp_path: Path, *, keeps_parts: bool) -> None:
    name, arguments = CASES[case]
    job = Job(source(name), **arguments)
    store = FolderStore(tmp_path / "store", keeps_parts=keeps_parts)
    convert_to_store(job, store, tmp_path / "target")
    convert_checkpoint(job, tmp_path / "target")
    assert sum(method == "put_part" for method, _ in store.calls) > sum(
        name.endswith(".safetensors") for name in store.objects
    )
    require_same_as_folder(store, tmp_path / "target")


@pytest.mark.parametrize("keeps_parts", [True, False])
def test_rank_files_are_joined_in_a_store(
    converted: Callable[[str, int], Path], tmp_path: Path, *, keeps_parts: bool
) -> None:
    """Columns of several files; and the original files are restored, with more files than ranks."""
    for to in ({"mp": 1, "to": WHOLE}, {"mp": 2}, {"mp": 1, "to": WHOLE, "cast": "bf16"}):
        job = Job(converted("deepseek-v3", 4), **to)
        store, target = FolderStore(tmp_path / f"{to}", keeps_parts=keeps_parts), tmp_path / f"target {to}"
        convert_to_store(job, store, target)
        convert_checkpoint(job, target)
        require_same_as_folder(store, target)


@pytest.mark.parametrize("keeps_parts", [True, False])
def test_a_single_file_of_tiny_and_empty_tensors(tmp_path: Path, *, keeps_parts: bool) -> None:
    """Its header is larger than a part. A rank that gets no tensor has a header alone."""
    tensors = {f"{'long' * 9}.{number}": torch.full((1,), number, dtype=torch.uint8) for number in range(99)}
    (tmp_path / "source").mkdir()
    save_file({**tensors, "empty": torch.zeros(0, 7), "odd": torch.ones(3)}, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": "tiny", "many": 99}))
    (tmp_path / "tiny.toml").write_text(RECIPE)
    for number, (source, only) in enumerate((("source", ()), ("source/model.safetensors", ("odd", "empty")))):
        job = Job(tmp_path / source, 3, recipe=str(tmp_path / "tiny.toml"), subset=Subset(only=only))
        store, target = FolderStore(tmp_path / f"store-{number}", keeps_parts=keeps_parts), tmp_path / f"to-{number}"
        convert_to_store(job, store, target)
        convert_checkpoint(job, target)
        require_same_as_folder(store, target)


@pytest.mark.parametrize("keeps_parts", [True, False])
def test_columns_of_a_matrix(tmp_path: Path, *, keeps_parts: bool) -> None:
    write_model(tmp_path / "source", "llama")
    job = Job(tmp_path / "source", 2)
    store = FolderStore(tmp_path / "store", keeps_parts=keeps_parts)
    convert_to_store(job, store, tmp_path / "target")
    convert_checkpoint(job, tmp_path / "target")
    require_same_as_folder(store, tmp_path / "target")


@pytest.mark.parametrize("arguments", [{"mp": 4}, {"mp": 1, "to": WHOLE, "cast": "bf16"}])
def test_past_the_page_cache(
    arguments: dict[str, Any], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole pages are read, and more than asked for: bytes that are in place already stay."""
    for module in ("local", "page_cache"):
        monkeypatch.setattr(f"reshard.storage.{module}.is_range_cached", lambda *_: False)
    job = Job(source("deepseek-v3"), **arguments)
    store = FolderStore(tmp_path / "store", keeps_parts=True)
    done = convert_to_store(job, store, tmp_path / "target", Settings(cache="no"))
    assert done.ways.read != "cached"
    convert_checkpoint(job, tmp_path / "target")
    require_same_as_folder(store, tmp_path / "target")


def test_from_a_store_into_a_store(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    with serve_web(source("deepseek-v3")) as served:
        state = look_at_target(reshard.plan(served.endpoint, 4), tmp_path / "target")
        for keeps_parts in (True, False):
            store = FolderStore(tmp_path / f"{keeps_parts}", keeps_parts=keeps_parts)
            write_to_store(state, store)
            found = store.objects
            del found[STORE_RECORD]
            convert_checkpoint(Job(source("deepseek-v3"), 4), tmp_path / f"wanted {keeps_parts}")
            assert found == {path.name: path.read_bytes() for path in (tmp_path / f"wanted {keeps_parts}").iterdir()}
