"""Checkpoints on a web server (`https://`): a safetensors file, or a folder with an index, which tells its files.

A web server does not list a folder. So the files that the index names are looked for, and those that usually lie beside
them, by their beginnings: these tell size and version too, and are kept, so that headers are read once.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import SplitResult, quote, unquote

import msgspec

from reshard.errors import refuse
from reshard.paths import Entry, RemotePath
from reshard.storage.range_requests import (
    MOST_REDIRECTS,
    Denied,
    find_redirect,
    is_same_server,
    make_basic_header,
    receive_range,
    request_range,
)
from reshard.storage.remote_store import (
    HEAD_SIZE,
    THREADS_OF_STORE,
    Failed,
    ListedStore,
    refuse_changed_entry,
    try_again,
)
from reshard.storage.resources import map_in_threads
from reshard.storage.web_addresses import split_address
from reshard.storage.web_client import Answer, WebClient

INDEX, SINGLE, SUFFIX = "model.safetensors.index.json", "model.safetensors", ".safetensors"

BESIDE = (
    *("config.json", "generation_config.json", "reshard.json", "tokenizer.json", "tokenizer_config.json"),
    *("tokenizer.model", "tiktoken.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
)
"""The files that are looked for beside the weights."""


class FoundFile(NamedTuple):
    """A file on a web server, by the beginning that it sent."""

    entry: Entry
    head: bytes


class WebIndex(msgspec.Struct):
    """What an index tells of files."""

    weight_map: dict[str, str]


class WebFolder:
    """A folder on a web server, before its files are known. Its address may have a query, which all files get."""

    def __init__(self, place: SplitResult) -> None:
        folder = place.path.rstrip("/")
        self.client = WebClient()
        self.address = f"{place.scheme}://{place.netloc.rpartition('@')[2]}{unquote(folder)}"
        self._base = f"{place.scheme}://{place.netloc.rpartition('@')[2]}{folder}/"
        self._query = f"?{place.query}" if place.query else ""
        self._headers = make_basic_header(place)
        self.denied = ""
        """The last answer that denied us a file."""

    @contextmanager
    def request(self, name: str, offset: int, size: int, version: str = "") -> Iterator[Answer]:
        """A context with the answer for a range of a file; of this version, if it can be asked for. Redirects are
        followed. Raises Failed.
        """
        url, own = f"{self._base}{quote(name)}{self._query}", dict(self._headers)
        for _ in range(MOST_REDIRECTS):
            headers = {**own, **({"if-match": version} if version.startswith('"') else {})}
            with request_range(self.client, url, offset, size, headers) as answer:
                to = find_redirect(answer, url)
                if to is None:
                    yield answer
                    return
            url, own = to, own if is_same_server(url, to) else {}  # what is secret goes to nobody else
        raise Failed("it leads from address to address", is_misanswered=True)

    def find_file(self, name: str) -> FoundFile | None:
        """Finds a file by its beginning; None if there is none. Raises Refused."""
        return try_again(f"{self.address}/{name}", lambda: self._find_once(name))

    def _find_once(self, name: str) -> FoundFile | None:
        buffer = bytearray(HEAD_SIZE)
        with self.request(name, 0, HEAD_SIZE) as answer:
            if answer.status == 416:  # nothing is in it
                return FoundFile(Entry(name, 0, find_version(answer)), b"")
            try:
                found = receive_range(answer, 0, memoryview(buffer))
            except FileNotFoundError:
                return None
            except Denied as denied:  # so do some servers answer for what is not there
                self.denied = str(denied)
                return None
            if found.size < 0:
                raise Failed("it does not tell the size of the file", is_misanswered=True)
            return FoundFile(Entry(name, found.size, find_version(answer)), bytes(buffer[: found.received]))

    def find_files(self, names: Iterable[str]) -> list[FoundFile]:
        """Finds those of some files that are there, many at a time. Raises Refused."""
        wanted = list(dict.fromkeys(names))
        return [found for found in map_in_threads(self.find_file, wanted, THREADS_OF_STORE) if found]


class WebStore(ListedStore):
    """The files of a folder on a web server."""

    def __init__(self, folder: WebFolder, found: Sequence[FoundFile]) -> None:
        super().__init__(folder.address, (one.entry for one in found))
        self._folder = folder
        self._heads = {one.entry.name: one.head for one in found}

    def fetch(self, entry: Entry, offset: int, buffer: memoryview) -> int:
        """Asks for a range. See `ListedStore`."""
        with self._folder.request(entry.name, offset, len(buffer), entry.version) as answer:
            try:
                found = receive_range(answer, offset, buffer)
            except FileNotFoundError as gone:
                raise refuse_changed_entry(self, entry, str(gone)) from None
            except Denied as denied:
                remedy = "does the address hold a key that has ended? with a new one the same command goes on"
                subject = f"{self.address}/{entry.name}"
                raise refuse("no-access", subject, str(denied), "a file that we may read", remedy) from None
            if found.size not in (-1, entry.size) or find_version(answer) != entry.version:
                raise refuse_changed_entry(self, entry, "another version by now")
            return found.received


def find_version(answer: Answer) -> str:
    """The version of a file, as a server tells it: an ETag, else when it was changed; empty if neither."""
    return answer.headers.get("etag") or answer.headers.get("last-modified", "")


def open_web(scheme: str, rest: str) -> RemotePath:
    """Opens a checkpoint on a web server: the address of a safetensors file, or of a folder. Raises Refused."""
    try:
        place, index = split_address(f"{scheme}://{rest}"), None
    except ValueError:
        # Nothing of it is shown: who knows what in it is a password?
        remedy = "is it right? in a password / is %2F, @ is %40, # is %23, ? is %3F"
        raise refuse("no-source", f"{scheme}://...", "no address", f"{scheme}://HOST/FOLDER", remedy) from None
    if place.path.endswith(SUFFIX):
        path, _, name = place.path.rpartition("/")
        folder, names = WebFolder(place._replace(path=path)), [unquote(name)]
    else:
        folder, names = WebFolder(place), [SINGLE]
        index = find_index(folder)
        names = list_indexed_names(index) if index else names
    found = [*([index] if index else []), *folder.find_files([*names, *BESIDE])]
    store = WebStore(folder, found)
    if not index and not any(name in store.entries for name in names):
        found_there = f"neither {INDEX} nor {SINGLE}" if names == [SINGLE] else f"no {names[0]}"
        found_there += f" ({folder.denied})" if folder.denied else ""
        expected = f"the address of a {SUFFIX} file, or of a folder with one of these"
        raise refuse("no-source", folder.address, found_there, expected, "is the address right?")
    return RemotePath(store, names[0] if place.path.endswith(SUFFIX) else "")


def find_index(folder: WebFolder) -> FoundFile | None:
    """Finds the index of a folder, and reads all of it; None without one. Raises Refused."""
    found = folder.find_file(INDEX)
    return found and found._replace(head=WebStore(folder, [found]).read_head(found.entry, found.entry.size))


def list_indexed_names(index: FoundFile) -> list[str]:
    """Lists the files that an index names. What is wrong with it is told by who reads it."""
    try:
        named = msgspec.json.decode(index.head, type=WebIndex).weight_map.values()
    except (ValueError, RecursionError):
        return []
    return sorted({name for name in named if "/" not in name and name.isprintable()})
