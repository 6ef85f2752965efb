"""The journal of a job that writes to a store, which appends to nothing: one object that names the job, and small ones
that say what is durable.

`reshard.journal` is written once, only where there is none, by the run that begins the job; its parts have the size
that is told there. Each run writes notes of its own, `reshard.journal.d/RUN-00001` and so on, every few seconds: the
parts that the store has acknowledged, with their ETags and the records of their groups, and the objects that are whole.
A note is a line of JSON, the records, and a checksum of both. One that is damaged is as good as none: its parts are
made again. A note of another job, such as one that was thrown away while a run of it still went on, is not read.

Before the first file beside the tensors is written, `reshard.journal.d/JOB-ending` says that these are the job's by
now: until then one of such a name is somebody else's.
"""

import json
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from xxhash import xxh3_128_digest

from reshard.errors import Problem, Refused, refuse, require_none
from reshard.execution.holders import describe_holder
from reshard.execution.journal import HOLDER, RECORD, RESTART, find_job_differences
from reshard.execution.store_levels import LEVEL, check_level
from reshard.formats.target_names import JOURNAL, PROGRESS, STORE_RECORD
from reshard.storage.remote_store import THREADS_OF_STORE
from reshard.storage.resources import map_in_threads
from reshard.storage.target_store import TargetStore

ID, STORED_PART_SIZE = "id", "part_size"
"""Keys of the job object beside those of the job itself."""

DIGEST_SIZE = 16
"""In bytes, of a note: xxh3-128."""


class DonePart(NamedTuple):
    """A part that a store has acknowledged."""

    file: int
    """Index of the target file."""
    upload: str
    """The name of the upload that it belongs to."""
    number: int
    etag: str
    size: int
    """In bytes."""
    records: bytes
    """Of its groups."""


class DoneFile(NamedTuple):
    """An object that is whole."""

    file: int
    upload: str
    etag: str


@dataclass(frozen=True, slots=True)
class DurableNote:
    """What a run found durable since its note before."""

    parts: Sequence[DonePart]
    files: Sequence[DoneFile]
    begun: Sequence[tuple[int, str]] = ()
    """Files, by index, and their uploads, which may have no parts yet."""


@dataclass(slots=True)
class StoreJournal:
    """The journal of a job, open for one run of it."""

    store: TargetStore
    job: str
    """The random name of the job: one that is begun anew has another."""
    part_size: int
    """In bytes."""
    is_new: bool
    """Whether this run began the job."""
    run: str = field(default_factory=lambda: secrets.token_hex(6))
    written: int = 0
    """Number of notes."""

    def add_note(self, note: DurableNote) -> None:
        """Writes a note. Raises Refused if the job is not there any more."""
        self.require_current()
        self.written += 1
        self.store.put(self._name_note(self.written), pack_note(self.job, note))

    def require_current(self) -> None:
        """Raises Refused if another run has ended the job, or has thrown it away."""
        if not self.is_current():
            raise refuse_other_run(self.store)

    def is_current(self) -> bool:
        """Whether the job is still there."""
        return parse_job(self.store.get(JOURNAL)).get(ID) == self.job

    def has_other_runs(self) -> bool:
        """Whether another run of the job has written a note."""
        names = list_notes(self.store.list_entries())
        return any(not name.startswith(f"{PROGRESS}/{self.run}-") for name in names)

    def begin_ending(self) -> None:
        """Says that the files beside the tensors are the job's by now. Raises Refused if it is not there any more."""
        self.require_current()
        self.store.put(name_ending(self.job), b"")

    def remove_own_notes(self) -> None:
        """Removes the notes of this run, whose job is over."""
        notes = [self._name_note(number) for number in range(1, self.written + 1)]
        self.store.remove([*notes, name_ending(self.job)])

    def _name_note(self, number: int) -> str:
        return f"{PROGRESS}/{self.run}-{number:05}"


def refuse_other_run(store: TargetStore) -> Refused:
    """The refusal of a run whose job another run has ended or thrown away."""
    found, expected = "another run has ended this conversion, or has thrown it away", "no other run at the same time"
    remedy = "run the same command again: it goes on with what is there, or says that it is finished"
    return refuse("another-run", store.address, found, expected, remedy)


def refuse_lost_upload(store: TargetStore, name: str) -> Refused:
    """The refusal of a run that an upload has been taken away from."""
    found = "its upload is not there any more: another run has ended it, or a rule of the bucket has thrown it away"
    remedy = "run the same command again: it goes on with what is there, or says that it is finished"
    return refuse("another-run", store.locate(name), found, "an upload that goes on", remedy)


def open_store_journal(
    store: TargetStore, job: Mapping[str, Any], part_size: int, kept: Collection[str] = (), *, restart: bool = False
) -> StoreJournal:
    """Opens the journal of a target in a store; a new one if there is none, or to `restart`, or if its job has left
    nothing but finished files. These are `kept`, also by a restart: a manifest names them.

    Raises Refused if it belongs to another job, or is damaged.
    """
    content = store.get(JOURNAL)
    if content is not None and (restart or is_job_over(content, kept)):
        require_none(check_noted_uploads(content, store))
        discard_job(store, kept)
        content = None
    name = secrets.token_hex(8)
    if content is None:
        new = {HOLDER: describe_holder().rstrip(), ID: name, STORED_PART_SIZE: part_size, **job}
        if store.put_new(JOURNAL, (json.dumps(new) + "\n").encode()):
            return StoreJournal(store, name, part_size, is_new=True)
        content = store.get(JOURNAL)
    if content is None:
        raise refuse_other_run(store)
    require_none(check_job(content, job, store, kept))
    found = parse_job(content)
    # A store may have written ours without our hearing of it, and then say that there is one.
    return StoreJournal(store, found[ID], found[STORED_PART_SIZE], is_new=found[ID] == name)


def parse_job(content: bytes | None) -> dict[str, Any]:
    """Parses the object of a job; empty if there is none, or if it is damaged."""
    with suppress(ValueError, RecursionError):
        job = json.loads(content or b"")
        if isinstance(job, dict) and isinstance(job.get(ID), str) and type(job.get(STORED_PART_SIZE)) is int:
            return job
    return {}


def list_job_names(job: Mapping[str, Any], key: str) -> set[str]:
    """The names of files that the object of a job has under a key."""
    names = job.get(key)
    return set(map(str, names)) if isinstance(names, list) else set()


def name_ending(job: str) -> str:
    """The name of the object that says that the files beside the tensors are a job's by now."""
    return f"{PROGRESS}/{job}-ending"


def list_names_beside(job: Mapping[str, Any], entries: Collection[str]) -> set[str]:
    """The names beside the tensors that a job has begun to write, the manifest too; `entries` are those of all
    objects in the folder.
    """
    return {*list_job_names(job, "others"), STORE_RECORD} if job and name_ending(job[ID]) in entries else set()


def is_job_over(content: bytes, kept: Collection[str]) -> bool:
    """Whether a job has left nothing but finished files."""
    files = list_job_names(parse_job(content), "files")
    return bool(files) and files <= {*kept}


def check_job(
    content: bytes, wanted: Mapping[str, Any], store: TargetStore, kept: Collection[str]
) -> Iterator[Problem]:
    """Reports how the job of a journal differs from the job that is asked for, as one problem."""
    job = parse_job(content)
    if not job or job[STORED_PART_SIZE] < 1:
        subject, expected = store.locate(JOURNAL), "the job that it is of"
        yield Problem("damaged-journal", subject, "no object of a job", expected, RESTART)
        return
    found = {key: value for key, value in job.items() if key not in (ID, STORED_PART_SIZE)} | {LEVEL: wanted[LEVEL]}
    different = [*find_job_differences(found, wanted, store.address, sorted(kept))]
    yield from different or check_level(job, store)


def check_noted_uploads(content: bytes, store: TargetStore) -> Iterator[Problem]:
    """Reports a job whose uploads cannot be thrown away at the level of this run."""
    if not store.keeps_parts and (job := parse_job(content)):
        yield from check_level(job, store)


def discard_job(store: TargetStore, kept: Collection[str]) -> None:
    """Throws a job away: its uploads, its objects that are whole but for those `kept`, its notes, and itself last."""
    job, entries = parse_job(store.get(JOURNAL)), store.list_entries()
    spared = {*kept, STORE_RECORD} if kept else set()
    # In this order: whatever a crash leaves is known by what is removed later.
    for names in (list_names_beside(job, entries), list_job_names(job, "files")):
        store.remove(sorted((names & {*entries}) - spared))
    remove_job(store)


def remove_job(store: TargetStore) -> None:
    """Removes a job that has ended, or is to be thrown away: its uploads that are still there, the notes of all its
    runs, and itself last.
    """
    names, written = list(map(str, parse_job(store.get(JOURNAL)).get("files", ()))), list_notes(store.list_entries())
    notes = read_notes(store, written)
    begun = {(file, upload) for note in notes for file, upload in note.begun if file < len(names) and upload}
    begun -= {(done.file, done.upload) for note in notes for done in note.files}
    abort_uploads(store, [(names[file], upload) for file, upload in sorted(begun)])
    store.remove(written)
    store.remove([JOURNAL])


def abort_uploads(store: TargetStore, uploads: Sequence[tuple[str, str]]) -> None:
    """Throws uploads away, by their objects and their names."""
    map_in_threads(lambda one: store.abort_upload(*one), uploads, THREADS_OF_STORE)


def list_notes(names: Iterable[str]) -> list[str]:
    """The notes among the names of objects, of whatever job."""
    return sorted(name for name in names if name.startswith(f"{PROGRESS}/"))


def read_notes(store: TargetStore, names: Sequence[str], job: str | None = None) -> list[DurableNote]:
    """Reads notes, or those of a job; those that are damaged are left out."""
    contents = map_in_threads(store.get, names, THREADS_OF_STORE)
    return [note for note in (parse_note(content, job) for content in contents) if note]


def pack_note(job: str, note: DurableNote) -> bytes:
    """The bytes of a note. Uploads are told by their place in a list: their names are long."""
    uploads: dict[tuple[int, str], int] = {}
    named = [(part.file, part.upload) for part in note.parts] + [(done.file, done.upload) for done in note.files]
    for one in (*note.begun, *named):
        uploads.setdefault(one, len(uploads))
    parts = [
        [uploads[part.file, part.upload], part.number, part.etag, part.size, len(part.records) // RECORD.size]
        for part in note.parts
    ]
    files = [[uploads[done.file, done.upload], done.etag] for done in note.files]
    head = {"job": job, "uploads": [*uploads], "parts": parts, "files": files}
    content = json.dumps(head).encode() + b"\n" + b"".join(part.records for part in note.parts)
    return content + xxh3_128_digest(content)


def parse_note(content: bytes | None, job: str | None) -> DurableNote | None:
    """Parses a note; None if it is damaged, or of another job."""
    body = (content or b"")[:-DIGEST_SIZE]
    if not content or xxh3_128_digest(body) != content[-DIGEST_SIZE:]:
        return None
    line, _, records = body.partition(b"\n")
    head = json.loads(line)
    if job is not None and head["job"] != job:
        return None
    uploads, parts, begin = head["uploads"], [], 0
    for place, number, etag, size, count in head["parts"]:
        end = begin + count * RECORD.size
        file, upload = uploads[place]
        parts.append(DonePart(file, upload, number, etag, size, records[begin:end]))
        begin = end
    files = [DoneFile(uploads[place][0], uploads[place][1], etag) for place, etag in head["files"]]
    return DurableNote(parts, files, [(file, upload) for file, upload in uploads])
