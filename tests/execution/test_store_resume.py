"""What happens to a conversion into a store when something happens: crashes at each call, other runs, lost parts."""

import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from jobs import Job, convert_checkpoint, plan_conversion
from refusals import TINY
from stores_to_write import FolderStore, die_at, write_to_store

from reshard.errors import Refused, refuse
from reshard.execution.execute import Settings
from reshard.execution.store_journal import DonePart
from reshard.execution.store_ledger import StoreLedger
from reshard.formats.target_names import JOURNAL, MANIFEST, PROGRESS, STORE_RECORD
from reshard.synthetic import write_checkpoint
from reshard.target.preflight import look_at_target
from reshard.target.state import TargetState

PART = 200_000


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reshard.execution.store_target.PART_SIZE", PART)


@pytest.fixture
def noted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is noted as soon as it is put, by the thread that put it."""
    add = StoreLedger.add_part

    def add_and_flush(self: StoreLedger, part: DonePart, inexact: int) -> bool:
        found = add(self, part, inexact)
        self.flush()
        return found

    monkeypatch.setattr(StoreLedger, "add_part", add_and_flush)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume") / "source"
    write_checkpoint(folder, TINY, 3)
    return folder


@pytest.fixture
def job(source: Path) -> Job:
    return Job(source, 2)


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


def look(job: Job, tmp_path: Path) -> TargetState:
    """What a look at an empty target says."""
    return look_at_target(plan_conversion(job), tmp_path / "not there")


def count(store: FolderStore, method: str) -> int:
    return sum(called == method for called, _ in store.calls)


def interrupt(job: Job, tmp_path: Path, *, keeps_parts: bool, puts: int = 6) -> Path:
    """A store in which a run was killed before its last puts."""
    root, state = tmp_path / f"store of {job.mp}", look(job, tmp_path)
    left = puts

    def die(method: str, _name: str) -> None:
        nonlocal left
        left -= method == "put_part"
        if not left:
            os._exit(9)

    dying = FolderStore(root, keeps_parts=keeps_parts, fault=die)
    assert run_in_child(partial(write_to_store, state, dying, Settings(jobs=1))) == 9
    return root


def refuse_changed() -> None:
    raise refuse("target-changed", "target", "another", "none")


def kinds(error: pytest.ExceptionInfo[Refused]) -> list[str]:
    return [problem.kind for problem in error.value.problems]


@pytest.mark.usefixtures("noted_at_once")
@pytest.mark.parametrize("keeps_parts", [True, False])
def test_a_crash_at_any_call_is_gone_on_from(
    job: Job, wanted: dict[str, bytes], tmp_path: Path, *, keeps_parts: bool
) -> None:
    settings, state = Settings(jobs=1), look(job, tmp_path)
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


@pytest.mark.usefixtures("noted_at_once")
@pytest.mark.parametrize("keeps_parts", [True, False])
def test_another_run_may_do_all_of_it_between_any_two_calls(
    job: Job, wanted: dict[str, bytes], tmp_path: Path, *, keeps_parts: bool
) -> None:
    settings, state = Settings(jobs=1), look(job, tmp_path)
    number, is_met, refused = 0, True, 0
    while is_met:
        root, is_met, left = tmp_path / f"{number}", False, number
        other = FolderStore(root, keeps_parts=keeps_parts)

        def run_other(_method: str, _name: str, other: FolderStore = other) -> None:
            nonlocal left, is_met
            if not left:
                is_met = True
                write_to_store(state, other, settings)
            left -= 1

        store = FolderStore(root, keeps_parts=keeps_parts, fault=run_other)
        try:
            write_to_store(state, store, settings)
        except Refused as error:
            assert [problem.kind for problem in error.problems] == ["another-run"], store.calls[-1]  # noqa: PT017
            refused += 1
        require_finished(store, wanted)
        shutil.rmtree(root)
        number += 1
    assert refused > number // 2


@pytest.mark.usefixtures("noted_at_once")
@pytest.mark.parametrize("keeps_parts", [True, False])
def test_another_job_is_refused_and_begins_again_if_asked_to(
    job: Job, source: Path, tmp_path: Path, *, keeps_parts: bool
) -> None:
    root = interrupt(job, tmp_path, keeps_parts=keeps_parts, puts=8)
    store, other = FolderStore(root, keeps_parts=keeps_parts), look(Job(source, 4), tmp_path)
    before = store.objects
    assert any(name.endswith(".safetensors") for name in before) != keeps_parts
    with pytest.raises(Refused) as error:
        write_to_store(other, store)
    assert kinds(error) == ["another-job"]
    assert "2 ranks" in str(error.value)
    assert store.objects == before
    with pytest.raises(Refused, match="target changed"):  # as somebody else has just changed it
        write_to_store(other, store, Settings(restart=True), require_same=refuse_changed)
    assert store.objects == before
    assert bool(store.open_uploads) == keeps_parts
    convert_checkpoint(Job(source, 4), tmp_path / "wanted of 4")
    write_to_store(other, store, Settings(restart=True))
    require_finished(store, {path.name: path.read_bytes() for path in (tmp_path / "wanted of 4").iterdir()})


@pytest.mark.usefixtures("noted_at_once")
@pytest.mark.parametrize("keeps_parts", [True, False])
def test_a_restart_that_crashes_is_gone_on_from(job: Job, source: Path, tmp_path: Path, *, keeps_parts: bool) -> None:
    """By the same command, which says --restart again."""
    convert_checkpoint(Job(source, 4), tmp_path / "wanted of 4")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "wanted of 4").iterdir()}
    begun, other, settings = (
        interrupt(job, tmp_path, keeps_parts=keeps_parts, puts=8),
        look(Job(source, 4), tmp_path),
        Settings(jobs=1, restart=True),
    )
    for number in range(0, 30, 2):
        root = tmp_path / f"{number}"
        shutil.copytree(begun, root)
        dying = FolderStore(root, keeps_parts=keeps_parts, fault=die_at(number))
        assert run_in_child(partial(write_to_store, other, dying, settings)) == 9
        store = FolderStore(root, keeps_parts=keeps_parts)
        write_to_store(other, store, settings)
        require_finished(store, wanted, orphans=1)
        shutil.rmtree(root)


@pytest.mark.usefixtures("noted_at_once")
@pytest.mark.parametrize("keeps_parts", [True, False])
def test_damaged_notes_are_as_good_as_none(
    job: Job, wanted: dict[str, bytes], tmp_path: Path, *, keeps_parts: bool
) -> None:
    root = interrupt(job, tmp_path, keeps_parts=keeps_parts, puts=8)
    notes = sorted((root / "objects" / PROGRESS).iterdir())
    assert len(notes) > 3 or not keeps_parts
    for note in notes[keeps_parts:]:
        content = bytearray(note.read_bytes())
        content[len(content) // 2] ^= 1
        note.write_bytes(content)
    notes[-1].write_bytes(b"")
    store = FolderStore(root, keeps_parts=keeps_parts)
    write_to_store(look(job, tmp_path), store)
    require_finished(store, wanted, orphans=9)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"id": "x", "part_size": 0}', b"\0" * 99])
def test_a_damaged_job_is_refused_and_can_be_thrown_away(
    content: bytes, job: Job, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    root = interrupt(job, tmp_path, keeps_parts=True)
    (root / "objects" / JOURNAL).write_bytes(content)
    store = FolderStore(root, keeps_parts=True)
    with pytest.raises(Refused) as error:
        write_to_store(look(job, tmp_path), store)
    assert kinds(error) == ["damaged-journal"]
    write_to_store(look(job, tmp_path), store, Settings(restart=True))
    require_finished(store, wanted, orphans=2)


@pytest.mark.usefixtures("noted_at_once")
def test_parts_that_the_store_has_lost_are_put_again(job: Job, wanted: dict[str, bytes], tmp_path: Path) -> None:
    root = interrupt(job, tmp_path, keeps_parts=True)
    parts = sorted(path for folder in (root / "uploads").iterdir() for path in folder.iterdir())
    assert len(parts) == 5
    parts[0].unlink()
    parts[1].rename(parts[1].with_name(f"{parts[1].name.partition('-')[0]}-{'0' * 32}"))
    store = FolderStore(root, keeps_parts=True)
    done = write_to_store(look(job, tmp_path), store)
    require_finished(store, wanted)
    undisturbed = FolderStore(tmp_path / "undisturbed", keeps_parts=True)
    write_to_store(look(job, tmp_path), undisturbed)
    assert count(store, "put_part") == count(undisturbed, "put_part") - 3
    assert done.resumed > 0


@pytest.mark.usefixtures("noted_at_once")
def test_an_upload_that_the_store_has_thrown_away_is_begun_again(
    job: Job, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    """As the rules of a bucket do with those that take long."""
    root = interrupt(job, tmp_path, keeps_parts=True)
    for upload in (root / "uploads").iterdir():
        shutil.rmtree(upload)
    store = FolderStore(root, keeps_parts=True)
    assert write_to_store(look(job, tmp_path), store).resumed == 0
    require_finished(store, wanted)


@pytest.mark.usefixtures("noted_at_once")
def test_an_object_that_has_changed_is_written_again(job: Job, wanted: dict[str, bytes], tmp_path: Path) -> None:
    root = interrupt(job, tmp_path, keeps_parts=False, puts=8)
    (name,) = (path.name for path in (root / "objects").iterdir() if path.name.endswith(".safetensors"))
    FolderStore(root, keeps_parts=False).put(name, bytes(len(wanted[name])))
    store = FolderStore(root, keeps_parts=False)
    assert write_to_store(look(job, tmp_path), store).resumed == 0
    require_finished(store, wanted)


@pytest.mark.usefixtures("noted_at_once")
def test_etags_that_are_no_md5_serve_too(job: Job, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """With keys of its own a bucket's ETags are others, and tell no bytes: a crash between the completion of an object
    and its note takes the object again.
    """
    state, settings = look(job, tmp_path), Settings(jobs=1)
    undisturbed = FolderStore(tmp_path / "store", keeps_parts=True, is_keyed=True)
    write_to_store(state, undisturbed, settings)
    require_finished(undisturbed, wanted)
    last = max(number for number, (method, _) in enumerate(undisturbed.calls) if method == "complete_upload")
    for number in (last - 4, last - 2, last, last + 1, last + 3):
        dying = FolderStore(tmp_path / f"{number}", keeps_parts=True, is_keyed=True, fault=die_at(number))
        assert run_in_child(partial(write_to_store, state, dying, settings)) == 9
        store = FolderStore(tmp_path / f"{number}", keeps_parts=True, is_keyed=True)
        write_to_store(state, store, settings)
        require_finished(store, wanted)


class Deaf(FolderStore):
    """A store whose answers are lost: what it did, it is asked for again."""

    def put_new(self, name: str, content: bytes) -> bool:
        return super().put_new(name, content) and super().put_new(name, content)

    def complete_upload(self, name: str, upload: str, etags: Sequence[str]) -> str:
        super().complete_upload(name, upload, etags)
        return super().complete_upload(name, upload, etags)


@pytest.mark.parametrize("is_keyed", [True, False])
def test_lost_answers_are_found_out(job: Job, wanted: dict[str, bytes], tmp_path: Path, *, is_keyed: bool) -> None:
    store = Deaf(tmp_path / "store", keeps_parts=True, is_keyed=is_keyed)
    write_to_store(look(job, tmp_path), store)
    require_finished(store, wanted)
