"""Two runs in one folder of a store, of which one gives up, was asleep, or was thrown away by the other."""

import threading
from pathlib import Path

import pytest
from jobs import Job, convert_checkpoint, plan_conversion
from refusals import TINY
from stores_to_write import FolderStore, write_to_store

from reshard import Refused
from reshard.errors import refuse
from reshard.execution.execute import Settings
from reshard.formats.target_names import JOURNAL, MANIFEST, STORE_RECORD
from reshard.synthetic import write_checkpoint
from reshard.target.preflight import look_at_target
from reshard.target.state import TargetState

ONE = Settings(jobs=1)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.execution.store_target.PART_SIZE", 200_000)


def look(source: Path, tmp_path: Path) -> TargetState:
    return look_at_target(plan_conversion(Job(source, 2)), tmp_path / "none")


def convert_locally(source: Path, target: Path) -> dict[str, bytes]:
    convert_checkpoint(Job(source, 2), target)
    return {path.name: path.read_bytes() for path in target.iterdir()}


@pytest.mark.parametrize("keeps_parts", [True, False])
@pytest.mark.parametrize("moment", [("complete_upload", "model1-mp2.safetensors"), ("put_new", MANIFEST)])
def test_a_run_that_gives_up_leaves_the_work_of_another(
    moment: tuple[str, str], tmp_path: Path, *, keeps_parts: bool
) -> None:
    """Though it began the job, and has nothing itself."""
    write_checkpoint(tmp_path / "source", TINY, 2)
    wanted, state = convert_locally(tmp_path / "source", tmp_path / "wanted"), look(tmp_path / "source", tmp_path)
    begun, failing, ended = threading.Event(), threading.Event(), list[str]()

    def fail(method: str, _name: str) -> None:
        if method == "put_part":
            begun.set()
            failing.wait()
            raise refuse("cannot-write", "x", "busy", "an answer", "later")

    def run_first() -> None:
        try:
            write_to_store(state, FolderStore(tmp_path / "store", keeps_parts=keeps_parts, fault=fail), ONE)
        except Refused as refused:
            ended.append(refused.problems[0].kind)

    first = threading.Thread(target=run_first, daemon=True)
    first.start()
    begun.wait()

    def let_it_fail(method: str, name: str) -> None:
        if (method, name) == moment and not ended:
            failing.set()
            first.join()

    store = FolderStore(tmp_path / "store", keeps_parts=keeps_parts, fault=let_it_fail)
    write_to_store(state, store, ONE)
    assert ended == ["cannot-write"]
    found = store.objects
    del found[STORE_RECORD]
    assert found == wanted


@pytest.mark.parametrize("keeps_parts", [True, False])
@pytest.mark.parametrize(
    "step", [("complete_upload", "model0-mp2.safetensors"), ("put", "tokenizer.json"), ("put_new", MANIFEST)]
)
def test_a_run_that_was_asleep_writes_nothing_over_another_conversion(
    step: tuple[str, str], tmp_path: Path, *, keeps_parts: bool
) -> None:
    """Which has thrown its job away, and has ended, before the run looks at its job for the last time."""
    for seed, name in enumerate(("old", "new")):
        write_checkpoint(tmp_path / name, TINY, 2, seed=seed)
    wanted = convert_locally(tmp_path / "new", tmp_path / "wanted")
    old, new = (look(tmp_path / name, tmp_path) for name in ("old", "new"))
    undisturbed = FolderStore(tmp_path / "undisturbed", keeps_parts=keeps_parts)
    write_to_store(old, undisturbed, ONE)
    before = undisturbed.calls[: undisturbed.calls.index(step)]
    looks = max(number for number, call in enumerate(before) if call == ("get", JOURNAL))
    left = looks

    def sleep(_method: str, _name: str) -> None:
        nonlocal left
        if left == 0:
            other = FolderStore(tmp_path / "store", keeps_parts=keeps_parts)
            write_to_store(new, other, Settings(jobs=1, restart=True))
        left -= 1

    store = FolderStore(tmp_path / "store", keeps_parts=keeps_parts, fault=sleep)
    with pytest.raises(Refused, match="another run"):
        write_to_store(old, store, ONE)
    assert left < 0
    found = store.objects
    del found[STORE_RECORD]
    assert found == wanted
