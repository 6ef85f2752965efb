"""Makes the objects of a target in a store whole, and writes those beside the tensors; the manifest last."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from xxhash import xxh3_128

from reshard.errors import Refused, refuse
from reshard.execution.execute import OtherFiles, find_incomplete_file
from reshard.execution.journal import RESTART
from reshard.execution.side_writer import SideFile, read_side_file
from reshard.execution.store_journal import (
    DoneFile,
    StoreJournal,
    refuse_lost_upload,
    refuse_other_run,
    remove_job,
)
from reshard.execution.store_ledger import StoreLedger, compute_object_etag, is_new_object, is_same_object
from reshard.formats.target_names import JOURNAL, MANIFEST, STORE_RECORD
from reshard.planning.plan import Plan
from reshard.storage.counting import WorkCounter
from reshard.storage.remote_store import THREADS_OF_STORE
from reshard.storage.resources import Stopped, map_in_threads
from reshard.storage.target_store import NoSuchUploadError, TargetStore


def finish_target(
    plan: Plan, journal: StoreJournal, ledger: StoreLedger, others: OtherFiles, counter: WorkCounter
) -> None:
    """Makes the objects of all files, and writes those beside them; the manifest last. Raises Refused."""
    store, records = journal.store, ledger.read_records()
    if lacking := find_incomplete_file(plan, records):
        raise refuse(
            "damaged-journal", store.locate(JOURNAL), f"not all of {lacking}", "every byte of it once", RESTART
        )
    left = [index for index in range(len(plan.files)) if index not in ledger.done]
    map_in_threads(partial(complete_file, plan, store, ledger), left, THREADS_OF_STORE)
    etags = {plan.files[index].name: (plan.files[index].size, done.etag) for index, done in ledger.done.items()}
    etags, checksums = {**others.stored, **etags}, {}
    journal.begin_ending()
    for name, side in others.sides.items():
        etag, checksums[name] = put_side_file(store, name, side, journal.part_size)
        etags[name] = side.size, etag
        counter.advance(side.size)
        counter.settle(side.size)
    manifest = others.write_manifest(records, checksums)
    journal.require_current()
    store.put(STORE_RECORD, write_store_record(store.get(STORE_RECORD), others.kept, etags))
    for name in filter(None, (MANIFEST, others.part)):
        put_manifest(journal, name, manifest, is_there=name in others.kept)
    journal.require_current()
    remove_finished_objects(store, others.superseded)
    remove_job(store)
    counter.finish()


def remove_finished_objects(store: TargetStore, names: Sequence[str]) -> None:
    """Removes finished objects, and after all others those named `reshard.json`: whatever a crash leaves is named by a
    manifest that is left.
    """
    manifests = [name for name in names if name.rpartition("/")[2] == MANIFEST]
    store.remove([name for name in names if name not in manifests])
    store.remove(manifests)


def put_manifest(journal: StoreJournal, name: str, content: bytes, *, is_there: bool) -> None:
    """Writes a manifest, in the place of another only if that was there when the run began. Raises Refused if another
    run has ended in the meantime, such as while this machine was asleep.
    """
    journal.require_current()
    if is_there:
        journal.store.put(name, content)
    elif not journal.store.put_new(name, content) and journal.store.get(name) != content:
        raise refuse_other_run(journal.store)


def complete_file(plan: Plan, store: TargetStore, ledger: StoreLedger, index: int) -> None:
    """Makes an object of the parts of a file, and notes that it is whole. Raises Refused."""
    file, etags, upload = plan.files[index], ledger.list_etags(index), ledger.uploads[index]
    ledger.journal.require_current()  # else a run that was asleep would put its object over that of another one
    try:
        etag = store.complete_upload(file.name, upload, etags)
    except NoSuchUploadError:
        # We may have completed it without hearing of it.
        entry, etag = store.list_entries().get(file.name), compute_object_etag(etags)
        if not entry or not (is_same_object(entry, file, etag) or is_new_object(entry, file, etags, ledger)):
            raise refuse_lost_upload(store, file.name) from None
        etag = entry.version
    ledger.add_file(DoneFile(index, upload, etag))
    ledger.flush()


def put_side_file(store: TargetStore, name: str, side: SideFile, part_size: int) -> tuple[str, str]:
    """Writes a file beside the tensors, in parts if it is large. Returns its ETag and its xxh3-128. Raises Refused."""
    checksum = xxh3_128()

    def read() -> Iterator[memoryview]:
        for data in read_side_file(side):
            checksum.update(data)
            yield data

    if side.size <= part_size:
        return store.put(name, b"".join(read())), checksum.hexdigest()
    upload, etags = store.begin_upload(name), list[str]()
    try:
        for block in gather_blocks(read(), part_size):
            etags.append(store.put_part(name, upload, len(etags) + 1, block))
        return store.complete_upload(name, upload, etags), checksum.hexdigest()
    except BaseException as error:
        with suppress(Refused, Stopped):
            store.abort_upload(name, upload)
        if isinstance(error, NoSuchUploadError):
            raise refuse_lost_upload(store, name) from None
        raise


def gather_blocks(pieces: Iterator[memoryview], size: int) -> Iterator[memoryview]:
    """Gathers pieces of a file into blocks of `size` bytes, the last one perhaps smaller. Each is valid until the next
    one is gathered.
    """
    block, end = memoryview(bytearray(size)), 0
    for data in pieces:
        while data:
            count = min(len(data), size - end)
            block[end : end + count] = data[:count]
            data, end = data[count:], end + count  # noqa: PLW2901
            if end == size:
                yield block
                end = 0
    if end:
        yield block[:end]


def write_store_record(before: bytes | None, kept: Collection[str], etags: Mapping[str, tuple[int, str]]) -> bytes:
    """Writes what the store told of each object of the target. Of the record `before`, the finished files are kept."""
    known: dict[str, Any] = {}
    with suppress(ValueError, RecursionError, AttributeError, TypeError, KeyError):
        known = {name: entry for name, entry in json.loads(before or b"")["objects"].items() if name in kept}
    new = {name: {"size": size, "etag": etag} for name, (size, etag) in etags.items()}
    return (json.dumps({"objects": {**known, **new}}, indent=1) + "\n").encode()
