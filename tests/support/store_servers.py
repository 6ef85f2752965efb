"""Servers of our own that serve a folder: a hub with the store behind it, a web server, a bucket; each with faults.

They know HTTP and the routes of the hub, and nothing of the package.
"""

import filecmp
import hashlib
import json
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "org/model"


def hash_for_git(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def measure_interrupt(served: "ServedFolder", server: str, answered: int, words: list[str]) -> float:
    """Runs a conversion from a server that falls silent after some answers, and interrupts it then. Returns how long it
    took to end, in seconds.
    """
    served.silent, served.silent_after = server, answered
    command = [sys.executable, "-m", "reshard", "convert", *words, "--mp", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while served.count(server) <= answered:
            time.sleep(0.05)
        time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=25)[1]
        assert process.returncode == 130, said
        return time.monotonic() - began


def require_same_files(one: Path, other: Path) -> None:
    """Fails unless two folders have the same files, byte for byte."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


class Request(NamedTuple):
    """A request, and the answer to it."""

    server: str
    """`hub`, `cdn` or `web`."""
    method: str
    path: str
    range: str
    status: int
    authorization: str


@dataclass
class ServedFolder:
    """A folder that is served, what was asked of it, and the faults that are to come."""

    folder: Path
    name: str = NAME
    """Of the repository on the hub."""
    token: str = ""
    """Asked for by the hub, if it is not empty."""
    expires: float = 3600.0
    """In seconds: so long signed addresses are good for."""
    large: tuple[str, ...] = (".safetensors",)
    """The endings of names of files that do not lie in git itself."""
    page: int = 1000
    """So many files are listed at a time."""
    requests: list[Request] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    """In bytes, by server."""
    faults: Counter[str] = field(default_factory=Counter)
    """How many of the next requests are to fail, by fault."""
    delay: float = 0.0
    """In seconds: so long each answer of the store takes to begin."""
    silent: str = ""
    """The server that falls silent, after so many answers:"""
    silent_after: int = 0
    ended_after: int | None = None
    """After so many answers of the store behind the hub, it lets nobody read."""
    certificate: Path | None = None
    """With its key; a server that has one speaks TLS."""
    busiest: int = 0
    """The largest number of requests at a time."""
    endpoint: str = ""
    cdn: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: int = 0

    @property
    def commit(self) -> str:
        return hash_for_git(self.name)

    def list_files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def hash_file(self, path: Path) -> str:
        status = path.stat()
        if status.st_size > 64 << 20:  # holes of some GB in place of weights
            return hashlib.sha256(f"{path.name} {status.st_size}".encode()).hexdigest()
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def is_large(self, path: Path) -> bool:
        return path.name.endswith(self.large)

    def fails(self, fault: str) -> bool:
        with self.lock:
            self.faults[fault] -= 1
            return self.faults[fault] >= 0

    def count(self, server: str, status: int | None = None) -> int:
        return sum(one.server == server and status in (None, one.status) for one in self.requests)

    def is_silent(self, server: str) -> bool:
        """Whether an answer ends in the middle: all of a server do once it has given so many."""
        return server == self.silent and self.count(server) > self.silent_after

    def forget(self) -> None:
        self.requests.clear()
        self.sent.clear()
        self.busiest = 0


class Handler(BaseHTTPRequestHandler):
    """What all servers do: answers, ranges, faults."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    served: ServedFolder
    kind = ""

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with self.served.lock:
            self.served.running += 1
            self.served.busiest = max(self.served.busiest, self.served.running)
        try:
            time.sleep(self.served.delay)
            self.route(unquote(urlsplit(self.path).path))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.served.lock:
                self.served.running -= 1

    def route(self, path: str) -> None:
        raise NotImplementedError

    def note(self, status: int) -> None:
        asked = self.headers.get("Range", ""), status, self.headers.get("Authorization", "")
        with self.served.lock:
            self.served.requests.append(Request(self.kind, self.command, self.path, *asked))

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.note(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: Any, **headers: str) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def send_file(self, path: Path, etag: str) -> None:
        """Sends a file or a range of it, with the faults that are due."""
        size, asked = path.stat().st_size, self.headers.get("Range")
        wanted = self.headers.get("If-Match")
        if wanted and wanted != etag:
            return self.answer(412)
        begin, end, status = 0, size, 200
        if asked and not self.served.fails("whole"):
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
            assert found, asked
            begin, end, status = int(found[1]), min(int(found[2]) + 1, size), 206
            if begin >= size:
                return self.answer(416, Content_Range=f"bytes */{size}")
            if self.served.fails("other-range"):
                begin += 1
        self.note(status)
        self.send_response(status)
        self.send_header("ETag", etag)
        self.send_header("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(end - begin))
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.end_headers()
        return self.send_bytes(path, begin, end)

    def send_bytes(self, path: Path, begin: int, end: int) -> None:
        if self.command == "HEAD":
            return
        stop = begin + (end - begin) // 2 if self.served.fails("cut") else end
        stop = begin if self.served.fails("cut-off") else stop
        half = (begin + stop) // 2 if self.served.is_silent(self.kind) else stop
        with path.open("rb") as file:
            file.seek(begin)
            while begin < stop:
                if begin == half:
                    self.wfile.flush()
                    time.sleep(30)
                data = file.read(min(1 << 20, (half if begin < half else stop) - begin))
                self.wfile.write(data)
                begin += len(data)
                with self.served.lock:
                    self.served.sent[self.kind] += len(data)
        if stop < end:
            self.close_connection = True


class HubHandler(Handler):
    """The hub: what it has, and where that lies."""

    kind = "hub"

    def route(self, path: str) -> None:
        served = self.served
        if served.token and self.headers.get("Authorization") != f"Bearer {served.token}":
            return self.answer(401, b'{"error":"Repository not found"}', X_Error_Code="RepoNotFound")
        if served.fails("quota"):
            return self.answer(
                429, RateLimit='"resolvers";r=0;t=1', RateLimit_Policy='"fixed";"resolvers";q=3000;w=300'
            )
        if served.fails("quota-after"):
            return self.answer(429, Retry_After="1")
        if served.fails("quota-zero"):
            return self.answer(429, Retry_After="0")
        if served.fails("quota-long"):
            return self.answer(429, Retry_After="300")
        if served.fails("busy"):
            return self.answer(503)
        if path in {f"/api/models/{served.name}/revision/{name}" for name in ("main", served.commit)}:
            return self.answer_json({"id": served.name, "sha": served.commit})
        if path.startswith(f"/api/models/{served.name}/revision/"):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if path == f"/api/models/{served.name}/tree/{served.commit}":
            return self.list_tree(path)
        if path.startswith(f"/{served.name}/resolve/{served.commit}/"):
            return self.resolve(path.removeprefix(f"/{served.name}/resolve/{served.commit}/"))
        if path.startswith(f"/api/resolve-cache/models/{served.name}/{served.commit}/"):
            inner = path.removeprefix(f"/api/resolve-cache/models/{served.name}/{served.commit}/")
            return self.send_file(served.folder / inner, f'"{hash_for_git(inner)}"')
        return self.answer(404, X_Error_Code="RepoNotFound")

    def list_tree(self, path: str) -> None:
        served, query = self.served, parse_qs(urlsplit(self.path).query)
        listed: list[dict[str, Any]] = []
        for file in served.list_files():
            name, size = str(file.relative_to(served.folder)), file.stat().st_size
            entry = {"type": "file", "path": name, "size": size, "oid": hash_for_git(name)}
            large = {"lfs": {"oid": served.hash_file(file), "size": size, "pointerSize": 135}}
            listed.append(entry | (large if served.is_large(file) else {}))
        start = int(query.get("cursor", ["0"])[0])
        more = {}
        if start + served.page < len(listed):
            following = f"{served.endpoint}{path}?recursive=true&cursor={start + served.page}"
            more = {"Link": f'<{following}>; rel="next"'}
        self.answer_json(listed[start : start + served.page], **more)

    def resolve(self, inner: str) -> None:
        served, file = self.served, self.served.folder / inner
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        if not served.is_large(file):
            return self.answer(307, Location=f"/api/resolve-cache/models/{served.name}/{served.commit}/{inner}")
        if served.fails("gated"):
            return self.answer(403, X_Error_Code="GatedRepo")
        until = time.time() + served.expires
        digest = served.hash_file(file)
        sign = hashlib.sha256(f"{inner} {until}".encode()).hexdigest()[:16]
        return self.answer(
            302,
            Location=f"{served.cdn}/store/{digest}?name={inner}&Expires={until}&Signature={sign}",
            X_Linked_Size=str(file.stat().st_size),
            X_Linked_ETag=f'"{digest}"',
            X_Repo_Commit=served.commit,
        )


class CdnHandler(Handler):
    """The store behind the hub: what is signed."""

    kind = "cdn"

    def route(self, path: str) -> None:
        served, query = self.served, parse_qs(urlsplit(self.path).query)
        if "Authorization" in self.headers:
            return self.answer(400, b"only one way to authorize")
        is_over = served.ended_after is not None and served.count("cdn") >= served.ended_after
        if time.time() > float(query["Expires"][0]) or served.fails("ended") or is_over:
            return self.answer(403, b"<Error>Request has expired</Error>")
        if served.fails("cdn-busy"):
            return self.answer(503, Retry_After="1")
        return self.send_file(served.folder / query["name"][0], f'"{path.rpartition("/")[2][:32]}"')


class WebHandler(Handler):
    """A plain web server."""

    kind = "web"

    def route(self, path: str) -> None:
        if self.served.fails("busy"):
            return self.answer(503)
        file = self.served.folder / path.lstrip("/")
        if not file.is_file():
            return self.answer(404)
        return self.send_file(file, f'"{self.served.hash_file(file)[:32]}"')


class BucketHandler(Handler):
    """An S3 server with one bucket, `models`, whose folder `inner` is the folder that is served."""

    kind = "s3"

    def route(self, path: str) -> None:
        served, query = self.served, parse_qs(urlsplit(self.path).query)
        if served.token and f"Credential={served.token}/" not in self.headers.get("Authorization", ""):
            return self.answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
        if served.fails("busy"):
            return self.answer(503, b"<Error><Code>SlowDown</Code></Error>")
        if path.strip("/") != "models" and not path.startswith("/models/"):
            return self.answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        if "list-type" in query:
            return self.list_objects(query)
        file = served.folder / path.removeprefix("/models/inner/")
        if not file.is_file():
            return self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return self.send_file(file, f'"{served.hash_file(file)[:32]}"')

    def list_objects(self, query: dict[str, list[str]]) -> None:
        served, items = self.served, []
        for file in served.list_files():
            key = f"inner/{file.relative_to(served.folder)}"
            if key.startswith(query.get("prefix", [""])[0]):
                etag = served.hash_file(file)[:32]
                items.append(
                    f"<Contents><Key>{key}</Key><Size>{file.stat().st_size}</Size><ETag>&quot;{etag}&quot;</ETag>"
                    "<LastModified>2026-11-30T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
                )
        start = int(query.get("continuation-token", ["0"])[0])
        stop = start + served.page
        more = f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < len(items) else ""
        is_cut = str(bool(more)).lower()
        text = f"<Name>models</Name><IsTruncated>{is_cut}</IsTruncated>{more}{''.join(items[start:stop])}"
        self.answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode(), Content_Type="application/xml")


class Server(ThreadingHTTPServer):
    """A server that takes many connections at a time."""

    request_queue_size = 512
    daemon_threads = True


@contextmanager
def run_servers(served: ServedFolder, *handlers: type[Handler]) -> Iterator[list[int]]:
    """A context in which servers run; gives their ports."""
    servers = [Server(("127.0.0.1", 0), type("Bound", (handler,), {"served": served})) for handler in handlers]
    if served.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(served.certificate)
        for server in servers:
            server.socket = context.wrap_socket(server.socket, server_side=True)
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield [server.server_address[1] for server in servers]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


@contextmanager
def serve_hub(folder: Path, **options: Any) -> Iterator[ServedFolder]:
    """A context in which a folder is a repository of a hub, `org/model`; the store behind it has another host name."""
    served = ServedFolder(folder, **options)
    with run_servers(served, HubHandler, CdnHandler) as (hub, cdn):
        served.endpoint, served.cdn = f"http://127.0.0.1:{hub}", f"http://localhost:{cdn}"
        yield served


@contextmanager
def serve_web(folder: Path, **options: Any) -> Iterator[ServedFolder]:
    """A context in which a folder lies on a web server."""
    served = ServedFolder(folder, **options)
    with run_servers(served, WebHandler) as (port,):
        served.endpoint = f"{'https' if served.certificate else 'http'}://127.0.0.1:{port}"
        yield served


@contextmanager
def serve_bucket(folder: Path, **options: Any) -> Iterator[ServedFolder]:
    """A context in which a folder is `s3://models/inner`. With a token, that is the name of the key which may read."""
    served = ServedFolder(folder, **options)
    with run_servers(served, BucketHandler) as (port,):
        served.endpoint = f"http://127.0.0.1:{port}"
        yield served
