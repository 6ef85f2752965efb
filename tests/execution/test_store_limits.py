"""What a store and --max-memory allow: the size of parts, the number of threads, and what is refused at once."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, convert_checkpoint, plan_conversion
from refusals import TINY
from stores_to_write import SMALL_LIMITS, FolderStore, convert_to_store, write_to_store

from reshard.errors import Refused, refuse
from reshard.execution import part_writer, store_target
from reshard.execution.execute import Settings
from reshard.execution.parts import check_upload_limits
from reshard.execution.reader import WorkerBuffers
from reshard.execution.store_objects import write_store_record
from reshard.formats.target_names import STORE_RECORD
from reshard.storage.local import allocate_aligned
from reshard.synthetic import write_checkpoint, write_tensors
from reshard.target.preflight import look_at_target
from reshard.types import WHOLE

REAL_LEAST = 5 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limits") / "source"
    write_checkpoint(folder, TINY, 3)
    return folder


def count_parts(store: FolderStore) -> dict[str, int]:
    names = [name for method, name in store.calls if method == "put_part"]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize("most_parts", [1, 2, 3, 7])
def test_no_file_has_more_parts_than_the_store_takes(
    most_parts: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_target, "PART_SIZE", 1)
    limits = SMALL_LIMITS._replace(least_part=1, most_parts=most_parts)
    store = FolderStore(tmp_path / "store", keeps_parts=True, limits=limits)
    convert_to_store(Job(source, 2), store, tmp_path / "none")
    parts = count_parts(store)
    assert len(parts) == 2
    assert all(1 <= number <= most_parts for number in parts.values())


def test_no_part_but_the_last_is_smaller_than_the_store_takes(source: Path, tmp_path: Path) -> None:
    """The store looks for itself."""
    for least in (1_000, 250_000, 10**9):
        store = FolderStore(
            tmp_path / f"{least}", keeps_parts=True, limits=SMALL_LIMITS._replace(least_part=least, most_part=1 << 40)
        )
        convert_to_store(Job(source, 2), store, tmp_path / "none", Settings(max_memory=1 << 40))
        assert set(count_parts(store).values()) == {1}


def test_a_file_that_is_too_large_is_refused_before_anything(source: Path, tmp_path: Path) -> None:
    plan = plan_conversion(Job(source, 2))
    size = max(file.size for file in plan.files)
    for limits in (
        SMALL_LIMITS._replace(largest=size - 1),
        SMALL_LIMITS._replace(most_part=(4 << 20) + size // 10 - 1, most_parts=10),
        SMALL_LIMITS._replace(most_part=1_000, most_parts=1_000_000_000),
    ):
        store = FolderStore(tmp_path / "store", keeps_parts=True, limits=limits)
        with pytest.raises(Refused) as error:
            convert_to_store(Job(source, 2), store, tmp_path / "none")
        assert [problem.kind for problem in error.value.problems] == ["too-large"] * 2
        assert not store.calls
    assert not [*check_upload_limits(plan, SMALL_LIMITS._replace(largest=size))]


def test_too_little_memory_is_refused_with_what_is_enough(source: Path, tmp_path: Path) -> None:
    job = Job(source, 1, to=WHOLE, cast="bf16")
    convert_checkpoint(job, tmp_path / "wanted")
    for keeps_parts in (True, False):
        limits = SMALL_LIMITS._replace(least_part=REAL_LEAST)
        store = FolderStore(tmp_path / f"{keeps_parts}", keeps_parts=keeps_parts, limits=limits)
        with pytest.raises(Refused) as error:
            convert_to_store(job, store, tmp_path / "none", Settings(max_memory=1 << 20))
        (problem,) = error.value.problems
        assert problem.kind == "too-little-memory"
        assert not store.calls
        enough = int(problem.remedy.removeprefix("--max-memory ").removesuffix("MiB"))
        done = convert_to_store(job, store, tmp_path / "none", Settings(max_memory=enough << 20))
        assert done.jobs == 1
        found = store.objects
        del found[STORE_RECORD]
        assert found == {path.name: path.read_bytes() for path in (tmp_path / "wanted").iterdir()}


@pytest.mark.parametrize("keeps_parts", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"cast": "bf16"}])
@pytest.mark.parametrize("memory", [60 << 20, 100 << 20, 256 << 20])
def test_all_buffers_together_fit(
    memory: int,
    arguments: dict[str, Any],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    keeps_parts: bool,
) -> None:
    """Counted as they are allocated; those of a stream as it says that it takes."""
    taken = []

    def count(size: int) -> memoryview:
        taken.append(size)
        return allocate_aligned(size)

    monkeypatch.setattr(part_writer, "allocate_aligned", count)
    monkeypatch.setitem(WorkerBuffers.__init__.__kwdefaults__ or {}, "allocate", count)
    store = FolderStore(
        tmp_path / "store", keeps_parts=keeps_parts, limits=SMALL_LIMITS._replace(least_part=REAL_LEAST)
    )
    done = convert_to_store(Job(source, 1, **arguments), store, tmp_path / "none", Settings(max_memory=memory))
    held = 0 if keeps_parts else done.jobs * 2 * REAL_LEAST
    assert memory // 4 < sum(taken) + held <= memory
    assert sum(taken) > done.jobs * REAL_LEAST


SCRIPT = """
import sys
from pathlib import Path
from jobs import Job
from stores_to_write import FolderStore, SMALL_LIMITS, convert_to_store
from reshard.execution.execute import Settings

def measure_peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))

class Sink(FolderStore):
    def put_part(self, name, upload, number, data):
        return "0" * 32
    def complete_upload(self, name, upload, etags):
        return "none"

source, root, memory = sys.argv[1:]
store = Sink(Path(root), keeps_parts=True, limits=SMALL_LIMITS._replace(least_part=5 << 20))
job = Job(Path(source), 2, recipe=source + ".toml")
before = measure_peak()
convert_to_store(job, store, Path(root, "none"), Settings(max_memory=int(memory), cache="no"))
print(measure_peak() - before)
"""


def test_a_process_takes_no_more_memory_than_it_may(tmp_path: Path) -> None:
    """As the kernel counts it; 300 MB of rows and columns, six times what is allowed."""
    tensors = [(f"layers.{i}.{kind}.weight", "BF16", (4096, 2560)) for i in range(7) for kind in ("tall", "wide")]
    write_tensors(tmp_path / "plenty", tensors, {}, 2)
    (tmp_path / "plenty.toml").write_text(
        'name = "plenty"\nabout = "much"\nleft = "one"\nright = "other"\nfiles = "{rank}-of-{ranks}.safetensors"\n'
        'placeholders.i = { counts = "layers" }\nrules = [\n'
        '["same", "layers.{i}.tall.weight", "layers.{i}.tall.weight", "rows"],\n'
        '["same", "layers.{i}.wide.weight", "layers.{i}.wide.weight", "columns"],\n]\n',
        encoding="utf-8",
    )
    support = str(Path(__file__).parents[1] / "support")
    memory = 48 << 20
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "plenty"), str(tmp_path / "store"), str(memory)],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{support}:{Path(store_target.__file__).parents[2]}", "PATH": ""},
    )
    assert memory // 2 < int(done.stdout) < memory + (24 << 20)


def test_progress_is_told_as_it_is(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never backwards, the whole only at the end, and at first what an earlier run has done."""
    monkeypatch.setattr(store_target, "PART_SIZE", 200_000)
    state = look_at_target(plan_conversion(Job(source, 2)), tmp_path / "none")

    class Broken(Exception):
        pass

    def tell(told: list[tuple[int, int]]) -> Callable[[int, int], None]:
        return lambda done, whole: told.append((done, whole))

    def fail(method: str, _name: str) -> None:
        if method == "complete_upload":
            raise Broken

    first: list[tuple[int, int]] = []
    with pytest.raises(Broken):
        write_to_store(state, FolderStore(tmp_path / "store", keeps_parts=True, fault=fail), progress=tell(first))
    second: list[tuple[int, int]] = []
    store = FolderStore(tmp_path / "store", keeps_parts=True)
    done = write_to_store(state, store, progress=tell(second))
    assert first[0] == (0, state.size)
    assert second[0] == (state.plan.size, state.size)
    assert done.resumed == state.plan.size
    assert second[-1] == (state.size, state.size)
    for told in (first, second[:-1]):
        counts = [done for done, _ in told]
        assert counts == sorted(counts)
        assert counts[-1] < state.size
    assert not count_parts(store)


@pytest.mark.parametrize("keeps_parts", [True, False])
def test_a_side_file_of_any_size_goes_along(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, keeps_parts: bool
) -> None:
    monkeypatch.setattr(store_target, "PART_SIZE", 200_000)
    shutil.copytree(source, tmp_path / "source")
    content = os.urandom(2_500_001)
    (tmp_path / "source" / "tokenizer.json").write_bytes(content)
    store = FolderStore(tmp_path / "store", keeps_parts=keeps_parts)
    convert_to_store(Job(tmp_path / "source", 2), store, tmp_path / "none")
    assert store.objects["tokenizer.json"] == content
    assert count_parts(store)["tokenizer.json"] == 13
    assert json.loads(store.objects[STORE_RECORD])["objects"]["tokenizer.json"] == {
        "size": len(content),
        "etag": store.list_entries()["tokenizer.json"].version.strip('"'),
    }
    assert not store.open_uploads


@pytest.mark.parametrize("keeps_parts", [True, False])
def test_a_refusal_at_the_beginning_leaves_nothing(source: Path, tmp_path: Path, *, keeps_parts: bool) -> None:
    """Of another run that has changed the target; and of a store that fails."""
    state = look_at_target(plan_conversion(Job(source, 2)), tmp_path / "none")
    store = FolderStore(tmp_path / "store", keeps_parts=keeps_parts)

    def refuse_changed() -> None:
        raise refuse("target-changed", "target", "another", "none")

    with pytest.raises(Refused, match="target changed"):
        write_to_store(state, store, require_same=refuse_changed)
    assert store.objects == {}

    def fail(method: str, _name: str) -> None:
        if method == "put_part":
            raise refuse("cannot-write", "store", "no", "yes")

    store.fault = fail
    with pytest.raises(Refused, match="cannot write"):
        write_to_store(state, store)
    assert store.objects == {}
    assert not store.open_uploads


def test_the_record_keeps_what_is_finished() -> None:
    before = write_store_record(None, (), {"old": (1, "a"), "gone": (2, "b"), "again": (3, "c")})
    after = write_store_record(before, ("old", "again", "never"), {"again": (4, "d"), "new": (5, "e")})
    assert {name: (one["size"], one["etag"]) for name, one in json.loads(after)["objects"].items()} == {
        "old": (1, "a"),
        "again": (4, "d"),
        "new": (5, "e"),
    }
    for damaged in (b"", b"[]", b"{", b'{"objects": 1}', b'{"objects": {"a": 1}}', b"\xff"):
        assert [*json.loads(write_store_record(damaged, (), {"a": (1, "x")}))["objects"]] == ["a"]
