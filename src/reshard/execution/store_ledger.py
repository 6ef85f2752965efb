"""Keeps what of a job is durable in a store: found again when a job goes on, and noted while it runs."""

import re
from collections.abc import Mapping, Sequence
from hashlib import md5
from threading import Lock

from reshard.execution.records import Records, parse_records
from reshard.execution.store_journal import DoneFile, DonePart, DurableNote, StoreJournal, list_notes, read_notes
from reshard.paths import Entry
from reshard.planning.file_layout import TargetFile
from reshard.storage.remote_store import THREADS_OF_STORE
from reshard.storage.resources import map_in_threads
from reshard.storage.target_store import UploadedPart

MD5 = re.compile("[0-9a-f]{32}")


class StoreLedger:
    """The parts and objects of a job that are durable: first in memory, and after a flush in a note of the journal."""

    def __init__(self, journal: StoreJournal, files: Sequence[TargetFile]) -> None:
        self.journal = journal
        self._files = files
        self._lock = Lock()
        self._flushing = Lock()
        self._parts: dict[int, dict[int, DonePart]] = {index: {} for index in range(len(files))}
        self._left = [file.size for file in files]
        """Of each file, in bytes."""
        self._new: tuple[list[DonePart], list[DoneFile], list[tuple[int, str]]] = ([], [], [])
        self.done: dict[int, DoneFile] = {}
        """The objects that are whole, by the index of their file."""
        self.uploads: dict[int, str] = {}
        """The uploads that go on, by the index of their file."""
        self.entries: Mapping[str, Entry] = {}
        """The objects that there were when the run began."""
        self.added = 0
        """In bytes: put in this run."""
        self.inexact = 0
        self.is_noted = False
        """Whether a note says that anything is durable."""

    def resume(self) -> int:
        """Finds again what earlier runs have made durable. Returns its size in bytes."""
        self.entries = entries = self.journal.store.list_entries()
        notes = read_notes(self.journal.store, list_notes(entries), self.journal.job)
        found: dict[tuple[int, str], list[DonePart]] = {(file, name): [] for note in notes for file, name in note.begun}
        for part in (part for note in notes for part in note.parts):
            found[part.file, part.upload].append(part)
        told = {(one.file, one.upload): one for note in notes for one in note.files}
        keys = sorted(found)
        listed = map_in_threads(lambda key: self._look_at_upload(key, told.get(key), entries), keys, THREADS_OF_STORE)
        for key, there in zip(keys, listed, strict=True):
            self._take_upload(key, found[key], there, told.get(key), entries.get(self._files[key[0]].name))
        self._left = [file.size - add_part_sizes(self._parts[index]) for index, file in enumerate(self._files)]
        self.is_noted = any(self._parts.values())
        return sum(map(add_part_sizes, self._parts.values()))

    def _look_at_upload(
        self, key: tuple[int, str], told: DoneFile | None, entries: Mapping[str, Entry]
    ) -> Mapping[int, UploadedPart] | None:
        """The parts of an upload that the store has; None if there is none any more."""
        name, upload = self._files[key[0]].name, key[1]
        if not upload or (told and name in entries):
            return None
        return self.journal.store.list_parts(name, upload)

    def _take_upload(
        self,
        key: tuple[int, str],
        parts: Sequence[DonePart],
        there: Mapping[int, UploadedPart] | None,
        told: DoneFile | None,
        entry: Entry | None,
    ) -> None:
        """Takes over what is durable of an upload, unless there is more of the same file already."""
        index, upload = key
        if there is None:
            mine = {part.number: part for part in parts}
            etag = told.etag if told else compute_object_etag([part.etag for _, part in sorted(mine.items())])
            is_whole = add_part_sizes(mine) == self._files[index].size
            if entry and is_whole and is_same_object(entry, self._files[index], etag):
                self.done[index] = DoneFile(index, upload, etag)
                self._parts[index] = mine
            return
        durable = {
            part.number: part
            for part in parts
            if (found := there.get(part.number)) and found.size == part.size and is_same_etag(found.etag, part.etag)
        }
        if index not in self.done and (index not in self.uploads or len(durable) > len(self._parts[index])):
            self.uploads[index], self._parts[index] = upload, durable

    def has_part(self, file: int, number: int) -> bool:
        """Whether a part is durable, or about to be."""
        return number in self._parts[file]

    def is_whole(self, file: int) -> bool:
        """Whether all parts of a file are durable."""
        return not self._left[file]

    def list_etags(self, file: int) -> list[str]:
        """The ETags of all parts of a file, in their order."""
        return [part.etag for _, part in sorted(self._parts[file].items())]

    def add_upload(self, file: int, upload: str) -> None:
        """Adds an upload that was begun, and notes it at once: one that nobody knows of could not be thrown away."""
        self.uploads[file] = upload
        if upload:
            with self._lock:
                self._new[2].append((file, upload))
            self.flush()

    def add_part(self, part: DonePart, inexact: int) -> bool:
        """Adds a part that the store has acknowledged, and the number of values in it that a cast rounded. Returns
        whether it was the last that its file lacked.
        """
        with self._lock:
            self._parts[part.file][part.number] = part
            self._new[0].append(part)
            self._left[part.file] -= part.size
            self.added += part.size
            self.inexact += inexact
            return self.is_whole(part.file)

    def add_file(self, done: DoneFile) -> None:
        """Adds an object that is whole."""
        with self._lock:
            self.done[done.file] = done
            self._new[1].append(done)

    def flush(self) -> None:
        """Writes a note of what was added since the last one. Of a stream only what is whole is durable."""
        with self._flushing:
            with self._lock:
                parts, files, begun = self._new
                waiting = [part for part in parts if not (part.upload or part.file in self.done)]
                parts = [part for part in parts if part.upload or part.file in self.done]
                self._new = (waiting, [], [])
            try:
                if parts or files or begun:
                    self.journal.add_note(DurableNote(parts, files, begun))
                else:
                    self.journal.require_current()
            except BaseException:
                with self._lock:  # to be noted by the next flush: this one may be stopped, since the work is done
                    for mine, back in zip(self._new, (parts, files, begun), strict=True):
                        mine[:0] = back  # type: ignore[index]
                raise
            self.is_noted |= bool(parts or files)

    def read_records(self) -> Records:
        """Reads the records of all groups."""
        parts = (part for parts in self._parts.values() for part in parts.values())
        return parse_records(b"".join(part.records for part in parts))


def add_part_sizes(parts: Mapping[int, DonePart]) -> int:
    """The size of parts together, in bytes."""
    return sum(part.size for part in parts.values())


def is_same_etag(one: str, other: str) -> bool:
    """Whether two ETags are the same, with or without quotes."""
    return one.strip('"') == other.strip('"')


def is_same_object(entry: Entry, file: TargetFile, etag: str) -> bool:
    """Whether an object that was listed is one that was written, by its size and its ETag."""
    return bool(etag) and entry.size == file.size and is_same_etag(entry.version, etag)


def is_new_object(entry: Entry, file: TargetFile, etags: Sequence[str], ledger: StoreLedger) -> bool:
    """Whether an object came while this run went on, of as many bytes and parts as one whose ETag cannot be told: with
    keys of its own a store's ETags are no MD5s.
    """
    before = ledger.entries.get(file.name)
    is_alike = entry.size == file.size and entry.version.strip('"').endswith(f"-{len(etags)}")
    return is_alike and (not before or not is_same_etag(before.version, entry.version))


def compute_object_etag(etags: Sequence[str]) -> str:
    """The ETag that S3 gives to an object by those of its parts: the MD5 of their MD5s; empty if these are none."""
    plain = [etag.strip('"') for etag in etags]
    if not plain or not all(map(MD5.fullmatch, plain)):
        return ""
    digest = md5(bytes.fromhex("".join(plain)), usedforsecurity=False).hexdigest()
    return f"{digest}-{len(plain)}"
