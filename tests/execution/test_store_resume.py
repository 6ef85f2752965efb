"""What happens to a conversion into a store when something happens: crashes at each call, other runs, lost parts."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from jobs import Job, convert_checkpoint, plan_conversion
from stores_to_write import FolderStore, die_at, write_to_store

from reshard.execution.execute import Settings
from reshard.execution.store_journal import DonePart
from reshard.execution.store_ledger import StoreLedger
from reshard.formats.target_names import MANIFEST, STORE_RECORD
from reshard.target.preflight import look_at_target

Source = Callable[[str], Path]

PART = 120_000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PART_SIZE", "STREAMED_SIZE"):
        monkeypatch.setattr(f"reshard.execution.store_target.{name}", PART)


@pytest.fixture
def noted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is noted as soon as it is put, by the thread that put it."""
    add = StoreLedger.add_part

    def add_and_flush(self: StoreLedger, part: DonePart, inexact: int) -> bool:
        found = add(self, part, inexact)
        self.flush()
        return found

    monkeypatch.setattr(StoreLedger, "add_part", add_and_flush)


@pytest.fixture
def job(source: Source) -> Job:
    return Job(source("deepseek-v3"), 2)


@pytest.fixture
def wanted(job: Job, tmp_path: Path) -> dict[str, bytes]:
    convert_checkpoint(job, tmp_path / "wanted")
    return {path.name: path.read_bytes() for path in (tmp_path / "wanted").iterdir()}


def require_finished(store: FolderStore, wanted: dict[str, bytes], orphans: int = 0) -> None:
    found = store.objects
    del found[STORE_RECORD]
    assert sorted(found) == sorted(wanted)
    assert found == wanted
    assert store.open_uploads <= orphans


def run_in_child(run: Callable[[], object]) -> int:
    """The exit status of a process that runs something."""
    child = os.fork()
    if not child:
        try:
            run()
            os._exit(0)
        except BaseException:  # noqa: BLE001
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.usefixtures("noted_at_once")
@pytest.mark.parametrize("keeps_parts", [True, False])
def test_a_crash_at_any_call_is_gone_on_from(
    job: Job, wanted: dict[str, bytes], tmp_path: Path, *, keeps_parts: bool
) -> None:
    settings, state = Settings(jobs=1), look_at_target(plan_conversion(job), tmp_path / "new")
    undisturbed = FolderStore(tmp_path / "store", keeps_parts=keeps_parts)
    write_to_store(state, undisturbed, settings)
    require_finished(undisturbed, wanted)
    calls = undisturbed.calls
    parts = sum(method == "put_part" for method, _ in calls)
    assert parts >= 8
    for number, call in enumerate(calls):
        root = tmp_path / f"{number}"
        dying = FolderStore(root, keeps_parts=keeps_parts, fault=die_at(number))
        assert run_in_child(partial(write_to_store, state, dying, settings)) == 9
        store = FolderStore(root, keeps_parts=keeps_parts)
        if MANIFEST in store.objects:
            break  # finished: what is left of the journal is for whoever looks at the target
        write_to_store(state, store, settings)
        # An upload that was begun, and that no note names yet, nobody can find again.
        is_unnamed = "begin_upload" in (method for method, _ in calls[number - 2 : number])
        require_finished(store, wanted, orphans=int(is_unnamed))
        if keeps_parts:
            again = sum(method == "put_part" for method, _ in store.calls)
            before = sum(method == "put_part" for method, _ in calls[:number])
            assert before + again <= parts + 1, call
        shutil.rmtree(root)
    else:
        pytest.fail("no call came after the manifest")
