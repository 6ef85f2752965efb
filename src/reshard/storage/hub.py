"""Repositories of the hub (`hf://`): one commit, whose files are read from where the hub says that they lie.

Every request to the hub counts against its quota; those to the store behind it do not. So the hub is asked once for
each file: it sends the bytes, or a signed address of them, which is used until it ends.
"""

import re
from contextlib import suppress
from threading import Lock
from time import time
from typing import Annotated, NamedTuple, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

import msgspec

from reshard.errors import refuse
from reshard.paths import Entry, RemotePath
from reshard.storage.hub_access import HubAccess, find_hub_access
from reshard.storage.range_requests import (
    MOST_REDIRECTS,
    Denied,
    explain_status,
    find_redirect,
    join_addresses,
    receive_range,
    request_range,
)
from reshard.storage.remote_store import Failed, ListedStore, refuse_changed_entry, tell_once, try_again
from reshard.storage.resources import wait_unless_stopped
from reshard.storage.web_client import Answer, WebClient

NAME = re.compile(
    r"(?:models/)?(?!datasets/|spaces/)(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@?]+))?(?:/(?P<inner>.*))?",
    re.DOTALL,
)
"""What stands behind `hf://`, as the hub's own programs have it."""

NEXT_PAGE = re.compile(r'<([^>]+)>\s*;\s*rel="?next"?')

MOST_PAGES = 1000

LONGEST_USE = 600.0
"""In seconds: so long an address is used that does not tell when it ends."""

SAFE_PART, SHORTEST_USE = 0.9, 30.0
"""So much of the time that a signed address is good for is used; at least so many seconds, for our clock may be wrong:
an address that has ended is refused, and then the hub is asked again.
"""


class LargeFile(msgspec.Struct):
    """What the hub lists of a file that does not lie in git itself."""

    oid: str
    """The SHA-256 of its content."""


class ListedFile(msgspec.Struct):
    """What the hub lists of a file, or of a folder."""

    type: str
    path: str
    size: Annotated[int, msgspec.Meta(ge=0)] = 0
    oid: str = ""
    lfs: LargeFile | None = None


class Revision(msgspec.Struct):
    """What the hub tells of a revision."""

    sha: str


class Place(NamedTuple):
    """Where the bytes of a file lie."""

    url: str
    until: float
    """In seconds since 1970: when it may have ended."""


class HubStore(ListedStore):
    """A commit of a repository on the hub."""

    def __init__(self, client: WebClient, access: HubAccess, name: str, commit: str, listed: list[ListedFile]) -> None:
        super().__init__(f"hf://{name}@{commit}", (make_hub_entry(item) for item in listed))
        self._client, self._access = client, access
        self._base = f"{access.endpoint}/{name}/resolve/{quote(commit)}/"
        self._places: dict[str, Place] = {}
        self._etags: dict[str, str] = {}
        self._turns = {name: Lock() for name in self.entries}

    def fetch(self, entry: Entry, offset: int, buffer: memoryview) -> int:
        """Asks for a range: where the file lies, if that is known, else the hub. See `ListedStore`."""
        with suppress(Denied):
            return self._read_or_ask(entry, offset, buffer)
        try:
            return self._read_or_ask(entry, offset, buffer)
        except Denied as denied:
            raise self._access.refuse_denied(f"{self.address}/{entry.name}", str(denied)) from None

    def _read_or_ask(self, entry: Entry, offset: int, buffer: memoryview) -> int:
        with self._turns[entry.name]:  # one asks the hub for all
            wait_unless_stopped()
            place = self._places.get(entry.name)
            if place is None or time() >= place.until:
                return self._ask_hub(entry, offset, buffer)
        try:
            headers = self._access.make_headers(place.url)
            with request_range(self._client, place.url, offset, len(buffer), headers) as answer:
                return self._receive(entry, place.url, answer, offset, buffer)
        except Denied as denied:
            with self._turns[entry.name]:
                if self._places.get(entry.name) == place:  # else another one has asked already
                    tell_once(self.address, f"{denied}; asks the hub for new addresses")
                    del self._places[entry.name]
            raise

    def _ask_hub(self, entry: Entry, offset: int, buffer: memoryview) -> int:
        """Asks the hub for a range, and follows to where it lies, which is kept."""
        place = Place(self._base + quote(entry.name), float("inf"))
        for _ in range(MOST_REDIRECTS):
            headers = self._access.make_headers(place.url)
            with request_range(self._client, place.url, offset, len(buffer), headers) as answer:
                self._require_same(entry, answer)
                to = find_redirect(answer, place.url)
                if to is None:
                    received = self._receive(entry, place.url, answer, offset, buffer)
                    self._places[entry.name] = place
                    return received
            place = Place(to, find_end(to))
        raise Failed("it leads from address to address", is_misanswered=True)

    def _require_same(self, entry: Entry, answer: Answer) -> None:
        """Raises Refused if the hub has another file now than it has listed."""
        etag, size = answer.headers.get("x-linked-etag"), answer.headers.get("x-linked-size")
        listed = entry.version.removeprefix("sha256:")
        is_other = etag is not None and entry.version != listed and etag.strip('W/"') != listed
        if is_other or (size is not None and size != str(entry.size)):
            raise refuse_changed_entry(self, entry, "another version by now")

    def _receive(self, entry: Entry, url: str, answer: Answer, offset: int, buffer: memoryview) -> int:
        """Takes a range from an answer. Raises Refused if the file is another one than before."""
        try:
            found = receive_range(answer, offset, buffer)
        except FileNotFoundError as gone:
            raise refuse_changed_entry(self, entry, str(gone)) from None
        if found.size not in (-1, entry.size):
            raise refuse_changed_entry(self, entry, f"{found.size:,} bytes")
        if found.etag != self._etags.setdefault(url, found.etag):
            raise refuse_changed_entry(self, entry, "another version by now")
        return found.received


def make_hub_entry(item: ListedFile) -> Entry:
    """Makes an entry of a file that the hub lists: its version is the SHA-256 of a large one, else that of git."""
    return Entry(item.path, item.size, f"sha256:{item.lfs.oid}" if item.lfs else f"git:{item.oid}")


def find_end(url: str) -> float:
    """When a signed address may have ended, in seconds since 1970: as it tells, by some ways to tell it."""
    now, said = time(), {name.lower(): value for name, value in parse_qsl(urlsplit(url).query)}
    left = LONGEST_USE
    try:
        if "expires" in said:
            left = float(said["expires"]) - now
        elif "x-amz-expires" in said:
            left = float(said["x-amz-expires"])
    except ValueError:
        left = LONGEST_USE
    return now + max(SHORTEST_USE, SAFE_PART * left)


def open_hub(_scheme: str, rest: str) -> RemotePath:
    """Opens a path on the hub, `ORG/NAME[@REVISION][/PATH]`, and lists its repository. Raises Refused."""
    found = NAME.fullmatch(rest.rstrip("/"))
    if not found:
        expected = "hf://ORG/NAME, hf://ORG/NAME@REVISION"
        raise refuse("no-source", f"hf://{rest}", "no name of a model", expected, "is the address right?")
    name, revision = found["repository"], found["revision"] or "main"
    access, client = find_hub_access(), WebClient()
    subject = f"hf://{name}" + (f"@{revision}" if found["revision"] else "")
    url = f"{access.endpoint}/api/models/{name}/revision/{quote(revision, safe='')}"
    commit = ask_hub(client, access, url, subject, Revision)[0].sha
    if not re.fullmatch(r"[\w.-]{1,100}", commit):
        raise refuse("wrong-answer", subject, f"the commit {commit!r}", "a hash", "is HF_ENDPOINT a hub?")
    listed = list_hub_files(client, access, name, commit)
    return RemotePath(HubStore(client, access, name, commit, listed), found["inner"] or "")


def list_hub_files(client: WebClient, access: HubAccess, name: str, commit: str) -> list[ListedFile]:
    """Lists the files of a commit. Raises Refused."""
    listed: list[ListedFile] = []
    url: str | None = f"{access.endpoint}/api/models/{name}/tree/{quote(commit)}?recursive=true"
    for _ in range(MOST_PAGES):
        if not url:
            break
        page, headers = ask_hub(client, access, url, f"hf://{name}@{commit}", list[ListedFile])
        listed += page
        following = NEXT_PAGE.search(headers.get("link", ""))
        url = join_addresses(url, following[1]) if following else None
    else:
        raise refuse("wrong-answer", f"hf://{name}@{commit}", "a list of files without an end", "fewer pages")
    return [item for item in listed if item.type == "file"]


Told = TypeVar("Told")


def ask_hub(
    client: WebClient, access: HubAccess, url: str, subject: str, kind: type[Told]
) -> tuple[Told, dict[str, str]]:
    """Asks the hub a question. Returns the answer, and its headers. Raises Refused."""
    return try_again(subject, lambda: ask_hub_once(client, access, url, subject, kind))


def ask_hub_once(
    client: WebClient, access: HubAccess, url: str, subject: str, kind: type[Told]
) -> tuple[Told, dict[str, str]]:
    """Asks the hub once, and where it leads to on the hub itself: a repository may have another name by now. Raises
    Refused, and Failed.
    """
    for _ in range(MOST_REDIRECTS):
        with client.request("GET", url, access.make_headers(url)) as answer:
            if to := find_redirect(answer, url):
                url = to
                continue
            if answer.status != 200:
                raise explain_refusal(explain_status(answer), answer, access, subject)
            content = answer.read()
            try:
                return msgspec.json.decode(content, type=kind), dict(answer.headers)
            except (ValueError, RecursionError):
                remedy = "is HF_ENDPOINT the address of a hub?"
                raise refuse("wrong-answer", subject, "an answer that is not the hub's", "JSON", remedy) from None
    raise Failed("it leads from address to address", is_misanswered=True)


def explain_refusal(error: Exception, answer: Answer, access: HubAccess, subject: str) -> Exception:
    """Explains why the hub does not answer a question: an error to wait for stays as it is."""
    if isinstance(error, Failed):
        return error
    said = answer.headers.get("x-error-code", "")
    if said in ("RevisionNotFound", "InvalidRevision"):
        return refuse("no-source", subject, "no such revision", "a branch, a tag or a commit", "is its name right?")
    return access.refuse_denied(subject, said or str(error))
