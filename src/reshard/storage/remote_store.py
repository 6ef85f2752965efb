"""Stores: files of pinned versions, read by exact ranges, and asked for again where a server fails."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from logging import getLogger
from threading import Lock
from time import monotonic
from typing import TypeVar

from reshard.errors import Refused, refuse
from reshard.paths import AnyPath, Entry, RemotePath
from reshard.storage.resources import map_in_threads, wait_unless_stopped
from reshard.text import format_count

HEAD_SIZE = 128 << 10
"""In bytes. So much of a file is asked for at first: the header of a large checkpoint's file is seldom longer."""

MOST_KEPT = 64 << 20
"""In bytes: so much of the beginnings of files is kept, so that nothing is asked for twice."""

THREADS_OF_STORE = 16
"""So many requests are under way at a time: the answer to each takes a while to begin."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
"""In seconds, between two tries, where the server does not tell how long to wait. Each wait is twice the one before."""

PATIENCE = 120.0
"""In seconds: so long a server may fail without a byte, where it does not tell how long to wait."""

OPENING_PATIENCE = 10.0
"""In seconds: the same before anything has come. Who has mistyped an address, or is not online, is told soon."""

MOST_TOLD = 3600.0
"""In seconds: so long the waits that a server tells may be together, without a byte."""

MOST_MISANSWERED = 3
"""So often a server may answer another thing than it was asked for."""

TOLD_TRY = 4
"""A wait that no server has told of is told at this try: many a fault passes at once."""

SAME_WAIT = 1.0
"""In seconds: waits that end so closely together are told once."""

TOLD_WAITS: dict[str, float] = {}
"""When the waits end that were told, by their reason."""

TELLING = Lock()

RENEWAL = 60.0
"""In seconds: what happens to many files in so short a time is told once."""

ONLINE = "is the address right, and this machine online? HTTPS_PROXY names a proxy, HF_ENDPOINT another hub"

EXPECTED_OF_READ = (
    "the bytes that were asked for",
    "a server or a proxy in between does not keep to HTTP: download the files, and give their folder",
)

EXPECTED_OF_WRITE = (
    "an answer of a store that has written it",
    "the store or a proxy in between does not do what S3, Azure or Google do: convert into a folder, and upload that",
)

LISTENERS: list[Callable[[str], None]] = []
"""Told of waits in one line each."""


class Failed(Exception):
    """A request failed in a way that may pass: the connection, a busy server, a quota."""

    def __init__(self, reason: str, wait: float | None = None, *, is_misanswered: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait
        """In seconds, as the server told; None if it did not."""
        self.is_misanswered = is_misanswered
        """Whether the server answered another thing than it was asked for, which seldom passes."""


class Patience:
    """Waits between the tries of one request, and gives up."""

    def __init__(self, subject: str, *, is_opening: bool = False, is_write: bool = False, remedy: str = "") -> None:
        """`remedy`: the hint while it is opened, if none that is for the hub and web servers."""
        self._subject = subject
        self._remedy = remedy
        self._is_write = is_write
        self._is_opening = is_opening
        self._since = monotonic()
        self._told = 0.0
        """In seconds: what the server has told to wait, of the time since then."""
        self._tries = 0
        self._misanswered = 0

    def renew(self) -> None:
        """Begins to count anew, for something has come."""
        self._since, self._told, self._tries = monotonic(), 0.0, 0

    def wait(self, failed: Failed) -> None:
        """Waits before the next try. Raises Refused if there is to be none, and Stopped."""
        self._misanswered += failed.is_misanswered
        if self._misanswered >= MOST_MISANSWERED:
            expected, remedy = EXPECTED_OF_WRITE if self._is_write else EXPECTED_OF_READ
            raise refuse("wrong-answer", self._subject, failed.reason, expected, self._remedy or remedy)
        self._tries += 1
        seconds = min(FIRST_WAIT * 2 ** (self._tries - 1), LONGEST_WAIT)
        limit = OPENING_PATIENCE if self._is_opening else PATIENCE
        seconds *= 0.5 + random.random() / 2  # noqa: S311 - so that not all threads come again at once
        since = self._since + self._told  # who does as told has not waited in vain
        if failed.wait is not None:
            seconds, limit, since = max(seconds, failed.wait), MOST_TOLD, self._since  # some tell 0, again and again
            self._told += seconds
        if monotonic() + seconds > since + limit:
            told = f", and the server says to wait {failed.wait:,.0f} s more" if failed.wait else ""
            found = f"{failed.reason}, {format_count(self._tries, 'times')} in {monotonic() - self._since:.0f} s{told}"
            remedy = "run the same command again later: what is done stays done"
            remedy = self._remedy or ONLINE if self._is_opening and failed.wait is None else remedy
            kind = "cannot-write" if self._is_write else "cannot-read"
            raise refuse(kind, self._subject, found, "an answer", remedy)
        if failed.wait is not None or self._tries == TOLD_TRY:
            tell_wait(self._subject, failed.reason, seconds)
        wait_unless_stopped(seconds)


Asked = TypeVar("Asked")


def try_again(subject: str, ask: Callable[[], Asked], remedy: str = "") -> Asked:
    """Asks what must be known before anything is read, until an answer comes. Raises Refused if none does, and
    Stopped.
    """
    patience = Patience(subject, is_opening=True, remedy=remedy)
    while True:
        try:
            return ask()
        except Failed as failed:
            patience.wait(failed)


def tell_wait(subject: str, reason: str, seconds: float) -> None:
    """Tells of a wait, unless others wait for the same reason as long: one line for all threads is enough."""
    end = monotonic() + seconds
    with TELLING:
        if end <= TOLD_WAITS.get(reason, 0.0) + SAME_WAIT:
            return
        TOLD_WAITS[reason] = end
    tell(f"{subject}: {reason}; waits {seconds:.0f} s")


def tell_once(subject: str, what: str) -> None:
    """Tells what a store makes us do, unless that was told just now."""
    with TELLING:
        if monotonic() < TOLD_WAITS.get(what, 0.0):
            return
        TOLD_WAITS[what] = monotonic() + RENEWAL
    tell(f"{subject}: {what}")


def tell(line: str) -> None:
    """Tells a person what a store makes us do."""
    for listener in tuple(LISTENERS):
        listener(line)


def tell_always(line: str) -> None:
    """Tells a person, or where nobody listens, as in Python or with `--json`, the log: no lock is broken silently."""
    if LISTENERS:
        tell(line)
    else:
        getLogger("reshard").warning(line)


class ListedStore:
    """A store whose files are listed already. Each kind of store fetches ranges in its own way."""

    def __init__(self, address: str, entries: Iterable[Entry]) -> None:
        self.address = address
        # What a stranger lists must not lead out of a folder that it is copied into.
        self.entries: Mapping[str, Entry] = {entry.name: entry for entry in entries if has_plain_parts(entry.name)}
        self.folders = frozenset({"", *find_folders_of(self.entries)})
        self._heads: dict[str, bytes] = {}
        self._lock = Lock()

    def fetch(self, entry: Entry, offset: int, buffer: memoryview) -> int:
        """Asks once for the bytes of a file from a byte offset on, as many as the buffer holds. Returns how many have
        come. Raises Failed if it may be tried again, else Refused.
        """
        raise NotImplementedError

    def read_into(self, entry: Entry, offset: int, buffer: memoryview) -> None:
        """Fills a buffer with the bytes of a file from a byte offset on. Raises Refused if they cannot be had, or are
        of another version.
        """
        if offset + len(buffer) > entry.size:
            raise refuse_changed_entry(self, entry, f"{entry.size:,} bytes")
        done, patience = 0, Patience(f"{self.address}/{entry.name}")
        while done < len(buffer):
            wait_unless_stopped()
            try:
                count = self.fetch(entry, offset + done, buffer[done:])
            except Failed as failed:
                patience.wait(failed)
                continue
            done += count
            if count:
                patience.renew()
            else:
                patience.wait(Failed("its answer ends at once"))

    def get_head(self, entry: Entry) -> bytes:
        """As many first bytes as are kept; none if none were read."""
        return self._heads.get(entry.name, b"")

    def read_head(self, entry: Entry, size: int) -> bytes:
        """The first bytes of a file, `size` or more, or all of it; kept, so that they are read once. Raises Refused."""
        wanted = min(size, entry.size)
        known = self.get_head(entry)
        if len(known) >= wanted:
            return known
        content = bytearray(wanted)
        content[: len(known)] = known
        self.read_into(entry, len(known), memoryview(content)[len(known) :])
        head = bytes(content)
        with self._lock:
            if sum(map(len, self._heads.values())) + wanted - len(known) <= MOST_KEPT:
                self._heads[entry.name] = head
        return head


def refuse_changed_entry(store: ListedStore, entry: Entry, found: str) -> Refused:
    """The refusal of a file that is not the one that was listed."""
    remedy = "begin again with the files as they are now (of a conversion that was begun: --restart)"
    return refuse("source-changed", f"{store.address}/{entry.name}", found, "the file that was listed", remedy)


def has_plain_parts(name: str) -> bool:
    """Whether each part of a name with slashes is the name of a file or folder, and no way out of it."""
    return not any(part in {"", ".", ".."} or "\\" in part or "\0" in part for part in name.split("/"))


def find_folders_of(names: Iterable[str]) -> Iterator[str]:
    """Finds all folders that names of files with slashes tell of."""
    for name in names:
        while "/" in name:
            name = name.rpartition("/")[0]  # noqa: PLW2901
            yield name


def fetch_heads(folder: AnyPath, names: Iterable[str], sizes: Mapping[str, int] | None = None) -> None:
    """Reads the beginnings of files in a store, many at a time, before they are needed one by one; does nothing for a
    folder of this machine. `sizes` are guesses in bytes, by name; HEAD_SIZE without one. Raises Refused.
    """
    if not isinstance(folder, RemotePath):
        return
    store, guesses = folder.store, sizes or {}
    paths = [path for path in (folder / name for name in names) if path.is_file() and not store.get_head(path.entry)]
    if paths:
        map_in_threads(
            lambda path: store.read_head(path.entry, guesses.get(path.name, HEAD_SIZE)), paths, THREADS_OF_STORE
        )
